//! The layers that the networks share. Here, and only here, it is decided what runs them: this program's own
//! CPU or CUDA kernels on channels-last maps, or candle's stock operations on channels-first ones.

pub mod bands;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "no_cuda.rs"]
mod cuda;
mod modulation;
mod sampling;
pub mod shapes;
mod stock;

use std::ops::Deref;
use std::slice;

use anyhow::{Result, bail, ensure};
use candle_core::{DType, Tensor};

use self::bands::{Band, BandReading, Size, Window};
pub use self::modulation::{Modulated, Modulations, Replay, ScaleShift};
pub use self::sampling::{Sampling, guide, time_features};
use crate::device::{Backend, Placement};
pub use crate::kernels::Activation;
use crate::kernels::cpu::{Elsewhere, LinearInPlace, PackedConv};
use crate::model::Weights;

/// A batch of feature maps; logically (b, c, h, w), in memory as the operations of its device want it.
#[derive(Clone)]
pub struct FeatureMap {
    /// (b, h, w, c) for our kernels, (b, c, h, w) for candle's stock operations.
    tensor: Tensor,
    backend: Backend,
}

impl FeatureMap {
    /// From (b, c, h, w), any dtype; it takes the placement's dtype, device and memory order.
    pub fn from_nchw(tensor: &Tensor, placement: &Placement) -> Result<Self> {
        let tensor = tensor.to_device(&placement.device)?;
        let tensor = match placement.backend {
            Backend::CardKernels => cuda::map_of_planes(&tensor, 1.0, None, 1, placement.dtype)?,
            Backend::CpuKernels => tensor
                .to_dtype(placement.dtype)?
                .permute((0, 2, 3, 1))?
                .contiguous()?,
            Backend::Stock => tensor.to_dtype(placement.dtype)?.contiguous()?,
            Backend::Shapes { .. } => {
                let (b, c, h, w) = tensor.dims4()?;
                shapes::result((b, h, w, c), placement.dtype)?
            }
        };
        Ok(Self {
            tensor,
            backend: placement.backend,
        })
    }

    /// To (b, c, h, w), contiguous, float32.
    pub fn to_nchw(&self) -> Result<Tensor> {
        Ok(match self.backend {
            Backend::CardKernels => cuda::planes(&self.tensor)?,
            Backend::CpuKernels => self
                .tensor
                .permute((0, 3, 1, 2))?
                .contiguous()?
                .to_dtype(DType::F32)?,
            Backend::Stock => self.tensor.to_dtype(DType::F32)?,
            Backend::Shapes { .. } => shapes::result(self.dims()?, DType::F32)?,
        })
    }

    fn is_of_shapes(&self) -> bool {
        matches!(self.backend, Backend::Shapes { .. })
    }

    fn channels_last(&self) -> bool {
        self.backend != Backend::Stock
    }

    /// (b, c, h, w)
    pub fn dims(&self) -> Result<(usize, usize, usize, usize)> {
        let (b, x, y, z) = self.tensor.dims4()?;
        Ok(if self.channels_last() {
            (b, z, x, y)
        } else {
            (b, x, y, z)
        })
    }

    /// The positions as a sequence: (b, h * w, c), row after row.
    pub fn tokens(&self) -> Result<Tensor> {
        let (b, c, h, w) = self.dims()?;
        Ok(if self.is_of_shapes() {
            shapes::view((b, h * w, c), self.tensor.dtype())?
        } else if self.channels_last() {
            self.tensor.reshape((b, h * w, c))?
        } else {
            self.tensor
                .reshape((b, c, h * w))?
                .transpose(1, 2)?
                .contiguous()?
        })
    }

    /// The inverse of [`tokens`](Self::tokens), for a map of the height and width of this one.
    fn with_tokens(&self, tokens: &Tensor) -> Result<Self> {
        let (_, _, h, w) = self.dims()?;
        let (b, _, c) = tokens.dims3()?;
        let tensor = if self.is_of_shapes() {
            shapes::view((b, h, w, c), tokens.dtype())?
        } else if self.channels_last() {
            tokens.reshape((b, h, w, c))?
        } else {
            tokens
                .transpose(1, 2)?
                .reshape((b, c, h, w))?
                .contiguous()?
        };
        Ok(Self {
            tensor,
            backend: self.backend,
        })
    }

    fn like(&self, tensor: Tensor) -> Self {
        Self {
            tensor,
            backend: self.backend,
        }
    }

    /// Sum of two maps of one shape.
    pub fn add(&self, other: &Self) -> Result<Self> {
        Ok(self.like((&self.tensor + &other.tensor)?))
    }

    /// Every value through `activation`.
    fn activated(self, activation: Activation) -> Result<Self> {
        let tensor = match (activation, self.backend) {
            (Activation::None, _) => return Ok(self),
            (_, Backend::CpuKernels) => cpu::activation(&self.tensor, activation)?,
            (_, Backend::CardKernels) => cuda::activation(&self.tensor, activation)?,
            (_, Backend::Stock) => stock::activation(&self.tensor, activation)?,
            (_, Backend::Shapes { .. }) => shapes::result(self.tensor.dims(), self.tensor.dtype())?,
        };
        Ok(self.like(tensor))
    }

