//! Group and layer normalisation.

use std::ops::Range;

use rayon::prelude::*;

use super::act::Act;
use super::buf::{Shared, filled};
use super::input::{Input, Prologue};
use super::simd::{Isa, Simd, isa_fn};
use super::values::{AnyMut, AnyPtr, Value, with_type};

/// Lines and columns summed by one task: fixed, so that the order of summation never depends on the number of threads, nor on
/// the bands that a map comes in.
const LINES: usize = 4;
const COLUMNS: usize = 64;
/// Pixels summed in f32 before the sums go on in f64.
const BLOCK: usize = 32;

/// Mean and 1 / sqrt(variance + eps) of each group of channels of each batch item.
pub struct GroupStats {
    /// (b, groups).
    pub mean: Vec<f32>,
    /// (b, groups).
    pub rstd: Vec<f32>,
    channels: usize,
    groups: usize,
}

/// Count, mean and sum of squared deviations of a part of the values.
#[derive(Clone, Copy, Default)]
struct Moments {
    n: f64,
    mean: f64,
    m2: f64,
}

impl Moments {
    /// Those of two parts together (Chan, Golub and LeVeque).
    fn merge(self, o: Moments) -> Moments {
        let n = self.n + o.n;
        if n == 0.0 {
            return self;
        }
        let d = o.mean - self.mean;
        Moments {
            n,
            mean: self.mean + d * o.n / n,
            m2: self.m2 + o.m2 + d * d * self.n * o.n / n,
        }
    }
}

/// Lines that [`GroupSums::add`] takes together: bands begin at multiples of it.
pub const NORM_LINES: usize = LINES;

/// The statistics of a map for a group normalisation, while its lines are read from the top down.
///
/// Values are taken relative to a mean of their neighbours before they are squared, so that a mean far above the
/// standard deviation costs no accuracy.
#[derive(Clone)]
pub struct GroupSums {
    /// (b, groups).
    moments: Vec<Moments>,
    channels: usize,
    groups: usize,
    /// Lines so far.
    lines: usize,
}

impl GroupSums {
    /// Of no lines yet, for a map of `b` items and `channels` channels in `groups` groups.
    ///
    /// # Panics
    /// If `groups` does not divide the channels.
    pub fn new(b: usize, channels: usize, groups: usize) -> Self {
        assert!(
            groups > 0 && channels.is_multiple_of(groups),
            "{groups} groups divide {channels} channels"
        );
        Self {
            moments: vec![Moments::default(); b * groups],
            channels,
            groups,
            lines: 0,
        }
    }

    /// Adds the next lines of a map, read as they are in memory, without prologue or upsampling. They begin where the last
    /// ended, which was at a multiple of [`NORM_LINES`].
    ///
    /// # Panics
    /// If they do not, or the input has other channels or lacks lines.
    pub fn add(&mut self, input: &Input, lines: Range<usize>) {
        let (c, groups) = (self.channels, self.groups);
        assert!(
            lines.start == self.lines && lines.start.is_multiple_of(LINES),
            "lines from {} on",
            self.lines
        );
        assert_eq!(input.channels(), c, "the input has the map's channels");
        let (b, w) = (self.moments.len() / groups, input.width());
        let (down, across) = (lines.len().div_ceil(LINES), w.div_ceil(COLUMNS));
        let parts: Vec<Vec<Moments>> = (0..b * down * across)
            .into_par_iter()
            .map(|i| {
                let (item, y, x) = (i / down / across, i / across % down, i % across);
                let y = lines.start + y * LINES;
                let lines = y..lines.end.min(y + LINES);
                let columns = x * COLUMNS..w.min((x + 1) * COLUMNS);
                moments_of_chunk(input, item, lines, columns, groups)
            })
            .collect();
        for (item, parts) in parts.chunks(down * across).enumerate() {
            for part in parts {
                for (sum, &part) in self.moments[item * groups..].iter_mut().zip(part) {
                    *sum = sum.merge(part);
                }
            }
        }
        self.lines = lines.end;
    }

    /// What they come to; the variance is the biased one.
    pub fn stats(&self, eps: f64) -> GroupStats {
        GroupStats {
            mean: self.moments.iter().map(|m| m.mean as f32).collect(),
            rstd: self
                .moments
                .iter()
                .map(|m| (1.0 / (m.m2.max(0.0) / m.n + eps).sqrt()) as f32)
                .collect(),
            channels: self.channels,
            groups: self.groups,
        }
    }
}

