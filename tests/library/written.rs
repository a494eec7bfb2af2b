//! Pictures written and read back in every format: pixels, metadata, warnings; and files that are whole or not there.

use std::collections::BTreeMap;
use std::path::Path;

use sd_upscale::files::{self, Loaded};
use sd_upscale::limits::ReadLimits;
use sd_upscale::metadata::Parameters;
use sd_upscale::picture::{DEFAULT_JPEG_QUALITY, Depth, Format, Picture, encode};

use crate::samples::{latents, picture};

/// Writes and reads back.
fn through(picture: &Picture, format: Format, quality: Option<u8>) -> Picture {
    let encoded = encode(picture, format, quality).unwrap();
    match files::read_bytes(&encoded.bytes, "the output", &ReadLimits::default()).unwrap() {
        Loaded::Picture(picture) => picture,
        Loaded::Latents(_) => panic!("latents"),
    }
}

#[test]
fn lossless_formats_give_back_what_was_written_in_every_kind() {
    for name in [
        "rgb.png",
        "gray.png",
        "rgba.png",
        "gray-alpha.png",
        "rgb16.png",
        "gray16.png",
    ] {
        let before = picture(name);
        for format in [
            Format::Png,
            Format::Tiff,
            Format::WebP,
            Format::Bmp,
            Format::Jxl,
        ] {
            if (before.alpha.is_some() && !format.keeps_alpha())
                || (before.depth == Depth::Sixteen
                    && !format.keeps_sixteen_bits(before.alpha.is_some()))
            {
                continue;
            }
            let after = through(&before, format, None);
            let what = format!("{name} as {}", format.name());
            assert_eq!(
                (after.pixels.width, after.pixels.height),
                (before.pixels.width, before.pixels.height),
                "{what}"
            );
            assert_eq!(after.pixels.values, before.pixels.values, "{what}");
            assert_eq!(after.alpha, before.alpha, "{what}");
            assert_eq!(after.depth, before.depth, "{what}");
            let keeps_gray = format.keeps_gray(before.alpha.is_some());
            assert_eq!(after.gray, before.gray && keeps_gray, "{what}");
        }
    }
}

#[test]
fn quality_rules_jpeg_and_webp_and_transparency_is_laid_on_white_with_a_warning() {
    let photo = picture("rgb.png");
    let size = |format, quality| encode(&photo, format, quality).unwrap().bytes.len();
    assert!(size(Format::Jpeg, Some(30)) < size(Format::Jpeg, None));
    assert_eq!(
        size(Format::Jpeg, Some(DEFAULT_JPEG_QUALITY)),
        size(Format::Jpeg, None)
    );
    assert!(size(Format::WebP, Some(30)) < size(Format::WebP, Some(95)));
    let rgba = picture("rgba.png");
    for format in [Format::Jpeg, Format::Bmp] {
        let encoded = encode(&rgba, format, None).unwrap();
        assert!(
            encoded.warnings[0].contains("laid on white"),
            "{:?}",
            encoded.warnings
        );
        let flat = through(&rgba, format, None);
        // The left column is wholly transparent: white, to within JPEG's error beside a picture.
        assert!(
            flat.pixels.values[..3].iter().all(|&v| v > 0.9),
            "{}: {:?}",
            format.name(),
            &flat.pixels.values[..3]
        );
    }
    assert!(encode(&photo, Format::Gif, None).is_err());
}

fn settings() -> Parameters {
    let fields = [
        ("Steps", "20"),
        ("Sampler", "Euler"),
        ("CFG scale", "1"),
        ("Seed", "0"),
        ("Upscaler", "sd-upscale"),
    ];
    Parameters {
        prompt: "an astronaut".into(),
        negative_prompt: String::new(),
        fields: fields.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec(),
    }
}

#[test]
fn metadata_goes_from_every_format_to_every_other_with_our_settings_added() {
    // ICC, EXIF with maker and exposure, and A1111's text.
    let mut before = picture("orientation-6.jpg");
    before.metadata.icc = picture("rgb.png").metadata.icc;
    before.metadata.xmp = Some(b"<x:xmpmeta tiff:Orientation=\"6\"/>".to_vec());
    before.metadata.add_settings(&settings());
    assert!(before.metadata.icc.is_some() && before.metadata.exif.is_some());
    for format in [Format::Png, Format::Jpeg, Format::WebP, Format::Tiff] {
        // Twice: what one format wrote, the next must still carry.
        let once = through(&before, format, None);
        for next in [Format::Png, Format::Jpeg, Format::WebP, Format::Tiff] {
            let after = through(&once, next, None);
            let what = format!("{} to {}", format.name(), next.name());
            assert_eq!(after.metadata.icc, before.metadata.icc, "{what}");
            assert_eq!(
                (after.pixels.width, after.pixels.height),
                (30, 40),
                "{what}: upright, and not turned again"
            );
            let xmp = String::from_utf8(after.metadata.xmp.clone().unwrap_or_default()).unwrap();
            assert_eq!(xmp, "<x:xmpmeta tiff:Orientation=\"1\"/>", "{what}");
            let exif = after
                .metadata
                .exif
                .clone()
                .unwrap_or_else(|| panic!("{what}: no EXIF"));
            for kept in [&b"Camera\0"[..], b"2024:01:02 03:04:05\0"] {
                assert!(
                    exif.windows(kept.len()).any(|w| w == kept),
                    "{what}: {kept:?} is lost"
                );
            }
            let found = after
                .metadata
                .prompt()
                .unwrap_or_else(|| panic!("{what}: no prompt"));
            assert_eq!(found.prompt, "an astronaut", "{what}");
        }
    }
}