    /// The map enlarged to (h, w), at most twice as high and wide, by repeating values: what `conv(…).upsampled()` reads, for sides that are
    /// not exactly doubled.
    pub fn enlarged_to(&self, h: usize, w: usize) -> Result<Self> {
        let (b, c, low_h, low_w) = self.dims()?;
        if self.is_of_shapes() {
            return Ok(self.like(shapes::result((b, h, w, c), self.tensor.dtype())?));
        }
        let (first, all) = if self.channels_last() {
            (1, (b, 2 * low_h, 2 * low_w, c))
        } else {
            (2, (b, c, 2 * low_h, 2 * low_w))
        };
        // Each line and column twice: an axis of two behind each.
        let x = self.tensor.unsqueeze(first + 1)?.unsqueeze(first + 3)?;
        let mut twice = x.dims().to_vec();
        (twice[first + 1], twice[first + 3]) = (2, 2);
        let x = x.broadcast_as(twice)?.contiguous()?.reshape(all)?;
        let x = x.narrow(first, 0, h)?.narrow(first + 1, 0, w)?;
        Ok(self.like(x.contiguous()?))
    }

    /// This map's channels, then the other's.
    pub fn cat_channels(&self, other: &Self) -> Result<Self> {
        let (left, right) = (&self.tensor, &other.tensor);
        Ok(self.like(match self.backend {
            Backend::CardKernels => cuda::cat_channels(left, right)?,
            Backend::CpuKernels => Tensor::cat(&[left, right], 3)?,
            Backend::Stock => Tensor::cat(&[left, right], 1)?,
            Backend::Shapes { .. } => {
                let (b, h, w, c) = left.dims4()?;
                shapes::result((b, h, w, c + right.dim(3)?), left.dtype())?
            }
        }))
    }
}

impl Activation {
    /// From a configuration's name for it.
    ///
    /// # Errors
    /// The name is not one of `gelu`, `silu`, `swish`, `quick_gelu`, `relu`.
    pub fn from_name(name: &str) -> Result<Self> {
        Ok(match name {
            "gelu" => Self::Gelu,
            "silu" | "swish" => Self::Silu,
            "quick_gelu" => Self::QuickGelu,
            "relu" => Self::Relu,
            other => {
                bail!("activation `{other}` is not supported (gelu, silu, swish, quick_gelu, relu)")
            }
        })
    }

    /// Elementwise, any shape and dtype.
    pub fn apply(self, x: &Tensor, placement: &Placement) -> Result<Tensor> {
        match placement.backend {
            Backend::CpuKernels => cpu::activation(x, self),
            Backend::CardKernels => cuda::activation(x, self),
            Backend::Stock => stock::activation(x, self),
            Backend::Shapes { .. } => Ok(x.clone()),
        }
    }
}

/// `y = x W^T + b` over the last dimension.
pub struct Linear {
    weights: LinearWeights,
    pub outputs: usize,
}

enum LinearWeights {
    Shapes,
    Packed(PackedConv),
    InPlace(LinearInPlace),
    Card(cuda::Linear),
    Stock {
        weight: Tensor,
        bias: Option<Tensor>,
    },
}

impl Linear {
    /// Reads `weight` (outputs, inputs), or the same as a 1x1 convolution (outputs, inputs, 1, 1), and `bias` (outputs).
    ///
    /// # Errors
    /// One is missing or of another shape.
    pub fn new(inputs: usize, outputs: usize, w: &Weights) -> Result<Self> {
        if w.placement().is_of_shapes() {
            return Ok(Self::of_shapes(inputs, outputs, w.placement()));
        }
        let weight = Self::weight(inputs, outputs, w)?;
        let bias = w.f32(&[outputs], "bias")?;
        Self::from_values(inputs, outputs, &weight, Some(&bias), w.placement())
    }

    /// The same with `weight` alone.
    ///
    /// # Errors
    /// It is missing or of another shape.
    pub fn without_bias(inputs: usize, outputs: usize, w: &Weights) -> Result<Self> {
        if w.placement().is_of_shapes() {
            return Ok(Self::of_shapes(inputs, outputs, w.placement()));
        }
        let weight = Self::weight(inputs, outputs, w)?;
        Self::from_values(inputs, outputs, &weight, None, w.placement())
    }

    /// The same as [`new`](Self::new) for a layer that is given few rows, or is used once: its weights stay in the file where the placement
    /// allows it.
    ///
    /// # Errors
    /// As there.
    pub fn of_few_rows(inputs: usize, outputs: usize, w: &Weights) -> Result<Self> {
        Self::joined_of_few_rows(inputs, &[outputs], slice::from_ref(w))
    }

