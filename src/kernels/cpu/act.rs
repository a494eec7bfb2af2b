//! Vectorised exp, erf and the activations made of them.

use super::simd::Simd;

/// An elementwise activation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Act {
    #[default]
    None,
    /// Exact: `x / 2 * (1 + erf(x / sqrt 2))`.
    Gelu,
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * sigmoid(1.702 x)`, CLIP's.
    QuickGelu,
}

/// `e^x` to 2 ulp for x in -87.3..=88; clamped outside. NaN stays NaN.
#[inline(always)]
pub(super) unsafe fn exp<S: Simd>(x: S) -> S {
    unsafe {
        // `max` and `min` keep a NaN in the second operand.
        let x = S::splat(88.0).min(S::splat(-87.3).max(x));
        // Adding 1.5 * 2^23 rounds to an integer, left in the low bits.
        let magic = S::splat(12_582_912.0);
        let t = x.mul_add(S::splat(std::f32::consts::LOG2_E), magic);
        let n = t.sub(magic);
        // ln 2 in two parts, the first with few enough bits that n times it is exact. Both and the polynomial: Cephes expf.
        let r = n.mul_add(S::splat(-0.693_359_4), x);
        let r = n.mul_add(S::splat(2.121_944_4e-4), r);
        let p = S::splat(1.987_569_1e-4);
        let p = p.mul_add(r, S::splat(1.398_199_9e-3));
        let p = p.mul_add(r, S::splat(8.333_452e-3));
        let p = p.mul_add(r, S::splat(4.166_579_6e-2));
        let p = p.mul_add(r, S::splat(1.666_666_5e-1));
        let p = p.mul_add(r, S::splat(0.5));
        let p = p.mul_add(r.mul(r), r.add(S::splat(1.0)));
        p.mul(t.exp2_of_biased())
    }
}

/// erf to 3e-7 absolute: Eigen's rational approximation (`generic_fast_erf_float`). It crosses 1 at 4, so that a little further
/// on it can be cut off there, and what lies beyond is exactly 1.
#[inline(always)]
pub(super) unsafe fn erf<S: Simd>(x: S) -> S {
    unsafe {
        let x = S::splat(4.06).min(S::splat(-4.06).max(x));
        let z = x.mul(x);
        let p = S::splat(-2.726_142_3e-10);
        let p = p.mul_add(z, S::splat(2.770_681_5e-8));
        let p = p.mul_add(z, S::splat(-2.101_024e-6));
        let p = p.mul_add(z, S::splat(-5.692_506_5e-5));
        let p = p.mul_add(z, S::splat(-7.349_906e-4));
        let p = p.mul_add(z, S::splat(-2.954_6e-3));
        let p = p.mul_add(z, S::splat(-1.609_603_4e-2));
        let q = S::splat(-1.456_607_2e-5);
        let q = q.mul_add(z, S::splat(-2.133_740_6e-4));
        let q = q.mul_add(z, S::splat(-1.682_827_e-3));
        let q = q.mul_add(z, S::splat(-7.373_329e-3));
        let q = q.mul_add(z, S::splat(-1.426_473_9e-2));
        S::splat(1.0).min(S::splat(-1.0).max(p.mul(x).div(q)))
    }
}

/// A point function the kernels are generic over, so that no choice is left inside their loops.
pub(super) trait PointFn: Copy {
    unsafe fn eval<S: Simd>(self, x: S) -> S;
}

#[derive(Clone, Copy)]
pub(super) struct Identity;
#[derive(Clone, Copy)]
pub(super) struct Gelu;
#[derive(Clone, Copy)]
pub(super) struct Silu;
#[derive(Clone, Copy)]
pub(super) struct QuickGelu;

impl PointFn for Identity {
    #[inline(always)]
    unsafe fn eval<S: Simd>(self, x: S) -> S {
        x
    }
}

impl PointFn for Gelu {
    #[inline(always)]
    unsafe fn eval<S: Simd>(self, x: S) -> S {
        unsafe {
            let half = x.mul(S::splat(0.5));
            half.mul_add(erf(x.mul(S::splat(std::f32::consts::FRAC_1_SQRT_2))), half)
        }
    }
}

impl PointFn for Silu {
    #[inline(always)]
    unsafe fn eval<S: Simd>(self, x: S) -> S {
        unsafe { x.div(exp(x.mul(S::splat(-1.0))).add(S::splat(1.0))) }
    }
}

impl PointFn for QuickGelu {
    #[inline(always)]
    unsafe fn eval<S: Simd>(self, x: S) -> S {
        unsafe { x.div(exp(x.mul(S::splat(-1.702))).add(S::splat(1.0))) }
    }
}

/// Runs `$e` with `$f` bound to the point function of an [`Act`].
macro_rules! with_act {
    ($act:expr, $f:ident => $e:expr) => {
        match $act {
            $crate::kernels::cpu::act::Act::None => {
                let $f = $crate::kernels::cpu::act::Identity;
                $e
            }
            $crate::kernels::cpu::act::Act::Gelu => {
                let $f = $crate::kernels::cpu::act::Gelu;
                $e
            }
            $crate::kernels::cpu::act::Act::Silu => {
                let $f = $crate::kernels::cpu::act::Silu;
                $e
            }
            $crate::kernels::cpu::act::Act::QuickGelu => {
                let $f = $crate::kernels::cpu::act::QuickGelu;
                $e
            }
        }
    };
}
pub(super) use with_act;
