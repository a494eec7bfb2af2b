//! Files written by other programs (Pillow, tifffile, NumPy, safetensors; `tests/data/make_files.py`), read by the
//! library: pixels and values against what those programs read from them, and what must be refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use sd_upscale::input::{self, Loaded, ReadLimits};
use sd_upscale::latents::{LatentKind, LatentScale, Latents};
use sd_upscale::picture::{Depth, Format, Picture};
use sd_upscale::settings::Settings;
use sd_upscale::{encode, output};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/files")
}

fn read(name: &str) -> anyhow::Result<Loaded> {
    input::read_path(&folder().join(name), &ReadLimits::default())
}

fn picture(name: &str) -> Picture {
    match read(name).unwrap_or_else(|e| panic!("{name}: {e:#}")) {
        Loaded::Picture(picture) => picture,
        Loaded::Latents(_) => panic!("{name} was read as latents"),
    }
}

fn latents(name: &str) -> Latents {
    match read(name).unwrap_or_else(|e| panic!("{name}: {e:#}")) {
        Loaded::Latents(latents) => latents,
        Loaded::Picture(_) => panic!("{name} was read as an image"),
    }
}

fn refusal(name: &str) -> String {
    match read(name) {
        Ok(_) => panic!("{name} was accepted"),
        Err(e) => format!("{e:#}"),
    }
}

/// What the other program read: height, width, channels, values in levels, and the highest level.
struct Expected {
    shape: [usize; 3],
    values: Vec<f32>,
    top: f32,
}

