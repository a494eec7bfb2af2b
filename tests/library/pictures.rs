//! Images written by other programs (Pillow, tifffile; `tests/data/make_files.py`), read by the library: pixels against
//! what those programs read from them, metadata, and what must be refused.

use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use sd_upscale::files;
use sd_upscale::limits::ReadLimits;
use sd_upscale::picture::{Depth, Format};

use crate::data::data;
use crate::samples::{latents, picture};

/// What the other program read: height, width, channels, values in levels, and the highest level.
struct Expected {
    shape: [usize; 3],
    values: Vec<f32>,
    top: f32,
}

fn expected(name: &str) -> Expected {
    let bytes = std::fs::read(data("files/expected.safetensors")).unwrap();
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
        (picture.pixels.width, picture.pixels.height),
        (width, height),
        "{name}: size"
    );
    let alpha = matches!(channels, 2 | 4);
    let colors = channels - usize::from(alpha);
    let mut worst = 0f32;
    let mut sum = 0f64;
    for (i, pixel) in want.values.chunks_exact(channels).enumerate() {
        let mut ours = picture.pixels.values[3 * i..3 * i + 3].to_vec();
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
        assert_eq!(picture(&name).pixels.width, if turned { 30 } else { 40 });
    }
    assert_eq!(
        picture("rgb.tif").pixels.width,
        30,
        "TIFF's own orientation tag, 8"
    );
    assert_eq!(
        picture("a1111.png").pixels.width,
        30,
        "a PNG's eXIf chunk, 6"
    );
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

#[test]
fn what_is_no_image_is_named_and_limits_are_named_with_their_flag() {
    let read = |bytes: &[u8]| {
        format!(
            "{:#}",
            files::read_bytes(bytes, "x", &ReadLimits::default()).unwrap_err()
        )
    };
    assert!(read(b"").contains("it is empty"));
    assert!(read(b"hello, I am a text\n").contains("it is text"));
    let avif = read(b"\0\0\0\x1cftypavif....");
    if Format::Heif.is_read_here() {
        assert!(avif.contains("cut short"), "{avif}");
    } else {
        assert!(avif.contains("it is an AVIF image"), "{avif}");
        assert!(avif.contains("install libheif"), "{avif}");
        assert!(avif.contains("heif-convert IN OUT.png"), "{avif}");
    }
    assert!(read(b"\0\x01\x02\x03\x04\x05\x06\x07\x08\x09").contains("no known format"));
    let header = [&1000u64.to_le_bytes()[..], b"{\"latents\":"].concat();
    assert!(
        read(&header)
            .contains("header should have 1000 bytes, but only 11 follow: it was cut short")
    );

    let small = ReadLimits { max_pixels: 1000 };
    let message = format!(
        "{:#}",
        files::read_path(&data("files/rgb.png"), &small).unwrap_err()
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
            files::read_path(&data("files").join(name), &small).unwrap_err()
        );
        assert!(message.contains("--max-pixels"), "{name}: {message}");
    }
    let message = format!(
        "{:#}",
        files::read_path(&data("files"), &small).unwrap_err()
    );
    assert!(message.contains("it is a folder"), "{message}");
}
