//! From a TIFF file's samples to grey or RGB with straight alpha, by what the samples mean (TIFF 6.0, its supplements).

use anyhow::{Result, bail};
use rayon::prelude::*;

use super::samples::Level;

/// What the samples mean (the field `PhotometricInterpretation`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Meaning {
    WhiteIsZero,
    BlackIsZero,
    Rgb,
    Palette,
    Cmyk,
    YCbCr(YCbCr),
    /// CIE L*a*b* with signed a* and b*.
    CieLab,
    /// The same as ICC profiles store it, a* and b* around the middle of the range.
    IccLab,
}

impl Meaning {
    /// Samples of a pixel without what `ExtraSamples` describes.
    pub fn colors(self) -> usize {
        match self {
            Self::WhiteIsZero | Self::BlackIsZero | Self::Palette => 1,
            Self::Cmyk => 4,
            _ => 3,
        }
    }

    /// The name of a kind that is not read.
    pub fn refuse(number: u64) -> Result<Self> {
        let name = match number {
            4 => "a transparency mask",
            10 => "ITU L*a*b*",
            32803 => "a camera's raw samples (CFA)",
            32844 | 32845 => "LogLuv",
            34892 => "a camera's raw samples (LinearRaw)",
            _ => bail!(
                "the meaning of its samples has the unknown number {number}; save it again as RGB"
            ),
        };
        bail!("its samples are {name}, which is not supported; save it again as RGB")
    }
}

/// How luma and chroma become RGB: the fields `YCbCrCoefficients` and `ReferenceBlackWhite`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct YCbCr {
    /// Weights of red, green and blue in luma.
    pub weights: [f32; 3],
    /// Levels of 255 for black and white of Y, and for zero and full Cb and Cr.
    pub range: [f32; 6],
}

/// How much a pixel covers, where the file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alpha {
    Straight,
    /// The colours are multiplied by it.
    Associated,
}

/// Samples (pixels of `stride`) -> 1 to 4 channels and their number. `alpha` is the sample after the colours. A palette
/// has been looked up before and is `Rgb` here.
pub(super) fn convert<T: Level>(
    samples: Vec<T>,
    stride: usize,
    meaning: Meaning,
    alpha: Option<Alpha>,
) -> (Vec<T>, usize) {
    let colors = meaning.colors();
    let made = if colors == 1 { 1 } else { 3 };
    let channels = made + usize::from(alpha.is_some());
    let plain =
        matches!(meaning, Meaning::BlackIsZero | Meaning::Rgb) && alpha != Some(Alpha::Associated);
    if plain && stride == channels {
        return (samples, channels);
    }
    let mut out = vec![T::default(); samples.len() / stride * channels];
    out.par_chunks_exact_mut(channels)
        .zip(samples.par_chunks_exact(stride))
        .for_each(|(out, pixel)| {
            if plain {
                out.copy_from_slice(&pixel[..channels]);
                return;
            }
            let mut color = [0.0; 4];
            for (value, sample) in color.iter_mut().zip(&pixel[..colors]) {
                *value = sample.unit();
            }
            let mut color = straight(color, meaning);
            if let Some(kind) = alpha {
                let a = pixel[colors].unit();
                out[made] = pixel[colors];
                if kind == Alpha::Associated && a > 0.0 {
                    color = color.map(|c| (c / a).min(1.0));
                }
            }
            for (out, value) in out.iter_mut().zip(&color[..made]) {
                *out = T::from_unit(*value);
            }
        });
    (out, channels)
}

/// One pixel's colour, 0..=1 a sample, as grey (first of three) or RGB.
fn straight(c: [f32; 4], meaning: Meaning) -> [f32; 3] {
    match meaning {
        Meaning::WhiteIsZero => [1.0 - c[0]; 3],
        Meaning::BlackIsZero | Meaning::Rgb | Meaning::Palette => [c[0], c[1], c[2]],
        Meaning::Cmyk => [0, 1, 2].map(|i| (1.0 - c[i]) * (1.0 - c[3])),
        Meaning::YCbCr(kind) => ycbcr(c, kind),
        Meaning::CieLab => {
            let signed = |v: f32| {
                (if v > 127.5 / 255.0 {
                    v - 256.0 / 255.0
                } else {
                    v
                }) * 255.0
            };
            lab(100.0 * c[0], signed(c[1]), signed(c[2]))
        }
        Meaning::IccLab => lab(100.0 * c[0], 255.0 * c[1] - 128.0, 255.0 * c[2] - 128.0),
    }
}

fn ycbcr(c: [f32; 4], YCbCr { weights, range }: YCbCr) -> [f32; 3] {
    let scaled = |i: usize, full: f32| {
        let (low, high) = (range[2 * i], range[2 * i + 1]);
        (c[i] * 255.0 - low) * full / (high - low) / 255.0
    };
    let (y, cb, cr) = (scaled(0, 255.0), scaled(1, 127.0), scaled(2, 127.0));
    let r = y + cr * (2.0 - 2.0 * weights[0]);
    let b = y + cb * (2.0 - 2.0 * weights[2]);
    let g = (y - weights[0] * r - weights[2] * b) / weights[1];
    [r, g, b].map(|v| v.clamp(0.0, 1.0))
}

/// CIE L*a*b* of the D50 white to sRGB (Bradford adaptation, as ICC profiles have it).
fn lab(l: f32, a: f32, b: f32) -> [f32; 3] {
    const D50: [f32; 3] = [0.9642, 1.0, 0.8249];
    const TO_LINEAR: [[f32; 3]; 3] = [
        [3.133_856, -1.616_867, -0.490_615],
        [-0.978_768, 1.916_141, 0.033_454],
        [0.071_945, -0.228_991, 1.405_243],
    ];
    let fy = (l + 16.0) / 116.0;
    let inverse = |f: f32| {
        if f > 6.0 / 29.0 {
            f.powi(3)
        } else {
            (f - 4.0 / 29.0) * 108.0 / 841.0
        }
    };
    let xyz = [
        D50[0] * inverse(fy + a / 500.0),
        D50[1] * inverse(fy),
        D50[2] * inverse(fy - b / 200.0),
    ];
    TO_LINEAR.map(|row| {
        let linear: f32 = row.iter().zip(xyz).map(|(m, v)| m * v).sum();
        let linear = linear.clamp(0.0, 1.0);
        if linear <= 0.003_130_8 {
            12.92 * linear
        } else {
            1.055 * linear.powf(1.0 / 2.4) - 0.055
        }
    })
}
