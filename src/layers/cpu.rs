//! The layers on this program's own CPU kernels, channels last. Half-precision tensors are widened on the way in
//! and rounded on the way out: the kernels compute in float32.

use std::ops::Deref;

use anyhow::{Result, bail};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};

use super::{Activation, ConvShape, FeatureMap, NormAct};
use crate::kernels::{self, Act, Input, PackedConv, Prologue};

/// A tensor's values in float32, without a copy where they are kept so.
enum Values<'a> {
    Borrowed(Box<dyn Deref<Target = Storage> + 'a>, usize, usize),
    Owned(Vec<f32>),
}

impl<'a> Values<'a> {
    fn of(tensor: &'a Tensor) -> Result<Self> {
        if tensor.dtype() != DType::F32 {
            let wide = tensor.flatten_all()?.to_dtype(DType::F32)?;
            return Ok(Self::Owned(wide.to_vec1()?));
        }
        let (storage, layout) = tensor.storage_and_layout();
        match layout.contiguous_offsets() {
            Some((start, end)) => Ok(Self::Borrowed(Box::new(storage), start, end)),
            None => {
                drop(storage);
                Ok(Self::Owned(tensor.flatten_all()?.to_vec1()?))
            }
        }
    }

    fn slice(&self) -> Result<&[f32]> {
        match self {
            Self::Owned(values) => Ok(values),
            Self::Borrowed(storage, start, end) => match &***storage {
                Storage::Cpu(CpuStorage::F32(values)) => Ok(&values[*start..*end]),
                _ => bail!("the CPU kernels were given a tensor that is not on the CPU"),
            },
        }
    }
}

fn tensor(values: Vec<f32>, shape: impl Into<candle_core::Shape>, dtype: DType) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape.into(), &Device::Cpu)?.to_dtype(dtype)?)
}

fn act(activation: Activation) -> Act {
    match activation {
        Activation::None => Act::None,
        Activation::Gelu => Act::Gelu,
        Activation::Silu => Act::Silu,
        Activation::QuickGelu => Act::QuickGelu,
    }
}

pub fn pack_linear(
    weight: &[f32],
    bias: Option<&[f32]>,
    inputs: usize,
    outputs: usize,
) -> PackedConv {
    PackedConv::linear(weight, bias, (outputs, inputs))
}

pub fn pack_conv(weight: &[f32], bias: Option<&[f32]>, shape: &ConvShape) -> PackedConv {
    let (before, after) = shape.padding;
    PackedConv::new(
        weight,
        bias,
        (shape.outputs, shape.inputs),
        (shape.kernel, shape.kernel),
        shape.stride,
        [before, after, before, after],
    )
}

pub fn linear(
    x: &Tensor,
    weight: &PackedConv,
    outputs: usize,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let values = Values::of(x)?;
    let residual = residual.map(Values::of).transpose()?;
    let residual = residual.as_ref().map(Values::slice).transpose()?;
    let mut shape = x.dims().to_vec();
    let inputs = shape.pop().unwrap_or(1);
    let rows: usize = shape.iter().product();
    shape.push(outputs);
    let input = Input::new(values.slice()?, 1, 1, rows, inputs);
    let y = kernels::linear(&input, weight, residual, Act::None);
    tensor(y, shape, x.dtype())
}

pub fn conv2d(
    x: &FeatureMap,
    weight: &PackedConv,
    shape: &ConvShape,
    norm: Option<&NormAct>,
    residual: Option<&FeatureMap>,
    upsample: bool,
) -> Result<FeatureMap> {
    let (b, c, h, w) = x.dims()?;
    let values = Values::of(&x.tensor)?;
    let residual = residual.map(|map| Values::of(&map.tensor)).transpose()?;
    let residual = residual.as_ref().map(Values::slice).transpose()?;
    let prologue = norm
        .map(|norm| prologue(values.slice()?, (b, h * w, c), norm))
        .transpose()?;
    let mut input = Input::new(values.slice()?, b, h, w, c);
    if let Some(prologue) = &prologue {
        input = input.prologue(prologue);
    }
    if upsample {
        input = input.upsample2x();
    }
    let (_, h, w) = input.shape();
    let (h, w) = weight.output_size(h, w);
    let y = kernels::conv2d(&input, weight, residual);
    Ok(x.like(tensor(y, (b, h, w, shape.outputs), x.tensor.dtype())?))
}

fn nchw(x: &FeatureMap) -> Result<Tensor> {
    x.to_nchw()
}
fn back(x: &FeatureMap, t: Tensor) -> Result<FeatureMap> {
    Ok(x.like(t.permute((0, 2, 3, 1))?.contiguous()?))
}

fn prologue(x: &[f32], (b, n, c): (usize, usize, usize), norm: &NormAct) -> Result<Prologue> {
    let (scale, shift) = (norm.scale.to_vec2::<f32>()?, norm.shift.to_vec2::<f32>()?);
    let (mut a, mut s) = (vec![0.; b * c], vec![0.; b * c]);
    let size = c / norm.groups;
    for i in 0..b {
        let (scale, shift) = (&scale[i % scale.len()], &shift[i % shift.len()]);
        for g in 0..norm.groups {
            let (mut sum, mut sq) = (0f64, 0f64);
            for p in 0..n {
                for k in 0..size {
                    let v = f64::from(x[(i * n + p) * c + g * size + k]);
                    sum += v;
                    sq += v * v;
                }
            }
            let m = sum / (n * size) as f64;
            let r = 1.0 / (sq / (n * size) as f64 - m * m + norm.eps).sqrt();
            for k in g * size..(g + 1) * size {
                a[i * c + k] = (r * f64::from(scale[k])) as f32;
                s[i * c + k] = (f64::from(shift[k]) - m * r * f64::from(scale[k])) as f32;
            }
        }
    }
    Ok(Prologue::new(a, s, act(norm.activation)))
}
pub fn norm_act(x: &FeatureMap, norm: &NormAct) -> Result<FeatureMap> {
    back(x, super::stock::norm_act(&nchw(x)?, norm)?)
}
pub fn activation(x: &Tensor, activation: Activation) -> Result<Tensor> {
    let _ = act(activation);
    super::stock::activation(x, activation)
}
pub fn layer_norm(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    super::stock::layer_norm(x, w, b, eps)
}
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    super::stock::attention(q, k, v, heads, causal)
}
pub fn downsample(x: &FeatureMap) -> Result<FeatureMap> {
    back(x, super::stock::downsample(&nchw(x)?)?)
}
pub fn upsample(x: &FeatureMap) -> Result<FeatureMap> {
    back(x, super::stock::upsample(&nchw(x)?)?)
}
