//! One vector type per instruction set behind a small trait, the run-time choice between them, and the macro that
//! compiles a generic kernel body once for each.

use std::cell::Cell;
use std::fmt;
use std::sync::OnceLock;

use half::{bf16, f16};

use super::scalar::Scalar;

/// An instruction set that the kernels are compiled for. A value is proof that the machine has it: only
/// [`Isa::available`] makes them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Isa(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Set {
    /// The same as the next, and products of bfloat16 in pairs.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// 16 lanes, 32 registers.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// 8 lanes with fused multiply-add, and conversions of float16.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 4 lanes, what every machine of its kind has: SSE2, NEON.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    Base,
    /// Arrays of 4, left to the compiler.
    Portable,
}

/// The environment variable that chooses the kernels' instructions, to compare or to reproduce: `avx512bf16`, `avx512`,
/// `avx2`, `base` (SSE2 or NEON) or `portable`.
pub const CHOICE: &str = "SD_UPSCALE_KERNELS";

thread_local! {
    static FORCED: Cell<Option<Isa>> = const { Cell::new(None) };
}

impl Isa {
    /// Those this machine can run, the fastest first.
    pub fn available() -> Vec<Isa> {
        let mut isas = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2 && is_x86_feature_detected!("avx512f") {
                if is_x86_feature_detected!("avx512bf16") {
                    isas.push(Isa(Set::Avx512Bf16));
                }
                isas.push(Isa(Set::Avx512));
            }
            if avx2 {
                isas.push(Isa(Set::Avx2));
            }
        }
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        isas.push(Isa(Set::Base));
        isas.push(Isa(Set::Portable));
        isas
    }

    /// The one that kernels called from this thread use: the chosen one, unless inside [`Isa::force`].
    pub fn current() -> Isa {
        static CHOSEN: OnceLock<Isa> = OnceLock::new();
        let chosen = || Isa::chosen().unwrap_or(Isa::available()[0]);
        FORCED.get().unwrap_or_else(|| *CHOSEN.get_or_init(chosen))
    }

    /// The one that the environment variable [`CHOICE`] names, in any case; without it the fastest.
    ///
    /// # Errors
    /// It names none that this machine has; the message lists those.
    pub fn chosen() -> Result<Isa, String> {
        let available = Isa::available();
        let Some(wanted) = std::env::var_os(CHOICE).filter(|name| !name.is_empty()) else {
            return Ok(available[0]);
        };
        let named = |isa: &&Isa| wanted.eq_ignore_ascii_case(format!("{isa:?}"));
        available.iter().find(named).copied().ok_or_else(|| {
            let names: Vec<String> = available
                .iter()
                .map(|isa| format!("{isa:?}").to_lowercase())
                .collect();
            format!(
                "{CHOICE}: this machine has no kernels called {wanted:?}; expected one of {}",
                names.join(", ")
            )
        })
    }

    /// Runs `f` with the kernels that it calls held to this instruction set (for tests and benchmarks).
    pub fn force<T>(self, f: impl FnOnce() -> T) -> T {
        struct Restore(Option<Isa>);
        impl Drop for Restore {
            fn drop(&mut self) {
                FORCED.set(self.0);
            }
        }
        let _restore = Restore(FORCED.replace(Some(self)));
        f()
    }

    pub(super) fn set(self) -> Set {
        self.0
    }

    /// Whether it multiplies bfloat16 in pairs, at twice the rate of float32: linear layers, 1x1 convolutions and attention whose
    /// values are kept so use it.
    pub(super) fn multiplies_pairs(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 == Set::Avx512Bf16;
        #[cfg(not(target_arch = "x86_64"))]
        return false;
    }
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A vector of f32. A value is proof that the machine has the instruction set: whoever makes one out of numbers or memory
/// promises it, so that what starts from a vector is safe.
///
/// All this has to be inlined into functions compiled for the instruction set ([`isa_fn`]): elsewhere it works, slowly.
/// Pointers need no alignment.
pub trait Simd: Copy {
    const LANES: usize;
    /// Rows of the GEMM register tile; its columns are two vectors.
    const ROWS: usize;

