//! The training's names of Stable Diffusion's UNet and text encoders to diffusers'.
//!
//! After diffusers' `loaders/single_file_utils.py` (0.42.1), CompVis' and Stability AI's `ldm/modules/diffusionmodules/openaimodel.py`.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::Version;
use crate::model::weights::Entry;

/// Of the UNet's tensors.
pub const UNET: &str = "model.diffusion_model.";
/// Of the VAE's.
pub const VAE: &str = "first_stage_model.";

/// Of the text encoder's.
pub fn text(version: Version) -> &'static str {
    match version {
        Version::One => "cond_stage_model.transformer.",
        Version::Two => "cond_stage_model.model.",
    }
}

/// OpenCLIP's last block: Stable Diffusion 2 takes what goes into it, so that its configuration has 23 layers of 24.
const UNUSED_BLOCK: usize = 23;

/// Where a block of the one list that the original has for all levels stands in diffusers' levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub level: usize,
    /// Within the level.
    pub layer: usize,
    /// Whether it changes the size: on the way down it does nothing else.
    resamples: bool,
}

/// The blocks of both ways, by their numbers. The first on the way down, which is `conv_in`, is not among them.
#[derive(Debug, Default)]
pub struct Blocks {
    pub down: BTreeMap<usize, Place>,
    pub up: BTreeMap<usize, Place>,
}

impl Blocks {
    /// What stands where, as the names of a file's tensors tell.
    pub fn of(tensors: &HashMap<String, Entry>) -> Self {
        let keys = || tensors.keys().filter_map(|key| key.strip_prefix(UNET));
        let numbered = |list: &'static str| {
            keys().filter_map(move |key| {
                let (number, rest) = key.strip_prefix(list)?.split_once('.')?;
                Some((number.parse::<usize>().ok()?, rest))
            })
        };
        let down: BTreeSet<usize> = numbered("input_blocks.")
            .map(|(number, _)| number)
            .collect();
        let up: BTreeSet<usize> = numbered("output_blocks.")
            .map(|(number, _)| number)
            .collect();
        let smaller: BTreeSet<usize> = numbered("input_blocks.")
            .filter(|(_, rest)| rest.starts_with("0.op."))
            .map(|(number, _)| number)
            .collect();
        let larger: BTreeSet<usize> = numbered("output_blocks.")
            .filter(|(_, rest)| rest.starts_with("1.conv.") || rest.starts_with("2.conv."))
            .map(|(number, _)| number)
            .collect();
        Self {
            down: placed(down.into_iter().filter(|number| *number > 0), &smaller),
            up: placed(up.into_iter(), &larger),
        }
    }

    /// Levels of resolution.
    pub fn levels(&self) -> usize {
        self.down
            .values()
            .map(|place| place.level + 1)
            .max()
            .unwrap_or(0)
    }

    /// The blocks of a level on the way down that do not change the size, by their numbers.
    pub fn layers(&self, level: usize) -> impl Iterator<Item = usize> {
        let of_level =
            move |(_, place): &(&usize, &Place)| place.level == level && !place.resamples;
        self.down.iter().filter(of_level).map(|(number, _)| *number)
    }
}

/// Each level ends with the block that changes the size.
fn placed(
    numbers: impl Iterator<Item = usize>,
    resampling: &BTreeSet<usize>,
) -> BTreeMap<usize, Place> {
    let (mut level, mut layer) = (0, 0);
    numbers
        .map(|number| {
            let resamples = resampling.contains(&number);
            let place = Place {
                level,
                layer,
                resamples,
            };
            (level, layer) = if resamples {
                (level + 1, 0)
            } else {
                (level, layer + 1)
            };
            (number, place)
        })
        .collect()
}

