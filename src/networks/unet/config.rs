//! `unet/config.json`.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::NOISE_LEVEL_FEATURES;
use crate::model::{EPS, MOST_CHANNELS, MOST_LAYERS, MOST_LEVELS, Weights, within};

/// The largest kernel of the first and last convolution.
const MOST_KERNEL: usize = 7;

/// One value for all levels, or one a level.
#[derive(Clone, Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a whole number of 0 or more, or a list of them, one a level"
)]
pub enum PerLevel {
    Same(usize),
    Each(Vec<usize>),
}

impl PerLevel {
    pub fn get(&self, level: usize, key: &str) -> Result<usize> {
        match self {
            PerLevel::Same(value) => Ok(*value),
            PerLevel::Each(values) => values
                .get(level)
                .copied()
                .with_context(|| format!("unet/config.json: {key} has no value for level {level}")),
        }
    }
}

/// `unet/config.json`; absent keys take diffusers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct UNetConfig {
    pub in_channels: usize,
    pub out_channels: usize,
    pub block_out_channels: Vec<usize>,
    pub(super) down_block_types: Vec<String>,
    pub(super) up_block_types: Vec<String>,
    pub(super) mid_block_type: Option<String>,
    pub(super) layers_per_block: PerLevel,
    pub(super) attention_head_dim: PerLevel,
    pub(super) cross_attention_dim: PerLevel,
    pub(super) act_fn: String,
    pub(super) norm_eps: f64,
    pub(super) norm_num_groups: Option<usize>,
    pub(super) conv_in_kernel: usize,
    pub(super) conv_out_kernel: usize,
    pub(super) time_embedding_type: String,
    pub(super) time_embedding_dim: Option<usize>,
    pub(super) flip_sin_to_cos: bool,
    pub(super) time_cond_proj_dim: Option<usize>,
    /// `timestep_act_2` in an older revision of the published file.
    #[serde(alias = "timestep_act_2")]
    pub(super) timestep_post_act: Option<String>,
}

impl Default for UNetConfig {
    fn default() -> Self {
        Self {
            in_channels: 4,
            out_channels: 4,
            block_out_channels: vec![320, 640, 1280, 1280],
            down_block_types: Vec::new(),
            up_block_types: Vec::new(),
            mid_block_type: Some("UNetMidBlock2DCrossAttn".into()),
            layers_per_block: PerLevel::Same(2),
            attention_head_dim: PerLevel::Same(8),
            cross_attention_dim: PerLevel::Same(1280),
            act_fn: "silu".into(),
            norm_eps: 1e-5,
            norm_num_groups: Some(32),
            conv_in_kernel: 3,
            conv_out_kernel: 3,
            time_embedding_type: "positional".into(),
            time_embedding_dim: None,
            flip_sin_to_cos: true,
            time_cond_proj_dim: None,
            timestep_post_act: None,
        }
    }
}

impl UNetConfig {
    /// The widths of what the text encoder makes of a prompt: of a token, and of the pooled one.
    ///
    /// # Errors
    /// The configuration does not say.
    pub fn prompt_widths(&self) -> Result<(usize, usize)> {
        let width = self.cross_attention_dim.get(0, "cross_attention_dim")?;
        let features = 2 * NOISE_LEVEL_FEATURES;
        let pooled = self
            .time_cond_proj_dim
            .and_then(|dim| dim.checked_sub(features));
        let pooled = pooled.context(
            "unet/config.json: time_cond_proj_dim is missing or too small; the latent upscaler's prompt enters there",
        )?;
        Ok((width, pooled))
    }

