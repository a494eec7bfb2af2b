//! Convolutions and linear layers.

use super::{erf, lines_of, on_each_isa, random, relative_error, to_f64, with_threads};
use crate::kernels::cpu::*;

/// A convolution by definition.
fn naive(
    x: &[f64],
    (b, h, w, cin): (usize, usize, usize, usize),
    weight: &[f32],
    bias: Option<&[f32]>,
    filter: Filter,
) -> Vec<f64> {
    let Filter {
        outputs: cout,
        height: kh,
        width: kw,
        stride,
        padding: pad,
        ..
    } = filter;
    let (oh, ow) = (
        (h + pad.top + pad.bottom - kh) / stride + 1,
        (w + pad.left + pad.right - kw) / stride + 1,
    );
    let mut out = Vec::with_capacity(b * oh * ow * cout);
    for i in 0..b * oh * ow * cout {
        let (o, ox, oy, b) = (
            i % cout,
            i / cout % ow,
            i / cout / ow % oh,
            i / cout / ow / oh,
        );
        let mut sum = bias.map_or(0.0, |b| f64::from(b[o]));
        for ky in 0..kh {
            for kx in 0..kw {
                let (y, x0) = (
                    (oy * stride + ky).wrapping_sub(pad.top),
                    (ox * stride + kx).wrapping_sub(pad.left),
                );
                if y < h && x0 < w {
                    for c in 0..cin {
                        sum += x[((b * h + y) * w + x0) * cin + c]
                            * f64::from(weight[((o * cin + c) * kh + ky) * kw + kx]);
                    }
                }
            }
        }
        out.push(sum);
    }
    out
}

/// A filter of `side` x `side` that keeps the size of the map, but for the stride.
fn square(inputs: usize, outputs: usize, side: usize, stride: usize) -> Filter {
    Filter {
        inputs,
        outputs,
        height: side,
        width: side,
        stride,
        padding: Padding::all(side / 2),
    }
}

#[test]
fn convolutions_of_odd_sizes_match_the_definition() {
    // b, h, w, cin, cout, kh, kw, stride, pad
    let cases: [([usize; 8], [usize; 4]); 17] = [
        ([1, 1, 1, 1, 1, 3, 3, 1], [1; 4]),
        ([2, 5, 7, 4, 5, 3, 3, 1], [1; 4]),
        ([1, 8, 8, 32, 32, 3, 3, 1], [1; 4]),
        ([2, 9, 13, 40, 33, 3, 3, 1], [1; 4]),
        ([1, 4, 66, 5, 8, 3, 3, 1], [1; 4]),
        ([3, 6, 3, 17, 70, 3, 3, 1], [1, 0, 0, 1]),
        ([1, 67, 70, 20, 36, 3, 3, 1], [1; 4]),
        ([1, 65, 64, 66, 130, 3, 3, 1], [1; 4]),
        ([1, 12, 10, 150, 48, 3, 3, 1], [1; 4]),
        ([2, 9, 8, 19, 34, 3, 3, 2], [0, 1, 0, 1]),
        ([1, 20, 17, 70, 40, 3, 3, 2], [1; 4]),
        ([2, 5, 6, 33, 65, 1, 1, 1], [0; 4]),
        ([1, 11, 12, 800, 20, 1, 1, 1], [0; 4]),
        ([1, 9, 9, 3, 16, 5, 3, 1], [2, 2, 1, 1]),
        ([1, 16, 16, 3, 24, 4, 4, 4], [0; 4]),
        ([2, 40, 40, 8, 3, 2, 2, 1], [0, 0, 0, 0]),
        ([1, 9, 10, 1536, 40, 3, 3, 1], [1; 4]),
    ];
    on_each_isa(|isa| {
        for (i, ([b, h, w, cin, cout, kh, kw, stride], pad)) in cases.into_iter().enumerate() {
            let x = random(b * h * w * cin, 1);
            let weight = random(cout * cin * kh * kw, 2);
            let bias = random(cout, 3);
            let [top, bottom, left, right] = pad;
            let filter = Filter {
                inputs: cin,
                outputs: cout,
                height: kh,
                width: kw,
                stride,
                padding: Padding {
                    top,
                    bottom,
                    left,
                    right,
                },
            };
            let want = naive(&to_f64(&x), (b, h, w, cin), &weight, Some(&bias), filter);
            let conv = PackedConv::new(&weight, Some(&bias), filter);
            let residual = random(want.len(), 4);
            let want: Vec<f64> = want
                .iter()
                .zip(&residual)
                .map(|(a, b)| a + f64::from(*b))
                .collect();
            let input = Input::new(&x, b, h, w, cin);
            let got = conv2d(&input, &conv, Some(&residual), Act::None);
            let error = relative_error(&got, &want);
            // Winograd loses a digit against direct summation in f32, which itself is good to about 1e-6; F(6x6) somewhat more (4e-6 in
            // the mean square, 1.0e-5 at worst here).
            assert!(
                error < 2e-5,
                "case {i} on {isa:?}: relative error {error:e}"
            );
            // The activation comes after the residual, and changes nothing else.
            for (act, of) in [
                (Act::Relu, (|v| v.max(0.0)) as fn(f32) -> f32),
                (Act::QuickGelu, |v| activate(&[v], Act::QuickGelu)[0]),
            ] {
                let activated: Vec<f32> = got.iter().map(|&v| of(v)).collect();
                let got = conv2d(&input, &conv, Some(&residual), act);
                assert!(got == activated, "case {i} with {act:?} on {isa:?}");
            }
        }
    });
}

