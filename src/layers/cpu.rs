//! The layers on this program's own CPU kernels, channels last. Maps and weights are kept in the run's type; the kernels compute in
//! float32 and round once, when they write.

use std::ops::{Deref, Range};

use anyhow::{Result, bail, ensure};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor, WithDType};

use super::bands::{Band, BandReading, Known, Size, Window};
use super::{Activation, ConvShape, FeatureMap, Mask, NormAct, Padding, Reading};
use crate::kernels::cpu as kernels;
use crate::kernels::cpu::{
    AttentionShape, Elsewhere, Filter, GroupSums, Input, LinearInPlace, PackedConv, Precision,
    Prologue, Value, Values,
};
pub use crate::kernels::cpu::{downsample_reach, upsample_reach};

/// A tensor's values, without a copy where they lie one after the other.
enum Held<'a> {
    Borrowed {
        storage: Box<dyn Deref<Target = Storage> + 'a>,
        place: Range<usize>,
    },
    Owned(CpuStorage),
}

/// Runs `$e` with the type `$v` that a dtype is kept in.
macro_rules! with_dtype {
    ($dtype:expr, $v:ident => $e:expr) => {
        match $dtype {
            DType::F32 => {
                type $v = f32;
                $e
            }
            DType::BF16 => {
                type $v = half::bf16;
                $e
            }
            DType::F16 => {
                type $v = half::f16;
                $e
            }
            other => bail!("the CPU kernels were given {other:?}; they take F32, F16 and BF16"),
        }
    };
}

impl<'a> Held<'a> {
    fn of(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        if let Some((start, end)) = layout.contiguous_offsets() {
            return Ok(Self::Borrowed {
                storage: Box::new(storage),
                place: start..end,
            });
        }
        drop(storage);
        let flat = tensor.flatten_all()?;
        Ok(Self::Owned(with_dtype!(tensor.dtype(), V => {
            <V as WithDType>::to_cpu_storage_owned(flat.to_vec1::<V>()?)
        })))
    }

    fn values(&self) -> Result<Values<'_>> {
        let (storage, place) = match self {
            Self::Owned(storage) => (storage, None),
            Self::Borrowed { storage, place } => match &***storage {
                Storage::Cpu(storage) => (storage, Some(place.clone())),
                _ => bail!("the CPU kernels were given a tensor that is not on the CPU"),
            },
        };
        let values = match storage {
            CpuStorage::F32(values) => Values::from(values),
            CpuStorage::BF16(values) => Values::from(values),
            CpuStorage::F16(values) => Values::from(values),
            _ => bail!("the CPU kernels take F32, F16 and BF16"),
        };
        let place = place.unwrap_or(0..values.len());
        Ok(values.part(place))
    }

    /// The same where they are of this type.
    fn typed<V: Value>(&self) -> Result<&[V]> {
        let values = self.values()?;
        match V::of_values(values) {
            Some(values) => Ok(values),
            None => bail!(
                "the CPU kernels were given {:?} beside {:?}",
                values.precision(),
                V::PRECISION
            ),
        }
    }
}

fn tensor<V: WithDType>(values: Vec<V>, shape: impl Into<candle_core::Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape.into(), &Device::Cpu)?)
}

/// Calls `run` with a tensor's values as bytes, as they are in memory.
pub fn with_bytes<T>(tensor: &Tensor, run: impl FnOnce(&[u8]) -> Result<T>) -> Result<T> {
    let held = Held::of(tensor)?;
    run(match held.values()? {
        Values::F32(values) => bytemuck::cast_slice(values),
        Values::Bf16(values) => bytemuck::cast_slice(values),
        Values::F16(values) => bytemuck::cast_slice(values),
    })
}

/// A tensor of `shape` from memory that `fill` writes as bytes.
pub fn from_bytes(
    shape: (usize, usize, usize, usize),
    dtype: DType,
    fill: impl FnOnce(&mut [u8]) -> Result<()>,
) -> Result<Tensor> {
    let (b, h, w, c) = shape;
    with_dtype!(dtype, V => {
        let mut values = kernels::zeros::<V>(b * h * w * c);
        fill(bytemuck::cast_slice_mut(&mut values))?;
        tensor(values, shape)
    })
}

