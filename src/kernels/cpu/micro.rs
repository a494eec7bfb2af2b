//! The GEMM register tile: up to `ROWS` rows of A by 32 columns of B, the operands packed so that every load is
//! sequential.
//!
//! A panel of A holds `r` rows in slabs of 16 steps of the inner dimension: element (row, k) lies at
//! `(k / 16 * r + row) * 16 + k % 16`. A panel of B holds [`NB`] columns: element (k, col) lies at `k * NB + col`.

use half::bf16;

use super::buf::Scratch;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::simd::V4;
use super::simd::{Array, Isa, Set, Simd, isa_fn};
#[cfg(target_arch = "x86_64")]
use super::simd::{V8, V16, V16OfPairs};

/// Columns in a panel of B: the unit in which weights are packed.
pub(super) const NB: usize = 32;
/// Steps of the inner dimension in a slab of A.
pub(super) const SLAB: usize = 16;

/// Where the tile's results go: element (row, col) at `ptr + row * row_stride + col / 16 * slab_stride + col % 16`.
#[derive(Clone, Copy)]
pub(super) struct Dst {
    pub ptr: *mut f32,
    pub row_stride: usize,
    pub slab_stride: usize,
    /// Whether to add to what is there.
    pub accumulate: bool,
}

/// One step of the inner dimension.
///
/// # Safety
/// The machine has `S`; V vectors can be read at `b`, a value at each of M places at `a`, [`SLAB`] apart.
#[inline(always)]
unsafe fn step<S: Simd, const M: usize, const V: usize>(
    acc: &mut [[S; V]; M],
    a: *const f32,
    b: *const f32,
) {
    // SAFETY: exactly what the caller answers for.
    unsafe {
        let mut bv = [S::splat(0.0); V];
        for v in 0..V {
            bv[v] = S::load(b.add(v * S::LANES));
        }
        for m in 0..M {
            let x = S::splat(*a.add(m * SLAB));
            for v in 0..V {
                acc[m][v] = x.mul_add(bv[v], acc[m][v]);
            }
        }
    }
}

/// `M` rows and `V` vectors of columns, from `col` on, of [`panel`].
///
/// # Safety
/// That of [`panel`] for these rows and columns, on a machine that has `S`.
#[inline(always)]
unsafe fn tile<S: Simd, const M: usize, const V: usize>(
    k: usize,
    a: *const f32,
    r: usize,
    b: *const f32,
    dst: Dst,
    col: usize,
) {
    // SAFETY: `a` goes through the panel of A slab by slab, `b` through the panel of B row by row, for `k` steps; `at` gives the
    // places of `dst`. All are those that the caller answers for.
    unsafe {
        let at = |m: usize, v: usize| {
            let col = col + v * S::LANES;
            dst.ptr
                .add(m * dst.row_stride + col / 16 * dst.slab_stride + col % 16)
        };
        let mut acc = [[S::splat(0.0); V]; M];
        if dst.accumulate {
            for m in 0..M {
                for v in 0..V {
                    acc[m][v] = S::load(at(m, v));
                }
            }
        }
        let (mut a, mut b) = (a, b.add(col));
        for _ in 0..k / SLAB {
            // Four steps to a turn; left to itself the compiler unrolls all 16 and then keeps `acc` in memory.
            for _ in 0..SLAB / 4 {
                step(&mut acc, a, b);
                step(&mut acc, a.add(1), b.add(NB));
                step(&mut acc, a.add(2), b.add(2 * NB));
                step(&mut acc, a.add(3), b.add(3 * NB));
                a = a.add(4);
                b = b.add(4 * NB);
            }
            a = a.add((r - 1) * SLAB);
        }
        for i in 0..k % SLAB {
            step(&mut acc, a.add(i), b.add(i * NB));
        }
        for m in 0..M {
            for v in 0..V {
                acc[m][v].store(at(m, v));
            }
        }
    }
}

