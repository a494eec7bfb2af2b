//! The layers on this program's own CUDA kernels and the CUDA libraries, channels last.

use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::bands::Moments;
use super::{
    Activation, ConvShape, FeatureMap, Mask, Modulated, NormAct, Padding, Reading, Sampling,
    ScaleShift, stock,
};
use crate::device::Placement;
use crate::kernels::cuda as kernels;

fn float32(placement: &Placement) -> kernels::Float32 {
    if placement.tf32 {
        kernels::Float32::Tf32
    } else {
        kernels::Float32::Exact
    }
}

/// A filter (outputs, inputs, positions) as (outputs, positions, inputs).
fn channels_last(weight: &[f32], inputs: usize, positions: usize) -> Vec<f32> {
    let mut all = vec![0.0; weight.len()];
    let size = inputs * positions;
    all.par_chunks_mut(size)
        .zip(weight.par_chunks(size))
        .for_each(|(to, from)| {
            for (input, values) in from.chunks_exact(positions).enumerate() {
                for (position, value) in values.iter().enumerate() {
                    to[position * inputs + input] = *value;
                }
            }
        });
    all
}

/// Where the kernels' notes are told from: what only a curious user wants to know.
pub fn notes(placement: &Placement) -> Vec<String> {
    let device = placement.device.as_cuda_device();
    device.map_or_else(|_| Vec::new(), kernels::Card::notes_of)
}

pub struct Linear(kernels::Linear);

impl Linear {
    pub fn new(
        weight: &[f32],
        bias: Option<&[f32]>,
        (inputs, outputs): (usize, usize),
        placement: &Placement,
    ) -> Result<Self> {
        let bias = bias.map(|bias| placement.upload(bias, &[outputs]));
        Ok(Self(kernels::Linear {
            weight: placement.upload(weight, &[outputs, inputs])?,
            bias: bias.transpose()?,
            float32: float32(placement),
        }))
    }

    pub fn forward(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        Ok(self.0.forward(&x.contiguous()?, residual, x.dtype())?)
    }
}

/// Scales and shifts of many norms, one product for all.
pub struct Modulations {
    linear: kernels::Linear,
    channels: Vec<usize>,
}

impl Modulations {
    /// `weights` of each norm, (2 * channels, inputs), and `biases`, one after the other.
    pub fn new(
        channels: Vec<usize>,
        weights: &[f32],
        mut biases: Vec<f32>,
        placement: &Placement,
    ) -> Result<Self> {
        // A norm multiplies by 1 + scale: the 1 goes in here, once.
        let mut start = 0;
        for channels in &channels {
            for bias in &mut biases[start..start + channels] {
                *bias += 1.0;
            }
            start += 2 * channels;
        }
        let outputs = biases.len();
        let in_float32 = Placement {
            dtype: DType::F32,
            ..placement.clone()
        };
        let linear = kernels::Linear {
            weight: placement.upload(weights, &[outputs, weights.len() / outputs])?,
            bias: Some(in_float32.upload(&biases, &[outputs])?),
            float32: float32(placement),
        };
        Ok(Self { linear, channels })
    }

    /// Of each norm: scale and shift, parts of one tensor.
    pub fn forward(&self, x: &Tensor) -> Result<Modulated> {
        let all = self.linear.forward(x, None, DType::F32)?;
        let mut start = 0;
        let mut next = |count: usize| {
            start += count;
            all.narrow(1, start - count, count)
        };
        let one =
            |&channels: &usize| -> Result<ScaleShift> { Ok((next(channels)?, next(channels)?)) };
        let each = self.channels.iter().map(one).collect::<Result<_>>()?;
        Ok(Modulated {
            each,
            joined: Some(all),
        })
    }
}

pub struct Conv2d {
    conv: kernels::Convolution,
    activation: Activation,
}

impl Conv2d {
    pub fn new(
        weight: &[f32],
        bias: Option<&[f32]>,
        shape: &ConvShape,
        placement: &Placement,
    ) -> Result<Self> {
        let Padding { before, after } = shape.padding;
        let filter = kernels::Filter {
            inputs: shape.inputs,
            outputs: shape.outputs,
            kernel: shape.kernel,
            stride: shape.stride,
            before,
            after,
        };
        let positions = shape.kernel * shape.kernel;
        let weight = channels_last(weight, shape.inputs, positions);
        let weight = placement.upload(&weight, &[weight.len()])?;
        let of_bias = Placement {
            // A network's last words are not rounded once more.
            dtype: if filter.is_product() && shape.last {
                DType::F32
            } else {
                placement.dtype
            },
            ..placement.clone()
        };
        let bias = bias.map(|bias| of_bias.upload(bias, &[shape.outputs]));
        let bias = bias.transpose()?;
        Ok(Self {
            conv: kernels::Convolution::new(filter, &weight, bias, float32(placement))?,
            activation: shape.activation,
        })
    }