    /// `x` in every lane.
    ///
    /// # Safety
    /// The machine has the instruction set.
    unsafe fn splat(x: f32) -> Self;

    /// # Safety
    /// The machine has the instruction set; `LANES` values can be read at `p`.
    unsafe fn load(p: *const f32) -> Self;

    /// # Safety
    /// `LANES` values can be written at `p`.
    unsafe fn store(self, p: *mut f32);

    /// A vector like this one, with `x` in every lane.
    fn like(self, x: f32) -> Self;
    fn add(self, o: Self) -> Self;
    fn sub(self, o: Self) -> Self;
    fn mul(self, o: Self) -> Self;
    fn div(self, o: Self) -> Self;
    /// NaN where `o` is; where only `self` is, the machines differ.
    fn max(self, o: Self) -> Self;
    /// As [`Simd::max`].
    fn min(self, o: Self) -> Self;
    /// `self * m + a`, fused where the instruction set can.
    fn mul_add(self, m: Self, a: Self) -> Self;
    /// `2^n` where `self` is `n + 1.5 * 2^23` for an integer `n` in -126..=127.
    fn exp2_of_biased(self) -> Self;

    /// The first `n < LANES` values from `p`, the rest zero.
    ///
    /// # Safety
    /// The machine has the instruction set; `n < LANES` values can be read at `p`.
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        let mut t = [0f32; MOST_LANES];
        // SAFETY: the caller answers for `n` values at `p`, `t` has room for a vector; the instructions as promised.
        unsafe {
            std::ptr::copy_nonoverlapping(p, t.as_mut_ptr(), n);
            Self::load(t.as_ptr())
        }
    }

    /// Stores the first `n < LANES` values.
    ///
    /// # Safety
    /// `n < LANES` values can be written at `p`.
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        let mut t = [0f32; MOST_LANES];
        // SAFETY: `t` has room for a vector, the caller answers for `n` values at `p`.
        unsafe {
            self.store(t.as_mut_ptr());
            std::ptr::copy_nonoverlapping(t.as_ptr(), p, n);
        }
    }

    /// What is left of a row: a vector, or where `n < LANES` the first `n` values from `p`, the rest zero.
    ///
    /// # Safety
    /// The machine has the instruction set; the smaller of `n` and `LANES` values can be read at `p`.
    #[inline(always)]
    unsafe fn load_up_to(p: *const f32, n: usize) -> Self {
        // SAFETY: as the caller promises.
        unsafe {
            if n < Self::LANES {
                Self::load_first(p, n)
            } else {
                Self::load(p)
            }
        }
    }

    /// Stores a vector, or where `n < LANES` its first `n` values.
    ///
    /// # Safety
    /// The smaller of `n` and `LANES` values can be written at `p`.
    #[inline(always)]
    unsafe fn store_up_to(self, p: *mut f32, n: usize) {
        // SAFETY: as the caller promises.
        unsafe {
            if n < Self::LANES {
                self.store_first(p, n)
            } else {
                self.store(p)
            }
        }
    }

    /// As [`Simd::load`], of bfloat16.
    ///
    /// # Safety
    /// The machine has the instruction set; `LANES` values can be read at `p`.
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self {
        // SAFETY: the caller's promise is the same.
        unsafe { load_each(p) }
    }

    /// As [`Simd::store`], rounded to bfloat16.
    ///
    /// # Safety
    /// `LANES` values can be written at `p`.
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16) {
        // SAFETY: the caller's promise is the same.
        unsafe { store_each(self, p) }
    }

    /// As [`Simd::load`], of float16.
    ///
    /// # Safety
    /// The machine has the instruction set; `LANES` values can be read at `p`.
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self {
        // SAFETY: the caller's promise is the same.
        unsafe { load_each(p) }
    }

    /// As [`Simd::store`], rounded to float16.
    ///
    /// # Safety
    /// `LANES` values can be written at `p`.
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16) {
        // SAFETY: the caller's promise is the same.
        unsafe { store_each(self, p) }
    }

    /// Transposes a square of `LANES` values a side: rows `ld` apart at `from`, one after the other at `to`.
    ///
    /// # Safety
    /// The machine has the instruction set; the rows can be read, and there is room for the square at `to`.
    #[inline(always)]
    unsafe fn transpose(from: *const f32, ld: usize, to: *mut f32) {
        for row in 0..Self::LANES {
            for column in 0..Self::LANES {
                // SAFETY: inside the square, as the caller promises.
                unsafe {
                    let x = from.add(row * ld + column).read();
                    to.add(column * Self::LANES + row).write(x);
                }
            }
        }
    }

    /// The lanes in an array, zeros behind.
    #[inline(always)]
    fn to_array(self) -> [f32; MOST_LANES] {
        let mut t = [0f32; MOST_LANES];
        // SAFETY: `t` has room for a vector.
        unsafe { self.store(t.as_mut_ptr()) };
        t
    }
}

