//! Methods of the first and second order in sigma: Euler's, Heun's, the midpoint's, and the ancestral ones, which go further down
//! and add noise.

use anyhow::Result;
use candle_core::Tensor;

use super::step::{AncestralStep, Denoise, Noise, middle, moved, noised, slope};

/// Euler's method over `sigmas`: from noisy `x` (b, c, h, w) to latents, one evaluation a step. `x` is kept in float32, as by
/// all samplers, whatever the network runs in.
///
/// # Errors
/// Whatever `denoise` returns.
pub fn euler(mut x: Tensor, sigmas: &[f32], denoise: Denoise) -> Result<Tensor> {
    for (sigma, next) in pairs(sigmas) {
        let d = slope(&x, &denoise(&x, sigma)?, sigma)?;
        x = moved(&x, &d, next - sigma)?;
    }
    Ok(x)
}

/// Euler's method to below each level, and noise up to it where it is above 0.
///
/// # Errors
/// Whatever `denoise` and `noise` return.
pub fn euler_ancestral(
    mut x: Tensor,
    sigmas: &[f32],
    eta: f32,
    denoise: Denoise,
    noise: Noise,
) -> Result<Tensor> {
    for (sigma, next) in pairs(sigmas) {
        let AncestralStep { down, up } = AncestralStep::new(sigma, next, eta);
        let d = slope(&x, &denoise(&x, sigma)?, sigma)?;
        x = moved(&x, &d, down - sigma)?;
        if next > 0.0 {
            x = noised(x, up, eta, noise)?;
        }
    }
    Ok(x)
}

/// Heun's method: the mean of the slopes at both ends of a step, two evaluations. A step to 0 is Euler's.
///
/// # Errors
/// Whatever `denoise` returns.
pub fn heun(mut x: Tensor, sigmas: &[f32], denoise: Denoise) -> Result<Tensor> {
    for (sigma, next) in pairs(sigmas) {
        let d = slope(&x, &denoise(&x, sigma)?, sigma)?;
        let by = next - sigma;
        let x_2 = moved(&x, &d, by)?;
        x = if next == 0.0 {
            x_2
        } else {
            let d_2 = slope(&x_2, &denoise(&x_2, next)?, next)?;
            moved(&x, &((d + d_2)? / 2.0)?, by)?
        };
    }
    Ok(x)
}

/// The slope at the geometric middle of a step, two evaluations. A step to 0 is Euler's.
///
/// # Errors
/// Whatever `denoise` returns.
pub fn dpm2(mut x: Tensor, sigmas: &[f32], denoise: Denoise) -> Result<Tensor> {
    for (sigma, next) in pairs(sigmas) {
        x = midpoint_step(&x, sigma, next, denoise)?;
    }
    Ok(x)
}

/// The same to below each level, and noise up to it. A step that goes down to 0 is Euler's, and nothing is drawn for it.
///
/// # Errors
/// Whatever `denoise` and `noise` return.
pub fn dpm2_ancestral(
    mut x: Tensor,
    sigmas: &[f32],
    eta: f32,
    denoise: Denoise,
    noise: Noise,
) -> Result<Tensor> {
    for (sigma, next) in pairs(sigmas) {
        let AncestralStep { down, up } = AncestralStep::new(sigma, next, eta);
        x = midpoint_step(&x, sigma, down, denoise)?;
        if down > 0.0 {
            x = noised(x, up, eta, noise)?;
        }
    }
    Ok(x)
}

fn midpoint_step(x: &Tensor, sigma: f32, next: f32, denoise: Denoise) -> Result<Tensor> {
    let d = slope(x, &denoise(x, sigma)?, sigma)?;
    if next == 0.0 {
        return moved(x, &d, next - sigma);
    }
    let mid = middle(sigma, next);
    let x_2 = moved(x, &d, mid - sigma)?;
    let d_2 = slope(&x_2, &denoise(&x_2, mid)?, mid)?;
    moved(x, &d_2, next - sigma)
}

/// The noise levels that each step leads from and to.
fn pairs(sigmas: &[f32]) -> impl Iterator<Item = (f32, f32)> {
    std::iter::zip(sigmas, &sigmas[1..]).map(|(from, to)| (*from, *to))
}
