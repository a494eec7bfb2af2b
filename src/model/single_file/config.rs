//! The configurations of a single file's parts: what the shapes of its tensors tell, the rest as published.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Version, names};
use crate::model::PUBLISHED_BASE_CONFIGURATIONS;
use crate::model::original::Trained;
use crate::model::weights::Entry;

/// Heads of every attention of a 1.x (`num_heads` of CompVis' `v1-inference.yaml`).
const HEADS: usize = 8;
/// Width of a head in a 2.x (`num_head_channels` of Stability AI's `v2-inference.yaml`), and in both text encoders.
const HEAD: usize = 64;
/// Groups of every norm over a map.
const GROUPS: usize = 32;
/// Steps of the training of `stable-diffusion-2-base`, which predicts noise, at 512 pixels: by these diffusers tells it from its siblings.
const STEPS_OF_2_BASE: i64 = 875_000;
/// The VAE's pixels to a latent position.
const FACTOR: usize = 8;

const SCHEDULER: &str = "scheduler/scheduler_config.json";

/// What its network was trained on.
struct Training {
    /// Side of the pictures.
    pixels: usize,
    prediction: &'static str,
}

impl Training {
    fn of(version: Version, global_step: Option<i64>) -> Self {
        match version {
            Version::Two if global_step != Some(STEPS_OF_2_BASE) => Self {
                pixels: 768,
                prediction: "v_prediction",
            },
            _ => Self {
                pixels: 512,
                prediction: "epsilon",
            },
        }
    }
}

/// All small files of the layout but the tokenizer's, by their paths.
///
/// # Errors
/// A tensor is missing or of another shape than such a network's.
pub fn all(read: &Trained, version: Version) -> Result<BTreeMap<&'static str, Vec<u8>>> {
    let shapes = Shapes(&read.tensors);
    let training = Training::of(version, read.global_step);
    let (unet, text) = (shapes.unet(&training)?, shapes.text(version)?);
    let (attends_to, width) = (&unet["cross_attention_dim"], &text["hidden_size"]);
    ensure!(
        attends_to == width,
        "its UNet attends to a prompt {attends_to} wide, but its text encoder is {width} wide; the two do not belong together"
    );
    let vae = shapes.vae(&training)?;
    let files = [
        ("unet/config.json", unet),
        ("text_encoder/config.json", text),
        ("vae/config.json", vae),
        (SCHEDULER, scheduler(version, &training)?),
        ("model_index.json", index(version)),
    ];
    let files = files.into_iter();
    Ok(files
        .map(|(path, value)| (path, value.to_string().into_bytes()))
        .collect())
}

/// Of `stable-diffusion-v1-5` (1.4's is the same), and of `stable-diffusion-2-1`.
fn scheduler(version: Version, training: &Training) -> Result<Value> {
    let mut files = PUBLISHED_BASE_CONFIGURATIONS.iter();
    let (_, published) = files
        .find(|(path, _)| *path == SCHEDULER)
        .context("the published base checkpoint has a scheduler")?;
    let mut config: Value = serde_json::from_slice(published)?;
    config["_class_name"] = scheduler_class(version).into();
    config["prediction_type"] = training.prediction.into();
    Ok(config)
}

fn scheduler_class(version: Version) -> &'static str {
    match version {
        Version::One => "PNDMScheduler",
        Version::Two => "DDIMScheduler",
    }
}

/// For other programs, where the model is written as a folder.
fn index(version: Version) -> Value {
    json!({
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [null, null],
        "safety_checker": [null, null],
        "scheduler": ["diffusers", scheduler_class(version)],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    })
}

/// What the shapes of the original's tensors tell.
pub struct Shapes<'a>(pub &'a HashMap<String, Entry>);

/// A level of the UNet.
struct Level {
    width: usize,
    attends: bool,
}

