//! The upscaler's fixed depthwise filters: [1, 3, 3, 1] / 8 down and twice that up, reflecting at the edges
//! (diffusers' KDownsample2D and KUpsample2D).

use rayon::prelude::*;

use super::buf::{Shared, filled};
use super::simd::{Isa, Simd, isa_fn};

/// A line (or column) of the input, and how much of it goes into one of the output.
#[derive(Clone, Copy)]
struct Tap {
    at: usize,
    weight: f32,
}

/// A line (or column) of the output as a sum over up to four of the input.
type Taps = [Tap; 4];

/// `x` (b, h, w, c) to (b, h / 2, w / 2, c), sizes rounded down: the 4x4 filter at every second pixel.
///
/// # Panics
/// If `x` has another length, or h or w is below 2 (nothing to reflect).
pub fn downsample_k(x: &[f32], b: usize, h: usize, w: usize, c: usize) -> Vec<f32> {
    let taps = |n: usize| {
        let tap = move |o: usize, k: usize| Tap {
            at: reflect(2 * o as isize + k as isize - 1, n),
            weight: [0.125, 0.375, 0.375, 0.125][k],
        };
        (0..n / 2)
            .map(|o| [0, 1, 2, 3].map(|k| tap(o, k)))
            .collect()
    };
    resample(x, b, h, w, c, taps)
}

/// `x` (b, h, w, c) to (b, 2h, 2w, c): the transposed convolution of stride 2 with twice the filter.
///
/// # Panics
/// As [`downsample_k`].
pub fn upsample_k(x: &[f32], b: usize, h: usize, w: usize, c: usize) -> Vec<f32> {
    // Even lines lie a quarter behind an input line, odd ones a quarter after it.
    let taps = |n: usize| {
        let tap = move |o: usize| {
            let near = o / 2;
            let far = if o.is_multiple_of(2) {
                near as isize - 1
            } else {
                near as isize + 1
            };
            [
                (near, 0.75),
                (reflect(far, n), 0.25),
                (near, 0.0),
                (near, 0.0),
            ]
            .map(|(at, weight)| Tap { at, weight })
        };
        (0..2 * n).map(tap).collect()
    };
    resample(x, b, h, w, c, taps)
}

/// Index -1 is 1, n is n - 2.
fn reflect(i: isize, n: usize) -> usize {
    let last = n as isize - 1;
    (last - (last - i.abs()).abs()) as usize
}

fn resample(
    x: &[f32],
    b: usize,
    h: usize,
    w: usize,
    c: usize,
    taps: impl Fn(usize) -> Vec<Taps>,
) -> Vec<f32> {
    assert_eq!(
        x.len(),
        b * h * w * c,
        "the input is (b, h, w, c) = ({b}, {h}, {w}, {c})"
    );
    assert!(
        h >= 2 && w >= 2,
        "reflecting needs 2 lines and columns, there are {h} and {w}"
    );
    let isa = Isa::current();
    let (lines, columns) = (taps(h), taps(w));
    let used = |taps: &[Taps]| {
        if taps.iter().all(|t| t[2].weight == 0.0) {
            2
        } else {
            4
        }
    };
    let n = used(&lines);
    let run = |out: Shared| {
        (0..b * lines.len()).into_par_iter().for_each(|i| {
            let x = &x[i / lines.len() * h * w * c..][..h * w * c];
            // SAFETY: `x` is an item (h, w, c), inside which the taps lie, as they are reflected; each task writes its own line.
            unsafe {
                let out = out.get().add(i * columns.len() * c);
                resample_line(
                    isa,
                    x,
                    w * c,
                    c,
                    &lines[i % lines.len()][..n],
                    &columns,
                    n,
                    out,
                );
            }
        });
    };
    // SAFETY: every line is written.
    unsafe { filled(b * lines.len() * columns.len() * c, run) }
}

isa_fn! {
    /// A line of the output: `x` has lines of `line` values, pixels of `c`; `n` of each column's taps count.
    ///
    /// # Safety
    /// The taps of `lines` and `columns` lie inside `x`; there is room for a pixel per column at `out`.
    fn resample_line = resample_line_body(
        x: &[f32], line: usize, c: usize, lines: &[Tap], columns: &[Taps], n: usize, out: *mut f32,
    )
}

/// # Safety
/// That of [`resample_line`], on a machine that has `S`.
#[inline(always)]
unsafe fn resample_line_body<S: Simd>(
    x: &[f32],
    line: usize,
    c: usize,
    lines: &[Tap],
    columns: &[Taps],
    n: usize,
    out: *mut f32,
) {
    // SAFETY: the taps' pixel is inside `x` and pixel o inside the line; of both only the `m` channels left from `j` are touched.
    unsafe {
        for (o, column) in columns.iter().enumerate() {
            for j in (0..c).step_by(S::LANES) {
                let m = c - j;
                let mut sum = S::splat(0.0);
                for line_tap in lines {
                    let mut s = S::splat(0.0);
                    for tap in column.iter().take(n) {
                        let p = x.as_ptr().add(line_tap.at * line + tap.at * c + j);
                        s = S::load_up_to(p, m).mul_add(S::splat(tap.weight), s);
                    }
                    sum = s.mul_add(S::splat(line_tap.weight), sum);
                }
                sum.store_up_to(out.add(o * c + j), m);
            }
        }
    }
}