    /// The same weights once for each row of `shifts`, which is added to the bias.
    pub fn shifted_by_each(&self, shifts: &Tensor) -> Result<Vec<Self>> {
        let activation = self.activation;
        let with = |conv| Self { conv, activation };
        let each = self.conv.shifted_by_each(shifts)?;
        Ok(each.into_iter().map(with).collect())
    }

    /// `conv(norm(x)) + residual`, the normalised map in the memory of `x`, which nobody else has.
    pub fn forward_normed_over(
        &self,
        x: FeatureMap,
        norm: &NormAct,
        residual: Option<&FeatureMap>,
    ) -> Result<FeatureMap> {
        let backend = x.backend;
        let (scale, shift) = (&norm.scale, &norm.shift);
        let normed = kernels::group_norm_over(x.tensor, scale, shift, numbers(norm))?;
        let residual = residual.map(|map| &map.tensor);
        let read = kernels::Read::Plain;
        let tensor = self
            .conv
            .forward(&normed, read, residual, self.activation)?;
        Ok(FeatureMap { tensor, backend })
    }

    /// Through `activation` in place of the shape's own.
    pub fn forward(
        &self,
        x: &FeatureMap,
        reading: Reading,
        residual: Option<&FeatureMap>,
        activation: Activation,
    ) -> Result<FeatureMap> {
        let residual = residual.map(|map| &map.tensor);
        let run = |x: &Tensor, read| self.conv.forward(x, read, residual, activation);
        let y = match reading {
            Reading::Plain => run(&x.tensor, kernels::Read::Plain),
            Reading::Upsampled => run(&x.tensor, kernels::Read::Enlarged),
            Reading::Normed(norm) => run(&norm_act(x, norm)?.tensor, kernels::Read::Plain),
        };
        Ok(x.like(y?))
    }
}

fn numbers(norm: &NormAct) -> kernels::GroupNorm {
    kernels::GroupNorm {
        groups: norm.groups,
        eps: norm.eps as f32,
        activation: norm.activation,
    }
}

pub fn norm_act(x: &FeatureMap, norm: &NormAct) -> Result<FeatureMap> {
    let y = kernels::group_norm(&x.tensor, &norm.scale, &norm.shift, numbers(norm))?;
    Ok(x.like(y))
}

/// `act(x * scale + shift)` of a map, scale and shift (b, c), float32.
pub fn affine(x: &Tensor, scale: &Tensor, shift: &Tensor, act: Activation) -> Result<Tensor> {
    Ok(kernels::affine(&x.contiguous()?, scale, shift, act)?)
}

/// Those of each group of each batch item of a map.
pub fn moments(x: &Tensor, groups: usize) -> Result<Vec<Moments>> {
    let (_, h, w, c) = x.dims4()?;
    let count = (h * w * (c / groups)) as f64;
    let pairs = kernels::moments(&x.contiguous()?, groups)?;
    let moments = pairs.into_iter().map(|(mean, variance)| Moments {
        count,
        mean,
        variance,
    });
    Ok(moments.collect())
}

pub fn activation(x: &Tensor, activation: Activation) -> Result<Tensor> {
    Ok(match activation {
        Activation::None => x.clone(),
        other => kernels::activation(&x.contiguous()?, other)?,
    })
}

pub fn gate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    Ok(kernels::gate(&x.contiguous()?, activation)?)
}

pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    Ok(kernels::layer_norm(
        &x.contiguous()?,
        weight,
        bias,
        eps as f32,
    )?)
}

pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: Mask) -> Result<Tensor> {
    if kernels::takes_heads(q.dim(2)? / heads) {
        let causal = mask == Mask::Causal;
        return Ok(kernels::attention(q, k, v, heads, causal)?);
    }
    stock::attention(q, k, v, heads, mask)
}

pub fn cat_channels(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok(kernels::concatenate(a, b)?)
}

