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
    /// Arrays of 4 that the compiler turns into the target's baseline vectors (SSE2, NEON).
    Portable,
}

thread_local! {
    static FORCED: Cell<Option<Isa>> = const { Cell::new(None) };
}

impl Isa {
    /// Those this machine can run, the fastest first.
    pub fn available() -> Vec<Isa> {
        #[cfg(target_arch = "x86_64")]
        {
            let mut isas = Vec::new();
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if avx2 && is_x86_feature_detected!("avx512f") {
                isas.push(Isa::Avx512);
            }
            if avx2 {
                isas.push(Isa::Avx2);
            }
            isas.push(Isa::Portable);
            isas
        }
        #[cfg(not(target_arch = "x86_64"))]
        vec![Isa::Portable]
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
    unsafe fn max(self, o: Self) -> Self;
    unsafe fn min(self, o: Self) -> Self;
    /// `self * m + a`, fused where the instruction set can.
    unsafe fn mul_add(self, m: Self, a: Self) -> Self;
    /// `2^n` where `self` is `n + 1.5 * 2^23` for an integer `n` in -126..=127.
    unsafe fn exp2_of_biased(self) -> Self;

    /// Fetches the cache line of `p`, which may lie outside any allocation.
    #[inline(always)]
    unsafe fn prefetch(_p: *const f32) {}

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

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Simd;
    use std::arch::x86_64::*;

    #[derive(Clone, Copy)]
    pub struct V16(__m512);

    impl Simd for V16 {
        const LANES: usize = 16;
        const ROWS: usize = 12;
        #[inline(always)]
        unsafe fn prefetch(p: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { V16(_mm512_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            unsafe { V16(_mm512_loadu_ps(p)) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            unsafe { _mm512_storeu_ps(p, self.0) }
        }
        #[inline(always)]
        unsafe fn add(self, o: Self) -> Self {
            unsafe { V16(_mm512_add_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn sub(self, o: Self) -> Self {
            unsafe { V16(_mm512_sub_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn mul(self, o: Self) -> Self {
            unsafe { V16(_mm512_mul_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn div(self, o: Self) -> Self {
            unsafe { V16(_mm512_div_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn max(self, o: Self) -> Self {
            unsafe { V16(_mm512_max_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn min(self, o: Self) -> Self {
            unsafe { V16(_mm512_min_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, m: Self, a: Self) -> Self {
            unsafe { V16(_mm512_fmadd_ps(self.0, m.0, a.0)) }
        }
        #[inline(always)]
        unsafe fn exp2_of_biased(self) -> Self {
            unsafe {
                let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0));
                V16(_mm512_castsi512_ps(_mm512_add_epi32(
                    n,
                    _mm512_set1_epi32(0x3f80_0000),
                )))
            }
        }
        #[inline(always)]
        unsafe fn load_first(p: *const f32, n: usize) -> Self {
            unsafe { V16(_mm512_maskz_loadu_ps((1u16 << n) - 1, p)) }
        }
        #[inline(always)]
        unsafe fn store_first(self, p: *mut f32, n: usize) {
            unsafe { _mm512_mask_storeu_ps(p, (1u16 << n) - 1, self.0) }
        }
    }

    #[derive(Clone, Copy)]
    pub struct V8(__m256);

    impl Simd for V8 {
        const LANES: usize = 8;
        const ROWS: usize = 6;
        #[inline(always)]
        unsafe fn prefetch(p: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { V8(_mm256_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            unsafe { V8(_mm256_loadu_ps(p)) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            unsafe { _mm256_storeu_ps(p, self.0) }
        }
        #[inline(always)]
        unsafe fn add(self, o: Self) -> Self {
            unsafe { V8(_mm256_add_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn sub(self, o: Self) -> Self {
            unsafe { V8(_mm256_sub_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn mul(self, o: Self) -> Self {
            unsafe { V8(_mm256_mul_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn div(self, o: Self) -> Self {
            unsafe { V8(_mm256_div_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn max(self, o: Self) -> Self {
            unsafe { V8(_mm256_max_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn min(self, o: Self) -> Self {
            unsafe { V8(_mm256_min_ps(self.0, o.0)) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, m: Self, a: Self) -> Self {
            unsafe { V8(_mm256_fmadd_ps(self.0, m.0, a.0)) }
        }
        #[inline(always)]
        unsafe fn exp2_of_biased(self) -> Self {
            unsafe {
                let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(self.0));
                V8(_mm256_castsi256_ps(_mm256_add_epi32(
                    n,
                    _mm256_set1_epi32(0x3f80_0000),
                )))
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{V8, V16};

/// Four lanes as an array.
#[derive(Clone, Copy)]
pub(super) struct V4([f32; 4]);

/// Without FMA in the target's baseline `f32::mul_add` would be a library call.
#[inline(always)]
fn mul_add_scalar(x: f32, m: f32, a: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
        x.mul_add(m, a)
    } else {
        x * m + a
    }
}

macro_rules! lanes {
    ($i:ident => $e:expr) => {
        V4([{ const $i: usize = 0; $e }, { const $i: usize = 1; $e }, { const $i: usize = 2; $e }, { const $i: usize = 3; $e }])
    };
}

impl Simd for V4 {
    const LANES: usize = 4;
    const ROWS: usize = if cfg!(target_arch = "aarch64") { 8 } else { 6 };
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        V4([x; 4])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        unsafe { V4(p.cast::<[f32; 4]>().read_unaligned()) }
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
        lanes!(I => mul_add_scalar(self.0[I], m.0[I], a.0[I]))
    }
    #[inline(always)]
    unsafe fn exp2_of_biased(self) -> Self {
        lanes!(I => f32::from_bits((self.0[I].to_bits() << 23).wrapping_add(0x3f80_0000)))
    }
}

/// Defines `unsafe fn $name(isa, args...)` that runs the generic `$body::<S>(args...)` compiled for `isa`.
/// Callers promise that the machine has `isa`, which [`Isa::current`] ensures, besides what the body asks.
macro_rules! isa_fn {
    ($(#[$meta:meta])* $vis:vis fn $name:ident = $body:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?) => {
        $(#[$meta])*
        $vis unsafe fn $name(isa: $crate::kernels::simd::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx2,fma")]
            unsafe fn avx512($($arg: $ty),*) $(-> $ret)? {
                unsafe { $body::<$crate::kernels::simd::V16>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2($($arg: $ty),*) $(-> $ret)? {
                unsafe { $body::<$crate::kernels::simd::V8>($($arg),*) }
            }
            match isa {
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::simd::Isa::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::simd::Isa::Avx2 => unsafe { avx2($($arg),*) },
                _ => unsafe { $body::<$crate::kernels::simd::V4>($($arg),*) },
            }
        }
    };
}
pub(super) use isa_fn;
