//! Pictures whose lines come one after the other: the files are to the byte those of whole pictures, and are written as the
//! lines come.

use std::cell::Cell;
use std::io::{self, Cursor, Seek, SeekFrom, Write};

use anyhow::{Context, bail};
use image::ExtendedColorType;
use image::codecs::bmp::BmpEncoder;
use image::codecs::jpeg::JpegEncoder;
use sd_upscale::Pixels;
use sd_upscale::metadata::Metadata;
use sd_upscale::picture::{
    Alpha, Depth, Format, Outline, Picture, alpha, encode, encode_lines, to_u8, to_u16,
};

use crate::samples::picture;

/// A picture that no two filters of PNG do alike: ramps, edges and noise.
fn scene(width: usize, height: usize) -> Vec<f32> {
    let mut random = 0x5eed_u32;
    let mut noise = || {
        random = random.wrapping_mul(1664525).wrapping_add(1013904223);
        (random >> 8) as f32 / (1 << 24) as f32
    };
    let value = |i: usize| {
        let (x, y, c) = (i / 3 % width, i / 3 / width, i % 3);
        let ramp = (x * (c + 1) + 2 * y) as f32 / (3 * width + 2 * height) as f32;
        match y / 9 % 4 {
            0 => ramp,
            1 => 0.9 * ramp + 0.1 * noise(),
            2 => ((x / 5 + y / 3) % 2) as f32,
            _ => noise(),
        }
    };
    (0..3 * width * height).map(value).collect()
}

fn blank(width: usize, height: usize) -> Picture {
    Picture::from_pixels(Pixels::new(width, height, scene(width, height)).unwrap())
}

/// Everything that a file may hold besides pixels.
fn metadata() -> Metadata {
    let mut metadata = picture("orientation-6.jpg").metadata;
    metadata.icc = picture("rgb.png").metadata.icc;
    metadata.xmp = Some(b"<x:xmpmeta tiff:Orientation=\"6\"/>".to_vec());
    metadata.iptc = Some(b"\x1c\x02\x78\0\x01a".to_vec());
    metadata.text.push(("Comment".into(), "a comment".into()));
    assert!(metadata.exif.is_some() && metadata.icc.is_some());
    metadata
}

/// Of every depth and kind, with and without metadata, of odd sizes.
fn pictures() -> Vec<(String, Picture)> {
    let mut all = Vec::new();
    for (width, height) in [(1, 1), (7, 3), (37, 66), (130, 129)] {
        for kind in 0..16 {
            let mut picture = blank(width, height);
            let is = |bit: u32| kind >> bit & 1 == 1;
            picture.gray = is(0);
            let transparency = |i: usize| ((i * 7919 % 101) as f32 / 100.0 - 0.1).clamp(0.0, 1.0);
            picture.alpha = is(1).then(|| (0..width * height).map(transparency).collect());
            picture.depth = if is(2) { Depth::Sixteen } else { Depth::Eight };
            if is(3) {
                picture.metadata = metadata();
            }
            all.push((format!("{width}x{height}, kind {kind:04b}"), picture));
        }
    }
    all
}

/// The lines of a picture, so many at a time.
fn pieces<'a>(pixels: &'a Pixels, lines: usize) -> impl FnMut() -> anyhow::Result<Vec<f32>> + 'a {
    let mut pieces = pixels.values.chunks(3 * pixels.width * lines);
    move || {
        pieces
            .next()
            .map(<[f32]>::to_vec)
            .context("asked too often")
    }
}

#[test]
fn a_file_is_the_same_however_many_lines_come_at_a_time() {
    for (what, picture) in pictures() {
        let (width, height) = (picture.pixels.width, picture.pixels.height);
        // Which JPEG XL's encoder does not take.
        let narrow = width < 2 || height < 2;
        let formats = Format::WRITABLE.into_iter();
        for format in formats.filter(|format| !narrow || *format != Format::Jxl) {
            let whole = encode(&picture, format, None).unwrap();
            for lines in [1, 7, 64] {
                let mut bytes = Cursor::new(Vec::new());
                let mut next = pieces(&picture.pixels, lines);
                let outline = Outline::of(&picture);
                let warnings = encode_lines(&outline, format, None, &mut next, &mut bytes).unwrap();
                let what = format!("{} of {what}, {lines} lines", format.name());
                assert!(bytes.into_inner() == whole.bytes, "{what}");
                assert_eq!(warnings, whole.warnings, "{what}");
            }
        }
    }
}