fn large_enough(x: &FeatureMap) -> Result<()> {
    let (_, _, h, w) = x.dims()?;
    ensure!(h >= 2 && w >= 2, "a map of {w}x{h} is too small to reflect");
    Ok(())
}

pub fn downsample(x: &FeatureMap) -> Result<FeatureMap> {
    large_enough(x)?;
    Ok(x.like(kernels::downsample(&x.tensor)?))
}

pub fn upsample(x: &FeatureMap) -> Result<FeatureMap> {
    large_enough(x)?;
    Ok(x.like(kernels::upsample(&x.tensor)?))
}

/// `first` times `scale` and then `second`, planes in float32, as a map of `repeats` times their batch.
pub fn map_of_planes(
    first: &Tensor,
    scale: f64,
    second: Option<&Tensor>,
    repeats: usize,
    dtype: DType,
) -> Result<Tensor> {
    let first = first.to_dtype(DType::F32)?.contiguous()?;
    let y = kernels::planes_to_map(&first, scale as f32, second, repeats, dtype)?;
    Ok(y)
}

pub fn planes(map: &Tensor) -> Result<Tensor> {
    Ok(kernels::map_to_planes(map)?)
}

pub fn denoised(x: &Tensor, output: &Tensor, sampling: &Sampling) -> Result<Tensor> {
    let reading = kernels::Reading {
        skip: sampling.c_skip as f32,
        factor: sampling.c_out as f32,
        guidance: sampling.guidance as f32,
    };
    Ok(kernels::denoised(x, output, reading)?)
}

pub fn time_features(
    condition: &Tensor,
    frequencies: &Tensor,
    angle: f64,
    cosine_first: bool,
) -> Result<Tensor> {
    Ok(kernels::time_features(
        condition,
        frequencies,
        angle as f32,
        cosine_first,
    )?)
}

/// A part of a network that a card is told of as one thing from its second run on, as long as the maps have one size.
#[derive(Default)]
pub enum Replay {
    #[default]
    New,
    /// It has run: the libraries have chosen, and scratch memory is as large as it needs to be.
    Warm {
        input: Vec<usize>,
        /// What it gave, whose memory the recorded runs write to.
        output: FeatureMap,
    },
    Recorded(Box<Recorded>),
    /// The driver does not record it.
    Never,
}

pub struct Recorded {
    graph: kernels::Graph,
    input: FeatureMap,
    modulations: Tensor,
    output: FeatureMap,
}

impl Recorded {
    fn run(&self, input: &FeatureMap, modulations: &Tensor) -> Result<FeatureMap> {
        kernels::copy(&input.tensor, &self.input.tensor)?;
        kernels::copy(modulations, &self.modulations)?;
        self.graph.launch()?;
        Ok(self.output.clone())
    }
}

impl Replay {
    /// `part(input, scales and shifts)`, which reads nothing else that changes; the scales and shifts are parts of `all`. The result
    /// is good until the next run.
    pub fn run(
        &mut self,
        input: &FeatureMap,
        all: &Tensor,
        each: &[ScaleShift],
        part: impl Fn(&FeatureMap, &[ScaleShift]) -> Result<FeatureMap>,
    ) -> Result<FeatureMap> {
        let shape = input.tensor.dims();
        if let Self::Warm {
            input: before,
            output,
        } = self
            && before == shape
        {
            let output = output.clone();
            *self = Self::record(input, all, output, || part(input, each))?;
        }
        if let Self::Recorded(recorded) = self
            && recorded.input.tensor.dims() == shape
        {
            return recorded.run(input, all);
        }
        let output = part(input, each)?;
        if !matches!(self, Self::Never) {
            *self = Self::Warm {
                input: shape.to_vec(),
                output: output.clone(),
            };
        }
        Ok(output)
    }

    fn record(
        input: &FeatureMap,
        all: &Tensor,
        output: FeatureMap,
        work: impl FnOnce() -> Result<FeatureMap>,
    ) -> Result<Self> {
        let used = vec![input.tensor.clone(), all.clone(), output.tensor.clone()];
        let graph = kernels::Graph::record(input.tensor.device(), used, || -> Result<()> {
            Ok(kernels::copy(&work()?.tensor, &output.tensor)?)
        })?;
        Ok(match graph {
            Some(graph) => Self::Recorded(Box::new(Recorded {
                graph,
                input: input.clone(),
                modulations: all.clone(),
                output,
            })),
            None => Self::Never,
        })
    }
}
