//! Point by point: activations, sums, and an [`Input`] written out.

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
    map(x, None, act)
}

/// `a + b`.
///
/// # Panics
/// If their lengths differ.
pub fn add(a: &[f32], b: &[f32]) -> Vec<f32> {
    assert_eq!(a.len(), b.len(), "only equal lengths add");
    map(a, Some(b), Act::None)
}

/// What an [`Input`] describes, written out: its parts side by side, through its prologue, upsampled. The shape is
/// (b, h, w, c) of [`Input::shape`] and [`Input::channels`].
pub fn materialise(input: &Input) -> Vec<f32> {
    let isa = Isa::current();
    let ((b, h, w), c) = (input.shape(), input.channels());
    let run = |out: Shared| {
        (0..b * h).into_par_iter().for_each(|i| {
            let region = Region {
                b: i / h,
                y: (i % h) as isize,
                x: 0,
                h: 1,
                w,
            };
            let padded = c.next_multiple_of(SLAB);
            // SAFETY: each task writes its own line; where the channels do not fill whole slabs it goes through scratch.
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

fn map(a: &[f32], b: Option<&[f32]>, act: Act) -> Vec<f32> {
    let isa = Isa::current();
    let run = |out: Shared| {
        a.par_chunks(CHUNK).enumerate().for_each(|(i, a)| {
            let b = b.map(|b| &b[i * CHUNK..][..a.len()]);
            // SAFETY: each task writes its own chunk.
            unsafe { map_chunk(isa, a, b, act, out.get().add(i * CHUNK)) }
        });
    };
    // SAFETY: every chunk is written.
    unsafe { filled(a.len(), run) }
}

isa_fn! {
    /// `act(a + b)`.
    fn map_chunk = map_chunk_body(a: &[f32], b: Option<&[f32]>, act: Act, out: *mut f32)
}

#[inline(always)]
unsafe fn map_chunk_body<S: Simd>(a: &[f32], b: Option<&[f32]>, act: Act, out: *mut f32) {
    unsafe { with_act!(act, f => map_chunk_with::<S, _>(a, b, f, out)) }
}

#[inline(always)]
unsafe fn map_chunk_with<S: Simd, F: PointFn>(a: &[f32], b: Option<&[f32]>, f: F, out: *mut f32) {
    unsafe {
        for i in (0..a.len()).step_by(S::LANES) {
            let n = a.len() - i;
            let load = |x: &[f32]| {
                if n < S::LANES {
                    S::load_first(x.as_ptr().add(i), n)
                } else {
                    S::load(x.as_ptr().add(i))
                }
            };
            let mut x = load(a);
            if let Some(b) = b {
                x = x.add(load(b));
            }
            let y = f.eval(x);
            if n < S::LANES {
                y.store_first(out.add(i), n)
            } else {
                y.store(out.add(i))
            }
        }
    }
}
