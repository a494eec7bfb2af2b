//! [`Picture`] -> the bytes of a PNG, JPEG, WebP, TIFF or BMP file, with the metadata that the format can hold.

use anyhow::{Context, Result, bail, ensure};
use image::codecs::bmp::BmpEncoder;
use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageEncoder};
use png::text_metadata::{ITXtChunk, TEXtChunk};

use super::{Depth, Format, Picture, encode_tiff, structure, to_u8, to_u16};
use crate::metadata::{TextGoes, XMP_KEY};

/// JPEG quality where none is given: artefacts are below what one sees, at a third of the size of 100.
pub const DEFAULT_JPEG_QUALITY: u8 = 95;

/// An encoded file, and what the format could not keep.
#[derive(Debug)]
pub struct Encoded {
    /// The whole file.
    pub bytes: Vec<u8>,
    /// One a thing that the format could not keep.
    pub warnings: Vec<String>,
}

/// Encodes a picture. `quality` is 1..=100 for JPEG (default 95) and WebP (default: lossless); it means nothing to
/// the others. Transparent pixels are laid on white where the format has no alpha; a warning says so.
///
/// # Errors
/// The format cannot be written, or not at this size.
pub fn encode(picture: &Picture, format: Format, quality: Option<u8>) -> Result<Encoded> {
    let (w, h) = (picture.pixels.width, picture.pixels.height);
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
        Format::Jpeg => jpeg(
            picture,
            quality.unwrap_or(DEFAULT_JPEG_QUALITY),
            &mut warnings,
        ),
        Format::WebP => webp(picture, quality),
        Format::Tiff => encode_tiff::encode(picture),
        Format::Bmp => bmp(picture),
        Format::Gif => bail!("GIF is read, but not written; choose PNG, JPEG, WebP, TIFF or BMP"),
    };
    let bytes =
        bytes.with_context(|| format!("cannot encode the {w}x{h} picture as {}", format.name()))?;
    warnings.extend(lost_metadata(picture, format));
    Ok(Encoded { bytes, warnings })
}

/// What of the metadata the format cannot hold, in a sentence.
fn lost_metadata(picture: &Picture, format: Format) -> Option<String> {
    let metadata = &picture.metadata;
    let exif = match format {
        Format::Bmp => Vec::new(),
        _ => metadata.lost_exif(format == Format::Tiff),
    };
    let mut lost: Vec<&str> = match format {
        Format::Png => Vec::new(),
        _ => metadata.lost_outside_png(format == Format::WebP),
    };
    lost.extend(exif.iter().map(String::as_str));
    let icc = metadata.icc_for(format.keeps_gray(picture.alpha.is_some()) && picture.gray);
    if metadata.icc.is_some() && (icc.is_none() || format == Format::Bmp) {
        lost.push("the colour profile");
    }
    if format == Format::Bmp {
        let others = [
            ("EXIF", metadata.exif.is_some()),
            ("XMP", metadata.xmp.is_some()),
        ];
        lost.extend(
            others
                .iter()
                .filter(|(_, there)| *there)
                .map(|(name, _)| name),
        );
    }
    (!lost.is_empty()).then(|| format!("not kept in {}: {}", format.name(), lost.join(", ")))
}

/// The samples as 8 bits, and the number of channels.
fn samples8(picture: &Picture) -> (Vec<u8>, usize) {
    let (samples, channels) = picture.interleaved();
    (to_u8(&samples), channels)
}

fn png(picture: &Picture) -> Result<Vec<u8>> {
    let (samples, channels) = picture.interleaved();
    let mut bytes = Vec::new();
    let metadata = &picture.metadata;
    let mut info = png::Info::with_size(picture.pixels.width as u32, picture.pixels.height as u32);
    info.icc_profile = metadata.icc_for(picture.gray).map(Into::into);
    info.exif_metadata = metadata
        .exif_for(
            picture.pixels.width,
            picture.pixels.height,
            TextGoes::Elsewhere,
        )
        .map(Into::into);
    let mut encoder = png::Encoder::with_info(&mut bytes, info)?;
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
    for (key, text) in &metadata.text {
        // Latin-1 where that is enough, which every reader knows; a key that PNG does not allow is left out.
        if text.chars().all(|c| u32::from(c) < 256) {
            writer.write_text_chunk(&TEXtChunk::new(key, text)).ok();
        } else {
            writer.write_text_chunk(&ITXtChunk::new(key, text)).ok();
        }
    }
    if let Some(xmp) = metadata
        .xmp_upright()
        .and_then(|xmp| String::from_utf8(xmp).ok())
    {
        writer.write_text_chunk(&ITXtChunk::new(XMP_KEY, xmp))?;
    }
    writer.write_image_data(&data)?;
    writer.finish()?;
    Ok(bytes)
}