#[test]
fn transparency_that_is_doubled_as_lines_come_is_that_doubled_before() {
    let (width, height) = (35, 33);
    let small: Vec<f32> = (0..width * height)
        .map(|i| (i * 31 % 17) as f32 / 16.0)
        .collect();
    let mut picture = blank(2 * width, 2 * height);
    picture.alpha = Some(alpha::double(&small, width, height));
    for format in Format::WRITABLE {
        let whole = encode(&picture, format, None).unwrap();
        let outline = Outline {
            alpha: Some(Alpha::Halved {
                values: (&small).into(),
                width,
                height,
            }),
            ..Outline::of(&picture)
        };
        let mut bytes = Cursor::new(Vec::new());
        let mut next = pieces(&picture.pixels, 7);
        encode_lines(&outline, format, None, &mut next, &mut bytes).unwrap();
        assert!(bytes.into_inner() == whole.bytes, "{}", format.name());
    }
}

/// A picture's samples of 8 bits, as grey where it is.
fn samples8(picture: &Picture) -> Vec<u8> {
    let gray = |p: &[f32]| 0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2];
    if picture.gray {
        let values: Vec<f32> = picture.pixels.values.chunks_exact(3).map(gray).collect();
        to_u8(&values)
    } else {
        to_u8(&picture.pixels.values)
    }
}

/// The data of all chunks of a name.
fn chunks(png: &[u8], name: &[u8]) -> Vec<Vec<u8>> {
    let mut rest = &png[8..];
    let mut found = Vec::new();
    while let Some(length) = rest.first_chunk().map(|l| u32::from_be_bytes(*l) as usize) {
        if &rest[4..8] == name {
            found.push(rest[8..8 + length].to_vec());
        }
        rest = &rest[12 + length..];
    }
    found
}

#[test]
fn the_pixels_of_a_file_are_coded_as_the_formats_own_crates_code_whole_pictures() {
    for (what, picture) in pictures() {
        if picture.alpha.is_some() || picture.metadata != Metadata::default() {
            continue;
        }
        let (width, height) = (picture.pixels.width as u32, picture.pixels.height as u32);
        let written = |format| encode(&picture, format, Some(95)).unwrap().bytes;
        let data = samples8(&picture);
        let color = if picture.gray {
            ExtendedColorType::L8
        } else {
            ExtendedColorType::Rgb8
        };

        let mut bmp = Vec::new();
        let mut encoder = BmpEncoder::new(&mut bmp);
        encoder.encode(&data, width, height, color).unwrap();
        assert!(written(Format::Bmp) == bmp, "BMP of {what}");

        let mut jpeg = Vec::new();
        let mut encoder = JpegEncoder::new_with_quality(&mut jpeg, 95);
        encoder.encode(&data, width, height, color).unwrap();
        assert!(written(Format::Jpeg) == jpeg, "JPEG of {what}");

        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, width, height);
        encoder.set_color(if picture.gray {
            png::ColorType::Grayscale
        } else {
            png::ColorType::Rgb
        });
        let sixteen = picture.depth == Depth::Sixteen && !picture.gray;
        let data = if sixteen {
            encoder.set_depth(png::BitDepth::Sixteen);
            let words = to_u16(&picture.pixels.values);
            words.iter().flat_map(|v| v.to_be_bytes()).collect()
        } else {
            data
        };
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(&data).unwrap();
        writer.finish().unwrap();
        if sixteen == (picture.depth == Depth::Sixteen) {
            assert!(written(Format::Png) == file, "PNG of {what}");
        }

        if !picture.gray {
            use tiff::encoder::{Compression, DeflateLevel, Predictor, TiffEncoder, colortype};
            let mut file = Cursor::new(Vec::new());
            let mut encoder = TiffEncoder::new(&mut file)
                .unwrap()
                .with_compression(Compression::Deflate(DeflateLevel::Balanced))
                .with_predictor(Predictor::Horizontal);
            if sixteen {
                let words = to_u16(&picture.pixels.values);
                encoder
                    .write_image::<colortype::RGB16>(width, height, &words)
                    .unwrap();
            } else {
                encoder
                    .write_image::<colortype::RGB8>(width, height, &data)
                    .unwrap();
            }
            assert!(written(Format::Tiff) == file.into_inner(), "TIFF of {what}");
        }
    }
}

