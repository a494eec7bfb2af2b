//! What the samplers are made of. Numbers that belong to a noise level are float32, as the reference's 0-dimensional tensors are:
//! where two of them nearly cancel its rounding is part of the result.

use anyhow::Result;
use candle_core::Tensor;

/// Noisy latents (b, c, h, w) of a noise level -> what they are without noise, of the same shape: one evaluation of the network.
pub type Denoise<'a> = &'a mut dyn FnMut(&Tensor, f32) -> Result<Tensor>;

/// Standard normal noise of the latents' shape: the next draw of the generator, of each picture's own where there are several.
pub type Noise<'a> = &'a mut dyn FnMut() -> Result<Tensor>;

/// dx / dsigma at a noise level: how `x` changes with it.
pub(in crate::pipeline) fn slope(x: &Tensor, denoised: &Tensor, sigma: f32) -> Result<Tensor> {
    Ok(((x - denoised)? / f64::from(sigma))?)
}

/// `x + by * direction`.
pub(in crate::pipeline) fn moved(x: &Tensor, direction: &Tensor, by: f32) -> Result<Tensor> {
    Ok((x + (direction * f64::from(by))?)?)
}

/// `a * x + b * y`.
pub(in crate::pipeline) fn mixed(a: f32, x: &Tensor, b: f32, y: &Tensor) -> Result<Tensor> {
    moved(&(x * f64::from(a))?, y, b)
}

/// A step to below the next noise level, and the noise that leads up to it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AncestralStep {
    /// The noise level that the step goes to, 0 and more.
    pub down: f32,
    /// The spread of the noise that is added there.
    pub up: f32,
}

impl AncestralStep {
    /// From one noise level to the next; at an `eta` of 0 there is no noise.
    pub fn new(from: f32, to: f32, eta: f32) -> Self {
        if eta == 0.0 {
            return Self { down: to, up: 0.0 };
        }
        // Not below 0 where a configuration makes its last two levels equal, up to rounding.
        let square = (to * to * (from * from - to * to) / (from * from)).max(0.0);
        let up = to.min(eta * square.sqrt());
        Self {
            down: (to * to - up * up).sqrt(),
            up,
        }
    }
}

/// `x` and noise of the spread `up`. At an `eta` of 0 nothing is drawn: nothing that follows is either.
pub(super) fn noised(x: Tensor, up: f32, eta: f32, noise: Noise) -> Result<Tensor> {
    if eta == 0.0 {
        return Ok(x);
    }
    moved(&x, &noise()?, up)
}

/// The geometric middle of two noise levels, by the reference's `lerp` of their logarithms.
pub(super) fn middle(from: f32, to: f32) -> f32 {
    let (from, to) = (from.ln(), to.ln());
    (to - (to - from) * 0.5).exp()
}

/// The time t of a noise level, in which DPM-Solvers step; infinite for 0.
pub(super) fn time(sigma: f32) -> f32 {
    -sigma.ln()
}

/// The noise level of a time.
pub(super) fn level(t: f32) -> f32 {
    (-t).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ancestral_steps_parts_make_the_next_level_and_none_is_below_zero() {
        for (from, to) in [(14.6, 3.0), (3.0, 0.03), (0.03, 0.0), (1.0, 1.0)] {
            for eta in [0.0, 0.5, 1.0] {
                let AncestralStep { down, up } = AncestralStep::new(from, to, eta);
                assert!(down >= 0.0 && up >= 0.0, "{from} {to} {eta}");
                // A few roundings of float32.
                assert!((down * down + up * up - to * to).abs() <= 1e-6 * to * to);
            }
        }
        // A rounding above the level before it.
        let step = AncestralStep::new(1.0, 1.0f32.next_up(), 1.0);
        assert_eq!((step.down, step.up), (1.0f32.next_up(), 0.0));
    }
}
