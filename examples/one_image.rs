//! One image upscaled 2x with the built-in model:
//!
//! ```text
//! cargo run --release --example one_image -- photo.png photo-2x.png "a red bicycle"
//! ```

use std::path::Path;

use anyhow::{Context, Result};
use sd_upscale::limits::ReadLimits;
use sd_upscale::picture::{self, Format, Picture};
use sd_upscale::{LowRes, ModelFiles, Options, Settings, Upscaler, files};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let input = args
        .next()
        .context("give an image, an output and a prompt")?;
    let output = args.next().context("give an output")?;
    upscale(
        input.as_ref(),
        output.as_ref(),
        &args.next().unwrap_or_default(),
    )
}

/// Upscales the image at `input` and writes it to `output`, in the format that its extension names.
pub(crate) fn upscale(input: &Path, output: &Path, prompt: &str) -> Result<()> {
    let extension = output.extension().unwrap_or_default().to_string_lossy();
    let format = Format::from_extension(&extension).with_context(|| {
        format!(
            "{}: name a .png, .jpg, .webp, .tif or .bmp",
            output.display()
        )
    })?;
    let low = files::read_picture(input, &ReadLimits::default())?;

    let mut upscaler = Upscaler::new(Options::new(ModelFiles::built_in()))?;
    let settings = Settings {
        prompt: prompt.into(),
        steps: 5,
        ..Settings::default()
    };
    let nothing = &mut |_| Ok(());
    let latents = upscaler.upscale(&[LowRes::image(&low.pixels)?], &settings, nothing)?;
    let pixels = upscaler.decode(&latents[0], nothing)?;

    let picture = Picture {
        metadata: low.metadata,
        ..Picture::from_pixels(pixels)
    };
    files::write(output, &picture::encode(&picture, format, None)?.bytes)
}
