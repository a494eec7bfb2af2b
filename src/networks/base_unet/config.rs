//! `unet/config.json` of Stable Diffusion 1 and 2.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::model::{EPS, MOST_CHANNELS, MOST_LAYERS, MOST_LEVELS, ModelFiles, Weights, within};
use crate::networks::unet::PerLevel;

/// `unet/config.json`; absent keys take diffusers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct BaseUNetConfig {
    pub in_channels: usize,
    pub out_channels: usize,
    /// Side of the latents that it was trained on.
    pub sample_size: Option<usize>,
    pub cross_attention_dim: usize,
    pub(super) block_out_channels: Vec<usize>,
    pub(super) down_block_types: Vec<String>,
    pub(super) up_block_types: Vec<String>,
    mid_block_type: Option<String>,
    pub(super) layers_per_block: usize,
    /// The number of heads, whatever its name says.
    attention_head_dim: PerLevel,
    num_attention_heads: Option<PerLevel>,
    pub(super) act_fn: String,
    pub(super) norm_eps: f64,
    pub(super) norm_num_groups: usize,
    pub(super) flip_sin_to_cos: bool,
    pub(super) freq_shift: f64,
    center_input_sample: bool,
    time_embedding_type: String,
    transformer_layers_per_block: Value,
    dual_cross_attention: bool,
    only_cross_attention: Value,
    resnet_time_scale_shift: String,
    conv_in_kernel: usize,
    conv_out_kernel: usize,
}

impl Default for BaseUNetConfig {
    fn default() -> Self {
        let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect();
        Self {
            in_channels: 4,
            out_channels: 4,
            sample_size: None,
            cross_attention_dim: 1280,
            block_out_channels: vec![320, 640, 1280, 1280],
            down_block_types: names(&[DOWN_ATTENDS, DOWN_ATTENDS, DOWN_ATTENDS, DOWN]),
            up_block_types: names(&[UP, UP_ATTENDS, UP_ATTENDS, UP_ATTENDS]),
            mid_block_type: Some(MID.into()),
            layers_per_block: 2,
            attention_head_dim: PerLevel::Same(8),
            num_attention_heads: None,
            act_fn: "silu".into(),
            norm_eps: 1e-5,
            norm_num_groups: 32,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            center_input_sample: false,
            time_embedding_type: "positional".into(),
            transformer_layers_per_block: Value::from(1),
            dual_cross_attention: false,
            only_cross_attention: Value::Bool(false),
            resnet_time_scale_shift: "default".into(),
            conv_in_kernel: 3,
            conv_out_kernel: 3,
        }
    }
}

const DOWN: &str = "DownBlock2D";
const DOWN_ATTENDS: &str = "CrossAttnDownBlock2D";
const UP: &str = "UpBlock2D";
const UP_ATTENDS: &str = "CrossAttnUpBlock2D";
const MID: &str = "UNetMidBlock2DCrossAttn";

/// Whether a block attends to the prompt, by the name of its type.
pub(super) fn attends(kind: &str) -> bool {
    [DOWN_ATTENDS, UP_ATTENDS].contains(&kind)
}

impl BaseUNetConfig {
    /// Levels of resolution.
    pub(super) fn levels(&self) -> usize {
        self.block_out_channels.len()
    }

    /// Heads of the attentions of a level on the way down.
    pub(super) fn heads(&self, level: usize) -> Result<usize> {
        let heads = self.num_attention_heads.as_ref();
        heads
            .unwrap_or(&self.attention_head_dim)
            .get(level, "attention_head_dim")
    }

    /// Reads `unet/config.json`.
    ///
    /// # Errors
    /// It is missing or damaged, or [another's](Self::check).
    pub fn load(files: &ModelFiles) -> Result<Self> {
        const FILE: &str = "unet/config.json";
        // Before anything is said of a value that another kind of checkpoint may have.
        refuse_other_kinds(&files.json(FILE)?)?;
        let config: Self = files.json(FILE)?;
        config.check()?;
        Ok(config)
    }

