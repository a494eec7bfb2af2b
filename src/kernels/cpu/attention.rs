//! Attention in blocks with a running softmax: the matrix of scores is never formed.
//!
//! Both products run on the GEMM register tile, the other way around: scores are keys times queries, so that a vector holds one key's scores of
//! many queries. Maxima and sums are then those of vectors, no lane is added to another, and a head's width, which is rows of the second product,
//! need not be a multiple of a vector (40 channels would else cost as much as 48). Keys and values are packed once; a task takes a block of
//! queries of one head through all blocks of keys.

use half::bf16;
use rayon::prelude::*;

use super::act::exp2_of_negative;
use super::buf::{Scratch, Shared, filled};
use super::micro::{
    Dst, NB, SLAB, max_rows, panel_of, place_of_pairs, rows_per_panel, size_of_pairs,
};
use super::simd::{Isa, MOST_LANES, Simd, isa_fn};
use super::values::{AnyMut, AnyPtr, Precision, Value, Values, with_type};

/// Queries of a task, multiples of [`NB`]: of more than [`FEW_KEYS`] twice as many, since all keys and values come from memory once a task (65536
/// keys of 512 values: 426 GFLOP/s with 96 queries, 461 with 192).
const QUERIES: [usize; 2] = [96, 192];
/// Keys that with their values stay in the last cache, about.
const FEW_KEYS: usize = 8192;
/// Keys between two updates of the running softmax: fixed, so that results do not depend on the machine's load, whole panels of every
/// instruction set's rows, whole slabs, and few enough that their scores of [`NB`] queries stay in the first cache.
const KEYS: usize = 192;

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
    // Scores in pairs are scaled after the largest is found.
    let in_pairs = V::PRECISION == Precision::Bf16 && isa.multiplies_pairs() && scale > 0.0;
    let packing = Packing::new(isa, shape, in_pairs);
    let (key_len, value_len) = (packing.keys_len(), packing.values_len());
    let (mut kp, mut vp) = (
        Scratch::take(b * heads * key_len),
        Scratch::take(b * heads * value_len),
    );
    let (kp, vp) = (Shared(kp.ptr()), Shared(vp.ptr()));
    let blocks = nk.div_ceil(KEYS);
    (0..b * heads * blocks).into_par_iter().for_each(|i| {
        let (bh, key) = (i / blocks, i % blocks * KEYS);
        let at = (bh / heads * nk + key) * heads * d + bh % heads * d;
        let n = KEYS.min(nk - key);
        // SAFETY: each task packs its own keys of its own head, whose panels and slabs are whole, as KEYS is of whole ones.
        unsafe {
            let keys = kp.get().add(bh * key_len);
            let values = vp.get().add(bh * value_len);
            packing.keys(V::values(&k[at..]), key, n, keys);
            packing.values(V::values(&v[at..]), key, n, values);
        }
    });
    let threads = rayon::current_num_threads();
    let queries = QUERIES[usize::from(nk > FEW_KEYS)];
    let mut per_head = nq.div_ceil(queries);
    if b * heads * per_head < 4 * threads {
        per_head = (4 * threads)
            .div_ceil(b * heads)
            .min(nq.div_ceil(NB))
            .max(per_head);
    }
    let step = nq.div_ceil(per_head.max(1)).next_multiple_of(NB).max(NB);
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
                        packing,
                        scale,
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

/// The most rows of a panel of A that [`KEYS`] has whole panels of.
fn whole_rows(isa: Isa) -> usize {
    let mut rows = max_rows(isa);
    while !KEYS.is_multiple_of(rows) {
        rows -= 1;
    }
    rows
}

/// How keys and values of a head lie: both as panels of A, keys as its rows with their channels as steps, values with their channels as
/// rows and the keys as steps.
#[derive(Clone, Copy)]
struct Packing {
    isa: Isa,
    shape: AttentionShape,
    /// Whether both are bfloat16 in pairs of steps, as queries and weights then are.
    in_pairs: bool,
    /// Keys to a panel.
    key_rows: usize,
    /// Channels to a panel of values.
    channel_rows: usize,
}

