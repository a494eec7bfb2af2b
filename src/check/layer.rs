//! The layers that are checked: what they are, what they cost, and how they are made ready anywhere.

use std::collections::HashMap;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, TensorView};

use crate::device::Placement;
use crate::layers::{
    self, Activation, Conv2d, ConvShape, FeatureMap, GroupNorm, LayerNorm, Linear, Mask, Padding,
};
use crate::model::Weights;
use crate::pipeline::noise::Generator;

/// One layer in one shape, with what it costs.
pub struct Layer {
    pub what: String,
    kind: Kind,
    /// Of the input; (b, c, h, w) or (b, n, c).
    input: Vec<usize>,
    pub operations: f64,
    /// Values read and written.
    pub values: usize,
}

#[derive(Clone, Copy)]
enum Kind {
    Conv {
        shape: ConvShape,
        reading: Reading,
    },
    Linear {
        inputs: usize,
        outputs: usize,
    },
    Norm {
        channels: usize,
        groups: usize,
    },
    LayerNorm {
        size: usize,
    },
    Attention {
        heads: usize,
        keys: usize,
        mask: Mask,
    },
    Activation(Activation),
    /// Values and their gates.
    Gate(Activation),
    Downsample,
    Upsample,
}

/// What stands before a convolution.
#[derive(Clone, Copy)]
enum Reading {
    Plain,
    Normed { groups: usize },
    Upsampled,
}

/// The layers of the published model as a picture of 512 pixels meets them (UNet: 128x128 latents, so its levels are 128,
/// 64, 32 and 16; VAE: its last levels are smaller here than in life, for time on the CPU).
pub fn published() -> Vec<Layer> {
    use Activation::{Gelu, QuickGelu, Relu, Silu};
    let plain = Reading::Plain;
    let normed = Reading::Normed { groups: 32 };
    let down = ConvShape {
        stride: 2,
        padding: Padding {
            before: 0,
            after: 1,
        },
        ..ConvShape::same(128, 128, 3)
    };
    vec![
        conv(ConvShape::same(8, 384, 1), plain, 128),
        conv(ConvShape::same(384, 384, 3), plain, 64),
        conv(
            ConvShape::same(384, 384, 3),
            Reading::Normed { groups: 24 },
            64,
        ),
        conv(ConvShape::same(768, 768, 3), plain, 16),
        conv(ConvShape::same(1536, 768, 1), plain, 16),
        conv(ConvShape::same(384, 5, 1), plain, 128),
        conv(ConvShape::same(3, 128, 3), plain, 128),
        conv(ConvShape::same(128, 128, 3), normed, 128),
        conv(down, plain, 128),
        conv(ConvShape::same(64, 64, 3).then(Relu), plain, 128),
        conv(ConvShape::same(512, 512, 3), Reading::Upsampled, 32),
        conv(ConvShape::same(128, 3, 3), normed, 128),
        linear(256, 768, 768),
        linear(1, 1792, 3072),
        linear(77, 768, 3072),
        norm(384, 24, 128),
        norm(768, 48, 16),
        norm(256, 32, 128),
        layer_norm(77, 768),
        attention(1, 12, 256, 256, 64, Mask::None),
        attention(2, 6, 4096, 77, 64, Mask::None),
        attention(1, 12, 77, 77, 64, Mask::Causal),
        attention(1, 1, 4096, 4096, 512, Mask::None),
        attention(1, 8, 1024, 1024, 40, Mask::None),
        attention(2, 8, 1024, 77, 80, Mask::None),
        attention(2, 8, 256, 256, 160, Mask::None),
        activation("GELU", Gelu, 384),
        activation("SiLU", Silu, 384),
        activation("quick GELU", QuickGelu, 384),
        gate("GELU", Gelu, (1024, 1280)),
        resampling("half the size", Kind::Downsample, 0.25, (384, 64)),
        resampling("twice the size", Kind::Upsample, 4.0, (384, 64)),
    ]
}