fn jpeg(picture: &Picture, quality: u8, warnings: &mut Vec<String>) -> Result<Vec<u8>> {
    let (data, channels) = samples8(picture);
    let color = if channels == 1 {
        ExtendedColorType::L8
    } else {
        ExtendedColorType::Rgb8
    };
    let mut bytes = Vec::new();
    let mut encoder = JpegEncoder::new_with_quality(&mut bytes, quality);
    if let Some(icc) = picture.metadata.icc_for(picture.gray) {
        encoder.set_icc_profile(icc.to_vec())?;
    }
    encoder.write_image(
        &data,
        picture.pixels.width as u32,
        picture.pixels.height as u32,
        color,
    )?;

    // EXIF and XMP follow the JFIF segment, each led by its name, in segments of at most 65533 bytes.
    let exif = picture.metadata.exif_for(
        picture.pixels.width,
        picture.pixels.height,
        TextGoes::IntoExif,
    );
    let blocks = [
        ("EXIF", &b"Exif\0\0"[..], exif),
        (
            "XMP",
            b"http://ns.adobe.com/xap/1.0/\0",
            picture.metadata.xmp_upright(),
        ),
    ];
    let mut segments = Vec::new();
    for (what, head, block) in blocks {
        let Some(block) = block else { continue };
        match u16::try_from(2 + head.len() + block.len()) {
            Ok(length) => {
                segments.extend([&[0xFF, 0xE1], &length.to_be_bytes()[..], head, &block].concat())
            }
            Err(_) => warnings.push(format!(
                "{what} of {} bytes is too large for a JPEG: dropped",
                block.len()
            )),
        }
    }
    let map = structure::map_jpeg(&bytes).context("the encoder wrote no JPEG")?;
    let after_jfif = map
        .segments
        .first()
        .filter(|(marker, _)| *marker == 0xE0)
        .map_or(2, |(_, range)| range.end);
    bytes.splice(after_jfif..after_jfif, segments);
    Ok(bytes)
}

fn webp(picture: &Picture, quality: Option<u8>) -> Result<Vec<u8>> {
    // libwebp takes no grey.
    let (mut samples, channels) = picture.interleaved();
    if picture.gray {
        let repeat = |p: &[f32]| {
            [p[0], p[0], p[0]]
                .into_iter()
                .chain(p.get(1).copied())
                .collect::<Vec<_>>()
        };
        samples = samples.chunks_exact(channels).flat_map(repeat).collect();
    }
    let data = to_u8(&samples);
    let (w, h) = (picture.pixels.width as u32, picture.pixels.height as u32);
    let encoder = match picture.alpha {
        None => webp::Encoder::from_rgb(&data, w, h),
        Some(_) => webp::Encoder::from_rgba(&data, w, h),
    };
    let mut config =
        webp::WebPConfig::new().map_err(|()| anyhow::anyhow!("libwebp does not start"))?;
    config.lossless = i32::from(quality.is_none());
    // For lossless files this is the effort; libwebp's default is 75.
    config.quality = quality.map_or(75.0, f32::from);
    // Colour under transparent pixels is kept, as in every other format.
    config.exact = 1;
    let encoded = encoder.encode_advanced(&config);
    let encoded = encoded.map_err(|e| anyhow::anyhow!("libwebp: {e:?}"))?;
    with_webp_metadata(&encoded, picture)
}

/// Puts colour profile, EXIF and XMP around libwebp's output, in the extended layout that they need.
fn with_webp_metadata(simple: &[u8], picture: &Picture) -> Result<Vec<u8>> {
    let icc = picture.metadata.icc_for(false).map(<[u8]>::to_vec);
    let exif = picture
        .metadata
        .exif_for_webp(picture.pixels.width, picture.pixels.height);
    let xmp = picture.metadata.xmp_upright();
    if icc.is_none() && exif.is_none() && xmp.is_none() {
        return Ok(simple.to_vec());
    }
    let inner = structure::webp_chunks(simple).context("libwebp wrote no WebP")?;
    let flag = |there: bool, bit: u8| u8::from(there) << bit;
    let flags = flag(icc.is_some(), 5)
        | flag(picture.alpha.is_some(), 4)
        | flag(exif.is_some(), 3)
        | flag(xmp.is_some(), 2);
    let side = |n: usize| (n as u32 - 1).to_le_bytes();
    let (w, h) = (side(picture.pixels.width), side(picture.pixels.height));
    let head = vec![flags, 0, 0, 0, w[0], w[1], w[2], h[0], h[1], h[2]];

    let mut chunks: Vec<([u8; 4], Vec<u8>)> = vec![(*b"VP8X", head)];
    chunks.extend(icc.map(|data| (*b"ICCP", data)));
    let pixels = inner
        .into_iter()
        .filter(|(name, _)| [*b"ALPH", *b"VP8 ", *b"VP8L"].contains(name));
    chunks.extend(pixels.map(|(name, range)| (name, simple[range].to_vec())));
    chunks.extend(exif.map(|data| (*b"EXIF", data)));
    chunks.extend(xmp.map(|data| (*b"XMP ", data)));
    let mut body = b"WEBP".to_vec();
    for (name, data) in chunks {
        body.extend(name);
        body.extend((data.len() as u32).to_le_bytes());
        body.extend(&data);
        body.resize(body.len().next_multiple_of(2), 0);
    }
    let size = u32::try_from(body.len())
        .context("it is larger than the 4 GB that a WebP file can hold")?;
    Ok([&b"RIFF"[..], &size.to_le_bytes(), &body].concat())
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
        picture.pixels.width as u32,
        picture.pixels.height as u32,
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
        .pixels
        .values
        .chunks_exact_mut(3)
        .zip(picture.alpha.iter().flatten())
    {
        for v in pixel {
            *v = *v * a + (1.0 - a);
        }
    }
    flat
}