/// What a dtype is kept in.
fn precision(dtype: DType) -> Result<Precision> {
    with_dtype!(dtype, V => Ok(V::PRECISION))
}

pub fn pack_linear(
    weight: &[f32],
    bias: Option<&[f32]>,
    (inputs, outputs): (usize, usize),
    dtype: DType,
) -> Result<PackedConv> {
    let filter = Filter::linear(inputs, outputs);
    Ok(PackedConv::kept_as(precision(dtype)?, weight, bias, filter))
}

pub fn pack_conv(
    weight: &[f32],
    bias: Option<&[f32]>,
    shape: &ConvShape,
    dtype: DType,
) -> Result<PackedConv> {
    let filter = filter(shape);
    Ok(PackedConv::kept_as(precision(dtype)?, weight, bias, filter))
}

pub fn conv_in_place(weight: Elsewhere, bias: Option<&[f32]>, shape: &ConvShape) -> PackedConv {
    PackedConv::in_place(weight, bias, filter(shape))
}

pub fn filter(shape: &ConvShape) -> Filter {
    let Padding { before, after } = shape.padding;
    Filter {
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
    }
}

pub fn gate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    let held = Held::of(x)?;
    let mut shape = x.dims().to_vec();
    let width = shape.pop().unwrap_or(0) / 2;
    shape.push(width);
    with_dtype!(x.dtype(), V => tensor(kernels::gate(held.typed::<V>()?, width, activation), shape))
}

pub fn linear_in_place(
    x: &Tensor,
    layer: &LinearInPlace,
    outputs: usize,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let held = Held::of(x)?;
    let residual = residual.map(Held::of).transpose()?;
    let residual = residual.as_ref().map(Held::typed::<f32>).transpose()?;
    let mut shape = x.dims().to_vec();
    shape.pop();
    shape.push(outputs);
    tensor(layer.forward(held.typed::<f32>()?, residual), shape)
}

pub fn linear(
    x: &Tensor,
    weight: &PackedConv,
    outputs: usize,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let held = Held::of(x)?;
    let residual = residual.map(Held::of).transpose()?;
    let mut shape = x.dims().to_vec();
    let inputs = shape.pop().unwrap_or(1);
    let rows: usize = shape.iter().product();
    shape.push(outputs);
    let input = Input::new(held.values()?, 1, 1, rows, inputs);
    with_dtype!(x.dtype(), V => {
        let residual = residual.as_ref().map(Held::typed::<V>).transpose()?;
        tensor(kernels::linear(&input, weight, residual, Activation::None), shape)
    })
}

/// What a convolution's output is kept as: a network's last words are not rounded once more.
fn output_dtype(shape: &ConvShape, of: DType) -> DType {
    if shape.last { DType::F32 } else { of }
}

pub fn conv2d(
    x: &FeatureMap,
    weight: &PackedConv,
    shape: &ConvShape,
    reading: Reading,
    residual: Option<&FeatureMap>,
) -> Result<FeatureMap> {
    let (b, c, h, w) = x.dims()?;
    let held = Held::of(&x.tensor)?;
    let residual = residual.map(|map| Held::of(&map.tensor)).transpose()?;
    let normed;
    let input = Input::new(held.values()?, b, h, w, c);
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
    with_dtype!(output_dtype(shape, x.tensor.dtype()), V => {
        let residual = residual.as_ref().map(Held::typed::<V>).transpose()?;
        let y = kernels::conv2d(&input, weight, residual, shape.activation);
        Ok(x.like(tensor(y, (b, h, w, shape.outputs))?))
    })
}

/// What a window's pieces hold.
fn values_of(pieces: &[FeatureMap]) -> Result<Vec<Held<'_>>> {
    pieces.iter().map(|map| Held::of(&map.tensor)).collect()
}