    /// The same of [`joined`](Self::joined).
    ///
    /// # Errors
    /// As there.
    pub fn joined_of_few_rows(inputs: usize, outputs: &[usize], parts: &[Weights]) -> Result<Self> {
        let in_file = |(w, &outputs): (&Weights, &usize)| -> Result<Option<Elsewhere>> {
            let weight = w.in_file(&[outputs, inputs], "weight")?;
            Ok(weight.map(|weight| Box::new(weight) as Elsewhere))
        };
        let shapes = parts.iter().any(|w| w.placement().is_of_shapes());
        let weights: Option<Vec<Elsewhere>> = if shapes {
            None
        } else {
            parts
                .iter()
                .zip(outputs)
                .map(in_file)
                .collect::<Result<_>>()?
        };
        match (weights, parts) {
            (Some(weights), _) if !parts.is_empty() => {
                let bias = Self::joined_bias(outputs, parts)?;
                let layer = LinearInPlace::new(weights, Some(&bias), inputs);
                Ok(Self {
                    weights: LinearWeights::InPlace(layer),
                    outputs: outputs.iter().sum(),
                })
            }
            (_, [w]) => Self::new(inputs, outputs.iter().sum(), w),
            _ => Self::joined(inputs, outputs, parts),
        }
    }

    fn joined_bias(outputs: &[usize], parts: &[Weights]) -> Result<Vec<f32>> {
        let mut all = Vec::new();
        for (w, &outputs) in parts.iter().zip(outputs) {
            all.extend_from_slice(&w.f32(&[outputs], "bias")?);
        }
        Ok(all)
    }

    fn of_shapes(inputs: usize, outputs: usize, placement: &Placement) -> Self {
        shapes::weights(inputs * outputs, placement);
        Self {
            weights: LinearWeights::Shapes,
            outputs,
        }
    }

    fn weight(inputs: usize, outputs: usize, w: &Weights) -> Result<impl Deref<Target = [f32]>> {
        let flat = [outputs, inputs];
        let convolution = [outputs, inputs, 1, 1];
        match w.shape("weight") {
            Some(found) if found == convolution => w.f32(&convolution, "weight"),
            _ => w.f32(&flat, "weight"),
        }
    }

    /// Several layers over the same input, each with a bias, as one: their outputs follow each other.
    ///
    /// # Errors
    /// There is none, or as [`new`](Self::new).
    pub fn joined(inputs: usize, outputs: &[usize], parts: &[Weights]) -> Result<Self> {
        Self::joined_with(inputs, outputs, parts, true)
    }

    /// The same of layers without a bias.
    ///
    /// # Errors
    /// As [`joined`](Self::joined).
    pub fn joined_without_bias(
        inputs: usize,
        outputs: &[usize],
        parts: &[Weights],
    ) -> Result<Self> {
        Self::joined_with(inputs, outputs, parts, false)
    }

    fn joined_with(
        inputs: usize,
        outputs: &[usize],
        parts: &[Weights],
        biased: bool,
    ) -> Result<Self> {
        let Some(placement) = parts.first().map(Weights::placement) else {
            bail!("no layers to join");
        };
        let total = outputs.iter().sum();
        if placement.is_of_shapes() {
            return Ok(Self::of_shapes(inputs, total, placement));
        }
        let mut weights = Vec::new();
        for (w, &outputs) in parts.iter().zip(outputs) {
            weights.extend_from_slice(&w.f32(&[outputs, inputs], "weight")?);
        }
        let bias = biased
            .then(|| Self::joined_bias(outputs, parts))
            .transpose()?;
        Self::from_values(inputs, total, &weights, bias.as_deref(), placement)
    }

    fn from_values(
        inputs: usize,
        outputs: usize,
        values: &[f32],
        bias: Option<&[f32]>,
        placement: &Placement,
    ) -> Result<Self> {
        let weights = match placement.backend {
            Backend::CpuKernels => LinearWeights::Packed(cpu::pack_linear(
                values,
                bias,
                (inputs, outputs),
                placement.dtype,
            )?),
            Backend::CardKernels => LinearWeights::Card(cuda::Linear::new(
                values,
                bias,
                (inputs, outputs),
                placement,
            )?),
            Backend::Shapes { .. } => LinearWeights::Shapes,
            Backend::Stock => LinearWeights::Stock {
                weight: placement.upload(values, &[outputs, inputs])?,
                bias: bias
                    .map(|bias| placement.upload(bias, &[outputs]))
                    .transpose()?,
            },
        };
        Ok(Self { weights, outputs })
    }

    /// (…, inputs) -> (…, outputs)
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_add(x, None)
    }

    /// The same plus `residual`, of the output's shape.
    pub fn forward_add(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        match &self.weights {
            LinearWeights::Packed(packed) => cpu::linear(x, packed, self.outputs, residual),
            LinearWeights::InPlace(layer) => cpu::linear_in_place(x, layer, self.outputs, residual),
            LinearWeights::Card(linear) => linear.forward(x, residual),
            LinearWeights::Shapes => {
                let mut shape = x.dims().to_vec();
                let inputs = shape.pop().unwrap_or(1);
                shapes::product(shape.iter().product(), inputs, self.outputs);
                shape.push(self.outputs);
                shapes::result(shape, x.dtype())
            }
            LinearWeights::Stock { weight, bias } => {
                stock::linear(x, weight, bias.as_ref(), residual)
            }
        }
    }
}

