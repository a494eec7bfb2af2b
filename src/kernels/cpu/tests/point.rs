//! Activations, normalisations and resampling.

use super::{erf, lines_of, on_each_isa, random, relative_error, to_f64, with_threads};
use crate::kernels::cpu::*;

/// The largest absolute difference, beyond `relative` times the value.
fn excess(got: &[f32], want: &[f64], relative: f64) -> f64 {
    got.iter().zip(want).fold(0.0, |m: f64, (g, w)| {
        let d = (f64::from(*g) - w).abs() - relative * w.abs();
        if d.is_nan() { f64::INFINITY } else { m.max(d) }
    })
}

#[test]
fn activations_match_their_definitions() {
    let mut x: Vec<f32> = (-40_000..=40_000).map(|i| i as f32 * 2.5e-4).collect();
    x.extend([-1e30, -200.0, -100.0, -88.5, 88.5, 100.0, 1e30, 1e-30, -0.0]);
    let want = |f: fn(f64) -> f64| -> Vec<f64> { x.iter().map(|&x| f(f64::from(x))).collect() };
    on_each_isa(|isa| {
        // erf to 3e-7 and half a dozen roundings: gelu is off by up to |x| / 2 times the first, before erf is 1 at 5.7.
        let gelu = excess(
            &activate(&x, Act::Gelu),
            &want(|x| x / 2.0 * (1.0 + erf(x * 0.5f64.sqrt()))),
            3e-7,
        );
        assert!(gelu < 1e-6, "gelu on {isa:?}: {gelu:e}");
        // Where the exponential is clamped (beyond 87) what is left of x times the sigmoid is below 1e-6 for |x| < 1e30.
        let finite = &x[..x.len() - 9];
        let silu = excess(
            &activate(finite, Act::Silu),
            &want(|x| x / (1.0 + (-x).exp()))[..finite.len()],
            4e-7,
        );
        assert!(silu < 1e-7, "silu on {isa:?}: {silu:e}");
        let quick = excess(
            &activate(finite, Act::QuickGelu),
            &want(|x| x / (1.0 + (-1.702 * x).exp()))[..finite.len()],
            4e-6,
        );
        assert!(quick < 1e-7, "quick gelu on {isa:?}: {quick:e}");
        let relu = excess(&activate(&x, Act::Relu), &want(|x| x.max(0.0)), 0.0);
        assert!(relu == 0.0, "relu on {isa:?}: {relu:e}");
    });
}

#[test]
fn activations_keep_nan_and_the_ends_of_the_line() {
    on_each_isa(|isa| {
        for act in [Act::Gelu, Act::Silu, Act::QuickGelu, Act::Relu] {
            let y = activate(&[f32::NAN, f32::INFINITY, -100.0, 0.0, 50.0], act);
            assert!(
                y[0].is_nan()
                    && y[1] == f32::INFINITY
                    && y[2].abs() < 1e-6
                    && y[3] == 0.0
                    && y[4] == 50.0,
                "{act:?} on {isa:?}: {y:?}"
            );
        }
    });
}

/// Of `x` (b, hw, c) as a map of one line.
fn group_norm_stats(x: &[f32], b: usize, c: usize, groups: usize, eps: f64) -> GroupStats {
    let input = Input::new(x, b, 1, x.len() / b / c, c);
    let mut sums = GroupSums::new(b, c, groups);
    sums.add(&input, 0..1);
    sums.stats(eps)
}

fn naive_stats(x: &[f32], b: usize, c: usize, groups: usize, eps: f64) -> (Vec<f64>, Vec<f64>) {
    let (per_item, size) = (x.len() / b, c / groups);
    let of = |i: usize| {
        let item = &x[i / groups * per_item..][..per_item];
        let values: Vec<f64> = item
            .iter()
            .enumerate()
            .filter(|(j, _)| j % c / size == i % groups)
            .map(|(_, &x)| f64::from(x))
            .collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let var = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / values.len() as f64;
        (mean, 1.0 / (var + eps).sqrt())
    };
    (0..b * groups).map(of).unzip()
}

