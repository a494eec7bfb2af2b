//! `unet/config.json`.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

/// One value for all levels, or one a level.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
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

    pub(super) fn check(&self) -> Result<()> {
        let levels = self.block_out_channels.len();
        ensure!(
            levels > 0
                && self.down_block_types.len() == levels
                && self.up_block_types.len() == levels,
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
}
