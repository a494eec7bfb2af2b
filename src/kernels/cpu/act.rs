//! Vectorised exp, erf and the activations made of them.

use super::simd::Simd;
pub use crate::kernels::Activation as Act;

/// `e^x` to 2 ulp for x in -87.3..=88; clamped outside. NaN stays NaN.
#[inline(always)]
pub(super) fn exp<S: Simd>(x: S) -> S {
    // `max` and `min` keep a NaN in the second operand.
    let x = x.like(88.0).min(x.like(-87.3).max(x));
    // Adding 1.5 * 2^23 rounds to an integer, left in the low bits.
    let magic = x.like(12_582_912.0);
    let t = x.mul_add(x.like(std::f32::consts::LOG2_E), magic);
    let n = t.sub(magic);
    // ln 2 in two parts, the first with few enough bits that n times it is exact. Both and the polynomial: Cephes expf.
    let r = n.mul_add(x.like(-0.693_359_4), x);
    let r = n.mul_add(x.like(2.121_944_4e-4), r);
    let p = x.like(1.987_569_1e-4);
    let p = p.mul_add(r, x.like(1.398_199_9e-3));
    let p = p.mul_add(r, x.like(8.333_452e-3));
    let p = p.mul_add(r, x.like(4.166_579_6e-2));
    let p = p.mul_add(r, x.like(1.666_666_5e-1));
    let p = p.mul_add(r, x.like(0.5));
    let p = p.mul_add(r.mul(r), r.add(x.like(1.0)));
    p.mul(t.exp2_of_biased())
}

/// `2^x` to 1 ulp or so for x in -126..=0, exactly 1 at 0; clamped below. NaN stays NaN.
#[inline(always)]
pub(super) fn exp2_of_negative<S: Simd>(x: S) -> S {
    // `max` keeps a NaN in the second operand.
    let x = x.like(-126.0).max(x);
    // Adding 1.5 * 2^23 rounds to an integer, left in the low bits.
    let magic = x.like(12_582_912.0);
    let t = x.add(magic);
    let f = x.sub(t.sub(magic));
    // (2^f - 1) / f on -1/2..=1/2, its largest error relative to 2^f made as small as it can be (2e-9).
    let p = x.like(1.535_336_2e-4);
    let p = p.mul_add(f, x.like(1.339_887_5e-3));
    let p = p.mul_add(f, x.like(9.618_437e-3));
    let p = p.mul_add(f, x.like(5.550_332_4e-2));
    let p = p.mul_add(f, x.like(2.402_264_8e-1));
    let p = p.mul_add(f, x.like(std::f32::consts::LN_2));
    let p = p.mul_add(f, x.like(1.0));
    p.mul(t.exp2_of_biased())
}

/// erf to 3e-7 absolute: Eigen's rational approximation (`generic_fast_erf_float`). It crosses 1 at 4, so that a little further
/// on it can be cut off there, and what lies beyond is exactly 1.
#[inline(always)]
pub(super) fn erf<S: Simd>(x: S) -> S {
    let x = x.like(4.06).min(x.like(-4.06).max(x));
    let z = x.mul(x);
    let p = x.like(-2.726_142_3e-10);
    let p = p.mul_add(z, x.like(2.770_681_5e-8));
    let p = p.mul_add(z, x.like(-2.101_024e-6));
    let p = p.mul_add(z, x.like(-5.692_506_5e-5));
    let p = p.mul_add(z, x.like(-7.349_906e-4));
    let p = p.mul_add(z, x.like(-2.954_6e-3));
    let p = p.mul_add(z, x.like(-1.609_603_4e-2));
    let q = x.like(-1.456_607_2e-5);
    let q = q.mul_add(z, x.like(-2.133_740_6e-4));
    let q = q.mul_add(z, x.like(-1.682_827_e-3));
    let q = q.mul_add(z, x.like(-7.373_329e-3));
    let q = q.mul_add(z, x.like(-1.426_473_9e-2));
    x.like(1.0).min(x.like(-1.0).max(p.mul(x).div(q)))
}

/// A point function the kernels are generic over, so that no choice is left inside their loops.
pub(super) trait PointFn: Copy {
    fn eval<S: Simd>(self, x: S) -> S;
}

#[derive(Clone, Copy)]
pub(super) struct Identity;
#[derive(Clone, Copy)]
pub(super) struct Gelu;
#[derive(Clone, Copy)]
pub(super) struct Silu;
#[derive(Clone, Copy)]
pub(super) struct QuickGelu;
#[derive(Clone, Copy)]
pub(super) struct Relu;

impl PointFn for Identity {
    #[inline(always)]
    fn eval<S: Simd>(self, x: S) -> S {
        x
    }
}

impl PointFn for Gelu {
    #[inline(always)]
    fn eval<S: Simd>(self, x: S) -> S {
        let half = x.mul(x.like(0.5));
        half.mul_add(erf(x.mul(x.like(std::f32::consts::FRAC_1_SQRT_2))), half)
    }
}

impl PointFn for Silu {
    #[inline(always)]
    fn eval<S: Simd>(self, x: S) -> S {
        x.div(exp(x.mul(x.like(-1.0))).add(x.like(1.0)))
    }
}

impl PointFn for QuickGelu {
    #[inline(always)]
    fn eval<S: Simd>(self, x: S) -> S {
        x.div(exp(x.mul(x.like(-1.702))).add(x.like(1.0)))
    }
}

impl PointFn for Relu {
    #[inline(always)]
    fn eval<S: Simd>(self, x: S) -> S {
        // `max` keeps a NaN in the second operand.
        x.like(0.0).max(x)
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
            $crate::kernels::cpu::act::Act::Relu => {
                let $f = $crate::kernels::cpu::act::Relu;
                $e
            }
        }
    };
}
pub(super) use with_act;
