//! Whether a device computes what the CPU does: every layer at the published model's shapes, and the built-in model from
//! picture to picture.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, TensorView};

use crate::device::{self, Placement};
use crate::layers::{
    self, Activation, Conv2d, ConvShape, FeatureMap, GroupNorm, LayerNorm, Linear, Mask, Padding,
};
use crate::model::{ModelFiles, Weights};
use crate::pipeline::noise::Generator;
use crate::pipeline::{Event, LowRes, Options, Settings, Upscaler};
use crate::pixels::Pixels;

/// What was found of one layer, or of the whole, in one precision.
#[derive(Clone, Debug)]
pub struct Finding {
    /// What was computed, and in which shape.
    pub what: String,
    /// Of weights and activations.
    pub dtype: DType,
    /// |a - b| / |b| in the Euclidean norm, b being the CPU's result in float32 from the same rounded inputs; infinite
    /// where a number is missing. Or why there is none.
    pub error: Result<f64, String>,
    /// Whether the reason is memory that the device does not have.
    pub lacked_memory: bool,
    /// What the error may be.
    pub allowed: f64,
    /// Of one pass, the best of several; 0 where it was not timed.
    pub seconds: f64,
    /// Multiplications and additions of one pass; 0 where memory decides.
    pub operations: f64,
    /// Bytes read and written by one pass, each once.
    pub bytes: f64,
}

impl Finding {
    /// What came of a run: its error and its seconds, or why there are none.
    fn of(what: String, dtype: DType, run: Result<(f64, f64)>, allowed: f64) -> Self {
        let lacked_memory = run.as_ref().is_err_and(device::is_out_of_memory);
        let (error, seconds) = match run {
            Ok((error, seconds)) => (Ok(error), seconds),
            Err(error) => (Err(in_one_line(&error)), 0.0),
        };
        Self {
            what,
            dtype,
            error,
            lacked_memory,
            allowed,
            seconds,
            operations: 0.0,
            bytes: 0.0,
        }
    }

    /// Whether the device may be used for it.
    pub fn passed(&self) -> bool {
        self.error
            .as_ref()
            .is_ok_and(|error| *error <= self.allowed)
    }
}

/// Time that repetitions of one layer take at most, beside the first.
const REPEATING: Duration = Duration::from_millis(100);
const MOST_REPETITIONS: usize = 20;

/// Of one layer: rounding of the result and of what lies between, with sums in float32. Another order of sums is 1e-6 in
/// float32; products in TF32, which float32 must not mean, are 3e-4.
fn allowed_of_a_layer(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2e-3,
        DType::BF16 => 1.6e-2,
        _ => 2e-5,
    }
}

/// Of the built-in model's latents: what four steps make of the layers' errors, which is about ten times as much in
/// float32. In the others it is what pictures may lose without showing it.
fn allowed_of_the_whole(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 5e-3,
        DType::BF16 => 4e-2,
        _ => 1e-4,
    }
}

/// Checks every layer and the built-in model from end to end in every precision that the device has, and tells of each as
/// it comes.
///
/// # Errors
/// The CPU's own results cannot be had, or an error from `tell`. What fails on the device is a finding.
pub fn whole_device(device: &Device, tell: &mut dyn FnMut(&Finding) -> Result<()>) -> Result<()> {
    for &dtype in precisions(device)? {
        for layer in published() {
            tell(&checked(&layer, &Placement::new(device, dtype), timed)?)?;
        }
    }
    for &dtype in precisions(device)? {
        tell(&whole(device, dtype)?)?;
    }
    Ok(())
}

/// The same in small, in a moment: each kind of layer at odd sizes, on our kernels or on candle's stock operations.
///
/// # Errors
/// The CPU's own results cannot be had.
pub fn short(device: &Device, stock: bool) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for &dtype in precisions(device)? {
        let placement = Placement::new(device, dtype);
        let placement = if stock {
            placement.with_stock_operations()
        } else {
            placement
        };
        for layer in small() {
            findings.push(checked(&layer, &placement, |_, _| Ok(0.0))?);
        }
    }
    Ok(findings)
}

/// The CPU computes in float32 whatever the weights are kept in.
fn precisions(device: &Device) -> Result<&'static [DType]> {
    Ok(match device {
        Device::Cpu => &[DType::F32],
        card if device::has_bfloat16(card)? => &[DType::F32, DType::F16, DType::BF16],
        _ => &[DType::F32, DType::F16],
    })
}

