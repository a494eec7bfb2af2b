//! candle-transformers' models on random weights, and a model folder that holds the same for this program. Also what
//! `benches/candle.rs` compares speed on.
//!
//! Each tensor is drawn as candle-transformers asks for it by name and shape, so that no list of ours decides what
//! diffusers' names are. Every layer matters under these weights, as under those of tests/data/random_model.py: residual
//! streams are small enough for the epsilon of each normalisation to show, norms are away from 1 and 0, no bias is 0.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use candle_transformers::models::stable_diffusion::vae::AutoEncoderKLConfig;
use serde_json::{Value, json};

pub type Tensors = HashMap<String, Tensor>;

/// Spread of what a branch adds to a residual stream: a variance of 2.5e-5, beside eps of 1e-5 (text) and 1e-6 (VAE).
const STREAM: f32 = 0.005;

/// The spread of a layer's output for inputs of spread 1.
type Gain = fn(layer: &str) -> f32;

pub fn vae_gain(layer: &str) -> f32 {
    if layer.contains("to_q") || layer.contains("to_k") {
        1.5 // attention that is neither uniform nor one-hot
    } else if layer.contains("to_out") {
        2.0 * STREAM // an average over positions
    } else if layer.contains("conv1") || layer.contains("conv2") || layer.contains("conv_in") {
        STREAM
    } else {
        1.0
    }
}

pub fn text_gain(layer: &str) -> f32 {
    if layer.contains("embedding") {
        4.0 * STREAM
    } else if layer.contains("fc1") {
        2.0 // where the kinds of GELU differ most
    } else if layer.contains("fc2") || layer.contains("out_proj") {
        STREAM
    } else {
        1.0
    }
}

/// Uniform numbers of mean 0 and spread 1; the same for the same name, whatever else is drawn.
pub fn noise(name: &str, shape: impl Into<Shape>) -> Tensor {
    // FNV-1a for the seed, SplitMix64 for the rest.
    let mut state = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let unit = ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32;
        (2.0 * unit - 1.0) * 3f32.sqrt()
    };
    let shape = shape.into();
    let values: Vec<f32> = (0..shape.elem_count()).map(|_| next()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// A checkpoint that has any tensor it is asked for.
struct Drawn {
    gain: Gain,
    tensors: Arc<Mutex<Tensors>>,
}

impl Drawn {
    fn tensor(&self, shape: Shape, name: &str) -> Result<Tensor> {
        let (layer, kind) = name.rsplit_once('.').unwrap_or((name, ""));
        let gain = f64::from((self.gain)(layer));
        let fan_in = shape.dims().iter().skip(1).product::<usize>() as f64;
        let noise = noise(name, shape);
        match kind {
            "weight" if layer.contains("norm") => (noise * 0.2)? + 1.0,
            "weight" if layer.contains("embedding") => noise * gain,
            "weight" => noise * (gain / fan_in.sqrt()),
            _ => noise * (0.2 * gain),
        }
    }
}

impl SimpleBackend for Drawn {
    fn get(&self, shape: Shape, name: &str, _: Init, _: DType, _: &Device) -> Result<Tensor> {
        let mut tensors = self.tensors.lock().unwrap();
        if let Some(tensor) = tensors.get(name) {
            return Ok(tensor.clone());
        }
        let tensor = self.tensor(shape, name)?;
        tensors.insert(name.to_string(), tensor.clone());
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        bail!("{name}: asked for without a shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

/// What `build` makes of random weights, and these.
pub fn draw<M>(gain: Gain, build: impl FnOnce(VarBuilder<'static>) -> Result<M>) -> (M, Tensors) {
    let tensors = Arc::default();
    let drawn = Drawn {
        gain,
        tensors: Arc::clone(&tensors),
    };
    let weights = VarBuilder::from_backend(Box::new(drawn), DType::F32, Device::Cpu);
    let model = build(weights).unwrap();
    let tensors = std::mem::take(&mut *tensors.lock().unwrap());
    (model, tensors)
}

/// Stable Diffusion's autoencoder has levels of 128, 256, 512 and 512 channels.
pub fn vae_config(widths: &[usize], groups: usize) -> AutoEncoderKLConfig {
    AutoEncoderKLConfig {
        block_out_channels: widths.to_vec(),
        layers_per_block: 2,
        norm_num_groups: groups,
        ..Default::default()
    }
}

/// The same as `vae/config.json`.
pub fn vae_json(config: &AutoEncoderKLConfig) -> Value {
    json!({
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_num_groups,
    })
}

/// candle-transformers' `Config::v1_5()`, whose fields it keeps to itself, as `text_encoder/config.json`.
pub fn clip_v1_5_json() -> Value {
    json!({
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": 49407,
    })
}

/// Writes `part/config.json` and `part/stem.safetensors`.
pub fn save(model: &Path, part: &str, stem: &str, config: &Value, tensors: &Tensors) {
    let folder = model.join(part);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let weights = folder.join(stem).with_extension("safetensors");
    candle_core::safetensors::save(tensors, weights).unwrap();
}

/// The largest difference over the root mean square of `expected`; infinite where one is not a number.
pub fn peak_error(actual: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(actual.dims(), expected.dims(), "shapes differ");
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (actual, expected) = (values(actual), values(expected));
    let squares: f64 = expected.iter().map(|e| f64::from(*e).powi(2)).sum();
    let rms = (squares / expected.len() as f64).sqrt();
    let difference = |(a, e): (&f32, &f32)| f64::from(a - e).abs();
    let differences: Vec<f64> = actual.iter().zip(&expected).map(difference).collect();
    if rms.is_nan() || differences.iter().any(|d| d.is_nan()) {
        return f64::INFINITY;
    }
    differences.into_iter().fold(0.0, f64::max) / rms
}
