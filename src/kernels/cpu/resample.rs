//! The upscaler's fixed depthwise filters: [1, 3, 3, 1] / 8 down and twice that up, reflecting at the edges
//! (diffusers' KDownsample2D and KUpsample2D).

use std::ops::Range;

use rayon::prelude::*;

use super::buf::{Shared, filled};
use super::input::Input;
use super::simd::{Isa, Simd, isa_fn};
use super::values::{AnyMut, AnyPtr, Value, with_type};

/// A line (or column) of the input, and how much of it goes into one of the output.
#[derive(Clone, Copy)]
struct Tap {
    at: usize,
    weight: f32,
}

/// A line (or column) of the output as a sum over up to four of the input.
type Taps = [Tap; 4];

/// Lines of a map (b, h, w, c) at half its size, (b, lines, w / 2, c), sizes rounded down: the 4x4 filter at every second pixel.
/// The input is read as it is in memory, without prologue or upsampling.
///
/// # Panics
/// If lines that are read are not there, or h or w is below 2 (nothing to reflect).
pub fn downsample_k<V: Value>(input: &Input, lines: Range<usize>) -> Vec<V> {
    let taps = |n: usize, of: Range<usize>| {
        let tap = move |o: usize, k: usize| Tap {
            at: reflect(2 * o as isize + k as isize - 1, n),
            weight: [0.125, 0.375, 0.375, 0.125][k],
        };
        of.map(|o| [0, 1, 2, 3].map(|k| tap(o, k))).collect()
    };
    let w = input.width() / 2;
    resample(input, lines, w, taps)
}

/// The lines that [`downsample_k`] reads of a map of `h` lines.
pub fn downsample_reach(lines: &Range<usize>, h: usize) -> Range<usize> {
    // Beyond the edges what is mirrored lies inside.
    (2 * lines.start).saturating_sub(1)..(2 * lines.end + 1).min(h)
}

/// Lines of a map (b, h, w, c) at twice its size, (b, lines, 2w, c): the transposed convolution of stride 2 with twice the filter.
///
/// # Panics
/// As [`downsample_k`].
pub fn upsample_k<V: Value>(input: &Input, lines: Range<usize>) -> Vec<V> {
    // Even lines lie a quarter behind an input line, odd ones a quarter after it.
    let taps = |n: usize, of: Range<usize>| {
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
        of.map(tap).collect()
    };
    let w = 2 * input.width();
    resample(input, lines, w, taps)
}

/// The lines that [`upsample_k`] reads of a map of `h` lines.
pub fn upsample_reach(lines: &Range<usize>, h: usize) -> Range<usize> {
    let last = lines.end.saturating_sub(1) / 2;
    // At the edges the line beside it stands for the one that is not there.
    let start = (lines.start / 2).saturating_sub(1).min(h.saturating_sub(2));
    start..(last + 2).min(h)
}

/// Index -1 is 1, n is n - 2.
fn reflect(i: isize, n: usize) -> usize {
    let last = n as isize - 1;
    (last - (last - i.abs()).abs()) as usize
}

/// `taps` gives those of some of the lines (or columns) of the output, for so many of the input.
fn resample<V: Value>(
    input: &Input,
    lines: Range<usize>,
    width: usize,
    taps: impl Fn(usize, Range<usize>) -> Vec<Taps>,
) -> Vec<V> {
    let ((b, h, _), w, c) = (input.shape(), input.width(), input.channels());
    assert!(
        h >= 2 && w >= 2,
        "reflecting needs 2 lines and columns, there are {h} and {w}"
    );
    assert_eq!(input.widths()[1], 0, "one map is resampled at a time");
    assert_eq!(input.precision(), V::PRECISION, "a map keeps its type");
    let isa = Isa::current();
    let count = lines.len();
    let (lines, columns) = (taps(h, lines), taps(w, 0..width));
    let used = |taps: &[Taps]| {
        if taps.iter().all(|t| t[2].weight == 0.0) {
            2
        } else {
            4
        }
    };
    let n = used(&lines);
    let run = |out: Shared<V>| {
        (0..b * count).into_par_iter().for_each(|i| {
            let line = |tap: Tap| Line {
                values: input.line(i / count, tap.at)[0].from(0),
                weight: tap.weight,
            };
            let lines = lines[i % count].map(line);
            // SAFETY: the lines are (w, c), inside which the columns' taps lie, as they are reflected; each task writes its own line.
            unsafe {
                let out = AnyMut::new(out.get()).at(i * width * c);
                resample_line(isa, c, &lines[..n], &columns, n, out);
            }
        });
    };
    // SAFETY: every line is written.
    unsafe { filled(b * count * width * c, run) }
}

/// A line of the input, and how much of it goes into one of the output.
#[derive(Clone, Copy)]
struct Line {
    values: AnyPtr,
    weight: f32,
}

isa_fn! {
    /// A line of the output from `lines` of pixels of `c`; `n` of each column's taps count.
    ///
    /// # Safety
    /// The taps of `columns` lie inside the lines, which are of the type of `out`; there is room for a pixel per column there.
    fn resample_line = resample_line_body(c: usize, lines: &[Line], columns: &[Taps], n: usize, out: AnyMut)
}

/// # Safety
/// That of [`resample_line`], on a machine that has `S`.
#[inline(always)]
unsafe fn resample_line_body<S: Simd>(
    c: usize,
    lines: &[Line],
    columns: &[Taps],
    n: usize,
    out: AnyMut,
) {
    // SAFETY: the caller's promise is the same.
    unsafe {
        with_type!(out.precision, V => resample_line_of::<S, V>(c, lines, columns, n, out.typed()))
    }
}

/// # Safety
/// That of [`resample_line`], on a machine that has `S`.
#[inline(always)]
unsafe fn resample_line_of<S: Simd, V: Value>(
    c: usize,
    lines: &[Line],
    columns: &[Taps],
    n: usize,
    out: *mut V,
) {
    // SAFETY: the taps' pixel is inside the line and pixel o inside the output; of both only the `m` channels left from `j` are touched.
    unsafe {
        for (o, column) in columns.iter().enumerate() {
            for j in (0..c).step_by(S::LANES) {
                let m = c - j;
                let mut sum = S::splat(0.0);
                for line in lines {
                    let mut s = S::splat(0.0);
                    for tap in column.iter().take(n) {
                        let p = line.values.typed::<V>().add(tap.at * c + j);
                        s = V::load_up_to::<S>(p, m).mul_add(S::splat(tap.weight), s);
                    }
                    sum = s.mul_add(S::splat(line.weight), sum);
                }
                V::store_up_to(sum, out.add(o * c + j), m);
            }
        }
    }
}
