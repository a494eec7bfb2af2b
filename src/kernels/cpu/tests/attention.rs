//! Attention.

use super::{on_each_isa, random, relative_error, to_f64, with_threads};
use crate::kernels::cpu::*;

fn naive(q: &[f64], k: &[f64], v: &[f64], s: AttentionShape, scale: f64) -> Vec<f64> {
    let ld = s.heads * s.d;
    let mut out = vec![0.0; q.len()];
    for i in 0..s.b * s.nq * s.heads {
        let (h, iq, b) = (i % s.heads, i / s.heads % s.nq, i / s.heads / s.nq);
        let at = (b * s.nq + iq) * ld + h * s.d;
        let n = if s.causal { s.nk.min(iq + 1) } else { s.nk };
        let key = |j: usize| (b * s.nk + j) * ld + h * s.d;
        let dot = |j: usize| scale * (0..s.d).map(|c| q[at + c] * k[key(j) + c]).sum::<f64>();
        let scores: Vec<f64> = (0..n).map(dot).collect();
        let max = scores.iter().cloned().fold(f64::MIN, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        for c in 0..s.d {
            out[at + c] = (0..n)
                .map(|j| (scores[j] - max).exp() / sum * v[key(j) + c])
                .sum();
        }
    }
    out
}

fn shape(b: usize, heads: usize, nq: usize, nk: usize, d: usize, causal: bool) -> AttentionShape {
    AttentionShape {
        b,
        heads,
        nq,
        nk,
        d,
        causal,
    }
}

#[test]
fn attention_matches_the_definition() {
    let shapes = [
        shape(1, 1, 1, 1, 1, false),
        shape(2, 3, 5, 7, 4, false),
        shape(1, 2, 40, 77, 64, false),
        shape(1, 2, 77, 77, 24, true),
        shape(2, 1, 300, 300, 8, true),
        shape(1, 2, 131, 519, 33, false),
        shape(1, 1, 260, 600, 130, false),
        shape(1, 1, 20, 40, 16, true),
    ];
    on_each_isa(|isa| {
        for s in shapes {
            let (q, k, v) = (
                random(s.b * s.nq * s.heads * s.d, 1),
                random(s.b * s.nk * s.heads * s.d, 2),
                random(s.b * s.nk * s.heads * s.d, 3),
            );
            // Sharp enough that the maximum moves from block to block.
            for scale in [0.3f32, 4.0] {
                let want = naive(&to_f64(&q), &to_f64(&k), &to_f64(&v), s, f64::from(scale));
                let error = relative_error(&attention(&q, &k, &v, s, scale), &want);
                // Scores reach 4 * 130 / 3 or so: f32 holds them to 1e-5, which their exponentials inherit.
                assert!(
                    error < if scale < 1.0 { 2e-6 } else { 4e-5 },
                    "{s:?} on {isa:?}: relative error {error:e}"
                );
            }
        }
    });
}

#[test]
fn scores_far_beyond_the_range_of_exp_give_the_value_of_the_largest() {
    let q = vec![1.0f32; 4];
    let k: Vec<f32> = (0..600 * 4).map(|i| (i / 4) as f32 * 10.0).collect();
    let v: Vec<f32> = (0..600 * 4).map(|i| (i / 4) as f32).collect();
    on_each_isa(|_| {
        let up = attention(&q, &k, &v, shape(1, 1, 1, 600, 4, false), 1.0);
        assert_eq!(up, [599.0; 4], "rising scores");
        let down = attention(&q, &k, &v, shape(1, 1, 1, 600, 4, false), -1.0);
        // The second largest score is 40 below.
        assert!(
            down.iter().all(|x| x.abs() < 1e-17),
            "falling scores: {down:?}"
        );
    });
}

#[test]
fn attention_is_the_same_for_any_thread_count_and_place_in_a_batch() {
    let s = shape(3, 2, 150, 300, 20, false);
    let (q, k, v) = (
        random(3 * 150 * 40, 1),
        random(3 * 300 * 40, 2),
        random(3 * 300 * 40, 3),
    );
    let run = || attention(&q, &k, &v, s, 0.2);
    let whole = with_threads(1, run);
    for threads in [2, 3, 8] {
        assert_eq!(whole, with_threads(threads, run), "{threads} threads");
    }
    let (nq, nk) = (150 * 40, 300 * 40);
    for b in 0..3 {
        let alone = attention(
            &q[b * nq..][..nq],
            &k[b * nk..][..nk],
            &v[b * nk..][..nk],
            AttentionShape { b: 1, ..s },
            0.2,
        );
        assert_eq!(whole[b * nq..][..nq], alone, "item {b}");
    }
}
