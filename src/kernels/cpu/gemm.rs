//! Matrix products with packed weights: the driver behind linear layers, 1x1 convolutions and every convolution that is
//! not done by Winograd's algorithm (as a sum over the kernel's taps, rows gathered tap by tap).

use half::bf16;
use rayon::prelude::*;

use super::act::{Act, PointFn, with_act};
use super::buf::{Scratch, from_or_null};
use super::micro::{Dst, NB, SLAB, pair_panel, panel_of, rows_per_panel, size_of_pairs};
use super::packed::PackedConv;
use super::scalar::Scalar;
use super::simd::{Isa, Simd, isa_fn};
use super::values::{AnyMut, AnyPtr, Precision, Value, Values, widen, with_type};

/// Rows of a task: enough to reuse each panel of weights that comes from far, few enough to stay in the L2 cache.
const TASK_ROWS: usize = 96;
/// Input channels staged at a time.
const CHUNK: usize = 768;

/// What is added and applied to a product on its way out.
#[derive(Clone, Copy)]
pub(super) struct Epilogue<'a> {
    /// (rows, outputs), kept as the output is.
    pub residual: Option<Values<'a>>,
    pub act: Act,
}

/// Rows to stage for a task, all of which exist.
pub(super) struct Rows {
    pub first: usize,
    pub count: usize,
    pub tap: usize,
    /// Channels.
    pub c0: usize,
    pub c1: usize,
    /// Scratch with room for these rows and channels in panels of A.
    pub dst: *mut f32,
    /// Rows of a panel of A.
    pub per_panel: usize,
}

impl Rows {
    fn slabs(&self) -> usize {
        (self.c1 - self.c0).div_ceil(SLAB)
    }

    /// Calls `f(first row, row count, destination)` for each panel of A; in it rows are [`SLAB`] apart, slabs
    /// `per_panel * SLAB`.
    #[inline(always)]
    pub fn panels(&self, mut f: impl FnMut(usize, usize, *mut f32)) {
        for (g, i) in (0..self.count).step_by(self.per_panel).enumerate() {
            let n = self.per_panel.min(self.count - i);
            let panel = g * self.slabs() * self.per_panel * SLAB;
            f(self.first + i, n, self.dst.wrapping_add(panel));
        }
    }
}

