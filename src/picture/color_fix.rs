//! `--color-fix`: brings the upscaled picture's colours back to the input's, as the StableSR tool does. A VAE's round
//! trip shifts colour and brightness a little; the reference leaves that as it is, and so does the default.

use rayon::prelude::*;

/// Levels of the wavelet decomposition: a blur of about 64 pixels is what counts as colour (StableSR's value).
const LEVELS: u32 = 5;
/// Added to variances, so that flat channels divide by no zero (StableSR's value).
const EPSILON: f64 = 1e-5;

/// Gives each channel of `out` the mean and standard deviation of `reference`'s. Both are interleaved RGB, 0..=1; the
/// sizes may differ (the input itself will do). Cheap; corrects a cast or a contrast that is the same everywhere.
pub fn adain(out: &mut [f32], reference: &[f32]) {
    for channel in 0..3 {
        let (mean, deviation) = statistics(out, channel);
        let (want_mean, want_deviation) = statistics(reference, channel);
        let gain = (want_deviation / deviation) as f32;
        let (mean, want_mean) = (mean as f32, want_mean as f32);
        out.par_chunks_exact_mut(3)
            .for_each(|p| p[channel] = (p[channel] - mean) * gain + want_mean);
    }
}

/// Replaces the low frequencies of `out` by those of `reference`, the input enlarged to the same size. Both are
/// (height, width, 3), 0..=1. Corrects casts that vary over the picture, and keeps the new detail.
///
/// # Panics
/// A length is not that of `width` x `height`.
pub fn wavelet(out: &mut [f32], reference: &[f32], width: usize, height: usize) {
    assert_eq!(
        out.len(),
        reference.len(),
        "the reference has the output's size"
    );
    assert_eq!(
        out.len(),
        width * height * 3,
        "pictures are (height, width, 3)"
    );
    // high(out) + low(reference) = out + low(reference - out), as the blur is linear: one chain of blurs, not two.
    let mut low: Vec<f32> = reference
        .par_iter()
        .zip(&*out)
        .map(|(r, o)| r - o)
        .collect();
    for level in 0..LEVELS {
        low = blur(&low, width, height, 1 << level);
    }
    out.par_iter_mut().zip(&low).for_each(|(o, l)| *o += l);
}

/// Mean and standard deviation of one channel.
fn statistics(rgb: &[f32], channel: usize) -> (f64, f64) {
    let pixels = rgb.len() / 3;
    let values = || {
        rgb.par_iter()
            .skip(channel)
            .step_by(3)
            .map(|&v| f64::from(v))
    };
    let mean = values().sum::<f64>() / pixels as f64;
    let squares = values().map(|v| (v - mean).powi(2)).sum::<f64>();
    // Unbiased, as torch's `var` is.
    (
        mean,
        (squares / pixels.saturating_sub(1).max(1) as f64 + EPSILON).sqrt(),
    )
}

/// The kernel [1, 2, 1] / 4 in each direction, its taps `radius` pixels apart, edges repeated.
fn blur(samples: &[f32], width: usize, height: usize, radius: usize) -> Vec<f32> {
    let row = 3 * width;
    let mut across = vec![0.0; samples.len()];
    across
        .par_chunks_exact_mut(row)
        .zip(samples.par_chunks_exact(row))
        .for_each(|(out, line)| {
            for x in 0..width {
                let (left, right) = (x.saturating_sub(radius), (x + radius).min(width - 1));
                for c in 0..3 {
                    out[3 * x + c] =
                        0.25 * (line[3 * left + c] + line[3 * right + c]) + 0.5 * line[3 * x + c];
                }
            }
        });
    let mut both = vec![0.0; samples.len()];
    both.par_chunks_exact_mut(row)
        .enumerate()
        .for_each(|(y, out)| {
            let line = |y: usize| &across[y * row..(y + 1) * row];
            let (above, here) = (line(y.saturating_sub(radius)), line(y));
            let below = line((y + radius).min(height - 1));
            for (i, value) in out.iter_mut().enumerate() {
                *value = 0.25 * (above[i] + below[i]) + 0.5 * here[i];
            }
        });
    both
}

#[cfg(test)]
mod tests {
    use super::*;

    const W: usize = 160;
    const H: usize = 120;

    /// Smooth colour plus a fine checkerboard as detail.
    fn scene(cast: impl Fn(usize, usize) -> f32) -> Vec<f32> {
        let pixel = |i: usize| {
            let (x, y) = (i % W, i / W);
            let detail = if (x + y) % 2 == 0 { 0.05 } else { -0.05 };
            let smooth = x as f32 / W as f32 * 0.3 + 0.3;
            [
                smooth + detail + cast(x, y),
                smooth * 0.8 + detail,
                0.5 - smooth * 0.3 + detail,
            ]
        };
        (0..W * H).flat_map(pixel).collect()
    }

    fn worst(a: &[f32], b: &[f32]) -> f32 {
        a.iter()
            .zip(b)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max)
    }

    #[test]
    fn adain_takes_a_cast_and_a_contrast_away_exactly() {
        let want = scene(|_, _| 0.0);
        let mut out: Vec<f32> = want.iter().map(|v| v * 0.8 + 0.1).collect();
        assert!(worst(&out, &want) > 0.05, "the test shifts the colours");
        adain(&mut out, &want);
        // EPSILON is 1e-5 beside variances near 0.01: gains are off by 0.03 %.
        assert!(worst(&out, &want) < 1e-3, "{}", worst(&out, &want));
    }

    #[test]
    fn wavelet_takes_a_slowly_varying_cast_away_and_keeps_the_detail() {
        let want = scene(|_, _| 0.0);
        let mut out = scene(|x, _| 0.1 * (x as f32 / W as f32));
        let before = worst(&out, &want);
        // The reference has the colours and no detail, as an enlarged input has.
        let flat = blur(&want, W, H, 1);
        wavelet(&mut out, &flat, W, H);
        assert!(before > 0.09);
        // What remains is the repeated edge's bend of the ramp: 0.1 / 160 a pixel over a reach of 62 pixels, a quarter.
        assert!(worst(&out, &want) < 0.012, "{}", worst(&out, &want));
        let detail = |rgb: &[f32]| (rgb[3 * (50 * W + 80)] - rgb[3 * (50 * W + 81)]).abs();
        assert!((detail(&out) - detail(&want)).abs() < 2e-3);
    }

    #[test]
    fn wavelet_leaves_a_picture_with_the_right_colours_alone() {
        let want = scene(|_, _| 0.0);
        let mut out = want.clone();
        wavelet(&mut out, &want, W, H);
        assert_eq!(out, want);
    }
}