/// Every kind of layer, small and at odd sizes.
pub fn small() -> Vec<Layer> {
    let normed = Reading::Normed { groups: 4 };
    vec![
        conv(ConvShape::same(8, 32, 1), Reading::Plain, 9),
        conv(ConvShape::same(32, 40, 3), normed, 9),
        conv(ConvShape::same(32, 3, 3), Reading::Upsampled, 5),
        conv(
            ConvShape::same(24, 24, 3).then(Activation::Relu),
            Reading::Plain,
            9,
        ),
        linear(7, 64, 96),
        norm(64, 4, 9),
        layer_norm(7, 64),
        attention(1, 2, 33, 77, 64, Mask::None),
        attention(1, 2, 33, 33, 64, Mask::Causal),
        attention(1, 1, 33, 33, 512, Mask::None),
        attention(1, 2, 33, 77, 40, Mask::None),
        activation("GELU", Activation::Gelu, 33),
        gate("GELU", Activation::Gelu, (7, 33)),
        resampling("half the size", Kind::Downsample, 0.25, (32, 10)),
        resampling("twice the size", Kind::Upsample, 4.0, (32, 5)),
    ]
}

fn conv(shape: ConvShape, reading: Reading, side: usize) -> Layer {
    let scale = if matches!(reading, Reading::Upsampled) {
        2
    } else {
        1
    };
    let out = scale * side / shape.stride;
    let taps = shape.kernel * shape.kernel * shape.inputs * shape.outputs;
    let before = match reading {
        Reading::Plain => "",
        Reading::Normed { .. } => "norm, SiLU, ",
        Reading::Upsampled => "enlarged, ",
    };
    let after = match shape.activation {
        Activation::None => String::new(),
        activation => format!(", {activation:?}"),
    };
    Layer {
        what: format!(
            "{before}convolution {k}x{k}{stride}, {} -> {}, {out}x{out}{after}",
            shape.inputs,
            shape.outputs,
            k = shape.kernel,
            stride = if shape.stride > 1 { " stride 2" } else { "" },
        ),
        kind: Kind::Conv { shape, reading },
        input: vec![1, shape.inputs, side, side],
        operations: 2.0 * (taps * out * out) as f64,
        values: taps + shape.inputs * side * side + shape.outputs * out * out,
    }
}

pub fn linear(rows: usize, inputs: usize, outputs: usize) -> Layer {
    Layer {
        what: format!("linear, {inputs} -> {outputs}, {rows} rows"),
        kind: Kind::Linear { inputs, outputs },
        input: vec![1, rows, inputs],
        operations: 2.0 * (rows * inputs * outputs) as f64,
        values: rows * (inputs + outputs) + inputs * outputs,
    }
}

fn norm(channels: usize, groups: usize, side: usize) -> Layer {
    Layer {
        what: format!("group norm and GELU, {channels} in {groups} groups, {side}x{side}"),
        kind: Kind::Norm { channels, groups },
        input: vec![1, channels, side, side],
        operations: 0.0,
        values: 2 * channels * side * side,
    }
}

fn layer_norm(rows: usize, size: usize) -> Layer {
    Layer {
        what: format!("layer norm, {size}, {rows} rows"),
        kind: Kind::LayerNorm { size },
        input: vec![1, rows, size],
        operations: 0.0,
        values: 2 * rows * size,
    }
}

fn attention(b: usize, heads: usize, n: usize, keys: usize, size: usize, mask: Mask) -> Layer {
    let causal = if mask == Mask::Causal { ", causal" } else { "" };
    Layer {
        what: format!("attention, {heads} x {size}, {n} to {keys}{causal}"),
        kind: Kind::Attention { heads, keys, mask },
        input: vec![b, n, heads * size],
        operations: 4.0 * (b * heads * n * keys * size) as f64,
        values: 2 * b * (n + keys) * heads * size,
    }
}

