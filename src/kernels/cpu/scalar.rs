//! One number of each type that values are kept in, and float32: what vectors do for many at a time, the same to the bit.

use half::{bf16, f16};

/// A number as it is kept.
pub trait Scalar: Copy {
    /// Exact.
    fn widen(self) -> f32;

    /// The nearest, and of two the even one; NaN stays NaN.
    fn narrow(x: f32) -> Self;
}

impl Scalar for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }
}

impl Scalar for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
        // A NaN, whose mantissa may lie in what is cut off, becomes a quiet one.
        let bits = if x.is_nan() {
            bits | 0x0040_0000
        } else {
            rounded
        };
        Self::from_bits((bits >> 16) as u16)
    }
}

impl Scalar for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        const INFINITY: u32 = 0x0f80_0000;
        let bits = u32::from(self.to_bits());
        let (sign, magnitude) = ((bits & 0x8000) << 16, (bits & 0x7fff) << 13);
        // The exponents' biases differ by 112; a multiplication, not an addition to the bits, is right for subnormal numbers too.
        let finite = (f32::from_bits(magnitude) * 2f32.powi(112)).to_bits();
        let quiet = if magnitude > INFINITY { 0x0040_0000 } else { 0 };
        let magnitude = if magnitude < INFINITY {
            finite
        } else {
            magnitude | 0x7f80_0000 | quiet
        };
        f32::from_bits(sign | magnitude)
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        let bits = x.to_bits();
        let (sign, magnitude) = (bits >> 16 & 0x8000, bits & 0x7fff_ffff);
        let half = if magnitude > 0x7f80_0000 {
            // A quiet NaN with what fits of its mantissa.
            0x7e00 | (magnitude >> 13 & 0x03ff)
        } else if magnitude >= 0x4780_0000 {
            // From 65536 on.
            0x7c00
        } else if magnitude < 0x3880_0000 {
            // Below 2^-14: numbers beside 0.5 are as far apart as subnormal ones.
            (f32::from_bits(magnitude) + 0.5).to_bits() - 0.5f32.to_bits()
        } else {
            (magnitude - (112 << 23) + 0x0fff + (magnitude >> 13 & 1)) >> 13
        };
        Self::from_bits((sign | half) as u16)
    }
}
