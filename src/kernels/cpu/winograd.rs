//! 3x3 stride-1 convolution by Winograd's F(4x4, 3x3), a quarter of the multiplications, or F(6x6, 3x3), a fifth, in one of two orders of work: large maps
//! with few weights by blocks of tiles, all weights transformed once per call; all others by panels of output channels, some
//! tiles at a time, each thread transforming the weights it needs. Both give the same bits.

use std::ops::Range;

use rayon::prelude::*;

use super::buf::{Scratch, Shared, from_or_null};
use super::input::{Input, Region, stage_region};
use super::micro::{Dst, NB, SLAB, panel, rows_per_panel};
use super::packed::PackedConv;
use super::simd::{Isa, prefetch};
use super::transform::{OutputRow, Scheme, TileLayout, TileRow, inputs, outputs, weights};
use super::values::{AnyMut, Values};

/// The fewest and most tiles of a task over a large map.
const BLOCK: [usize; 2] = [16, 32];
/// Tiles across and lines of tiles staged at a time.
const ROW: usize = 8;
const LINES: usize = 4;
/// Input channels staged at a time: contiguous in the input, so not too few.
const STAGE: usize = 128;
/// Input channels whose transformed weights are kept at a time over a small map, so that they, the tiles' products and the next
/// weights fit the L2 cache together: for up to 32 tiles, and for more.
const CHUNK: [usize; 2] = [96, 128];
/// The fewest tiles for F(6x6, 3x3), whose weights are more.
const MANY: usize = 100;
/// From so many tiles on a map is large.
const LARGE: usize = 256;
/// The most tiles of a task over a small map: their products with a panel of weights stay in the L2 cache.
const SMALL: usize = 64;
/// The most transformed weights kept for a call, 16 MB: more would not stay in the L3 cache beside the rest, and a map is then
/// done as small ones are, part by part.
const WEIGHTS: usize = 4 << 20;

/// One convolution: `out` has room for its output, and nobody else uses that meanwhile.
struct Conv<'a> {
    isa: Isa,
    scheme: Scheme,
    input: &'a Input<'a>,
    weight: &'a PackedConv,
    /// (b, h, w, outputs).
    out: AnyMut,
    /// The same.
    residual: Option<Values<'a>>,
    /// What values below it become in the end.
    floor: f32,
    /// Of all lines of the output the first that is computed.
    first: usize,
    /// (h, w) of what is computed.
    h: usize,
    w: usize,
    /// Tiles down and across.
    th: usize,
    tw: usize,
}

/// Tile (ty, tx) of batch item `b`.
#[derive(Clone, Copy)]
struct Place {
    b: usize,
    ty: usize,
    tx: usize,
}

/// Transformed inputs and how they lie.
#[derive(Clone, Copy)]
struct Tiles {
    v: *mut f32,
    layout: TileLayout,
}

/// Whether [`winograd`] can do this convolution.
pub(super) fn applies(conv: &PackedConv) -> bool {
    conv.filter.is_transformed()
}

/// The one that is used for a whole input (h, w): of which lines of the output are computed makes no difference.
pub(super) fn scheme(conv: &PackedConv, h: usize, w: usize) -> Scheme {
    let (h, w) = conv.output_size(h, w);
    let tiles = |scheme: Scheme| h.div_ceil(scheme.out()) * w.div_ceil(scheme.out());
    let products = |scheme: Scheme| scheme.points() * tiles(scheme);
    // Not where the last tiles are mostly empty, nor where transforming the weights costs more than the products.
    if tiles(Scheme::F6) >= MANY && 10 * products(Scheme::F6) < 9 * products(Scheme::F4) {
        Scheme::F6
    } else {
        Scheme::F4
    }
}

/// Lines of the convolution, plus the bias and the residual, and no less than `floor`.
///
/// # Safety
/// `out` has room for them, (b, lines, w, outputs), which nobody else uses meanwhile. `input` has the convolution's channels, and the
/// lines that these are made of.
pub(super) unsafe fn winograd(
    isa: Isa,
    input: &Input,
    weight: &PackedConv,
    lines: Range<usize>,
    out: AnyMut,
    residual: Option<Values>,
    floor: f32,
) {
    let (b, h, w) = input.shape();
    let scheme = scheme(weight, h, w);
    let (_, w) = weight.output_size(h, w);
    let (first, h) = (lines.start, lines.len());
    let (th, tw) = (h.div_ceil(scheme.out()), w.div_ceil(scheme.out()));
    let conv = Conv {
        isa,
        scheme,
        input,
        weight,
        out,
        residual,
        floor,
        first,
        h,
        w,
        th,
        tw,
    };
    if th * tw >= LARGE && scheme.points() * weight.filter.inputs * weight.filter.outputs <= WEIGHTS
    {
        conv.by_blocks(b)
    } else {
        conv.by_panels(b)
    }
}

