//! One vector type per instruction set behind a small trait, the run-time choice between them, and the macro that
//! compiles a generic kernel body once for each.

use std::cell::Cell;

/// An instruction set that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// 16 lanes, 32 registers.
    Avx512,
    /// 8 lanes with fused multiply-add.
    Avx2,
    /// 4 lanes, what every machine of its kind has: SSE2, NEON.
    Base,
    /// Arrays of 4, left to the compiler.
    Portable,
}

thread_local! {
    static FORCED: Cell<Option<Isa>> = const { Cell::new(None) };
}

impl Isa {
    /// Those this machine can run, the fastest first.
    pub fn available() -> Vec<Isa> {
        let mut isas = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if avx2 && is_x86_feature_detected!("avx512f") {
                isas.push(Isa::Avx512);
            }
            if avx2 {
                isas.push(Isa::Avx2);
            }
        }
        if cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
            isas.push(Isa::Base);
        }
        isas.push(Isa::Portable);
        isas
    }

    /// The one that kernels called from this thread use: the fastest, unless inside [`Isa::force`].
    pub fn current() -> Isa {
        static BEST: std::sync::OnceLock<Isa> = std::sync::OnceLock::new();
        FORCED
            .get()
            .unwrap_or_else(|| *BEST.get_or_init(|| Isa::available()[0]))
    }

    /// Runs `f` with the kernels that it calls held to this instruction set (for tests and benchmarks).
    ///
    /// # Panics
    /// If the machine does not have it.
    pub fn force<T>(self, f: impl FnOnce() -> T) -> T {
        assert!(
            Isa::available().contains(&self),
            "this machine does not have {self:?}"
        );
        struct Restore(Option<Isa>);
        impl Drop for Restore {
            fn drop(&mut self) {
                FORCED.set(self.0);
            }
        }
        let _restore = Restore(FORCED.replace(Some(self)));
        f()
    }
}

/// A vector of f32.
///
/// # Safety
/// The methods may only run where the instruction set exists, and only inline into functions compiled for it.
/// Pointers need no alignment.
pub(super) trait Simd: Copy {
    const LANES: usize;
    /// Rows of the GEMM register tile; its columns are two vectors.
    const ROWS: usize;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
    unsafe fn add(self, o: Self) -> Self;
    unsafe fn sub(self, o: Self) -> Self;
    unsafe fn mul(self, o: Self) -> Self;
    unsafe fn div(self, o: Self) -> Self;
    /// NaN where `o` is; where only `self` is, the machines differ.
    unsafe fn max(self, o: Self) -> Self;
    /// As [`Simd::max`].
    unsafe fn min(self, o: Self) -> Self;
    /// `self * m + a`, fused where the instruction set can.
    unsafe fn mul_add(self, m: Self, a: Self) -> Self;
    /// `2^n` where `self` is `n + 1.5 * 2^23` for an integer `n` in -126..=127.
    unsafe fn exp2_of_biased(self) -> Self;

    /// The first `n < LANES` values from `p`, the rest zero.
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self {
        unsafe {
            let mut t = [0f32; 16];
            std::ptr::copy_nonoverlapping(p, t.as_mut_ptr(), n);
            Self::load(t.as_ptr())
        }
    }

    /// Stores the first `n < LANES` values.
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        unsafe {
            let mut t = [0f32; 16];
            self.store(t.as_mut_ptr());
            std::ptr::copy_nonoverlapping(t.as_ptr(), p, n);
        }
    }

    /// The lanes in an array, zeros behind.
    #[inline(always)]
    unsafe fn to_array(self) -> [f32; 16] {
        unsafe {
            let mut t = [0f32; 16];
            self.store(t.as_mut_ptr());
            t
        }
    }
}