    /// The latents' sides must be multiples of this.
    pub fn side_multiple(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1)
    }

    /// The smallest side the latents may have: the reflections of the resampling need two positions at the
    /// lowest level.
    pub fn side_minimum(&self) -> usize {
        match self.block_out_channels.len() {
            0 | 1 => 1,
            _ => 2 * self.side_multiple(),
        }
    }

    /// Whether this is a latent upscaler's network, of numbers that a network can have.
    ///
    /// # Errors
    /// It is not; the message names the key.
    pub fn check(&self) -> Result<()> {
        let levels = self.block_out_channels.len();
        self.check_numbers()?;
        ensure!(
            self.down_block_types.len() == levels && self.up_block_types.len() == levels,
            "unet/config.json: block_out_channels, down_block_types and up_block_types must be lists of one length"
        );
        if let Some(kind) = self.mid_block_type.as_deref() {
            bail!(
                "unet/config.json: mid_block_type `{kind}` is not supported; the latent upscaler has none (null)"
            );
        }
        ensure!(
            self.time_embedding_type == "fourier",
            "unet/config.json: time_embedding_type `{}` is not supported; the latent upscaler's is `fourier`",
            self.time_embedding_type
        );
        Ok(())
    }

    fn check_numbers(&self) -> Result<()> {
        let within =
            |key: &str, value, range| within(&format!("unet/config.json: {key}"), value, range);
        let levels = self.block_out_channels.len();
        within("the number of block_out_channels", levels, 1..=MOST_LEVELS)?;
        for level in 0..levels {
            let width = 1..=MOST_CHANNELS;
            within(
                "block_out_channels",
                self.block_out_channels[level],
                width.clone(),
            )?;
            for (key, value, range) in [
                ("layers_per_block", &self.layers_per_block, 1..=MOST_LAYERS),
                (
                    "attention_head_dim",
                    &self.attention_head_dim,
                    width.clone(),
                ),
                ("cross_attention_dim", &self.cross_attention_dim, width),
            ] {
                within(key, value.get(level, key)?, range)?;
            }
        }
        for (key, value, most) in [
            ("in_channels", Some(self.in_channels), MOST_CHANNELS),
            ("out_channels", Some(self.out_channels), MOST_CHANNELS),
            ("norm_num_groups", self.norm_num_groups, MOST_CHANNELS),
            ("conv_in_kernel", Some(self.conv_in_kernel), MOST_KERNEL),
            ("conv_out_kernel", Some(self.conv_out_kernel), MOST_KERNEL),
            ("time_embedding_dim", self.time_embedding_dim, MOST_CHANNELS),
            ("time_cond_proj_dim", self.time_cond_proj_dim, MOST_CHANNELS),
        ] {
            value.map_or(Ok(()), |value| within(key, value, 1..=most))?;
        }
        ensure!(
            self.time_embedding_dim
                .is_none_or(|dim| dim.is_multiple_of(2)),
            "unet/config.json: time_embedding_dim is odd; half of its features are cosines, half sines"
        );
        crate::model::within("unet/config.json: norm_eps", self.norm_eps, EPS)
    }

    /// Holds the numbers to the weights.
    pub(super) fn check_weights(&self, w: &Weights) -> Result<()> {
        let of = |key: &str| format!("unet/config.json: {key}");
        let levels = self.block_out_channels.len();
        w.agrees_in_number(
            &of("the number of block_out_channels"),
            levels,
            "down_blocks",
        )?;
        for level in 0..levels {
            let block = format!("down_blocks.{level}");
            let at = |key: &str| of(&format!("{key} of level {level}"));
            for (key, value, name) in [
                (
                    "block_out_channels",
                    self.block_out_channels[level],
                    "resnets.0.conv1.weight",
                ),
                (
                    "cross_attention_dim",
                    self.cross_attention_dim.get(level, "cross_attention_dim")?,
                    "attentions.0.attn2.norm_cross.weight",
                ),
            ] {
                w.agrees(&at(key), value, &format!("{block}.{name}"), 0)?;
            }
            let layers = self.layers_per_block.get(level, "layers_per_block")?;
            w.agrees_in_number(&at("layers_per_block"), layers, &format!("{block}.resnets"))?;
        }
        for (key, value, name, dimension) in [
            ("in_channels", Some(self.in_channels), "conv_in.weight", 1),
            (
                "conv_in_kernel",
                Some(self.conv_in_kernel),
                "conv_in.weight",
                2,
            ),
            (
                "out_channels",
                Some(self.out_channels),
                "conv_out.weight",
                0,
            ),
            (
                "conv_out_kernel",
                Some(self.conv_out_kernel),
                "conv_out.weight",
                2,
            ),
            (
                "time_embedding_dim",
                self.time_embedding_dim,
                "time_embedding.linear_1.weight",
                0,
            ),
            (
                "time_cond_proj_dim",
                self.time_cond_proj_dim,
                "time_embedding.cond_proj.weight",
                1,
            ),
        ] {
            value.map_or(Ok(()), |value| w.agrees(&of(key), value, name, dimension))?;
        }
        let normed = w.contains("conv_norm_out.weight");
        ensure!(
            self.norm_num_groups.is_some() == normed,
            "unet/config.json: norm_num_groups is {:?}, but the weights {} the norm that it is for (conv_norm_out)",
            self.norm_num_groups.unwrap_or(0),
            if normed { "have" } else { "lack" }
        );
        Ok(())
    }
}
