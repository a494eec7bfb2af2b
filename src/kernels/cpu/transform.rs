//! The transforms of Winograd's F(m x m, 3x3) for m = 4 and 6: an m x m output tile is `A^T [(G g G^T) . (B^T d B)] A` for a 3x3
//! kernel g and an (m + 2) x (m + 2) input tile d, the products summed over the input channels by (m + 2)^2 matrix products.

use super::micro::{NB, SLAB};
use super::simd::{MOST_LANES, Simd, isa_fn};
use super::values::{AnyMut, AnyPtr, Value, with_type};

/// One of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scheme {
    F4,
    F6,
}

impl Scheme {
    /// Side of an output tile.
    pub fn out(self) -> usize {
        match self {
            Self::F4 => F4::OUT,
            Self::F6 => F6::OUT,
        }
    }

    /// Points: matrix products per tile.
    pub fn points(self) -> usize {
        let side = self.out() + 2;
        side * side
    }
}

/// The most points along a side.
const MOST: usize = 8;

/// A scheme along one dimension.
trait Transform {
    /// Side of an output tile.
    const OUT: usize;
    /// Side of an input tile.
    const IN: usize = Self::OUT + 2;

    /// `B^T d` for one column of [`IN`](Self::IN) values: the polynomial through each point that vanishes at the others.
    fn input<S: Simd>(d: [S; MOST]) -> [S; MOST];
    /// `G g` for one column.
    fn weight<S: Simd>(g: [S; 3]) -> [S; MOST];
    /// `A^T m` for one column: the values at 0..[`OUT`](Self::OUT) from those at the points.
    fn output<S: Simd>(m: [S; MOST]) -> [S; MOST];
}

/// `$body` for each `$i` of 0..8 that is below `$count`, written out: a loop over registers, which the compiler would else make one
/// over memory where it is long.
macro_rules! unrolled {
    ($i:ident < $count:expr => $body:expr) => {
        unrolled!(@ $i $count, $body; 0 1 2 3 4 5 6 7)
    };
    (@ $i:ident $count:expr, $body:expr; $($n:literal)*) => {
        $({
            const $i: usize = $n;
            if $i < $count {
                $body
            }
        })*
    };
}

/// Calls `$body` with a type for the scheme.
macro_rules! with_scheme {
    ($scheme:expr, $T:ident => $body:expr) => {
        match $scheme {
            Scheme::F4 => {
                type $T = F4;
                $body
            }
            Scheme::F6 => {
                type $T = F6;
                $body
            }
        }
    };
}

/// F(4x4, 3x3). The interpolation points are 0, +-a, +-b and infinity with a = 1/sqrt 2, b = sqrt 2: with a * b = 1 the factors
/// stay near 1, which about halves the rounding error of the usual 0, +-1, +-2 (the choice is also ncnn's).
struct F4;

const A: f32 = std::f32::consts::FRAC_1_SQRT_2;
const B: f32 = std::f32::consts::SQRT_2;

impl Transform for F4 {
    const OUT: usize = 4;

    #[inline(always)]
    fn input<S: Simd>(d: [S; MOST]) -> [S; MOST] {
        let (m25, m2, mh, a, b) = (
            d[0].like(-2.5),
            d[0].like(-2.0),
            d[0].like(-0.5),
            d[0].like(A),
            d[0].like(B),
        );
        let (even_a, odd_a) = (d[2].mul_add(m2, d[4]), d[1].mul_add(m2, d[3]).mul(a));
        let (even_b, odd_b) = (d[2].mul_add(mh, d[4]), d[1].mul_add(mh, d[3]).mul(b));
        let mut t = d;
        t[0] = d[2].mul_add(m25, d[0].add(d[4]));
        t[1] = even_a.add(odd_a);
        t[2] = even_a.sub(odd_a);
        t[3] = even_b.add(odd_b);
        t[4] = even_b.sub(odd_b);
        t[5] = d[3].mul_add(m25, d[1].add(d[5]));
        t
    }

    #[inline(always)]
    fn weight<S: Simd>(g: [S; 3]) -> [S; MOST] {
        let (ea, oa) = (g[0].like(-2.0 / 3.0), g[0].like(-2.0 / 3.0 * A));
        let (eb0, ob) = (g[0].like(1.0 / 6.0), g[0].like(B / 6.0));
        let third = g[0].like(1.0 / 3.0);
        let (even_a, odd_a) = (g[0].mul(ea).sub(g[2].mul(third)), g[1].mul(oa));
        let (even_b, odd_b) = (g[0].mul_add(eb0, g[2].mul(third)), g[1].mul(ob));
        let mut t = [g[0]; MOST];
        t[1] = even_a.add(odd_a);
        t[2] = even_a.sub(odd_a);
        t[3] = even_b.add(odd_b);
        t[4] = even_b.sub(odd_b);
        t[5] = g[2];
        t
    }

