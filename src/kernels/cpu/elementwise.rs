//! Point by point: activations, and an [`Input`] written out.

use std::ops::Range;

use rayon::prelude::*;

use super::act::{Act, PointFn, with_act};
use super::buf::{Scratch, Shared, filled};
use super::input::{Input, Region, stage_region};
use super::micro::SLAB;
use super::simd::{Isa, Simd, isa_fn};

/// Values per task.
const CHUNK: usize = 1 << 14;

/// `act(x)`.
pub fn activate(x: &[f32], act: Act) -> Vec<f32> {
    let isa = Isa::current();
    let run = |out: Shared| {
        x.par_chunks(CHUNK).enumerate().for_each(|(i, x)| {
            // SAFETY: each task writes its own chunk, of which there is room for all.
            unsafe { activate_chunk(isa, x, act, out.get().add(i * CHUNK)) }
        });
    };
    // SAFETY: every chunk is written.
    unsafe { filled(x.len(), run) }
}

isa_fn! {
    /// `act(x)`, to `out`.
    ///
    /// # Safety
    /// There is room at `out` for as many values as `x` has.
    fn activate_chunk = activate_chunk_body(x: &[f32], act: Act, out: *mut f32)
}

/// # Safety
/// That of [`activate_chunk`], on a machine that has `S`.
#[inline(always)]
unsafe fn activate_chunk_body<S: Simd>(x: &[f32], act: Act, out: *mut f32) {
    // SAFETY: the caller's promise is the same.
    unsafe { with_act!(act, f => activate_chunk_with::<S, _>(x, f, out)) }
}

/// # Safety
/// That of [`activate_chunk`], on a machine that has `S`.
#[inline(always)]
unsafe fn activate_chunk_with<S: Simd, F: PointFn>(x: &[f32], f: F, out: *mut f32) {
    for i in (0..x.len()).step_by(S::LANES) {
        let n = x.len() - i;
        // SAFETY: `n` values are left in `x` from `i` on, and room for as many at `out`.
        unsafe {
            f.eval(S::load_up_to(x.as_ptr().add(i), n))
                .store_up_to(out.add(i), n)
        }
    }
}

/// What an [`Input`] describes, written out: its parts side by side, through its prologue, upsampled. The shape is
/// (b, h, w, c) of [`Input::shape`] and [`Input::channels`].
pub fn materialise(input: &Input) -> Vec<f32> {
    let (_, h, _) = input.shape();
    materialise_lines(input, 0..h)
}

/// Some lines of it, (b, lines, w, c).
///
/// # Panics
/// If they are not there.
pub fn materialise_lines(input: &Input, lines: Range<usize>) -> Vec<f32> {
    assert!(
        input.has(lines.clone()),
        "the input has the lines {lines:?}"
    );
    let isa = Isa::current();
    let ((b, _, w), c) = (input.shape(), input.channels());
    let (first, h) = (lines.start, lines.len());
    let run = |out: Shared| {
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
            // where the channels do not fill whole slabs, from scratch with room for the slabs.
            unsafe {
                let to = out.get().add(i * w * c);
                if c == padded {
                    return stage_region(isa, input, region, 0, c, to);
                }
                let mut line = Scratch::take(w * padded);
                stage_region(isa, input, region, 0, c, line.ptr());
                for x in 0..w {
                    to.add(x * c)
                        .copy_from_nonoverlapping(line.ptr().add(x * padded), c);
                }
            }
        });
    };
    // SAFETY: every line is written.
    unsafe { filled(b * h * w * c, run) }
}