#[test]
fn prologue_concatenation_and_upsampling_come_before_the_zero_padding() {
    let (b, h, w, c1, c2, cout) = (2, 7, 9, 20, 12, 18);
    let c = c1 + c2;
    let (x1, x2) = (random(b * h * w * c1, 1), random(b * h * w * c2, 2));
    let (scale, shift) = (random(b * c, 3), random(b * c, 4));
    on_each_isa(|isa| {
        for (act, k, stride) in [
            (Act::None, 3, 1),
            (Act::Gelu, 3, 1),
            (Act::Silu, 1, 1),
            (Act::QuickGelu, 3, 2),
            (Act::Relu, 3, 1),
        ] {
            for up in [1, 2] {
                let weight = random(cout * c * k * k, 5);
                let filter = square(c, cout, k, stride);
                let value = |i: usize| {
                    let (ch, x, y, item) = (
                        i % c,
                        i / c % (w * up),
                        i / c / (w * up) % (h * up),
                        i / c / (w * up) / (h * up),
                    );
                    let pixel = (item * h + y / up) * w + x / up;
                    let v = if ch < c1 {
                        x1[pixel * c1 + ch]
                    } else {
                        x2[pixel * c2 + ch - c1]
                    };
                    let v = f64::from(v) * f64::from(scale[item * c + ch])
                        + f64::from(shift[item * c + ch]);
                    match act {
                        Act::None => v,
                        Act::Gelu => v / 2.0 * (1.0 + erf(v * 0.5f64.sqrt())),
                        Act::Silu => v / (1.0 + (-v).exp()),
                        Act::QuickGelu => v / (1.0 + (-1.702 * v).exp()),
                        Act::Relu => v.max(0.0),
                    }
                };
                let map: Vec<f64> = (0..b * h * w * up * up * c).map(value).collect();
                let want = naive(&map, (b, h * up, w * up, c), &weight, None, filter);
                let conv = PackedConv::new(&weight, None, filter);
                let prologue = Prologue::new(scale.clone(), shift.clone(), act);
                let mut input = Input::new(&x1, b, h, w, c1)
                    .beside(&[&x2], c2)
                    .prologue(&prologue);
                if up == 2 {
                    input = input.upsample2x();
                }
                let error = relative_error(&conv2d(&input, &conv, None, Act::None), &want);
                assert!(
                    error < 1e-5,
                    "{act:?}, kernel {k}, upsampling {up} on {isa:?}: relative error {error:e}"
                );
            }
        }
    });
}

