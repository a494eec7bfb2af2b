//! The picture that goes in and comes out: RGB in 0..=1, an optional alpha, and what must be kept of its file.
//! Also the file formats by name, and the conversions between pixels of every depth and `f32`.

use image::{DynamicImage, metadata::Orientation};
use rayon::prelude::*;

use crate::metadata::Metadata;

/// A raster file format that is read; all but GIF are written too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    Png,
    Jpeg,
    WebP,
    Tiff,
    Bmp,
    Gif,
}

impl Format {
    /// The formats that can be written.
    pub const WRITABLE: [Format; 5] = [
        Format::Png,
        Format::Jpeg,
        Format::WebP,
        Format::Tiff,
        Format::Bmp,
    ];

    /// The format meant by a file extension or a `--format` value, in any case and without the dot.
    pub fn from_extension(extension: &str) -> Option<Self> {
        Some(match extension.to_ascii_lowercase().as_str() {
            "png" | "apng" => Format::Png,
            "jpg" | "jpeg" | "jpe" | "jfif" => Format::Jpeg,
            "webp" => Format::WebP,
            "tif" | "tiff" => Format::Tiff,
            "bmp" | "dib" => Format::Bmp,
            "gif" => Format::Gif,
            _ => return None,
        })
    }

    /// The usual extension, without the dot.
    pub fn extension(self) -> &'static str {
        match self {
            Format::Png => "png",
            Format::Jpeg => "jpg",
            Format::WebP => "webp",
            Format::Tiff => "tif",
            Format::Bmp => "bmp",
            Format::Gif => "gif",
        }
    }

    /// The name people know it by.
    pub fn name(self) -> &'static str {
        match self {
            Format::Png => "PNG",
            Format::Jpeg => "JPEG",
            Format::WebP => "WebP",
            Format::Tiff => "TIFF",
            Format::Bmp => "BMP",
            Format::Gif => "GIF",
        }
    }

    pub fn is_writable(self) -> bool {
        self != Format::Gif
    }

    /// The largest side that the format's header can state, in pixels.
    pub fn max_side(self) -> usize {
        match self {
            Format::WebP => 16383,
            Format::Jpeg | Format::Gif => 65535,
            Format::Png | Format::Tiff | Format::Bmp => i32::MAX as usize,
        }
    }

    pub fn keeps_alpha(self) -> bool {
        matches!(self, Format::Png | Format::WebP | Format::Tiff)
    }

    pub fn keeps_sixteen_bits(self) -> bool {
        matches!(self, Format::Png | Format::Tiff)
    }
}

/// Bits of a channel in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    Eight,
    /// 16 bits, or floating point, which is written as 16 bits.
    Sixteen,
}

/// A picture in memory.
#[derive(Clone, Debug)]
pub struct Picture {
    pub width: usize,
    pub height: usize,
    /// (height, width, 3) interleaved, 0..=1; an 8-bit value v is exactly `v as f32 / 255.0`.
    pub rgb: Vec<f32>,
    /// (height, width), 0 = transparent, 1 = opaque; absent where every pixel is opaque.
    pub alpha: Option<Vec<f32>>,
    /// The three channels are equal and are written as one.
    pub gray: bool,
    pub depth: Depth,
    /// The format it was read from, or will be written in by default.
    pub format: Format,
    pub metadata: Metadata,
    /// What the reader of the file should be told: frames dropped, a wrong extension.
    pub warnings: Vec<String>,
}