    /// Whether this is the network of a Stable Diffusion 1 or 2, of numbers that a network can have.
    ///
    /// # Errors
    /// It is another's; the message names the key and, where it is known, the kind of checkpoint.
    pub fn check(&self) -> Result<()> {
        self.check_kind()?;
        self.check_numbers()
    }

    fn check_kind(&self) -> Result<()> {
        let blocks = self
            .down_block_types
            .iter()
            .map(|kind| (kind, [DOWN, DOWN_ATTENDS], "down_block_types"));
        let up = self
            .up_block_types
            .iter()
            .map(|kind| (kind, [UP, UP_ATTENDS], "up_block_types"));
        for (kind, known, key) in blocks.chain(up) {
            ensure!(
                known.contains(&&**kind),
                "unet/config.json: {key} holds `{kind}`; a Stable Diffusion 1.x or 2.x checkpoint has {} and {}",
                known[0],
                known[1]
            );
        }
        let mid = self.mid_block_type.as_deref();
        ensure!(
            mid == Some(MID),
            "unet/config.json: mid_block_type is `{}`; expected {MID}",
            mid.unwrap_or("null")
        );
        for (key, plain) in [
            (
                "time_embedding_type",
                self.time_embedding_type == "positional",
            ),
            (
                "transformer_layers_per_block",
                self.transformer_layers_per_block == 1,
            ),
            ("dual_cross_attention", !self.dual_cross_attention),
            ("center_input_sample", !self.center_input_sample),
            (
                "only_cross_attention",
                !holds_true(&self.only_cross_attention),
            ),
            (
                "resnet_time_scale_shift",
                self.resnet_time_scale_shift == "default",
            ),
            ("conv_in_kernel", self.conv_in_kernel == 3),
            ("conv_out_kernel", self.conv_out_kernel == 3),
        ] {
            if !plain {
                return refuse(key, "set as in no Stable Diffusion 1.x or 2.x");
            }
        }
        Ok(())
    }

    /// Holds the numbers to the weights.
    pub(super) fn check_weights(&self, w: &Weights) -> Result<()> {
        let of = |key: &str| format!("unet/config.json: {key}");
        w.agrees_in_number(
            &of("the number of block_out_channels"),
            self.levels(),
            "down_blocks",
        )?;
        for (level, &channels) in self.block_out_channels.iter().enumerate() {
            let block = format!("down_blocks.{level}");
            let at = |key: &str| of(&format!("{key} of level {level}"));
            let width = format!("{block}.resnets.0.conv1.weight");
            w.agrees(&at("block_out_channels"), channels, &width, 0)?;
            let layers = self.layers_per_block;
            w.agrees_in_number(&at("layers_per_block"), layers, &format!("{block}.resnets"))?;
            let context = format!("{block}.attentions.0.transformer_blocks.0.attn2.to_k.weight");
            w.agrees(
                &of("cross_attention_dim"),
                self.cross_attention_dim,
                &context,
                1,
            )?;
        }
        w.agrees(&of("in_channels"), self.in_channels, "conv_in.weight", 1)?;
        w.agrees(&of("out_channels"), self.out_channels, "conv_out.weight", 0)
    }

    fn check_numbers(&self) -> Result<()> {
        let of = |key: &str| format!("unet/config.json: {key}");
        let levels = self.levels();
        within(
            &of("the number of block_out_channels"),
            levels,
            1..=MOST_LEVELS,
        )?;
        ensure!(
            self.down_block_types.len() == levels && self.up_block_types.len() == levels,
            "unet/config.json: block_out_channels, down_block_types and up_block_types must be lists of one length"
        );
        ensure!(
            self.out_channels == self.in_channels,
            "unet/config.json: out_channels is {}, in_channels {}; expected the same",
            self.out_channels,
            self.in_channels
        );
        within(
            &of("layers_per_block"),
            self.layers_per_block,
            1..=MOST_LAYERS,
        )?;
        within(
            &of("cross_attention_dim"),
            self.cross_attention_dim,
            1..=MOST_CHANNELS,
        )?;
        within(
            &of("norm_num_groups"),
            self.norm_num_groups,
            1..=MOST_CHANNELS,
        )?;
        within(&of("norm_eps"), self.norm_eps, EPS)?;
        if let Some(size) = self.sample_size {
            within(&of("sample_size"), size, 1..=1 << 12)?;
        }
        for (level, &channels) in self.block_out_channels.iter().enumerate() {
            within(&of("block_out_channels"), channels, 1..=MOST_CHANNELS)?;
            let heads = self.heads(level).context("unet/config.json")?;
            ensure!(
                heads > 0
                    && channels.is_multiple_of(heads)
                    && channels.is_multiple_of(self.norm_num_groups),
                "unet/config.json: block_out_channels holds {channels}, which is no multiple of the {heads} heads (attention_head_dim) and of the {} groups (norm_num_groups)",
                self.norm_num_groups
            );
        }
        let first = self.block_out_channels[0];
        ensure!(
            first.is_multiple_of(2) && (self.freq_shift - (first / 2) as f64).abs() > 0.5,
            "unet/config.json: block_out_channels begins with {first}, of which half are cosines, half sines of the time"
        );
        Ok(())
    }
}

