//! 3x3 stride-1 convolution by Winograd's F(4x4, 3x3), a quarter of the multiplications, in one of two orders of work: large maps
//! with few weights by blocks of tiles, all weights transformed once per call; all others by panels of output channels, some
//! tiles at a time, each thread transforming the weights it needs. Both give the same bits.

use rayon::prelude::*;

use super::buf::{Scratch, Shared};
use super::input::{Input, Region, stage_region};
use super::micro::{Dst, NB, SLAB, panel, rows_per_panel};
use super::packed::PackedConv;
use super::simd::{Isa, prefetch};
use super::transform::{OUT, OutputRow, POINTS, TileLayout, TileRow, inputs, outputs, weights};

/// The fewest and most tiles of a task over a large map.
const BLOCK: [usize; 2] = [16, 64];
/// Tiles across and lines of tiles staged at a time.
const ROW: usize = 16;
const LINES: usize = 4;
/// Input channels staged at a time: contiguous in the input, so not too few.
const STAGE: usize = 128;
/// Input channels whose transformed weights are kept at a time over a small map, so that they, the tiles' products and the next
/// weights fit the L2 cache together: for up to 32 tiles, and for more.
const CHUNK: [usize; 2] = [96, 128];
/// From so many tiles on a map is large.
const LARGE: usize = 256;
/// The most tiles of a task over a small map: their products with a panel of weights stay in the L2 cache.
const SMALL: usize = 64;
/// The most transformed weights kept for a call, 16 MB: more would not stay in the L3 cache beside the rest, and a map is then
/// done as small ones are, part by part.
const WEIGHTS: usize = 4 << 20;

/// Shapes of one convolution.
struct Conv<'a> {
    isa: Isa,
    input: &'a Input<'a>,
    weight: &'a PackedConv,
    /// (b, h, w, cout).
    out: Shared,
    /// The same, or null.
    residual: Shared,
    /// Output (h, w).
    h: usize,
    w: usize,
    /// Tiles down and across.
    th: usize,
    tw: usize,
}

/// Whether [`winograd`] can do this convolution.
pub(super) fn applies(conv: &PackedConv) -> bool {
    conv.kh == 3 && conv.kw == 3 && conv.stride == 1
}

/// The convolution, plus the bias and the residual (null for none; may be `out`).
///
/// # Safety
/// `out` and the residual hold the output, (b, h, w, cout).
pub(super) unsafe fn winograd(
    isa: Isa,
    input: &Input,
    weight: &PackedConv,
    out: Shared,
    residual: Shared,
) {
    let (b, h, w) = input.shape();
    let (h, w) = weight.output_size(h, w);
    let (th, tw) = (h.div_ceil(OUT), w.div_ceil(OUT));
    let conv = Conv {
        isa,
        input,
        weight,
        out,
        residual,
        h,
        w,
        th,
        tw,
    };
    if th * tw >= LARGE && POINTS * weight.cin * weight.cout <= WEIGHTS {
        conv.by_blocks(b)
    } else {
        conv.by_panels(b)
    }
}