/// What a convolution is, apart from its weights.
#[derive(Clone, Copy, Debug)]
pub struct ConvShape {
    pub inputs: usize,
    pub outputs: usize,
    pub kernel: usize,
    pub stride: usize,
    pub padding: Padding,
    /// Whether its output is the network's, which our CPU kernels, and a card where it can, then keep in float32.
    pub last: bool,
    /// What the sum of its products, bias and residual goes through.
    pub activation: Activation,
}

/// Zeros around a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Padding {
    /// Lines above and columns left of it.
    pub before: usize,
    /// Lines below and columns right of it.
    pub after: usize,
}

impl ConvShape {
    /// The weights' shape.
    fn weight(&self) -> [usize; 4] {
        [self.outputs, self.inputs, self.kernel, self.kernel]
    }

    /// Stride 1, output as large as the input.
    pub fn same(inputs: usize, outputs: usize, kernel: usize) -> Self {
        Self {
            inputs,
            outputs,
            kernel,
            stride: 1,
            padding: Padding {
                before: (kernel - 1) / 2,
                after: kernel / 2,
            },
            last: false,
            activation: Activation::None,
        }
    }

    /// The same with its output through `activation`, what is added to it included.
    pub fn then(self, activation: Activation) -> Self {
        Self { activation, ..self }
    }

    /// The same as the last of a network.
    pub fn last(self) -> Self {
        Self { last: true, ..self }
    }
}

/// How a convolution reads its map.
#[derive(Clone, Copy)]
enum Reading<'a> {
    Plain,
    Normed(&'a NormAct),
    /// Enlarged 2x by repeating every value.
    Upsampled,
}

/// A 2-D convolution with an optional bias.
pub struct Conv2d {
    shape: ConvShape,
    weights: ConvWeights,
}

enum ConvWeights {
    Shapes,
    Packed(PackedConv),
    Card(cuda::Conv2d),
    Stock {
        weight: Tensor,
        bias: Option<Tensor>,
    },
}

impl Conv2d {
    /// Reads `weight` (outputs, inputs, kernel, kernel) and `bias` (outputs).
    ///
    /// # Errors
    /// One is missing or of another shape.
    pub fn new(shape: ConvShape, w: &Weights) -> Result<Self> {
        if w.placement().is_of_shapes() {
            return Ok(Self::of_shapes(shape, w.placement()));
        }
        let bias = w.f32(&[shape.outputs], "bias")?;
        if let Some(layer) = Self::in_place(shape, Some(&bias), w)? {
            return Ok(layer);
        }
        let weight = w.f32(&shape.weight(), "weight")?;
        Self::from_values(shape, &weight, Some(&bias), w.placement())
    }

    /// With a weight that stays in the file, where that is possible.
    fn in_place(shape: ConvShape, bias: Option<&[f32]>, w: &Weights) -> Result<Option<Self>> {
        if !cpu::filter(&shape).can_be_in_place() {
            return Ok(None);
        }
        let weight = w.in_file(&shape.weight(), "weight")?;
        Ok(weight.map(|weight| Self {
            weights: ConvWeights::Packed(cpu::conv_in_place(Box::new(weight), bias, &shape)),
            shape,
        }))
    }

