//! Image bytes -> [`Picture`]: one function per format; pixels turned upright, metadata kept, truncation refused.

use std::io::Cursor;

use anyhow::{Context, Result, bail, ensure};
use image::codecs::bmp::BmpDecoder;
use image::codecs::gif::GifDecoder;
use image::codecs::jpeg::JpegDecoder;
use image::codecs::tiff::TiffDecoder;
use image::codecs::webp::WebPDecoder;
use image::metadata::Orientation;
use image::{DynamicImage, ImageBuffer, ImageDecoder, Limits};

use super::{Format, Picture, decode_tiff, structure};
use crate::limits::ReadLimits;
use crate::metadata::Metadata;
use crate::metadata::exif::{self, Exif};

/// Decodes a whole file of a known format. Errors say what is wrong with the content; the caller adds the name.
pub(crate) fn decode(format: Format, bytes: &[u8], limits: &ReadLimits) -> Result<Picture> {
    let read = match format {
        Format::Png => png(bytes, limits),
        Format::Jpeg => jpeg(bytes, limits),
        Format::WebP => webp(bytes, limits),
        Format::Tiff => tiff(bytes, limits),
        Format::Bmp => bmp(bytes, limits),
        Format::Gif => gif(bytes, limits),
    };
    read.with_context(|| format!("this {} image cannot be decoded", format.name()))
}

fn png(bytes: &[u8], limits: &ReadLimits) -> Result<Picture> {
    let allocation = png::Limits {
        bytes: usize::try_from(limits.max_bytes()).unwrap_or(usize::MAX),
    };
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), allocation);
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
    let frames = reader.info().animation_control.map_or(1, |a| a.num_frames);
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
        (color, depth) => bail!("its colour type {color:?} at {depth:?} bits is not supported"),
    }
    .context("it holds fewer pixels than its size says")?;

    let metadata = Metadata::from_png(reader.info(), &mut budget);
    let orientation = orientation_of(metadata.exif.as_deref());
    let mut warnings = dropped_frames(frames as usize);
    warnings.extend(budget.warning());
    Ok(Picture::from_decoded(
        image,
        orientation,
        Format::Png,
        metadata,
        warnings,
    ))
}

fn jpeg(bytes: &[u8], limits: &ReadLimits) -> Result<Picture> {
    let map = structure::map_jpeg(bytes).context("it does not begin as a JPEG")?;
    let decoder = JpegDecoder::new(Cursor::new(bytes))?;
    limits.check_decoder(&decoder)?;
    ensure!(
        map.end.is_some(),
        "it ends before its end-of-image marker: the file was cut short"
    );
    finish(decoder, Format::Jpeg, limits, Vec::new())
}

fn webp(bytes: &[u8], limits: &ReadLimits) -> Result<Picture> {
    let chunks = structure::webp_chunks(bytes)
        .context("it ends before the length its header states: the file was cut short")?;
    let frames = chunks.iter().filter(|(name, _)| name == b"ANMF").count();
    let decoder = WebPDecoder::new(Cursor::new(bytes))?;
    finish(decoder, Format::WebP, limits, dropped_frames(frames))
}

fn tiff(bytes: &[u8], limits: &ReadLimits) -> Result<Picture> {
    ensure!(
        !structure::tiff_has_tiled_planes(bytes),
        "it keeps its channels apart and in tiles, which is not read; save it with interleaved channels"
    );
    let mut picture = match TiffDecoder::new(Cursor::new(bytes)) {
        Ok(decoder) => finish(decoder, Format::Tiff, limits, Vec::new())?,
        Err(image::ImageError::Unsupported(_)) => {
            let image = decode_tiff::decode(bytes, limits)?;
            let orientation = orientation_of(Some(bytes));
            Picture::from_decoded(
                image,
                orientation,
                Format::Tiff,
                Metadata::default(),
                Vec::new(),
            )
        }
        Err(error) => return Err(error.into()),
    };
    if structure::tiff_has_more_pages(bytes) {
        picture
            .warnings
            .push("several pages: the first is used, the others are dropped".into());
    }
    if !structure::tiff_is_whole(bytes) {
        let warning =
            "its directory points past its end: if it was cut short, metadata may be missing";
        picture.warnings.push(warning.into());
    }
    let block = Exif::from_tiff(bytes);
    let lost = block.as_ref().map(Exif::lost).unwrap_or_default();
    if !lost.is_empty() {
        let warning = format!("not read: {}", lost.join(", "));
        picture.warnings.push(warning);
    }
    let (metadata, warning) = Metadata {
        exif: block
            .filter(|block| !block.is_empty())
            .and_then(|block| block.to_bytes()),
        icc: Exif::tiff_value(bytes, exif::ICC),
        xmp: Exif::tiff_value(bytes, exif::XMP),
        text: Vec::new(),
    }
    .within(limits);
    picture.metadata = metadata;
    picture.warnings.extend(warning);
    Ok(picture)
}

fn bmp(bytes: &[u8], limits: &ReadLimits) -> Result<Picture> {
    let decoder = BmpDecoder::new(Cursor::new(bytes))?;
    finish(decoder, Format::Bmp, limits, Vec::new())
}

fn gif(bytes: &[u8], limits: &ReadLimits) -> Result<Picture> {
    let (frames, whole) = structure::gif_frames(bytes);
    ensure!(
        frames > 0,
        "it ends before its first frame is complete: the file was cut short"
    );
    let mut warnings = dropped_frames(frames);
    if !whole {
        warnings.push("the file was cut short after its first frame, which is used".into());
    }
    let decoder = GifDecoder::new(Cursor::new(bytes))?;
    finish(decoder, Format::Gif, limits, warnings)
}

/// Decodes the pixels once the size has been checked, and collects what `image` knows of the metadata.
fn finish<D: ImageDecoder>(
    mut decoder: D,
    format: Format,
    limits: &ReadLimits,
    mut warnings: Vec<String>,
) -> Result<Picture> {
    limits.check_decoder(&decoder)?;
    let mut allocation = Limits::no_limits();
    allocation.max_alloc = Some(limits.max_bytes());
    decoder.set_limits(allocation)?;
    // Metadata that cannot be read is no reason to refuse the pixels.
    let (metadata, warning) = Metadata {
        exif: decoder.exif_metadata().ok().flatten(),
        icc: decoder.icc_profile().ok().flatten(),
        xmp: decoder.xmp_metadata().ok().flatten(),
        text: Vec::new(),
    }
    .within(limits);
    warnings.extend(warning);
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let image = DynamicImage::from_decoder(decoder)?;
    Ok(Picture::from_decoded(
        image,
        orientation,
        format,
        metadata,
        warnings,
    ))
}

fn orientation_of(exif: Option<&[u8]>) -> Orientation {
    exif.and_then(Orientation::from_exif_chunk)
        .unwrap_or(Orientation::NoTransforms)
}

fn dropped_frames(frames: usize) -> Vec<String> {
    if frames > 1 {
        vec![format!(
            "animated: the first of {frames} frames is used, the others are dropped"
        )]
    } else {
        Vec::new()
    }
}