#[test]
fn linear_layers_match_the_definition() {
    on_each_isa(|isa| {
        for (n, cin, cout) in [
            (1, 1, 1),
            (1, 900, 40),
            (77, 48, 100),
            (200, 1601, 33),
            (300, 16, 5),
        ] {
            let (x, weight, bias, residual) = (
                random(n * cin, 1),
                random(cout * cin, 2),
                random(cout, 3),
                random(n * cout, 4),
            );
            let layer = PackedConv::linear(&weight, Some(&bias), cin, cout);
            let mut want = naive(
                &to_f64(&x),
                (1, 1, n, cin),
                &weight,
                Some(&bias),
                Filter::linear(cin, cout),
            );
            want.iter_mut()
                .zip(&residual)
                .for_each(|(w, &r)| *w += f64::from(r));
            let input = Input::new(&x, 1, 1, n, cin);
            let error = relative_error(&linear(&input, &layer, Some(&residual), Act::None), &want);
            // Sums of up to 1601 products in f32, one after the other.
            assert!(
                error < 5e-6,
                "({n}, {cin}) to {cout} on {isa:?}: relative error {error:e}"
            );
            for w in &mut want {
                *w /= 1.0 + (-*w).exp();
            }
            let error = relative_error(&linear(&input, &layer, Some(&residual), Act::Silu), &want);
            assert!(
                error < 5e-6,
                "silu ({n}, {cin}) to {cout} on {isa:?}: relative error {error:e}"
            );
        }
    });
}

#[test]
fn convolutions_are_the_same_for_any_thread_count_and_place_in_a_batch() {
    // Winograd by blocks, by panels (in several rounds as a batch, in one alone), and the sum over taps.
    for (h, w, cin, cout, k, stride) in [
        (66, 65, 20, 40, 3, 1),
        (30, 44, 150, 70, 3, 1),
        (8, 8, 40, 64, 3, 1),
        (33, 20, 40, 70, 3, 2),
        (21, 20, 800, 64, 1, 1),
    ] {
        let b = 3;
        let x = random(b * h * w * cin, 1);
        let weight = random(cout * cin * k * k, 2);
        let conv = PackedConv::new(&weight, None, square(cin, cout, k, stride));
        let run = || conv2d::<f32>(&Input::new(&x, b, h, w, cin), &conv, None, Act::None);
        let whole = with_threads(1, run);
        for threads in [2, 3, 16] {
            assert!(
                whole == with_threads(threads, run),
                "{h}x{w} kernel {k}, {threads} threads"
            );
        }
        let n = h * w * cin;
        for (i, part) in whole.chunks(whole.len() / b).enumerate() {
            let input = Input::new(&x[i * n..][..n], 1, h, w, cin);
            let alone: Vec<f32> = conv2d(&input, &conv, None, Act::None);
            assert!(part == alone, "{h}x{w} kernel {k}, item {i}");
        }
    }
}

#[test]
fn packing_keeps_to_the_size_of_the_weights() {
    let conv = PackedConv::new(&random(96 * 40 * 9, 1), None, square(40, 96, 3, 1));
    assert_eq!(conv.bytes(), 96 * 40 * 9 * 4);
}