impl Packing {
    fn new(isa: Isa, shape: AttentionShape, in_pairs: bool) -> Self {
        let AttentionShape { nk, d, .. } = shape;
        // Where there is more than one block, each is of whole panels.
        let key_rows = if nk > KEYS {
            whole_rows(isa)
        } else {
            rows_per_panel(isa, nk)
        };
        Self {
            isa,
            shape,
            in_pairs,
            key_rows,
            channel_rows: rows_per_panel(isa, d),
        }
    }

    /// Steps of the inner dimension, or pairs of them.
    fn steps(&self, n: usize) -> usize {
        if self.in_pairs { n.div_ceil(2) } else { n }
    }

    /// Values of f32 that a panel of A of `rows` rows takes.
    fn panel(&self, steps: usize, rows: usize) -> usize {
        if self.in_pairs {
            size_of_pairs(steps, rows)
        } else {
            steps.div_ceil(SLAB) * rows * SLAB
        }
    }

    fn keys_panel(&self) -> usize {
        self.panel(self.shape.d, self.key_rows)
    }

    fn keys_len(&self) -> usize {
        self.shape.nk.div_ceil(self.key_rows) * self.keys_panel()
    }

    /// Of the values of a block, which lie together.
    fn values_panel(&self) -> usize {
        self.panel(KEYS.min(self.shape.nk), self.channel_rows)
    }

    fn values_block(&self) -> usize {
        self.shape.d.div_ceil(self.channel_rows) * self.values_panel()
    }

    fn values_len(&self) -> usize {
        self.shape.nk.div_ceil(KEYS) * self.values_block()
    }

    /// Where the values of the block that begins with key `key` are.
    fn values_from(&self, key: usize) -> usize {
        key / KEYS * self.values_block()
    }

    /// Writes `rows` rows of a panel of A, which is packed for `r`, times `cols` columns of a panel of B to rows of [`NB`], or adds it.
    ///
    /// # Safety
    /// Both panels hold so many steps, `to` has room for the rows, and numbers where it is added to.
    unsafe fn product(
        &self,
        (a, r, rows): (*const f32, usize, usize),
        (b, cols): (*const f32, usize),
        steps: usize,
        to: *mut f32,
        accumulate: bool,
    ) {
        let dst = Dst {
            ptr: to,
            row_stride: NB,
            slab_stride: SLAB,
            accumulate,
        };
        // SAFETY: the caller's promise is the same.
        unsafe { panel_of(self.in_pairs, self.isa, rows, cols, steps, a, r, b, dst) };
    }

    /// Packs `n` keys from number `key` on, rows of `k`.
    ///
    /// # Safety
    /// There is room for all keys at `to`.
    unsafe fn keys(&self, k: Values, key: usize, n: usize, to: *mut f32) {
        let AttentionShape { heads, d, .. } = self.shape;
        let (r, ld) = (self.key_rows, heads * d);
        for i in 0..n {
            let row = (key + i) % r;
            // SAFETY: row `row` of its panel, `d` steps in slabs.
            unsafe {
                let panel = to.add((key + i) / r * self.keys_panel());
                let from = k.part(i * ld..i * ld + d).from(0);
                if self.in_pairs {
                    pair_row(from.typed(), d, panel.cast(), row, r);
                } else {
                    spread(self.isa, from, d, panel.add(row * SLAB), r * SLAB);
                }
            }
        }
    }

    /// Packs `n` values of the keys from number `key`, a multiple of [`KEYS`], on, rows of `v`.
    ///
    /// # Safety
    /// There is room for all values at `to`.
    unsafe fn values(&self, v: Values, key: usize, n: usize, to: *mut f32) {
        let AttentionShape { heads, d, .. } = self.shape;
        let (r, ld) = (self.channel_rows, heads * d);
        // SAFETY: as many rows of `v` as there are keys, whose `d` values are there; each channel's steps are in the slabs of its
        // panel, the last of which is whole.
        unsafe {
            let from = v.part(0..(n - 1) * ld + d).from(0);
            let to = to.add(self.values_from(key));
            if self.in_pairs {
                let from: *const bf16 = from.typed();
                for channel in 0..d {
                    let panel: *mut bf16 = to.add(channel / r * self.values_panel()).cast();
                    for i in 0..n.next_multiple_of(2) {
                        let x = if i < n {
                            from.add(i * ld + channel).read()
                        } else {
                            bf16::ZERO
                        };
                        panel.add(place_of_pairs(channel % r, i, r)).write(x);
                    }
                }
                return;
            }
            for i in (0..n).step_by(SLAB) {
                let slab = Turned {
                    to: to.add(i / SLAB * r * SLAB),
                    group: r,
                    group_stride: self.values_panel(),
                    stride: SLAB,
                    width: SLAB,
                };
                turn(self.isa, from.at(i * ld), ld, SLAB.min(n - i), d, 1.0, slab);
            }
        }
    }
}

