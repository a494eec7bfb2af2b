//! What is kept in 16 bits: each kernel gives what it gives for the same numbers in float32, rounded once, to the bit; and rounding
//! is the same on every instruction set.

use half::{bf16, f16};

use super::{on_each_isa, random, relative_error, to_f64, with_threads};
use crate::kernels::cpu::values::{AnyMut, AnyPtr, narrow, widen};
use crate::kernels::cpu::*;

/// Numbers in -1..1 as they are kept.
fn kept<V: Value>(n: usize, seed: u64) -> Vec<V> {
    random(n, seed).into_iter().map(V::narrow).collect()
}

fn wide<V: Value>(x: &[V]) -> Vec<f32> {
    x.iter().map(|x| x.widen()).collect()
}

/// The bits, since NaN equals nothing.
fn bits<V: Value>(x: &[V]) -> Vec<u32> {
    x.iter().map(|x| x.widen().to_bits()).collect()
}

/// Products of pairs sum in another order, and round what they read: a norm's result, a softmax's weights. That is 2^-9 of each, of
/// which few add up in one direction, and 2^-9 of the result.
const OF_PAIRS: f64 = 6e-3;

#[track_caller]
fn assert_rounded_once<V: Value>(what: &str, got: &[V], exact: &[f32]) {
    if V::PRECISION == Precision::Bf16 && Isa::current().multiplies_pairs() {
        let error = relative_error(&wide(got), &to_f64(exact));
        assert!(error < OF_PAIRS, "{what} in pairs: {error:e}");
        return;
    }
    assert_same_bits(what, got, exact);
}

#[track_caller]
fn assert_same_bits<V: Value>(what: &str, got: &[V], exact: &[f32]) {
    let want: Vec<V> = exact.iter().map(|&x| V::narrow(x)).collect();
    assert!(
        bits(got) == bits(&want),
        "{what} on {:?} as {:?}",
        Isa::current(),
        V::PRECISION
    );
    assert!(got.iter().any(|x| x.widen() != 0.0), "{what}: all zero");
}

/// Float32 on both sides of where rounding changes, with NaN, infinities and subnormal numbers.
fn edges() -> Vec<f32> {
    let mut bits = Vec::new();
    for high in 0..=u16::MAX {
        // Of bfloat16: what is cut off is nothing, just below a half, a half, just above, nearly all.
        for low in [0, 0x7fff, 0x8000, 0x8001, 0xffff] {
            bits.push(u32::from(high) << 16 | low);
        }
        // Of float16: a number, and the middle between it and the next, with its neighbours.
        let number = f16::from_bits(high).to_f32();
        let next = f16::from_bits(high.wrapping_add(1)).to_f32();
        let middle = ((number + next) / 2.0).to_bits();
        bits.extend([
            number.to_bits(),
            middle,
            middle.wrapping_add(1),
            middle.wrapping_sub(1),
        ]);
    }
    // Where float16 ends.
    bits.extend([65504f32, 65519.996, 65520.0, 65536.0].map(f32::to_bits));
    bits.into_iter().map(f32::from_bits).collect()
}

/// Against the crate `half`, which goes by the bits.
fn conversions<V: Value>(by_half: impl Fn(f32) -> V, to_f32: impl Fn(V) -> f32) {
    let edges = edges();
    let want: Vec<V> = edges.iter().map(|&x| by_half(x)).collect();
    let plain: Vec<V> = edges.iter().map(|&x| V::narrow(x)).collect();
    assert!(bits(&plain) == bits(&want), "{:?}", V::PRECISION);
    on_each_isa(|isa| {
        // An odd number, so that the last vector is cut.
        let n = edges.len() - 1;
        let mut narrowed = vec![V::default(); n];
        // SAFETY: both have `n` values.
        unsafe {
            let to = AnyMut::new(narrowed.as_mut_ptr());
            narrow(isa, edges.as_ptr(), n, to);
        }
        assert!(bits(&narrowed) == bits(&want[..n]), "narrow on {isa:?}");
        let mut widened = vec![0f32; n];
        // SAFETY: as above.
        unsafe { widen(isa, AnyPtr::new(want.as_ptr()), n, widened.as_mut_ptr()) };
        let exact: Vec<f32> = want[..n].iter().map(|&x| to_f32(x)).collect();
        assert!(bits(&widened) == bits(&exact), "widen on {isa:?}");
        assert!(bits(&wide(&want[..n])) == bits(&exact), "widen alone");
    });
}