    /// The same for `factor * conv(x) + addend`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn scaled(shape: ConvShape, factor: f32, addend: f32, w: &Weights) -> Result<Self> {
        if w.placement().is_of_shapes() {
            return Ok(Self::of_shapes(shape, w.placement()));
        }
        let weight = w.f32(&shape.weight(), "weight")?;
        let bias = w.f32(&[shape.outputs], "bias")?;
        let weight: Vec<f32> = weight.iter().map(|v| factor * v).collect();
        let bias: Vec<f32> = bias.iter().map(|v| factor * v + addend).collect();
        Self::from_values(shape, &weight, Some(&bias), w.placement())
    }

    /// The same with `weight` alone.
    ///
    /// # Errors
    /// It is missing or of another shape.
    pub fn without_bias(shape: ConvShape, w: &Weights) -> Result<Self> {
        if w.placement().is_of_shapes() {
            return Ok(Self::of_shapes(shape, w.placement()));
        }
        if let Some(layer) = Self::in_place(shape, None, w)? {
            return Ok(layer);
        }
        let weight = w.f32(&shape.weight(), "weight")?;
        Self::from_values(shape, &weight, None, w.placement())
    }

    /// The same with `weight` alone and zeros for the bias: cuDNN takes none without one.
    ///
    /// # Errors
    /// It is missing or of another shape.
    pub fn with_zero_bias(shape: ConvShape, w: &Weights) -> Result<Self> {
        if w.placement().is_of_shapes() {
            return Ok(Self::of_shapes(shape, w.placement()));
        }
        let weight = w.f32(&shape.weight(), "weight")?;
        let zeros = vec![0.0; shape.outputs];
        Self::from_values(shape, &weight, Some(&zeros), w.placement())
    }

    fn of_shapes(shape: ConvShape, placement: &Placement) -> Self {
        shapes::weights(shape.weight().iter().product(), placement);
        Self {
            shape,
            weights: ConvWeights::Shapes,
        }
    }

    fn from_values(
        shape: ConvShape,
        weight: &[f32],
        bias: Option<&[f32]>,
        placement: &Placement,
    ) -> Result<Self> {
        let weights = match placement.backend {
            Backend::CpuKernels => {
                ConvWeights::Packed(cpu::pack_conv(weight, bias, &shape, placement.dtype)?)
            }
            Backend::CardKernels => {
                ConvWeights::Card(cuda::Conv2d::new(weight, bias, &shape, placement)?)
            }
            Backend::Shapes { .. } => ConvWeights::Shapes,
            Backend::Stock => ConvWeights::Stock {
                weight: placement.upload(weight, &shape.weight())?,
                bias: bias
                    .map(|bias| placement.upload(bias, &[1, shape.outputs, 1, 1]))
                    .transpose()?,
            },
        };
        Ok(Self { shape, weights })
    }

    /// Channels that it writes.
    pub fn outputs(&self) -> usize {
        self.shape.outputs
    }

    /// The same weights once for each row of `shifts` (n, outputs), float32, which is added to the bias.
    ///
    /// # Errors
    /// The convolution has no bias, or the shifts another shape.
    pub fn shifted_by_each(&self, shifts: &Tensor) -> Result<Vec<Self>> {
        let count = shifts.dim(0)?;
        let rows = || (0..count).map(|row| shifts.narrow(0, row, 1));
        let each: Vec<ConvWeights> = match &self.weights {
            ConvWeights::Packed(packed) => rows()
                .map(|row| {
                    let row: Vec<f32> = row?.flatten_all()?.to_vec1()?;
                    Ok(ConvWeights::Packed(packed.shifted(&row)))
                })
                .collect::<Result<_>>()?,
            ConvWeights::Card(convolution) => {
                let each = convolution.shifted_by_each(shifts)?;
                each.into_iter().map(ConvWeights::Card).collect()
            }
            ConvWeights::Shapes => (0..count).map(|_| ConvWeights::Shapes).collect(),
            ConvWeights::Stock { weight, bias } => {
                let Some(bias) = bias else {
                    bail!("a convolution without a bias cannot be shifted");
                };
                rows()
                    .map(|row| {
                        let shift = row?.to_dtype(bias.dtype())?.reshape(bias.shape())?;
                        Ok(ConvWeights::Stock {
                            weight: weight.clone(),
                            bias: Some((bias + shift)?),
                        })
                    })
                    .collect::<Result<_>>()?
            }
        };
        let shape = self.shape;
        let with = |weights| Self { shape, weights };
        Ok(each.into_iter().map(with).collect())
    }

    /// (b, inputs, h, w) -> (b, outputs, h', w')
    pub fn forward(&self, x: &FeatureMap) -> Result<FeatureMap> {
        self.run(x, Reading::Plain, None)
    }

    /// `conv(norm(x)) + residual`; the normalised map is never written where our CPU kernels run.
    pub fn forward_normed(
        &self,
        x: &FeatureMap,
        norm: &NormAct,
        residual: Option<&FeatureMap>,
    ) -> Result<FeatureMap> {
        self.run(x, Reading::Normed(norm), residual)
    }

    /// The same for a map that nobody else has: where it is on a card, it is normalised in its own memory.
    pub fn forward_normed_over(
        &self,
        x: FeatureMap,
        norm: &NormAct,
        residual: Option<&FeatureMap>,
    ) -> Result<FeatureMap> {
        match &self.weights {
            ConvWeights::Card(convolution) => convolution.forward_normed_over(x, norm, residual),
            ConvWeights::Packed(_) | ConvWeights::Stock { .. } | ConvWeights::Shapes => {
                self.forward_normed(&x, norm, residual)
            }
        }
    }

    /// `conv(x enlarged 2x by repeating every value)`
    pub fn forward_upsampled(&self, x: &FeatureMap) -> Result<FeatureMap> {
        self.run(x, Reading::Upsampled, None)
    }

    /// The sizes of what it makes of a map.
    fn output_size(&self, of: Size, upsampled: bool) -> Size {
        let ConvShape {
            kernel,
            stride,
            padding,
            ..
        } = self.shape;
        let enlarged = if upsampled { 2 } else { 1 };
        let side = |n: usize| {
            let n = enlarged * n + padding.before + padding.after;
            if n < kernel {
                0
            } else {
                (n - kernel) / stride + 1
            }
        };
        Size {
            c: self.shape.outputs,
            h: side(of.h),
            w: side(of.w),
            ..of
        }
    }

    /// The lines of a map of `size` that lines of the output are made of.
    fn reach(&self, lines: &Band, size: Size, upsampled: bool) -> Band {
        let enlarged = if upsampled { 2 } else { 1 };
        let (h, w) = (size.h, size.w);
        let there = match &self.weights {
            ConvWeights::Packed(packed) => packed.reach(lines, enlarged * h, enlarged * w),
            ConvWeights::Card(_) | ConvWeights::Stock { .. } | ConvWeights::Shapes => {
                let ConvShape {
                    kernel,
                    stride,
                    padding,
                    ..
                } = self.shape;
                // The window's own first line is where a line of the output begins.
                let start = (lines.start * stride).saturating_sub(padding.before);
                let start = start / stride * stride;
                let end = (lines.end - 1) * stride + kernel;
                start..end.saturating_sub(padding.before).min(enlarged * h)
            }
        };
        there.start / enlarged..there.end.div_ceil(enlarged).min(h)
    }

    /// Lines of what it makes of a map of `size`, of which the `window` has those that [`reach`](Self::reach) says; `residual`
    /// has those lines of the output.
    fn lines(
        &self,
        window: &Window,
        size: Size,
        reading: BandReading,
        residual: Option<&FeatureMap>,
        lines: Band,
    ) -> Result<FeatureMap> {
        match &self.weights {
            ConvWeights::Packed(packed) => {
                let conv = (packed, &self.shape);
                cpu::conv2d_lines(window, size, conv, reading, residual, lines)
            }
            ConvWeights::Shapes => self.lines_of_shapes(window, size, &reading, lines.len()),
            ConvWeights::Card(_) | ConvWeights::Stock { .. } => {
                self.lines_of_window(window, size, reading, residual, lines)
            }
        }
    }

    /// What the output of shapes would be kept as.
    fn output_dtype_of_shapes(&self, of: &FeatureMap) -> DType {
        let on_cpu = of.backend == (Backend::Shapes { card: false });
        if on_cpu && self.shape.last {
            DType::F32
        } else {
            of.tensor.dtype()
        }
    }

    fn lines_of_shapes(
        &self,
        window: &Window,
        size: Size,
        reading: &BandReading,
        lines: usize,
    ) -> Result<FeatureMap> {
        let upsampled = matches!(reading, BandReading::Upsampled);
        let of = self.output_size(size, upsampled);
        shapes::convolution(&self.shape, (of.b, lines, of.w), upsampled);
        let Some(piece) = window.pieces.first() else {
            bail!("a window of no lines");
        };
        if piece.backend == (Backend::Shapes { card: true }) {
            // The window in one piece, and normed or enlarged.
            let (_, c, rows, w) = piece.dims()?;
            let copies = match reading {
                BandReading::Plain => 1,
                BandReading::Known(_) => 2,
                BandReading::Upsampled => 5,
            };
            shapes::scratch((copies * of.b * rows * w * c * of.value) as u64);
        }
        let dtype = self.output_dtype_of_shapes(piece);
        let tensor = shapes::result((of.b, lines, of.w, of.c), dtype)?;
        Ok(piece.like(tensor))
    }

    /// The same as the whole output of the window's lines, of which those at its edges, which know nothing of their neighbours, are
    /// cut off.
    fn lines_of_window(
        &self,
        window: &Window,
        size: Size,
        reading: BandReading,
        residual: Option<&FeatureMap>,
        lines: Band,
    ) -> Result<FeatureMap> {
        let upsampled = matches!(reading, BandReading::Upsampled);
        let there = self.reach(&lines, size, upsampled);
        let (x, read) = match reading {
            BandReading::Plain => (window.exactly(there.clone())?, Reading::Plain),
            BandReading::Upsampled => (window.exactly(there.clone())?, Reading::Upsampled),
            BandReading::Known(known) => {
                let x = known.apply(window, size, there.clone())?;
                (x, Reading::Plain)
            }
        };
        let enlarged = if upsampled { 2 } else { 1 };
        // The line of the output that the window's first would be, were it the map's.
        let first = enlarged * there.start / self.shape.stride;
        let lines = lines.start - first..lines.end - first;
        let activation = self.shape.activation;
        match residual {
            None => self.run(&x, read, None)?.lines(lines),
            Some(residual) => {
                let y = self.sum(&x, read, None, Activation::None)?;
                y.lines(lines)?.add(residual)?.activated(activation)
            }
        }
    }

    fn run(
        &self,
        x: &FeatureMap,
        reading: Reading,
        residual: Option<&FeatureMap>,
    ) -> Result<FeatureMap> {
        self.sum(x, reading, residual, self.shape.activation)
    }

    /// The same through another activation than its own.
    fn sum(
        &self,
        x: &FeatureMap,
        reading: Reading,
        residual: Option<&FeatureMap>,
        activation: Activation,
    ) -> Result<FeatureMap> {
        let (_, channels, _, _) = x.dims()?;
        ensure!(
            channels == self.shape.inputs,
            "a convolution of {} channels was given {channels}",
            self.shape.inputs
        );
        match &self.weights {
            ConvWeights::Packed(packed) => {
                let shape = self.shape.then(activation);
                cpu::conv2d(x, packed, &shape, reading, residual)
            }
            ConvWeights::Card(convolution) => convolution.forward(x, reading, residual, activation),
            ConvWeights::Shapes => {
                let size = x.size()?;
                let upsampled = matches!(reading, Reading::Upsampled);
                let of = self.output_size(size, upsampled);
                shapes::convolution(&self.shape, (of.b, of.h, of.w), upsampled);
                if x.backend == (Backend::Shapes { card: true }) {
                    // A card reads what is normed, or enlarged, from a map of its own.
                    shapes::scratch(match reading {
                        Reading::Plain => 0,
                        Reading::Normed(_) => size.bytes(),
                        Reading::Upsampled => 4 * size.bytes(),
                    });
                }
                let dtype = self.output_dtype_of_shapes(x);
                Ok(x.like(shapes::result((of.b, of.h, of.w, of.c), dtype)?))
            }
            ConvWeights::Stock { weight, bias } => {
                let read = match reading {
                    Reading::Plain => x.clone(),
                    Reading::Normed(norm) => norm.forward(x)?,
                    Reading::Upsampled => stock::repeat_2x(x)?,
                };
                let y = stock::conv2d(&read.tensor, weight, bias.as_ref(), &self.shape)?;
                let y = x.like(y);
                let y = match residual {
                    Some(residual) => y.add(residual)?,
                    None => y,
                };
                y.activated(activation)
            }
        }
    }
}