/// Places of rows that become columns: those of column `c` lie in a row, which is as long as `width`, at
/// `c / group * group_stride + c % group * stride`.
#[derive(Clone, Copy)]
struct Turned {
    to: *mut f32,
    group: usize,
    group_stride: usize,
    stride: usize,
    width: usize,
}

impl Turned {
    /// # Safety
    /// The place is there.
    #[inline(always)]
    unsafe fn column(&self, column: usize) -> *mut f32 {
        let at = column / self.group * self.group_stride + column % self.group * self.stride;
        // SAFETY: the caller's promise is the same.
        unsafe { self.to.add(at) }
    }
}

/// A block of queries of one head.
struct Task {
    packing: Packing,
    scale: f32,
    bh: usize,
    q0: usize,
    q1: usize,
}

/// What [`NB`] queries have come to, a place each: the largest score and the sum of weights, and of the channels (d, NB) the sums of values.
struct Running {
    max: *mut f32,
    sum: *mut f32,
    values: *mut f32,
}

impl Task {
    /// # Safety
    /// `kp` and `vp` hold the head's keys and values as they are packed; `q` is (b, nq, heads * d), `out` has room for as
    /// much, and nobody else uses this task's queries of this head there.
    unsafe fn run(&self, q: Values, kp: *const f32, vp: *const f32, out: AnyMut) {
        let Packing {
            isa,
            shape,
            in_pairs,
            ..
        } = self.packing;
        let AttentionShape {
            heads,
            nq,
            nk,
            d,
            causal,
            ..
        } = shape;
        let (n, ld) = (self.q1 - self.q0, heads * d);
        let panels = n.div_ceil(NB);
        let q_panel = self.packing.steps(d) * NB;
        let weights_len = if in_pairs { KEYS / 2 * NB } else { 0 };
        let mut qs = Scratch::take(panels * q_panel);
        let mut scores = Scratch::take(KEYS * NB + weights_len);
        let mut state = Scratch::take(panels * (d + 2) * NB);
        let (qs, scores, state) = (qs.ptr(), scores.ptr(), state.ptr());
        let weights = scores.wrapping_add(KEYS * NB);
        let running = |g: usize| {
            let at = state.wrapping_add(g * (d + 2) * NB);
            Running {
                max: at,
                sum: at.wrapping_add(NB),
                values: at.wrapping_add(2 * NB),
            }
        };
        let first = (self.bh / heads * nq + self.q0) * ld + self.bh % heads * d;
        // Scores are in powers of two.
        let scale = self.scale * std::f32::consts::LOG2_E;
        let queries = |g: usize| NB.min(n - g * NB);
        for g in 0..panels {
            let panel = qs.wrapping_add(g * q_panel);
            // SAFETY: these queries of the head lie inside `q`, `d` values of rows `ld` apart; there is room in `qs` for their panel
            // and in `state` for what they come to.
            unsafe {
                let from = q.from(first).at(g * NB * ld);
                if in_pairs {
                    pair_queries(from.typed(), ld, queries(g), d, panel.cast());
                } else {
                    let to = Turned {
                        to: panel,
                        group: d,
                        group_stride: 0,
                        stride: NB,
                        width: NB,
                    };
                    turn(isa, from, ld, queries(g), d, scale, to);
                }
                for i in 0..NB {
                    running(g).max.add(i).write(f32::NEG_INFINITY);
                    running(g).sum.add(i).write(0.0);
                }
            }
        }
        let end = if causal { nk.min(self.q1) } else { nk };
        for key in (0..end).step_by(KEYS) {
            let keys = KEYS.min(end - key);
            for g in 0..panels {
                let cols = queries(g);
                // SAFETY: `qs` has this panel's queries, `kp` and `vp` all keys and values, `scores` room for those of a block, and
                // `state` what the panel has come to, after the first block values too.
                unsafe {
                    self.scores(kp, key, keys, qs.wrapping_add(g * q_panel), cols, scores);
                    if causal {
                        mask(key, keys, self.q0 + g * NB, scores);
                    }
                    let factor = if in_pairs { scale } else { 1.0 };
                    softmax(isa, scores, keys, cols, factor, d, key == 0, &running(g));
                    let weights = if in_pairs {
                        pair_weights(isa, scores, keys, weights.cast());
                        weights
                    } else {
                        scores
                    };
                    self.add_values(vp, key, keys, weights, cols, running(g).values);
                }
            }
        }
        for g in 0..panels {
            // SAFETY: all that the panel came to; of its queries' rows of `out` only the head's `d` values are written, by this task alone.
            unsafe {
                let to = out.at(first + g * NB * ld);
                write_results(isa, &running(g), queries(g), d, to, ld);
            }
        }
    }