fn activation(name: &str, activation: Activation, channels: usize) -> Layer {
    let rows = 4096;
    Layer {
        what: format!("{name}, {channels}, {rows} rows"),
        kind: Kind::Activation(activation),
        input: vec![1, rows, channels],
        operations: 0.0,
        values: 2 * rows * channels,
    }
}

fn gate(name: &str, activation: Activation, (rows, width): (usize, usize)) -> Layer {
    Layer {
        what: format!("gates through {name}, {width}, {rows} rows"),
        kind: Kind::Gate(activation),
        input: vec![1, rows, 2 * width],
        operations: 0.0,
        values: 3 * rows * width,
    }
}

fn resampling(name: &str, kind: Kind, area: f64, (channels, side): (usize, usize)) -> Layer {
    let values = (channels * side * side) as f64;
    Layer {
        what: format!("{name}, {channels}, {side}x{side}"),
        kind,
        input: vec![1, channels, side, side],
        operations: 0.0,
        values: (values * (1.0 + area)) as usize,
    }
}

/// A layer that is ready to run, any number of times.
pub type Ready = Box<dyn Fn() -> Result<Output>>;

/// What a layer gives.
pub enum Output {
    Map(FeatureMap),
    Tensor(Tensor),
}

impl Output {
    /// In float32 on the CPU, in an order that is the same for every backend.
    pub fn values(&self) -> Result<Tensor> {
        let tensor = match self {
            Self::Map(map) => map.to_nchw()?,
            Self::Tensor(tensor) => tensor.clone(),
        };
        Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?)
    }
}

/// A layer's inputs and weights, rounded to the precision that is tried, in float32.
pub struct Made {
    pub inputs: Vec<Tensor>,
    weights: Vec<u8>,
}

impl Made {
    pub fn new(layer: &Layer, dtype: DType) -> Result<Self> {
        let mut random = Generator::new(1);
        let mut values = |shape: &[usize], spread: f64| -> Result<Tensor> {
            let drawn = random.randn(shape.iter().product());
            let tensor = (Tensor::from_vec(drawn, shape, &Device::Cpu)? * spread)?;
            Ok(tensor.to_dtype(dtype)?.to_dtype(DType::F32)?)
        };
        let mut inputs = vec![values(&layer.input, 1.0)?];
        if let Kind::Attention { keys, .. } = layer.kind {
            let shape = [layer.input[0], keys, layer.input[2]];
            inputs.push(values(&shape, 1.0)?);
            inputs.push(values(&shape, 1.0)?);
        }
        let mut tensors = HashMap::new();
        for (name, shape, spread) in layer.kind.weights() {
            tensors.insert(name, values(&shape, spread)?);
        }
        Ok(Self {
            inputs,
            weights: serialized(&tensors)?,
        })
    }

