//! What a picture has besides its colours: metadata, alpha, depth, greyness; and the flags that rule the output file.

use image::ColorType;
use sd_upscale::files::{self, Loaded};
use sd_upscale::limits::ReadLimits;
use sd_upscale::metadata::Metadata;
use sd_upscale::picture::Picture;

use super::setup::*;

/// Upscales a file of `tests/data/files` to `out.EXT`, and gives the path of that.
#[track_caller]
fn upscaled(folder: &Path, name: &str, extension: &str, arguments: &str) -> (PathBuf, Ran) {
    let input = data(&format!("files/{name}"));
    let arguments = format!("{} -o out.{extension} {arguments}", input.display());
    let ran = run(folder, arguments.trim()).ends_in(0);
    (folder.join(format!("out.{extension}")), ran)
}

/// As the library reads it: upright.
fn picture_of(path: &Path) -> Picture {
    match files::read_path(path, &ReadLimits::default()).unwrap() {
        Loaded::Picture(picture) => picture,
        Loaded::Latents(_) => panic!("latents"),
    }
}

fn metadata(path: &Path) -> Metadata {
    picture_of(path).metadata
}

#[test]
fn the_prompt_of_the_metadata_is_used_and_that_is_said() {
    for (name, prompt) in [
        ("a1111.png", "a (portrait:1.2) of an astronaut, orange suit"),
        (
            "a1111.jpg",
            "a (portrait:1.2) of an astronaut 日本, orange suit",
        ),
        (
            "a1111.webp",
            "a (portrait:1.2) of an astronaut 日本, orange suit",
        ),
        ("marked.latent", "beautiful scenery, purple galaxy bottle"),
    ] {
        let folder = folder();
        let (path, ran) = upscaled(folder.path(), name, "png", "");
        ran.says(&["using the prompt of its metadata", prompt]);
        let stored = image(&path).to_rgb8();
        // The same prompt given by hand makes the same picture, another one another.
        let input = data(&format!("files/{name}")).display().to_string();
        let with = |prompt: &str| {
            let mut command = small(folder.path(), "-s 1 -o by-hand.png");
            command.args([&input, "-p", prompt]);
            finish(command, b"")
                .ends_in(0)
                .never_says("using the prompt");
            image(folder.path().join("by-hand.png")).to_rgb8()
        };
        assert!(with(prompt) == stored, "{name}");
        assert!(with("") != stored, "{name}");
    }
}

#[test]
fn metadata_is_kept_and_the_settings_are_added() {
    for extension in ["png", "jpg", "webp", "tif"] {
        let folder = folder();
        let (path, _) = upscaled(
            folder.path(),
            "orientation-6.jpg",
            extension,
            "--seed 42 -p lighthouse",
        );
        let before = metadata(&data("files/orientation-6.jpg"));
        let after = metadata(&path);
        assert!(before.exif.is_some());
        assert!(after.exif.is_some(), "{extension}");
        let found = after.prompt().unwrap_or_else(|| panic!("{extension}"));
        assert_eq!(found.prompt, "lighthouse", "{extension}");
    }
    let folder = folder();
    let (path, _) = upscaled(folder.path(), "a1111.png", "png", "--seed 42");
    let after = metadata(&path);
    let parameters = after.text("parameters").unwrap();
    let before = metadata(&data("files/a1111.png"));
    let before = before.text("parameters").unwrap();
    let first = before.lines().next().unwrap();
    assert!(parameters.starts_with(first), "{parameters}");
    for words in ["Seed: 1234", "Upscale seed: 42", "Upscale steps: 1"] {
        assert!(parameters.contains(words), "{parameters}");
    }
}

#[test]
fn exiftool_reads_the_metadata_that_was_written() {
    let exiftool = |path: &Path, tag: &str| {
        let output = std::process::Command::new("exiftool")
            .args(["-s3", tag])
            .arg(path)
            .output();
        output.map(|output| {
            let warnings = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success() && warnings.is_empty(), "{warnings}");
            String::from_utf8(output.stdout).unwrap().trim().to_string()
        })
    };
    if exiftool(&data("files/rgb.png"), "-FileType").is_err() {
        println!("not run: there is no exiftool here");
        return;
    }
    let before = data("files/orientation-6.jpg");
    for (extension, tag) in [
        ("png", "-Parameters"),
        ("jpg", "-UserComment"),
        ("webp", "-UserComment"),
        ("tif", "-UserComment"),
    ] {
        let folder = folder();
        let arguments = "--seed 42 -p lighthouse";
        let (path, _) = upscaled(folder.path(), "orientation-6.jpg", extension, arguments);
        let read = |tag: &str| exiftool(&path, tag).unwrap();
        assert!(read(tag).starts_with("lighthouse"), "{}", read(tag));
        assert!(read(tag).contains("Seed: 42"), "{}", read(tag));
        let (width, height) = size(&path);
        assert_eq!(read("-ImageSize"), format!("{width}x{height}"));
        for kept in ["-Make", "-Model"] {
            let expected = exiftool(&before, kept).unwrap();
            assert_eq!(read(kept), expected, "{kept} of {extension}");
        }
        let orientation = read("-Orientation");
        assert!(
            ["", "Horizontal (normal)"].contains(&&*orientation),
            "turned twice: {orientation}"
        );
        assert_eq!(read("-Warning"), "", "{extension}");
    }
    assert_ne!(exiftool(&before, "-Make").unwrap(), "");
}

