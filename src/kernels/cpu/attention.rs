//! Attention in blocks with a running softmax: the matrix of scores is never formed.
//!
//! Both products run on the GEMM register tile. Keys and values are packed into its panels once; a task then takes a block of
//! queries of one head through all blocks of keys.

use half::bf16;
use rayon::prelude::*;

use super::act::exp;
use super::buf::{Scratch, Shared, filled};
use super::micro::{Dst, NB, SLAB, panel_of, place_of_pairs, rows_per_panel, size_of_pairs};
use super::simd::{Isa, Simd, isa_fn};
use super::values::{AnyMut, AnyPtr, Precision, Value, Values, narrow, widen, with_type};

/// Queries of a task: of more than [`FEW_KEYS`] twice as many, since all keys and values come from memory once a task (65536 keys of 512
/// values: 426 GFLOP/s with 96 queries, 461 with 192).
const QUERIES: [usize; 2] = [96, 192];
/// Keys that with their values stay in the last cache, about.
const FEW_KEYS: usize = 8192;
/// Keys between two updates of the running softmax; fixed, so that results do not depend on the machine's load.
const KEYS: usize = 256;

/// Sizes of an attention.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Batch items.
    pub b: usize,
    pub heads: usize,
    /// Queries.
    pub nq: usize,
    /// Keys and values.
    pub nk: usize,
    /// Width of a head.
    pub d: usize,
    /// Whether query i sees only keys 0..=i.
    pub causal: bool,
}

/// `softmax(q k^T * scale) v` for each head: `q` (b, nq, heads * d), `k` and `v` (b, nk, heads * d); the result is as `q`.
///
/// # Panics
/// If a length does not fit the shape, or there are no keys.
pub fn attention<V: Value>(q: &[V], k: &[V], v: &[V], shape: AttentionShape, scale: f32) -> Vec<V> {
    let AttentionShape {
        b,
        heads,
        nq,
        nk,
        d,
        ..
    } = shape;
    assert_eq!(
        q.len(),
        b * nq * heads * d,
        "the queries are (b, nq, heads * d) of {shape:?}"
    );
    assert!(
        k.len() == b * nk * heads * d && v.len() == k.len(),
        "keys and values are (b, nk, heads * d) of {shape:?}"
    );
    assert!(q.is_empty() || nk > 0, "attention needs a key");
    let isa = Isa::current();
    // Scores in pairs are scaled after they are masked by infinity.
    let in_pairs = V::PRECISION == Precision::Bf16 && isa.multiplies_pairs() && scale > 0.0;
    // Steps of the inner dimension of both products, or pairs of them.
    let steps = |n: usize| if in_pairs { n.div_ceil(2) } else { n };
    let key_len = nk.next_multiple_of(NB) * steps(d);
    let value_len = d.next_multiple_of(NB) * steps(nk);
    let (mut kp, mut vp) = (
        Scratch::take(b * heads * key_len),
        Scratch::take(b * heads * value_len),
    );
    let (kp, vp) = (Shared(kp.ptr()), Shared(vp.ptr()));
    let blocks = nk.div_ceil(KEYS);
    (0..b * heads * blocks).into_par_iter().for_each(|i| {
        let (bh, key) = (i / blocks, i % blocks * KEYS);
        let (head, ld) = (bh % heads, heads * d);
        let at = (bh / heads * nk + key) * ld + head * d;
        let n = KEYS.min(nk - key);
        // SAFETY: each task packs its own keys of its own head. Blocks are of KEYS, a multiple of NB, so that only the last
        // has a panel filled up with zeros, for which `key_len` is rounded up as `value_len` is for the columns.
        unsafe {
            let keys = kp.get().add(bh * key_len + key * steps(d));
            let values = vp.get().add(bh * value_len + steps(key) * NB);
            let panel = steps(nk) * NB;
            match (
                in_pairs,
                bf16::of_values(V::values(&k[at..])),
                bf16::of_values(V::values(&v[at..])),
            ) {
                (true, Some(k), Some(v)) => {
                    pair_keys(k, ld, n, d, keys.cast());
                    pair_values(v, ld, n, d, values.cast(), 2 * panel);
                }
                _ => {
                    pack_keys(isa, V::values(&k[at..]), ld, n, d, keys);
                    pack_values(isa, V::values(&v[at..]), ld, n, d, values, panel);
                }
            }
        }
    });
    let threads = rayon::current_num_threads();
    let queries = QUERIES[usize::from(nk > FEW_KEYS)];
    let mut per_head = nq.div_ceil(queries);
    if b * heads * per_head < 4 * threads {
        per_head = (4 * threads)
            .div_ceil(b * heads)
            .min(nq.div_ceil(24))
            .max(per_head);
    }
    let step = nq.div_ceil(per_head.max(1)).max(1);
    let run = |out: Shared<V>| {
        let out = AnyMut::new(out.get());
        (0..b * heads * per_head)
            .into_par_iter()
            .with_max_len(1)
            .for_each(|i| {
                let (bh, q0) = (i / per_head, i % per_head * step);
                let q1 = nq.min(q0 + step);
                if q0 < q1 {
                    let kp = kp.get().wrapping_add(bh * key_len);
                    let vp = vp.get().wrapping_add(bh * value_len);
                    let task = Task {
                        isa,
                        shape,
                        scale,
                        in_pairs,
                        bh,
                        q0,
                        q1,
                    };
                    // SAFETY: the keys and values of this head were packed above; no other task has these queries.
                    unsafe { task.run(V::values(q), kp, vp, out) };
                }
            });
    };
    // SAFETY: the tasks write every query of every head.
    unsafe { filled(q.len(), run) }
}

