//! The autoencoder, small enough to try a fault in every tensor.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::stable_diffusion::vae::{AutoEncoderKL, AutoEncoderKLConfig};
use sd_upscale::ModelFiles;
use sd_upscale::model::PartFiles;
use sd_upscale::networks::vae::{Decoder, Encoder};
use tempfile::TempDir;

use super::peer::{self, Tensors, peak_error};
use super::{BOUND, assert_every_weight_is_seen, assert_near};
use crate::common::placements;

fn config() -> AutoEncoderKLConfig {
    peer::vae_config(&[16, 32, 48], 8)
}

/// candle-transformers' autoencoder on `tensors`.
fn theirs(tensors: Tensors) -> AutoEncoderKL {
    let weights = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    AutoEncoderKL::new(weights, 3, 3, config()).unwrap()
}

/// What `run` makes of each of a batch alone. candle-transformers' attention goes wrong from the second on: candle-core 0.11.1
/// multiplies a transposed batch by one matrix as if its rows lay in order (`MatMul` in cpu_backend, where it folds the batch).
fn one_by_one(batch: &Tensor, run: impl Fn(&Tensor) -> Tensor) -> Tensor {
    let one = |i| run(&batch.narrow(0, i, 1).unwrap());
    let all: Vec<Tensor> = (0..batch.dim(0).unwrap()).map(one).collect();
    Tensor::cat(&all, 0).unwrap()
}

/// Random weights, and the model folder that holds them.
fn drawn() -> (Tensors, TempDir) {
    let (_, tensors) = peer::draw(peer::vae_gain, |weights| {
        AutoEncoderKL::new(weights, 3, 3, config())
    });
    let folder = tempfile::tempdir().unwrap();
    let json = peer::vae_json(&config());
    let stem = "diffusion_pytorch_model";
    peer::save(folder.path(), "vae", stem, &json, &tensors);
    (tensors, folder)
}

fn files(folder: &TempDir) -> PartFiles {
    PartFiles {
        files: ModelFiles::Folder(folder.path().to_path_buf()),
        part: "vae",
        weights: None,
    }
}

/// Those that matter: a key's bias adds the same to all scores of a query, which softmax takes away again.
fn names<'a>(tensors: &'a Tensors, parts: [&'a str; 2]) -> impl Iterator<Item = &'a String> {
    tensors.keys().filter(move |name| {
        parts.iter().any(|part| name.starts_with(part)) && !name.ends_with("to_k.bias")
    })
}

#[test]
fn the_vae_decoder_is_candle_transformers() {
    let (tensors, folder) = drawn();
    let latents = peer::noise("latents", (2, 4, 5, 7));
    let decode = |tensors| {
        let model = theirs(tensors);
        one_by_one(&latents, |latents| model.decode(latents).unwrap())
    };
    let expected = decode(tensors.clone());
    for (name, placement) in placements(DType::F32) {
        let decoder = Decoder::load(&files(&folder), &placement).unwrap();
        let image = decoder.decode(&latents).unwrap();
        assert_near(&format!("{name} VAE decoder"), &image, &expected);
    }
    let names = names(&tensors, ["decoder.", "post_quant_conv."]);
    assert_every_weight_is_seen("VAE decoder", &expected, &tensors, names, decode);
}

/// One half of what candle-transformers encodes an image to: 0 for the mean, 1 for the logarithm of the variance.
///
/// It lets nothing be seen but draws of `mean + exp(logvar / 2) * noise`. Those are the mean to the bit where logvar is
/// -300, since exp(-150) is 0 in float32: the last convolution is made to give the half asked for and -300.
fn their_moments(mut tensors: Tensors, image: &Tensor, half: usize) -> Tensor {
    let rows = |name: &str, other: f64| {
        let wanted = tensors[name].chunk(2, 0).unwrap().swap_remove(half);
        let other = (wanted.zeros_like().unwrap() + other).unwrap();
        Tensor::cat(&[wanted, other], 0).unwrap()
    };
    let (weight, bias) = (
        rows("quant_conv.weight", 0.0),
        rows("quant_conv.bias", -300.0),
    );
    tensors.insert("quant_conv.weight".into(), weight);
    tensors.insert("quant_conv.bias".into(), bias);
    let model = theirs(tensors);
    one_by_one(image, |image| {
        model.encode(image).unwrap().sample().unwrap()
    })
}

#[test]
fn the_vae_encoder_is_candle_transformers() {
    let (tensors, folder) = drawn();
    let image = peer::noise("image", (2, 3, 20, 28));
    let encode = |tensors: Tensors| {
        let [mean, logvar] = [0, 1].map(|half| their_moments(tensors.clone(), &image, half));
        Tensor::cat(&[mean, logvar], 1).unwrap()
    };
    let expected = encode(tensors.clone());
    for (name, placement) in placements(DType::F32) {
        let encoder = Encoder::load(&files(&folder), &placement).unwrap();
        let posterior = encoder.encode(&image).unwrap();
        let moments = Tensor::cat(&[posterior.mean, posterior.logvar.unwrap()], 1).unwrap();
        assert_near(&format!("{name} VAE encoder"), &moments, &expected);
    }
    let names = names(&tensors, ["encoder.", "quant_conv."]);
    assert_every_weight_is_seen("VAE encoder", &expected, &tensors, names, encode);
}

/// A formula that differs is seen like a weight that does.
#[test]
fn another_activation_or_grouping_in_the_vae_is_seen() {
    let (tensors, folder) = drawn();
    let latents = peer::noise("latents", (1, 4, 5, 7));
    let expected = theirs(tensors).decode(&latents).unwrap();
    let (_, placement) = &placements(DType::F32)[0];
    for (key, value) in [
        ("act_fn", "gelu".into()),
        ("norm_num_groups", 4.into()),
        ("mid_block_add_attention", false.into()),
    ] {
        let mut json = peer::vae_json(&config());
        json[key] = value;
        std::fs::write(folder.path().join("vae/config.json"), json.to_string()).unwrap();
        let decoder = Decoder::load(&files(&folder), placement).unwrap();
        let error = peak_error(&decoder.decode(&latents).unwrap(), &expected);
        println!("VAE decoder with another {key}: off by {error:.1e}");
        assert!(error > BOUND, "{key}: only {error:.1e}");
    }
}
