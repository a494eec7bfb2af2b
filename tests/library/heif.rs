//! HEIC and AVIF, where this machine has libheif: files that its encoder wrote (`tests/data/make_heif.sh`) against what its own program
//! reads from them.

use sd_upscale::files;
use sd_upscale::limits::ReadLimits;
use sd_upscale::picture::{Depth, Format, Picture};

use crate::data::data;
use crate::samples::picture;

fn is_here(test: &str) -> bool {
    let here = Format::Heif.is_read_here();
    if !here {
        println!("{test}: passed over, this machine has no libheif");
    }
    here
}

fn read(name: &str) -> Picture {
    files::read_picture(&data("heif").join(name), &ReadLimits::default()).unwrap()
}

/// Levels of 255, in the mean and at most.
fn apart(a: &[f32], b: &[f32]) -> (f32, f32) {
    assert_eq!(a.len(), b.len());
    let differences: Vec<f32> = a
        .iter()
        .zip(b)
        .map(|(a, b)| 255.0 * (a - b).abs())
        .collect();
    let most = differences.iter().copied().fold(0.0, f32::max);
    (
        differences.iter().sum::<f32>() / differences.len() as f32,
        most,
    )
}

#[test]
fn pictures_are_those_that_libheif_shows() {
    if !is_here("pictures_are_those_that_libheif_shows") {
        return;
    }
    for (name, gray, depth) in [
        ("rgb.heic", false, Depth::Eight),
        ("gray.heic", true, Depth::Eight),
        ("rgb10.heic", false, Depth::Sixteen),
    ] {
        let (ours, theirs) = (read(name), read(&format!("{name}.png")));
        let (mean, most) = apart(&ours.pixels.values, &theirs.pixels.values);
        println!("{name}: {mean} levels in the mean, {most} at most");
        // 0 with the version that wrote them; others enlarge chroma in other ways.
        assert!(mean < 2.0 && most < 24.0, "{name}: {mean}, {most}");
        assert_eq!((ours.gray, ours.depth), (gray, depth), "{name}");
        assert_eq!(ours.format, Format::Heif);
        let path = data("heif").join(name);
        assert!(files::is_complete(&path));
        let header = files::read_header(&path).unwrap();
        assert_eq!((header.width, header.height), (40, 30));
    }
}

#[test]
fn avif_keeps_transparency() {
    if !is_here("avif_keeps_transparency") {
        return;
    }
    let (ours, of) = (read("rgba.avif"), picture("rgba.png"));
    let (mean, _) = apart(ours.alpha.as_ref().unwrap(), of.alpha.as_ref().unwrap());
    // Quality 90.
    assert!(mean < 4.0, "{mean} levels in the mean");
    assert!(ours.metadata.icc.is_some());
}

#[test]
fn what_is_cut_short_or_too_large_is_refused_before_it_is_decoded() {
    if !is_here("what_is_cut_short_or_too_large_is_refused_before_it_is_decoded") {
        return;
    }
    let bytes = std::fs::read(data("heif/rgb.heic")).unwrap();
    let said = |bytes: &[u8], limits: ReadLimits| {
        format!("{:#}", files::read_bytes(bytes, "x", &limits).unwrap_err())
    };
    for length in [20, 200, bytes.len() / 2, bytes.len() - 1] {
        let message = said(&bytes[..length], ReadLimits::default());
        assert!(message.contains("cut short"), "{length}: {message}");
    }
    let message = said(&bytes, ReadLimits { max_pixels: 1000 });
    assert!(message.contains("--max-pixels 1200"), "{message}");
}
