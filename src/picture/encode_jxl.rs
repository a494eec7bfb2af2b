//! A picture's lines -> lossless JPEG XL. The encoder takes whole pictures: their samples are in memory.

use std::io::Write;

use anyhow::{Result, anyhow, ensure};
use bytemuck::Pod;
use zune_core::bit_depth::BitDepth;
use zune_core::colorspace::ColorSpace;
use zune_core::options::EncoderOptions;
use zune_jpegxl::JxlSimpleEncoder;

use super::rows::{NextLines, Outline, Rows, Sample};
use super::{Depth, Format, PIECE};
use crate::metadata::TextGoes;

/// The boxes that a file with metadata begins with: that it is JPEG XL, of the first version of the container (ISO/IEC 18181-2).
const SIGNATURE: &[u8] = b"\0\0\0\x0CJXL \r\n\x87\n";
const FILE_TYPE: &[u8] = b"\0\0\0\x14ftypjxl \0\0\0\0jxl ";

/// Writes a file of grey, grey with alpha, RGB or RGBA, of 8 bits, or of 16 where it is opaque: the encoder's alpha has 8.
///
/// # Errors
/// The encoder's own, or those of `out` and `next`.
pub(super) fn encode(outline: &Outline, next: NextLines, out: &mut impl Write) -> Result<()> {
    ensure!(
        outline.width > 1 && outline.height > 1,
        "the encoder takes pictures from 2x2 pixels; choose PNG"
    );
    let pixels = if outline.depth == Depth::Sixteen && outline.alpha.is_none() {
        codestream::<u16>(outline, BitDepth::Sixteen, next)?
    } else {
        codestream::<u8>(outline, BitDepth::Eight, next)?
    };
    let metadata = &outline.metadata;
    let exif = metadata.exif_for(outline.width, outline.height, TextGoes::IntoExif);
    let xmp = metadata.xmp_upright();
    if exif.is_none() && xmp.is_none() {
        return Ok(out.write_all(&pixels)?);
    }
    out.write_all(SIGNATURE)?;
    out.write_all(FILE_TYPE)?;
    // An offset to the TIFF header comes before it.
    let exif = exif.map(|block| [&[0; 4][..], &block].concat());
    for (name, data) in [(b"Exif", exif), (b"xml ", xmp)] {
        if let Some(data) = data {
            put(name, &data, out)?;
        }
    }
    put(b"jxlc", &pixels, out)
}

/// A box. Where 32 bits do, its length is stated in these: libjxl 0.7 loses its way behind longer ones.
fn put(name: &[u8; 4], data: &[u8], out: &mut impl Write) -> Result<()> {
    match u32::try_from(8 + data.len()) {
        Ok(length) => {
            out.write_all(&length.to_be_bytes())?;
            out.write_all(name)?;
        }
        Err(_) => {
            out.write_all(&1u32.to_be_bytes())?;
            out.write_all(name)?;
            out.write_all(&(16 + data.len() as u64).to_be_bytes())?;
        }
    }
    Ok(out.write_all(data)?)
}

fn codestream<S: Sample + Pod>(
    outline: &Outline,
    depth: BitDepth,
    next: NextLines,
) -> Result<Vec<u8>> {
    let mut rows = Rows::<S>::new(outline, Format::Jxl, next)?;
    let mut samples: Vec<S> = Vec::with_capacity(outline.height * rows.length());
    for top in (0..outline.height).step_by(PIECE) {
        samples.extend_from_slice(rows.take(PIECE.min(outline.height - top))?);
    }
    let colors = match outline.channels(Format::Jxl) {
        1 => ColorSpace::Luma,
        2 => ColorSpace::LumaA,
        3 => ColorSpace::RGB,
        _ => ColorSpace::RGBA,
    };
    let options = EncoderOptions::new(outline.width, outline.height, colors, depth);
    let encoder = JxlSimpleEncoder::new(bytemuck::cast_slice(&samples), options);
    let mut bytes = Vec::new();
    let encoded = encoder.encode(&mut bytes);
    encoded.map_err(|error| anyhow!("{}", format!("{error:?}").trim()))?;
    Ok(bytes)
}