/// Group normalisation, a scale and a shift per channel, an activation: what comes before nearly every
/// convolution of these networks. `act(norm(x) * scale + shift)`.
#[derive(Clone)]
pub struct NormAct {
    pub groups: usize,
    pub eps: f64,
    /// (1, c) or (b, c), float32.
    pub scale: Tensor,
    /// (1, c) or (b, c), float32.
    pub shift: Tensor,
    pub activation: Activation,
}

impl NormAct {
    /// The normalised map itself.
    pub fn forward(&self, x: &FeatureMap) -> Result<FeatureMap> {
        match x.backend {
            Backend::CpuKernels => cpu::norm_act(x, self),
            Backend::CardKernels => cuda::norm_act(x, self),
            Backend::Stock => Ok(x.like(stock::norm_act(&x.tensor, self)?)),
            Backend::Shapes { .. } => {
                Ok(x.like(shapes::result(x.tensor.dims(), x.tensor.dtype())?))
            }
        }
    }
}

/// Group normalisation with learned weights.
pub struct GroupNorm {
    groups: usize,
    eps: f64,
    weight: Tensor,
    bias: Tensor,
}

impl GroupNorm {
    /// Reads `weight` and `bias`, each (channels).
    pub fn new(groups: usize, channels: usize, eps: f64, w: &Weights) -> Result<Self> {
        ensure!(
            groups > 0 && channels.is_multiple_of(groups),
            "norm_num_groups {groups} does not divide {channels} channels"
        );
        let read = |name: &str| -> Result<Tensor> {
            Ok(w.tensor_in(&[channels], name, DType::F32)?
                .reshape((1, channels))?)
        };
        Ok(Self {
            groups,
            eps,
            weight: read("weight")?,
            bias: read("bias")?,
        })
    }