#[test]
fn group_statistics_hold_for_a_mean_far_above_the_deviation() {
    on_each_isa(|isa| {
        for (b, hw, c, groups) in [
            (1, 1, 4, 2),
            (2, 35, 6, 3),
            (2, 700, 36, 4),
            (1, 1025, 64, 2),
            (1, 300, 5, 1),
        ] {
            // An offset of 4000 leaves values of deviation 0.6 with about 11 bits: they are taken as they are, rounded.
            for offset in [0.0f32, 4000.0] {
                let x: Vec<f32> = random(b * hw * c, 7)
                    .iter()
                    .enumerate()
                    .map(|(i, x)| x + offset * (1.0 + (i % c) as f32 * 1e-5))
                    .collect();
                let got = group_norm_stats(&x, b, c, groups, 1e-5);
                let (mean, rstd) = naive_stats(&x, b, c, groups, 1e-5);
                let (mean, rstd) = (
                    relative_error(&got.mean, &mean),
                    relative_error(&got.rstd, &rstd),
                );
                // One rounding to f32, and sums of 32 terms in f32, of values up to a thousand times the mean.
                assert!(
                    mean < 1e-6 && rstd < 3e-6,
                    "{b} {hw} {c} {groups}, offset {offset} on {isa:?}: {mean:e} {rstd:e}"
                );
            }
        }
    });
}

#[test]
fn a_first_pixel_that_stands_out_does_not_spoil_the_statistics() {
    let mut x = random(600 * 8, 3);
    x[..8].fill(1e4);
    let got = group_norm_stats(&x, 1, 8, 2, 1e-5);
    let (mean, rstd) = naive_stats(&x, 1, 8, 2, 1e-5);
    assert!(relative_error(&got.mean, &mean) < 1e-6 && relative_error(&got.rstd, &rstd) < 1e-5);
}

#[test]
fn statistics_are_the_same_for_any_thread_count_and_place_in_a_batch() {
    let x = random(3 * 900 * 12, 5);
    let run = || group_norm_stats(&x, 3, 12, 3, 1e-6);
    let one = with_threads(1, run);
    let four = with_threads(4, run);
    assert!(one.mean == four.mean && one.rstd == four.rstd);
    let last = group_norm_stats(&x[2 * 900 * 12..], 1, 12, 3, 1e-6);
    assert!(one.mean[6..] == last.mean && one.rstd[6..] == last.rstd);
}

#[test]
fn normalised_maps_match_the_definition() {
    on_each_isa(|isa| {
        for c in [12, 48] {
            let (b, h, w, groups) = (2, 5, 7, 3);
            let x = random(b * h * w * c, 1);
            let (weight, bias) = (random(c, 2), random(c, 3));
            let (scale, shift) = (random(b * c, 4), random(b * c, 5));
            let stats = group_norm_stats(&x, b, c, groups, 1e-5);
            let (mean, rstd) = naive_stats(&x, b, c, groups, 1e-5);
            let want = |gain: &dyn Fn(usize, usize) -> (f64, f64)| -> Vec<f64> {
                let at = |i: usize| {
                    let (b, ch) = (i / (h * w * c), i % c);
                    let g = b * groups + ch / (c / groups);
                    let (gain, offset) = gain(b, ch);
                    let y = (f64::from(x[i]) - mean[g]) * rstd[g] * gain + offset;
                    y / (1.0 + (-y).exp())
                };
                (0..x.len()).map(at).collect()
            };
            let input = Input::new(&x, b, h, w, c);
            let plain = materialise(&input.clone().prologue(&stats.affine(
                &weight,
                &bias,
                Act::Silu,
            )));
            let error = relative_error(
                &plain,
                &want(&|_, ch| (f64::from(weight[ch]), f64::from(bias[ch]))),
            );
            assert!(
                error < 1e-6,
                "GroupNorm, {c} channels on {isa:?}: {error:e}"
            );
            let gain: Vec<f32> = scale.iter().map(|s| 1.0 + s).collect();
            let ada = materialise(&input.prologue(&stats.affine(&gain, &shift, Act::Silu)));
            let error = relative_error(
                &ada,
                &want(&|b, ch| (f64::from(gain[b * c + ch]), f64::from(shift[b * c + ch]))),
            );
            assert!(
                error < 1e-6,
                "AdaGroupNorm, {c} channels on {isa:?}: {error:e}"
            );
        }
    });
}

