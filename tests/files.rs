//! Files written by other programs (Pillow, tifffile, NumPy, safetensors; `tests/data/make_files.py`), read by the
//! library: pixels and values against what those programs read from them, and what must be refused.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use sd_upscale::input::{self, Loaded, ReadLimits};
use sd_upscale::latents::Latents;
use sd_upscale::picture::{Depth, Picture};

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
    let tensor = file.tensor(name).unwrap_or_else(|_| panic!("make_files.py keeps no {name}"));
    let shape = tensor.shape().try_into().unwrap();
    let data = tensor.data();
    let (values, top) = match tensor.dtype() {
        Dtype::U8 => (data.iter().map(|&v| f32::from(v)).collect(), 255.0),
        Dtype::BOOL => (data.iter().map(|&v| f32::from(v)).collect(), 1.0),
        Dtype::U16 => {
            let words = data.as_chunks().0.iter();
            (words.map(|&w| f32::from(u16::from_le_bytes(w))).collect(), 65535.0)
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
    assert_eq!((picture.width, picture.height), (width, height), "{name}: size");
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
        "rgb.png", "gray.png", "rgba.png", "gray-alpha.png", "opaque-alpha.png", "palette.png", "palette-trns.png",
        "one-bit.png", "rgb16.png", "gray16.png", "animated.png", "a1111.png", "comfy.png", "lossless.webp",
        "alpha.webp", "a1111.webp", "animated.webp", "rgb.tif", "palette.tif", "rgba.tif", "one-bit.tif",
        "rgb16.tif", "gray16.tif", "planar.tif", "float.tif", "gray-float.tif", "rgb.bmp", "palette.bmp",
        "animated.gif", "transparent.gif",
    ] {
        let (worst, _) = distance(name);
        // Not exactly 0: v / 255 * 255 in f32 may be off by half an ulp of 65535.
        assert!(worst < 0.01, "{name}: a level differs by {worst}");
    }
}

#[test]
fn lossy_files_are_read_within_a_decoders_rounding() {
    for name in ["lossy.webp", "progressive-420.jpg", "gray.jpg", "cmyk.jpg", "a1111.jpg", "jpeg-named.png"] {
        let (worst, mean) = distance(name);
        eprintln!("{name}: worst {worst}, mean {mean}");
    }
}