    #[inline(always)]
    fn output<S: Simd>(m: [S; MOST]) -> [S; MOST] {
        let (sum_a, dif_a) = (m[1].add(m[2]), m[1].sub(m[2]));
        let (sum_b, dif_b) = (m[3].add(m[4]), m[3].sub(m[4]));
        let (a, half, a3) = (m[0].like(A), m[0].like(0.5), m[0].like(A * 0.5));
        let (b, two, b3) = (m[0].like(B), m[0].like(2.0), m[0].like(B * 2.0));
        let mut y = m;
        y[0] = m[0].add(sum_a).add(sum_b);
        y[1] = dif_a.mul_add(a, dif_b.mul(b));
        y[2] = sum_a.mul_add(half, sum_b.mul(two));
        y[3] = dif_a.mul_add(a3, dif_b.mul_add(b3, m[5]));
        y
    }
}

/// F(6x6, 3x3). The points are 0, +-1, +-2, +-1/2 and infinity, the best of the 800 sets tried: four fifths of F(4x4)'s
/// multiplications, and four times its rounding error (4e-6 of the values over 128 channels, 1e-6 there).
struct F6;

impl Transform for F6 {
    const OUT: usize = 6;

    #[inline(always)]
    fn input<S: Simd>(d: [S; MOST]) -> [S; MOST] {
        let k = |x: f32| d[0].like(x);
        let m425 = k(-4.25);
        let (even_1, odd_1) = (
            d[4].mul_add(m425, d[2].add(d[6])),
            d[3].mul_add(m425, d[1].add(d[5])),
        );
        let even_2 = d[4].mul_add(k(-1.25), d[2].mul_add(k(0.25), d[6]));
        let odd_2 = d[5].mul_add(k(2.0), d[3].mul_add(k(-2.5), d[1].mul(k(0.5))));
        let even_h = d[4].mul_add(k(-5.0), d[2].mul_add(k(4.0), d[6]));
        let odd_h = d[5].mul_add(k(0.5), d[3].mul_add(k(-2.5), d[1].mul(k(2.0))));
        [
            d[4].sub(d[2]).mul_add(k(5.25), d[0].sub(d[6])),
            even_1.add(odd_1),
            even_1.sub(odd_1),
            even_2.add(odd_2),
            even_2.sub(odd_2),
            even_h.add(odd_h),
            even_h.sub(odd_h),
            d[3].sub(d[5]).mul_add(k(5.25), d[7].sub(d[1])),
        ]
    }

    #[inline(always)]
    fn weight<S: Simd>(g: [S; 3]) -> [S; MOST] {
        let k = |x: f32| g[0].like(x);
        let (even_1, odd_1) = (g[0].add(g[2]).mul(k(-2.0 / 9.0)), g[1].mul(k(-2.0 / 9.0)));
        let even_2 = g[2].mul_add(k(2.0 / 45.0), g[0].mul(k(1.0 / 90.0)));
        let odd_2 = g[1].mul(k(1.0 / 45.0));
        let even_h = g[2].mul_add(k(8.0 / 45.0), g[0].mul(k(32.0 / 45.0)));
        let odd_h = g[1].mul(k(16.0 / 45.0));
        [
            g[0],
            even_1.add(odd_1),
            even_1.sub(odd_1),
            even_2.add(odd_2),
            even_2.sub(odd_2),
            even_h.add(odd_h),
            even_h.sub(odd_h),
            g[2],
        ]
    }

    #[inline(always)]
    fn output<S: Simd>(m: [S; MOST]) -> [S; MOST] {
        let k = |x: f32| m[0].like(x);
        let (sum_1, dif_1) = (m[1].add(m[2]), m[1].sub(m[2]));
        let (sum_2, dif_2) = (m[3].add(m[4]), m[3].sub(m[4]));
        let (sum_h, dif_h) = (m[5].add(m[6]), m[5].sub(m[6]));
        let mut y = m;
        y[0] = m[0].add(sum_1).add(sum_2.add(sum_h));
        y[1] = dif_2.mul_add(k(2.0), dif_h.mul_add(k(0.5), dif_1));
        y[2] = sum_2.mul_add(k(4.0), sum_h.mul_add(k(0.25), sum_1));
        y[3] = dif_2.mul_add(k(8.0), dif_h.mul_add(k(0.125), dif_1));
        y[4] = sum_2.mul_add(k(16.0), sum_h.mul_add(k(0.0625), sum_1));
        y[5] = dif_2.mul_add(k(32.0), dif_h.mul_add(k(0.03125), dif_1.add(m[7])));
        y
    }
}

