//! What the network is given at a noise level, and how its answer is read.

/// What the network is given for a sigma, and how its output is read: Karras et al. (2022), table 1 with
/// sigma_data 1.
#[derive(Clone, Copy, Debug)]
pub struct Preconditioning {
    /// Scales the noisy latents on their way in.
    pub c_in: f64,
    /// Weight of the noisy latents in the denoised ones.
    pub c_skip: f64,
    /// Weight of the network's output in the denoised ones.
    pub c_out: f64,
    /// The network's time, 0.25 ln(sigma).
    pub time: f32,
}

impl Preconditioning {
    /// At a noise level above 0.
    pub fn new(sigma: f32) -> Self {
        // float32 throughout, as the reference's 0-dimensional sigma tensors are
        let variance = sigma * sigma + 1.0;
        Self {
            c_in: f64::from(1.0 / variance.sqrt()),
            c_skip: f64::from(1.0 / variance),
            c_out: f64::from(sigma / variance.sqrt()),
            time: 0.25 * sigma.ln(),
        }
    }
}
