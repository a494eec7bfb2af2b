//! [`Picture`] -> the bytes of a PNG, JPEG, WebP, TIFF or BMP file, with the metadata that the format can hold.

use std::io::Cursor;

use anyhow::{Context, Result, bail, ensure};
use image::codecs::{bmp::BmpEncoder, jpeg::JpegEncoder};
use image::{ExtendedColorType, ImageEncoder};

use crate::metadata::Metadata;
use crate::picture::{Depth, Format, Picture, to_u8, to_u16};

/// JPEG quality where none is given: artefacts are below what one sees, at a third of the size of 100.
pub const DEFAULT_JPEG_QUALITY: u8 = 95;

/// An encoded file, and what the format could not keep.
#[derive(Debug)]
pub struct Encoded {
    pub bytes: Vec<u8>,
    pub warnings: Vec<String>,
}

/// Encodes a picture. `quality` is 1..=100 for JPEG (default 95) and WebP (default: lossless); it means nothing to
/// the others. Transparent pixels are laid on white where the format has no alpha; a warning says so.
pub fn encode(picture: &Picture, format: Format, quality: Option<u8>) -> Result<Encoded> {
    let (w, h) = (picture.width, picture.height);
    let most = format.max_side();
    ensure!(
        w <= most && h <= most,
        "a {} file holds at most {most} pixels a side, but the picture has {w}x{h}; write it as PNG",
        format.name()
    );
    let mut warnings = Vec::new();
    let flattened;
    let picture = if picture.alpha.is_some() && !format.keeps_alpha() {
        warnings.push(format!(
            "{} keeps no transparency: laid on white",
            format.name()
        ));
        flattened = on_white(picture);
        &flattened
    } else {
        picture
    };
    let bytes = match format {
        Format::Png => png(picture),
        Format::Jpeg => jpeg(picture, quality.unwrap_or(DEFAULT_JPEG_QUALITY)),
        Format::WebP => webp(picture, quality),
        Format::Tiff => tiff(picture),
        Format::Bmp => bmp(picture),
        Format::Gif => bail!("GIF is read, but not written; choose PNG, JPEG, WebP, TIFF or BMP"),
    };
    let bytes =
        bytes.with_context(|| format!("cannot encode the {w}x{h} picture as {}", format.name()))?;
    Ok(Encoded { bytes, warnings })
}

/// The samples as 8 bits, and the number of channels.
fn samples8(picture: &Picture) -> (Vec<u8>, usize) {
    let (samples, channels) = picture.interleaved();
    (to_u8(&samples), channels)
}

fn png(picture: &Picture) -> Result<Vec<u8>> {
    let (samples, channels) = picture.interleaved();
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, picture.width as u32, picture.height as u32);
    encoder.set_color(match channels {
        1 => png::ColorType::Grayscale,
        2 => png::ColorType::GrayscaleAlpha,
        3 => png::ColorType::Rgb,
        _ => png::ColorType::Rgba,
    });
    let data = match picture.depth {
        Depth::Eight => {
            encoder.set_depth(png::BitDepth::Eight);
            to_u8(&samples)
        }
        Depth::Sixteen => {
            encoder.set_depth(png::BitDepth::Sixteen);
            to_u16(&samples)
                .iter()
                .flat_map(|v| v.to_be_bytes())
                .collect()
        }
    };
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&data)?;
    writer.finish()?;
    Ok(bytes)
}

fn jpeg(picture: &Picture, quality: u8) -> Result<Vec<u8>> {
    let (data, channels) = samples8(picture);
    let color = if channels == 1 {
        ExtendedColorType::L8
    } else {
        ExtendedColorType::Rgb8
    };
    let mut bytes = Vec::new();
    let encoder = JpegEncoder::new_with_quality(&mut bytes, quality);
    encoder.write_image(&data, picture.width as u32, picture.height as u32, color)?;
    Ok(bytes)
}

fn webp(picture: &Picture, quality: Option<u8>) -> Result<Vec<u8>> {
    // libwebp takes no grey.
    let color = Picture {
        gray: false,
        metadata: Metadata::default(),
        warnings: Vec::new(),
        ..picture.clone()
    };
    let (data, channels) = samples8(&color);
    let (w, h) = (picture.width as u32, picture.height as u32);
    let encoder = match channels {
        3 => webp::Encoder::from_rgb(&data, w, h),
        _ => webp::Encoder::from_rgba(&data, w, h),
    };
    let encoded = encoder.encode_simple(quality.is_none(), f32::from(quality.unwrap_or(100)));
    let bytes = encoded.map_err(|e| anyhow::anyhow!("libwebp: {e:?}"))?;
    Ok(bytes.to_vec())
}

fn tiff(picture: &Picture) -> Result<Vec<u8>> {
    use tiff::encoder::{Compression, DeflateLevel, Predictor, TiffEncoder, colortype as c};
    let (samples, channels) = picture.interleaved();
    let (w, h) = (picture.width as u32, picture.height as u32);
    let mut file = Cursor::new(Vec::new());
    let mut encoder = TiffEncoder::new(&mut file)?
        .with_compression(Compression::Deflate(DeflateLevel::Balanced))
        .with_predictor(Predictor::Horizontal);
    match picture.depth {
        Depth::Eight => {
            let data = to_u8(&samples);
            match channels {
                1 => encoder.write_image::<c::Gray8>(w, h, &data)?,
                3 => encoder.write_image::<c::RGB8>(w, h, &data)?,
                _ => encoder.write_image::<c::RGBA8>(w, h, &data)?,
            }
        }
        Depth::Sixteen => {
            let data = to_u16(&samples);
            match channels {
                1 => encoder.write_image::<c::Gray16>(w, h, &data)?,
                3 => encoder.write_image::<c::RGB16>(w, h, &data)?,
                _ => encoder.write_image::<c::RGBA16>(w, h, &data)?,
            }
        }
    }
    Ok(file.into_inner())
}

fn bmp(picture: &Picture) -> Result<Vec<u8>> {
    let (data, channels) = samples8(picture);
    let color = if channels == 1 {
        ExtendedColorType::L8
    } else {
        ExtendedColorType::Rgb8
    };
    let mut bytes = Vec::new();
    BmpEncoder::new(&mut bytes).encode(
        &data,
        picture.width as u32,
        picture.height as u32,
        color,
    )?;
    Ok(bytes)
}

/// The picture over a white ground, opaque.
fn on_white(picture: &Picture) -> Picture {
    let mut flat = Picture {
        alpha: None,
        ..picture.clone()
    };
    for (pixel, &a) in flat
        .rgb
        .chunks_exact_mut(3)
        .zip(picture.alpha.iter().flatten())
    {
        pixel.iter_mut().for_each(|v| *v = *v * a + (1.0 - a));
    }
    flat
}