/// Packs `n` keys (rows of `k`, `ld` apart) as panels (n / NB, d, NB), zeros for those missing in the last.
///
/// # Safety
/// There is room for the panels at `to`.
unsafe fn pack_keys(isa: Isa, k: Values, ld: usize, n: usize, d: usize, to: *mut f32) {
    let mut row = vec![0f32; d];
    for key in 0..n.next_multiple_of(NB) {
        let to = to.wrapping_add(key / NB * d * NB + key % NB);
        if key < n {
            let from = k.part(key * ld..key * ld + d).from(0);
            // SAFETY: both have `d` values.
            unsafe { widen(isa, from, d, row.as_mut_ptr()) };
        } else {
            row.fill(0.0);
        }
        for (i, &x) in row.iter().enumerate() {
            // SAFETY: column `key % NB` of row i of its panel.
            unsafe { *to.add(i * NB) = x };
        }
    }
}

/// Packs `n` values (rows of `v`, `ld` apart) as rows of panels (d / NB, all keys, NB), `panel` apart.
///
/// # Safety
/// There is room for the rows in each panel at `to`.
unsafe fn pack_values(
    isa: Isa,
    v: Values,
    ld: usize,
    n: usize,
    d: usize,
    to: *mut f32,
    panel: usize,
) {
    for j in (0..d).step_by(NB) {
        let cols = NB.min(d - j);
        for key in 0..n {
            // SAFETY: row `key` of panel `j / NB`, all of its NB columns, of which the last panel has `cols` in use.
            unsafe {
                let to = to.add(j / NB * panel + key * NB);
                let from = v.part(key * ld + j..key * ld + j + cols).from(0);
                widen(isa, from, cols, to);
                to.add(cols).write_bytes(0, NB - cols);
            }
        }
    }
}

/// As [`pack_keys`], the values of a key in pairs: panels (n / NB, d / 2, NB, 2), a zero behind an odd last one.
///
/// # Safety
/// There is room for the panels at `to`.
unsafe fn pair_keys(k: &[bf16], ld: usize, n: usize, d: usize, to: *mut bf16) {
    let whole = d.next_multiple_of(2);
    for key in 0..n.next_multiple_of(NB) {
        let to = to.wrapping_add(key / NB * whole * NB + 2 * (key % NB));
        for i in 0..whole {
            let x = if key < n && i < d {
                k[key * ld + i]
            } else {
                bf16::ZERO
            };
            // SAFETY: column `key % NB` of pair `i / 2` of its panel.
            unsafe { *to.add(i / 2 * 2 * NB + i % 2) = x };
        }
    }
}

/// As [`pack_values`], two keys in a pair: rows of panels (d / NB, all keys / 2, NB, 2), zeros for the key that an odd last pair lacks.
///
/// # Safety
/// There is room for the rows in each panel at `to`.
unsafe fn pair_values(v: &[bf16], ld: usize, n: usize, d: usize, to: *mut bf16, panel: usize) {
    for j in 0..d.next_multiple_of(NB) {
        let to = to.wrapping_add(j / NB * panel + 2 * (j % NB));
        for key in 0..n.next_multiple_of(2) {
            let x = if key < n && j < d {
                v[key * ld + j]
            } else {
                bf16::ZERO
            };
            // SAFETY: column `j % NB` of pair `key / 2` of its panel.
            unsafe { *to.add(key / 2 * 2 * NB + key % 2) = x };
        }
    }
}

