//! The picture that goes in and comes out: RGB in 0..=1, an optional alpha, and what must be kept of its file; and the
//! conversions between pixels of every depth and `f32`.

pub mod alpha;
pub mod color_fix;
mod decode;
mod decode_bmp;
mod decode_gif;
mod decode_jpeg;
mod decode_jxl;
mod decode_png;
mod double;
mod encode;
mod encode_bmp;
mod encode_jpeg;
mod encode_jxl;
mod encode_png;
mod encode_tiff;
mod encode_webp;
mod format;
mod header;
mod heif;
mod rows;
pub(crate) mod structure;
mod tiff;
mod words;

use image::DynamicImage;
use image::metadata::Orientation;
use rayon::prelude::*;

pub(crate) use self::decode::decode;
pub(crate) use self::decode_jxl::is_whole as jxl_is_whole;
pub use self::double::{double, enlarge};
pub use self::encode::{DEFAULT_JPEG_QUALITY, Encoded, encode, encode_lines};
pub use self::format::Format;
pub use self::header::Header;
pub(crate) use self::heif::is_whole as heif_is_whole;
pub use self::rows::{Alpha, NextLines, Outline};
use crate::metadata::Metadata;
use crate::pixels::Pixels;

/// Bits of a channel in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// 8 bits or fewer.
    Eight,
    /// 16 bits, or floating point, which is written as 16 bits.
    Sixteen,
}

/// A picture in memory.
#[derive(Clone, Debug)]
pub struct Picture {
    /// Its colours; grey three times.
    pub pixels: Pixels,
    /// (height, width), 0 = transparent, 1 = opaque; absent where every pixel is opaque.
    pub alpha: Option<Vec<f32>>,
    /// The three channels are equal and are written as one.
    pub gray: bool,
    /// Of its file, and of what it is written to where that can hold it.
    pub depth: Depth,
    /// The format it was read from, or will be written in by default.
    pub format: Format,
    /// What its file holds besides pixels.
    pub metadata: Metadata,
    /// What the reader of the file should be told: frames dropped, a wrong extension.
    pub warnings: Vec<String>,
}

impl Picture {
    /// An opaque 8-bit RGB picture without metadata.
    pub fn from_pixels(pixels: Pixels) -> Self {
        Self {
            pixels,
            alpha: None,
            gray: false,
            depth: Depth::Eight,
            format: Format::Png,
            metadata: Metadata::default(),
            warnings: Vec::new(),
        }
    }

    /// Takes decoded pixels, turned upright by `orientation`.
    pub(crate) fn from_decoded(
        mut image: DynamicImage,
        orientation: Orientation,
        format: Format,
        metadata: Metadata,
        warnings: Vec<String>,
    ) -> Self {
        image.apply_orientation(orientation);
        let color = image.color();
        let (width, height) = (image.width() as usize, image.height() as usize);
        let depth = if color.bytes_per_pixel() > color.channel_count() {
            Depth::Sixteen
        } else {
            Depth::Eight
        };
        let channels = usize::from(color.channel_count());
        let has_alpha = color.has_alpha();
        let (values, alpha) = match image {
            DynamicImage::ImageLuma8(i) => split(&i, channels, unit8),
            DynamicImage::ImageLumaA8(i) => split(&i, channels, unit8),
            DynamicImage::ImageRgb8(i) => split(&i, channels, unit8),
            DynamicImage::ImageRgba8(i) => split(&i, channels, unit8),
            DynamicImage::ImageLuma16(i) => split(&i, channels, unit16),
            DynamicImage::ImageLumaA16(i) => split(&i, channels, unit16),
            DynamicImage::ImageRgb16(i) => split(&i, channels, unit16),
            DynamicImage::ImageRgba16(i) => split(&i, channels, unit16),
            other if has_alpha => split(&other.into_rgba32f(), 4, unit_float),
            other => split(&other.into_rgb32f(), 3, unit_float),
        };
        // BMP and GIF have no grey but as a palette, and libheif gives grey as colour.
        let palette = matches!(format, Format::Bmp | Format::Gif | Format::Heif);
        let equal = |p: &[f32]| p[0] == p[1] && p[1] == p[2];
        let gray = channels < 3 || (palette && values.par_chunks_exact(3).all(equal));
        Self {
            pixels: Pixels {
                width,
                height,
                values,
            },
            alpha,
            gray,
            depth,
            format,
            metadata,
            warnings,
        }
    }
}

/// Lines that an encoder takes at a time where its format is indifferent.
const PIECE: usize = 64;

/// Pixels that one task converts at a time.
const RUN: usize = 1 << 14;

/// Interleaved samples of 1 to 4 channels -> RGB (grey three times), and alpha where it is not opaque.
fn split<T: Copy + Sync>(
    samples: &[T],
    channels: usize,
    unit: fn(T) -> f32,
) -> (Vec<f32>, Option<Vec<f32>>) {
    let pixels = samples.len() / channels;
    let mut rgb = vec![0.0; 3 * pixels];
    let runs = rgb
        .par_chunks_mut(3 * RUN)
        .zip(samples.par_chunks(channels * RUN));
    runs.for_each(|(out, samples)| {
        for (out, pixel) in out.chunks_exact_mut(3).zip(samples.chunks_exact(channels)) {
            for (c, value) in out.iter_mut().enumerate() {
                *value = unit(pixel[if channels < 3 { 0 } else { c }]);
            }
        }
    });
    let opacity = || {
        samples
            .par_chunks_exact(channels)
            .map(|pixel| unit(pixel[channels - 1]))
    };
    let transparent = matches!(channels, 2 | 4) && opacity().any(|a| a < 1.0);
    (rgb, transparent.then(|| opacity().collect()))
}

/// Rec. 601 luma of one RGB pixel.
pub(crate) fn luma(p: &[f32]) -> f32 {
    0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2]
}

/// 0..=1 to 0..=255: clamped, then rounded half to even, as the reference's `(x * 255).round()` in NumPy.
pub fn to_u8(samples: &[f32]) -> Vec<u8> {
    let level = |v: &f32| (v.clamp(0.0, 1.0) * 255.0).round_ties_even() as u8;
    samples.par_iter().map(level).collect()
}

/// 0..=1 to 0..=65535, rounded as in [`to_u8`].
pub fn to_u16(samples: &[f32]) -> Vec<u16> {
    let level = |v: &f32| (v.clamp(0.0, 1.0) * 65535.0).round_ties_even() as u16;
    samples.par_iter().map(level).collect()
}

fn unit8(level: u8) -> f32 {
    f32::from(level) / 255.0
}

fn unit16(level: u16) -> f32 {
    f32::from(level) / 65535.0
}

/// Floating-point files may hold anything: NaN becomes 0, the rest is clamped.
fn unit_float(value: f32) -> f32 {
    if value.is_nan() {
        0.0
    } else {
        value.clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_8_bit_and_16_bit_level_survives_the_way_through_f32() {
        let bytes: Vec<u8> = (0..=255).collect();
        let units: Vec<f32> = bytes.iter().copied().map(unit8).collect();
        assert_eq!(to_u8(&units), bytes);
        let words: Vec<u16> = (0..=65535).collect();
        let units: Vec<f32> = words.iter().copied().map(unit16).collect();
        assert_eq!(to_u16(&units), words);
    }

    #[test]
    fn rounding_is_half_to_even_and_out_of_range_values_are_clamped() {
        assert_eq!(
            to_u8(&[0.5 / 255.0, 2.5 / 255.0, -1.0, 7.0]),
            [0, 2, 0, 255]
        );
    }
}