/// Implements [`Simd`] for a wrapper around a vector of intrinsics.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! vector {
    (
        $(#[$meta:meta])* $name:ident($raw:ty), $lanes:literal lanes, $rows:literal rows, $splat:ident $load:ident $store:ident
        $add:ident $sub:ident $mul:ident $div:ident $max:ident $min:ident, mul_add $mul_add:expr, exp2 $exp2:expr
        $(, load_first $load_first:expr, store_first $store_first:expr)?
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy)]
        pub struct $name($raw);

        impl Simd for $name {
            const LANES: usize = $lanes;
            const ROWS: usize = $rows;
            #[inline(always)]
            unsafe fn splat(x: f32) -> Self {
                unsafe { Self($splat(x)) }
            }
            #[inline(always)]
            unsafe fn load(p: *const f32) -> Self {
                unsafe { Self($load(p)) }
            }
            #[inline(always)]
            unsafe fn store(self, p: *mut f32) {
                unsafe { $store(p, self.0) }
            }
            #[inline(always)]
            unsafe fn add(self, o: Self) -> Self {
                unsafe { Self($add(self.0, o.0)) }
            }
            #[inline(always)]
            unsafe fn sub(self, o: Self) -> Self {
                unsafe { Self($sub(self.0, o.0)) }
            }
            #[inline(always)]
            unsafe fn mul(self, o: Self) -> Self {
                unsafe { Self($mul(self.0, o.0)) }
            }
            #[inline(always)]
            unsafe fn div(self, o: Self) -> Self {
                unsafe { Self($div(self.0, o.0)) }
            }
            #[inline(always)]
            unsafe fn max(self, o: Self) -> Self {
                unsafe { Self($max(self.0, o.0)) }
            }
            #[inline(always)]
            unsafe fn min(self, o: Self) -> Self {
                unsafe { Self($min(self.0, o.0)) }
            }
            #[inline(always)]
            unsafe fn mul_add(self, m: Self, a: Self) -> Self {
                unsafe { Self($mul_add(self.0, m.0, a.0)) }
            }
            #[inline(always)]
            unsafe fn exp2_of_biased(self) -> Self {
                unsafe { Self($exp2(self.0)) }
            }
            $(
                #[inline(always)]
                unsafe fn load_first(p: *const f32, n: usize) -> Self {
                    unsafe { Self($load_first((1 << n) - 1, p)) }
                }
                #[inline(always)]
                unsafe fn store_first(self, p: *mut f32, n: usize) {
                    unsafe { $store_first(p, (1 << n) - 1, self.0) }
                }
            )?
        }
    };
}

