//! The ends of a denoising network: what goes in beside the noisy latents, and how what comes out is read.

use anyhow::Result;
use candle_core::Tensor;

use super::{FeatureMap, cuda};
use crate::device::{Backend, Placement};

/// How noisy latents go into a denoising network, and how what comes out is read (Karras et al., 2022).
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Scales the noisy latents on their way in.
    pub c_in: f64,
    /// Weight of the noisy latents in the denoised ones.
    pub c_skip: f64,
    /// Weight of the network's output in the denoised ones.
    pub c_out: f64,
    /// Of two prompts, the negative one first: `negative + guidance * (positive - negative)`.
    pub guidance: f64,
}

impl Sampling {
    /// The network's input: `c_in` times the latents `x` (b, c, h, w) and then the `condition` (b, d, h, w), where there is one, both
    /// float32, as a map of `prompts` times the batch.
    pub fn input(
        &self,
        x: &Tensor,
        condition: Option<&Tensor>,
        prompts: usize,
        placement: &Placement,
    ) -> Result<FeatureMap> {
        if placement.backend == Backend::CardKernels {
            return Ok(FeatureMap {
                tensor: cuda::map_of_planes(x, self.c_in, condition, prompts, placement.dtype)?,
                backend: placement.backend,
            });
        }
        let scaled = (x * self.c_in)?;
        let input = match condition {
            Some(condition) => Tensor::cat(&[&scaled, condition], 1)?,
            None => scaled,
        };
        FeatureMap::from_nchw(&Tensor::cat(&vec![&input; prompts], 0)?, placement)
    }

    /// `x` (b, c, h, w), float32, and the network's `output` for it, a map of as many or twice as many rows with at least c channels,
    /// as latents without noise, (b, c, h, w), float32.
    pub fn denoised(&self, x: &Tensor, output: &FeatureMap) -> Result<Tensor> {
        if output.backend == Backend::CardKernels {
            return cuda::denoised(x, &output.tensor, self);
        }
        let (b, channels, _, _) = x.dims4()?;
        let output = output.to_nchw()?.narrow(1, 0, channels)?;
        let prompts = output.dim(0)? / b;
        let repeated = Tensor::cat(&vec![x; prompts], 0)?;
        let denoised = ((repeated * self.c_skip)? + (output * self.c_out)?)?;
        match prompts {
            1 => Ok(denoised),
            _ => guide(&denoised, self.guidance),
        }
    }
}

/// Classifier-free guidance: `unconditional + scale * (conditional - unconditional)`.
///
/// `denoised` holds both halves along the batch, unconditional first: (2b, c, h, w) -> (b, c, h, w).
pub fn guide(denoised: &Tensor, scale: f64) -> Result<Tensor> {
    let halves = denoised.chunk(2, 0)?;
    let (unconditional, conditional) = (&halves[0], &halves[1]);
    Ok((unconditional + ((conditional - unconditional)? * scale)?)?)
}

/// `condition` (b, 2n) plus the cosines and sines of `frequencies` (n), float32, times `angle`, in the condition's dtype.
pub fn time_features(
    condition: &Tensor,
    frequencies: &Tensor,
    angle: f64,
    cosine_first: bool,
    placement: &Placement,
) -> Result<Tensor> {
    if placement.backend == Backend::CardKernels {
        return cuda::time_features(condition, frequencies, angle, cosine_first);
    }
    let angles = (frequencies * angle)?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    let features = if cosine_first {
        Tensor::cat(&[cos, sin], 0)?
    } else {
        Tensor::cat(&[sin, cos], 0)?
    };
    Ok(condition.broadcast_add(&features.to_dtype(placement.dtype)?)?)
}