impl Shapes<'_> {
    fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    fn shape(&self, key: &str) -> Result<&[usize]> {
        let entry = self.0.get(key);
        let entry = entry.with_context(|| {
            format!("`{key}` is missing: the file is damaged or of another model")
        })?;
        Ok(entry.shape())
    }

    /// A dimension of a tensor.
    fn size(&self, key: &str, dimension: usize) -> Result<usize> {
        let shape = self.shape(key)?;
        let size = shape.get(dimension).copied();
        size.with_context(|| {
            format!("`{key}` is of shape {shape:?}, which it is not in Stable Diffusion")
        })
    }

    /// How many there are of what is numbered behind `prefix`.
    fn count(&self, prefix: &str) -> usize {
        let numbers = self.0.keys().filter_map(|key| {
            let (number, _) = key.strip_prefix(prefix)?.split_once('.')?;
            number.parse::<usize>().ok()
        });
        numbers.max().map_or(0, |last| last.saturating_add(1))
    }

    fn unet(&self, training: &Training) -> Result<Value> {
        let key = |key: &str| format!("{}{key}", names::UNET);
        let blocks = names::Blocks::of(self.0);
        let level = |number: usize| -> Result<Level> {
            let first = blocks.layers(number).next();
            let first = first.with_context(|| format!("level {number} of its UNet has no layers: the file is damaged or of another model"))?;
            Ok(Level {
                width: self.size(
                    &key(&format!("input_blocks.{first}.0.in_layers.2.weight")),
                    0,
                )?,
                attends: self.has(&key(&format!("input_blocks.{first}.1.proj_in.weight"))),
            })
        };
        let levels = (0..blocks.levels())
            .map(level)
            .collect::<Result<Vec<Level>>>()?;
        let kind = |level: &Level, plain: &str, attending: &str| {
            Value::from(if level.attends { attending } else { plain })
        };
        let down = levels
            .iter()
            .map(|level| kind(level, "DownBlock2D", "CrossAttnDownBlock2D"));
        let up = levels
            .iter()
            .rev()
            .map(|level| kind(level, "UpBlock2D", "CrossAttnUpBlock2D"));
        let widths: Vec<usize> = levels.iter().map(|level| level.width).collect();
        // The middle has one in any case.
        let linear = self.shape(&key("middle_block.1.proj_in.weight"))?.len() == 2;
        let context = self.size(
            &key("middle_block.1.transformer_blocks.0.attn2.to_k.weight"),
            1,
        )?;
        let heads = if linear {
            heads_of_each(&widths)?
        } else {
            HEADS.into()
        };
        Ok(json!({
            "_class_name": "UNet2DConditionModel",
            "act_fn": "silu",
            "attention_head_dim": heads,
            "block_out_channels": widths,
            "center_input_sample": false,
            "cross_attention_dim": context,
            "down_block_types": down.collect::<Vec<_>>(),
            "downsample_padding": 1,
            "flip_sin_to_cos": true,
            "freq_shift": 0,
            "in_channels": self.size(&key("input_blocks.0.0.weight"), 1)?,
            "layers_per_block": blocks.layers(0).count(),
            "mid_block_scale_factor": 1,
            "norm_eps": 1e-5,
            "norm_num_groups": GROUPS,
            "out_channels": self.size(&key("out.2.weight"), 0)?,
            "sample_size": training.pixels / FACTOR,
            "up_block_types": up.collect::<Vec<_>>(),
            "upcast_attention": linear,
            "use_linear_projection": linear,
        }))
    }

    /// Levels of resolution of the VAE.
    pub fn vae_levels(&self) -> usize {
        self.count(&format!("{}encoder.down.", names::VAE))
    }

    fn vae(&self, training: &Training) -> Result<Value> {
        let key = |key: &str| format!("{}{key}", names::VAE);
        let levels = self.vae_levels();
        let widths = (0..levels)
            .map(|level| {
                self.size(
                    &key(&format!("encoder.down.{level}.block.0.conv1.weight")),
                    0,
                )
            })
            .collect::<Result<Vec<usize>>>()?;
        Ok(json!({
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": widths,
            "down_block_types": vec!["DownEncoderBlock2D"; levels],
            "in_channels": self.size(&key("encoder.conv_in.weight"), 1)?,
            "latent_channels": self.size(&key("decoder.conv_in.weight"), 1)?,
            "layers_per_block": self.count(&key("encoder.down.0.block.")),
            "norm_num_groups": GROUPS,
            "out_channels": self.size(&key("decoder.conv_out.weight"), 0)?,
            "sample_size": training.pixels,
            "scaling_factor": 0.18215,
            "up_block_types": vec!["UpDecoderBlock2D"; levels],
        }))
    }

    fn text(&self, version: Version) -> Result<Value> {
        let shape = |wanted: &str| self.text_shape(version, wanted);
        let words = shape("embeddings.token_embedding.weight")?;
        let width = words[1];
        ensure!(
            width.is_multiple_of(HEAD),
            "its text encoder is {width} wide, which is no multiple of the {HEAD} of an attention's head: it is no Stable Diffusion's"
        );
        Ok(json!({
            "architectures": ["CLIPTextModel"],
            "bos_token_id": 0,
            "eos_token_id": 2,
            "hidden_act": match version {
                Version::One => "quick_gelu",
                Version::Two => "gelu",
            },
            "hidden_size": width,
            "intermediate_size": shape("encoder.layers.0.mlp.fc1.weight")?[0],
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": shape("embeddings.position_embedding.weight")?[0],
            "model_type": "clip_text_model",
            "num_attention_heads": width / HEAD,
            "num_hidden_layers": self.text_layers(version),
            "pad_token_id": 1,
            "projection_dim": width,
            "vocab_size": words[0],
        }))
    }

    /// The two dimensions of the tensor of the text encoder that is `wanted` in diffusers' names.
    fn text_shape(&self, version: Version, wanted: &str) -> Result<[usize; 2]> {
        let wanted = format!("text_model.{wanted}");
        let prefix = names::text(version);
        let found = self.0.iter().find(|(key, _)| {
            let key = key.strip_prefix(prefix);
            key.is_some_and(|key| names::of_text(key, version) == [&*wanted])
        });
        let (key, entry) = found.with_context(|| {
            format!("its text encoder (`{prefix}`) has no `{wanted}`: the file is damaged or of another model")
        })?;
        let shape = entry.shape().try_into().ok();
        shape.with_context(|| {
            format!(
                "`{key}` is of shape {:?}, expected two dimensions",
                entry.shape()
            )
        })
    }

    fn text_layers(&self, version: Version) -> usize {
        let prefix = names::text(version);
        let names = self.0.keys().filter_map(|key| key.strip_prefix(prefix));
        let numbers = names
            .flat_map(|key| names::of_text(key, version))
            .filter_map(|name| {
                let (number, _) = name
                    .strip_prefix("text_model.encoder.layers.")?
                    .split_once('.')?;
                number.parse::<usize>().ok()
            });
        numbers.max().map_or(0, |last| last.saturating_add(1))
    }
}

/// Heads of 64 channels at each level.
fn heads_of_each(widths: &[usize]) -> Result<Value> {
    let heads = widths.iter().map(|width| {
        ensure!(
            *width > 0 && width.is_multiple_of(HEAD),
            "a level of its UNet is {width} wide, which is no multiple of the {HEAD} of an attention's head: it is no Stable Diffusion 2.x"
        );
        Ok(width / HEAD)
    });
    Ok(heads.collect::<Result<Vec<usize>>>()?.into())
}