#[test]
fn layer_norm_matches_the_definition() {
    on_each_isa(|isa| {
        for (n, c) in [(1, 1), (3, 5), (77, 768), (1000, 33)] {
            let x: Vec<f32> = random(n * c, 1).iter().map(|x| x + 3.0).collect();
            let (weight, bias) = (random(c, 2), random(c, 3));
            let row = |x: &[f32]| -> Vec<f64> {
                let mean = to_f64(x).iter().sum::<f64>() / c as f64;
                let var = to_f64(x).iter().map(|x| (x - mean).powi(2)).sum::<f64>() / c as f64;
                (0..c)
                    .map(|j| {
                        (f64::from(x[j]) - mean) / (var + 1e-5).sqrt() * f64::from(weight[j])
                            + f64::from(bias[j])
                    })
                    .collect()
            };
            let want: Vec<f64> = x.chunks(c).flat_map(row).collect();
            let error = relative_error(&layer_norm(&x, &weight, &bias, 1e-5), &want);
            // The mean of 3 is rounded to f32 once and deviations are around 0.6.
            assert!(error < 2e-6, "({n}, {c}) on {isa:?}: {error:e}");
        }
    });
}

/// diffusers' definition: reflect by `pad`, then a depthwise 4x4 filter (transposed with its own padding for up).
fn naive_resample(x: &[f32], (h, w, c): (usize, usize, usize), up: bool) -> Vec<f64> {
    let k = [1.0, 3.0, 3.0, 1.0].map(|k| k / if up { 4.0 } else { 8.0 });
    let reflect = |i: isize, n: usize| {
        if i < 0 {
            -i as usize
        } else if i >= n as isize {
            2 * n - 2 - i as usize
        } else {
            i as usize
        }
    };
    let padded = |y: usize, x0: usize, ch: usize| {
        f64::from(x[(reflect(y as isize - 1, h) * w + reflect(x0 as isize - 1, w)) * c + ch])
    };
    let (oh, ow) = if up { (2 * h, 2 * w) } else { (h / 2, w / 2) };
    let mut out = vec![0.0; oh * ow * c];
    for (i, out) in out.iter_mut().enumerate() {
        let (ch, ox, oy) = (i % c, i / c % ow, i / c / ow);
        for y in 0..h + 2 {
            for x in 0..w + 2 {
                // Tap that joins input line i to output line o: strided convolution, or transposed with padding 3.
                let tap = |i: usize, o: usize| {
                    if up {
                        (o + 3).wrapping_sub(2 * i)
                    } else {
                        i.wrapping_sub(2 * o)
                    }
                };
                if let (Some(ky), Some(kx)) = (k.get(tap(y, oy)), k.get(tap(x, ox))) {
                    *out += ky * kx * padded(y, x, ch);
                }
            }
        }
    }
    out
}

#[test]
fn resampling_matches_the_definition() {
    on_each_isa(|isa| {
        for (h, w, c) in [(2, 2, 1), (4, 6, 5), (8, 8, 32), (5, 7, 20)] {
            let x = random(h * w * c, 1);
            let two: Vec<f32> = x.iter().chain(&x).copied().collect();
            for up in [false, true] {
                let run = |x: &[f32], b| {
                    let input = Input::new(x, b, h, w, c);
                    if up {
                        upsample_k(&input, 0..2 * h)
                    } else {
                        downsample_k(&input, 0..h / 2)
                    }
                };
                let got = run(&x, 1);
                let error = relative_error(&got, &naive_resample(&x, (h, w, c), up));
                assert!(
                    error < 5e-7,
                    "up {up}, ({h}, {w}, {c}) on {isa:?}: {error:e}"
                );
                assert_eq!(
                    run(&two, 2),
                    [got.clone(), got].concat(),
                    "batch items are alike"
                );
            }
        }
    });
}

