//! The transforms of Winograd's F(4x4, 3x3): a 4x4 output tile is `A^T [(G g G^T) . (B^T d B)] A` for a 3x3 kernel g and a
//! 6x6 input tile d, the products summed over the input channels by 36 matrix products.
//!
//! The interpolation points are 0, +-a, +-b and infinity with a = 1/sqrt 2, b = sqrt 2: with a * b = 1 the factors stay
//! near 1, which about halves the rounding error of the usual 0, +-1, +-2 (the choice is also ncnn's).

use super::micro::{NB, SLAB};
use super::simd::{Simd, isa_fn};

/// Side of an output tile.
pub(super) const OUT: usize = 4;
/// Side of an input tile.
pub(super) const IN: usize = 6;
/// Points: matrix products per tile.
pub(super) const POINTS: usize = IN * IN;

const A: f32 = std::f32::consts::FRAC_1_SQRT_2;
const B: f32 = std::f32::consts::SQRT_2;

/// `B^T d` for one column: the polynomial through each point that vanishes at the others.
#[inline(always)]
fn input_1d<S: Simd>(d: [S; IN]) -> [S; IN] {
    let (m25, m2, mh, a, b) = (
        d[0].like(-2.5),
        d[0].like(-2.0),
        d[0].like(-0.5),
        d[0].like(A),
        d[0].like(B),
    );
    let (even_a, odd_a) = (d[2].mul_add(m2, d[4]), d[1].mul_add(m2, d[3]).mul(a));
    let (even_b, odd_b) = (d[2].mul_add(mh, d[4]), d[1].mul_add(mh, d[3]).mul(b));
    [
        d[2].mul_add(m25, d[0].add(d[4])),
        even_a.add(odd_a),
        even_a.sub(odd_a),
        even_b.add(odd_b),
        even_b.sub(odd_b),
        d[3].mul_add(m25, d[1].add(d[5])),
    ]
}

/// `G g` for one column.
#[inline(always)]
fn weight_1d<S: Simd>(g: [S; 3]) -> [S; IN] {
    let (ea, oa) = (g[0].like(-2.0 / 3.0), g[0].like(-2.0 / 3.0 * A));
    let (eb0, ob) = (g[0].like(1.0 / 6.0), g[0].like(B / 6.0));
    let third = g[0].like(1.0 / 3.0);
    let (even_a, odd_a) = (g[0].mul(ea).sub(g[2].mul(third)), g[1].mul(oa));
    let (even_b, odd_b) = (g[0].mul_add(eb0, g[2].mul(third)), g[1].mul(ob));
    [
        g[0],
        even_a.add(odd_a),
        even_a.sub(odd_a),
        even_b.add(odd_b),
        even_b.sub(odd_b),
        g[2],
    ]
}

/// `A^T m` for one column: the values at 0..4 from those at the points.
#[inline(always)]
fn output_1d<S: Simd>(m: [S; IN]) -> [S; OUT] {
    let (sum_a, dif_a) = (m[1].add(m[2]), m[1].sub(m[2]));
    let (sum_b, dif_b) = (m[3].add(m[4]), m[3].sub(m[4]));
    let (a, half, a3) = (m[0].like(A), m[0].like(0.5), m[0].like(A * 0.5));
    let (b, two, b3) = (m[0].like(B), m[0].like(2.0), m[0].like(B * 2.0));
    [
        m[0].add(sum_a).add(sum_b),
        dif_a.mul_add(a, dif_b.mul(b)),
        sum_a.mul_add(half, sum_b.mul(two)),
        dif_a.mul_add(a3, dif_b.mul_add(b3, m[5])),
    ]
}

isa_fn! {
    /// Transforms a panel's weights for `n` input channels: `taps` has 9 blocks of (n, NB), `tap_stride` apart; point p's
    /// (n, NB) goes to `u + p * point_stride`. Columns up to `cols`, rounded up to 16.
    ///
    /// # Safety
    /// The taps' values can be read at `taps`, and there is room for the points' at `u`; `cols` is at most [`NB`].
    pub(super) fn weights = weights_body(taps: *const f32, tap_stride: usize, n: usize, cols: usize, u: *mut f32, point_stride: usize)
}

