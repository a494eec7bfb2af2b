//! TIFF's kinds that `image` refuses: palettes, grey of 2, 4 and 32 bits, grey with alpha.

use std::io::Cursor;

use anyhow::{Context, Result, bail};
use image::{DynamicImage, ImageBuffer};
use tiff::ColorType;
use tiff::decoder::{Decoder, DecodingResult, Limits};
use tiff::tags::Tag;

use crate::limits::ReadLimits;

/// Photometric interpretations (TIFF 6.0): indices into a palette, and plain grey.
const PALETTE: u16 = 3;
const BLACK_IS_ZERO: u16 = 1;

/// Decodes the first page's pixels, as stored (orientation not applied).
pub(crate) fn decode(bytes: &[u8], limits: &ReadLimits) -> Result<DynamicImage> {
    let mut decoder = open(bytes, limits)?;
    let palette = match decoder.get_tag_u32(Tag::PhotometricInterpretation) {
        Ok(kind) if kind == u32::from(PALETTE) => Some(decoder.get_tag_u16_vec(Tag::ColorMap)?),
        _ => None,
    };
    let patched;
    if palette.is_some() {
        // `tiff` decodes no palettes; read as grey, the samples are the indices.
        patched = as_gray(bytes).context("palettes in big TIFF files are not supported")?;
        decoder = open(&patched, limits)?;
    }
    let (width, height) = decoder.dimensions()?;
    limits.check_pixels(u64::from(width), u64::from(height))?;
    let color = decoder.colortype()?;
    let pixels = decoder.read_image()?;
    let (w, h) = (width as usize, height as usize);
    let image = match (color, pixels, palette) {
        (ColorType::Gray(bits @ (1 | 2 | 4 | 8)), DecodingResult::U8(packed), Some(map)) => {
            let size = 1usize << bits;
            if map.len() < 3 * size {
                bail!(
                    "its palette has {} values; expected {}",
                    map.len(),
                    3 * size
                );
            }
            let color = |i: u8| [0, 1, 2].map(|c| (map[c * size + usize::from(i)] >> 8) as u8);
            let rgb = unpack(&packed, w, h, bits)
                .into_iter()
                .flat_map(color)
                .collect();
            ImageBuffer::from_raw(width, height, rgb).map(DynamicImage::ImageRgb8)
        }
        (ColorType::Gray(bits @ (2 | 4)), DecodingResult::U8(packed), None) => {
            let top = (1u8 << bits) - 1;
            let gray = unpack(&packed, w, h, bits)
                .into_iter()
                .map(|v| v * (255 / top))
                .collect();
            ImageBuffer::from_raw(width, height, gray).map(DynamicImage::ImageLuma8)
        }
        (ColorType::Gray(32), DecodingResult::F32(gray), None) => {
            let level = |v: f32| (v.clamp(0.0, 1.0) * 65535.0).round() as u16;
            let gray = gray.into_iter().map(level).collect();
            ImageBuffer::from_raw(width, height, gray).map(DynamicImage::ImageLuma16)
        }
        (ColorType::Gray(32), DecodingResult::U32(gray), None) => {
            let gray = gray.into_iter().map(|v| (v >> 16) as u16).collect();
            ImageBuffer::from_raw(width, height, gray).map(DynamicImage::ImageLuma16)
        }
        (ColorType::Multiband { num_samples: 2, .. }, DecodingResult::U8(both), None) => {
            ImageBuffer::from_raw(width, height, both).map(DynamicImage::ImageLumaA8)
        }
        (ColorType::Multiband { num_samples: 2, .. }, DecodingResult::U16(both), None) => {
            ImageBuffer::from_raw(width, height, both).map(DynamicImage::ImageLumaA16)
        }
        (color, ..) => bail!(
            "its kind of pixels ({color:?}) is not supported; convert it to 8-bit or 16-bit RGB"
        ),
    };
    image.context("it holds fewer pixels than its size says")
}

fn open<'a>(bytes: &'a [u8], limits: &ReadLimits) -> Result<Decoder<Cursor<&'a [u8]>>> {
    let most = usize::try_from(limits.max_bytes()).unwrap_or(usize::MAX);
    let mut allocation = Limits::default();
    allocation.decoding_buffer_size = most;
    allocation.intermediate_buffer_size = most;
    Ok(Decoder::new(Cursor::new(bytes))?.with_limits(allocation))
}

/// A copy whose first directory says grey instead of palette.
fn as_gray(bytes: &[u8]) -> Option<Vec<u8>> {
    let big_endian = bytes.starts_with(b"MM");
    let number = |at: usize, n: usize| -> Option<usize> {
        let field = bytes.get(at..at + n)?;
        let join = |value: usize, b: &u8| value << 8 | usize::from(*b);
        Some(if big_endian {
            field.iter().fold(0, join)
        } else {
            field.iter().rev().fold(0, join)
        })
    };
    let directory = number(4, 4).filter(|_| number(2, 2) == Some(42))?;
    let is_kind =
        |at: &usize| number(*at, 2) == Some(usize::from(Tag::PhotometricInterpretation.to_u16()));
    let entry = (0..number(directory, 2)?)
        .map(|i| directory + 2 + 12 * i)
        .find(is_kind)?;
    let mut copy = bytes.to_vec();
    let value = if big_endian {
        BLACK_IS_ZERO.to_be_bytes()
    } else {
        BLACK_IS_ZERO.to_le_bytes()
    };
    copy.get_mut(entry + 8..entry + 10)?.copy_from_slice(&value);
    Some(copy)
}

/// Samples of fewer than 8 bits, packed by rows from the high bits on, to a byte each.
fn unpack(packed: &[u8], width: usize, height: usize, bits: u8) -> Vec<u8> {
    let bits = usize::from(bits);
    let row = (width * bits).div_ceil(8).max(1);
    let sample = |line: &[u8], x: usize| {
        let at = x * bits;
        let byte = u16::from(line[at / 8]);
        (byte >> (8 - bits - at % 8) & ((1 << bits) - 1)) as u8
    };
    let lines = packed.chunks_exact(row).take(height);
    lines
        .flat_map(|line| (0..width).map(move |x| sample(line, x)))
        .collect()
}
