//! JPEG: what `image` leaves out of the segments before the first scan, and kinds refused in words.

use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use image::{DynamicImage, ImageBuffer};
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

use super::structure::{self, JpegMap};
use super::{Format, Picture, words};
use crate::limits::ReadLimits;
use crate::metadata::{Metadata, orientation};

pub(super) fn decode(bytes: &[u8], limits: &ReadLimits) -> Result<Picture> {
    let map = structure::map_jpeg(bytes).context("it does not begin as a JPEG")?;
    let frame = Frame::find(bytes, &map)?;
    limits.check_pixels(frame.width, frame.height)?;
    ensure!(
        map.end.is_some(),
        "it ends before its end-of-image marker: the file was cut short"
    );
    let failed = |error| anyhow::anyhow!(words::of_jpeg(&error));
    // Strict: data that break off or make no sense are an error, not grey or garbage.
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(usize::MAX)
        .set_max_height(usize::MAX);
    let plain = plain(bytes, &map).context("it has no pixels: the file was cut short")?;
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(&plain[..]), options);
    decoder.decode_headers().map_err(failed)?;
    let gray = decoder.input_colorspace() == Some(ColorSpace::Luma);
    let color = if gray {
        ColorSpace::Luma
    } else {
        ColorSpace::RGB
    };
    decoder.set_options(options.jpeg_set_out_colorspace(color));
    let (width, height) = decoder.dimensions().context("it has no size")?;
    // A later header may state another size than the first.
    limits.check_pixels(width as u64, height as u64)?;
    let pixels = decoder.decode().map_err(failed)?;
    let (w, h) = (width as u32, height as u32);
    let image = if gray {
        ImageBuffer::from_raw(w, h, pixels).map(DynamicImage::ImageLuma8)
    } else {
        ImageBuffer::from_raw(w, h, pixels).map(DynamicImage::ImageRgb8)
    };
    let image = image.context("it holds fewer pixels than its size says")?;
    let segments = map
        .segments
        .iter()
        .map(|(marker, range)| (*marker, &bytes[range.clone()]));
    let (metadata, warning) = Metadata::from_jpeg(segments).within(limits);
    let orientation = orientation::of(metadata.exif.as_deref(), metadata.xmp.as_deref());
    Ok(Picture::from_decoded(
        image,
        orientation,
        Format::Jpeg,
        metadata,
        warning.into_iter().collect(),
    ))
}

/// The segments that say how pixels are coded, in the order that `zune-jpeg` wants, and the scans: no metadata that could
/// be damaged, no bytes between segments, and the frame header after the quantization tables, which the standard lets
/// follow it.
fn plain(bytes: &[u8], map: &JpegMap) -> Option<Vec<u8>> {
    let scans = map.scans?;
    let mut out = vec![0xFF, 0xD8];
    // A segment is its marker, its length and its payload.
    let mut copy = |range: &Range<usize>| out.extend_from_slice(&bytes[range.start - 4..range.end]);
    let codes_pixels = |marker: u8, payload: &Range<usize>| match marker {
        // Adobe's says which colours they are.
        0xEE => payload.len() >= 12 && bytes[payload.clone()].starts_with(b"Adobe"),
        0xE0 => bytes[payload.clone()].starts_with(b"JFIF\0"),
        0xE1..=0xEF | 0xFE => false,
        other => !is_frame(other),
    };
    for (_, payload) in map
        .segments
        .iter()
        .filter(|(marker, payload)| codes_pixels(*marker, payload))
    {
        copy(payload);
    }
    for (_, payload) in map.segments.iter().filter(|(marker, _)| is_frame(*marker)) {
        copy(payload);
    }
    out.extend_from_slice(&bytes[scans..]);
    Some(out)
}

fn is_frame(marker: u8) -> bool {
    matches!(marker, 0xC0..=0xCF) && ![0xC4, 0xC8, 0xCC].contains(&marker)
}

/// The frame header (SOF).
struct Frame {
    width: u64,
    height: u64,
}

impl Frame {
    /// Finds it, and refuses what is not decoded.
    fn find(bytes: &[u8], map: &JpegMap) -> Result<Self> {
        let found = map.segments.iter().find(|(marker, _)| is_frame(*marker));
        let Some((marker, range)) = found else {
            bail!("it has no frame header before its pixels: the file was cut short or is damaged");
        };
        const CURE: &str = "save it again as a baseline JPEG or as PNG";
        match marker {
            0xC3 => bail!("it is a lossless JPEG, which is not supported; {CURE}"),
            0xC5..=0xC7 => bail!("it is a hierarchical JPEG, which is not supported; {CURE}"),
            0xC9..=0xCF => {
                bail!("it is a JPEG with arithmetic coding, which is not supported; {CURE}")
            }
            _ => {}
        }
        let frame = &bytes[range.clone()];
        ensure!(
            frame.len() >= 6,
            "its frame header is too short: it is damaged"
        );
        ensure!(
            frame[0] == 8,
            "its samples have {} bits, and only 8 are supported; {CURE}",
            frame[0]
        );
        let side = |at: usize| u64::from(u16::from_be_bytes([frame[at], frame[at + 1]]));
        let (height, width) = (side(1), side(3));
        ensure!(
            height > 0,
            "its header leaves its height to be stated after the pixels (DNL), which is not supported; {CURE}"
        );
        Ok(Self { width, height })
    }
}