/// Those of each group in a few lines and columns of a batch item.
fn moments_of_chunk(
    input: &Input,
    item: usize,
    lines: Range<usize>,
    columns: Range<usize>,
    groups: usize,
) -> Vec<Moments> {
    let isa = Isa::current();
    let widths = input.widths();
    let c = widths[0] + widths[1];
    let mut shift = vec![0f32; c];
    let mut sums = vec![[0f64; 2]; c];
    for (number, y) in lines.clone().enumerate() {
        let mut at = 0;
        for (line, width) in input.line(item, y).into_iter().zip(widths) {
            let x = line
                .part(columns.start * width..columns.end * width)
                .from(0);
            let (shift, sums) = (&mut shift[at..at + width], &mut sums[at..at + width]);
            // SAFETY: `x` is (columns, width), shift and sums (width).
            unsafe { sum_chunk(isa, x, width, columns.len(), number == 0, shift, sums) };
            at += width;
        }
    }
    let n = (lines.len() * columns.len()) as f64;
    let channel = |(&shift, &[s, q]): (&f32, &[f64; 2])| Moments {
        n,
        mean: f64::from(shift) + s / n,
        m2: q - s * s / n,
    };
    let channels: Vec<Moments> = shift.iter().zip(&sums).map(channel).collect();
    channels
        .chunks(c / groups)
        .map(|g| g.iter().fold(Moments::default(), |a, &m| a.merge(m)))
        .collect()
}

isa_fn! {
    /// Sums x - shift and its square over the `n` pixels of a line, for each of `c` channels; chooses the shift at the `first` line.
    ///
    /// # Safety
    /// `x` is (n, c), `shift` and `sums` (c).
    fn sum_chunk = sum_chunk_body(
        x: AnyPtr, c: usize, n: usize, first: bool, shift: &mut [f32], sums: &mut [[f64; 2]],
    )
}

/// # Safety
/// That of [`sum_chunk`], on a machine that has `S`.
#[inline(always)]
unsafe fn sum_chunk_body<S: Simd>(
    x: AnyPtr,
    c: usize,
    n: usize,
    first: bool,
    shift: &mut [f32],
    sums: &mut [[f64; 2]],
) {
    // SAFETY: the caller's promise is the same.
    unsafe {
        with_type!(x.precision, V => sum_chunk_of::<S, V>(x.typed(), c, n, first, shift, sums))
    }
}

/// # Safety
/// That of [`sum_chunk`], on a machine that has `S`.
#[inline(always)]
unsafe fn sum_chunk_of<S: Simd, V: Value>(
    x: *const V,
    c: usize,
    n: usize,
    first: bool,
    shift: &mut [f32],
    sums: &mut [[f64; 2]],
) {
    // SAFETY: rows up to `n` and columns up to `c` are touched, the last vector of a row only as far as `m`.
    unsafe {
        for row0 in (0..n).step_by(BLOCK) {
            let rows = BLOCK.min(n - row0);
            let x = x.add(row0 * c);
            for j in (0..c).step_by(S::LANES) {
                let m = S::LANES.min(c - j);
                if first && row0 == 0 {
                    let mut s = S::splat(0.0);
                    for i in 0..rows {
                        s = s.add(V::load_up_to(x.add(i * c + j), m));
                    }
                    s.mul(S::splat(1.0 / rows as f32))
                        .store_up_to(shift.as_mut_ptr().add(j), m);
                }
                let k = S::load_up_to(shift.as_ptr().add(j), m);
                let (mut s, mut q) = (S::splat(0.0), S::splat(0.0));
                for i in 0..rows {
                    let d = V::load_up_to::<S>(x.add(i * c + j), m).sub(k);
                    s = s.add(d);
                    q = d.mul_add(d, q);
                }
                let (s, q) = (s.to_array(), q.to_array());
                for (to, (s, q)) in sums[j..][..m].iter_mut().zip(s.into_iter().zip(q)) {
                    to[0] += f64::from(s);
                    to[1] += f64::from(q);
                }
            }
        }
    }
}

impl GroupStats {
    /// `(x - mean) * rstd * weight + bias`, then `act`; `weight` and `bias` are (b, c), or (1, c) for all batch items.
    ///
    /// # Panics
    /// If their lengths do not fit.
    pub fn affine(&self, weight: &[f32], bias: &[f32], act: Act) -> Prologue {
        let n = self.batch() * self.channels;
        assert!(
            weight.len() == bias.len() && [n, self.channels].contains(&weight.len()),
            "weight and bias are (b, c) or (1, c)"
        );
        let of = |i: usize| i % weight.len();
        self.prologue(act, |i| (f64::from(weight[of(i)]), f64::from(bias[of(i)])))
    }

    fn batch(&self) -> usize {
        self.mean.len() / self.groups
    }

