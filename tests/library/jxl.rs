//! JPEG XL: files of libjxl's encoder (`tests/data/make_jxl.sh`) against the pictures that they were made of, two of libjxl's own decoder tests
//! (`odd/`, of jxl-rs 0.8, BSD-3-Clause, The JPEG XL Project Authors), and files of ours.

use sd_upscale::files::{self, Loaded};
use sd_upscale::limits::ReadLimits;
use sd_upscale::picture::{Depth, Format, Picture, encode};

use crate::data::data;
use crate::samples::picture;

/// The largest difference in levels of 255.
fn apart(a: &Picture, b: &Picture) -> f32 {
    assert_eq!(a.pixels.width, b.pixels.width);
    assert_eq!(a.pixels.height, b.pixels.height);
    let pairs = a.pixels.values.iter().zip(&b.pixels.values);
    pairs
        .map(|(a, b)| 255.0 * (a - b).abs())
        .fold(0.0, f32::max)
}

#[test]
fn lossless_files_are_the_pictures_that_they_were_made_of() {
    for name in ["gray", "gray-alpha", "one-bit", "rgb16", "rgba"] {
        let (read, of) = (
            picture(&format!("{name}.jxl")),
            picture(&format!("{name}.png")),
        );
        assert_eq!(read.format, Format::Jxl);
        assert_eq!(apart(&read, &of), 0.0, "{name}");
        assert_eq!(read.alpha, of.alpha, "{name}");
        assert_eq!((read.gray, read.depth), (of.gray, of.depth), "{name}");
        let path = data(&format!("files/{name}.jxl"));
        assert!(files::is_complete(&path));
        let header = files::read_header(&path).unwrap();
        assert_eq!(
            (header.width, header.height),
            (of.pixels.width, of.pixels.height)
        );
    }
}

#[test]
fn a_transcoded_jpeg_is_turned_once_and_keeps_its_exif() {
    let (read, of) = (picture("transcoded.jxl"), picture("orientation-6.jpg"));
    assert_eq!((read.pixels.width, read.pixels.height), (30, 40));
    // Decoders of JPEG round the inverse DCT differently, and enlarge chroma in different ways: a turn would be off by a hundred.
    assert!(apart(&read, &of) < 24.0, "{}", apart(&read, &of));
    let exif = read.metadata.exif.as_ref().unwrap();
    assert!(exif.starts_with(b"II") || exif.starts_with(b"MM"));
    let header = files::read_header(&data("files/transcoded.jxl")).unwrap();
    assert_eq!((header.width, header.height), (30, 40));
    // Of another format it is written with: upright.
    let encoded = encode(&read, Format::Jpeg, None).unwrap();
    let Loaded::Picture(again) =
        files::read_bytes(&encoded.bytes, "it", &ReadLimits::default()).unwrap()
    else {
        panic!("latents")
    };
    assert_eq!((again.pixels.width, again.pixels.height), (30, 40));
}

#[test]
fn lossy_files_and_animations_are_read() {
    let (read, of) = (picture("lossy.jxl"), picture("rgb.png"));
    // Distance 1 is what one does not see; the file's picture is noisy.
    let pairs = read.pixels.values.iter().zip(&of.pixels.values);
    let sum: f32 = pairs.map(|(a, b)| 255.0 * (a - b).abs()).sum();
    let mean = sum / of.pixels.values.len() as f32;
    assert!(mean < 8.0, "{mean} levels in the mean");
    let read = picture("animated.jxl");
    assert_eq!(
        read.warnings,
        ["animated: the first of 3 frames is used, the others are dropped"]
    );
    assert_eq!(apart(&read, &picture("animated.gif")), 0.0);
}

#[test]
fn files_of_libjxls_own_tests_are_read() {
    let read = |name: &str| files::read_picture(&data("odd").join(name), &ReadLimits::default());
    let compressed = read("exif-brob.jxl").unwrap();
    assert_eq!(
        (compressed.pixels.width, compressed.pixels.height),
        (256, 128)
    );
    assert_eq!(compressed.metadata.exif.map(|exif| exif.len()), Some(166));
    let gray = read("gray-as-colour.jxl").unwrap();
    assert!(gray.gray);
    assert_eq!((gray.pixels.width, gray.pixels.height), (1, 1));
}

#[test]
fn what_is_cut_short_or_too_large_is_refused_in_one_line() {
    let bytes = std::fs::read(data("files/rgb16.jxl")).unwrap();
    let said = |bytes: &[u8], limits: ReadLimits| {
        let read = files::read_bytes(bytes, "x", &limits);
        format!("{:#}", read.unwrap_err())
    };
    for length in [16, 40, 60, bytes.len() / 2, bytes.len() - 1] {
        let message = said(&bytes[..length], ReadLimits::default());
        assert!(message.contains("cut short"), "{length}: {message}");
        assert!(!message.contains('\n'), "{message}");
    }
    let message = said(&bytes, ReadLimits { max_pixels: 1000 });
    assert!(message.contains("--max-pixels 1200"), "{message}");
}

#[test]
fn what_is_written_keeps_exif_and_xmp_and_says_what_it_does_not_keep() {
    let mut before = picture("rgb16.png");
    before.metadata.exif = picture("transcoded.jxl").metadata.exif;
    before.metadata.xmp = Some(b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>".to_vec());
    before.metadata.icc = None;
    let encoded = encode(&before, Format::Jxl, None).unwrap();
    let Loaded::Picture(after) =
        files::read_bytes(&encoded.bytes, "it", &ReadLimits::default()).unwrap()
    else {
        panic!("latents")
    };
    assert_eq!(after.depth, Depth::Sixteen);
    assert_eq!(after.pixels.values, before.pixels.values);
    assert_eq!(after.metadata.xmp, before.metadata.xmp);
    assert!(after.metadata.exif.is_some());
    assert!(encoded.warnings.is_empty(), "{:?}", encoded.warnings);
    // Behind the signature and the file's type: a length in 32 bits, as libjxl 0.7 reads nothing behind one in 64.
    assert_eq!(encoded.bytes[36..40], *b"Exif");
    assert_ne!(encoded.bytes[32..36], [0, 0, 0, 1]);
    // The encoder knows no profile, and transparency of 8 bits.
    let profiled = encode(&picture("rgba.jxl"), Format::Jxl, None).unwrap();
    assert!(
        profiled.warnings[0].contains("the colour profile"),
        "{:?}",
        profiled.warnings
    );
    let mut deep = picture("rgba.png");
    deep.depth = Depth::Sixteen;
    let warnings = encode(&deep, Format::Jxl, None).unwrap().warnings;
    assert!(warnings[0].contains("8 bits of 16"), "{warnings:?}");
}