    /// The layer where `placement` says, with its inputs there.
    pub fn ready(&self, layer: &Layer, placement: &Placement) -> Result<Ready> {
        let weights = Weights::made(self.weights.clone(), placement)?;
        let input = &self.inputs[0];
        let map = || FeatureMap::from_nchw(input, placement);
        let sent = |tensor: &Tensor| -> Result<Tensor> {
            Ok(tensor
                .to_dtype(placement.dtype)?
                .to_device(&placement.device)?)
        };
        Ok(match layer.kind {
            Kind::Conv { shape, reading } => {
                let (conv, x) = (Conv2d::new(shape, &weights.pp("conv"))?, map()?);
                let norm = match reading {
                    Reading::Normed { groups } => {
                        let norm = GroupNorm::new(groups, shape.inputs, 1e-6, &weights.pp("norm"));
                        Some(norm?.then(Activation::Silu))
                    }
                    _ => None,
                };
                let upsampled = matches!(reading, Reading::Upsampled);
                Box::new(move || {
                    Ok(Output::Map(match &norm {
                        Some(norm) => conv.forward_normed(&x, norm, None)?,
                        None if upsampled => conv.forward_upsampled(&x)?,
                        None => conv.forward(&x)?,
                    }))
                })
            }
            Kind::Linear { inputs, outputs } => {
                let linear = Linear::new(inputs, outputs, &weights.pp("linear"))?;
                let x = sent(input)?;
                Box::new(move || Ok(Output::Tensor(linear.forward(&x)?)))
            }
            Kind::Norm { channels, groups } => {
                let norm = GroupNorm::new(groups, channels, 1e-5, &weights.pp("norm"))?;
                let (norm, x) = (norm.then(Activation::Gelu), map()?);
                Box::new(move || Ok(Output::Map(norm.forward(&x)?)))
            }
            Kind::LayerNorm { size } => {
                let norm = LayerNorm::new(size, 1e-5, &weights.pp("norm"))?;
                let x = sent(input)?;
                Box::new(move || Ok(Output::Tensor(norm.forward(&x)?)))
            }
            Kind::Attention { heads, mask, .. } => {
                let placement = placement.clone();
                let (q, k, v) = (sent(input)?, sent(&self.inputs[1])?, sent(&self.inputs[2])?);
                Box::new(move || {
                    let y = layers::attention(&q, &k, &v, heads, mask, &placement)?;
                    Ok(Output::Tensor(y))
                })
            }
            Kind::Activation(activation) => {
                let (x, placement) = (sent(input)?, placement.clone());
                Box::new(move || Ok(Output::Tensor(activation.apply(&x, &placement)?)))
            }
            Kind::Gate(activation) => {
                let (x, placement) = (sent(input)?, placement.clone());
                Box::new(move || {
                    let y = layers::gate(&x, activation, &placement)?;
                    Ok(Output::Tensor(y))
                })
            }
            Kind::Downsample => {
                let x = map()?;
                Box::new(move || Ok(Output::Map(layers::downsample(&x)?)))
            }
            Kind::Upsample => {
                let x = map()?;
                Box::new(move || Ok(Output::Map(layers::upsample(&x)?)))
            }
        })
    }
}

impl Kind {
    /// Names, shapes, and spreads that keep a result near 1.
    fn weights(self) -> Vec<(&'static str, Vec<usize>, f64)> {
        let norm = |size: usize| {
            [
                ("norm.weight", vec![size], 1.0),
                ("norm.bias", vec![size], 0.5),
            ]
        };
        match self {
            Self::Conv { shape, reading } => {
                let ConvShape {
                    inputs,
                    outputs,
                    kernel,
                    ..
                } = shape;
                let spread = 1.0 / ((inputs * kernel * kernel) as f64).sqrt();
                let mut weights = vec![
                    ("conv.weight", vec![outputs, inputs, kernel, kernel], spread),
                    ("conv.bias", vec![outputs], 0.5),
                ];
                if let Reading::Normed { .. } = reading {
                    weights.extend(norm(inputs));
                }
                weights
            }
            Self::Linear { inputs, outputs } => {
                let spread = 1.0 / (inputs as f64).sqrt();
                vec![
                    ("linear.weight", vec![outputs, inputs], spread),
                    ("linear.bias", vec![outputs], 0.5),
                ]
            }
            Self::Norm { channels, .. } => norm(channels).to_vec(),
            Self::LayerNorm { size } => norm(size).to_vec(),
            Self::Attention { .. }
            | Self::Activation(_)
            | Self::Gate(_)
            | Self::Downsample
            | Self::Upsample => Vec::new(),
        }
    }
}

/// A safetensors file of float32 tensors.
fn serialized(tensors: &HashMap<&'static str, Tensor>) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
        let values: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        bytes.push((*name, tensor.dims().to_vec(), values));
    }
    let views = bytes
        .iter()
        .map(|(name, shape, values)| {
            Ok((*name, TensorView::new(Dtype::F32, shape.clone(), values)?))
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(safetensors::serialize(views, None)?)
}