    /// The norm followed by `activation`.
    pub fn then(&self, activation: Activation) -> NormAct {
        NormAct {
            groups: self.groups,
            eps: self.eps,
            scale: self.weight.clone(),
            shift: self.bias.clone(),
            activation,
        }
    }
}

/// Layer normalisation over the last dimension, with learned weights.
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
    backend: Backend,
}

impl LayerNorm {
    /// Reads `weight` and `bias`, each (size).
    pub fn new(size: usize, eps: f64, w: &Weights) -> Result<Self> {
        let backend = w.placement().backend;
        let dtype = match backend {
            Backend::CpuKernels => DType::F32,
            _ => w.placement().dtype,
        };
        Ok(Self {
            weight: w.tensor_in(&[size], "weight", dtype)?,
            bias: w.tensor_in(&[size], "bias", dtype)?,
            eps,
            backend,
        })
    }

    /// (…, size) -> the same
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self.backend {
            Backend::CpuKernels => cpu::layer_norm(x, &self.weight, &self.bias, self.eps),
            Backend::CardKernels => cuda::layer_norm(x, &self.weight, &self.bias, self.eps),
            Backend::Stock => stock::layer_norm(x, &self.weight, &self.bias, self.eps),
            Backend::Shapes { .. } => Ok(x.clone()),
        }
    }
}

/// Which positions a position attends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// All.
    None,
    /// Itself and those before it.
    Causal,
}

