//! Samples of any width, from packed bytes to levels of 8 bits, 16 bits or floating point.

use anyhow::{Result, bail, ensure};
use half::f16;
use image::{DynamicImage, ImageBuffer};

use super::directory::join;

/// What one sample is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    pub bits: usize,
    pub floating: bool,
    pub big_endian: bool,
}

impl Kind {
    /// From the fields `BitsPerSample` and `SampleFormat`. Errors say which kinds are not read.
    pub fn new(bits: &[u64], formats: &[u64], big_endian: bool) -> Result<Self> {
        let (Some(&width), Some(&format)) = (bits.first(), formats.first()) else {
            bail!("its samples have no size");
        };
        ensure!(
            bits.iter().all(|&b| b == width) && formats.iter().all(|&f| f == format),
            "its channels have different depths ({} bits), which is not supported; save it again with 8 or 16 bits",
            bits.iter()
                .take(8)
                .map(u64::to_string)
                .collect::<Vec<_>>()
                .join("/")
        );
        let kind = Self {
            bits: width as usize,
            floating: format == 3,
            big_endian,
        };
        match format {
            // 4 is "undefined", which libtiff takes for whole numbers.
            1 | 4 if (1..=32).contains(&width) || width == 64 => Ok(kind),
            3 if [16, 32, 64].contains(&width) => Ok(kind),
            2 => bail!(
                "its samples are signed numbers, and nothing says which of them are black and white; save it again with unsigned 8 or 16 bits"
            ),
            5 | 6 => bail!("its samples are complex numbers, which are no picture"),
            3 => bail!(
                "its samples are floating-point numbers of {width} bits, which is not supported; save it again with 16 or 32"
            ),
            _ => bail!(
                "its samples have {width} bits, which is not supported; save it again with 8 or 16 bits"
            ),
        }
    }

    /// Bytes of a row of `samples`.
    pub fn row_bytes(self, samples: usize) -> usize {
        (samples * self.bits).div_ceil(8)
    }

    /// Sample `i` of a row: its bits as a number.
    fn raw(self, row: &[u8], i: usize) -> u64 {
        match self.bits {
            8 => u64::from(row[i]),
            16 | 24 | 32 | 64 => {
                let length = self.bits / 8;
                join(&row[i * length..(i + 1) * length], self.big_endian)
            }
            // Packed from the high bits on, whatever the file's byte order.
            bits => (i * bits..(i + 1) * bits).fold(0, |value, at| {
                value << 1 | u64::from(row[at / 8] >> (7 - at % 8) & 1)
            }),
        }
    }
}

/// One sample in memory.
pub(super) trait Level: Copy + Default + Send + Sync {
    /// From the bits of a sample of `kind`.
    fn from_raw(raw: u64, kind: Kind) -> Self;
    /// 0..=1 of the range that [`Level::from_raw`] gives.
    fn unit(self) -> f32;
    /// From 0..=1.
    fn from_unit(unit: f32) -> Self;
    /// An image of 1 to 4 channels: grey, grey with alpha, RGB, RGBA. `None` if the pixels are too few.
    fn image(width: u32, height: u32, channels: usize, samples: Vec<Self>) -> Option<DynamicImage>;
}

impl Level for u8 {
    fn from_raw(raw: u64, kind: Kind) -> Self {
        let top = (1u64 << kind.bits) - 1;
        ((raw * 255 + top / 2) / top) as u8
    }

    fn unit(self) -> f32 {
        f32::from(self) / 255.0
    }

    fn from_unit(unit: f32) -> Self {
        (unit.clamp(0.0, 1.0) * 255.0).round() as u8
    }

    fn image(width: u32, height: u32, channels: usize, samples: Vec<Self>) -> Option<DynamicImage> {
        Some(match channels {
            1 => DynamicImage::ImageLuma8(ImageBuffer::from_raw(width, height, samples)?),
            2 => DynamicImage::ImageLumaA8(ImageBuffer::from_raw(width, height, samples)?),
            3 => DynamicImage::ImageRgb8(ImageBuffer::from_raw(width, height, samples)?),
            _ => DynamicImage::ImageRgba8(ImageBuffer::from_raw(width, height, samples)?),
        })
    }
}