/// The running softmax of a query.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f32,
}

/// A block of queries of one head.
struct Task {
    isa: Isa,
    shape: AttentionShape,
    scale: f32,
    /// Whether keys and values are bfloat16 in pairs, as queries and weights then are.
    in_pairs: bool,
    bh: usize,
    q0: usize,
    q1: usize,
}

impl Task {
    /// Steps of the inner dimension, or pairs of them.
    fn steps(&self, n: usize) -> usize {
        if self.in_pairs { n.div_ceil(2) } else { n }
    }

    /// # Safety
    /// `kp` and `vp` hold the head's panels of keys and values, all `nk`; `q` is (b, nq, heads * d), `out` has room for as
    /// much, and nobody else uses this task's queries of this head there.
    unsafe fn run(&self, q: Values, kp: *const f32, vp: *const f32, out: AnyMut) {
        let (
            isa,
            AttentionShape {
                heads,
                nq,
                nk,
                d,
                causal,
                ..
            },
        ) = (self.isa, self.shape);
        let (n, ld) = (self.q1 - self.q0, heads * d);
        let r = rows_per_panel(isa, n);
        let panels = n.div_ceil(r);
        let block = KEYS.min(nk.next_multiple_of(NB));
        let (q_panel, p_panel, weights_panel) = if self.in_pairs {
            (size_of_pairs(d, r), block * r, size_of_pairs(block, r))
        } else {
            (d.div_ceil(SLAB) * r * SLAB, block * r, 0)
        };
        let o_panel = n * NB;
        let mut qs = Scratch::take(panels * q_panel);
        let mut ps = Scratch::take(panels * p_panel);
        let mut os = Scratch::take(d.div_ceil(NB) * o_panel);
        let mut weights = Scratch::take(panels * weights_panel);
        let mut state = vec![
            Running {
                max: f32::NEG_INFINITY,
                sum: 0.0,
            };
            n
        ];
        let (qs, ps, os, weights) = (qs.ptr(), ps.ptr(), os.ptr(), weights.ptr());
        let first = (self.bh / heads * nq + self.q0) * ld + self.bh % heads * d;
        // SAFETY: queries q0..q1 of the head lie inside `q`, `d` values of rows `ld` apart; there is room in `qs` for their
        // panels, in slabs of 16.
        unsafe {
            let from = q.from(first);
            for i in 0..n {
                let (panel, from) = (qs.add(i / r * q_panel), from.at(i * ld));
                if self.in_pairs {
                    pair_query(from.typed(), d, panel.cast(), i % r, r);
                } else {
                    let to = panel.add(i % r * SLAB);
                    scale_query(isa, from, self.scale, d, to, r * SLAB);
                }
            }
        }
        let end = if causal { nk.min(self.q1) } else { nk };
        for key in (0..end).step_by(KEYS) {
            let keys = KEYS.min(end - key);
            for g in 0..panels {
                let rows = r.min(n - g * r);
                let p = ps.wrapping_add(g * p_panel);
                for j in (0..keys).step_by(NB) {
                    let ptr = p.wrapping_add(j / SLAB * r * SLAB);
                    let dst = Dst {
                        ptr,
                        row_stride: SLAB,
                        slab_stride: r * SLAB,
                        accumulate: false,
                    };
                    let k = self.steps(d);
                    let (a, b) = (qs.wrapping_add(g * q_panel), kp.wrapping_add((key + j) * k));
                    // SAFETY: `a` is the panel of queries packed above, `b` that of NB keys; `p` has room for a block of keys
                    // rounded up to a panel, as KEYS is a multiple of NB.
                    unsafe {
                        panel_of(self.in_pairs, isa, rows, NB.min(keys - j), k, a, r, b, dst)
                    };
                }
                for m in 0..rows {
                    let query = g * r + m;
                    let seen = if causal {
                        keys.min((self.q0 + query + 1).saturating_sub(key))
                    } else {
                        keys
                    };
                    let o = os.wrapping_add(query * NB);
                    // SAFETY: the row's scores of `keys` keys were written above, up to a whole slab; `o` holds the query's
                    // sums after the first block, and before it none is rescaled.
                    unsafe {
                        let rescale = if key == 0 { 0 } else { d.div_ceil(NB) };
                        // Queries in pairs are as they were.
                        let scale = if self.in_pairs { self.scale } else { 1.0 };
                        softmax_row(
                            isa,
                            p.add(m * SLAB),
                            r * SLAB,
                            scale,
                            seen,
                            keys,
                            &mut state[query],
                            o,
                            o_panel,
                            rescale,
                        );
                        if self.in_pairs {
                            let to = weights.add(g * weights_panel).cast();
                            pair_weights(isa, p.add(m * SLAB), r, keys, to, m);
                        }
                    }
                }
            }
            for j in (0..d).step_by(NB) {
                for g in 0..panels {
                    let ptr = os.wrapping_add(j / NB * o_panel + g * r * NB);
                    let dst = Dst {
                        ptr,
                        row_stride: NB,
                        slab_stride: SLAB,
                        accumulate: key > 0,
                    };
                    let a = if self.in_pairs {
                        weights.wrapping_add(g * weights_panel)
                    } else {
                        ps.wrapping_add(g * p_panel)
                    };
                    let row = j / NB * self.steps(nk) + self.steps(key);
                    let (b, k) = (vp.wrapping_add(row * NB), self.steps(keys));
                    // SAFETY: `a` is the panel of this block's weights, zero where a key is not seen; `b` the rows of the
                    // block's values; `os` has a panel (n, NB) for each NB columns, numbers in it after the first block.
                    unsafe {
                        panel_of(
                            self.in_pairs,
                            isa,
                            r.min(n - g * r),
                            NB.min(d - j),
                            k,
                            a,
                            r,
                            b,
                            dst,
                        )
                    };
                }
            }
        }
        for (i, Running { sum, .. }) in state.into_iter().enumerate() {
            // SAFETY: the sums of query i lie NB to a panel, `o_panel` apart; of its row of `out` only the head's `d` values are
            // written, by this task alone.
            unsafe {
                let (from, to) = (os.add(i * NB), out.at(first + i * ld));
                scale_result(isa, from, o_panel, 1.0 / sum, d, to);
            }
        }
    }
}