/// A vector of values that are widened one by one, for machines without instructions for it.
///
/// # Safety
/// The machine has the instruction set; a vector's values can be read at `p`.
#[inline(always)]
unsafe fn load_each<S: Simd, V: Scalar>(p: *const V) -> S {
    let mut t = [0f32; MOST_LANES];
    // SAFETY: the caller answers for the values at `p`, `t` has room for a vector.
    unsafe {
        for (i, t) in t.iter_mut().enumerate().take(S::LANES) {
            *t = p.add(i).read().widen();
        }
        S::load(t.as_ptr())
    }
}

/// The inverse.
///
/// # Safety
/// A vector's values can be written at `p`.
#[inline(always)]
unsafe fn store_each<S: Simd, V: Scalar>(x: S, p: *mut V) {
    let t = x.to_array();
    for (i, &x) in t.iter().enumerate().take(S::LANES) {
        // SAFETY: the caller's promise.
        unsafe { p.add(i).write(V::narrow(x)) };
    }
}

/// The most lanes of a vector.
pub(super) const MOST_LANES: usize = 16;

/// Implements [`Simd`] for a wrapper around a vector of intrinsics.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! vector {
    (
        $(#[$meta:meta])* $name:ident($raw:ty), $lanes:literal lanes, $rows:literal rows, $splat:ident $load:ident $store:ident
        $add:ident $sub:ident $mul:ident $div:ident $max:ident $min:ident,
        mul_add($x:ident, $m:ident, $a:ident) $mul_add:expr,
        integers $splat_i32:ident $add_i32:ident $shl_i32:ident $to_i32:ident $to_f32:ident
        $(, load_first $load_first:ident, store_first $store_first:ident)?
        $(, halves $load_bits:ident $store_bits:ident $to_wide:ident $round_bf16:ident $load_f16:ident $store_f16:ident)?
        $(, transpose $transpose:ident)?
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy)]
        pub struct $name($raw);

        impl Simd for $name {
            const LANES: usize = $lanes;
            const ROWS: usize = $rows;
            #[inline(always)]
            unsafe fn splat(x: f32) -> Self {
                // SAFETY: the caller promises the instructions.
                unsafe { Self($splat(x)) }
            }
            #[inline(always)]
            unsafe fn load(p: *const f32) -> Self {
                // SAFETY: the caller promises the instructions and what is read.
                unsafe { Self($load(p)) }
            }
            #[inline(always)]
            unsafe fn store(self, p: *mut f32) {
                // SAFETY: `self` proves the instructions; the caller promises room for a vector.
                unsafe { $store(p, self.0) }
            }
            #[inline(always)]
            fn like(self, x: f32) -> Self {
                // SAFETY: `self` proves the instructions.
                unsafe { Self($splat(x)) }
            }
            lanewise! { add $add, sub $sub, mul $mul, div $div, max $max, min $min }
            #[inline(always)]
            fn mul_add(self, m: Self, a: Self) -> Self {
                let ($x, $m, $a) = (self.0, m.0, a.0);
                // SAFETY: `self` proves the instructions, which touch registers only.
                unsafe { Self($mul_add) }
            }
            #[inline(always)]
            fn exp2_of_biased(self) -> Self {
                // The bits of 1.0: added to an exponent moved into place, they add its bias.
                const ONE: i32 = 0x3f80_0000;
                // SAFETY: `self` proves the instructions, which touch registers only.
                unsafe {
                    let n = $shl_i32::<23>($to_i32(self.0));
                    Self($to_f32($add_i32(n, $splat_i32(ONE))))
                }
            }
            $(
                #[inline(always)]
                unsafe fn load_first(p: *const f32, n: usize) -> Self {
                    // SAFETY: the caller promises the instructions and `n` values; the lanes masked out are not read.
                    unsafe { Self($load_first((1 << n) - 1, p)) }
                }
                #[inline(always)]
                unsafe fn store_first(self, p: *mut f32, n: usize) {
                    // SAFETY: `self` proves the instructions; the caller promises room for `n` values, and the lanes
                    // masked out are not written.
                    unsafe { $store_first(p, (1 << n) - 1, self.0) }
                }
            )?
            $(
                #[inline(always)]
                unsafe fn load_bf16(p: *const bf16) -> Self {
                    // SAFETY: the caller promises the instructions and what is read.
                    unsafe { Self($to_f32($shl_i32::<16>($to_wide($load_bits(p.cast()))))) }
                }
                #[inline(always)]
                unsafe fn store_bf16(self, p: *mut bf16) {
                    // SAFETY: `self` proves the instructions; the caller promises room for a vector.
                    unsafe { $store_bits(p.cast(), $round_bf16(self.0)) }
                }
                #[inline(always)]
                unsafe fn load_f16(p: *const f16) -> Self {
                    // SAFETY: the caller promises the instructions and what is read.
                    unsafe { Self($load_f16($load_bits(p.cast()))) }
                }
                #[inline(always)]
                unsafe fn store_f16(self, p: *mut f16) {
                    // SAFETY: `self` proves the instructions; the caller promises room for a vector.
                    unsafe { $store_bits(p.cast(), $store_f16::<_MM_FROUND_TO_NEAREST_INT>(self.0)) }
                }
            )?
            $(
                #[inline(always)]
                unsafe fn transpose(from: *const f32, ld: usize, to: *mut f32) {
                    // SAFETY: the caller's promise is the same.
                    unsafe { $transpose(from, ld, to) }
                }
            )?
        }
    };
}