/// What is said of a checkpoint that is another kind's by a key.
fn refuse(key: &str, what: &str) -> Result<()> {
    bail!(
        "unet/config.json: {key}: this is {what}; expected a Stable Diffusion 1.x or 2.x checkpoint for text to image"
    )
}

/// Names the kind of a checkpoint that is none of Stable Diffusion 1's or 2's for text to image, where a key tells it.
fn refuse_other_kinds(all: &Map<String, Value>) -> Result<()> {
    match all.get("in_channels").map_or(Some(4), Value::as_u64) {
        Some(4) | None => {}
        Some(9) => refuse("in_channels 9", "an inpainting checkpoint")?,
        Some(8) => refuse(
            "in_channels 8",
            "a checkpoint that edits or upscales a picture",
        )?,
        Some(other) => refuse(
            &format!("in_channels {other}"),
            "no text-to-image checkpoint",
        )?,
    }
    for (key, what) in [
        ("addition_embed_type", "a Stable Diffusion XL checkpoint"),
        ("time_cond_proj_dim", "a latent consistency model"),
        (
            "class_embed_type",
            "a checkpoint that is told a class or a noise level",
        ),
        (
            "encoder_hid_dim_type",
            "a checkpoint that projects its prompt",
        ),
    ] {
        if all.get(key).is_some_and(|value| !value.is_null()) {
            refuse(key, what)?;
        }
    }
    Ok(())
}

/// Whether a boolean, or one of a list, is true.
fn holds_true(value: &Value) -> bool {
    match value {
        Value::Bool(value) => *value,
        Value::Array(values) => values.iter().any(holds_true),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn other_checkpoints_are_refused_by_name() {
        for (config, what) in [
            (json!({"in_channels": 9}), "inpainting"),
            (json!({"in_channels": 7}), "no text-to-image"),
            (json!({"addition_embed_type": "text_time"}), "XL"),
            (json!({"time_cond_proj_dim": 256}), "consistency"),
            (json!({"class_embed_type": "timestep"}), "noise level"),
        ] {
            let all = config.as_object().unwrap();
            let error = refuse_other_kinds(all).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
        for (config, key) in [
            (
                json!({"down_block_types": ["DownBlock2D", "KDownBlock2D", "DownBlock2D", "DownBlock2D"]}),
                "down_block_types",
            ),
            (json!({"mid_block_type": null}), "mid_block_type"),
            (
                json!({"transformer_layers_per_block": [1, 2, 10]}),
                "transformer_layers_per_block",
            ),
            (
                json!({"only_cross_attention": [false, true]}),
                "only_cross_attention",
            ),
            (
                json!({"block_out_channels": [320, 640]}),
                "block_out_channels",
            ),
            (json!({"attention_head_dim": 7}), "attention_head_dim"),
            (json!({"out_channels": 8}), "out_channels"),
        ] {
            let config = BaseUNetConfig::deserialize(&config).unwrap();
            let error = config.check().unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
        BaseUNetConfig::default().check().unwrap();
        refuse_other_kinds(&Map::new()).unwrap();
    }
}