/// Where a panel's weights are, from some input channel on.
#[derive(Clone, Copy)]
pub(super) enum Taps {
    /// 9 blocks of (channels, [`NB`]), `stride` values apart.
    Packed { first: AnyPtr, stride: usize },
    /// (outputs, channels, 9), outputs `ld` values apart: as checkpoints have them.
    ByOutput { first: *const f32, ld: usize },
}

isa_fn! {
    /// Transforms a panel's weights for `n` input channels: point p's (n, NB) goes to `u + p * point_stride`. Columns up to
    /// `cols`, rounded up to 16.
    ///
    /// # Safety
    /// The taps' values can be read, and there is room for the points' at `u`; `cols` is at most [`NB`].
    pub(super) fn weights = weights_body(scheme: Scheme, taps: Taps, n: usize, cols: usize, u: *mut f32, point_stride: usize)
}

/// # Safety
/// That of [`weights`], on a machine that has `S`.
#[inline(always)]
unsafe fn weights_body<S: Simd>(
    scheme: Scheme,
    taps: Taps,
    n: usize,
    cols: usize,
    u: *mut f32,
    point_stride: usize,
) {
    // SAFETY: the caller's promise is the same.
    unsafe {
        with_scheme!(scheme, T => match taps {
            Taps::Packed { first, stride } => with_type!(first.precision, V => {
                weights_by::<S, T, V>(first.typed(), stride, n, cols, u, point_stride)
            }),
            Taps::ByOutput { first, ld } => {
                weights_by_output::<S, T>(first, ld, n, cols, u, point_stride)
            }
        })
    }
}

/// # Safety
/// That of [`weights`], on a machine that has `S`.
#[inline(always)]
unsafe fn weights_by<S: Simd, T: Transform, V: Value>(
    taps: *const V,
    tap_stride: usize,
    n: usize,
    cols: usize,
    u: *mut f32,
    point_stride: usize,
) {
    // SAFETY: `c < n` and `v < NB`, and a vector ends with the panel's row, as NB is a multiple of all LANES: inside the
    // taps and points that the caller answers for.
    unsafe {
        for c in 0..n {
            for v in (0..cols.next_multiple_of(16)).step_by(S::LANES) {
                let at = c * NB + v;
                let tap = |i: usize| V::load::<S>(taps.add(i * tap_stride + at));
                filter_to_points::<S, T>(tap, u.add(at), point_stride);
            }
        }
    }
}

/// # Safety
/// That of [`weights`], on a machine that has `S`.
#[inline(always)]
unsafe fn weights_by_output<S: Simd, T: Transform>(
    rows: *const f32,
    ld: usize,
    n: usize,
    cols: usize,
    u: *mut f32,
    point_stride: usize,
) {
    // (SLAB channels, 9, LANES outputs)
    let mut taps = [0f32; SLAB * 9 * MOST_LANES];
    let taps = taps.as_mut_ptr();
    // SAFETY: of outputs below `cols` the taps of channels below `n` are read, and `taps` has room for those of a slab; what
    // is written is as in `weights_by`.
    unsafe {
        for v in (0..cols.next_multiple_of(16)).step_by(S::LANES) {
            let outputs = S::LANES.min(cols.saturating_sub(v));
            for c0 in (0..n).step_by(SLAB) {
                let channels = SLAB.min(n - c0);
                let from = rows.wrapping_add(v * ld + c0 * 9);
                if outputs == S::LANES && channels == SLAB {
                    for square in (0..SLAB * 9).step_by(S::LANES) {
                        S::transpose(from.add(square), ld, taps.add(square * S::LANES));
                    }
                } else {
                    for (tap, lane) in
                        (0..channels * 9).flat_map(|tap| (0..S::LANES).map(move |lane| (tap, lane)))
                    {
                        let there = lane < outputs;
                        let x = if there {
                            from.add(lane * ld + tap).read()
                        } else {
                            0.0
                        };
                        taps.add(tap * S::LANES + lane).write(x);
                    }
                }
                for c in 0..channels {
                    let tap = |i: usize| S::load(taps.add((c * 9 + i) * S::LANES));
                    filter_to_points::<S, T>(tap, u.add((c0 + c) * NB + v), point_stride);
                }
            }
        }
    }
}

