//! Noise augmentation of the low-res latents, as the original's notebook does it.

use anyhow::Result;
use candle_core::Tensor;

use super::noise::Generator;
use super::types::{NoiseType, Settings};

/// Low-res latents (b, 4, h, w), float32, with noise of the settings' level: `(x + level n) / sqrt(level^2 + 1)`, `n` the next
/// draw of each row's generator. "Fake" noise, which the original makes by `x sqrt(level^2 + 1)`, cancels out, and draws nothing.
///
/// # Errors
/// candle's own only.
pub fn augmented(
    low_res: Tensor,
    settings: &Settings,
    generators: &mut [Generator],
) -> Result<Tensor> {
    let level = settings.noise_level;
    if level == 0.0 || settings.noise_type == NoiseType::Fake {
        return Ok(low_res);
    }
    let shape = low_res.shape().clone();
    let each = shape.elem_count() / generators.len().max(1);
    let noise = generators
        .iter_mut()
        .flat_map(|generator| generator.randn(each));
    let noise = Tensor::from_vec(noise.collect(), shape, low_res.device())?;
    Ok(((low_res + (noise * level)?)? / level.hypot(1.0))?)
}