/// Methods that are one intrinsic of two vectors.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! lanewise {
    ($($method:ident $intrinsic:ident),*) => {$(
        #[inline(always)]
        fn $method(self, o: Self) -> Self {
            // SAFETY: `self` proves the instruction, which touches registers only.
            unsafe { Self($intrinsic(self.0, o.0)) }
        }
    )*};
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::mem::transmute;

    use half::{bf16, f16};

    use super::Simd;

    /// The bits of bfloat16 that `x` is nearest to: in integers, since the instruction for it takes subnormal numbers for zero.
    ///
    /// # Safety
    /// The machine has AVX-512.
    #[inline(always)]
    unsafe fn round_bf16_16(x: __m512) -> __m256i {
        // SAFETY: as promised; the instructions touch registers only.
        unsafe {
            let bits = _mm512_castps_si512(x);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
            let rounded = _mm512_mask_mov_epi32(_mm512_add_epi32(bits, half), nan, quiet);
            _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded))
        }
    }

    /// The same.
    ///
    /// # Safety
    /// The machine has AVX2.
    #[inline(always)]
    unsafe fn round_bf16_8(x: __m256) -> __m128i {
        // SAFETY: as promised; the instructions touch registers only.
        unsafe {
            let bits = _mm256_castps_si256(x);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
            let rounded = _mm256_blendv_epi8(_mm256_add_epi32(bits, half), quiet, nan);
            let high = _mm256_srli_epi32::<16>(rounded);
            // Packed within each half of the vector: the first and third quarter follow each other.
            let packed = _mm256_packus_epi32(high, high);
            _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b1000>(packed))
        }
    }

    /// [`Simd::transpose`] of 16 by 16.
    ///
    /// # Safety
    /// That of the trait's; the machine has AVX-512.
    #[inline(always)]
    unsafe fn transpose_16(from: *const f32, ld: usize, to: *mut f32) {
        // SAFETY: the rows and the square are the caller's promise; all else touches registers only.
        unsafe {
            // Of four rows each, in each quarter of a vector: four columns of them. Written as loops, since closures are not
            // compiled for the instruction set.
            let mut groups = [[_mm512_setzero_ps(); 4]; 4];
            for group in 0..4 {
                let from = from.add(4 * group * ld);
                let (a, b) = (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(ld)));
                let (c, d) = (
                    _mm512_loadu_ps(from.add(2 * ld)),
                    _mm512_loadu_ps(from.add(3 * ld)),
                );
                let low_ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
                let high_ab = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
                let low_cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
                let high_cd = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
                groups[group] = [
                    _mm512_castpd_ps(_mm512_unpacklo_pd(low_ab, low_cd)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(low_ab, low_cd)),
                    _mm512_castpd_ps(_mm512_unpacklo_pd(high_ab, high_cd)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(high_ab, high_cd)),
                ];
            }
            let [a, b, c, d] = groups;
            for i in 0..4 {
                let (low_ab, high_ab) = (
                    _mm512_shuffle_f32x4::<0x44>(a[i], b[i]),
                    _mm512_shuffle_f32x4::<0xee>(a[i], b[i]),
                );
                let (low_cd, high_cd) = (
                    _mm512_shuffle_f32x4::<0x44>(c[i], d[i]),
                    _mm512_shuffle_f32x4::<0xee>(c[i], d[i]),
                );
                let columns = [
                    _mm512_shuffle_f32x4::<0x88>(low_ab, low_cd),
                    _mm512_shuffle_f32x4::<0xdd>(low_ab, low_cd),
                    _mm512_shuffle_f32x4::<0x88>(high_ab, high_cd),
                    _mm512_shuffle_f32x4::<0xdd>(high_ab, high_cd),
                ];
                for quarter in 0..4 {
                    _mm512_storeu_ps(to.add((4 * quarter + i) * 16), columns[quarter]);
                }
            }
        }
    }

    /// [`Simd::transpose`] of 8 by 8.
    ///
    /// # Safety
    /// That of the trait's; the machine has AVX2.
    #[inline(always)]
    unsafe fn transpose_8(from: *const f32, ld: usize, to: *mut f32) {
        // SAFETY: as above.
        unsafe {
            // Of four rows each, in each half of a vector: four columns of them. Written as loops, since closures are not
            // compiled for the instruction set.
            let mut groups = [[_mm256_setzero_ps(); 4]; 2];
            for group in 0..2 {
                let from = from.add(4 * group * ld);
                let (a, b) = (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(ld)));
                let (c, d) = (
                    _mm256_loadu_ps(from.add(2 * ld)),
                    _mm256_loadu_ps(from.add(3 * ld)),
                );
                let low_ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b));
                let high_ab = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
                let low_cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
                let high_cd = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
                groups[group] = [
                    _mm256_castpd_ps(_mm256_unpacklo_pd(low_ab, low_cd)),
                    _mm256_castpd_ps(_mm256_unpackhi_pd(low_ab, low_cd)),
                    _mm256_castpd_ps(_mm256_unpacklo_pd(high_ab, high_cd)),
                    _mm256_castpd_ps(_mm256_unpackhi_pd(high_ab, high_cd)),
                ];
            }
            let [a, b] = groups;
            for i in 0..4 {
                let (low, high) = (
                    _mm256_permute2f128_ps::<0x20>(a[i], b[i]),
                    _mm256_permute2f128_ps::<0x31>(a[i], b[i]),
                );
                _mm256_storeu_ps(to.add(i * 8), low);
                _mm256_storeu_ps(to.add((4 + i) * 8), high);
            }
        }
    }

    vector! {
        V16(__m512), 16 lanes, 12 rows, _mm512_set1_ps _mm512_loadu_ps _mm512_storeu_ps
        _mm512_add_ps _mm512_sub_ps _mm512_mul_ps _mm512_div_ps _mm512_max_ps _mm512_min_ps,
        mul_add(x, m, a) _mm512_fmadd_ps(x, m, a),
        integers _mm512_set1_epi32 _mm512_add_epi32 _mm512_slli_epi32 _mm512_castps_si512 _mm512_castsi512_ps,
        load_first _mm512_maskz_loadu_ps, store_first _mm512_mask_storeu_ps,
        halves _mm256_loadu_si256 _mm256_storeu_si256 _mm512_cvtepu16_epi32 round_bf16_16 _mm512_cvtph_ps _mm512_cvtps_ph,
        transpose transpose_16
    }
    vector! {
        /// Products of pairs: the GEMM tile's operands have two values of bfloat16 in each lane, `mul_add` adds both products, and sums are
        /// float32. All else is as for [`V16`].
        V16OfPairs(__m512), 16 lanes, 12 rows, _mm512_set1_ps _mm512_loadu_ps _mm512_storeu_ps
        _mm512_add_ps _mm512_sub_ps _mm512_mul_ps _mm512_div_ps _mm512_max_ps _mm512_min_ps,
        mul_add(x, m, a) _mm512_dpbf16_ps(a, transmute::<__m512, __m512bh>(x), transmute::<__m512, __m512bh>(m)),
        integers _mm512_set1_epi32 _mm512_add_epi32 _mm512_slli_epi32 _mm512_castps_si512 _mm512_castsi512_ps
    }
    vector! {
        V8(__m256), 8 lanes, 6 rows, _mm256_set1_ps _mm256_loadu_ps _mm256_storeu_ps
        _mm256_add_ps _mm256_sub_ps _mm256_mul_ps _mm256_div_ps _mm256_max_ps _mm256_min_ps,
        mul_add(x, m, a) _mm256_fmadd_ps(x, m, a),
        integers _mm256_set1_epi32 _mm256_add_epi32 _mm256_slli_epi32 _mm256_castps_si256 _mm256_castsi256_ps,
        halves _mm_loadu_si128 _mm_storeu_si128 _mm256_cvtepu16_epi32 round_bf16_8 _mm256_cvtph_ps _mm256_cvtps_ph,
        transpose transpose_8
    }
    vector! {
        /// SSE2, which every x86-64 has.
        V4(__m128), 4 lanes, 5 rows, _mm_set1_ps _mm_loadu_ps _mm_storeu_ps
        _mm_add_ps _mm_sub_ps _mm_mul_ps _mm_div_ps _mm_max_ps _mm_min_ps,
        mul_add(x, m, a) _mm_add_ps(_mm_mul_ps(x, m), a),
        integers _mm_set1_epi32 _mm_add_epi32 _mm_slli_epi32 _mm_castps_si128 _mm_castsi128_ps
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{V4, V8, V16, V16OfPairs};

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;

    use super::Simd;

    vector! {
        /// NEON, which every AArch64 has.
        V4(float32x4_t), 4 lanes, 8 rows, vdupq_n_f32 vld1q_f32 vst1q_f32
        vaddq_f32 vsubq_f32 vmulq_f32 vdivq_f32 vmaxq_f32 vminq_f32,
        mul_add(x, m, a) vfmaq_f32(a, x, m),
        integers vdupq_n_s32 vaddq_s32 vshlq_n_s32 vreinterpretq_s32_f32 vreinterpretq_f32_s32
    }
}