/// One layer in one shape, with what it costs.
struct Layer {
    what: String,
    kind: Kind,
    /// Of the input; (b, c, h, w) or (b, n, c).
    input: Vec<usize>,
    operations: f64,
    /// Values read and written.
    values: usize,
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
fn published() -> Vec<Layer> {
    use Activation::{Gelu, QuickGelu, Silu};
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
        activation("GELU", Gelu, 384),
        activation("SiLU", Silu, 384),
        activation("quick GELU", QuickGelu, 384),
        resampling("half the size", Kind::Downsample, 0.25, (384, 64)),
        resampling("twice the size", Kind::Upsample, 4.0, (384, 64)),
    ]
}

/// Every kind of layer, small and at odd sizes.
fn small() -> Vec<Layer> {
    let normed = Reading::Normed { groups: 4 };
    vec![
        conv(ConvShape::same(8, 32, 1), Reading::Plain, 9),
        conv(ConvShape::same(32, 40, 3), normed, 9),
        conv(ConvShape::same(32, 3, 3), Reading::Upsampled, 5),
        linear(7, 64, 96),
        norm(64, 4, 9),
        layer_norm(7, 64),
        attention(1, 2, 33, 77, 64, Mask::None),
        attention(1, 2, 33, 33, 64, Mask::Causal),
        attention(1, 1, 33, 33, 512, Mask::None),
        activation("GELU", Activation::Gelu, 33),
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
    Layer {
        what: format!(
            "{before}convolution {k}x{k}{stride}, {} -> {}, {out}x{out}",
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

fn linear(rows: usize, inputs: usize, outputs: usize) -> Layer {
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
type Ready = Box<dyn Fn() -> Result<Output>>;

enum Output {
    Map(FeatureMap),
    Tensor(Tensor),
}

impl Output {
    /// In float32 on the CPU, in an order that is the same for every backend.
    fn values(&self) -> Result<Tensor> {
        let tensor = match self {
            Self::Map(map) => map.to_nchw()?,
            Self::Tensor(tensor) => tensor.clone(),
        };
        Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?)
    }
}

/// Runs a layer where `tried` says and on the CPU; `time` gives its seconds.
fn checked(
    layer: &Layer,
    tried: &Placement,
    time: impl Fn(&Ready, &Device) -> Result<f64>,
) -> Result<Finding> {
    let made = Made::new(layer, tried.dtype)?;
    let expected = made.ready(layer, &reference(tried))?()?.values()?;
    let run = || {
        let ready = made.ready(layer, tried)?;
        let error = relative_error(&ready()?.values()?, &expected)?;
        Ok((error, time(&ready, &tried.device)?))
    };
    Ok(Finding {
        operations: layer.operations,
        bytes: (layer.values * tried.dtype.size_in_bytes()) as f64,
        ..Finding::of(
            layer.what.clone(),
            tried.dtype,
            run(),
            allowed_of_a_layer(tried.dtype),
        )
    })
}

/// The CPU's kernels are what a card is held to; they themselves are held to candle's operations.
fn reference(tried: &Placement) -> Placement {
    let kernels = Placement::new(&Device::Cpu, DType::F32);
    match tried.device {
        Device::Cpu => kernels.with_stock_operations(),
        _ => kernels,
    }
}

/// A layer's inputs and weights, rounded to the precision that is tried, in float32.
struct Made {
    inputs: Vec<Tensor>,
    weights: Vec<u8>,
}

impl Made {
    fn new(layer: &Layer, dtype: DType) -> Result<Self> {
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
    fn ready(&self, layer: &Layer, placement: &Placement) -> Result<Ready> {
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
            Self::Attention { .. } | Self::Activation(_) | Self::Downsample | Self::Upsample => {
                Vec::new()
            }
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

/// Seconds of one pass, the best of several.
fn timed(ready: &Ready, device: &Device) -> Result<f64> {
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    for _ in 0..MOST_REPETITIONS {
        let start = Instant::now();
        ready()?;
        device.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64());
        if begin.elapsed() > REPEATING {
            break;
        }
    }
    Ok(best)
}

/// |a - b| / |b|; infinite where a number is none.
fn relative_error(actual: &Tensor, expected: &Tensor) -> Result<f64> {
    let list = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    let (actual, expected) = (list(actual)?, list(expected)?);
    anyhow::ensure!(
        actual.len() == expected.len(),
        "{} values came out, expected {}",
        actual.len(),
        expected.len()
    );
    let (mut difference, mut norm) = (0f64, 0f64);
    for (a, b) in actual.into_iter().zip(expected) {
        difference += f64::from(a - b).powi(2);
        norm += f64::from(b).powi(2);
    }
    let error = (difference / norm).sqrt();
    Ok(if error.is_nan() { f64::INFINITY } else { error })
}

/// The built-in model from a picture to latents, in one precision, beside the CPU.
fn whole(device: &Device, dtype: DType) -> Result<Finding> {
    let tried = Placement::new(device, dtype);
    let expected = upscaled(&reference(&tried))?.0;
    let run = || {
        let (latents, seconds) = upscaled(&tried)?;
        Ok((relative_error(&latents, &expected)?, seconds))
    };
    Ok(Finding::of(
        "tiny, 64x64 -> 128x128, 4 steps and decode".into(),
        dtype,
        run(),
        allowed_of_the_whole(dtype),
    ))
}

/// Latents and seconds. A run that had to be done again in another way has failed.
fn upscaled(placement: &Placement) -> Result<(Tensor, f64)> {
    let mut upscaler = Upscaler::new(Options {
        device: placement.device.clone(),
        dtype: placement.dtype,
        ..Options::new(ModelFiles::built_in())
    })?;
    let usual = Placement::new(&placement.device, placement.dtype);
    if usual.backend != placement.backend {
        upscaler.use_stock_operations();
    }
    let mut on_event = |event| match event {
        Event::Warning(text) => anyhow::bail!("{text}"),
        _ => Ok(()),
    };
    let settings = Settings {
        steps: 4,
        ..Settings::default()
    };
    let start = Instant::now();
    let latents = upscaler.upscale(&[LowRes::image(&picture()?)?], &settings, &mut on_event)?;
    let latents = latents.first().context("no latents came out")?;
    upscaler.decode(latents, &mut on_event)?;
    let seconds = start.elapsed().as_secs_f64();
    Ok((latents.latents()?, seconds))
}

/// Shades and an edge.
fn picture() -> Result<Pixels> {
    const SIDE: usize = 64;
    let values = (0..SIDE * SIDE)
        .flat_map(|i| {
            let (x, y) = (
                (i % SIDE) as f32 / SIDE as f32,
                (i / SIDE) as f32 / SIDE as f32,
            );
            let edge = if x + y > 1.0 { 0.8 } else { 0.2 };
            [x, y, edge]
        })
        .collect();
    Pixels::new(SIDE, SIDE, values)
}

fn in_one_line(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten bits of mantissa, as the tensor cores multiply where float32 is not held to mean float32.
    fn tf32(tensor: &Tensor) -> Tensor {
        let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        let rounded = values
            .into_iter()
            .map(|v| f32::from_bits((v.to_bits() + 0x1000) & !0x1fff))
            .collect();
        Tensor::from_vec(rounded, tensor.shape(), &Device::Cpu).unwrap()
    }

    #[test]
    fn the_bounds_see_products_in_tf32_and_missing_numbers() {
        let layer = linear(8, 256, 64);
        let kernels = Placement::new(&Device::Cpu, DType::F32);
        let mut made = Made::new(&layer, DType::F32).unwrap();
        let run = |made: &Made, placement: &Placement| {
            let ready = made.ready(&layer, placement).unwrap();
            ready().unwrap().values().unwrap()
        };
        let expected = run(&made, &reference(&kernels));
        let passes = |values: &Tensor| {
            let run = relative_error(values, &expected).map(|error| (error, 0.0));
            let allowed = allowed_of_a_layer(DType::F32);
            Finding::of(layer.what.clone(), DType::F32, run, allowed).passed()
        };
        assert!(passes(&run(&made, &kernels)));
        made.inputs = made.inputs.iter().map(tf32).collect();
        assert!(!passes(&run(&made, &kernels)));
        assert!(!passes(&(expected.zeros_like().unwrap() / 0.0).unwrap()));
        let finding = Finding::of(String::new(), DType::F32, Err(anyhow::anyhow!("lost")), 1.0);
        assert!(!finding.passed());
    }

    #[test]
    fn the_short_check_passes_on_the_cpu() {
        for finding in short(&Device::Cpu, false).unwrap() {
            assert!(finding.passed(), "{finding:?}");
        }
    }
}