isa_fn! {
    /// Multiplies a query of `d` values and writes it in slabs of 16, `to_stride` apart.
    ///
    /// # Safety
    /// They can be read at `from` and written at `to`.
    fn scale_query = scale_query_body(from: AnyPtr, factor: f32, d: usize, to: *mut f32, to_stride: usize)
}

/// # Safety
/// That of [`scale_query`], on a machine that has `S`.
#[inline(always)]
unsafe fn scale_query_body<S: Simd>(
    from: AnyPtr,
    factor: f32,
    d: usize,
    to: *mut f32,
    to_stride: usize,
) {
    // SAFETY: a vector ends with its slab, as 16 is a multiple of all LANES, and the last with value `d`.
    unsafe {
        with_type!(from.precision, V => {
            let (from, factor) = (from.typed::<V>(), S::splat(factor));
            for j in (0..d).step_by(S::LANES) {
                let to = to.add(j / SLAB * to_stride + j % SLAB);
                let x = V::load_up_to::<S>(from.add(j), d - j);
                x.mul(factor).store_up_to(to, d - j);
            }
        })
    }
}

isa_fn! {
    /// Multiplies a result of `d` values, which lies in rows of [`NB`], `from_stride` apart, and writes it.
    ///
    /// # Safety
    /// They can be read at `from` and written at `to`.
    fn scale_result = scale_result_body(from: *const f32, from_stride: usize, factor: f32, d: usize, to: AnyMut)
}

/// # Safety
/// That of [`scale_result`], on a machine that has `S`.
#[inline(always)]
unsafe fn scale_result_body<S: Simd>(
    from: *const f32,
    from_stride: usize,
    factor: f32,
    d: usize,
    to: AnyMut,
) {
    // SAFETY: a vector ends with its row, as NB is a multiple of all LANES, and the last with value `d`.
    unsafe {
        with_type!(to.precision, V => {
            let (to, factor) = (to.typed::<V>(), S::splat(factor));
            for j in (0..d).step_by(S::LANES) {
                let from = from.add(j / NB * from_stride + j % NB);
                let x = S::load_up_to(from, d - j).mul(factor);
                V::store_up_to(x, to.add(j), d - j);
            }
        })
    }
}