/// `G g G^T` of a vector of filters, whose taps `tap` gives line by line: point p's goes to `u + p * point_stride`.
///
/// # Safety
/// There is room for all points; the machine has `S`.
#[inline(always)]
unsafe fn filter_to_points<S: Simd, T: Transform>(
    tap: impl Fn(usize) -> S,
    u: *mut f32,
    point_stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut rows = [[S::splat(0.0); MOST]; MOST];
        unrolled!(X < 3 => {
            let t = T::weight([tap(X), tap(3 + X), tap(6 + X)]);
            unrolled!(I < T::IN => rows[I][X] = t[I]);
        });
        unrolled!(I < T::IN => {
            let [left, middle, right, ..] = rows[I];
            let t = T::weight([left, middle, right]);
            unrolled!(J < T::IN => t[J].store(u.add((I * T::IN + J) * point_stride)));
        });
    }
}

/// Where tiles are kept: panels of `per_panel` tiles in the layout of the register tile, one set per point.
#[derive(Clone, Copy)]
pub(super) struct TileLayout {
    /// Tiles of a panel.
    pub per_panel: usize,
    /// Slabs of a panel: input channels / 16.
    pub slabs: usize,
    /// From one point's panels to the next's.
    pub point_stride: usize,
}

impl TileLayout {
    pub fn new(tiles: usize, channels: usize, per_panel: usize) -> Self {
        let slabs = channels.div_ceil(SLAB);
        let size = tiles.next_multiple_of(per_panel) * slabs * SLAB;
        // An odd number of cache lines, so that a tile's 36 values do not all fall into the same set of the cache.
        Self {
            per_panel,
            slabs,
            point_stride: ((size / SLAB) | 1) * SLAB,
        }
    }

    pub fn panel(&self, panel: usize) -> usize {
        panel * self.per_panel * self.slabs * SLAB
    }

    fn tile(&self, tile: usize) -> usize {
        self.panel(tile / self.per_panel) + tile % self.per_panel * SLAB
    }
}

/// A row of tiles.
#[derive(Clone, Copy)]
pub(super) struct TileRow {
    /// Index of the first in a [`TileLayout`] (inputs) or a product buffer (outputs).
    pub first: usize,
    pub count: usize,
}

isa_fn! {
    /// Transforms a row of tiles: `region` (IN, `width`, `slabs` * 16) holds its input, whose slabs become those from `slab0`
    /// on of the tiles in `v`.
    ///
    /// # Safety
    /// `region` is as said, `width` at least `row.count * OUT + 2`; `v` has room for the scheme's points' sets of panels in `layout`, which
    /// has the tiles of `row` and the slabs.
    pub(super) fn inputs = inputs_body(
        scheme: Scheme, region: *const f32, width: usize, slabs: usize, row: TileRow, v: *mut f32, layout: TileLayout, slab0: usize,
    )
}

/// # Safety
/// That of [`inputs`], on a machine that has `S`.
#[inline(always)]
unsafe fn inputs_body<S: Simd>(
    scheme: Scheme,
    region: *const f32,
    width: usize,
    slabs: usize,
    row: TileRow,
    v: *mut f32,
    layout: TileLayout,
    slab0: usize,
) {
    // SAFETY: the caller's promise is the same.
    unsafe {
        with_scheme!(scheme, T => inputs_by::<S, T>(region, width, slabs, row, v, layout, slab0))
    }
}

/// # Safety
/// That of [`inputs`], on a machine that has `S`.
#[inline(always)]
unsafe fn inputs_by<S: Simd, T: Transform>(
    region: *const f32,
    width: usize,
    slabs: usize,
    row: TileRow,
    v: *mut f32,
    layout: TileLayout,
    slab0: usize,
) {
    // SAFETY: tile t reads IN columns from OUT * t on of IN lines of the region and writes its own place in `layout`, both of which
    // the caller answers for; a vector ends with its slab, as SLAB is a multiple of all LANES.
    unsafe {
        let pixel = slabs * SLAB;
        for t in 0..row.count {
            for s in 0..slabs {
                let to = v.add(layout.tile(row.first + t) + (slab0 + s) * layout.per_panel * SLAB);
                for lane in (0..SLAB).step_by(S::LANES) {
                    let from = region.add(t * T::OUT * pixel + s * SLAB + lane);
                    let mut rows = [[S::splat(0.0); MOST]; MOST];
                    unrolled!(X < T::IN => {
                        let mut d = [S::splat(0.0); MOST];
                        unrolled!(Y < T::IN => d[Y] = S::load(from.add((Y * width + X) * pixel)));
                        let t = T::input(d);
                        unrolled!(I < T::IN => rows[I][X] = t[I]);
                    });
                    unrolled!(I < T::IN => {
                        let t = T::input(rows[I]);
                        unrolled!(J < T::IN => {
                            t[J].store(to.add((I * T::IN + J) * layout.point_stride + lane));
                        });
                    });
                }
            }
        }
    }
}

