//! PNG: the default image, whatever becomes of the frames of an animation.

use std::borrow::Cow;
use std::io::Cursor;

use anyhow::{Context, Result, bail, ensure};
use image::{DynamicImage, ImageBuffer};

use super::{Format, Picture, structure, words};
use crate::limits::ReadLimits;
use crate::metadata::{Metadata, orientation};

pub(super) fn decode(bytes: &[u8], limits: &ReadLimits) -> Result<Picture> {
    let still = Still::new(bytes)?;
    let allocation = png::Limits {
        bytes: usize::try_from(limits.max_bytes()).unwrap_or(usize::MAX),
    };
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(&still.bytes[..]), allocation);
    decoder.set_transformations(png::Transformations::EXPAND);
    let info = decoder.read_header_info()?;
    limits.check_pixels(u64::from(info.width), u64::from(info.height))?;
    // Beside the chunks as they stand in the file, twice, and some rows: what metadata may be inflated to.
    let mut budget = limits.budget();
    let rows = 64 * (info.width as usize).saturating_add(1024);
    decoder.set_limits(png::Limits {
        bytes: budget.left().saturating_add(3 * bytes.len() + rows),
    });
    let mut reader = decoder.read_info()?;
    let size = reader
        .output_buffer_size()
        .context("its size does not fit in memory")?;
    let mut pixels = vec![0; size];
    let frame = reader.next_frame(&mut pixels)?;
    // Reads on to IEND: text may follow the pixels, and a file cut short there is still cut short.
    reader.finish()?;

    let (w, h) = (frame.width, frame.height);
    let words = || -> Vec<u16> {
        let pairs = pixels.as_chunks::<2>().0;
        pairs.iter().map(|&p| u16::from_be_bytes(p)).collect()
    };
    use png::BitDepth::*;
    use png::ColorType::*;
    let image = match (frame.color_type, frame.bit_depth) {
        (Grayscale, Eight) => ImageBuffer::from_raw(w, h, pixels).map(DynamicImage::ImageLuma8),
        (GrayscaleAlpha, Eight) => {
            ImageBuffer::from_raw(w, h, pixels).map(DynamicImage::ImageLumaA8)
        }
        (Rgb, Eight) => ImageBuffer::from_raw(w, h, pixels).map(DynamicImage::ImageRgb8),
        (Rgba, Eight) => ImageBuffer::from_raw(w, h, pixels).map(DynamicImage::ImageRgba8),
        (Grayscale, Sixteen) => ImageBuffer::from_raw(w, h, words()).map(DynamicImage::ImageLuma16),
        (GrayscaleAlpha, Sixteen) => {
            ImageBuffer::from_raw(w, h, words()).map(DynamicImage::ImageLumaA16)
        }
        (Rgb, Sixteen) => ImageBuffer::from_raw(w, h, words()).map(DynamicImage::ImageRgb16),
        (Rgba, Sixteen) => ImageBuffer::from_raw(w, h, words()).map(DynamicImage::ImageRgba16),
        _ => bail!("its kind of pixels is not supported"),
    }
    .context("it holds fewer pixels than its size says")?;

    let metadata = Metadata::from_png(reader.info(), &mut budget);
    let mut warnings = still.warnings;
    warnings.extend(budget.warning());
    let orientation = orientation::of(metadata.exif.as_deref(), metadata.xmp.as_deref());
    Ok(Picture::from_decoded(
        image,
        orientation,
        Format::Png,
        metadata,
        warnings,
    ))
}

/// A PNG without its animation, and without optional chunks whose checksum is wrong.
struct Still<'a> {
    bytes: Cow<'a, [u8]>,
    warnings: Vec<String>,
}

impl<'a> Still<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self> {
        let mut kept = bytes.get(..8).context(words::CUT_SHORT)?.to_vec();
        let (mut frames, mut animated, mut pixels, mut damaged) = (1, false, false, Vec::new());
        let (mut at, mut whole, mut changed) = (8, false, false);
        while let Some(chunk) = structure::png_chunk(bytes, at) {
            at = chunk.end;
            let name: [u8; 4] = bytes[chunk.start + 4..chunk.start + 8].try_into()?;
            // Bit 5 of a name's first letter: what can be left out.
            let optional = name[0] & 0x20 != 0;
            match &name {
                b"acTL" => {
                    animated = true;
                    frames = structure::be32(bytes, chunk.start + 8).unwrap_or(1) as usize;
                }
                b"fcTL" | b"fdAT" => animated = true,
                _ if optional && !structure::png_checksum_is_right(&bytes[chunk.clone()]) => {
                    damaged.push(String::from_utf8_lossy(&name).into_owned());
                }
                b"tRNS" => {
                    let chunk = &bytes[chunk.clone()];
                    let key = plain_key(bytes, chunk);
                    changed |= key.is_some();
                    kept.extend_from_slice(key.as_deref().unwrap_or(chunk));
                }
                _ => kept.extend_from_slice(&bytes[chunk.clone()]),
            }
            pixels |= &name == b"IDAT";
            if &name == b"IEND" {
                whole = true;
                break;
            }
        }
        let mut warnings = words::dropped_frames(frames);
        if !damaged.is_empty() {
            damaged.dedup();
            warnings.push(format!("damaged and left out: {}", damaged.join(", ")));
        }
        let later = animated && pixels && !whole && animation_began(bytes);
        if later {
            kept.extend_from_slice(b"\0\0\0\0IEND\xAE\x42\x60\x82");
            warnings.push(words::DAMAGED_LATER.into());
        }
        ensure!(whole || later, words::CUT_SHORT);
        changed |= animated || !warnings.is_empty();
        Ok(Self {
            bytes: if changed {
                Cow::Owned(kept)
            } else {
                Cow::Borrowed(bytes)
            },
            warnings,
        })
    }
}

/// The chunk of a transparent grey or RGB level with the bits above the picture's depth at 0, as the standard has them read;
/// `None` where they are.
fn plain_key(file: &[u8], chunk: &[u8]) -> Option<Vec<u8>> {
    // IHDR's depth and colour type.
    let (depth, color) = (*file.get(24)?, *file.get(25)?);
    if depth >= 16 || !matches!(color, 0 | 2) {
        return None;
    }
    let mask = (1u16 << depth) - 1;
    let mut key = chunk.to_vec();
    let end = key.len() - 4;
    for pair in key[8..end].as_chunks_mut::<2>().0 {
        *pair = (u16::from_be_bytes(*pair) & mask).to_be_bytes();
    }
    if key == chunk {
        return None;
    }
    let mut sum = flate2::Crc::new();
    sum.update(&key[4..end]);
    key[end..].copy_from_slice(&sum.sum().to_be_bytes());
    Some(key)
}

/// Whether a whole chunk follows the default image's pixels: only then are these complete.
fn animation_began(bytes: &[u8]) -> bool {
    let (mut at, mut pixels) = (8, false);
    while let Some(chunk) = structure::png_chunk(bytes, at) {
        let is_pixels = &bytes[chunk.start + 4..chunk.start + 8] == b"IDAT";
        if pixels && !is_pixels {
            return true;
        }
        pixels |= is_pixels;
        at = chunk.end;
    }
    // The beginning of one is enough.
    pixels
        && bytes
            .get(at + 4..at + 8)
            .is_some_and(|name| name == b"fcTL" || name == b"fdAT")
}
