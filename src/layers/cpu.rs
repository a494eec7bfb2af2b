//! The layers on this program's own CPU kernels, channels last. Half-precision tensors are widened on the way in
//! and rounded on the way out: the kernels compute in float32.

use std::ops::{Deref, Range};

use anyhow::{Result, bail, ensure};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};

use super::bands::{Band, BandReading, Known, Size, Window};
use super::{Activation, ConvShape, FeatureMap, Mask, NormAct, Padding, Reading};
use crate::kernels::cpu as kernels;
use crate::kernels::cpu::{AttentionShape, Filter, GroupSums, Input, PackedConv, Prologue};
pub use crate::kernels::cpu::{downsample_reach, upsample_reach};

/// A tensor's values in float32, without a copy where they are kept so.
enum Values<'a> {
    Borrowed {
        storage: Box<dyn Deref<Target = Storage> + 'a>,
        place: Range<usize>,
    },
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
            Some((start, end)) => Ok(Self::Borrowed {
                storage: Box::new(storage),
                place: start..end,
            }),
            None => {
                drop(storage);
                Ok(Self::Owned(tensor.flatten_all()?.to_vec1()?))
            }
        }
    }

    fn slice(&self) -> Result<&[f32]> {
        match self {
            Self::Owned(values) => Ok(values),
            Self::Borrowed { storage, place } => match &***storage {
                Storage::Cpu(CpuStorage::F32(values)) => Ok(&values[place.clone()]),
                _ => bail!("the CPU kernels were given a tensor that is not on the CPU"),
            },
        }
    }
}

fn tensor(values: Vec<f32>, shape: impl Into<candle_core::Shape>, dtype: DType) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape.into(), &Device::Cpu)?.to_dtype(dtype)?)
}

/// Calls `run` with a tensor's values in float32, of which there is no copy where they are kept so.
pub fn with_values<T>(tensor: &Tensor, run: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    let values = Values::of(tensor)?;
    run(values.slice()?)
}

pub fn pack_linear(
    weight: &[f32],
    bias: Option<&[f32]>,
    inputs: usize,
    outputs: usize,
) -> PackedConv {
    PackedConv::linear(weight, bias, inputs, outputs)
}

pub fn pack_conv(weight: &[f32], bias: Option<&[f32]>, shape: &ConvShape) -> PackedConv {
    let Padding { before, after } = shape.padding;
    let filter = Filter {
        inputs: shape.inputs,
        outputs: shape.outputs,
        height: shape.kernel,
        width: shape.kernel,
        stride: shape.stride,
        padding: kernels::Padding {
            top: before,
            bottom: after,
            left: before,
            right: after,
        },
    };
    PackedConv::new(weight, bias, filter)
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
    let y = kernels::linear(&input, weight, residual, Activation::None);
    tensor(y, shape, x.dtype())
}

pub fn conv2d(
    x: &FeatureMap,
    weight: &PackedConv,
    shape: &ConvShape,
    reading: Reading,
    residual: Option<&FeatureMap>,
) -> Result<FeatureMap> {
    let (b, c, h, w) = x.dims()?;
    let values = Values::of(&x.tensor)?;
    let residual = residual.map(|map| Values::of(&map.tensor)).transpose()?;
    let residual = residual.as_ref().map(Values::slice).transpose()?;
    let normed;
    let input = Input::new(values.slice()?, b, h, w, c);
    let input = match reading {
        Reading::Plain => input,
        Reading::Normed(norm) => {
            normed = prologue(&input, norm)?;
            input.prologue(&normed)
        }
        Reading::Upsampled => input.upsample2x(),
    };
    let (_, h, w) = input.shape();
    let (h, w) = weight.output_size(h, w);
    let y = kernels::conv2d(&input, weight, residual);
    Ok(x.like(tensor(y, (b, h, w, shape.outputs), x.tensor.dtype())?))
}

/// What a window's pieces hold.
fn values_of(pieces: &[FeatureMap]) -> Result<Vec<Values<'_>>> {
    pieces.iter().map(|map| Values::of(&map.tensor)).collect()
}

/// Calls `run` with a window of a map of `size` as kernels read it.
fn with_input<T>(window: &Window, size: Size, run: impl FnOnce(Input) -> Result<T>) -> Result<T> {
    let (left, right) = (values_of(&window.pieces)?, values_of(&window.beside)?);
    let left: Vec<&[f32]> = left.iter().map(Values::slice).collect::<Result<_>>()?;
    let right: Vec<&[f32]> = right.iter().map(Values::slice).collect::<Result<_>>()?;
    let channels = |pieces: &[FeatureMap]| match pieces.first() {
        Some(piece) => Ok::<_, anyhow::Error>(piece.dims()?.1),
        None => Ok(0),
    };
    let (first, second) = (channels(&window.pieces)?, channels(&window.beside)?);
    let Size { b, h, w, .. } = size;
    let input = Input::bands(&left, window.first, b, h, w, first);
    run(if second > 0 {
        input.beside(&right, second)
    } else {
        input
    })
}

