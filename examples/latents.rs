//! Latents upscaled 2x in memory, as a program does that has just generated them; nothing is decoded:
//!
//! ```text
//! cargo run --release --example latents -- upscaled.safetensors
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use sd_upscale::latents::Latents;
use sd_upscale::{LowRes, ModelFiles, Options, Settings, Upscaler, files};

fn main() -> Result<()> {
    let output = std::env::args().nth(1).context("give an output")?;
    // In place of a generator's: (4, height, width), scaled. The built-in model has latents of its own kind.
    let (width, height) = (24, 16);
    let values = (0..4 * height * width)
        .map(|i| (i as f32 * 0.37).sin())
        .collect();
    let upscaled = upscale(width, height, values)?;
    save(&upscaled, output.as_ref())
}

/// Scaled latents (4, height, width) -> upscaled ones, (1, 4, 2 height, 2 width).
pub(crate) fn upscale(width: usize, height: usize, values: Vec<f32>) -> Result<Latents> {
    let mut upscaler = Upscaler::new(Options::new(ModelFiles::built_in()))?;
    let input = LowRes::latents(width, height, values)?;
    let settings = Settings {
        steps: 2,
        ..Settings::default()
    };
    let upscaled = upscaler.upscale(&[input], &settings, &mut |_| Ok(()))?;
    let tensor = upscaled[0].latents()?;
    let (batch, _, height, width) = tensor.dims4()?;
    let values = tensor.flatten_all()?.to_vec1()?;
    Ok(Latents::from_scaled(values, batch, height, width))
}

/// One tensor `latents`, as diffusers reads it.
pub(crate) fn save(latents: &Latents, output: &Path) -> Result<()> {
    files::write(output, &latents.to_safetensors(&BTreeMap::new())?)
}
