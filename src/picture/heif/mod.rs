//! HEIC and AVIF, by libheif where this machine has it: the primary picture, turned as the file says.

mod library;

use anyhow::{Result, anyhow, ensure};
use image::metadata::Orientation;
use image::{DynamicImage, ImageBuffer};

pub use self::library::is_here;
use self::library::{Decoded, Primary};
use super::{Format, Picture, words};
use crate::limits::ReadLimits;
use crate::metadata::{Metadata, StatedColor};

/// Decodes a whole file.
pub(super) fn decode(bytes: &[u8], limits: &ReadLimits) -> Result<Picture> {
    ensure!(is_whole(bytes), words::CUT_SHORT);
    let primary = Primary::of(bytes)?;
    let (width, height) = primary.size();
    limits.check_pixels(u64::from(width), u64::from(height))?;
    let decoded = primary.decode()?;
    limits.check_pixels(decoded.width as u64, decoded.height as u64)?;
    let image = image(decoded, primary.is_premultiplied())?;
    let (metadata, warning) = metadata(&primary).within(limits);
    let mut warnings = Vec::from_iter(warning);
    let pictures = primary.pictures();
    if pictures > 1 {
        warnings.push(format!(
            "{pictures} pictures: the primary one is used, the others are dropped"
        ));
    }
    // Upright already: what EXIF says besides does not count.
    let upright = Orientation::NoTransforms;
    Ok(Picture::from_decoded(
        image,
        upright,
        Format::Heif,
        metadata,
        warnings,
    ))
}

/// Width and height, upright, and what is said of the picture.
pub(super) fn header(bytes: &[u8]) -> Result<((u32, u32), Metadata)> {
    let primary = Primary::of(bytes)?;
    Ok((primary.size(), metadata(&primary)))
}

/// Whether its boxes (ISO/IEC 14496-12) end where it does.
pub(crate) fn is_whole(bytes: &[u8]) -> bool {
    let mut rest = bytes;
    while !rest.is_empty() {
        let Some((length, _)) = rest.split_first_chunk::<4>() else {
            return false;
        };
        let length = match u32::from_be_bytes(*length) {
            // To the end.
            0 => rest.len() as u64,
            1 => match rest.get(8..16).and_then(|long| long.try_into().ok()) {
                Some(long) => u64::from_be_bytes(long),
                None => return false,
            },
            length => u64::from(length),
        };
        let Some(next) = usize::try_from(length).ok().filter(|length| *length >= 8) else {
            return false;
        };
        match rest.get(next..) {
            Some(next) => rest = next,
            None => return false,
        }
    }
    !bytes.is_empty()
}

fn metadata(primary: &Primary) -> Metadata {
    let exif = primary.metadata("Exif").and_then(|block| {
        // An offset to the TIFF header comes before it.
        let (offset, rest) = block.split_first_chunk::<4>()?;
        Some(rest.get(u32::from_be_bytes(*offset) as usize..)?.to_vec())
    });
    let color = primary
        .stated_color()
        .map(|(primaries, transfer)| StatedColor {
            cicp: Some([primaries, transfer, 0, 1]),
            ..StatedColor::default()
        });
    let icc = primary.icc();
    Metadata {
        exif,
        // Of one that is stated in both ways the profile counts; 2 is "unspecified", and sRGB's need not be said.
        color: color.filter(|color| {
            icc.is_none()
                && !color.is_srgb()
                && color.cicp.is_some_and(|[p, t, ..]| p != 2 && t != 2)
        }),
        icc,
        xmp: primary.metadata("application/rdf+xml"),
        ..Metadata::default()
    }
    .or_density_in_exif()
}

fn image(decoded: Decoded, premultiplied: bool) -> Result<DynamicImage> {
    let Decoded {
        width,
        height,
        channels,
        bits,
        bytes,
    } = decoded;
    let (width, height) = (u32::try_from(width)?, u32::try_from(height)?);
    let whole = || anyhow!("libheif gives fewer pixels than it says");
    if bits == 8 {
        let samples = if premultiplied && channels == 4 {
            divided(&bytes, 255.0, |level| level as u8)
        } else {
            bytes
        };
        return match channels {
            3 => ImageBuffer::from_raw(width, height, samples).map(DynamicImage::ImageRgb8),
            _ => ImageBuffer::from_raw(width, height, samples).map(DynamicImage::ImageRgba8),
        }
        .ok_or_else(whole);
    }
    let top = f32::from(u16::MAX >> (16 - bits));
    let widened = |pair: &[u8; 2]| {
        let level = f32::from(u16::from_le_bytes(*pair));
        (level / top * 65535.0).round() as u16
    };
    let mut samples: Vec<u16> = bytes.as_chunks::<2>().0.iter().map(widened).collect();
    if premultiplied && channels == 4 {
        samples = divided(&samples, 65535.0, |level| level as u16);
    }
    match channels {
        3 => ImageBuffer::from_raw(width, height, samples).map(DynamicImage::ImageRgb16),
        _ => ImageBuffer::from_raw(width, height, samples).map(DynamicImage::ImageRgba16),
    }
    .ok_or_else(whole)
}

/// Colours by alpha, which they were multiplied with; `top` is a sample's highest level.
fn divided<T: Copy + Into<f32>>(samples: &[T], top: f32, level: fn(f32) -> T) -> Vec<T> {
    let (pixels, _) = samples.as_chunks::<4>();
    let each = |pixel: &[T; 4]| {
        let alpha: f32 = pixel[3].into();
        let by = |color: T| match alpha {
            0.0 => color,
            alpha => level((color.into() * top / alpha).min(top).round()),
        };
        [by(pixel[0]), by(pixel[1]), by(pixel[2]), pixel[3]]
    };
    pixels.iter().flat_map(each).collect()
}
