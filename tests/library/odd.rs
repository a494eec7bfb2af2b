//! Kinds of files that other programs write and few readers get right (`tests/data/make_odd_files.py`): read as they are
//! meant, or refused in one line that says what is wrong and what would help.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use sd_upscale::files;
use sd_upscale::limits::ReadLimits;
use sd_upscale::metadata::Density;
use sd_upscale::picture::{Format, Picture, encode};

use crate::data::data;

fn path(name: &str) -> PathBuf {
    data("odd").join(name)
}

fn read(name: &str) -> Picture {
    files::read_picture(&path(name), &ReadLimits::default()).unwrap_or_else(|e| panic!("{e:#}"))
}

fn refusal(path: &Path) -> String {
    match files::read_path(path, &ReadLimits::default()) {
        Ok(_) => panic!("{} was accepted", path.display()),
        Err(error) => format!("{error:#}"),
    }
}

/// The largest difference of a channel from what the file stands for, in levels of 255.
fn distance(name: &str) -> f32 {
    let bytes = std::fs::read(path("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let want = file.tensor(name).unwrap();
    let [height, width, channels] = want.shape().try_into().unwrap();
    let got = read(name);
    assert_eq!(
        (got.pixels.width, got.pixels.height),
        (width, height),
        "{name}"
    );
    assert_eq!(got.alpha.is_some(), channels == 4, "{name}: alpha");
    let mut worst = 0f32;
    for (i, want) in want.data().chunks_exact(channels).enumerate() {
        for (c, &want) in want.iter().enumerate() {
            let level = match c {
                3 => got.alpha.as_ref().unwrap()[i],
                _ => got.pixels.values[3 * i + c],
            };
            worst = worst.max((level * 255.0 - f32::from(want)).abs());
        }
    }
    worst
}

#[test]
fn odd_files_are_read_as_they_are_meant() {
    for (name, most) in [
        ("g3.tif", 0.01),
        ("g4.tif", 0.01),
        ("runs.tif", 0.01),
        ("fill-order.tif", 0.01),
        ("uint32.tif", 0.01),
        // The division by alpha is rounded to a level; a tie either way.
        ("premultiplied.tif", 1.01),
        ("planar-tiles.tif", 0.01),
        ("planar-tiles-lzw.tif", 0.01),
        // Half floats have 11 bits.
        ("half.tif", 0.07),
        ("float-predictor.tif", 0.01),
        ("big-endian-big.tif", 0.01),
        // 12 bits are nearly 16 levels to one of 8.
        ("gray12.tif", 0.07),
        ("white-is-zero.tif", 0.01),
        ("palette-alpha.tif", 0.01),
        // The inverse DCT, chroma interpolated otherwise than libjpeg does.
        ("ycbcr-jpeg.tif", 12.0),
        ("ycbcr-half.tif", 1.51),
        // Lab in 8 bits is coarse in dark and saturated colours.
        ("lab.tif", 6.0),
        // One level of the inverse DCT, two after the colour conversion.
        ("late-profile-and-tables.jpg", 3.01),
        ("xmp-orientation.webp", 0.01),
        ("exif-prefix.webp", 0.01),
        ("later-frame-damaged.png", 0.01),
        ("cut-in-the-second-frame.gif", 0.01),
        ("os2-v2.bmp", 0.01),
    ] {
        let worst = distance(name);
        assert!(worst <= most, "{name}: off by {worst} levels");
    }
    let picture = read("late-profile-and-tables.jpg");
    assert!(
        picture.metadata.icc.is_some(),
        "a profile after the frame header"
    );
}

#[test]
fn a_refusal_is_one_line_that_says_what_is_wrong_and_what_would_help() {
    for (name, words) in [
        ("refused-arithmetic.jpg", "arithmetic coding"),
        ("refused-lossless.jpg", "lossless JPEG"),
        ("refused-12-bit.jpg", "12 bits"),
        ("refused-signed.tif", "signed numbers"),
        ("refused-zstd.tif", "Zstandard"),
        ("refused-cfa.tif", "raw samples"),
        ("refused-short.tif", "cut short"),
        ("refused-lzw.tif", "LZW"),
        ("refused-white.tif", "above 1"),
        ("refused-early-pixels.bmp", "begin where its palette does"),
    ] {
        let message = refusal(&path(name));
        assert!(message.contains(words), "{message}");
    }
    let odd = std::fs::read_dir(data("odd"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().contains("refused-"))
        .map(|path| refusal(&path));
    // Every image of the samples, cut within its first half or with bytes changed.
    let damaged = crate::damage::corpus().into_iter().filter_map(|input| {
        let read = files::read_bytes(&input.bytes, &input.name, &ReadLimits::default());
        read.err().map(|error| format!("{error:#}"))
    });
    let of_pictures = damaged.filter(|message| message.contains("image cannot be decoded"));
    for message in odd.chain(of_pictures) {
        assert!(!message.contains(char::is_control), "{message:?}");
        for mark in ["{ ", "Some(", "Error", "\"", "::"] {
            assert!(!message.contains(mark), "{message}");
        }
        let parts: Vec<&str> = message.split(": ").collect();
        for (i, part) in parts.iter().enumerate().filter(|(_, part)| part.len() > 8) {
            let doubled = parts[i + 1..].iter().any(|later| later.contains(part));
            assert!(!doubled, "{message}");
        }
        let helps = message.contains("; ") || message.contains("--max-pixels");
        assert!(helps, "no cure: {message}");
        assert!(message.len() < 400, "{message}");
    }
}

/// Written in a format and read back, with the warnings of writing.
fn through(picture: &Picture, format: Format) -> (Picture, Vec<String>) {
    let encoded = encode(picture, format, None).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture");
    std::fs::write(&path, encoded.bytes).unwrap();
    let read = files::read_picture(&path, &ReadLimits::default()).unwrap();
    (read, encoded.warnings)
}

#[test]
fn captions_comments_and_resolution_are_kept_where_the_format_can_and_named_where_not() {
    let before = read("iptc-comment-300-dpi.jpg");
    assert_eq!(
        before.metadata.iptc.as_deref(),
        Some(&b"\x1c\x02\x78\0\x07caption"[..])
    );
    assert_eq!(before.metadata.text("Comment"), Some("a person's words"));
    for (format, iptc, comment) in [
        (Format::Jpeg, true, true),
        (Format::Tiff, true, false),
        (Format::Png, false, true),
        (Format::WebP, false, false),
        (Format::Bmp, false, false),
    ] {
        let (after, warnings) = through(&before, format);
        let kept = (
            after.metadata.iptc.is_some(),
            after.metadata.text("Comment").is_some(),
        );
        assert_eq!(kept, (iptc, comment), "{}", format.name());
        let warned = |what: &str| warnings.iter().any(|w| w.contains(what));
        assert_eq!(warned("IPTC"), !iptc, "{warnings:?}");
        assert_eq!(warned("Comment"), !comment, "{warnings:?}");
        assert!(warnings.len() <= 1, "{warnings:?}");
        match after.metadata.density {
            Some(Density::PerMeter(x, y)) => {
                let inch = |v: f64| (v * 0.0254).round();
                assert_eq!((inch(x), inch(y)), (300.0, 300.0), "{}", format.name());
            }
            other => panic!("{}: {other:?}", format.name()),
        }
    }
}

#[test]
fn a_colour_space_that_a_png_states_is_kept_or_becomes_a_profile_or_is_named_as_lost() {
    let mut before = read("iptc-comment-300-dpi.jpg");
    before.metadata = Default::default();
    before.metadata.color = Some(sd_upscale::metadata::StatedColor {
        gamma: Some(100_000),
        ..Default::default()
    });
    let (png, warnings) = through(&before, Format::Png);
    assert_eq!(png.metadata.color, before.metadata.color);
    assert!(warnings.is_empty());
    for format in [Format::Jpeg, Format::WebP, Format::Tiff] {
        let (after, warnings) = through(&png, format);
        assert!(after.metadata.icc.is_some(), "{}", format.name());
        assert!(warnings.is_empty(), "{warnings:?}");
    }
    let (_, warnings) = through(&png, Format::Bmp);
    assert_eq!(
        warnings,
        ["not kept in BMP: the colour space (gAMA, cHRM or cICP)"]
    );
}