impl Conv<'_> {
    /// Stages and transforms the tiles of `lines` lines from line `ty` on of batch item `b`, `row.count` from tile `tx` on, channels
    /// `c0..c1`. The first becomes tile `row.first` of `v`, the next lines follow `pitch` tiles apart. `region` has room.
    fn input_tiles(
        &self,
        (b, ty, tx): (usize, usize, usize),
        lines: usize,
        row: TileRow,
        pitch: usize,
        (c0, c1): (usize, usize),
        region: *mut f32,
        (v, layout): (*mut f32, TileLayout),
    ) {
        let [top, _, left, _] = self.weight.pad;
        let (h, w) = (lines * OUT + 2, row.count * OUT + 2);
        let y = (ty * OUT) as isize - top as isize;
        let x = (tx * OUT) as isize - left as isize;
        let slabs = (c1 - c0).div_ceil(SLAB);
        // SAFETY: the region covers these tiles; `v` has room for them.
        unsafe {
            stage_region(
                self.isa,
                self.input,
                Region { b, y, x, h, w },
                c0,
                c1,
                region,
            );
            for line in 0..lines {
                let region = region.add(line * OUT * w * slabs * SLAB);
                let row = TileRow {
                    first: row.first + line * pitch,
                    ..row
                };
                inputs(self.isa, region, w, slabs, row, v, layout, c0 / SLAB);
            }
        }
    }

    /// Transforms tiles back and writes them: those from `tx` on of line `ty` of item `b`, for panel `nb`.
    fn output_row(
        &self,
        (b, ty, tx): (usize, usize, usize),
        row: TileRow,
        nb: usize,
        m: *const f32,
        point_stride: usize,
    ) {
        let at = ((b * self.h + ty * OUT) * self.w + tx * OUT) * self.weight.cout + nb * NB;
        let to = OutputRow {
            // SAFETY: inside the output.
            out: unsafe { self.out.get().add(at) },
            residual: self.residual.offset_or_null(at),
            bias: self.weight.bias(nb).as_ptr(),
            width: self.w,
            h: OUT.min(self.h - ty * OUT),
            w: (row.count * OUT).min(self.w - tx * OUT),
            ld: self.weight.cout,
            cols: self.weight.panel_cols(nb),
        };
        // SAFETY: the products of these tiles are in `m`; no other task writes these pixels and channels.
        unsafe { outputs(self.isa, m, point_stride, row, to) };
    }

    fn region(lines: usize, across: usize) -> Scratch {
        Scratch::take((lines * OUT + 2) * (across * OUT + 2) * STAGE)
    }

    fn by_blocks(&self, b: usize) {
        let (isa, cin, panels) = (self.isa, self.weight.cin, self.weight.panel_count());
        // (panel, point, cin, NB), points an odd number of cache lines apart.
        let u_point = cin * NB + SLAB;
        let mut u = Scratch::take(panels * POINTS * u_point);
        let u = Shared(u.ptr());
        let chunks = cin.div_ceil(STAGE);
        (0..panels * chunks).into_par_iter().for_each(|i| {
            let (nb, c0) = (i / chunks, i % chunks * STAGE);
            let n = STAGE.min(cin - c0);
            let taps = self.weight.panel(nb, 0)[c0 * NB..].as_ptr();
            // SAFETY: each task writes its own panel's channels.
            unsafe {
                let u = u.get().add(nb * POINTS * u_point + c0 * NB);
                weights(
                    isa,
                    taps,
                    cin * NB,
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
                let mut v = Scratch::take(POINTS * layout.point_stride);
                let mut m = Scratch::take(POINTS * m_point);
                let mut region = Self::region(bh, bw);
                let (v, m, region) = (v.ptr(), m.ptr(), region.ptr());
                for c0 in (0..cin).step_by(STAGE) {
                    let row = TileRow {
                        first: 0,
                        count: bw,
                    };
                    self.input_tiles(
                        (b, ty0, tx0),
                        bh,
                        row,
                        bw,
                        (c0, cin.min(c0 + STAGE)),
                        region,
                        (v, layout),
                    );
                }
                for nb in 0..panels {
                    for point in 0..POINTS {
                        let u = u.get().wrapping_add((nb * POINTS + point) * u_point);
                        self.products(
                            (0, tiles),
                            v,
                            layout,
                            point,
                            (0, cin),
                            u,
                            m.wrapping_add(point * m_point),
                            nb,
                        );
                    }
                    for ty in 0..bh {
                        let row = TileRow {
                            first: ty * bw,
                            count: bw,
                        };
                        self.output_row((b, ty0 + ty, tx0), row, nb, m, m_point);
                    }
                }
            });
    }

    /// `m (tiles, NB) [+]= v (tiles, c0..c1) * u (c0..c1, NB)` at one point, for the tiles of panels of `v` from tile `t0`
    /// (a panel's first) to `t1`; `m` is the place of tile `t0`. Adds from the second chunk of channels on.
    fn products(
        &self,
        (t0, t1): (usize, usize),
        v: *const f32,
        layout: TileLayout,
        point: usize,
        (c0, c1): (usize, usize),
        u: *const f32,
        m: *mut f32,
        nb: usize,
    ) {
        let r = layout.per_panel;
        for t in (t0..t1).step_by(r) {
            let ptr = m.wrapping_add((t - t0) * NB);
            let dst = Dst {
                ptr,
                row_stride: NB,
                slab_stride: 16,
                accumulate: c0 > 0,
            };
            let a = v.wrapping_add(point * layout.point_stride + layout.panel(t / r) + c0 * r);
            // SAFETY: the tiles' inputs and the weights were transformed before; `m` has room.
            unsafe {
                panel(
                    self.isa,
                    r.min(t1 - t),
                    self.weight.panel_cols(nb),
                    c1 - c0,
                    a,
                    r,
                    u,
                    dst,
                )
            };
        }
    }

    /// Fetches a share (`point` of [`POINTS`]) of the weights that a thread needs after channel `c` of panel `nb`, the next
    /// chunk's or panel's: small maps would otherwise wait for memory, which is idle while they multiply.
    fn prefetch_weights(&self, nb: usize, c: usize, chunk: usize, point: usize) {
        let (nb, c) = if c < self.weight.cin {
            (nb, c)
        } else {
            (nb + 1, 0)
        };
        if nb == self.weight.panel_count() {
            return;
        }
        let lines = chunk.min(self.weight.cin - c) * NB / 16;
        for tap in 0..9 {
            let from = self.weight.panel(nb, tap)[c * NB..].as_ptr();
            for line in point * lines / POINTS..(point + 1) * lines / POINTS {
                prefetch(from.wrapping_add(line * 16));
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
        let (isa, cin, panels, tw) = (
            self.isa,
            self.weight.cin,
            self.weight.panel_count(),
            self.tw,
        );
        let tiles = (line1 - line0) * tw;
        let layout = TileLayout::new(tiles, cin, rows_per_panel(isa, tiles));
        let mut v = Scratch::take(POINTS * layout.point_stride);
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
                let mut region = Self::region(LINES, count);
                while line < end {
                    // As many as belong to the same batch item.
                    let (b, ty) = (line / self.th, line % self.th);
                    let lines = (end - line).min(self.th - ty);
                    let row = TileRow {
                        first: (line - line0) * tw + tx,
                        count,
                    };
                    let channels = (c0, cin.min(c0 + STAGE));
                    self.input_tiles(
                        (b, ty, tx),
                        lines,
                        row,
                        tw,
                        channels,
                        region.ptr(),
                        (v.get(), layout),
                    );
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
                let mut u = Scratch::take(POINTS * u_point);
                let mut m = Scratch::take(POINTS * m_point);
                let (u, m) = (u.ptr(), m.ptr());
                for c0 in (0..cin).step_by(chunk) {
                    let c1 = cin.min(c0 + chunk);
                    let taps = self.weight.panel(nb, 0)[c0 * NB..].as_ptr();
                    // SAFETY: `u` has room for a chunk.
                    unsafe {
                        weights(
                            isa,
                            taps,
                            cin * NB,
                            c1 - c0,
                            self.weight.panel_cols(nb),
                            u,
                            u_point,
                        )
                    };
                    for point in 0..POINTS {
                        self.prefetch_weights(nb, c1, chunk, point);
                        let (u, m) = (
                            u.wrapping_add(point * u_point),
                            m.wrapping_add(point * m_point),
                        );
                        self.products((t0, t1), v.get(), layout, point, (c0, c1), u, m, nb);
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
                    self.output_row((line / self.th, line % self.th, tx), row, nb, m, m_point);
                    t += row.count;
                }
            });
    }
}