#[cfg(target_arch = "aarch64")]
pub(super) use neon::V4;

/// Four lanes as an array, for any machine.
#[derive(Clone, Copy)]
pub(super) struct Array([f32; 4]);

macro_rules! lanes {
    ($i:ident => $e:expr) => {
        Array([
            { const $i: usize = 0; $e },
            { const $i: usize = 1; $e },
            { const $i: usize = 2; $e },
            { const $i: usize = 3; $e },
        ])
    };
}

impl Simd for Array {
    const LANES: usize = 4;
    const ROWS: usize = 6;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Array([x; 4])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller promises four values, aligned or not.
        unsafe { Array(p.cast::<[f32; 4]>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller promises room for four values, aligned or not.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    fn like(self, x: f32) -> Self {
        Array([x; 4])
    }
    #[inline(always)]
    fn add(self, o: Self) -> Self {
        lanes!(I => self.0[I] + o.0[I])
    }
    #[inline(always)]
    fn sub(self, o: Self) -> Self {
        lanes!(I => self.0[I] - o.0[I])
    }
    #[inline(always)]
    fn mul(self, o: Self) -> Self {
        lanes!(I => self.0[I] * o.0[I])
    }
    #[inline(always)]
    fn div(self, o: Self) -> Self {
        lanes!(I => self.0[I] / o.0[I])
    }
    #[inline(always)]
    fn max(self, o: Self) -> Self {
        lanes!(I => if self.0[I] > o.0[I] { self.0[I] } else { o.0[I] })
    }
    #[inline(always)]
    fn min(self, o: Self) -> Self {
        lanes!(I => if self.0[I] < o.0[I] { self.0[I] } else { o.0[I] })
    }
    #[inline(always)]
    fn mul_add(self, m: Self, a: Self) -> Self {
        // `f32::mul_add` is a library call where the target has no such instruction.
        lanes!(I => self.0[I] * m.0[I] + a.0[I])
    }
    #[inline(always)]
    fn exp2_of_biased(self) -> Self {
        lanes!(I => f32::from_bits((self.0[I].to_bits() << 23).wrapping_add(0x3f80_0000)))
    }
}

/// Asks for the cache line of `p`, which may lie outside any allocation, to be brought to the L2 cache.
#[inline(always)]
pub(super) fn prefetch<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has SSE; the instruction ignores addresses that it cannot read.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Defines `unsafe fn $name(isa, args...)` that runs the generic `$body::<S>(args...)` compiled for `isa`. Its `# Safety`
/// is what the body asks, apart from the instruction set: an [`Isa`] proves that.
macro_rules! isa_fn {
    ($(#[$meta:meta])* $vis:vis fn $name:ident = $body:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?) => {
        $(#[$meta])*
        $vis unsafe fn $name(isa: $crate::kernels::cpu::simd::Isa, $($arg: $ty),*) $(-> $ret)? {
            /// # Safety
            /// As that of the function around this; the machine has AVX-512.
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx2,fma,f16c")]
            unsafe fn avx512($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: the instructions are this function's own; the rest is its caller's promise.
                unsafe { $body::<$crate::kernels::cpu::simd::V16>($($arg),*) }
            }
            /// # Safety
            /// As that of the function around this; the machine has AVX2, FMA and F16C.
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: as above.
                unsafe { $body::<$crate::kernels::cpu::simd::V8>($($arg),*) }
            }
            // SAFETY: `isa` proves that the machine has the instructions; the rest is this function's caller's promise.
            unsafe {
                match isa.set() {
                    #[cfg(target_arch = "x86_64")]
                    $crate::kernels::cpu::simd::Set::Avx512 | $crate::kernels::cpu::simd::Set::Avx512Bf16 => avx512($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::kernels::cpu::simd::Set::Avx2 => avx2($($arg),*),
                    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
                    $crate::kernels::cpu::simd::Set::Base => $body::<$crate::kernels::cpu::simd::V4>($($arg),*),
                    $crate::kernels::cpu::simd::Set::Portable => $body::<$crate::kernels::cpu::simd::Array>($($arg),*),
                }
            }
        }
    };
}
pub(super) use isa_fn;
