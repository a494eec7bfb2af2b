//! Convolutions and linear layers.

use super::{on_each_isa, random, relative_error};
use crate::kernels::*;

/// A convolution by definition.
#[allow(clippy::too_many_arguments)]
fn naive(
    x: &[f64],
    (b, h, w, cin): (usize, usize, usize, usize),
    weight: &[f32],
    bias: Option<&[f32]>,
    cout: usize,
    (kh, kw): (usize, usize),
    stride: usize,
    pad: [usize; 4],
) -> Vec<f64> {
    let (oh, ow) = (
        (h + pad[0] + pad[1] - kh) / stride + 1,
        (w + pad[2] + pad[3] - kw) / stride + 1,
    );
    let mut out = Vec::with_capacity(b * oh * ow * cout);
    for i in 0..b * oh * ow * cout {
        let (o, ox, oy, b) = (
            i % cout,
            i / cout % ow,
            i / cout / ow % oh,
            i / cout / ow / oh,
        );
        let mut sum = bias.map_or(0.0, |b| b[o] as f64);
        for ky in 0..kh {
            for kx in 0..kw {
                let (y, x0) = (
                    (oy * stride + ky).wrapping_sub(pad[0]),
                    (ox * stride + kx).wrapping_sub(pad[2]),
                );
                if y < h && x0 < w {
                    for c in 0..cin {
                        sum += x[((b * h + y) * w + x0) * cin + c]
                            * weight[((o * cin + c) * kh + ky) * kw + kx] as f64;
                    }
                }
            }
        }
        out.push(sum);
    }
    out
}

fn to_f64(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x as f64).collect()
}

#[test]
fn convolutions_of_odd_sizes_match_the_definition() {
    // b, h, w, cin, cout, kh, kw, stride, pad
    let cases: [(
        usize,
        usize,
        usize,
        usize,
        usize,
        usize,
        usize,
        usize,
        [usize; 4],
    ); 16] = [
        (1, 1, 1, 1, 1, 3, 3, 1, [1; 4]),
        (2, 5, 7, 4, 5, 3, 3, 1, [1; 4]),
        (1, 8, 8, 32, 32, 3, 3, 1, [1; 4]),
        (2, 9, 13, 40, 33, 3, 3, 1, [1; 4]),
        (1, 4, 66, 5, 8, 3, 3, 1, [1; 4]),
        (3, 6, 3, 17, 70, 3, 3, 1, [1, 0, 0, 1]),
        (1, 67, 70, 20, 36, 3, 3, 1, [1; 4]),
        (1, 65, 64, 66, 130, 3, 3, 1, [1; 4]),
        (1, 12, 10, 150, 48, 3, 3, 1, [1; 4]),
        (2, 9, 8, 19, 34, 3, 3, 2, [0, 1, 0, 1]),
        (1, 20, 17, 70, 40, 3, 3, 2, [1; 4]),
        (2, 5, 6, 33, 65, 1, 1, 1, [0; 4]),
        (1, 11, 12, 800, 20, 1, 1, 1, [0; 4]),
        (1, 9, 9, 3, 16, 5, 3, 1, [2, 2, 1, 1]),
        (1, 16, 16, 3, 24, 4, 4, 4, [0; 4]),
        (2, 40, 40, 8, 3, 2, 2, 1, [0, 0, 0, 0]),
    ];
    on_each_isa(|isa| {
        for (i, (b, h, w, cin, cout, kh, kw, stride, pad)) in cases.into_iter().enumerate() {
            let x = random(b * h * w * cin, 1);
            let weight = random(cout * cin * kh * kw, 2);
            let bias = random(cout, 3);
            let want = naive(
                &to_f64(&x),
                (b, h, w, cin),
                &weight,
                Some(&bias),
                cout,
                (kh, kw),
                stride,
                pad,
            );
            let conv = PackedConv::new(&weight, Some(&bias), (cout, cin), (kh, kw), stride, pad);
            let residual = random(want.len(), 4);
            let want: Vec<f64> = want
                .iter()
                .zip(&residual)
                .map(|(a, b)| a + *b as f64)
                .collect();
            let input = Input::new(&x, b, h, w, cin);
            let got = conv2d(&input, &conv, Some(&residual));
            let error = relative_error(&got, &want);
            // Winograd's F(4x4) loses a digit against direct summation in f32, which itself is good to about 1e-6.
            assert!(
                error < 1e-5,
                "case {i} on {isa:?}: relative error {error:e}"
            );
            let mut acc = residual.clone();
            conv2d_add(&input, &conv, &mut acc);
            assert_eq!(
                got, acc,
                "case {i} on {isa:?}: accumulating in place gives the same"
            );
        }
    });
}