/// The diffusers name of a tensor of the UNet, `key` without [`UNET`]; None where Stable Diffusion's has none of this name.
pub fn unet(key: &str, blocks: &Blocks) -> Option<String> {
    let (list, rest) = key.split_once('.')?;
    let (number, tail) = rest.split_once('.')?;
    match list {
        "time_embed" => {
            let layer = match number {
                "0" => "linear_1",
                "2" => "linear_2",
                _ => return None,
            };
            Some(format!("time_embedding.{layer}.{tail}"))
        }
        "out" => {
            let layer = match number {
                "0" => "conv_norm_out",
                "2" => "conv_out",
                _ => return None,
            };
            Some(format!("{layer}.{tail}"))
        }
        "middle_block" => Some(match number {
            "0" => format!("mid_block.resnets.0.{}", resnet(tail)?),
            "1" => format!("mid_block.attentions.0.{}", transformer(tail)?),
            "2" => format!("mid_block.resnets.1.{}", resnet(tail)?),
            _ => return None,
        }),
        "input_blocks" if number == "0" => Some(format!("conv_in.{}", tail.strip_prefix("0.")?)),
        "input_blocks" => {
            let place = blocks.down.get(&number.parse().ok()?)?;
            let block = format!("down_blocks.{}", place.level);
            if place.resamples {
                let leaf = tail.strip_prefix("0.op.")?;
                return Some(format!("{block}.downsamplers.0.conv.{leaf}"));
            }
            of_layer(&block, place.layer, tail)
        }
        "output_blocks" => {
            let place = blocks.up.get(&number.parse().ok()?)?;
            let block = format!("up_blocks.{}", place.level);
            // Behind the transformer, where there is one.
            let upsample = tail
                .strip_prefix("1.conv.")
                .or_else(|| tail.strip_prefix("2.conv."));
            match upsample {
                Some(leaf) => Some(format!("{block}.upsamplers.0.conv.{leaf}")),
                None => of_layer(&block, place.layer, tail),
            }
        }
        _ => None,
    }
}

/// A resnet, and behind it a transformer.
fn of_layer(block: &str, layer: usize, tail: &str) -> Option<String> {
    Some(match tail.split_once('.')? {
        ("0", tail) => format!("{block}.resnets.{layer}.{}", resnet(tail)?),
        ("1", tail) => format!("{block}.attentions.{layer}.{}", transformer(tail)?),
        _ => return None,
    })
}

fn resnet(tail: &str) -> Option<String> {
    let (layer, leaf) = tail.rsplit_once('.')?;
    let layer = match layer {
        "in_layers.0" => "norm1",
        "in_layers.2" => "conv1",
        "emb_layers.1" => "time_emb_proj",
        "out_layers.0" => "norm2",
        "out_layers.3" => "conv2",
        "skip_connection" => "conv_shortcut",
        _ => return None,
    };
    Some(format!("{layer}.{leaf}"))
}

/// Its names are diffusers' own.
fn transformer(tail: &str) -> Option<&str> {
    let known = ["norm.", "proj_in.", "transformer_blocks.0.", "proj_out."];
    known
        .iter()
        .any(|layer| tail.starts_with(layer))
        .then_some(tail)
}

/// The diffusers names of a tensor of the text encoder, `key` without [`text`]: none where it is not needed, three where it is a query's, a key's
/// and a value's, one above the other.
pub fn of_text(key: &str, version: Version) -> Vec<String> {
    let name = match version {
        Version::One => of_clip(key).map(|name| vec![name.to_owned()]),
        Version::Two => of_open_clip(key),
    };
    let names = name.unwrap_or_default().into_iter();
    names.map(|name| format!("text_model.{name}")).collect()
}

/// transformers' own names, with their prefix or without. `position_ids`, `text_projection` and `logit_scale` are no part of the network.
fn of_clip(key: &str) -> Option<&str> {
    let key = key.strip_prefix("text_model.").unwrap_or(key);
    let known = [
        "embeddings.token_embedding.",
        "embeddings.position_embedding.",
        "encoder.layers.",
        "final_layer_norm.",
    ];
    known
        .iter()
        .any(|layer| key.starts_with(layer))
        .then_some(key)
}

fn of_open_clip(key: &str) -> Option<Vec<String>> {
    let one = |name: &str| Some(vec![name.to_owned()]);
    match key {
        "positional_embedding" => return one("embeddings.position_embedding.weight"),
        "token_embedding.weight" => return one("embeddings.token_embedding.weight"),
        "ln_final.weight" => return one("final_layer_norm.weight"),
        "ln_final.bias" => return one("final_layer_norm.bias"),
        _ => {}
    }
    let (number, tail) = key
        .strip_prefix("transformer.resblocks.")?
        .split_once('.')?;
    let number: usize = number.parse().ok()?;
    if number == UNUSED_BLOCK {
        return None;
    }
    let named = |name: &str| format!("encoder.layers.{number}.{name}");
    let packed =
        |leaf: &str| ["q", "k", "v"].map(|each| named(&format!("self_attn.{each}_proj.{leaf}")));
    match tail {
        "attn.in_proj_weight" => return Some(packed("weight").into()),
        "attn.in_proj_bias" => return Some(packed("bias").into()),
        _ => {}
    }
    let (layer, leaf) = tail.rsplit_once('.')?;
    let layer = match layer {
        "ln_1" => "layer_norm1",
        "ln_2" => "layer_norm2",
        "attn.out_proj" => "self_attn.out_proj",
        "mlp.c_fc" => "mlp.fc1",
        "mlp.c_proj" => "mlp.fc2",
        _ => return None,
    };
    Some(vec![named(&format!("{layer}.{leaf}"))])
}