    /// Scores of `keys` keys from number `key` on and `cols` queries: (keys, NB).
    ///
    /// # Safety
    /// `kp` holds the keys, `queries` a panel of B (d, NB), `to` has room for the scores.
    unsafe fn scores(
        &self,
        kp: *const f32,
        key: usize,
        keys: usize,
        queries: *const f32,
        cols: usize,
        to: *mut f32,
    ) {
        let packing = &self.packing;
        let (r, steps) = (packing.key_rows, packing.steps(packing.shape.d));
        for row in (0..keys).step_by(r) {
            let a = kp.wrapping_add((key + row) / r * packing.keys_panel());
            let (rows, to) = (r.min(keys - row), to.wrapping_add(row * NB));
            // SAFETY: a panel of A of this block's keys, as blocks are of whole panels.
            unsafe { packing.product((a, r, rows), (queries, cols), steps, to, false) };
        }
    }

    /// Adds the values of these keys by their weights (keys, NB) to (d, NB), which are set where these are the first.
    ///
    /// # Safety
    /// `vp` holds the values, `weights` a panel of B, `to` room for the sums, and after the first block numbers.
    unsafe fn add_values(
        &self,
        vp: *const f32,
        key: usize,
        keys: usize,
        weights: *const f32,
        cols: usize,
        to: *mut f32,
    ) {
        let packing = &self.packing;
        let (r, d) = (packing.channel_rows, packing.shape.d);
        for channel in (0..d).step_by(r) {
            let panel = vp.wrapping_add(channel / r * packing.values_panel());
            let a = panel.wrapping_add(packing.values_from(key));
            let (rows, to) = (r.min(d - channel), to.wrapping_add(channel * NB));
            let (steps, again) = (packing.steps(keys), key > 0);
            // SAFETY: the slabs of this block of a panel of A of values, which begins at one.
            unsafe { packing.product((a, r, rows), (weights, cols), steps, to, again) };
        }
    }
}

/// Hides keys from the queries before them: scores (keys, NB) of the keys from `key` and the queries from `query` on.
///
/// # Safety
/// The scores can be written.
unsafe fn mask(key: usize, keys: usize, query: usize, scores: *mut f32) {
    for i in 0..keys {
        let seen_from = (key + i).saturating_sub(query).min(NB);
        for lane in 0..seen_from {
            // SAFETY: lane `lane` of key `i`.
            unsafe { scores.add(i * NB + lane).write(f32::NEG_INFINITY) };
        }
    }
}

isa_fn! {
    /// Widens a row of `d` values and writes it in slabs of 16, `to_stride` apart.
    ///
    /// # Safety
    /// They can be read at `from` and written at `to`.
    fn spread = spread_body(from: AnyPtr, d: usize, to: *mut f32, to_stride: usize)
}

/// # Safety
/// That of [`spread`], on a machine that has `S`.
#[inline(always)]
unsafe fn spread_body<S: Simd>(from: AnyPtr, d: usize, to: *mut f32, to_stride: usize) {
    // SAFETY: a vector ends with its slab, as 16 is a multiple of all LANES, and the last with value `d`.
    unsafe {
        with_type!(from.precision, V => {
            let from = from.typed::<V>();
            for j in (0..d).step_by(S::LANES) {
                let to = to.add(j / SLAB * to_stride + j % SLAB);
                V::load_up_to::<S>(from.add(j), d - j).store_up_to(to, d - j);
            }
        })
    }
}