/// [`tile`] for a number of rows known only now.
///
/// # Safety
/// That of [`tile`]. `rows` is from 1 to `S::ROWS`, or it panics.
#[inline(always)]
unsafe fn tile_rows<S: Simd, const V: usize>(
    rows: usize,
    k: usize,
    a: *const f32,
    r: usize,
    b: *const f32,
    dst: Dst,
    col: usize,
) {
    macro_rules! pick {
        ($($n:literal)*) => {
            match rows {
                // The compiler drops the arms that this instruction set's registers have no room for.
                // SAFETY: `tile` for `rows` rows, as the caller promises.
                $($n if $n <= S::ROWS => unsafe { tile::<S, $n, V>(k, a, r, b, dst, col) },)*
                _ => unreachable!("rows is at most S::ROWS"),
            }
        };
    }
    pick!(1 2 3 4 5 6 7 8 9 10 11 12)
}

/// # Safety
/// That of [`panel`], on a machine that has `S`.
#[inline(always)]
unsafe fn panel_body<S: Simd>(
    rows: usize,
    cols: usize,
    k: usize,
    a: *const f32,
    r: usize,
    b: *const f32,
    dst: Dst,
) {
    // SAFETY: one or two vectors of columns at a time make up `cols`, rounded up to a multiple of 16 at most, as the
    // widest step is 32 columns (two of 16 lanes, where more than 16 are left), else 16 or 8.
    unsafe {
        let mut col = 0;
        while col < cols {
            if S::LANES == 16 && cols - col <= 16 {
                tile_rows::<S, 1>(rows, k, a, r, b, dst, col);
                col += S::LANES;
            } else {
                tile_rows::<S, 2>(rows, k, a, r, b, dst, col);
                col += 2 * S::LANES;
            }
        }
    }
}

isa_fn! {
    /// `dst (rows, cols) [+]= A panel (rows, k) * B panel (k, cols)`: `rows` up to [`max_rows`], `cols` up to [`NB`]
    /// and rounded up to a multiple of 16, `r` the rows that the panel of A was packed with.
    ///
    /// # Safety
    /// `a` and `b` hold such panels, `dst` has room for (rows, cols rounded up) and holds numbers if it is added to.
    pub(super) fn panel = panel_body(rows: usize, cols: usize, k: usize, a: *const f32, r: usize, b: *const f32, dst: Dst)
}

/// [`panel`] of bfloat16 in pairs, for an [`Isa`] that multiplies them: everything that is said of a value there, an f32, is here a
/// pair of steps of the inner dimension, of which there are `k` pairs. The result is f32.
///
/// # Safety
/// That of [`panel`], for pairs; the machine has AVX512-BF16.
pub(super) unsafe fn panel_of_pairs(
    rows: usize,
    cols: usize,
    k: usize,
    a: *const f32,
    r: usize,
    b: *const f32,
    dst: Dst,
) {
    /// # Safety
    /// That of the function around this.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bf16,avx2,fma,f16c")]
    unsafe fn avx512bf16(
        rows: usize,
        cols: usize,
        k: usize,
        a: *const f32,
        r: usize,
        b: *const f32,
        dst: Dst,
    ) {
        // SAFETY: the instructions are this function's own; the rest is its caller's promise.
        unsafe { panel_body::<V16OfPairs>(rows, cols, k, a, r, b, dst) }
    }
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise is the same.
    unsafe {
        avx512bf16(rows, cols, k, a, r, b, dst);
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (rows, cols, k, a, r, b, dst);
        unreachable!("no instruction set of this machine multiplies pairs");
    }
}

/// [`panel_of_pairs`] where operands are `in_pairs`, else [`panel`].
///
/// # Safety
/// That of the one that runs.
pub(super) unsafe fn panel_of(
    in_pairs: bool,
    isa: Isa,
    rows: usize,
    cols: usize,
    k: usize,
    a: *const f32,
    r: usize,
    b: *const f32,
    dst: Dst,
) {
    // SAFETY: the caller's promise is the same.
    unsafe {
        if in_pairs {
            panel_of_pairs(rows, cols, k, a, r, b, dst)
        } else {
            panel(isa, rows, cols, k, a, r, b, dst)
        }
    }
}

/// Channels of a slab of pairs.
const PAIRS_SLAB: usize = 2 * SLAB;

