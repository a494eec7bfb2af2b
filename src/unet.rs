//! The upscaler's UNet: k-diffusion's design in diffusers' names (UNet2DConditionModel with K-blocks).

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor};
use serde::Deserialize;

use crate::layers::{
    Activation, Conv2d, ConvShape, FeatureMap, GroupNorm, LayerNorm, Linear, NormAct, attention,
    downsample, map_tokens, upsample,
};
use crate::text::Conditioning;
use crate::weights::{ModelFiles, Placement, Weights};

/// Channels of one normalisation group (`resnet_group_size`, k-diffusion's and diffusers' constant).
const GROUP_SIZE: usize = 32;
/// AdaGroupNorm's eps inside attention blocks, which diffusers does not take from the configuration.
const ATTENTION_NORM_EPS: f64 = 1e-5;

/// One value for all levels, or one a level.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum PerLevel {
    Same(usize),
    Each(Vec<usize>),
}

impl PerLevel {
    fn get(&self, level: usize, key: &str) -> Result<usize> {
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
    down_block_types: Vec<String>,
    up_block_types: Vec<String>,
    mid_block_type: Option<String>,
    layers_per_block: PerLevel,
    attention_head_dim: PerLevel,
    cross_attention_dim: PerLevel,
    act_fn: String,
    norm_eps: f64,
    norm_num_groups: Option<usize>,
    conv_in_kernel: usize,
    conv_out_kernel: usize,
    time_embedding_type: String,
    time_embedding_dim: Option<usize>,
    flip_sin_to_cos: bool,
    time_cond_proj_dim: Option<usize>,
    /// `timestep_act_2` in an older revision of the published file.
    #[serde(alias = "timestep_act_2")]
    timestep_post_act: Option<String>,
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

    fn check(&self) -> Result<()> {
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

/// What the blocks share while they are built.
struct Builder<'a> {
    config: &'a UNetConfig,
    activation: Activation,
    time_width: usize,
    /// Cross-attentions built so far: each takes a number, by which its keys and values are found.
    cross_attentions: usize,
}

/// Everything that holds for one image at all its steps.
pub struct Prompted {
    /// Key and value of every cross-attention, (b, tokens, heads * d), in the order of their numbers.
    keys_values: Vec<(Tensor, Tensor)>,
    /// Projection of the noise level and the pooled prompt, (b, time features).
    condition: Tensor,
}

impl Prompted {
    /// The batch that these prompts are for.
    pub fn rows(&self) -> Result<usize> {
        Ok(self.condition.dim(0)?)
    }
}

/// `norm(x) * (1 + scale) + shift`, scale and shift from the time embedding.
struct AdaGroupNorm {
    groups: usize,
    eps: f64,
    linear: Linear,
}

impl AdaGroupNorm {
    fn new(build: &Builder, channels: usize, eps: f64, w: &Weights) -> Result<Self> {
        Ok(Self {
            groups: (channels / GROUP_SIZE).max(1),
            eps,
            linear: Linear::new(build.time_width, 2 * channels, true, &w.pp("linear"))?,
        })
    }

    /// `time`: (b, time width)
    fn then(&self, time: &Tensor, activation: Activation) -> Result<NormAct> {
        let both = self.linear.forward(time)?.to_dtype(DType::F32)?;
        let channels = self.linear.outputs / 2;
        Ok(NormAct {
            groups: self.groups,
            eps: self.eps,
            scale: (both.narrow(1, 0, channels)? + 1.0)?,
            shift: both.narrow(1, channels, channels)?.contiguous()?,
            activation,
        })
    }
}

struct Resnet {
    norm1: AdaGroupNorm,
    conv1: Conv2d,
    norm2: AdaGroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
    activation: Activation,
}

impl Resnet {
    /// `middle` channels between the two convolutions, `outputs` behind them.
    fn new(
        build: &Builder,
        inputs: usize,
        middle: usize,
        outputs: usize,
        w: &Weights,
    ) -> Result<Self> {
        let eps = build.config.norm_eps;
        Ok(Self {
            norm1: AdaGroupNorm::new(build, inputs, eps, &w.pp("norm1"))?,
            conv1: Conv2d::new(ConvShape::same(inputs, middle, 3), true, &w.pp("conv1"))?,
            norm2: AdaGroupNorm::new(build, middle, eps, &w.pp("norm2"))?,
            conv2: Conv2d::new(ConvShape::same(middle, outputs, 3), true, &w.pp("conv2"))?,
            conv_shortcut: (inputs != outputs)
                .then(|| {
                    let shape = ConvShape::same(inputs, outputs, 1);
                    Conv2d::new(shape, false, &w.pp("conv_shortcut"))
                })
                .transpose()?,
            activation: build.activation,
        })
    }

    fn forward(&self, x: &FeatureMap, time: &Tensor) -> Result<FeatureMap> {
        let norm1 = self.norm1.then(time, self.activation)?;
        let hidden = self.conv1.forward_normed(x, &norm1, None)?;
        let norm2 = self.norm2.then(time, self.activation)?;
        match &self.conv_shortcut {
            Some(shortcut) => {
                let x = shortcut.forward(x)?;
                self.conv2.forward_normed(&hidden, &norm2, Some(&x))
            }
            None => self.conv2.forward_normed(&hidden, &norm2, Some(x)),
        }
    }
}

struct SelfAttention {
    norm1: AdaGroupNorm,
    /// Query, key and value side by side.
    qkv: Linear,
    to_out: Linear,
}

struct CrossAttention {
    number: usize,
    norm2: AdaGroupNorm,
    norm_cross: LayerNorm,
    to_q: Linear,
    /// Key and value side by side.
    to_kv: Linear,
    to_out: Linear,
}

/// Self-attention (at the lowest level only), then attention to the prompt. No feed-forward.
struct AttentionBlock {
    heads: usize,
    width: usize,
    self_attention: Option<SelfAttention>,
    cross_attention: CrossAttention,
    placement: Placement,
}

impl AttentionBlock {
    fn new(
        build: &mut Builder,
        level: usize,
        channels: usize,
        with_self_attention: bool,
        w: &Weights,
    ) -> Result<Self> {
        let head = build
            .config
            .attention_head_dim
            .get(level, "attention_head_dim")?;
        ensure!(
            head > 0 && channels >= head,
            "unet/config.json: attention_head_dim {head} does not fit {channels} channels"
        );
        let heads = channels / head;
        let width = heads * head;
        let context = build
            .config
            .cross_attention_dim
            .get(level, "cross_attention_dim")?;
        let self_attention = match with_self_attention {
            false => None,
            true => {
                let attn = w.pp("attn1");
                let parts = ["to_q", "to_k", "to_v"].map(|name| attn.pp(name));
                Some(SelfAttention {
                    norm1: AdaGroupNorm::new(build, channels, ATTENTION_NORM_EPS, &w.pp("norm1"))?,
                    qkv: Linear::joined(channels, &[width; 3], true, &parts)?,
                    to_out: Linear::new(width, channels, true, &attn.pp("to_out.0"))?,
                })
            }
        };
        let attn = w.pp("attn2");
        let parts = ["to_k", "to_v"].map(|name| attn.pp(name));
        let cross_attention = CrossAttention {
            number: build.cross_attentions,
            norm2: AdaGroupNorm::new(build, channels, ATTENTION_NORM_EPS, &w.pp("norm2"))?,
            norm_cross: LayerNorm::new(context, 1e-5, &attn.pp("norm_cross"))?,
            to_q: Linear::new(channels, width, true, &attn.pp("to_q"))?,
            to_kv: Linear::joined(context, &[width; 2], true, &parts)?,
            to_out: Linear::new(width, channels, true, &attn.pp("to_out.0"))?,
        };
        build.cross_attentions += 1;
        Ok(Self {
            heads,
            width,
            self_attention,
            cross_attention,
            placement: w.placement().clone(),
        })
    }

    /// Key and value of the cross-attention for a context (b, tokens, context width).
    fn keys_values(&self, context: &Tensor) -> Result<(Tensor, Tensor)> {
        let cross = &self.cross_attention;
        let both = cross.to_kv.forward(&cross.norm_cross.forward(context)?)?;
        let part = |i: usize| both.narrow(2, i * self.width, self.width)?.contiguous();
        Ok((part(0)?, part(1)?))
    }

    fn forward(&self, x: &FeatureMap, time: &Tensor, prompted: &Prompted) -> Result<FeatureMap> {
        let mut x = x.clone();
        if let Some(layer) = &self.self_attention {
            let normed = layer.norm1.then(time, Activation::None)?.forward(&x)?;
            x = map_tokens(&x, |tokens| {
                let qkv = layer.qkv.forward(&normed.tokens()?)?;
                let part = |i: usize| qkv.narrow(2, i * self.width, self.width)?.contiguous();
                let (q, k, v) = (part(0)?, part(1)?, part(2)?);
                let y = attention(&q, &k, &v, self.heads, false, &self.placement)?;
                layer.to_out.forward_add(&y, Some(tokens))
            })?;
        }
        let layer = &self.cross_attention;
        let (k, v) = &prompted.keys_values[layer.number];
        let normed = layer.norm2.then(time, Activation::None)?.forward(&x)?;
        map_tokens(&x, |tokens| {
            let q = layer.to_q.forward(&normed.tokens()?)?;
            let y = attention(&q, k, v, self.heads, false, &self.placement)?;
            layer.to_out.forward_add(&y, Some(tokens))
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Resample {
    Half,
    Double,
    Not,
}

/// A level on the way down or up: resnets, each followed by attention where the block has it.
struct Block {
    resnets: Vec<Resnet>,
    /// Empty, or one a resnet.
    attentions: Vec<AttentionBlock>,
    resample: Resample,
    /// On the way down: whether the state before resampling is handed to the block on the way up.
    gives_skip: bool,
}

/// Whether a block attends to the prompt, by the name of its type.
fn attends(kind: &str, plain: &str, attending: &str, key: &str) -> Result<bool> {
    match kind {
        _ if kind == plain => Ok(false),
        _ if kind == attending => Ok(true),
        other => bail!(
            "unet/config.json: {key} holds `{other}`, which the latent upscaler does not have ({plain}, {attending})"
        ),
    }
}

impl Block {
    fn down(build: &mut Builder, level: usize, w: &Weights) -> Result<Self> {
        let config = build.config;
        let attending = attends(
            &config.down_block_types[level],
            "KDownBlock2D",
            "KCrossAttnDownBlock2D",
            "down_block_types",
        )?;
        let channels = config.block_out_channels[level];
        let inputs = config.block_out_channels[level.saturating_sub(1)];
        let last = level + 1 == config.block_out_channels.len();
        let (mut resnets, mut attentions) = (Vec::new(), Vec::new());
        for i in 0..config.layers_per_block.get(level, "layers_per_block")? {
            let inputs = if i == 0 { inputs } else { channels };
            let w_resnet = w.pp("resnets").pp(i);
            resnets.push(Resnet::new(build, inputs, channels, channels, &w_resnet)?);
            if attending {
                let w = w.pp("attentions").pp(i);
                attentions.push(AttentionBlock::new(build, level, channels, last, &w)?);
            }
        }
        Ok(Self {
            resnets,
            attentions,
            resample: if last { Resample::Not } else { Resample::Half },
            // diffusers' KCrossAttnDownBlock2D without a downsampler returns no states
            gives_skip: !(last && attending),
        })
    }

    fn up(build: &mut Builder, index: usize, w: &Weights) -> Result<Self> {
        let config = build.config;
        let attending = attends(
            &config.up_block_types[index],
            "KUpBlock2D",
            "KCrossAttnUpBlock2D",
            "up_block_types",
        )?;
        let levels = config.block_out_channels.len();
        let level = levels - 1 - index;
        let channels = config.block_out_channels[level];
        let outputs = config.block_out_channels[level.saturating_sub(1)];
        // diffusers tells the first block, and with it self-attention and the absence of a skip, by these widths
        let first = attending && outputs == channels && channels == build.time_width;
        let inputs = if first { channels } else { 2 * channels };
        let layers = config.layers_per_block.get(level, "layers_per_block")?;
        let (mut resnets, mut attentions) = (Vec::new(), Vec::new());
        for i in 0..layers {
            let inputs = if i == 0 { inputs } else { channels };
            let end = i + 1 == layers;
            let outputs = if end { outputs } else { channels };
            // KUpBlock2D's last resnet is narrow from its first convolution on, KCrossAttnUpBlock2D's from the second
            let middle = if attending { channels } else { outputs };
            let w_resnet = w.pp("resnets").pp(i);
            resnets.push(Resnet::new(build, inputs, middle, outputs, &w_resnet)?);
            if attending {
                let w = w.pp("attentions").pp(i);
                attentions.push(AttentionBlock::new(build, level, outputs, first, &w)?);
            }
        }
        Ok(Self {
            resnets,
            attentions,
            resample: if index + 1 == levels {
                Resample::Not
            } else {
                Resample::Double
            },
            gives_skip: false,
        })
    }

    /// The block's states before and after resampling.
    fn forward(
        &self,
        x: FeatureMap,
        time: &Tensor,
        prompted: &Prompted,
    ) -> Result<(FeatureMap, FeatureMap)> {
        let mut x = x;
        for (i, resnet) in self.resnets.iter().enumerate() {
            x = resnet.forward(&x, time)?;
            if let Some(attention) = self.attentions.get(i) {
                x = attention.forward(&x, time, prompted)?;
            }
        }
        let resampled = match self.resample {
            Resample::Half => downsample(&x)?,
            Resample::Double => upsample(&x)?,
            Resample::Not => x.clone(),
        };
        Ok((x, resampled))
    }
}

/// `linear_2(act(linear_1(features + cond_proj(condition))))`, with an activation behind it.
struct TimeEmbedding {
    /// Frequencies of the Fourier features, (features / 2), float32.
    frequencies: Tensor,
    cosine_first: bool,
    cond_proj: Option<Linear>,
    linear_1: Linear,
    activation: Activation,
    linear_2: Linear,
    post_activation: Activation,
}

/// The denoising network.
pub struct UNet {
    conv_in: Conv2d,
    time: TimeEmbedding,
    down_blocks: Vec<Block>,
    up_blocks: Vec<Block>,
    norm_out: Option<NormAct>,
    conv_out: Conv2d,
    placement: Placement,
    pub config: UNetConfig,
}

impl UNet {
    /// Reads `unet/`.
    ///
    /// # Errors
    /// A file is missing or damaged, a tensor does not fit config.json, or the configuration is not a latent upscaler's.
    pub fn load(files: &ModelFiles, placement: &Placement) -> Result<Self> {
        let config: UNetConfig = files.json("unet/config.json")?;
        let w = files.weights("unet", "diffusion_pytorch_model", placement)?;
        Self::new(config, &w)
    }

    fn new(config: UNetConfig, w: &Weights) -> Result<Self> {
        config.check()?;
        let first = config.block_out_channels[0];
        let time_width = config.time_embedding_dim.unwrap_or(2 * first);
        let activation = Activation::from_name(&config.act_fn)?;
        let mut build = Builder {
            config: &config,
            activation,
            time_width,
            cross_attentions: 0,
        };
        let embedding = w.pp("time_embedding");
        let time = TimeEmbedding {
            frequencies: w
                .pp("time_proj")
                .tensor_in(&[time_width / 2], "weight", DType::F32)?,
            cosine_first: config.flip_sin_to_cos,
            cond_proj: config
                .time_cond_proj_dim
                .map(|dim| Linear::new(dim, time_width, false, &embedding.pp("cond_proj")))
                .transpose()?,
            linear_1: Linear::new(time_width, time_width, true, &embedding.pp("linear_1"))?,
            activation,
            linear_2: Linear::new(time_width, time_width, true, &embedding.pp("linear_2"))?,
            post_activation: match &config.timestep_post_act {
                Some(name) => Activation::from_name(name)?,
                None => Activation::None,
            },
        };
        let levels = 0..config.block_out_channels.len();
        let down_blocks = levels
            .clone()
            .map(|level| Block::down(&mut build, level, &w.pp("down_blocks").pp(level)))
            .collect::<Result<_>>()?;
        let up_blocks = levels
            .map(|index| Block::up(&mut build, index, &w.pp("up_blocks").pp(index)))
            .collect::<Result<_>>()?;
        let norm_out = config
            .norm_num_groups
            .map(|groups| -> Result<NormAct> {
                let norm = GroupNorm::new(groups, first, config.norm_eps, &w.pp("conv_norm_out"))?;
                Ok(norm.then(activation))
            })
            .transpose()?;
        let conv = |inputs: usize, outputs: usize, kernel: usize, name: &str| {
            Conv2d::new(ConvShape::same(inputs, outputs, kernel), true, &w.pp(name))
        };
        Ok(Self {
            conv_in: conv(config.in_channels, first, config.conv_in_kernel, "conv_in")?,
            time,
            down_blocks,
            up_blocks,
            norm_out,
            conv_out: conv(
                first,
                config.out_channels,
                config.conv_out_kernel,
                "conv_out",
            )?,
            placement: w.placement().clone(),
            config,
        })
    }

    /// What holds for all steps of an image: keys and values of its prompt, the projected condition.
    ///
    /// The condition is the Fourier features of noise level 0, 64 ones (cosines) and 64 zeros (sines), before
    /// the pooled prompt (pipeline_stable_diffusion_latent_upscale.py, diffusers 0.42).
    ///
    /// # Errors
    /// The prompt's width is not what this network was made for.
    pub fn prompted(&self, conditioning: &Conditioning) -> Result<Prompted> {
        let placement = &self.placement;
        let place = |t: &Tensor| t.to_device(&placement.device)?.to_dtype(placement.dtype);
        let (context, pooled) = (place(&conditioning.context)?, place(&conditioning.pooled)?);
        let (b, width) = pooled.dims2()?;
        let Some(projection) = &self.time.cond_proj else {
            bail!(
                "unet/config.json: time_cond_proj_dim is missing; the latent upscaler's prompt enters there"
            );
        };
        let expected = self.config.time_cond_proj_dim.unwrap_or(0);
        let features = 2 * NOISE_LEVEL_FEATURES;
        ensure!(
            features + width == expected,
            "unet/config.json: time_cond_proj_dim is {expected}, expected {features} + {width}, the text encoder's width"
        );
        let level = [(1.0, b), (0.0, b)].map(|(value, b)| {
            Tensor::full(value as f32, (b, NOISE_LEVEL_FEATURES), &placement.device)?
                .to_dtype(placement.dtype)
        });
        let [ones, zeros] = level;
        let condition = Tensor::cat(&[&ones?, &zeros?, &pooled], 1)?;
        Ok(Prompted {
            keys_values: self
                .blocks()
                .flat_map(|block| &block.attentions)
                .map(|attention| attention.keys_values(&context))
                .collect::<Result<_>>()?,
            condition: projection.forward(&condition)?,
        })
    }

    fn blocks(&self) -> impl Iterator<Item = &Block> {
        self.down_blocks.iter().chain(&self.up_blocks)
    }

    /// The time embedding (b, time width) for one network time, 0.25 ln(sigma).
    fn embed_time(&self, time: f32, prompted: &Prompted) -> Result<Tensor> {
        let parts = &self.time;
        let angles = (&parts.frequencies * (f64::from(time) * std::f64::consts::TAU))?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let features = match parts.cosine_first {
            true => Tensor::cat(&[cos, sin], 0)?,
            false => Tensor::cat(&[sin, cos], 0)?,
        };
        let features = features.to_dtype(self.placement.dtype)?;
        let x = prompted.condition.broadcast_add(&features)?;
        let x = parts
            .activation
            .apply(&parts.linear_1.forward(&x)?, &self.placement)?;
        let x = parts.linear_2.forward(&x)?;
        parts.post_activation.apply(&x, &self.placement)
    }

    /// One call: `input` (b, in_channels, h, w), the scaled noisy latents and the condition; `time` is
    /// 0.25 ln(sigma); out comes (b, out_channels, h, w). Sides are multiples of
    /// [`UNetConfig::side_multiple`] and no smaller than [`UNetConfig::side_minimum`].
    ///
    /// # Errors
    /// The input does not have the shape described.
    pub fn forward(&self, input: &Tensor, time: f32, prompted: &Prompted) -> Result<Tensor> {
        let time = self.embed_time(time, prompted)?;
        let mut x = self
            .conv_in
            .forward(&FeatureMap::from_nchw(input, &self.placement)?)?;
        let mut skips = Vec::with_capacity(self.down_blocks.len());
        for block in &self.down_blocks {
            let (before, resampled) = block.forward(x, &time, prompted)?;
            skips.push(block.gives_skip.then_some(before));
            x = resampled;
        }
        for block in &self.up_blocks {
            if let Some(skip) = skips.pop().flatten() {
                x = x.cat_channels(&skip)?;
            }
            x = block.forward(x, &time, prompted)?.1;
        }
        let y = match &self.norm_out {
            Some(norm) => self.conv_out.forward_normed(&x, norm, None)?,
            None => self.conv_out.forward(&x)?,
        };
        y.to_nchw()
    }
}

/// Fourier features of the noise level are this many cosines and as many sines (the original's
/// `low_res_noise_embed` has 64 frequencies).
const NOISE_LEVEL_FEATURES: usize = 64;