isa_fn! {
    /// Turns `n` rows of `d` values, `ld` apart and times `factor`, into columns, zeros for rows up to `to.width`.
    ///
    /// # Safety
    /// The rows can be read at `from`, and there is room for `d` rows of `to.width`, a multiple of 16, where `to` says.
    fn turn = turn_body(from: AnyPtr, ld: usize, n: usize, d: usize, factor: f32, to: Turned)
}

/// # Safety
/// That of [`turn`], on a machine that has `S`.
#[inline(always)]
unsafe fn turn_body<S: Simd>(from: AnyPtr, ld: usize, n: usize, d: usize, factor: f32, to: Turned) {
    // SAFETY: squares of a vector's lanes, of which rows that there are and values that they have are read, and columns below `d` written.
    unsafe {
        let (mut square, mut turned) = ([0f32; SQUARE], [0f32; SQUARE]);
        let factor = S::splat(factor);
        for row in (0..to.width).step_by(S::LANES) {
            for column in (0..d).step_by(S::LANES) {
                with_type!(from.precision, V => {
                    for i in 0..S::LANES {
                        let x = if row + i < n {
                            let from = from.typed::<V>().add((row + i) * ld + column);
                            V::load_up_to::<S>(from, d - column).mul(factor)
                        } else {
                            S::splat(0.0)
                        };
                        x.store(square.as_mut_ptr().add(i * S::LANES));
                    }
                });
                S::transpose(square.as_ptr(), S::LANES, turned.as_mut_ptr());
                for i in 0..S::LANES.min(d - column) {
                    let x = S::load(turned.as_ptr().add(i * S::LANES));
                    x.store(to.column(column + i).add(row));
                }
            }
        }
    }
}

/// Values of the largest square of a vector's lanes.
const SQUARE: usize = MOST_LANES * MOST_LANES;

isa_fn! {
    /// Turns scores (keys, NB) of `cols` queries, in powers of two once they are multiplied by `factor`, which is positive, into weights, `2^(score - largest so far)`, and
    /// brings what was summed before to the new largest; there is nothing yet where this `is_first`.
    ///
    /// # Safety
    /// The scores and what the queries have come to, with `d` channels, can be read and written.
    fn softmax = softmax_body(
        scores: *mut f32, keys: usize, cols: usize, factor: f32, d: usize, is_first: bool, running: &Running,
    )
}

/// # Safety
/// That of [`softmax`], on a machine that has `S`.
#[inline(always)]
unsafe fn softmax_body<S: Simd>(
    scores: *mut f32,
    keys: usize,
    cols: usize,
    factor: f32,
    d: usize,
    is_first: bool,
    running: &Running,
) {
    // SAFETY: vectors of the NB lanes of each key and channel, NB being a multiple of all LANES.
    unsafe {
        let factor = S::splat(factor);
        for lane in (0..cols).step_by(S::LANES) {
            let at = |key: usize| scores.add(key * NB + lane);
            // Four at a time, as one after the other would wait for each other.
            let mut tops = [S::splat(f32::NEG_INFINITY); 4];
            let whole = keys / 4 * 4;
            for key in (0..whole).step_by(4) {
                for i in 0..4 {
                    tops[i] = tops[i].max(S::load(at(key + i)));
                }
            }
            for key in whole..keys {
                tops[0] = tops[0].max(S::load(at(key)));
            }
            let top = tops[0].max(tops[1]).max(tops[2].max(tops[3]));
            let before = S::load(running.max.add(lane));
            let top = before.max(top.mul(factor));
            let below = top.mul(S::splat(-1.0));
            let mut sums = [S::splat(0.0); 4];
            for key in (0..whole).step_by(4) {
                for i in 0..4 {
                    let weight = exp2_of_negative(S::load(at(key + i)).mul_add(factor, below));
                    sums[i] = sums[i].add(weight);
                    weight.store(at(key + i));
                }
            }
            for key in whole..keys {
                let weight = exp2_of_negative(S::load(at(key)).mul_add(factor, below));
                sums[0] = sums[0].add(weight);
                weight.store(at(key));
            }
            let mut sum = sums[0].add(sums[1]).add(sums[2].add(sums[3]));
            if !is_first {
                let shrunk = exp2_of_negative(before.sub(top));
                sum = S::load(running.sum.add(lane)).mul_add(shrunk, sum);
                if before.to_array() != top.to_array() {
                    for channel in 0..d {
                        let at = running.values.add(channel * NB + lane);
                        S::load(at).mul(shrunk).store(at);
                    }
                }
            }
            top.store(running.max.add(lane));
            sum.store(running.sum.add(lane));
        }
    }
}