pub fn conv2d_lines(
    window: &Window,
    size: Size,
    weight: &PackedConv,
    reading: BandReading,
    residual: Option<&FeatureMap>,
    lines: Band,
) -> Result<FeatureMap> {
    let residual = residual.map(|map| Values::of(&map.tensor)).transpose()?;
    let residual = residual.as_ref().map(Values::slice).transpose()?;
    with_input(window, size, |input| {
        let input = match reading {
            BandReading::Plain => input,
            BandReading::Upsampled => input.upsample2x(),
            BandReading::Known(Known::Cpu(prologue)) => input.prologue(prologue),
            BandReading::Known(Known::Tensors { .. } | Known::Shapes) => {
                bail!("the CPU kernels were given another device's norm")
            }
        };
        let (b, h, w) = input.shape();
        let (_, w) = weight.output_size(h, w);
        let y = kernels::conv2d_lines(&input, weight, residual, lines.clone());
        map_like(window, y, (b, lines.len(), w, weight.outputs()))
    })
}

/// A map of the type of a window's.
fn map_like(
    window: &Window,
    values: Vec<f32>,
    shape: (usize, usize, usize, usize),
) -> Result<FeatureMap> {
    let Some(piece) = window.pieces.first() else {
        bail!("a window of no lines");
    };
    Ok(piece.like(tensor(values, shape, piece.tensor.dtype())?))
}

pub fn normed_lines(
    window: &Window,
    size: Size,
    prologue: &Prologue,
    lines: Band,
) -> Result<FeatureMap> {
    with_input(window, size, |input| {
        let shape = (size.b, lines.len(), size.w, input.channels());
        let y = kernels::materialise_lines(&input.prologue(prologue), lines);
        map_like(window, y, shape)
    })
}

pub fn add_lines(sums: &mut GroupSums, window: &Window, size: Size, lines: Band) -> Result<()> {
    with_input(window, size, |input| {
        sums.add(&input, lines);
        Ok(())
    })
}

/// Lines of a map at twice its size (`up`) or half.
pub fn resampled_lines(window: &Window, size: Size, up: bool, lines: Band) -> Result<FeatureMap> {
    with_input(window, size, |input| {
        let (y, w) = if up {
            (kernels::upsample_k(&input, lines.clone()), 2 * size.w)
        } else {
            (kernels::downsample_k(&input, lines.clone()), size.w / 2)
        };
        map_like(window, y, (size.b, lines.len(), w, input.channels()))
    })
}

/// Statistics of a map and weights of its norm as the map that a kernel applies to what it reads.
fn prologue(x: &Input, norm: &NormAct) -> Result<Prologue> {
    let (b, h, _) = x.shape();
    let mut sums = GroupSums::new(b, x.channels(), norm.groups);
    sums.add(x, 0..h);
    known_prologue(&sums, norm)
}

/// The same of statistics that are known.
pub fn known_prologue(sums: &GroupSums, norm: &NormAct) -> Result<Prologue> {
    let (scale, shift) = (Values::of(&norm.scale)?, Values::of(&norm.shift)?);
    let stats = sums.stats(norm.eps);
    Ok(stats.affine(scale.slice()?, shift.slice()?, norm.activation))
}

pub fn norm_act(x: &FeatureMap, norm: &NormAct) -> Result<FeatureMap> {
    let (b, c, h, w) = x.dims()?;
    let values = Values::of(&x.tensor)?;
    let input = Input::new(values.slice()?, b, h, w, c);
    let prologue = prologue(&input, norm)?;
    let y = kernels::materialise(&input.prologue(&prologue));
    Ok(x.like(tensor(y, (b, h, w, c), x.tensor.dtype())?))
}

pub fn activation(x: &Tensor, activation: Activation) -> Result<Tensor> {
    let values = Values::of(x)?;
    let y = kernels::activate(values.slice()?, activation);
    tensor(y, x.shape(), x.dtype())
}

pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let (values, weight, bias) = (Values::of(x)?, Values::of(weight)?, Values::of(bias)?);
    let y = kernels::layer_norm(values.slice()?, weight.slice()?, bias.slice()?, eps as f32);
    tensor(y, x.shape(), x.dtype())
}

pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: Mask) -> Result<Tensor> {
    let (b, nq, width) = q.dims3()?;
    let d = width / heads;
    let shape = AttentionShape {
        b,
        heads,
        nq,
        nk: k.dim(1)?,
        d,
        causal: mask == Mask::Causal,
    };
    let (queries, k, v) = (Values::of(q)?, Values::of(k)?, Values::of(v)?);
    let scale = 1.0 / (d as f32).sqrt();
    let y = kernels::attention(queries.slice()?, k.slice()?, v.slice()?, shape, scale);
    tensor(y, (b, nq, width), q.dtype())
}

pub fn downsample(x: &FeatureMap) -> Result<FeatureMap> {
    resampled(x, false)
}

pub fn upsample(x: &FeatureMap) -> Result<FeatureMap> {
    resampled(x, true)
}

fn resampled(x: &FeatureMap, up: bool) -> Result<FeatureMap> {
    let size = x.size()?;
    let (h, w) = (size.h, size.w);
    ensure!(h >= 2 && w >= 2, "a map of {w}x{h} is too small to reflect");
    let lines = if up { 2 * h } else { h / 2 };
    resampled_lines(&Window::of(0, x.clone()), size, up, 0..lines)
}