impl Picture {
    /// An opaque 8-bit RGB picture without metadata. `rgb` is (height, width, 3), 0..=1.
    pub fn from_rgb(width: usize, height: usize, rgb: Vec<f32>) -> Self {
        assert_eq!(rgb.len(), width * height * 3, "rgb is (height, width, 3)");
        Self {
            width,
            height,
            rgb,
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
        let samples: Vec<f32> = match image {
            DynamicImage::ImageLuma8(i) => unit8(&i),
            DynamicImage::ImageLumaA8(i) => unit8(&i),
            DynamicImage::ImageRgb8(i) => unit8(&i),
            DynamicImage::ImageRgba8(i) => unit8(&i),
            DynamicImage::ImageLuma16(i) => unit16(&i),
            DynamicImage::ImageLumaA16(i) => unit16(&i),
            DynamicImage::ImageRgb16(i) => unit16(&i),
            DynamicImage::ImageRgba16(i) => unit16(&i),
            other if color.has_alpha() => unit_float(other.into_rgba32f().into_raw()),
            other => unit_float(other.into_rgb32f().into_raw()),
        };
        let one_channel = channels < 3;
        let alpha = color
            .has_alpha()
            .then(|| {
                let last = samples.par_iter().skip(channels - 1).step_by(channels);
                last.copied().collect::<Vec<f32>>()
            })
            .filter(|alpha| alpha.iter().any(|&a| a < 1.0));
        let rgb = match channels {
            3 => samples,
            _ => samples
                .par_chunks_exact(channels)
                .flat_map_iter(|p| {
                    if one_channel {
                        [p[0]; 3]
                    } else {
                        [p[0], p[1], p[2]]
                    }
                })
                .collect(),
        };
        // BMP and GIF have no grey but as a palette.
        let palette = matches!(format, Format::Bmp | Format::Gif);
        let equal = |p: &[f32]| p[0] == p[1] && p[1] == p[2];
        let gray = one_channel || (palette && rgb.par_chunks_exact(3).all(equal));
        Self {
            width,
            height,
            rgb,
            alpha,
            gray,
            depth,
            format,
            metadata,
            warnings,
        }
    }

    /// The channels as a file stores them: 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA), interleaved, 0..=1,
    /// with their number. Grey is taken with Rec. 601 weights, as Pillow's `convert("L")` does.
    pub(crate) fn interleaved(&self) -> (Vec<f32>, usize) {
        let color = |p: &[f32]| -> [f32; 3] {
            if self.gray {
                [luma(p), 0.0, 0.0]
            } else {
                [p[0], p[1], p[2]]
            }
        };
        let colors = if self.gray { 1 } else { 3 };
        let pixels = self.rgb.par_chunks_exact(3);
        match &self.alpha {
            None if !self.gray => (self.rgb.clone(), 3),
            None => (pixels.map(luma).collect(), 1),
            Some(alpha) => {
                let pixels = pixels.zip(alpha);
                let samples = pixels.flat_map_iter(|(p, &a)| {
                    let color = color(p);
                    (0..=colors).map(move |i| if i < colors { color[i] } else { a })
                });
                (samples.collect(), colors + 1)
            }
        }
    }
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

fn unit8(samples: &[u8]) -> Vec<f32> {
    samples.par_iter().map(|&v| f32::from(v) / 255.0).collect()
}

fn unit16(samples: &[u16]) -> Vec<f32> {
    let unit = |&v: &u16| f32::from(v) / 65535.0;
    samples.par_iter().map(unit).collect()
}

/// Floating-point files may hold anything: NaN becomes 0, the rest is clamped.
fn unit_float(mut samples: Vec<f32>) -> Vec<f32> {
    let unit = |v: &mut f32| *v = if v.is_nan() { 0.0 } else { v.clamp(0.0, 1.0) };
    samples.par_iter_mut().for_each(unit);
    samples
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_8_bit_and_16_bit_level_survives_the_way_through_f32() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(to_u8(&unit8(&bytes)), bytes);
        let words: Vec<u16> = (0..=65535).collect();
        assert_eq!(to_u16(&unit16(&words)), words);
    }

    #[test]
    fn rounding_is_half_to_even_and_out_of_range_values_are_clamped() {
        assert_eq!(
            to_u8(&[0.5 / 255.0, 2.5 / 255.0, -1.0, 7.0]),
            [0, 2, 0, 255]
        );
    }
}