/// Where value `k` of row `row` lies in a panel of A of pairs with `r` rows, counted in bfloat16.
#[inline(always)]
pub(super) fn place_of_pairs(row: usize, k: usize, r: usize) -> usize {
    (k / PAIRS_SLAB * r + row) * PAIRS_SLAB + k % PAIRS_SLAB
}

/// Values of f32 that a panel of A of pairs with `r` rows takes the place of.
pub(super) fn size_of_pairs(k: usize, r: usize) -> usize {
    k.div_ceil(PAIRS_SLAB) * r * SLAB
}

isa_fn! {
    /// Rounds a panel of A of `rows` rows and `k` steps to pairs of bfloat16; the second of an odd last pair is zero.
    ///
    /// # Safety
    /// `a` is a panel packed for `r` rows, all of whose slabs can be read; there is room at `to` as [`size_of_pairs`] says.
    pub(super) fn pair_panel = pair_panel_body(rows: usize, k: usize, a: *const f32, r: usize, to: *mut bf16)
}

/// # Safety
/// That of [`pair_panel`], on a machine that has `S`.
#[inline(always)]
unsafe fn pair_panel_body<S: Simd>(rows: usize, k: usize, a: *const f32, r: usize, to: *mut bf16) {
    // SAFETY: whole slabs of both are touched, of rows below `r`.
    unsafe {
        for step in (0..k).step_by(SLAB) {
            for row in 0..rows {
                let from = a.add((step / SLAB * r + row) * SLAB);
                let to = to.add(place_of_pairs(row, step, r));
                for lane in (0..SLAB).step_by(S::LANES) {
                    S::load(from.add(lane)).store_bf16(to.add(lane));
                }
            }
        }
        if k % 2 == 1 {
            for row in 0..rows {
                to.add(place_of_pairs(row, k, r)).write(bf16::ZERO);
            }
        }
    }
}

/// The most rows of a panel of A.
pub(super) fn max_rows(isa: Isa) -> usize {
    match isa.set() {
        #[cfg(target_arch = "x86_64")]
        Set::Avx512Bf16 | Set::Avx512 => V16::ROWS,
        #[cfg(target_arch = "x86_64")]
        Set::Avx2 => V8::ROWS,
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        Set::Base => V4::ROWS,
        Set::Portable => Array::ROWS,
    }
}

/// Rows per panel for `n` rows: the fewest panels, evenly filled, so that none is left with a row or two.
pub(super) fn rows_per_panel(isa: Isa, n: usize) -> usize {
    n.div_ceil(n.div_ceil(max_rows(isa)).max(1)).max(1)
}

/// The rate, in GFLOP/s on the calling thread, of the register tile alone: full panels of A (`k` long) against `panels` panels
/// of B one after the other. With one panel everything stays in the cache: the machine's peak for matrix products, for
/// benchmarks to compare with.
pub fn gemm_rate(k: usize, panels: usize, seconds: f64) -> f64 {
    let isa = Isa::current();
    let r = max_rows(isa);
    let mut a = Scratch::take(r * k.next_multiple_of(SLAB));
    let mut b = Scratch::take(panels * k * NB);
    let mut c = Scratch::take(r * NB);
    let (a, b, c) = (a.ptr(), b.ptr(), c.ptr());
    let dst = Dst {
        ptr: c,
        row_stride: NB,
        slab_stride: 16,
        accumulate: false,
    };
    let start = std::time::Instant::now();
    let mut best = f64::MAX;
    while start.elapsed().as_secs_f64() < seconds {
        let turn = std::time::Instant::now();
        let repeat = (1 << 12) / panels + 1;
        for i in 0..panels * repeat {
            // SAFETY: the scratch, kept to the end of this function, has room for the panel of A, those of B and the tile.
            unsafe {
                panel(
                    isa,
                    r,
                    NB,
                    k,
                    a,
                    r,
                    b.wrapping_add(i % panels * k * NB),
                    dst,
                )
            };
        }
        best = best.min(turn.elapsed().as_secs_f64() / (panels * repeat) as f64);
    }
    2e-9 * (r * NB * k) as f64 / best
}