#[test]
fn lines_of_a_convolution_are_those_of_the_whole_to_the_bit() {
    // 3x3 by F(4x4) and F(6x6) in both orders of work, strided, 1x1; upsampled, normed, two maps side by side, several pieces.
    on_each_isa(|isa| {
        for (h, w, c1, c2, out, stride, up, k) in [
            (37, 18, 8, 0, 20, 1, 1, 3),
            (37, 130, 8, 8, 16, 1, 1, 3),
            (67, 70, 8, 0, 20, 1, 1, 3),
            (20, 9, 8, 0, 20, 1, 2, 3),
            (72, 10, 8, 0, 20, 2, 1, 3),
            (37, 10, 8, 4, 20, 1, 1, 1),
        ] {
            let (b, c) = (2, c1 + c2);
            let (x1, x2) = (random(b * h * w * c1, 1), random(b * h * w * c2, 2));
            let weight = random(out * c * k * k, 3);
            let pad = usize::from(k == 3);
            let padding = match stride {
                1 => Padding::all(pad),
                _ => Padding {
                    top: 0,
                    left: 0,
                    ..Padding::all(1)
                },
            };
            let filter = Filter {
                inputs: c,
                outputs: out,
                height: k,
                width: k,
                stride,
                padding,
            };
            let conv = PackedConv::new(&weight, None, filter);
            let prologue = Prologue::new(random(b * c, 4), random(b * c, 5), Act::Silu);
            let input =
                |first: usize, p1: &[&[f32]], p2: &[&[f32]], run: &dyn Fn(&Input) -> Vec<f32>| {
                    let mut input = Input::bands(p1, first, b, h, w, c1);
                    if c2 > 0 {
                        input = input.beside(p2, c2);
                    }
                    input = input.prologue(&prologue);
                    if up == 2 {
                        input = input.upsample2x();
                    }
                    run(&input)
                };
            let want = input(0, &[&x1], &[&x2], &|input| {
                conv2d(input, &conv, None, Act::None)
            });
            let (oh, _) = filter.output_size(h * up, w * up);
            let residual = random(want.len(), 6);
            let with_residual = input(0, &[&x1], &[&x2], &|input| {
                conv2d(input, &conv, Some(&residual), Act::Relu)
            });
            for (start, end) in [(0, 12), (12, 24), (24, oh), (0, oh), (12, oh.min(30))] {
                let lines = start..end;
                let needed = conv.reach(&lines, h * up, w * up);
                let there = needed.start / up..needed.end.div_ceil(up);
                let middle = (there.start + there.end) / 2;
                let cut = |x: &[f32]| {
                    [
                        lines_of(x, (b, h), there.start..middle),
                        lines_of(x, (b, h), middle..there.end),
                    ]
                };
                let (p1, p2) = (cut(&x1), cut(&x2));
                let (p1, p2): (Vec<&[f32]>, Vec<&[f32]>) = (
                    p1.iter().map(|p| &p[..]).collect(),
                    p2.iter().map(|p| &p[..]).collect(),
                );
                let got = input(there.start, &p1, &p2, &|input| {
                    conv2d_lines(input, &conv, None, Act::None, lines.clone())
                });
                assert_eq!(
                    got,
                    lines_of(&want, (b, oh), lines.clone()),
                    "{lines:?} of {oh}, {c} channels, kernel {k}, stride {stride} on {isa:?}"
                );
                let residual = lines_of(&residual, (b, oh), lines.clone());
                let got = input(there.start, &p1, &p2, &|input| {
                    conv2d_lines(input, &conv, Some(&residual), Act::Relu, lines.clone())
                });
                assert_eq!(got, lines_of(&with_residual, (b, oh), lines.clone()));
            }
        }
    });
}

#[test]
fn weights_read_in_place_give_the_same_bits() {
    let cases = [
        // h, w, inputs, outputs
        [5, 7, 4, 5],
        [8, 8, 32, 32],
        [16, 16, 150, 48],
        [67, 70, 20, 36],
        [65, 64, 66, 130],
        [9, 10, 800, 40],
    ];
    on_each_isa(|isa| {
        for [h, w, inputs, outputs] in cases {
            let x = random(h * w * inputs, 1);
            let weight = random(outputs * inputs * 9, 2);
            let bias = random(outputs, 3);
            let filter = square(inputs, outputs, 3, 1);
            let packed = PackedConv::new(&weight, Some(&bias), filter);
            let in_place = PackedConv::in_place(Box::new(weight), Some(&bias), filter);
            let input = Input::new(&x, 1, h, w, inputs);
            let of = |conv: &PackedConv| conv2d::<f32>(&input, conv, None, Act::None);
            assert_eq!(
                of(&packed),
                of(&in_place),
                "{isa:?} {h}x{w} {inputs} -> {outputs}"
            );
        }
    });
}

#[test]
fn linear_layers_in_place_give_the_same_bits() {
    on_each_isa(|isa| {
        for (rows, inputs, outputs) in [
            (1, 17, [5, 3]),
            (2, 800, [33, 64]),
            (77, 768, [96, 32]),
            (40, 1, [1, 1]),
        ] {
            let x = random(rows * inputs, 1);
            let [left, right] = outputs.map(|outputs| random(outputs * inputs, 2));
            let bias = random(outputs[0] + outputs[1], 3);
            let residual = random(rows * bias.len(), 4);
            let joined = [&left[..], &right].concat();
            let packed = PackedConv::linear(&joined, Some(&bias), inputs, bias.len());
            let input = Input::new(&x, 1, 1, rows, inputs);
            let in_place =
                LinearInPlace::new(vec![Box::new(left), Box::new(right)], Some(&bias), inputs);
            let expected = linear(&input, &packed, Some(&residual), Act::None);
            assert_eq!(
                in_place.forward(&x, Some(&residual)),
                expected,
                "{isa:?} {rows} rows, {inputs} -> {outputs:?}"
            );
        }
    });
}