/// `out (rows, outputs) = act(sum over taps of A_tap (rows, inputs) * weight_tap + bias + residual)`, where `stage` writes
/// the rows of A that it is asked for.
///
/// # Safety
/// `out` has room for (rows, outputs), which nobody else uses meanwhile. `stage` writes to [`Rows::dst`] alone.
pub(super) unsafe fn product(
    isa: Isa,
    rows: usize,
    weight: &PackedConv,
    epilogue: Epilogue<'_>,
    out: AnyMut,
    stage: impl Fn(&Rows) + Sync,
) {
    let threads = rayon::current_num_threads();
    let panels = weight.panel_count();
    // How the work is cut has no influence on the result: each value is summed in the same order.
    let mut row_tasks = rows.div_ceil(TASK_ROWS);
    if rows >= 32 * threads {
        row_tasks = row_tasks.next_multiple_of(threads);
    }
    let task_rows = rows.div_ceil(row_tasks.max(1)).max(1);
    let row_tasks = rows.div_ceil(task_rows);
    let splits = (4 * threads)
        .div_ceil(row_tasks.max(1))
        .min(if rows > 64 {
            panels.div_ceil(4)
        } else {
            panels
        })
        .max(1);
    let split = panels.div_ceil(splits);
    let (inputs, outputs, taps) = (
        weight.filter.inputs,
        weight.filter.outputs,
        weight.filter.taps(),
    );
    let per_panel = rows_per_panel(isa, task_rows);
    let chunk = inputs.min(CHUNK);
    let one = taps == 1 && inputs <= CHUNK;
    (0..row_tasks * splits)
        .into_par_iter()
        .with_max_len(1)
        .for_each(|task| {
            let (first, nb0) = (task / splits * task_rows, task % splits * split);
            let (count, nb1) = (task_rows.min(rows - first), panels.min(nb0 + split));
            if nb0 >= nb1 {
                return;
            }
            let mut a =
                Scratch::take(task_rows.next_multiple_of(per_panel) * chunk.next_multiple_of(SLAB));
            let mut c = Scratch::take(if one {
                count * NB
            } else {
                (nb1 - nb0) * count * NB
            });
            let (a, c) = (a.ptr(), c.ptr());
            let pairs = (weight.in_pairs() && isa.multiplies_pairs()).then(|| {
                let panels = task_rows.div_ceil(per_panel);
                Scratch::take(panels * size_of_pairs(chunk, per_panel))
            });
            let pairs = pairs.map(|mut pairs| (pairs.ptr(), pairs));
            let pairs = pairs.as_ref().map(|(ptr, _)| *ptr);
            let mut wide = Widened::new(weight, if pairs.is_some() { 0 } else { chunk });
            let c_panel = |nb: usize| {
                if one {
                    c
                } else {
                    c.wrapping_add((nb - nb0) * count * NB)
                }
            };
            let finish = |nb: usize| {
                let at = first * outputs + nb * NB;
                let residual = from_or_null(epilogue.residual, at);
                let bias = weight.bias(nb).as_ptr();
                // SAFETY: the products with panel `nb` are in its part of `c`, all their rows written; this task alone writes
                // these rows and columns of `out`, and the residual has the output's shape, so that `at` is the same place.
                unsafe {
                    let to = out.at(at);
                    write_out(
                        isa,
                        c_panel(nb),
                        count,
                        weight.panel_cols(nb),
                        bias,
                        residual,
                        to,
                        outputs,
                        epilogue.act,
                    );
                }
            };
            for tap in 0..taps {
                for c0 in (0..inputs).step_by(CHUNK) {
                    let c1 = inputs.min(c0 + CHUNK);
                    let rows = Rows {
                        first,
                        count,
                        tap,
                        c0,
                        c1,
                        dst: a,
                        per_panel,
                    };
                    stage(&rows);
                    let paired = |row: usize, a: *mut f32| {
                        let size = size_of_pairs(c1 - c0, per_panel);
                        a.wrapping_add((row - first) / per_panel * size)
                    };
                    if let Some(pairs) = pairs {
                        rows.panels(|row, n, a| {
                            let to = paired(row, pairs).cast::<bf16>();
                            // SAFETY: the panel of A was staged above, in whole slabs; `pairs` has room for all panels.
                            unsafe { pair_panel(isa, n, c1 - c0, a, per_panel, to) };
                        });
                    }
                    for nb in nb0..nb1 {
                        let from = weight.panel(nb, tap, c0);
                        let b = match pairs {
                            Some(_) => from.typed::<bf16>().cast(),
                            None => wide.panel(isa, from, c1 - c0),
                        };
                        let accumulate = tap > 0 || c0 > 0;
                        rows.panels(|row, n, a| {
                            let ptr = c_panel(nb).wrapping_add((row - first) * NB);
                            let dst = Dst {
                                ptr,
                                row_stride: NB,
                                slab_stride: 16,
                                accumulate,
                            };
                            // SAFETY: the panel of A was staged above, that of B holds all channels from `c0` on, and
                            // `dst` lies in the task's scratch, which the first round (nothing added) fills.
                            unsafe {
                                let cols = weight.panel_cols(nb);
                                let (k, a) = match pairs {
                                    Some(pairs) => ((c1 - c0).div_ceil(2), paired(row, pairs)),
                                    None => (c1 - c0, a),
                                };
                                panel_of(pairs.is_some(), isa, n, cols, k, a, per_panel, b, dst);
                            };
                        });
                        if one {
                            finish(nb);
                        }
                    }
                }
            }
            if !one {
                (nb0..nb1).for_each(finish);
            }
        });
}

/// A part of a panel of weights in float32.
struct Widened {
    copy: Option<Scratch>,
    in_pairs: bool,
}