fn expected(name: &str) -> Expected {
    let bytes = std::fs::read(folder().join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file
        .tensor(name)
        .unwrap_or_else(|_| panic!("make_files.py keeps no {name}"));
    let shape = tensor.shape().try_into().unwrap();
    let data = tensor.data();
    let (values, top) = match tensor.dtype() {
        Dtype::U8 => (data.iter().map(|&v| f32::from(v)).collect(), 255.0),
        Dtype::BOOL => (data.iter().map(|&v| f32::from(v)).collect(), 1.0),
        Dtype::U16 => {
            let words = data.as_chunks().0.iter();
            (
                words.map(|&w| f32::from(u16::from_le_bytes(w))).collect(),
                65535.0,
            )
        }
        other => panic!("{name}: {other:?}"),
    };
    Expected { shape, values, top }
}

/// The largest difference from the other program's pixels, in levels of the file's depth, and the mean.
fn distance(name: &str) -> (f32, f32) {
    let picture = picture(name);
    let want = expected(name);
    let [height, width, channels] = want.shape;
    assert_eq!(
        (picture.width, picture.height),
        (width, height),
        "{name}: size"
    );
    let alpha = matches!(channels, 2 | 4);
    let colors = channels - usize::from(alpha);
    let mut worst = 0f32;
    let mut sum = 0f64;
    for (i, pixel) in want.values.chunks_exact(channels).enumerate() {
        let mut ours = picture.rgb[3 * i..3 * i + 3].to_vec();
        ours.truncate(colors);
        if alpha {
            ours.push(picture.alpha.as_ref().map_or(1.0, |a| a[i]));
        }
        for (ours, theirs) in ours.iter().zip(pixel) {
            let difference = (ours * want.top - theirs).abs();
            worst = worst.max(difference);
            sum += f64::from(difference);
        }
    }
    (worst, (sum / want.values.len() as f64) as f32)
}

#[test]
fn lossless_files_are_read_to_the_pixel_as_other_programs_read_them() {
    for name in [
        "rgb.png",
        "gray.png",
        "rgba.png",
        "gray-alpha.png",
        "opaque-alpha.png",
        "palette.png",
        "palette-trns.png",
        "one-bit.png",
        "rgb16.png",
        "gray16.png",
        "animated.png",
        "a1111.png",
        "comfy.png",
        "lossless.webp",
        "alpha.webp",
        "a1111.webp",
        "animated.webp",
        "rgb.tif",
        "palette.tif",
        "rgba.tif",
        "one-bit.tif",
        "rgb16.tif",
        "gray16.tif",
        "planar.tif",
        "float.tif",
        "gray-float.tif",
        "rgb.bmp",
        "palette.bmp",
        "animated.gif",
        "transparent.gif",
    ] {
        let (worst, _) = distance(name);
        // Not exactly 0: v / 255 * 255 in f32 may be off by half an ulp of 65535.
        assert!(worst < 0.01, "{name}: a level differs by {worst}");
    }
}

#[test]
fn lossy_files_are_read_within_a_decoders_rounding() {
    // WebP's decoding is defined to the bit. JPEG's is not: the inverse DCT may be off by one level, and by a few where
    // chroma is enlarged (4:2:0), which decoders interpolate differently. A wrong colour conversion is off by tens.
    for (name, most, mean) in [
        ("lossy.webp", 0.01, 0.001),
        ("gray.jpg", 1.01, 0.1),
        ("cmyk.jpg", 2.01, 0.1),
        ("progressive-420.jpg", 6.01, 0.5),
        ("a1111.jpg", 6.01, 0.5),
        ("jpeg-named.png", 6.01, 0.5),
    ] {
        let (worst, average) = distance(name);
        assert!(
            worst < most && average < mean,
            "{name}: worst {worst}, mean {average}"
        );
    }
}

#[test]
fn all_eight_exif_orientations_are_turned_upright() {
    for orientation in 1..=8 {
        let name = format!("orientation-{orientation}.jpg");
        let (worst, mean) = distance(&name);
        // Without enlarged chroma: one level of the inverse DCT, two after the colour conversion. A wrong turn is off by
        // a hundred.
        assert!(
            worst < 3.01 && mean < 0.2,
            "{name}: worst {worst}, mean {mean}"
        );
        let turned = orientation > 4;
        assert_eq!(picture(&name).width, if turned { 30 } else { 40 });
    }
    assert_eq!(
        picture("rgb.tif").width,
        30,
        "TIFF's own orientation tag, 8"
    );
    assert_eq!(picture("a1111.png").width, 30, "a PNG's eXIf chunk, 6");
}

#[test]
fn grey_depth_and_transparency_are_told_as_they_are() {
    for name in [
        "gray.png",
        "gray-alpha.png",
        "one-bit.png",
        "gray16.png",
        "gray.jpg",
        "gray16.tif",
        "gray-float.tif",
    ] {
        assert!(picture(name).gray, "{name}");
    }
    for name in ["rgb.png", "palette.png", "cmyk.jpg", "planar.tif"] {
        assert!(!picture(name).gray, "{name}");
    }
    for name in [
        "rgb16.png",
        "gray16.png",
        "rgb16.tif",
        "gray16.tif",
        "float.tif",
        "gray-float.tif",
    ] {
        assert_eq!(picture(name).depth, Depth::Sixteen, "{name}");
    }
    for name in ["rgb.png", "palette.png", "rgba.tif"] {
        assert_eq!(picture(name).depth, Depth::Eight, "{name}");
    }
    for name in [
        "rgba.png",
        "gray-alpha.png",
        "palette-trns.png",
        "alpha.webp",
        "rgba.tif",
        "transparent.gif",
    ] {
        assert!(picture(name).alpha.is_some(), "{name}");
    }
    for name in [
        "opaque-alpha.png",
        "rgb.png",
        "lossless.webp",
        "animated.gif",
    ] {
        assert!(picture(name).alpha.is_none(), "{name}: opaque");
    }
}

#[test]
fn animations_give_their_first_frame_and_say_so_and_a_wrong_extension_is_said_too() {
    for name in ["animated.png", "animated.webp", "animated.gif"] {
        let warnings = picture(name).warnings;
        assert_eq!(
            warnings,
            ["animated: the first of 3 frames is used, the others are dropped"],
            "{name}"
        );
    }
    let warnings = picture("jpeg-named.png").warnings;
    assert_eq!(
        warnings,
        ["named .png, but its content is JPEG: read as JPEG"]
    );
    assert_eq!(
        picture("pages.tif").warnings,
        ["several pages: the first is used, the others are dropped"]
    );
    assert!(picture("rgb.png").warnings.is_empty());
}

#[test]
fn prompts_are_found_in_every_place_that_a1111_and_comfyui_use() {
    for name in ["a1111.png", "a1111.jpg", "a1111.webp"] {
        let found = picture(name)
            .metadata
            .prompt()
            .unwrap_or_else(|| panic!("{name}: none found"));
        assert!(
            found.prompt.starts_with("a (portrait:1.2) of an astronaut"),
            "{name}: {found:?}"
        );
        assert!(found.prompt.ends_with("orange suit"), "{name}: {found:?}");
        assert_eq!(
            found.prompt.contains("日本"),
            name != "a1111.png",
            "{name}: {found:?}"
        );
        assert_eq!(found.negative, "blurry, low quality", "{name}");
    }
    let from_latent = latents("marked.latent").prompt();
    for found in [picture("comfy.png").metadata.prompt(), from_latent] {
        let found = found.expect("the graph holds a prompt");
        assert_eq!(found.prompt, "beautiful scenery, purple galaxy bottle");
        assert_eq!(found.negative, "text, watermark");
    }
    assert_eq!(picture("rgb.png").metadata.prompt(), None);
    let kept = latents("marked.latent").image_metadata();
    assert_eq!(kept.prompt().unwrap().negative, "text, watermark");
    assert!(kept.text("workflow").is_some());
}

/// Writes and reads back.
fn through(picture: &Picture, format: Format, quality: Option<u8>) -> Picture {
    let encoded = encode::encode(picture, format, quality).unwrap();
    match input::read_bytes(&encoded.bytes, "the output", &ReadLimits::default()).unwrap() {
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
        for format in [Format::Png, Format::Tiff, Format::WebP, Format::Bmp] {
            if (before.alpha.is_some() && !format.keeps_alpha())
                || (before.depth == Depth::Sixteen && !format.keeps_sixteen_bits())
            {
                continue;
            }
            let after = through(&before, format, None);
            let what = format!("{name} as {}", format.name());
            assert_eq!(
                (after.width, after.height),
                (before.width, before.height),
                "{what}"
            );
            assert_eq!(after.rgb, before.rgb, "{what}");
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
    let size = |format, quality| encode::encode(&photo, format, quality).unwrap().bytes.len();
    assert!(size(Format::Jpeg, Some(30)) < size(Format::Jpeg, None));
    assert_eq!(
        size(Format::Jpeg, Some(encode::DEFAULT_JPEG_QUALITY)),
        size(Format::Jpeg, None)
    );
    assert!(size(Format::WebP, Some(30)) < size(Format::WebP, Some(95)));
    let rgba = picture("rgba.png");
    for format in [Format::Jpeg, Format::Bmp] {
        let encoded = encode::encode(&rgba, format, None).unwrap();
        assert!(
            encoded.warnings[0].contains("laid on white"),
            "{:?}",
            encoded.warnings
        );
        let flat = through(&rgba, format, None);
        // The left column is wholly transparent: white, to within JPEG's error beside a picture.
        assert!(
            flat.rgb[..3].iter().all(|&v| v > 0.9),
            "{}: {:?}",
            format.name(),
            &flat.rgb[..3]
        );
    }
    assert!(encode::encode(&photo, Format::Gif, None).is_err());
}

fn settings() -> Settings {
    let fields = [
        ("Steps", "20"),
        ("Sampler", "Euler"),
        ("CFG scale", "1"),
        ("Seed", "0"),
        ("Upscaler", "sd-upscale"),
    ];
    Settings {
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
                (after.width, after.height),
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
    let warnings = encode::encode(&comfy, Format::Jpeg, None).unwrap().warnings;
    assert_eq!(warnings, ["not kept in JPEG: prompt, workflow"]);
}

/// The largest difference from the latents that all the files hold, in scaled units.
fn off_by(name: &str, choice: LatentScale) -> (f32, Option<String>) {
    let (scaled, message) = latents(name).into_scaled(choice, 0.18215);
    assert_eq!(
        (scaled.batch, scaled.height, scaled.width),
        (1, 6, 8),
        "{name}"
    );
    let bytes = std::fs::read(folder().join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let want = file
        .tensor("latents")
        .unwrap()
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|&b| f32::from_le_bytes(b));
    let differences = scaled.data.iter().zip(want).map(|(a, b)| (a - b).abs());
    (differences.fold(0.0, f32::max), message)
}

#[test]
fn every_kind_of_latents_is_read_to_the_same_scaled_values() {
    // Rounding of the values' own type: 11 bits for f16, 8 for bf16, at values up to 4; else of the scaling in f32.
    for (name, most, judged) in [
        ("f32.safetensors", 0.0, true),
        ("f16.safetensors", 4.0 / 2048.0, true),
        ("bf16.safetensors", 4.0 / 256.0, true),
        ("f64-rank3.safetensors", 0.0, true),
        ("unstated-raw.safetensors", 1e-6, true),
        ("marked.latent", 1e-6, false),
        ("unmarked.latent", 0.0, false),
        ("sd-scripts.npz", 1e-6, false),
        ("sd-scripts-sized.npz", 1e-6, false),
        ("fortran.npz", 1e-6, false),
    ] {
        let (difference, message) = off_by(name, LatentScale::Auto);
        assert!(difference <= most, "{name}: off by {difference}");
        assert_eq!(message.is_some(), judged, "{name}: {message:?}");
    }
    let (difference, _) = off_by("f32.safetensors", LatentScale::Raw);
    assert!(difference > 1.0, "--latent-scale raw overrules the spread");
    assert_eq!(off_by("unmarked.latent", LatentScale::Scaled), (0.0, None));
    assert_eq!(latents("batch3.safetensors").batch, 3);
    let several = &latents("sd-scripts-sized.npz").warnings;
    assert_eq!(several.len(), 1, "{several:?}");
}

#[test]
fn latents_are_written_so_that_each_kind_is_read_back_as_it_was() {
    let ours = latents("f32.safetensors")
        .into_scaled(LatentScale::Auto, 0.18215)
        .0;
    let metadata = BTreeMap::from([("seed".to_owned(), "7".to_owned())]);
    let read = |bytes: &[u8]| match input::read_bytes(bytes, "the output", &ReadLimits::default())
        .unwrap()
    {
        Loaded::Latents(latents) => latents,
        Loaded::Picture(_) => panic!("a picture"),
    };
    let diffusers = read(&ours.to_safetensors(&metadata).unwrap());
    assert_eq!(diffusers.kind, LatentKind::Ours);
    assert_eq!(diffusers.data, ours.data);
    assert_eq!(
        diffusers.metadata.get("seed").map(String::as_str),
        Some("7")
    );
    let (again, message) = diffusers.into_scaled(LatentScale::Auto, 0.18215);
    assert_eq!((again.data, message), (ours.data.clone(), None));
    let comfy = read(&ours.to_comfy(0.18215, &metadata).unwrap());
    assert_eq!(comfy.kind, LatentKind::ComfyRaw);
    let scaled = comfy.into_scaled(LatentScale::Auto, 0.18215).0;
    let worst = scaled
        .data
        .iter()
        .zip(&ours.data)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    assert!(
        worst < 1e-6,
        "a division and a multiplication in f32: off by {worst}"
    );
}

#[test]
fn foreign_latents_are_refused_with_their_reason() {
    for (name, reason) in [
        (
            "refused-flux.safetensors",
            "16 channels are those of Stable Diffusion 3, Flux",
        ),
        ("refused-integers.safetensors", "holds I64 values"),
        ("refused-rank2.safetensors", "has shape [6, 8]"),
        ("refused-channels-last.safetensors", "the channels are last"),
        (
            "refused-nan.safetensors",
            "holds NaN or infinity: 1 of 192 values",
        ),
        ("refused-empty.safetensors", "it is empty"),
        (
            "refused-weights.safetensors",
            "looks like a model's weights",
        ),
    ] {
        let message = refusal(name);
        assert!(message.contains(reason), "{name}: {message}");
        assert!(
            message.contains(name),
            "{name}: the message names the file: {message}"
        );
    }
}

#[test]
fn what_is_no_image_is_named_and_limits_are_named_with_their_flag() {
    let read = |bytes: &[u8]| {
        format!(
            "{:#}",
            input::read_bytes(bytes, "x", &ReadLimits::default()).unwrap_err()
        )
    };
    assert!(read(b"").contains("it is empty"));
    assert!(read(b"hello, I am a text\n").contains("it is text"));
    assert!(read(b"\0\0\0\x1cftypavif....").contains("AVIF"));
    assert!(read(b"\0\x01\x02\x03\x04\x05\x06\x07\x08\x09").contains("no known format"));
    let header = [&1000u64.to_le_bytes()[..], b"{\"latents\":"].concat();
    assert!(
        read(&header)
            .contains("header should have 1000 bytes, but only 11 follow: it was cut short")
    );

    let small = ReadLimits { max_pixels: 1000 };
    let message = format!(
        "{:#}",
        input::read_path(&folder().join("rgb.png"), &small).unwrap_err()
    );
    assert!(
        message.contains("40x30 = 1200 pixels, above the limit of 1000"),
        "{message}"
    );
    assert!(message.contains("--max-pixels 1200"), "{message}");
    for name in [
        "gray.jpg",
        "lossy.webp",
        "rgb.tif",
        "palette.tif",
        "rgb.bmp",
        "animated.gif",
        "f32.safetensors",
        "sd-scripts.npz",
    ] {
        let message = format!(
            "{:#}",
            input::read_path(&folder().join(name), &small).unwrap_err()
        );
        assert!(message.contains("--max-pixels"), "{name}: {message}");
    }
    let message = format!("{:#}", input::read_path(&folder(), &small).unwrap_err());
    assert!(message.contains("it is a folder"), "{message}");
}

#[test]
fn a_finished_file_is_complete_and_no_beginning_of_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out");
    let photo = picture("rgba.png");
    let mut files: Vec<(String, Vec<u8>)> = Format::WRITABLE
        .iter()
        .map(|&f| {
            (
                f.name().to_owned(),
                encode::encode(&photo, f, None).unwrap().bytes,
            )
        })
        .collect();
    let ours = latents("f32.safetensors")
        .to_safetensors(&BTreeMap::new())
        .unwrap();
    files.push(("safetensors".into(), ours));
    for (name, bytes) in files {
        output::write(&path, &bytes).unwrap();
        assert!(output::is_complete(&path), "{name}");
        for length in (0..bytes.len()).step_by(7).chain([bytes.len() - 1]) {
            std::fs::write(&path, &bytes[..length]).unwrap();
            assert!(
                !output::is_complete(&path),
                "{name} cut to {length} of {} bytes",
                bytes.len()
            );
        }
    }
    assert!(!output::is_complete(&folder.path().join("absent")));
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
    output::write(&path, b"first").unwrap();
    output::write(&path, b"second").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"second");
    assert_eq!(names(), ["out.png"]);

    // A folder of that name cannot be replaced by a file.
    let taken = folder.path().join("taken.png");
    std::fs::create_dir(&taken).unwrap();
    std::fs::write(taken.join("inside"), b"").unwrap();
    let message = format!("{:#}", output::write(&taken, b"bytes").unwrap_err());
    assert!(message.contains("taken.png"), "{message}");
    assert_eq!(names().len(), 2, "no temporary file is left: {:?}", names());
    let message = format!(
        "{:#}",
        output::write(&folder.path().join("no/such/out.png"), b"").unwrap_err()
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
    assert_eq!(output::clean_stale(folder.path()), 1);
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
    output::write(&ours, b"x").unwrap();
    std::fs::write(&plain, b"x").unwrap();
    assert_eq!(mode(&ours), mode(&plain));
    std::fs::set_permissions(&ours, std::fs::Permissions::from_mode(0o640)).unwrap();
    output::write(&ours, b"y").unwrap();
    assert_eq!(mode(&ours), 0o640);
}