#[test]
fn numbers_are_rounded_to_16_bits_alike_on_every_instruction_set() {
    conversions(bf16::from_f32, |x: bf16| {
        f32::from_bits(u32::from(x.to_bits()) << 16)
    });
    conversions(f16::from_f32, f16::to_f32);
}

/// Runs a check for each type of 16 bits.
macro_rules! for_each_type {
    ($check:ident) => {
        on_each_isa(|_| {
            $check::<bf16>();
            $check::<f16>();
        })
    };
}

fn convolutions<V: Value>() {
    // b, h, w, channels of both inputs, outputs, side, stride, upsampled
    for (b, h, w, c1, c2, cout, k, stride, up) in [
        (2, 9, 13, 40, 0, 33, 3, 1, false),
        (1, 66, 65, 20, 12, 36, 3, 1, false),
        (1, 12, 10, 150, 0, 48, 3, 1, true),
        (2, 9, 8, 19, 5, 34, 3, 2, false),
        (1, 11, 12, 800, 0, 20, 1, 1, false),
        (1, 7, 5, 3, 0, 5, 1, 1, false),
    ] {
        let c = c1 + c2;
        let (x1, x2) = (kept::<V>(b * h * w * c1, 1), kept::<V>(b * h * w * c2, 2));
        let weight = kept::<V>(cout * c * k * k, 3);
        let bias = random(cout, 4);
        let filter = Filter {
            inputs: c,
            outputs: cout,
            height: k,
            width: k,
            stride,
            padding: Padding::all(k / 2),
        };
        let prologue = Prologue::new(random(b * c, 5), random(b * c, 6), Act::Silu);
        let (wide1, wide2) = (wide(&x1), wide(&x2));
        let conv = PackedConv::kept_as(V::PRECISION, &wide(&weight), Some(&bias), filter);
        let exact = PackedConv::new(&wide(&weight), Some(&bias), filter);
        // An odd number of inputs may be filled up to pairs.
        let even = c.next_multiple_of(2) * exact.bytes() / c;
        assert!([exact.bytes(), even].contains(&(2 * conv.bytes())));
        let (input, wide) = (
            Input::new(&x1, b, h, w, c1),
            Input::new(&wide1, b, h, w, c1),
        );
        let (input, wide) = if c2 > 0 {
            (input.beside(&[&x2], c2), wide.beside(&[&wide2], c2))
        } else {
            (input, wide)
        };
        let (input, wide) = (input.prologue(&prologue), wide.prologue(&prologue));
        let (input, wide) = if up {
            (input.upsample2x(), wide.upsample2x())
        } else {
            (input, wide)
        };
        let (oh, ow) = {
            let (_, h, w) = input.shape();
            conv.output_size(h, w)
        };
        let residual = kept::<V>(b * oh * ow * cout, 7);
        let wide_residual: Vec<f32> = residual.iter().map(|x| x.widen()).collect();
        let what = format!("{h}x{w} of {c} to {cout}, side {k}, stride {stride}");
        let got = conv2d(&input, &conv, Some(&residual));
        let want = conv2d(&wide, &exact, Some(&wide_residual));
        assert_rounded_once::<V>(&what, &got, &want);
        // A network's last convolution writes float32.
        let last: Vec<f32> = conv2d(&input, &conv, None);
        let want = conv2d::<f32>(&wide, &exact, None);
        let error = relative_error(&last, &to_f64(&want));
        let in_pairs = conv.in_pairs() && Isa::current().multiplies_pairs();
        assert!(
            error <= if in_pairs { OF_PAIRS } else { 0.0 },
            "{what} in float32: {error:e}"
        );
        let lines = CONV_LINES..oh.min(31);
        if !lines.is_empty() {
            let part: Vec<V> = conv2d_lines(&input, &conv, None, lines.clone());
            let whole: Vec<V> = conv2d(&input, &conv, None);
            let line = ow * cout;
            for item in 0..b {
                let of_whole = &whole[(item * oh + lines.start) * line..][..lines.len() * line];
                let of_part = &part[item * lines.len() * line..][..lines.len() * line];
                assert!(bits(of_whole) == bits(of_part), "lines of {what}");
            }
        }
    }
}