    /// From the gain and offset of each (b, c).
    fn prologue(&self, act: Act, gain: impl Fn(usize) -> (f64, f64)) -> Prologue {
        let size = self.channels / self.groups;
        let pair = |i: usize| {
            let group = i / size;
            let (gain, offset) = gain(i);
            let scale = gain * f64::from(self.rstd[group]);
            (
                scale as f32,
                (offset - scale * f64::from(self.mean[group])) as f32,
            )
        };
        let (scale, shift) = (0..self.batch() * self.channels).map(pair).unzip();
        Prologue::new(scale, shift, act)
    }
}

/// `(x - mean) / sqrt(variance + eps) * weight + bias` over each row of `x` (n, c); `weight` and `bias` (c).
///
/// # Panics
/// If a length does not fit.
pub fn layer_norm<V: Value>(x: &[V], weight: &[f32], bias: &[f32], eps: f32) -> Vec<V> {
    let c = weight.len();
    assert!(
        c > 0 && bias.len() == c && x.len().is_multiple_of(c),
        "the input is (n, {c}), weight and bias ({c})"
    );
    let isa = Isa::current();
    let rows = (16384 / c).max(1);
    let write = |out: Shared<V>| {
        x.par_chunks(rows * c).enumerate().for_each(|(i, x)| {
            // SAFETY: `x` has whole rows of the weight's length, which is the bias's; each task writes its own.
            unsafe {
                let out = AnyMut::new(out.get()).at(i * rows * c);
                let n = x.len() / c;
                layer_norm_rows(isa, AnyPtr::new(x.as_ptr()), n, weight, bias, eps, out);
            }
        });
    };
    // SAFETY: all rows are written.
    unsafe { filled(x.len(), write) }
}

isa_fn! {
    /// [`layer_norm`] of `n` rows of `x`, to `out`.
    ///
    /// # Safety
    /// `bias` is as long as `weight`, c, and `x` (n, c); there is room for as much, of the same type, at `out`.
    fn layer_norm_rows = layer_norm_rows_body(x: AnyPtr, n: usize, weight: &[f32], bias: &[f32], eps: f32, out: AnyMut)
}

/// # Safety
/// That of [`layer_norm_rows`], on a machine that has `S`.
#[inline(always)]
unsafe fn layer_norm_rows_body<S: Simd>(
    x: AnyPtr,
    n: usize,
    weight: &[f32],
    bias: &[f32],
    eps: f32,
    out: AnyMut,
) {
    // SAFETY: the caller's promise is the same.
    unsafe {
        with_type!(out.precision, V => {
            let x = std::slice::from_raw_parts(x.typed::<V>(), n * weight.len());
            layer_norm_rows_of::<S, V>(x, weight, bias, eps, out.typed())
        })
    }
}

/// # Safety
/// That of [`layer_norm_rows`], on a machine that has `S`.
#[inline(always)]
unsafe fn layer_norm_rows_of<S: Simd, V: Value>(
    x: &[V],
    weight: &[f32],
    bias: &[f32],
    eps: f32,
    out: *mut V,
) {
    // SAFETY: vectors are read and written up to `whole`, which is at most c, the length of a row, the weight and the bias;
    // numbers from there to c.
    unsafe {
        let c = weight.len();
        let whole = c / S::LANES * S::LANES;
        let total = |v: S, tail: f64| {
            v.to_array()
                .iter()
                .take(S::LANES)
                .fold(tail, |a, &x| a + f64::from(x))
        };
        for (i, x) in x.chunks_exact(c).enumerate() {
            let tail = || x[whole..].iter().map(|&x| f64::from(x.widen()));
            let mut s = S::splat(0.0);
            for j in (0..whole).step_by(S::LANES) {
                s = s.add(V::load(x.as_ptr().add(j)));
            }
            let mean = total(s, tail().sum()) / c as f64;
            let (m, mut q) = (S::splat(mean as f32), S::splat(0.0));
            for j in (0..whole).step_by(S::LANES) {
                let d = V::load::<S>(x.as_ptr().add(j)).sub(m);
                q = d.mul_add(d, q);
            }
            let variance = total(q, tail().map(|x| (x - mean).powi(2)).sum()) / c as f64;
            let rstd = (1.0 / (variance + f64::from(eps)).sqrt()) as f32;
            let (r, out) = (S::splat(rstd), out.add(i * c));
            for j in (0..whole).step_by(S::LANES) {
                let y = V::load::<S>(x.as_ptr().add(j)).sub(m).mul(r);
                let y = y.mul_add(
                    S::load(weight.as_ptr().add(j)),
                    S::load(bias.as_ptr().add(j)),
                );
                V::store(y, out.add(j));
            }
            for j in whole..c {
                let y = (x[j].widen() - mean as f32) * rstd * weight[j] + bias[j];
                *out.add(j) = V::narrow(y);
            }
        }
    }
}
