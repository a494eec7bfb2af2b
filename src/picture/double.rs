//! Doubling by Catmull-Rom, for what the network does not upscale: alpha, and the reference of the colour fix.

use std::ops::Range;

use rayon::prelude::*;

/// Catmull-Rom weights of the four samples around a point a quarter of the way from the second to the third.
/// Output pixel centres lie at quarters of input pixels, so that this set and its mirror image are all there is.
const QUARTER: [f32; 4] = [-0.0703125, 0.8671875, 0.2265625, -0.0234375];

/// Doubles interleaved samples (height, width, channels) to (2 height, 2 width, channels); pixel centres at halves,
/// edges repeated. Values may overshoot their range a little, as any sharp filter's do.
///
/// # Panics
/// The length is not that of `width` x `height` x `channels`.
pub fn double(samples: &[f32], width: usize, height: usize, channels: usize) -> Vec<f32> {
    double_lines(samples, width, height, channels, 0..2 * height)
}

/// Some lines of what [`double`] gives, the same to the bit, from the lines that they need.
///
/// # Panics
/// As [`double`], and where there are no such lines.
pub(super) fn double_lines(
    samples: &[f32],
    width: usize,
    height: usize,
    channels: usize,
    lines: Range<usize>,
) -> Vec<f32> {
    assert_eq!(
        samples.len(),
        width * height * channels,
        "samples are (height, width, channels)"
    );
    assert!(lines.end <= 2 * height, "there are {} lines", 2 * height);
    if samples.is_empty() || lines.is_empty() {
        return Vec::new();
    }
    let row = 2 * width * channels;
    let first = taps(lines.start, height).map(|(at, _)| at).min();
    let last = taps(lines.end - 1, height).map(|(at, _)| at).max();
    let (first, last) = (first.unwrap_or(0), last.unwrap_or(height - 1));
    let mut wide = vec![0.0; row * (last + 1 - first)];
    wide.par_chunks_exact_mut(row)
        .zip(samples[first * width * channels..].par_chunks_exact(width * channels))
        .for_each(|(out, line)| {
            for (x, pixel) in out.chunks_exact_mut(channels).enumerate() {
                for (c, value) in pixel.iter_mut().enumerate() {
                    *value = taps(x, width)
                        .map(|(at, weight)| line[at * channels + c] * weight)
                        .sum();
                }
            }
        });
    let mut tall = vec![0.0; row * lines.len()];
    tall.par_chunks_exact_mut(row)
        .enumerate()
        .for_each(|(y, out)| {
            for (at, weight) in taps(lines.start + y, height) {
                let line = &wide[(at - first) * row..(at - first + 1) * row];
                out.iter_mut()
                    .zip(line)
                    .for_each(|(value, sample)| *value += sample * weight);
            }
        });
    tall
}

/// The same, doubled until they are `times` as large: a power of two.
///
/// # Panics
/// As [`double`].
pub fn enlarge(
    samples: &[f32],
    width: usize,
    height: usize,
    channels: usize,
    times: usize,
) -> Vec<f32> {
    let mut large = double(samples, width, height, channels);
    for done in doublings_after_the_first(times) {
        large = double(&large, done * width, done * height, channels);
    }
    large
}

/// For each doubling but the first, how many times as large the samples are before it.
pub(super) fn doublings_after_the_first(times: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(2), |done| Some(2 * done)).take_while(move |done| *done < times)
}

/// The four input positions that make output position `i`, and their weights.
fn taps(i: usize, length: usize) -> impl Iterator<Item = (usize, f32)> {
    let odd = i % 2;
    (0..4).map(move |k| {
        let at = (i / 2 + k + odd).saturating_sub(2).min(length - 1);
        (at, if odd == 1 { QUARTER[k] } else { QUARTER[3 - k] })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ramp_stays_a_ramp_with_centres_at_halves() {
        let ramp: Vec<f32> = (0..16).map(|x| x as f32).collect();
        let out = double(&ramp, 16, 1, 1);
        // Output x lies at x / 2 - 1 / 4 of the input; Catmull-Rom reproduces lines; four pixels in, no edge is felt.
        for x in 4..28 {
            let want = x as f32 / 2.0 - 0.25;
            assert!(
                (out[x] - want).abs() < 1e-5,
                "at {x}: {} for {want}",
                out[x]
            );
            assert_eq!(out[32 + x], out[x], "both rows are alike");
        }
    }

    #[test]
    fn channels_and_directions_do_not_mix() {
        // One channel varies along x, the other along y.
        let samples: Vec<f32> = (0..6 * 5)
            .flat_map(|i| [(i % 6) as f32, (i / 6) as f32])
            .collect();
        let out = double(&samples, 6, 5, 2);
        for (i, pixel) in out.chunks_exact(2).enumerate() {
            assert!((pixel[0] - out[2 * (i % 12)]).abs() < 1e-5);
            assert!((pixel[1] - out[2 * (i - i % 12) + 1]).abs() < 1e-5);
        }
    }

    #[test]
    fn four_and_eight_times_are_two_and_three_doublings() {
        let samples: Vec<f32> = (0..5 * 3 * 2).map(|i| (i * i % 17) as f32).collect();
        let twice = double(&samples, 5, 3, 2);
        let four = double(&twice, 10, 6, 2);
        assert_eq!(enlarge(&samples, 5, 3, 2, 2), twice);
        assert_eq!(enlarge(&samples, 5, 3, 2, 4), four);
        assert_eq!(enlarge(&samples, 5, 3, 2, 8), double(&four, 20, 12, 2));
    }

    #[test]
    fn some_lines_are_those_of_the_whole() {
        let (w, h) = (5, 7);
        let samples: Vec<f32> = (0..w * h * 2).map(|i| (i as f32 * 0.37).sin()).collect();
        let whole = double(&samples, w, h, 2);
        for start in 0..2 * h {
            for end in start..=2 * h {
                let lines = double_lines(&samples, w, h, 2, start..end);
                assert_eq!(lines, whole[start * 4 * w..end * 4 * w], "{start}..{end}");
            }
        }
    }

    #[test]
    fn a_single_pixel_doubles_to_four_equal_ones() {
        let out = double(&[0.3, 0.6], 1, 1, 2);
        for pixel in out.chunks_exact(2) {
            assert!((pixel[0] - 0.3).abs() < 1e-6 && (pixel[1] - 0.6).abs() < 1e-6);
        }
        assert_eq!(out.len(), 8);
    }
}
