//! The network as the sampler sees it: noisy latents to denoised ones.

use std::iter::repeat_n;
use std::slice::from_ref;

use anyhow::Result;
use candle_core::Tensor;

use super::preconditioning::Preconditioning;
use crate::device;
use crate::networks::Room;
use crate::networks::text::Conditioning;
use crate::networks::unet::{Prompted, Sampling, UNet};

/// How the network is called for the two prompts of classifier-free guidance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passes {
    /// Once, with both in a batch.
    Together,
    /// Once for each, in half the memory.
    Apart,
}

/// The network with its preconditioning and guidance: noisy latents to denoised ones.
pub struct Denoiser<'a> {
    unet: &'a UNet,
    /// One a prompt, of one row: one, or the negative prompt's before it.
    conditioning: &'a [Conditioning],
    /// Of the noise mixed into `low_res`.
    noise_level: f64,
    /// Above 1 where there are two prompts.
    guidance: f64,
    /// The low-res latents at the size of the result, (b, 4, H, W), float32.
    low_res: Tensor,
    passes: Passes,
    room: Room,
    /// One entry a call of the network; the rows of all are the rows of the result.
    prompted: Vec<Prompted>,
}

impl<'a> Denoiser<'a> {
    /// `low_res`: (b, 4, H, W), float32, on the network's device, with noise of `noise_level` in it.
    ///
    /// # Errors
    /// The prompts do not fit the network.
    pub fn new(
        unet: &'a UNet,
        conditioning: &'a [Conditioning],
        (guidance, noise_level): (f64, f64),
        low_res: Tensor,
        passes: Passes,
        room: Room,
    ) -> Result<Self> {
        let pictures = low_res.dim(0)?;
        Ok(Self {
            prompted: prompted(unet, conditioning, noise_level, pictures, passes)?,
            unet,
            conditioning,
            noise_level,
            guidance,
            low_res,
            passes,
            room,
        })
    }

    /// How the network was called in the end.
    pub fn passes(&self) -> Passes {
        self.passes
    }

    /// `x` (b, 4, H, W), float32, of noise level `sigma` -> what it is without noise, (b, 4, H, W), float32. Guidance
    /// that does not fit in memory in one batch is done in two passes, now and from now on.
    ///
    /// # Errors
    /// The device gives up.
    pub fn denoise(&mut self, x: &Tensor, sigma: f32) -> Result<Tensor> {
        let preconditioning = Preconditioning::new(sigma);
        let denoised = self.forward(x, &preconditioning);
        if self.conditioning.len() > 1
            && self.passes == Passes::Together
            && denoised.as_ref().is_err_and(device::is_out_of_memory)
        {
            self.passes = Passes::Apart;
            self.prompted = prompted(
                self.unet,
                self.conditioning,
                self.noise_level,
                x.dim(0)?,
                self.passes,
            )?;
            return self.forward(x, &preconditioning);
        }
        denoised
    }

    fn forward(&self, x: &Tensor, preconditioning: &Preconditioning) -> Result<Tensor> {
        let sampling = Sampling {
            c_in: preconditioning.c_in,
            c_skip: preconditioning.c_skip,
            c_out: preconditioning.c_out,
            guidance: self.guidance,
        };
        let time = preconditioning.time;
        self.unet.denoise(
            x,
            &self.low_res,
            &sampling,
            time,
            &self.prompted,
            &self.room,
        )
    }
}

/// Prepared prompts, one entry a call of the network, each of which serves `pictures` pictures. Prompts of which the pictures attend to
/// another number of tokens are called apart: keys without weights for those that have fewer would need a mask in every kernel.
fn prompted(
    unet: &UNet,
    conditioning: &[Conditioning],
    noise_level: f64,
    pictures: usize,
    passes: Passes,
) -> Result<Vec<Prompted>> {
    let together = |prompts: &[Conditioning]| {
        let rows = prompts.iter().flat_map(|prompt| repeat_n(prompt, pictures));
        let rows: Vec<&Conditioning> = rows.collect();
        unet.prompted_at(&Conditioning::cat(&rows)?, noise_level)
    };
    let tokens: Vec<usize> = conditioning
        .iter()
        .map(Conditioning::tokens)
        .collect::<Result<_>>()?;
    let alike = tokens.windows(2).all(|pair| pair[0] == pair[1]);
    if alike && passes == Passes::Together {
        return Ok(vec![together(conditioning)?]);
    }
    conditioning
        .iter()
        .map(|one| together(from_ref(one)))
        .collect()
}
