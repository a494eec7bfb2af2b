//! A picture's lines -> WebP, lossless or lossy. libwebp takes whole pictures: their 8-bit samples are in memory.

use std::borrow::Cow;
use std::io::Write;

use anyhow::{Context, Result};

use super::rows::{NextLines, Outline, Rows};
use super::{Format, PIECE, structure};

/// Writes a file of 8-bit RGB or RGBA; lossless without `quality`, which is 1..=100.
///
/// # Errors
/// libwebp's own, or those of `out` and `next`.
pub(super) fn encode(
    outline: &Outline,
    quality: Option<u8>,
    next: NextLines,
    out: &mut impl Write,
) -> Result<()> {
    let mut rows = Rows::<u8>::new(outline, Format::WebP, next)?;
    let mut data = Vec::with_capacity(outline.height * rows.length());
    for top in (0..outline.height).step_by(PIECE) {
        data.extend_from_slice(rows.take(PIECE.min(outline.height - top))?);
    }
    let (w, h) = (outline.width as u32, outline.height as u32);
    let encoder = match outline.alpha {
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
    out.write_all(&with_metadata(&encoded, outline)?)?;
    Ok(())
}

/// Puts colour profile, EXIF and XMP around libwebp's output, in the extended layout that they need.
fn with_metadata<'a>(simple: &'a [u8], outline: &Outline) -> Result<Cow<'a, [u8]>> {
    let icc = outline.metadata.profile_for(false).map(Cow::into_owned);
    let exif = outline
        .metadata
        .exif_for_webp(outline.width, outline.height);
    let xmp = outline.metadata.xmp_upright();
    if icc.is_none() && exif.is_none() && xmp.is_none() {
        return Ok(Cow::Borrowed(simple));
    }
    let inner = structure::webp_chunks(simple).context("libwebp wrote no WebP")?;
    let flag = |there: bool, bit: u8| u8::from(there) << bit;
    let flags = flag(icc.is_some(), 5)
        | flag(outline.alpha.is_some(), 4)
        | flag(exif.is_some(), 3)
        | flag(xmp.is_some(), 2);
    let side = |n: usize| (n as u32 - 1).to_le_bytes();
    let (w, h) = (side(outline.width), side(outline.height));
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
    Ok([&b"RIFF"[..], &size.to_le_bytes(), &body].concat().into())
}