/// The bits of 1.0: added to an exponent moved into place, they add its bias.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const ONE: i32 = 0x3f80_0000;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{ONE, Simd};

    #[inline(always)]
    unsafe fn exp2_16(x: __m512) -> __m512 {
        unsafe {
            let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(x));
            _mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(ONE)))
        }
    }

    #[inline(always)]
    unsafe fn exp2_8(x: __m256) -> __m256 {
        unsafe {
            let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(x));
            _mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(ONE)))
        }
    }

    #[inline(always)]
    unsafe fn exp2_4(x: __m128) -> __m128 {
        unsafe {
            let n = _mm_slli_epi32::<23>(_mm_castps_si128(x));
            _mm_castsi128_ps(_mm_add_epi32(n, _mm_set1_epi32(ONE)))
        }
    }

    #[inline(always)]
    unsafe fn mul_add_4(x: __m128, m: __m128, a: __m128) -> __m128 {
        unsafe { _mm_add_ps(_mm_mul_ps(x, m), a) }
    }

    vector! {
        V16(__m512), 16 lanes, 12 rows, _mm512_set1_ps _mm512_loadu_ps _mm512_storeu_ps
        _mm512_add_ps _mm512_sub_ps _mm512_mul_ps _mm512_div_ps _mm512_max_ps _mm512_min_ps,
        mul_add _mm512_fmadd_ps, exp2 exp2_16,
        load_first _mm512_maskz_loadu_ps, store_first _mm512_mask_storeu_ps
    }
    vector! {
        V8(__m256), 8 lanes, 6 rows, _mm256_set1_ps _mm256_loadu_ps _mm256_storeu_ps
        _mm256_add_ps _mm256_sub_ps _mm256_mul_ps _mm256_div_ps _mm256_max_ps _mm256_min_ps,
        mul_add _mm256_fmadd_ps, exp2 exp2_8
    }
    vector! {
        /// SSE2, which every x86-64 has.
        V4(__m128), 4 lanes, 5 rows, _mm_set1_ps _mm_loadu_ps _mm_storeu_ps
        _mm_add_ps _mm_sub_ps _mm_mul_ps _mm_div_ps _mm_max_ps _mm_min_ps,
        mul_add mul_add_4, exp2 exp2_4
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::V4;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::V8;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::V16;

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;

    use super::{ONE, Simd};

    #[inline(always)]
    unsafe fn exp2_4(x: float32x4_t) -> float32x4_t {
        unsafe {
            let n = vshlq_n_s32::<23>(vreinterpretq_s32_f32(x));
            vreinterpretq_f32_s32(vaddq_s32(n, vdupq_n_s32(ONE)))
        }
    }

    #[inline(always)]
    unsafe fn mul_add_4(x: float32x4_t, m: float32x4_t, a: float32x4_t) -> float32x4_t {
        unsafe { vfmaq_f32(a, x, m) }
    }

    vector! {
        /// NEON, which every AArch64 has.
        V4(float32x4_t), 4 lanes, 8 rows, vdupq_n_f32 vld1q_f32 vst1q_f32
        vaddq_f32 vsubq_f32 vmulq_f32 vdivq_f32 vmaxq_f32 vminq_f32,
        mul_add mul_add_4, exp2 exp2_4
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
        unsafe { Array(p.cast::<[f32; 4]>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { p.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, o: Self) -> Self {
        lanes!(I => self.0[I] + o.0[I])
    }
    #[inline(always)]
    unsafe fn sub(self, o: Self) -> Self {
        lanes!(I => self.0[I] - o.0[I])
    }
    #[inline(always)]
    unsafe fn mul(self, o: Self) -> Self {
        lanes!(I => self.0[I] * o.0[I])
    }
    #[inline(always)]
    unsafe fn div(self, o: Self) -> Self {
        lanes!(I => self.0[I] / o.0[I])
    }
    #[inline(always)]
    unsafe fn max(self, o: Self) -> Self {
        lanes!(I => if self.0[I] > o.0[I] { self.0[I] } else { o.0[I] })
    }
    #[inline(always)]
    unsafe fn min(self, o: Self) -> Self {
        lanes!(I => if self.0[I] < o.0[I] { self.0[I] } else { o.0[I] })
    }
    #[inline(always)]
    unsafe fn mul_add(self, m: Self, a: Self) -> Self {
        // `f32::mul_add` is a library call where the target has no such instruction.
        lanes!(I => self.0[I] * m.0[I] + a.0[I])
    }
    #[inline(always)]
    unsafe fn exp2_of_biased(self) -> Self {
        lanes!(I => f32::from_bits((self.0[I].to_bits() << 23).wrapping_add(0x3f80_0000)))
    }
}

/// Asks for the cache line of `p`, which may lie outside any allocation, to be brought to the L2 cache.
#[inline(always)]
pub(super) fn prefetch(p: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of the target; the instruction ignores addresses it cannot read.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Defines `unsafe fn $name(isa, args...)` that runs the generic `$body::<S>(args...)` compiled for `isa`.
/// Callers promise that the machine has `isa`, which [`Isa::current`] ensures, besides what the body asks.
macro_rules! isa_fn {
    ($(#[$meta:meta])* $vis:vis fn $name:ident = $body:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?) => {
        $(#[$meta])*
        $vis unsafe fn $name(isa: $crate::kernels::cpu::simd::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx2,fma")]
            unsafe fn avx512($($arg: $ty),*) $(-> $ret)? {
                unsafe { $body::<$crate::kernels::cpu::simd::V16>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2($($arg: $ty),*) $(-> $ret)? {
                unsafe { $body::<$crate::kernels::cpu::simd::V8>($($arg),*) }
            }
            match isa {
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::simd::Isa::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::simd::Isa::Avx2 => unsafe { avx2($($arg),*) },
                #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
                $crate::kernels::cpu::simd::Isa::Base => unsafe { $body::<$crate::kernels::cpu::simd::V4>($($arg),*) },
                _ => unsafe { $body::<$crate::kernels::cpu::simd::Array>($($arg),*) },
            }
        }
    };
}
pub(super) use isa_fn;