isa_fn! {
    /// Divides the sums of values of `n` queries by those of their weights, and writes them as rows of `d` values, `ld` apart.
    ///
    /// # Safety
    /// What the queries have come to can be read, and the rows can be written at `to`.
    fn write_results = write_results_body(running: &Running, n: usize, d: usize, to: AnyMut, ld: usize)
}

/// # Safety
/// That of [`write_results`], on a machine that has `S`.
#[inline(always)]
unsafe fn write_results_body<S: Simd>(
    running: &Running,
    n: usize,
    d: usize,
    to: AnyMut,
    ld: usize,
) {
    // SAFETY: squares of a vector's lanes, of which channels that there are are read, and rows and values that there are written.
    unsafe {
        let (mut square, mut turned) = ([0f32; SQUARE], [0f32; SQUARE]);
        for row in (0..n).step_by(S::LANES) {
            let share = S::splat(1.0).div(S::load(running.sum.add(row)));
            for channel in (0..d).step_by(S::LANES) {
                let count = S::LANES.min(d - channel);
                for i in 0..count {
                    let x = S::load(running.values.add((channel + i) * NB + row));
                    x.mul(share).store(square.as_mut_ptr().add(i * S::LANES));
                }
                S::transpose(square.as_ptr(), S::LANES, turned.as_mut_ptr());
                with_type!(to.precision, V => {
                    for i in 0..S::LANES.min(n - row) {
                        let x = S::load(turned.as_ptr().add(i * S::LANES));
                        let to = to.typed::<V>().add((row + i) * ld + channel);
                        V::store_up_to(x, to, count);
                    }
                });
            }
        }
    }
}

/// Copies `d` values to row `row` of a panel of A of pairs, with a zero behind an odd last one.
///
/// # Safety
/// They can be read at `from`, and the panel, made for `r` rows, has room at `to`.
unsafe fn pair_row(from: *const bf16, d: usize, to: *mut bf16, row: usize, r: usize) {
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

/// Packs `n` queries (rows of `q`, `ld` apart) as a panel of B of pairs (d / 2, NB, 2), zeros for those missing and behind an odd last value.
///
/// # Safety
/// They can be read, and there is room for the panel at `to`.
unsafe fn pair_queries(q: *const bf16, ld: usize, n: usize, d: usize, to: *mut bf16) {
    for query in 0..NB {
        for i in 0..d.next_multiple_of(2) {
            // SAFETY: value `i` of one of the queries; column `query` of pair `i / 2`.
            unsafe {
                let x = if query < n && i < d {
                    q.add(query * ld + i).read()
                } else {
                    bf16::ZERO
                };
                to.add(i / 2 * 2 * NB + 2 * query + i % 2).write(x);
            }
        }
    }
}

isa_fn! {
    /// Rounds weights (keys, NB) to a panel of B of pairs (keys / 2, NB, 2), a zero behind an odd last one.
    ///
    /// # Safety
    /// They can be read at `p`, and there is room for the panel at `to`.
    fn pair_weights = pair_weights_body(p: *const f32, keys: usize, to: *mut bf16)
}

/// # Safety
/// That of [`pair_weights`], on a machine that has `S`.
#[inline(always)]
unsafe fn pair_weights_body<S: Simd>(p: *const f32, keys: usize, to: *mut bf16) {
    // SAFETY: vectors of the NB lanes of each key; both values of every lane of a pair.
    unsafe {
        let mut rows = [[bf16::ZERO; NB]; 2];
        for key in (0..keys).step_by(2) {
            for (i, row) in rows.iter_mut().enumerate() {
                if key + i == keys {
                    *row = [bf16::ZERO; NB];
                    continue;
                }
                for lane in (0..NB).step_by(S::LANES) {
                    let x = S::load(p.add((key + i) * NB + lane));
                    x.store_bf16(row.as_mut_ptr().add(lane));
                }
            }
            let to = to.add(key * NB);
            for lane in 0..NB {
                to.add(2 * lane).write(rows[0][lane]);
                to.add(2 * lane + 1).write(rows[1][lane]);
            }
        }
    }
}
