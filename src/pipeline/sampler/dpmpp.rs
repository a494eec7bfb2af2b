//! DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095): exact in the part of a step that is linear in x, of the second order in what the
//! network gives, over t = -ln(sigma).

use anyhow::Result;
use candle_core::Tensor;

use super::step::{AncestralStep, Denoise, Noise, level, mixed, moved, noised, slope, time};

/// 2S, with an evaluation in the middle of each step, to below each level, and noise up to it where it is above 0. A step that goes
/// down to 0 is Euler's.
///
/// # Errors
/// Whatever `denoise` and `noise` return.
pub fn dpmpp_2s_ancestral(
    mut x: Tensor,
    sigmas: &[f32],
    eta: f32,
    denoise: Denoise,
    noise: Noise,
) -> Result<Tensor> {
    const R: f32 = 0.5; // where the evaluation is, of the step
    for pair in sigmas.windows(2) {
        let (sigma, next) = (pair[0], pair[1]);
        let AncestralStep { down, up } = AncestralStep::new(sigma, next, eta);
        let denoised = denoise(&x, sigma)?;
        x = if down == 0.0 {
            moved(&x, &slope(&x, &denoised, sigma)?, down - sigma)?
        } else {
            let (t, t_next) = (time(sigma), time(down));
            let h = t_next - t;
            let s = t + R * h;
            let x_2 = towards(&x, t, s, -h * R, &denoised)?;
            let denoised_2 = denoise(&x_2, level(s))?;
            towards(&x, t, t_next, -h, &denoised_2)?
        };
        if next > 0.0 {
            x = noised(x, up, eta, noise)?;
        }
    }
    Ok(x)
}

/// 2M, which goes on in the direction that the step before shows: one evaluation a step. The first step, and one to 0, is of the first
/// order.
///
/// # Errors
/// Whatever `denoise` returns.
pub fn dpmpp_2m(mut x: Tensor, sigmas: &[f32], denoise: Denoise) -> Result<Tensor> {
    // What the last step was told, and how long it was.
    let mut last: Option<(Tensor, f32)> = None;
    for pair in sigmas.windows(2) {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = denoise(&x, sigma)?;
        let (t, t_next) = (time(sigma), time(next));
        let h = t_next - t;
        x = match &last {
            Some((before, h_last)) if next > 0.0 => {
                let r = h_last / h;
                let further = 1.0 / (2.0 * r);
                let ahead = mixed(1.0 + further, &denoised, -further, before)?;
                towards(&x, t, t_next, -h, &ahead)?
            }
            _ => towards(&x, t, t_next, -h, &denoised)?,
        };
        last = Some((denoised, h));
    }
    Ok(x)
}

/// From t to another time, `-h` before it, with what is without noise held.
fn towards(x: &Tensor, t: f32, to: f32, minus_h: f32, denoised: &Tensor) -> Result<Tensor> {
    mixed(level(to) / level(t), x, -minus_h.exp_m1(), denoised)
}