impl Widened {
    /// For so many channels at a time, or none.
    fn new(weight: &PackedConv, channels: usize) -> Self {
        let size = channels.next_multiple_of(2) * NB;
        Self {
            copy: (weight.precision() != Precision::F32 && size > 0).then(|| Scratch::take(size)),
            in_pairs: weight.in_pairs(),
        }
    }

    /// The panel itself where it is float32, else a copy, which stays to the next call.
    fn panel(&mut self, isa: Isa, panel: AnyPtr, channels: usize) -> *const f32 {
        let Some(copy) = &mut self.copy else {
            return panel.typed();
        };
        let copy = copy.ptr();
        // SAFETY: the panel has the channels, filled up to whole pairs where it is in pairs, and the copy room for them.
        unsafe {
            if self.in_pairs {
                widen_pairs(isa, panel.typed(), channels.div_ceil(2), copy);
            } else {
                widen(isa, panel, channels * NB, copy);
            }
        }
        copy
    }
}

isa_fn! {
    /// Rows (2 `n`, NB) in float32 of pairs (`n`, NB, 2).
    ///
    /// # Safety
    /// The pairs can be read at `from`, and there is room at `to`.
    fn widen_pairs = widen_pairs_body(from: *const bf16, n: usize, to: *mut f32)
}

/// # Safety
/// That of [`widen_pairs`].
#[inline(always)]
unsafe fn widen_pairs_body<S: Simd>(from: *const bf16, n: usize, to: *mut f32) {
    for i in 0..n {
        // SAFETY: pair row `i` of the `n`, and the two rows that it becomes.
        unsafe {
            let (from, to) = (from.add(i * 2 * NB), to.add(i * 2 * NB));
            for j in 0..NB {
                to.add(j).write(from.add(2 * j).read().widen());
                to.add(NB + j).write(from.add(2 * j + 1).read().widen());
            }
        }
    }
}

isa_fn! {
    /// `out[i][j] = act(c[i][j] + bias[j] + residual[i][j])` for `cols` columns; `c` has rows of [`NB`], the others of
    /// `ld`; a null residual is none.
    ///
    /// # Safety
    /// `c`, `bias` (a panel's) and, where it is not null, `residual` hold what is read; there is room at `out`.
    fn write_out = write_out_body(
        c: *const f32, rows: usize, cols: usize, bias: *const f32, residual: AnyPtr, out: AnyMut, ld: usize, act: Act,
    )
}

/// # Safety
/// That of [`write_out`], on a machine that has `S`.
#[inline(always)]
unsafe fn write_out_body<S: Simd>(
    c: *const f32,
    rows: usize,
    cols: usize,
    bias: *const f32,
    residual: AnyPtr,
    out: AnyMut,
    ld: usize,
    act: Act,
) {
    // SAFETY: the caller's promise is the same.
    unsafe {
        with_type!(out.precision, V => {
            let (out, residual) = (out.typed::<V>(), residual.address().cast::<V>());
            with_act!(act, f => write_out_with::<S, V, _>(c, rows, cols, bias, residual, out, ld, f))
        })
    }
}

/// # Safety
/// That of [`write_out`], on a machine that has `S`.
#[inline(always)]
unsafe fn write_out_with<S: Simd, V: Value, F: PointFn>(
    c: *const f32,
    rows: usize,
    cols: usize,
    bias: *const f32,
    residual: *const V,
    out: *mut V,
    ld: usize,
    f: F,
) {
    // SAFETY: whole vectors are read of `c` and the bias alone, whose rows have NB values, a multiple of all LANES; of the
    // residual's and the output's rows only the `cols` values are touched.
    unsafe {
        for i in 0..rows {
            for j in (0..cols).step_by(S::LANES) {
                let n = cols - j;
                let mut x = S::load(c.add(i * NB + j)).add(S::load(bias.add(j)));
                if !residual.is_null() {
                    x = x.add(V::load_up_to(residual.add(i * ld + j), n));
                }
                V::store_up_to(f.eval(x), out.add(i * ld + j), n);
            }
        }
    }
}