#[test]
fn strip_writes_no_metadata_but_the_colour_profile() {
    for (name, extension) in [
        ("a1111.png", "png"),
        ("orientation-6.jpg", "jpg"),
        ("a1111.webp", "webp"),
    ] {
        let folder = folder();
        let (path, _) = upscaled(folder.path(), name, extension, "--strip");
        let after = metadata(&path);
        let profile = metadata(&data(&format!("files/{name}"))).icc;
        assert_eq!(after.icc, profile, "{name}: it decides the colours");
        assert!(after.exif.is_none() && after.xmp.is_none());
        assert!(after.iptc.is_none() && after.density.is_none());
        assert!(after.text.is_empty(), "{:?}", after.text);
        // Turned upright nevertheless.
        let low = picture_of(&data(&format!("files/{name}")));
        assert_eq!(
            size(path),
            (2 * low.pixels.width as u32, 2 * low.pixels.height as u32),
            "{name}"
        );
    }
    let folder = folder();
    let (path, _) = upscaled(folder.path(), "rgb.png", "png", "--strip");
    let after = metadata(&path);
    assert_eq!(after.icc, metadata(&data("files/rgb.png")).icc);
    assert!(after.icc.is_some() && after.text.is_empty());
}

#[test]
fn alpha_greyness_and_depth_are_kept() {
    for (name, color) in [
        ("rgb.png", ColorType::Rgb8),
        ("rgba.png", ColorType::Rgba8),
        ("opaque-alpha.png", ColorType::Rgb8),
        ("gray.png", ColorType::L8),
        ("gray-alpha.png", ColorType::La8),
        ("gray16.png", ColorType::L16),
        ("rgb16.png", ColorType::Rgb16),
        ("palette-trns.png", ColorType::Rgba8),
        ("palette.png", ColorType::Rgb8),
        ("cmyk.jpg", ColorType::Rgb8),
        ("rgb16.tif", ColorType::Rgb16),
    ] {
        let folder = folder();
        let (path, _) = upscaled(folder.path(), name, "png", "");
        let made = image(&path);
        assert_eq!(made.color(), color, "{name}");
    }
}

#[test]
fn alpha_is_upscaled_and_not_invented() {
    let folder = folder();
    let (path, _) = upscaled(folder.path(), "rgba.png", "png", "");
    let (low, made) = (image(data("files/rgba.png")), image(path).to_rgba8());
    let low = low.to_rgba8();
    assert_eq!(made.width(), 2 * low.width());
    let mean = |image: &image::RgbaImage| {
        let sum: f64 = image.pixels().map(|p| f64::from(p.0[3])).sum();
        sum / f64::from(image.width() * image.height())
    };
    assert!(low.pixels().any(|p| p.0[3] == 0) && low.pixels().any(|p| p.0[3] == 255));
    assert!((mean(&made) - mean(&low)).abs() < 3.0);
}

#[test]
fn animations_are_done_by_their_first_frame_with_a_warning() {
    for name in ["animated.gif", "animated.webp", "animated.png"] {
        let folder = folder();
        let (path, ran) = upscaled(folder.path(), name, "png", "");
        ran.says(&["warning", "first"]);
        let low = image(data(&format!("files/{name}")));
        assert_eq!(size(path), (2 * low.width(), 2 * low.height()));
    }
}

#[test]
fn quality_makes_smaller_files() {
    let folder = folder_of(&[("in.png", 64, 64)]);
    for extension in ["jpg", "webp"] {
        let bytes = |quality: u8| {
            let arguments = format!("in.png -o out.{extension} --quality {quality}");
            run(folder.path(), &arguments).ends_in(0);
            fs::read(folder.path().join(format!("out.{extension}"))).unwrap()
        };
        assert!(bytes(20).len() < bytes(95).len(), "{extension}");
    }
}

#[test]
fn colour_fixes_bring_the_mean_colour_to_that_of_the_input() {
    let folder = folder_of(&[("in.png", 32, 32)]);
    let mean = |path: &str| -> [f64; 3] {
        let picture = image(folder.path().join(path)).to_rgb8();
        let count = f64::from(picture.width() * picture.height());
        std::array::from_fn(|channel| {
            let sum: f64 = picture.pixels().map(|p| f64::from(p.0[channel])).sum();
            sum / count
        })
    };
    let distance = |fix: &str| -> f64 {
        run(
            folder.path(),
            &format!("in.png -o out.png --color-fix {fix}"),
        )
        .ends_in(0);
        let (made, low) = (mean("out.png"), mean("in.png"));
        made.iter().zip(low).map(|(a, b)| (a - b).abs()).sum()
    };
    // The small model's weights are random, so its colours are far off; clipping keeps the fixes from being exact.
    let none = distance("none");
    for fix in ["adain", "wavelet"] {
        let fixed = distance(fix);
        println!("{fix}: {none:.1} -> {fixed:.1}");
        assert!(fixed < 0.5 * none, "{fix}: {none:.1} -> {fixed:.1}");
    }
}
