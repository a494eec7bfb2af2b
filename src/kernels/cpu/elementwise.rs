//! Point by point: activations, and an [`Input`] written out.

use std::ops::Range;

use rayon::prelude::*;

use super::act::{Act, PointFn, with_act};
use super::buf::{Scratch, Shared, filled};
use super::input::{Input, Region, stage_region};
use super::micro::SLAB;
use super::simd::{Isa, Simd, isa_fn};
use super::values::{AnyMut, Precision, Value, Values, narrow};

/// Values per task.
const CHUNK: usize = 1 << 14;

/// `act(x)`.
pub fn activate<V: Value>(x: &[V], act: Act) -> Vec<V> {
    let isa = Isa::current();
    let run = |out: Shared<V>| {
        x.par_chunks(CHUNK).enumerate().for_each(|(i, x)| {
            // SAFETY: each task writes its own chunk, of which there is room for all.
            unsafe {
                let out = AnyMut::new(out.get()).at(i * CHUNK);
                activate_chunk(isa, V::values(x), act, out);
            }
        });
    };
    // SAFETY: every chunk is written.
    unsafe { filled(x.len(), run) }
}

isa_fn! {
    /// `act(x)`, to `out`.
    ///
    /// # Safety
    /// There is room at `out` for as many values as `x` has, of its type.
    fn activate_chunk = activate_chunk_body(x: Values, act: Act, out: AnyMut)
}

/// # Safety
/// That of [`activate_chunk`], on a machine that has `S`.
#[inline(always)]
unsafe fn activate_chunk_body<S: Simd>(x: Values, act: Act, out: AnyMut) {
    // SAFETY: the caller's promise is the same.
    unsafe {
        with_act!(act, f => match x {
            Values::F32(x) => activate_chunk_with::<S, _, _>(x, f, out.typed()),
            Values::Bf16(x) => activate_chunk_with::<S, _, _>(x, f, out.typed()),
            Values::F16(x) => activate_chunk_with::<S, _, _>(x, f, out.typed()),
        })
    }
}

/// # Safety
/// That of [`activate_chunk`], on a machine that has `S`.
#[inline(always)]
unsafe fn activate_chunk_with<S: Simd, V: Value, F: PointFn>(x: &[V], f: F, out: *mut V) {
    for i in (0..x.len()).step_by(S::LANES) {
        let n = x.len() - i;
        // SAFETY: `n` values are left in `x` from `i` on, and room for as many at `out`.
        unsafe {
            let x = V::load_up_to::<S>(x.as_ptr().add(i), n);
            V::store_up_to(f.eval(x), out.add(i), n);
        }
    }
}

/// The first half of each row of `2 * width` values, times `act` of the second: (rows, width).
///
/// # Panics
/// If the rows are not whole.
pub fn gate<V: Value>(x: &[V], width: usize, act: Act) -> Vec<V> {
    assert!(
        width > 0 && x.len().is_multiple_of(2 * width),
        "whole rows of two halves"
    );
    let isa = Isa::current();
    let rows = (CHUNK / width).max(1);
    let run = |out: Shared<V>| {
        x.par_chunks(rows * 2 * width)
            .enumerate()
            .for_each(|(i, x)| {
                let out = AnyMut::new(out.get()).at(i * rows * width);
                // SAFETY: each task writes its own rows, of which there is room for all.
                unsafe { gate_rows(isa, V::values(x), width, act, out) };
            });
    };
    // SAFETY: every row is written.
    unsafe { filled(x.len() / 2, run) }
}

isa_fn! {
    /// [`gate`] of some rows, to `out`.
    ///
    /// # Safety
    /// The rows are whole; there is room at `out` for half as many values as `x` has, of its type.
    fn gate_rows = gate_rows_body(x: Values, width: usize, act: Act, out: AnyMut)
}

/// # Safety
/// That of [`gate_rows`], on a machine that has `S`.
#[inline(always)]
unsafe fn gate_rows_body<S: Simd>(x: Values, width: usize, act: Act, out: AnyMut) {
    // SAFETY: the caller's promise is the same.
    unsafe {
        with_act!(act, f => match x {
            Values::F32(x) => gate_rows_with::<S, _, _>(x, width, f, out.typed()),
            Values::Bf16(x) => gate_rows_with::<S, _, _>(x, width, f, out.typed()),
            Values::F16(x) => gate_rows_with::<S, _, _>(x, width, f, out.typed()),
        })
    }
}

/// # Safety
/// That of [`gate_rows`], on a machine that has `S`.
#[inline(always)]
unsafe fn gate_rows_with<S: Simd, V: Value, F: PointFn>(x: &[V], width: usize, f: F, out: *mut V) {
    for (row, x) in x.chunks_exact(2 * width).enumerate() {
        for i in (0..width).step_by(S::LANES) {
            let n = width - i;
            // SAFETY: `n` values are left of either half from `i` on, and room for as many of this row at `out`.
            unsafe {
                let value = V::load_up_to::<S>(x.as_ptr().add(i), n);
                let gate = V::load_up_to::<S>(x.as_ptr().add(width + i), n);
                V::store_up_to(value.mul(f.eval(gate)), out.add(row * width + i), n);
            }
        }
    }
}

/// What an [`Input`] describes, written out: its parts side by side, through its prologue, upsampled. The shape is
/// (b, h, w, c) of [`Input::shape`] and [`Input::channels`].
pub fn materialise<V: Value>(input: &Input) -> Vec<V> {
    let (_, h, _) = input.shape();
    materialise_lines(input, 0..h)
}

/// Some lines of it, (b, lines, w, c).
///
/// # Panics
/// If they are not there.
pub fn materialise_lines<V: Value>(input: &Input, lines: Range<usize>) -> Vec<V> {
    assert!(
        input.has(lines.clone()),
        "the input has the lines {lines:?}"
    );
    let isa = Isa::current();
    let ((b, _, w), c) = (input.shape(), input.channels());
    let (first, h) = (lines.start, lines.len());
    let run = |out: Shared<V>| {
        (0..b * h).into_par_iter().for_each(|i| {
            let region = Region {
                b: i / h,
                y: (first + i % h) as isize,
                x: 0,
                h: 1,
                w,
            };
            let padded = c.next_multiple_of(SLAB);
            // SAFETY: item `i / h` exists, 0 is a multiple of 16, and each task writes its own line of w * c values, directly or,
            // where the channels do not fill whole slabs or are kept otherwise, from scratch with room for the slabs.
            unsafe {
                let to = AnyMut::new(out.get()).at(i * w * c);
                if c == padded && V::PRECISION == Precision::F32 {
                    return stage_region(isa, input, region, 0, c, to.typed());
                }
                let mut line = Scratch::take(w * padded);
                let line = line.ptr();
                stage_region(isa, input, region, 0, c, line);
                if c == padded {
                    return narrow(isa, line, w * c, to);
                }
                for x in 0..w {
                    narrow(isa, line.add(x * padded), c, to.at(x * c));
                }
            }
        });
    };
    // SAFETY: every line is written.
    unsafe { filled(b * h * w * c, run) }
}