#[test]
fn nearest_upsampling_repeats_pixels_and_concatenation_joins_channels() {
    on_each_isa(|_| {
        let (a, b) = (random(2 * 3 * 4 * 5, 1), random(2 * 3 * 4 * 20, 2));
        let got: Vec<f32> = materialise(&Input::new(&a, 2, 3, 4, 5).beside(&[&b], 20).upsample2x());
        for (i, &got) in got.iter().enumerate() {
            let (ch, x, y, item) = (i % 25, i / 25 % 8 / 2, i / 25 / 8 % 6 / 2, i / 25 / 8 / 6);
            let pixel = (item * 3 + y) * 4 + x;
            assert_eq!(
                got,
                if ch < 5 {
                    a[pixel * 5 + ch]
                } else {
                    b[pixel * 20 + ch - 5]
                },
                "value {i}"
            );
        }
    });
}

#[test]
fn a_map_in_bands_has_the_statistics_of_the_whole_to_the_bit() {
    let (b, h, w, c, groups) = (2, 23, 70, 12, 3);
    let (left, right) = (random(b * h * w * 8, 1), random(b * h * w * 4, 2));
    let whole = Input::new(&left, b, h, w, 8).beside(&[&right], 4);
    let mut sums = GroupSums::new(b, c, groups);
    sums.add(&whole, 0..h);
    let want = sums.stats(1e-5);
    let mut sums = GroupSums::new(b, c, groups);
    for (start, end) in [(0, 8), (8, 12), (12, 23)] {
        let (left, right) = (
            lines_of(&left, (b, h), start..end),
            lines_of(&right, (b, h), start..end),
        );
        let band = Input::bands(&[&left], start, b, h, w, 8).beside(&[&right], 4);
        sums.add(&band, start..end);
    }
    let got = sums.stats(1e-5);
    assert!(got.mean == want.mean && got.rstd == want.rstd);
    // and they are those of the joined map
    let joined = materialise(&whole);
    let (mean, rstd) = naive_stats(&joined, b, c, groups, 1e-5);
    assert!(relative_error(&got.mean, &mean) < 3e-6 && relative_error(&got.rstd, &rstd) < 3e-6);
}

#[test]
fn a_map_in_bands_is_resampled_as_the_whole_to_the_bit() {
    let (b, h, w, c) = (2, 18, 6, 5);
    let x = random(b * h * w * c, 1);
    let whole = Input::new(&x, b, h, w, c);
    for (start, end) in [(0, 8), (4, 8), (8, 9)] {
        let lines = start..end;
        let there = downsample_reach(&lines, h);
        let band = lines_of(&x, (b, h), there.clone());
        let got: Vec<f32> = downsample_k(
            &Input::bands(&[&band], there.start, b, h, w, c),
            lines.clone(),
        );
        let want = downsample_k(&whole, 0..h / 2);
        assert_eq!(got, lines_of(&want, (b, h / 2), lines));
    }
    for (start, end) in [(0, 1), (0, 8), (8, 20), (35, 36), (20, 36)] {
        let lines = start..end;
        let there = upsample_reach(&lines, h);
        let band = lines_of(&x, (b, h), there.clone());
        let got: Vec<f32> = upsample_k(
            &Input::bands(&[&band], there.start, b, h, w, c),
            lines.clone(),
        );
        let want = upsample_k(&whole, 0..2 * h);
        assert_eq!(got, lines_of(&want, (b, 2 * h), lines));
    }
}
