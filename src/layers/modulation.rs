//! Adaptive norms: the scales and shifts of all of them, and the part of a network that they change from run to run.

use std::cell::RefCell;

use anyhow::Result;
use candle_core::{DType, Tensor};

use super::{FeatureMap, Linear, cuda};
use crate::device::{Backend, Placement};
use crate::model::Weights;

/// Scales and shifts of several adaptive norms, all from one input: `1 + scale` and `shift` of each are a linear layer's outputs.
pub struct Modulations {
    weights: ModulationWeights,
    /// What the input is rounded to: our CPU kernels take it in float32 whatever the weights are kept in.
    dtype: DType,
}

/// What a norm multiplies by, `1 + scale`, and adds, `shift`: each (b, channels), float32.
pub type ScaleShift = (Tensor, Tensor);

/// Scales and shifts of all norms, in the order of the norms.
pub struct Modulated {
    pub each: Vec<ScaleShift>,
    /// On a card, the tensor that they are all parts of.
    pub(super) joined: Option<Tensor>,
}

/// A part of a network that is run many times on maps of one size. A card records it and is told of the whole at once; elsewhere it
/// is run.
#[derive(Default)]
pub struct Replay(RefCell<cuda::Replay>);

impl Replay {
    /// `part(input, scales and shifts)`, which must read nothing else that changes from run to run, and whose weights live as long as
    /// this. The result is good until the next run.
    ///
    /// # Errors
    /// Those of `part`.
    pub fn run(
        &self,
        input: &FeatureMap,
        modulated: &Modulated,
        part: impl Fn(&FeatureMap, &[ScaleShift]) -> Result<FeatureMap>,
    ) -> Result<FeatureMap> {
        match &modulated.joined {
            Some(joined) => self
                .0
                .borrow_mut()
                .run(input, joined, &modulated.each, part),
            None => part(input, &modulated.each),
        }
    }
}

enum ModulationWeights {
    Card(cuda::Modulations),
    /// A layer a norm.
    Each(Vec<Linear>),
}

impl Modulations {
    /// Reads `weight` (2 * channels, inputs) and `bias` (2 * channels) of each norm.
    ///
    /// # Errors
    /// One is missing or of another shape.
    pub fn new(inputs: usize, norms: &[(usize, Weights)], placement: &Placement) -> Result<Self> {
        let weights = match placement.backend {
            Backend::CardKernels => Self::on_card(inputs, norms, placement)?,
            Backend::CpuKernels | Backend::Stock | Backend::Shapes { .. } => {
                let each =
                    |(channels, w): &(usize, Weights)| Linear::of_few_rows(inputs, 2 * channels, w);
                ModulationWeights::Each(norms.iter().map(each).collect::<Result<_>>()?)
            }
        };
        let dtype = match placement.backend {
            Backend::CpuKernels | Backend::Shapes { card: false } => DType::F32,
            _ => placement.dtype,
        };
        Ok(Self { weights, dtype })
    }

    fn on_card(
        inputs: usize,
        norms: &[(usize, Weights)],
        placement: &Placement,
    ) -> Result<ModulationWeights> {
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for (channels, w) in norms {
            weights.extend_from_slice(&w.f32(&[2 * channels, inputs], "weight")?);
            biases.extend_from_slice(&w.f32(&[2 * channels], "bias")?);
        }
        let channels = norms.iter().map(|(channels, _)| *channels).collect();
        let joined = cuda::Modulations::new(channels, &weights, biases, placement)?;
        Ok(ModulationWeights::Card(joined))
    }

    /// `x` (b, inputs) -> of each norm `1 + scale` and `shift`.
    pub fn forward(&self, x: &Tensor) -> Result<Modulated> {
        let x = &x.to_dtype(self.dtype)?;
        match &self.weights {
            ModulationWeights::Card(joined) => joined.forward(x),
            ModulationWeights::Each(linears) => {
                let each = |linear: &Linear| {
                    let both = linear.forward(x)?.to_dtype(DType::F32)?;
                    let channels = linear.outputs / 2;
                    let scale = (both.narrow(1, 0, channels)? + 1.0)?;
                    let shift = both.narrow(1, channels, channels)?.contiguous()?;
                    Ok((scale, shift))
                };
                Ok(Modulated {
                    each: linears.iter().map(each).collect::<Result<_>>()?,
                    joined: None,
                })
            }
        }
    }
}