#[test]
fn a_png_has_its_lines_in_one_chunk() {
    let png = encode(&blank(130, 129), Format::Png, None).unwrap().bytes;
    assert_eq!(chunks(&png, b"IDAT").len(), 1);
    assert!(png.ends_with(b"\0\0\0\0IEND\xAE\x42\x60\x82"));
}

/// Counts what is written to it.
struct Counting<'a> {
    bytes: Cursor<Vec<u8>>,
    written: &'a Cell<usize>,
}

impl Write for Counting<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.written.set(self.written.get() + bytes.len());
        self.bytes.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Counting<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.bytes.seek(to)
    }
}

#[test]
fn a_file_is_written_as_its_lines_come() {
    // Strips of TIFF are of a megabyte: 650 lines here.
    let (width, height, lines) = (512, 4096, 64);
    let pixels = Pixels::new(width, height, scene(width, height)).unwrap();
    let picture = Picture::from_pixels(pixels);
    for format in [Format::Png, Format::Tiff, Format::Bmp, Format::Jpeg] {
        let (written, at_last) = (Cell::new(0), Cell::new(0));
        let mut pieces = pieces(&picture.pixels, lines);
        let mut next = || {
            at_last.set(written.get());
            pieces()
        };
        let mut out = Counting {
            bytes: Cursor::new(Vec::new()),
            written: &written,
        };
        encode_lines(&Outline::of(&picture), format, None, &mut next, &mut out).unwrap();
        // At the last piece of 64 all but it, a strip and what waits in buffers is there: a quarter at most is not.
        let (before, all) = (at_last.get(), written.get());
        assert!(4 * before > 3 * all, "{}: {before} of {all}", format.name());
    }
}

#[test]
fn lines_that_end_early_or_are_too_many_are_an_error_that_names_the_format() {
    let picture = blank(20, 40);
    for format in Format::WRITABLE {
        let outline = Outline::of(&picture);
        let mut left = 2;
        let mut next = || {
            left -= 1;
            if left == 0 {
                bail!("the cable was cut");
            }
            Ok(vec![0.5; 3 * 20 * 9])
        };
        let mut out = Cursor::new(Vec::new());
        let error = encode_lines(&outline, format, None, &mut next, &mut out).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains(format.name()), "{error}");
        assert!(error.ends_with("the cable was cut"), "{error}");
        for wrong in [0, 3 * 20 * 41, 3 * 20 + 1] {
            let mut next = || Ok(vec![0.5; wrong]);
            let error = encode_lines(&outline, format, None, &mut next, &mut out).unwrap_err();
            let expected = format!("{wrong} values came where 40 lines of 60 were left");
            assert!(format!("{error:#}").ends_with(&expected), "{error:#}");
        }
    }
}

/// A disk that is full.
struct Full;

impl Write for Full {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::StorageFull.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Full {
    fn seek(&mut self, _: SeekFrom) -> io::Result<u64> {
        Ok(0)
    }
}

#[test]
fn a_full_disk_ends_the_encoding() {
    let picture = blank(300, 300);
    for format in Format::WRITABLE {
        let mut next = pieces(&picture.pixels, 10);
        let outline = Outline::of(&picture);
        assert!(
            encode_lines(&outline, format, None, &mut next, &mut Full).is_err(),
            "{}",
            format.name()
        );
    }
}