#[test]
fn png_text_of_every_kind_is_kept_beside_our_settings() {
    let mut before = picture("a1111.png");
    let original = before.metadata.text("parameters").unwrap().to_owned();
    before.metadata.add_settings(&settings());
    let after = through(&before, Format::Png, None).metadata;
    assert_eq!(after.text("Comment"), Some("kept as it is"));
    assert_eq!(after.text("Title"), Some("Ürsprünglich 日本"));
    let text = after.text("parameters").unwrap();
    assert!(text.starts_with(&original), "{text}");
    assert!(
        text.ends_with("Upscaler: sd-upscale, Upscale prompt: an astronaut"),
        "{text}"
    );
    assert_eq!(text.matches("parameters").count(), 0);

    let mut comfy = picture("comfy.png");
    let graph = comfy.metadata.text("prompt").map(str::to_owned);
    comfy.metadata.add_settings(&settings());
    let png = through(&comfy, Format::Png, None).metadata;
    assert_eq!(png.text("prompt"), graph.as_deref());
    assert!(png.text("workflow").is_some());
    // WebP holds the graph where ComfyUI puts it; JPEG cannot, and that is said.
    comfy.metadata.text.retain(|(key, _)| key != "parameters");
    let webp = through(&comfy, Format::WebP, None).metadata;
    assert_eq!(webp.prompt().unwrap().negative, "text, watermark");
    let warnings = encode(&comfy, Format::Jpeg, None).unwrap().warnings;
    assert_eq!(warnings, ["not kept in JPEG: prompt, workflow"]);
}

#[test]
fn a_finished_file_is_complete_and_no_beginning_of_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out");
    let photo = picture("rgba.png");
    let mut files: Vec<(String, Vec<u8>)> = Format::WRITABLE
        .iter()
        .map(|&f| (f.name().to_owned(), encode(&photo, f, None).unwrap().bytes))
        .collect();
    let ours = latents("f32.safetensors")
        .to_safetensors(&BTreeMap::new())
        .unwrap();
    files.push(("safetensors".into(), ours));
    for (name, bytes) in files {
        files::write(&path, &bytes).unwrap();
        assert!(files::is_complete(&path), "{name}");
        for length in (0..bytes.len()).step_by(7).chain([bytes.len() - 1]) {
            std::fs::write(&path, &bytes[..length]).unwrap();
            assert!(
                !files::is_complete(&path),
                "{name} cut to {length} of {} bytes",
                bytes.len()
            );
        }
    }
    assert!(!files::is_complete(&folder.path().join("absent")));
}

#[test]
fn writing_leaves_nothing_behind_when_it_fails_and_replaces_whole_files_when_it_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let names = || -> Vec<_> {
        std::fs::read_dir(folder.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect()
    };
    let path = folder.path().join("out.png");
    files::write(&path, b"first").unwrap();
    files::write(&path, b"second").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"second");
    assert_eq!(names(), ["out.png"]);

    // A folder of that name cannot be replaced by a file.
    let taken = folder.path().join("taken.png");
    std::fs::create_dir(&taken).unwrap();
    std::fs::write(taken.join("inside"), b"").unwrap();
    let message = format!("{:#}", files::write(&taken, b"bytes").unwrap_err());
    assert!(message.contains("taken.png"), "{message}");
    assert_eq!(names().len(), 2, "no temporary file is left: {:?}", names());
    let message = format!(
        "{:#}",
        files::write(&folder.path().join("no/such/out.png"), b"").unwrap_err()
    );
    assert!(message.contains("cannot create a file in"), "{message}");
}

#[test]
fn only_our_own_old_temporary_files_are_swept_away() {
    let folder = tempfile::tempdir().unwrap();
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    for name in [
        ".a.png.sd-upscale-AbCdEf.tmp",
        ".b.png.other-AbCdEf.tmp",
        "a.png",
    ] {
        let file = std::fs::File::create(folder.path().join(name)).unwrap();
        file.set_modified(old).unwrap();
    }
    std::fs::write(folder.path().join(".new.png.sd-upscale-AbCdEf.tmp"), b"").unwrap();
    assert_eq!(files::clean_stale(folder.path()), 1);
    assert!(!folder.path().join(".a.png.sd-upscale-AbCdEf.tmp").exists());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);
}

#[cfg(unix)]
#[test]
fn a_new_file_has_the_mode_of_any_new_file_and_an_existing_one_keeps_its_own() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let (ours, plain) = (folder.path().join("ours"), folder.path().join("plain"));
    files::write(&ours, b"x").unwrap();
    std::fs::write(&plain, b"x").unwrap();
    assert_eq!(mode(&ours), mode(&plain));
    std::fs::set_permissions(&ours, std::fs::Permissions::from_mode(0o640)).unwrap();
    files::write(&ours, b"y").unwrap();
    assert_eq!(mode(&ours), 0o640);
}
