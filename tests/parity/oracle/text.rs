//! CLIP's text encoder: small, with a fault in every tensor; and as large as Stable Diffusion 1.5's.

use candle_core::{DType, Device, Module, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::clip::text_model as any_size;
use candle_transformers::models::stable_diffusion::clip as preset;
use sd_upscale::ModelFiles;
use sd_upscale::device::Placement;
use sd_upscale::networks::text::{Conditioning, TextEncoder, Tokens};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::peer::{self, Tensors, peak_error};
use super::{BOUND, assert_every_weight_is_seen, assert_near};
use crate::common::placements;

fn folder(config: &Value, tensors: &Tensors) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    peer::save(folder.path(), "text_encoder", "model", config, tensors);
    folder
}

fn ours(folder: &TempDir, placement: &Placement, ids: &[u32]) -> Conditioning {
    let files = ModelFiles::Folder(folder.path().to_path_buf());
    let tokens = Tokens {
        ids: ids.to_vec(),
        visible: ids.len(),
        cut: None,
    };
    let encoder = TextEncoder::load(&files, placement).unwrap();
    let on_device = encoder.encode(&tokens).unwrap();
    Conditioning {
        context: on_device.context.to_device(&Device::Cpu).unwrap(),
        pooled: on_device.pooled.to_device(&Device::Cpu).unwrap(),
    }
}

fn input(ids: &[u32]) -> Tensor {
    Tensor::new(ids, &Device::Cpu)
        .unwrap()
        .unsqueeze(0)
        .unwrap()
}

/// The end token is the largest id, and fills the places behind the prompt.
const SMALL_IDS: [u32; 12] = [40, 3, 17, 25, 3, 0, 31, 41, 41, 41, 41, 41];

fn small_config() -> any_size::ClipTextConfig {
    any_size::ClipTextConfig {
        vocab_size: 42,
        embed_dim: 48,
        intermediate_size: 96,
        max_position_embeddings: 12,
        num_hidden_layers: 3,
        num_attention_heads: 6,
        ..any_size::ClipTextConfig::vit_base_patch32()
    }
}

fn small_json() -> Value {
    json!({
        "vocab_size": 42,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "max_position_embeddings": 12,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": 41,
    })
}

fn small_tensors() -> Tensors {
    let build = |weights| any_size::ClipTextTransformer::new(weights, &small_config());
    peer::draw(peer::text_gain, build).1
}

fn small_theirs(tensors: Tensors) -> any_size::ClipTextTransformer {
    let weights = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    any_size::ClipTextTransformer::new(weights, &small_config()).unwrap()
}

/// Ours is what stands before the last norm, theirs what comes behind it.
fn normed(context: &Tensor, tensors: &Tensors) -> Tensor {
    let tensor = |kind: &str| tensors[&format!("final_layer_norm.{kind}")].clone();
    candle_nn::LayerNorm::new(tensor("weight"), tensor("bias"), 1e-5)
        .forward(&context.to_device(&Device::Cpu).unwrap())
        .unwrap()
}

#[test]
fn a_small_text_encoder_is_candle_transformers() {
    let tensors = small_tensors();
    let folder = folder(&small_json(), &tensors);
    let ids = input(&SMALL_IDS);
    let states = |tensors| {
        let model = small_theirs(tensors);
        model.forward_with_mask(&ids, usize::MAX).unwrap()
    };
    let expected = states(tensors.clone());
    let expected_pooled = small_theirs(tensors.clone()).forward(&ids).unwrap();
    for (name, placement) in placements(DType::F32) {
        let result = ours(&folder, &placement, &SMALL_IDS);
        let what = format!("{name} small text encoder");
        let actual = normed(&result.context, &tensors);
        assert_near(&what, &actual, &expected);
        assert_near(&format!("{what}, pooled"), &result.pooled, &expected_pooled);
    }
    // A key's bias adds the same to all scores of a query, which softmax takes away again.
    let names = tensors.keys().filter(|name| !name.ends_with("k_proj.bias"));
    assert_every_weight_is_seen("small text encoder", &expected, &tensors, names, states);
}

/// A formula that differs is seen like a weight that does.
#[test]
fn another_activation_eps_or_end_token_in_the_text_encoder_is_seen() {
    let tensors = small_tensors();
    let ids = input(&SMALL_IDS);
    let expected = small_theirs(tensors.clone()).forward(&ids).unwrap();
    let (_, placement) = &placements(DType::F32)[0];
    for (key, value) in [
        ("hidden_act", json!("gelu")),
        ("layer_norm_eps", json!(2e-5)),
        ("num_attention_heads", json!(8)),
        ("eos_token_id", json!(31)),
    ] {
        let mut json = small_json();
        json[key] = value;
        let result = ours(&folder(&json, &tensors), placement, &SMALL_IDS);
        let error = peak_error(&result.pooled, &expected);
        println!("small text encoder with another {key}: off by {error:.1e}");
        assert!(error > BOUND, "{key}: only {error:.1e}");
    }
}

/// Stable Diffusion 1.5's preset, the one size of its kind that is offered; it also gives what stands before the last norm.
#[test]
fn the_text_encoder_of_v1_5_is_candle_transformers() {
    let config = preset::Config::v1_5();
    let build = |weights| preset::ClipTextTransformer::new(weights, &config);
    let (model, tensors) = peer::draw(peer::text_gain, build);
    let folder = folder(&peer::clip_v1_5_json(), &tensors);
    let mut ids = vec![49407; 77];
    ids[..6].copy_from_slice(&[49406, 320, 1125, 539, 550, 18376]);
    let run = |model: &preset::ClipTextTransformer| {
        let (normed, context) = model
            .forward_until_encoder_layer(&input(&ids), usize::MAX, -1)
            .unwrap();
        (context, normed.narrow(1, 6, 1).unwrap().squeeze(1).unwrap())
    };
    let (context, pooled) = run(&model);
    for (name, placement) in placements(DType::F32) {
        let result = ours(&folder, &placement, &ids);
        let what = format!("{name} text encoder of v1.5");
        assert_near(&what, &result.context, &context);
        assert_near(&format!("{what}, pooled"), &result.pooled, &pooled);
    }
    let names = [
        "text_model.embeddings.position_embedding.weight",
        "text_model.encoder.layers.11.mlp.fc2.bias",
    ]
    .map(String::from);
    let what = "text encoder of v1.5";
    assert_every_weight_is_seen(what, &context, &tensors, names.iter(), |changed| {
        let weights = VarBuilder::from_tensors(changed, DType::F32, &Device::Cpu);
        run(&build(weights).unwrap()).0
    });
}