#[test]
fn convolutions_round_once() {
    for_each_type!(convolutions);
}

fn linear_layers<V: Value>() {
    for (n, cin, cout) in [(1, 1, 1), (1, 900, 40), (77, 48, 100), (200, 1601, 33)] {
        let (x, weight) = (kept::<V>(n * cin, 1), kept::<V>(cout * cin, 2));
        let (bias, residual) = (random(cout, 3), kept::<V>(n * cout, 4));
        let filter = Filter::linear(cin, cout);
        let layer = PackedConv::kept_as(V::PRECISION, &wide(&weight), Some(&bias), filter);
        let exact = PackedConv::new(&wide(&weight), Some(&bias), filter);
        let wide_x = wide(&x);
        let (input, input32) = (
            Input::new(&x, 1, 1, n, cin),
            Input::new(&wide_x, 1, 1, n, cin),
        );
        let got = linear(&input, &layer, Some(&residual), Act::Silu);
        let want = linear(&input32, &exact, Some(&wide(&residual)), Act::Silu);
        assert_rounded_once::<V>(&format!("linear ({n}, {cin}) to {cout}"), &got, &want);
    }
}

#[test]
fn linear_layers_round_once() {
    for_each_type!(linear_layers);
}

fn attentions<V: Value>() {
    for (b, heads, nq, nk, d, causal) in [
        (2, 3, 5, 7, 4, false),
        (1, 2, 77, 77, 24, true),
        (1, 2, 131, 519, 33, false),
    ] {
        let shape = AttentionShape {
            b,
            heads,
            nq,
            nk,
            d,
            causal,
        };
        let q = kept::<V>(b * nq * heads * d, 1);
        let (k, v) = (
            kept::<V>(b * nk * heads * d, 2),
            kept::<V>(b * nk * heads * d, 3),
        );
        let got = attention(&q, &k, &v, shape, 1.5);
        let want = attention(&wide(&q), &wide(&k), &wide(&v), shape, 1.5);
        assert_rounded_once::<V>(&format!("{shape:?}"), &got, &want);
    }
}

#[test]
fn attention_rounds_once() {
    for_each_type!(attentions);
}

