//! What an upscale costs in memory, before it is begun.

use anyhow::{Context, Result};
use candle_core::{DType, Device};

use super::{LowRes, Upscaler};
use crate::device::{self, Placement};

/// Full-size maps of the first level's width that the UNet holds at its peak: the skips, what is joined with them, and
/// what is made of it (measured with the built-in model, 703 bytes a pixel of 32 channels).
const UNET_MAPS: f64 = 5.5;
/// Bytes a pixel of the result for the picture itself: as read, as decoded, and as encoded.
const PICTURE: usize = 40;

impl Upscaler {
    /// The peak of an upscale to `width` x `height` pixels on its device, in bytes, weights apart: an estimate, which the VAE's decoder
    /// decides for the published configuration (two maps of the last level but one and one of the last, at the size
    /// of the result) and the UNet where the VAE is small.
    pub fn bytes_needed(&self, width: usize, height: usize) -> u64 {
        let bytes = |placement: &Placement| match placement.device {
            Device::Cpu => DType::F32.size_in_bytes(), // computes in it whatever the weights' type
            _ => placement.dtype.size_in_bytes(),
        };
        let widths = &self.vae_config.block_out_channels;
        let last = widths.first().copied().unwrap_or(0);
        let before = widths.get(1).copied().unwrap_or(last);
        let vae = ((2 * before + last) * bytes(&self.vae_placement)) as f64;
        let unet_width = self.unet_config.block_out_channels.first();
        let unet_width = unet_width.copied().unwrap_or(0) as f64;
        let area = (self.vae_config.factor() as f64).powi(2);
        let unet = UNET_MAPS * unet_width * bytes(&self.placement) as f64 / area;
        let pixels = width as f64 * height as f64;
        (pixels * (vae.max(unet) + PICTURE as f64)) as u64
    }

    /// Refuses on the CPU what this process will not be given the memory for: running out later ends the process, and
    /// with it the other pictures' work.
    pub(super) fn check_memory(&self, inputs: &[LowRes]) -> Result<()> {
        if !self.options.device.is_cpu() {
            return Ok(());
        }
        let mut needed = 0;
        let mut largest = (0, 0);
        for input in inputs {
            let (width, height) = self.result_size(input)?;
            needed += self.bytes_needed(width, height);
            largest = largest.max((width, height));
        }
        device::can_allocate(needed).with_context(|| {
            format!(
                "a result of {}x{} needs about {:.1} GB, more than this process can have (ulimit -v): free some memory, or \
                 give a smaller picture",
                largest.0,
                largest.1,
                needed as f64 / 1e9
            )
        })
    }

    /// Width and height of the upscaled picture, in pixels.
    pub(super) fn result_size(&self, input: &LowRes) -> Result<(usize, usize)> {
        let (tensor, factor) = match input {
            LowRes::Image(image) => (image, 1),
            LowRes::Latents(latents) => (latents, self.vae_config.factor()),
        };
        let (_, _, height, width) = tensor.dims4()?;
        Ok((2 * factor * width, 2 * factor * height))
    }
}