/// Attention of `heads` heads: q (b, n, heads * d), k and v (b, m, heads * d) -> (b, n, heads * d).
///
/// The whole matrix of scores is never formed.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    mask: Mask,
    placement: &Placement,
) -> Result<Tensor> {
    match placement.backend {
        Backend::CpuKernels => cpu::attention(q, k, v, heads, mask),
        Backend::CardKernels => cuda::attention(q, k, v, heads, mask),
        Backend::Stock => stock::attention(q, k, v, heads, mask),
        Backend::Shapes { card } => {
            let (b, rows, width) = q.dims3()?;
            let keys = k.dim(1)?;
            shapes::attention((b, rows, width), keys, heads);
            if !card {
                // Keys and values once more, in float32, as the kernel reads them.
                shapes::scratch((2 * k.elem_count() * size_of::<f32>()) as u64);
            }
            shapes::result((b, rows, width), q.dtype())
        }
    }
}

/// Room for the tokens of a map, (b, n, c), that are computed in parts.
pub struct TokensInParts {
    all: Tensor,
    /// How many there are so far.
    count: usize,
    of_shapes: bool,
}

impl TokensInParts {
    /// For `n` tokens of `c` channels.
    pub fn new(b: usize, n: usize, c: usize, placement: &Placement) -> Result<Self> {
        let of_shapes = placement.is_of_shapes();
        let (shape, dtype) = ((b, n, c), placement.dtype);
        let all = if of_shapes {
            shapes::view(shape, dtype)?
        } else {
            Tensor::zeros(shape, dtype, &placement.device)?
        };
        Ok(Self {
            all,
            count: 0,
            of_shapes,
        })
    }

    /// The next of them, (b, any, c).
    pub fn push(&mut self, part: &Tensor) -> Result<()> {
        if !self.of_shapes {
            self.all.slice_set(part, 1, self.count)?;
        }
        self.count += part.dim(1)?;
        Ok(())
    }

    /// All.
    pub fn tensor(&self) -> &Tensor {
        &self.all
    }
}

/// Half the size, by the fixed kernel [1, 3, 3, 1] / 8 in each direction on a map extended by reflection
/// (diffusers' KDownsample2D). Height and width at least 2; an odd last row or column is left out.
pub fn downsample(x: &FeatureMap) -> Result<FeatureMap> {
    match x.backend {
        Backend::CpuKernels => cpu::downsample(x),
        Backend::CardKernels => cuda::downsample(x),
        Backend::Stock => Ok(x.like(stock::downsample(&x.tensor)?)),
        Backend::Shapes { .. } => {
            let (b, h, w, c) = x.tensor.dims4()?;
            Ok(x.like(shapes::result((b, h / 2, w / 2, c), x.tensor.dtype())?))
        }
    }
}

/// Twice the size, by the transposed convolution with the kernel [1, 3, 3, 1] / 4 in each direction on a map
/// extended by reflection (diffusers' KUpsample2D). Height and width at least 2.
pub fn upsample(x: &FeatureMap) -> Result<FeatureMap> {
    match x.backend {
        Backend::CpuKernels => cpu::upsample(x),
        Backend::CardKernels => cuda::upsample(x),
        Backend::Stock => Ok(x.like(stock::upsample(&x.tensor)?)),
        Backend::Shapes { .. } => {
            let (b, h, w, c) = x.tensor.dims4()?;
            Ok(x.like(shapes::result((b, 2 * h, 2 * w, c), x.tensor.dtype())?))
        }
    }
}

/// Part `index` of what a joined [`Linear`] gave, (b, n, parts * width) -> (b, n, width), as [`attention`] takes it.
pub fn part(joined: &Tensor, width: usize, index: usize, placement: &Placement) -> Result<Tensor> {
    let part = joined.narrow(2, index * width, width)?;
    Ok(match placement.backend {
        // Its kernels read rows that lie apart.
        Backend::CardKernels => part,
        Backend::CpuKernels | Backend::Stock => part.contiguous()?,
        Backend::Shapes { .. } => shapes::result(part.dims(), part.dtype())?,
    })
}

/// `value * activation(gate)` of tokens (b, n, 2 * width), whose channels are the values, then their gates: (b, n, width).
pub fn gate(x: &Tensor, activation: Activation, placement: &Placement) -> Result<Tensor> {
    let width = x.dim(2)? / 2;
    match placement.backend {
        Backend::CpuKernels => cpu::gate(x, activation),
        Backend::CardKernels => cuda::gate(x, activation),
        Backend::Stock => {
            let half = |index: usize| x.narrow(2, index * width, width)?.contiguous();
            Ok((half(0)? * activation.apply(&half(1)?, placement)?)?)
        }
        Backend::Shapes { .. } => {
            let (b, n, _) = x.dims3()?;
            shapes::result((b, n, width), x.dtype())
        }
    }
}

/// A map's tokens passed through `f`, (b, h * w, c) -> (b, h * w, c'), as a map again.
pub fn map_tokens(x: &FeatureMap, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<FeatureMap> {
    let tokens = f(&x.tokens()?)?;
    x.with_tokens(&tokens)
}

/// What the kernels have to tell that only a curious user wants to know: shapes that a library did not take.
pub fn notes(placement: &Placement) -> Vec<String> {
    match placement.backend {
        Backend::CardKernels => cuda::notes(placement),
        Backend::CpuKernels | Backend::Stock | Backend::Shapes { .. } => Vec::new(),
    }
}
