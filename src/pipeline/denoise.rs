//! The network as the sampler sees it: noisy latents to denoised ones.

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
    /// A row a prompt: one, or the negative prompt's before it.
    conditioning: &'a Conditioning,
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
    /// `low_res`: (b, 4, H, W), float32, on the network's device.
    ///
    /// # Errors
    /// The prompts do not fit the network.
    pub fn new(
        unet: &'a UNet,
        conditioning: &'a Conditioning,
        guidance: f64,
        low_res: Tensor,
        passes: Passes,
        room: Room,
    ) -> Result<Self> {
        let pictures = low_res.dim(0)?;
        Ok(Self {
            prompted: prompted(unet, conditioning, pictures, passes)?,
            unet,
            conditioning,
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
        if self.prompts()? > 1
            && self.passes == Passes::Together
            && denoised.as_ref().is_err_and(device::is_out_of_memory)
        {
            self.passes = Passes::Apart;
            self.prompted = prompted(self.unet, self.conditioning, x.dim(0)?, self.passes)?;
            return self.forward(x, &preconditioning);
        }
        denoised
    }

    fn prompts(&self) -> Result<usize> {
        Ok(self.conditioning.pooled.dim(0)?)
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

/// Prepared prompts, one entry a call of the network. Each row of the conditioning serves `pictures` pictures.
fn prompted(
    unet: &UNet,
    conditioning: &Conditioning,
    pictures: usize,
    passes: Passes,
) -> Result<Vec<Prompted>> {
    let prompts = conditioning.pooled.dim(0)?;
    let rows = |first: usize, count: usize| -> Result<Prompted> {
        let repeated = |t: &Tensor| -> Result<Tensor> {
            let each: Vec<Tensor> = (first..first + count)
                .flat_map(|i| std::iter::repeat_n(i, pictures))
                .map(|i| t.narrow(0, i, 1))
                .collect::<candle_core::Result<_>>()?;
            Ok(Tensor::cat(&each, 0)?)
        };
        unet.prompted(&Conditioning {
            context: repeated(&conditioning.context)?,
            pooled: repeated(&conditioning.pooled)?,
        })
    };
    match passes {
        Passes::Together => Ok(vec![rows(0, prompts)?]),
        Passes::Apart => (0..prompts).map(|prompt| rows(prompt, 1)).collect(),
    }
}