fn points_and_norms<V: Value>() {
    let (b, h, w) = (2, 7, 9);
    for c in [6, 16, 40] {
        let x = kept::<V>(b * h * w * c, 1);
        let wide_x = wide(&x);
        let input = Input::new(&x, b, h, w, c);
        let input32 = Input::new(&wide_x, b, h, w, c);
        let sums = |input: &Input| {
            let mut sums = GroupSums::new(b, c, 2);
            sums.add(input, 0..h);
            sums.stats(1e-5)
        };
        let (stats, stats32) = (sums(&input), sums(&input32));
        assert_eq!(stats.mean, stats32.mean, "means of {c} channels");
        assert_eq!(stats.rstd, stats32.rstd, "deviations of {c} channels");
        let prologue = stats.affine(&random(c, 2), &random(c, 3), Act::Gelu);
        let got: Vec<V> = materialise(&input.clone().prologue(&prologue));
        let want: Vec<f32> = materialise(&input32.clone().prologue(&prologue));
        assert_rounded_once(&format!("a norm of {c} channels"), &got, &want);
        let (up, down) = (
            upsample_k::<V>(&input, 0..2 * h),
            downsample_k::<V>(&input, 0..h / 2),
        );
        assert_rounded_once(
            "twice the size",
            &up,
            &upsample_k::<f32>(&input32, 0..2 * h),
        );
        assert_rounded_once(
            "half the size",
            &down,
            &downsample_k::<f32>(&input32, 0..h / 2),
        );
        let got = activate(&x[1..], Act::QuickGelu);
        assert_rounded_once(
            "an activation",
            &got,
            &activate(&wide_x[1..], Act::QuickGelu),
        );
        let (weight, bias) = (random(c, 4), random(c, 5));
        let got = layer_norm(&x, &weight, &bias, 1e-5);
        let want = layer_norm(&wide_x, &weight, &bias, 1e-5);
        assert_rounded_once(&format!("a layer norm of {c}"), &got, &want);
    }
}

#[test]
fn norms_and_what_goes_point_by_point_round_once() {
    for_each_type!(points_and_norms);
}

#[test]
fn products_of_pairs_are_the_same_for_any_thread_count_and_place_in_a_batch() {
    let (b, n, cin, cout) = (3, 100, 801, 70);
    let (x, weight) = (kept::<bf16>(b * n * cin, 1), random(cout * cin, 2));
    let filter = Filter::linear(cin, cout);
    let layer = PackedConv::kept_as(Precision::Bf16, &weight, None, filter);
    let product = |x: &[bf16], n: usize| -> Vec<bf16> {
        linear(&Input::new(x, 1, 1, n, cin), &layer, None, Act::None)
    };
    let shape = AttentionShape {
        b,
        heads: 2,
        nq: n,
        nk: 301,
        d: 21,
        causal: false,
    };
    let (q, k) = (kept::<bf16>(b * n * 42, 3), kept::<bf16>(b * 301 * 42, 4));
    let attend = |q: &[bf16], k: &[bf16], b: usize| -> Vec<bf16> {
        attention(q, k, k, AttentionShape { b, ..shape }, 0.2)
    };
    let run = || (bits(&product(&x, b * n)), bits(&attend(&q, &k, b)));
    let (products, attended) = with_threads(1, run);
    for threads in [2, 3, 8] {
        assert!(
            (&products, &attended)
                == (&with_threads(threads, run).0, &with_threads(threads, run).1),
            "{threads} threads"
        );
    }
    for item in 0..b {
        let alone = bits(&product(&x[item * n * cin..][..n * cin], n));
        assert!(
            products[item * n * cout..][..n * cout] == alone,
            "item {item}"
        );
        let (nq, nk) = (n * 42, 301 * 42);
        let alone = bits(&attend(&q[item * nq..][..nq], &k[item * nk..][..nk], 1));
        assert!(
            attended[item * nq..][..nq] == alone,
            "item {item} of attention"
        );
    }
}

#[test]
fn what_float16_does_not_hold_becomes_infinite_when_it_is_written() {
    on_each_isa(|isa| {
        let x = vec![f16::from_f32(300.0); 40];
        let filter = Filter::linear(40, 7);
        let layer = PackedConv::kept_as(Precision::F16, &[300.0; 280], None, filter);
        let input = Input::new(&x, 1, 1, 1, 40);
        let y: Vec<f16> = linear(&input, &layer, None, Act::None);
        assert_eq!(y, [f16::INFINITY; 7], "{isa:?}");
        let y: Vec<f32> = linear(&input, &layer, None, Act::None);
        assert_eq!(y, [3_600_000.0; 7], "{isa:?}");
    });
}