/// Where a row of tiles goes: `h` lines of `w` pixels of `ld` channels, of which `cols` are written, lines `width` pixels apart.
#[derive(Clone, Copy)]
pub(super) struct OutputRow {
    /// The first channel of the row's first pixel.
    pub out: AnyMut,
    /// The same place in the residual, kept as the output is, or null.
    pub residual: AnyPtr,
    /// What values below it become in the end; what is not a number stays so.
    pub floor: f32,
    /// (NB).
    pub bias: *const f32,
    /// Pixels in a row of the map.
    pub width: usize,
    /// Lines and columns that the row of tiles covers, the last tile perhaps in part.
    pub h: usize,
    pub w: usize,
    pub ld: usize,
    pub cols: usize,
}

isa_fn! {
    /// Transforms a row of tiles back, adds the bias and the residual, raises it to the floor, and writes it. Point p of tile t, (NB) columns, lies at
    /// `m + p * point_stride + t * NB`.
    ///
    /// # Safety
    /// `m` holds the tiles of `row`; `to` is as [`OutputRow`] says, and nobody else uses what it covers at `out`.
    pub(super) fn outputs = outputs_body(scheme: Scheme, m: *const f32, point_stride: usize, row: TileRow, to: OutputRow)
}

/// # Safety
/// That of [`outputs`], on a machine that has `S`.
#[inline(always)]
unsafe fn outputs_body<S: Simd>(
    scheme: Scheme,
    m: *const f32,
    point_stride: usize,
    row: TileRow,
    to: OutputRow,
) {
    // SAFETY: the caller's promise is the same.
    unsafe {
        with_scheme!(scheme, T => with_type!(to.out.precision, V => {
            outputs_by::<S, T, V>(m, point_stride, row, to)
        }))
    }
}

/// # Safety
/// That of [`outputs`], on a machine that has `S`; the output is kept as `V`.
#[inline(always)]
unsafe fn outputs_by<S: Simd, T: Transform, V: Value>(
    m: *const f32,
    point_stride: usize,
    row: TileRow,
    to: OutputRow,
) {
    let (out, residual) = (to.out.typed::<V>(), to.residual.address().cast::<V>());
    // SAFETY: what is read of `m` and the bias lies in rows of NB; the pixels are those within `to.h` and `to.w`, and of
    // their channels no more than `to.cols` are touched.
    unsafe {
        for t in 0..row.count {
            for v in (0..to.cols).step_by(S::LANES) {
                let from = m.add((row.first + t) * NB + v);
                let mut lines = [[S::splat(0.0); MOST]; MOST];
                unrolled!(J < T::IN => {
                    let mut d = [S::splat(0.0); MOST];
                    unrolled!(I < T::IN => {
                        d[I] = S::load(from.add((I * T::IN + J) * point_stride));
                    });
                    let y = T::output(d);
                    unrolled!(I < T::OUT => lines[I][J] = y[I]);
                });
                let bias = S::load(to.bias.add(v));
                let n = to.cols - v;
                let width = T::OUT.min(to.w - t * T::OUT);
                unrolled!(I < T::OUT => {
                    let line = T::output(lines[I]);
                    let mut values = [S::splat(0.0); MOST];
                    unrolled!(J < T::OUT => values[J] = line[J].add(bias));
                    if I < to.h {
                        for (j, &y) in values.iter().enumerate().take(width) {
                            let at = (I * to.width + t * T::OUT + j) * to.ld + v;
                            let mut y = y;
                            if !residual.is_null() {
                                y = y.add(V::load_up_to(residual.add(at), n));
                            }
                            // `max` keeps a NaN in the second operand.
                            V::store_up_to(y.like(to.floor).max(y), out.add(at), n);
                        }
                    }
                });
            }
        }
    }
}
