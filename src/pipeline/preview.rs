//! What the steps show so far: the latents that a step takes for the result, as pictures.

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};

use super::padding::Extent;
use super::types::floats;
use crate::networks::vae::{Decoder, VaeConfig};
use crate::networks::{Limits, Room};
use crate::pixels::Pixels;

/// What a channel of Stable Diffusion 1's scaled latents adds to red, green and blue, in -1..=1: a linear fit to its VAE, by
/// Keturn, <https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204>.
const LATENTS_TO_RGB: [[f32; 3]; 4] = [
    [0.298, 0.207, 0.208],
    [0.187, 0.286, 0.173],
    [-0.158, 0.189, 0.264],
    [-0.184, -0.271, -0.473],
];

/// Whether latents are Stable Diffusion's, as far as a configuration tells.
fn are_stable_diffusions(config: &VaeConfig) -> bool {
    config.latent_channels() == LATENTS_TO_RGB.len() && config.factor() == 8
}

/// Whether a VAE's decoder is quick enough to show every step: one that was made for it, or that of latents which there is no
/// other way to show.
pub(super) fn decodes(config: &VaeConfig) -> bool {
    config.is_tiny() || !are_stable_diffusions(config)
}

/// Makes the pictures of a pass.
pub(super) struct Previews<'a> {
    /// None: by the linear map.
    pub decoder: Option<(&'a Decoder, Limits)>,
    pub config: &'a VaeConfig,
    /// Of the pass's results, in pixels.
    pub sizes: Vec<Extent>,
}

impl Previews<'_> {
    /// A picture of each of the `denoised` latents (b, c, H, W), scaled, as far as they are not extension: of the result's size by
    /// a decoder, else of a pixel a position.
    ///
    /// # Errors
    /// The device gives up.
    pub fn of(&self, denoised: &Tensor) -> Result<Vec<Pixels>> {
        let latents = denoised.to_device(&Device::Cpu)?;
        let one = |(index, size): (usize, &Extent)| {
            let latents = latents.narrow(0, index, 1)?;
            match &self.decoder {
                Some((decoder, limits)) => {
                    let raw = (latents / self.config.scaling_factor())?;
                    decoded(decoder, &raw, limits, *size)
                }
                None => linear(&latents, self.positions(*size)),
            }
        };
        self.sizes.iter().enumerate().map(one).collect()
    }

    fn positions(&self, size: Extent) -> Extent {
        let factor = self.config.factor();
        Extent {
            width: size.width.div_ceil(factor),
            height: size.height.div_ceil(factor),
        }
    }

    /// What to say where a decoder that there should be did not fit.
    pub fn shortage(&self) -> Option<&'static str> {
        let lacks = decodes(self.config) && self.decoder.is_none();
        lacks.then_some(if are_stable_diffusions(self.config) {
            "previews are made by a linear map: there is too little memory to decode them beside the UNet"
        } else {
            "there are no previews: there is too little memory to decode them beside the UNet"
        })
    }

    /// Whether there is no way to make any.
    pub fn shows_nothing(&self) -> bool {
        self.decoder.is_none() && !are_stable_diffusions(self.config)
    }

    /// Goes on with the linear map; false where that shows nothing or is what was done.
    pub fn without_decoder(&mut self) -> bool {
        self.decoder.take().is_some() && are_stable_diffusions(self.config)
    }
}

fn decoded(decoder: &Decoder, raw: &Tensor, limits: &Limits, size: Extent) -> Result<Pixels> {
    let Extent { width, height } = size;
    let mut values = Vec::with_capacity(3 * width * height);
    let mut done = 0;
    decoder.decode_within(raw, &Room::new(limits.clone()), |band| {
        let lines = band.dim(2)?.min(height - done);
        let band = band.to_device(&Device::Cpu)?;
        let band = band.narrow(2, 0, lines)?.narrow(3, 0, width)?;
        values.extend(shown(floats(&band.squeeze(0)?.permute((1, 2, 0))?)?));
        done += lines;
        Ok(())
    })?;
    Pixels::new(width, height, values)
}

/// Latents (1, 4, H, W), a pixel a position.
fn linear(latents: &Tensor, size: Extent) -> Result<Pixels> {
    let Extent { width, height } = size;
    let channels = LATENTS_TO_RGB.len();
    let (_, found, _, _) = latents.dims4()?;
    ensure!(found == channels, "latents of {found} channels");
    let latents = latents.narrow(2, 0, height)?.narrow(3, 0, width)?;
    let latents = floats(&latents.squeeze(0)?.permute((1, 2, 0))?)?;
    let rgb = |position: &[f32]| -> [f32; 3] {
        std::array::from_fn(|color| {
            let parts = std::iter::zip(position, LATENTS_TO_RGB);
            parts.map(|(value, factors)| value * factors[color]).sum()
        })
    };
    let values = latents.chunks_exact(channels).flat_map(rgb);
    Pixels::new(width, height, shown(values.collect()))
}

/// Values of -1..=1 as those of a picture, whatever they are: a step that overflowed is done again, and seen black meanwhile.
fn shown(mut values: Vec<f32>) -> Vec<f32> {
    for v in &mut values {
        let level = (*v / 2.0 + 0.5).clamp(0.0, 1.0);
        *v = if level.is_nan() { 0.0 } else { level };
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_linear_map_shows_what_is_no_extension() {
        // (1, 4, 2, 3), of which two columns and one line count.
        let channel = |value: f32| vec![value; 6];
        let mut values = [channel(1.0), channel(-1.0), channel(0.0), channel(0.5)].concat();
        values[1] = f32::NAN;
        let latents = Tensor::from_vec(values, (1, 4, 2, 3), &Device::Cpu).unwrap();
        let size = Extent {
            width: 2,
            height: 1,
        };
        let pixels = linear(&latents, size).unwrap();
        assert_eq!((pixels.width, pixels.height), (2, 1));
        // (0.298 - 0.187 - 0.184 / 2) / 2 + 0.5, and so on.
        for (found, expected) in pixels.values.iter().zip([0.5095, 0.392_75, 0.399_25]) {
            assert!((found - expected).abs() < 1e-6, "{:?}", pixels.values);
        }
        assert_eq!(pixels.values[3..], [0.0; 3]);
    }
}