/// # Safety
/// That of [`weights`], on a machine that has `S`.
#[inline(always)]
unsafe fn weights_body<S: Simd>(
    taps: *const f32,
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
                let mut rows = [[S::splat(0.0); 3]; IN];
                for x in 0..3 {
                    let g = |y: usize| S::load(taps.add((y * 3 + x) * tap_stride + at));
                    let t = weight_1d([g(0), g(1), g(2)]);
                    for i in 0..IN {
                        rows[i][x] = t[i];
                    }
                }
                for (i, row) in rows.into_iter().enumerate() {
                    let t = weight_1d(row);
                    for (j, t) in t.into_iter().enumerate() {
                        t.store(u.add((i * IN + j) * point_stride + at));
                    }
                }
            }
        }
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
    /// Transforms a row of tiles: `region` (6, `width`, `slabs` * 16) holds its input, whose slabs become those from `slab0`
    /// on of the tiles in `v`.
    ///
    /// # Safety
    /// `region` is as said, `width` at least `row.count * 4 + 2`; `v` has room for [`POINTS`] sets of panels in `layout`, which
    /// has the tiles of `row` and the slabs.
    pub(super) fn inputs = inputs_body(
        region: *const f32, width: usize, slabs: usize, row: TileRow, v: *mut f32, layout: TileLayout, slab0: usize,
    )
}

/// # Safety
/// That of [`inputs`], on a machine that has `S`.
#[inline(always)]
unsafe fn inputs_body<S: Simd>(
    region: *const f32,
    width: usize,
    slabs: usize,
    row: TileRow,
    v: *mut f32,
    layout: TileLayout,
    slab0: usize,
) {
    // SAFETY: tile t reads columns 4t..4t + 6 of six lines of the region and writes its own place in `layout`, both of which
    // the caller answers for; a vector ends with its slab, as SLAB is a multiple of all LANES.
    unsafe {
        let pixel = slabs * SLAB;
        for t in 0..row.count {
            for s in 0..slabs {
                let to = v.add(layout.tile(row.first + t) + (slab0 + s) * layout.per_panel * SLAB);
                for lane in (0..SLAB).step_by(S::LANES) {
                    let from = region.add(t * OUT * pixel + s * SLAB + lane);
                    let mut rows = [[S::splat(0.0); IN]; IN];
                    for x in 0..IN {
                        let d = |y: usize| S::load(from.add((y * width + x) * pixel));
                        let t = input_1d([d(0), d(1), d(2), d(3), d(4), d(5)]);
                        for i in 0..IN {
                            rows[i][x] = t[i];
                        }
                    }
                    for (i, row) in rows.into_iter().enumerate() {
                        for (j, t) in input_1d(row).into_iter().enumerate() {
                            t.store(to.add((i * IN + j) * layout.point_stride + lane));
                        }
                    }
                }
            }
        }
    }
}

/// Where a row of tiles goes: `h` lines of `w` pixels of `ld` channels, of which `cols` are written, lines `width` pixels apart.
#[derive(Clone, Copy)]
pub(super) struct OutputRow {
    /// The first channel of the row's first pixel.
    pub out: *mut f32,
    /// The same place in the residual, or null.
    pub residual: *const f32,
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
    /// Transforms a row of tiles back, adds the bias and the residual, and writes it. Point p of tile t, (NB) columns, lies at
    /// `m + p * point_stride + t * NB`.
    ///
    /// # Safety
    /// `m` holds the tiles of `row`; `to` is as [`OutputRow`] says, and nobody else uses what it covers at `out`.
    pub(super) fn outputs = outputs_body(m: *const f32, point_stride: usize, row: TileRow, to: OutputRow)
}

/// # Safety
/// That of [`outputs`], on a machine that has `S`.
#[inline(always)]
unsafe fn outputs_body<S: Simd>(m: *const f32, point_stride: usize, row: TileRow, to: OutputRow) {
    // SAFETY: what is read of `m` and the bias lies in rows of NB; the pixels are those within `to.h` and `to.w`, and of
    // their channels no more than `to.cols` are touched.
    unsafe {
        for t in 0..row.count {
            for v in (0..to.cols).step_by(S::LANES) {
                let from = m.add((row.first + t) * NB + v);
                let mut lines = [[S::splat(0.0); IN]; OUT];
                for j in 0..IN {
                    let d = |i: usize| S::load(from.add((i * IN + j) * point_stride));
                    let y = output_1d([d(0), d(1), d(2), d(3), d(4), d(5)]);
                    for i in 0..OUT {
                        lines[i][j] = y[i];
                    }
                }
                let bias = S::load(to.bias.add(v));
                let n = to.cols - v;
                for (i, line) in lines.into_iter().enumerate().take(to.h) {
                    for (j, y) in output_1d(line).into_iter().enumerate().take(to.w - t * OUT) {
                        let at = (i * to.width + t * OUT + j) * to.ld + v;
                        let mut y = y.add(bias);
                        if !to.residual.is_null() {
                            let r = to.residual.add(at);
                            y = y.add(S::load_up_to(r, n));
                        }
                        y.store_up_to(to.out.add(at), n);
                    }
                }
            }
        }
    }
}