/// Calls `run` with a window of a map of `size` as kernels read it.
fn with_input<T>(window: &Window, size: Size, run: impl FnOnce(Input) -> Result<T>) -> Result<T> {
    let (left, right) = (values_of(&window.pieces)?, values_of(&window.beside)?);
    let left: Vec<Values> = left.iter().map(Held::values).collect::<Result<_>>()?;
    let right: Vec<Values> = right.iter().map(Held::values).collect::<Result<_>>()?;
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
    (weight, shape): (&PackedConv, &ConvShape),
    reading: BandReading,
    residual: Option<&FeatureMap>,
    lines: Band,
) -> Result<FeatureMap> {
    let residual = residual.map(|map| Held::of(&map.tensor)).transpose()?;
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
        let size = (b, lines.len(), w, weight.outputs());
        with_dtype!(output_dtype(shape, dtype_of(window)?), V => {
            let residual = residual.as_ref().map(Held::typed::<V>).transpose()?;
            let y = kernels::conv2d_lines(&input, weight, residual, shape.activation, lines);
            map_like(window, tensor(y, size)?)
        })
    })
}

fn piece_of(window: &Window) -> Result<&FeatureMap> {
    match window.pieces.first() {
        Some(piece) => Ok(piece),
        None => bail!("a window of no lines"),
    }
}

fn dtype_of(window: &Window) -> Result<DType> {
    Ok(piece_of(window)?.tensor.dtype())
}

/// A map as a window's pieces are.
fn map_like(window: &Window, tensor: Tensor) -> Result<FeatureMap> {
    Ok(piece_of(window)?.like(tensor))
}

pub fn normed_lines(
    window: &Window,
    size: Size,
    prologue: &Prologue,
    lines: Band,
) -> Result<FeatureMap> {
    with_input(window, size, |input| {
        let shape = (size.b, lines.len(), size.w, input.channels());
        let input = input.prologue(prologue);
        with_dtype!(dtype_of(window)?, V => {
            let y = kernels::materialise_lines::<V>(&input, lines);
            map_like(window, tensor(y, shape)?)
        })
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
        let w = if up { 2 * size.w } else { size.w / 2 };
        let shape = (size.b, lines.len(), w, input.channels());
        with_dtype!(dtype_of(window)?, V => {
            let y = if up {
                kernels::upsample_k::<V>(&input, lines)
            } else {
                kernels::downsample_k::<V>(&input, lines)
            };
            map_like(window, tensor(y, shape)?)
        })
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
    let (scale, shift) = (Held::of(&norm.scale)?, Held::of(&norm.shift)?);
    let stats = sums.stats(norm.eps);
    Ok(stats.affine(scale.typed()?, shift.typed()?, norm.activation))
}

pub fn norm_act(x: &FeatureMap, norm: &NormAct) -> Result<FeatureMap> {
    let (b, c, h, w) = x.dims()?;
    let held = Held::of(&x.tensor)?;
    let input = Input::new(held.values()?, b, h, w, c);
    let prologue = prologue(&input, norm)?;
    let input = input.prologue(&prologue);
    with_dtype!(x.tensor.dtype(), V => {
        Ok(x.like(tensor(kernels::materialise::<V>(&input), (b, h, w, c))?))
    })
}

pub fn activation(x: &Tensor, activation: Activation) -> Result<Tensor> {
    let held = Held::of(x)?;
    with_dtype!(x.dtype(), V => {
        tensor(kernels::activate::<V>(held.typed()?, activation), x.shape())
    })
}

/// `weight` and `bias` are float32.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let (held, weight, bias) = (Held::of(x)?, Held::of(weight)?, Held::of(bias)?);
    with_dtype!(x.dtype(), V => {
        let (weight, bias) = (weight.typed()?, bias.typed()?);
        let y = kernels::layer_norm::<V>(held.typed()?, weight, bias, eps as f32);
        tensor(y, x.shape())
    })
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
    let (queries, k, v) = (Held::of(q)?, Held::of(k)?, Held::of(v)?);
    let scale = 1.0 / (d as f32).sqrt();
    with_dtype!(q.dtype(), V => {
        let (q, k, v) = (queries.typed()?, k.typed()?, v.typed()?);
        tensor(kernels::attention::<V>(q, k, v, shape, scale), (b, nq, width))
    })
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