/// Copies a query of `d` values to row `row` of a panel of pairs, with a zero behind an odd last one.
///
/// # Safety
/// They can be read at `from`, and the panel, made for `r` rows, has room at `to`.
unsafe fn pair_query(from: *const bf16, d: usize, to: *mut bf16, row: usize, r: usize) {
    for i in (0..d).step_by(2 * SLAB) {
        // SAFETY: a slab of the row, of which `d - i` values are left.
        unsafe {
            let to = to.add(place_of_pairs(row, i, r));
            to.copy_from_nonoverlapping(from.add(i), (2 * SLAB).min(d - i));
        }
    }
    if d % 2 == 1 {
        // SAFETY: the last pair's second value.
        unsafe { to.add(place_of_pairs(row, d, r)).write(bf16::ZERO) };
    }
}

/// Rounds a row of weights of `keys` keys, in slabs of 16 that a panel of `r` rows has, to row `row` of a panel of pairs.
///
/// # Safety
/// The slabs, the last one whole, can be read at `p`, and the panel has room at `to`.
unsafe fn pair_weights(isa: Isa, p: *const f32, r: usize, keys: usize, to: *mut bf16, row: usize) {
    for i in (0..keys).step_by(SLAB) {
        // SAFETY: slab `i / 16` of both; behind the last key there are zeros.
        unsafe {
            let from = p.add(i / SLAB * r * SLAB);
            narrow(
                isa,
                from,
                SLAB,
                AnyMut::new(to.add(place_of_pairs(row, i, r))),
            );
        }
    }
}

isa_fn! {
    /// Turns a row of scores, times `scale`, into `exp(score - running maximum)`: slabs of 16 at `p`, `slab_stride` apart, of which the first
    /// `seen` count and the rest up to `keys` become 0. Updates `state`, and where the
    /// maximum rises multiplies the `panels` rows of [`NB`] values at `o`, `o_stride` apart.
    ///
    /// # Safety
    /// The slabs of `keys` scores, the last one whole, and the rows at `o` can be read and written.
    fn softmax_row = softmax_row_body(
        p: *mut f32, slab_stride: usize, scale: f32, seen: usize, keys: usize, state: &mut Running, o: *mut f32, o_stride: usize,
        panels: usize,
    )
}

/// # Safety
/// That of [`softmax_row`], on a machine that has `S`.
#[inline(always)]
unsafe fn softmax_row_body<S: Simd>(
    p: *mut f32,
    slab_stride: usize,
    scale: f32,
    seen: usize,
    keys: usize,
    state: &mut Running,
    o: *mut f32,
    o_stride: usize,
    panels: usize,
) {
    // SAFETY: `at` gives places up to `keys` rounded up to a slab, in which vectors, SLAB being a multiple of all LANES, stay;
    // those at `o` stay in rows of NB.
    unsafe {
        let at = |i: usize| p.add(i / SLAB * slab_stride + i % SLAB);
        for i in seen..keys.next_multiple_of(SLAB) {
            *at(i) = f32::NEG_INFINITY;
        }
        if seen == 0 {
            for i in (0..keys).step_by(S::LANES) {
                S::splat(0.0).store(at(i));
            }
            return;
        }
        let (mut top, scale) = (S::splat(state.max), S::splat(scale));
        for i in (0..seen).step_by(S::LANES) {
            top = top.max(S::load(at(i)).mul(scale));
        }
        let max = top.to_array()[..S::LANES]
            .iter()
            .fold(f32::NEG_INFINITY, |a, &x| a.max(x));
        if max > state.max {
            if panels > 0 {
                let factor = exp(S::splat(state.max - max));
                state.sum *= factor.to_array()[0];
                for j in 0..panels {
                    for l in (0..NB).step_by(S::LANES) {
                        let o = o.add(j * o_stride + l);
                        S::load(o).mul(factor).store(o);
                    }
                }
            }
            state.max = max;
        }
        let (m, mut sum) = (S::splat(max), S::splat(0.0));
        for i in (0..keys).step_by(S::LANES) {
            let x = at(i);
            let e = if i < seen {
                exp(S::load(x).mul(scale).sub(m))
            } else {
                S::splat(0.0)
            };
            sum = sum.add(e);
            e.store(x);
        }
        state.sum += sum.to_array()[..S::LANES].iter().sum::<f32>();
    }
}