impl Level for u16 {
    fn from_raw(raw: u64, kind: Kind) -> Self {
        if kind.bits > 16 {
            return (raw >> (kind.bits - 16)) as u16;
        }
        let top = (1u64 << kind.bits) - 1;
        ((raw * 65535 + top / 2) / top) as u16
    }

    fn unit(self) -> f32 {
        f32::from(self) / 65535.0
    }

    fn from_unit(unit: f32) -> Self {
        (unit.clamp(0.0, 1.0) * 65535.0).round() as u16
    }

    fn image(width: u32, height: u32, channels: usize, samples: Vec<Self>) -> Option<DynamicImage> {
        Some(match channels {
            1 => DynamicImage::ImageLuma16(ImageBuffer::from_raw(width, height, samples)?),
            2 => DynamicImage::ImageLumaA16(ImageBuffer::from_raw(width, height, samples)?),
            3 => DynamicImage::ImageRgb16(ImageBuffer::from_raw(width, height, samples)?),
            _ => DynamicImage::ImageRgba16(ImageBuffer::from_raw(width, height, samples)?),
        })
    }
}

impl Level for f32 {
    fn from_raw(raw: u64, kind: Kind) -> Self {
        match kind.bits {
            16 => f16::from_bits(raw as u16).to_f32(),
            64 => f64::from_bits(raw) as f32,
            _ => f32::from_bits(raw as u32),
        }
    }

    fn unit(self) -> f32 {
        self
    }

    fn from_unit(unit: f32) -> Self {
        unit
    }

    fn image(width: u32, height: u32, channels: usize, samples: Vec<Self>) -> Option<DynamicImage> {
        Some(match channels {
            // `image` has no grey in floating point.
            1 | 2 => {
                return u16::image(
                    width,
                    height,
                    channels,
                    samples.into_iter().map(u16::from_unit).collect(),
                );
            }
            3 => DynamicImage::ImageRgb32F(ImageBuffer::from_raw(width, height, samples)?),
            _ => DynamicImage::ImageRgba32F(ImageBuffer::from_raw(width, height, samples)?),
        })
    }
}

/// Where the samples of one strip or tile row go.
pub(super) struct Place {
    /// Index of the first in the output.
    pub first: usize,
    /// Distance of one to the next in the output.
    pub step: usize,
    pub count: usize,
}

/// Puts the first `place.count` samples of a packed row into `out`.
pub(super) fn spread<T: Level>(row: &[u8], kind: Kind, out: &mut [T], place: &Place) {
    for i in 0..place.count {
        out[place.first + i * place.step] = T::from_raw(kind.raw(row, i), kind);
    }
}

/// The indices of a row of a palette picture, as they are.
pub(super) fn indices(row: &[u8], kind: Kind, out: &mut [u8], place: &Place) {
    for i in 0..place.count {
        out[place.first + i * place.step] = kind.raw(row, i) as u8;
    }
}

/// Undoes the horizontal predictor (2) in one row of whole samples, `step` samples a pixel.
pub(super) fn add_left(row: &mut [u8], kind: Kind, step: usize) {
    let length = kind.bits / 8;
    for at in (step * length..row.len() - row.len() % length).step_by(length) {
        let left = join(&row[at - step * length..][..length], kind.big_endian);
        let sum = join(&row[at..at + length], kind.big_endian).wrapping_add(left);
        let bytes = sum.to_le_bytes();
        for (i, byte) in bytes[..length].iter().enumerate() {
            row[at + if kind.big_endian { length - 1 - i } else { i }] = *byte;
        }
    }
}

/// Undoes the floating-point predictor (3) in one row: bytes of equal weight lie together, the highest first, each as the
/// difference to the one a pixel before.
pub(super) fn join_planes(row: &mut [u8], kind: Kind, step: usize) {
    for at in step..row.len() {
        row[at] = row[at].wrapping_add(row[at - step]);
    }
    let length = kind.bits / 8;
    let count = row.len() / length;
    let planes = row.to_vec();
    for i in 0..count {
        for weight in 0..length {
            let byte = planes[weight * count + i];
            row[i * length
                + if kind.big_endian {
                    weight
                } else {
                    length - 1 - weight
                }] = byte;
        }
    }
}
