//! The network as the sampler sees it: noisy latents to denoised ones.

use anyhow::Result;
use candle_core::{DType, Tensor};

use super::sampler::Preconditioning;
use crate::networks::text::Conditioning;
use crate::networks::unet::{Prompted, UNet};

/// Prepared prompts: one batch for all passes, or one a pass. Each row serves `b` pictures.
pub fn prompted_for(
    unet: &UNet,
    conditioning: &Conditioning,
    b: usize,
    split: bool,
) -> Result<Vec<Prompted>> {
    let passes = conditioning.pooled.dim(0)?;
    let rows = |first: usize, count: usize| -> Result<Prompted> {
        let repeated = |t: &Tensor| -> Result<Tensor> {
            let each: Vec<Tensor> = (first..first + count)
                .flat_map(|i| std::iter::repeat_n(i, b))
                .map(|i| t.narrow(0, i, 1))
                .collect::<candle_core::Result<_>>()?;
            Ok(Tensor::cat(&each, 0)?)
        };
        unet.prompted(&Conditioning {
            context: repeated(&conditioning.context)?,
            pooled: repeated(&conditioning.pooled)?,
        })
    };
    match split {
        true => (0..passes).map(|pass| rows(pass, 1)).collect(),
        false => Ok(vec![rows(0, passes)?]),
    }
}

pub fn out_of_memory(error: &anyhow::Error) -> bool {
    format!("{error:#}")
        .to_lowercase()
        .contains("out of memory")
}

/// The network with its preconditioning: noisy latents to denoised ones.
pub struct Denoiser<'a> {
    pub unet: &'a UNet,
    /// One entry a call of the network; the rows of all are the rows of the result.
    pub prompted: Vec<Prompted>,
    /// (b, 4, H, W), float32
    pub condition: Tensor,
    pub channels: usize,
}

impl Denoiser<'_> {
    /// `x` (b, 4, H, W), float32 -> (passes * b, 4, H, W), float32
    pub fn denoise(&self, x: &Tensor, preconditioning: &Preconditioning) -> Result<Tensor> {
        let b = x.dim(0)?;
        let input = Tensor::cat(&[&(x * preconditioning.c_in)?, &self.condition], 1)?;
        let outputs: Vec<Tensor> = self
            .prompted
            .iter()
            .map(|prompted| {
                let passes = prompted.rows()? / b;
                let input = Tensor::cat(&vec![&input; passes], 0)?;
                self.unet.forward(&input, preconditioning.time, prompted)
            })
            .collect::<Result<_>>()?;
        // The last channel is a variance that nobody reads.
        let output = Tensor::cat(&outputs, 0)?
            .narrow(1, 0, self.channels)?
            .to_dtype(DType::F32)?;
        let x = Tensor::cat(&vec![x; output.dim(0)? / b], 0)?;
        Ok(((x * preconditioning.c_skip)? + (output * preconditioning.c_out)?)?)
    }
}