impl Conv<'_> {
    /// Stages and transforms the tiles of `lines` lines from `from` on, `row.count` of each, the given channels. The first
    /// becomes tile `row.first` of `to`, the next lines follow `pitch` tiles apart.
    ///
    /// # Safety
    /// The tiles exist, in the input and in `to`, where nobody else uses these channels of them; the channels begin at a
    /// multiple of [`STAGE`] and are no more; `region` is of [`Conv::region`] for as many lines and tiles.
    unsafe fn input_tiles(
        &self,
        from: Place,
        lines: usize,
        row: TileRow,
        pitch: usize,
        channels: Range<usize>,
        region: *mut f32,
        to: Tiles,
    ) {
        let (padding, side) = (self.weight.filter.padding, self.scheme.out());
        let (h, w) = (lines * side + 2, row.count * side + 2);
        let covered = Region {
            b: from.b,
            y: (self.first + from.ty * side) as isize - padding.top as isize,
            x: (from.tx * side) as isize - padding.left as isize,
            h,
            w,
        };
        let Range { start: c0, end: c1 } = channels;
        let slabs = (c1 - c0).div_ceil(SLAB);
        // SAFETY: the region has room for h * w pixels of STAGE channels, which cover these tiles, six lines for each line of
        // them; the rest is promised.
        unsafe {
            stage_region(self.isa, self.input, covered, c0, c1, region);
            for line in 0..lines {
                let region = region.add(line * side * w * slabs * SLAB);
                let row = TileRow {
                    first: row.first + line * pitch,
                    ..row
                };
                inputs(
                    self.isa,
                    self.scheme,
                    region,
                    w,
                    slabs,
                    row,
                    to.v,
                    to.layout,
                    c0 / SLAB,
                );
            }
        }
    }

    /// Transforms tiles back and writes them: `row.count` from `to` on, for panel `nb`.
    ///
    /// # Safety
    /// The tiles exist; `m` holds their products with the panel at all points; no other task writes their pixels and
    /// the panel's channels.
    unsafe fn output_row(
        &self,
        to: Place,
        row: TileRow,
        nb: usize,
        m: *const f32,
        point_stride: usize,
    ) {
        let Place { b, ty, tx } = to;
        let (ld, side) = (self.weight.filter.outputs, self.scheme.out());
        let at = ((b * self.h + ty * side) * self.w + tx * side) * ld + nb * NB;
        let to = OutputRow {
            out: self.out.at(at),
            residual: from_or_null(self.residual, at),
            floor: self.floor,
            bias: self.weight.bias(nb).as_ptr(),
            width: self.w,
            h: side.min(self.h - ty * side),
            w: (row.count * side).min(self.w - tx * side),
            ld,
            cols: self.weight.panel_cols(nb),
        };
        // SAFETY: as promised; `to` is held to the lines, columns and channels that the output (and so the residual) has.
        unsafe { outputs(self.isa, self.scheme, m, point_stride, row, to) };
    }

    /// Room for the input of so many lines of so many tiles, [`STAGE`] channels of it.
    fn region(&self, lines: usize, across: usize) -> Scratch {
        let side = self.scheme.out();
        Scratch::take((lines * side + 2) * (across * side + 2) * STAGE)
    }

    fn by_blocks(&self, b: usize) {
        let (isa, points, cin, panels) = (
            self.isa,
            self.scheme.points(),
            self.weight.filter.inputs,
            self.weight.panel_count(),
        );
        // (panel, point, cin, NB), points an odd number of cache lines apart.
        let u_point = cin * NB + SLAB;
        let mut u = Scratch::take(panels * points * u_point);
        let u = Shared(u.ptr());
        let chunks = cin.div_ceil(STAGE);
        (0..panels * chunks).into_par_iter().for_each(|i| {
            let (nb, c0) = (i / chunks, i % chunks * STAGE);
            let n = STAGE.min(cin - c0);
            let taps = self.weight.taps(nb, c0);
            // SAFETY: the taps of panel `nb` have `cin` channels, of which `n` are left from `c0`; each task
            // writes its own panel's channels, of which there is room for all at all points.
            unsafe {
                let u = u.get().add(nb * points * u_point + c0 * NB);
                weights(
                    isa,
                    self.scheme,
                    taps,
                    n,
                    self.weight.panel_cols(nb),
                    u,
                    u_point,
                );
            }
        });

        let bw = self.tw.div_ceil(self.tw.div_ceil(ROW));
        let block =
            (b * self.th * self.tw / (2 * rayon::current_num_threads())).clamp(BLOCK[0], BLOCK[1]);
        let bh = self.th.div_ceil(self.th.div_ceil((block / bw).max(1)));
        let (nx, ny) = (self.tw.div_ceil(bw), self.th.div_ceil(bh));
        (0..b * ny * nx)
            .into_par_iter()
            .with_max_len(1)
            .for_each(|i| {
                let (b, ty0, tx0) = (i / nx / ny, i / nx % ny * bh, i % nx * bw);
                let (bh, bw) = (bh.min(self.th - ty0), bw.min(self.tw - tx0));
                let tiles = bh * bw;
                let layout = TileLayout::new(tiles, cin, rows_per_panel(isa, tiles));
                let m_point = tiles * NB + SLAB;
                let mut v = Scratch::take(points * layout.point_stride);
                let mut m = Scratch::take(points * m_point);
                let mut region = self.region(bh, bw);
                let (v, m, region) = (v.ptr(), m.ptr(), region.ptr());
                for c0 in (0..cin).step_by(STAGE) {
                    let row = TileRow {
                        first: 0,
                        count: bw,
                    };
                    let from = Place {
                        b,
                        ty: ty0,
                        tx: tx0,
                    };
                    let channels = c0..cin.min(c0 + STAGE);
                    let to = Tiles { v, layout };
                    // SAFETY: the block's tiles lie inside the map; `v`, made for them, is this task's own, as is
                    // `region`, made for bh lines of bw.
                    unsafe { self.input_tiles(from, bh, row, bw, channels, region, to) };
                }
                for nb in 0..panels {
                    for point in 0..points {
                        let u = u.get().wrapping_add((nb * points + point) * u_point);
                        let m = m.wrapping_add(point * m_point);
                        let from = Tiles { v, layout };
                        // SAFETY: all channels of all tiles of `v` and of the panel's weights were transformed above;
                        // `m` has room for the tiles at each point.
                        unsafe { self.products(0..tiles, from, point, 0..cin, u, m, nb) };
                    }
                    for ty in 0..bh {
                        let row = TileRow {
                            first: ty * bw,
                            count: bw,
                        };
                        let to = Place {
                            b,
                            ty: ty0 + ty,
                            tx: tx0,
                        };
                        // SAFETY: `m` holds the block's products with the panel; no other task has this block.
                        unsafe { self.output_row(to, row, nb, m, m_point) };
                    }
                }
            });
    }

    /// `m (tiles, NB) [+]= v (tiles, channels) * u (channels, NB)` at one point; the first tile is the first of a panel of
    /// `v`, and `m` its place. Adds from the second chunk of channels on.
    ///
    /// # Safety
    /// `from` holds the channels of the tiles, `u` those of panel `nb`, transformed; the channels begin at a multiple of 16; `m`
    /// has room for the tiles, and holds their sums where channels came before.
    unsafe fn products(
        &self,
        tiles: Range<usize>,
        from: Tiles,
        point: usize,
        channels: Range<usize>,
        u: *const f32,
        m: *mut f32,
        nb: usize,
    ) {
        let Tiles { v, layout } = from;
        let r = layout.per_panel;
        let (t1, c0) = (tiles.end, channels.start);
        for t in tiles.clone().step_by(r) {
            let ptr = m.wrapping_add((t - tiles.start) * NB);
            let dst = Dst {
                ptr,
                row_stride: NB,
                slab_stride: 16,
                accumulate: c0 > 0,
            };
            let a = v.wrapping_add(point * layout.point_stride + layout.panel(t / r) + c0 * r);
            // SAFETY: `a` is a panel of `v` from channel `c0` on, of which r.min(t1 - t) tiles count; the rest is promised.
            unsafe {
                panel(
                    self.isa,
                    r.min(t1 - t),
                    self.weight.panel_cols(nb),
                    channels.len(),
                    a,
                    r,
                    u,
                    dst,
                )
            };
        }
    }

    /// Fetches a share (`point` of all) of the weights that a thread needs after channel `c` of panel `nb`, the next
    /// chunk's or panel's: small maps would otherwise wait for memory, which is idle while they multiply.
    fn prefetch_weights(&self, nb: usize, c: usize, chunk: usize, point: usize) {
        let points = self.scheme.points();
        let (nb, c) = if c < self.weight.filter.inputs {
            (nb, c)
        } else {
            (nb + 1, 0)
        };
        if nb == self.weight.panel_count() {
            return;
        }
        let channels = chunk.min(self.weight.filter.inputs - c);
        for (from, bytes) in self.weight.runs(nb, c, channels) {
            let lines = bytes / 64;
            for line in point * lines / points..(point + 1) * lines / points {
                prefetch(from.wrapping_add(line * 64));
            }
        }
    }

    fn by_panels(&self, b: usize) {
        // Whole lines of tiles (across the batch) at a time, evenly shared out: a task's worth, or more where there are fewer
        // panels than the threads need.
        let lines = b * self.th;
        let in_flight = SMALL * self.parts();
        let step = lines.div_ceil(lines.div_ceil((in_flight / self.tw).max(1)));
        for line in (0..lines).step_by(step) {
            self.lines_by_panels(line, lines.min(line + step));
        }
    }

    /// Parts of the tiles in flight, so that with all panels there are two tasks for each thread.
    fn parts(&self) -> usize {
        (2 * rayon::current_num_threads()).div_ceil(self.weight.panel_count())
    }

    fn lines_by_panels(&self, line0: usize, line1: usize) {
        let (isa, points, cin, panels, tw) = (
            self.isa,
            self.scheme.points(),
            self.weight.filter.inputs,
            self.weight.panel_count(),
            self.tw,
        );
        let tiles = (line1 - line0) * tw;
        let layout = TileLayout::new(tiles, cin, rows_per_panel(isa, tiles));
        let mut v = Scratch::take(points * layout.point_stride);
        let v = Shared(v.ptr());
        let (segments, groups, chunks) = (
            tw.div_ceil(ROW),
            (line1 - line0).div_ceil(LINES),
            cin.div_ceil(STAGE),
        );
        (0..groups * segments * chunks)
            .into_par_iter()
            .for_each(|i| {
                let (mut line, tx) = (
                    line0 + i / chunks / segments * LINES,
                    i / chunks % segments * ROW,
                );
                let (end, c0) = (line1.min(line + LINES), i % chunks * STAGE);
                let count = ROW.min(tw - tx);
                let mut region = self.region(LINES, count);
                while line < end {
                    // As many as belong to the same batch item.
                    let from = Place {
                        b: line / self.th,
                        ty: line % self.th,
                        tx,
                    };
                    let lines = (end - line).min(self.th - from.ty);
                    let row = TileRow {
                        first: (line - line0) * tw + tx,
                        count,
                    };
                    let channels = c0..cin.min(c0 + STAGE);
                    let (region, v) = (region.ptr(), v.get());
                    let to = Tiles { v, layout };
                    // SAFETY: these tiles lie inside the map and, counted from `line0`, inside `v`; each task has its own
                    // tiles and channels. `region` is made for LINES lines of `count`, of which there are `lines`.
                    unsafe { self.input_tiles(from, lines, row, tw, channels, region, to) };
                    line += lines;
                }
            });

        // Each part transforms its own weights.
        let parts = self.parts().min(tiles.div_ceil(SMALL));
        let chunk = CHUNK[usize::from(tiles > 32)];
        let panels_of_v = tiles.div_ceil(layout.per_panel);
        let part = panels_of_v.div_ceil(parts) * layout.per_panel;
        (0..panels * parts)
            .into_par_iter()
            .with_max_len(1)
            .for_each(|i| {
                let (nb, t0) = (i / parts, i % parts * part);
                let t1 = tiles.min(t0 + part);
                if t0 >= t1 {
                    return;
                }
                let (u_point, m_point) = (chunk * NB + SLAB, (t1 - t0) * NB + SLAB);
                let mut u = Scratch::take(points * u_point);
                let mut m = Scratch::take(points * m_point);
                let (u, m) = (u.ptr(), m.ptr());
                for c0 in (0..cin).step_by(chunk) {
                    let c1 = cin.min(c0 + chunk);
                    let taps = self.weight.taps(nb, c0);
                    // SAFETY: the taps of panel `nb` have `cin` channels; `u` has room for a chunk at each point.
                    unsafe {
                        weights(
                            isa,
                            self.scheme,
                            taps,
                            c1 - c0,
                            self.weight.panel_cols(nb),
                            u,
                            u_point,
                        )
                    };
                    for point in 0..points {
                        self.prefetch_weights(nb, c1, chunk, point);
                        let (u, m) = (
                            u.wrapping_add(point * u_point),
                            m.wrapping_add(point * m_point),
                        );
                        let v = v.get();
                        let from = Tiles { v, layout };
                        // SAFETY: `v` holds all channels of all tiles, from the loop before this; `u` this chunk of
                        // the weights, which begins at a multiple of 16. `m` has room for t0..t1 at each point,
                        // and chunks come in order. `t0` is a whole number of panels.
                        unsafe { self.products(t0..t1, from, point, c0..c1, u, m, nb) };
                    }
                }
                // A part may begin and end inside a line.
                let mut t = t0;
                while t < t1 {
                    let (line, tx) = (line0 + t / tw, t % tw);
                    let row = TileRow {
                        first: t - t0,
                        count: (tw - tx).min(t1 - t),
                    };
                    let to = Place {
                        b: line / self.th,
                        ty: line % self.th,
                        tx,
                    };
                    // SAFETY: `m` holds the products of t0..t1 with the panel; no other task has this part and panel.
                    unsafe { self.output_row(to, row, nb, m, m_point) };
                    t += row.count;
                }
            });
    }
}
