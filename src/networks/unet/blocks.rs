//! The levels of the UNet: resnets, attention, resampling.

use anyhow::{Result, bail, ensure};
use candle_core::{DType, Tensor};

use super::{Prompted, UNetConfig};
use crate::device::Placement;
use crate::layers::bands::{Norm, Resampled, Residual, Room, Source, Stored, map_bands, store};
use crate::layers::{
    Activation, Conv2d, ConvShape, FeatureMap, LayerNorm, Linear, Mask, NormAct, ScaleShift,
    attention, map_tokens, part, shapes,
};
use crate::model::Weights;

/// Of every prompt that CLIP's text encoder takes, padding included.
const PROMPT_TOKENS: usize = 77;
/// Channels of one normalisation group (`resnet_group_size`, k-diffusion's and diffusers' constant).
const GROUP_SIZE: usize = 32;
/// AdaGroupNorm's eps inside attention blocks, which diffusers does not take from the configuration.
const ATTENTION_NORM_EPS: f64 = 1e-5;

/// What the blocks share while they are built.
pub struct Builder<'a> {
    pub config: &'a UNetConfig,
    pub activation: Activation,
    pub time_width: usize,
    /// Cross-attentions built so far: each takes a number, by which its keys and values are found.
    pub cross_attentions: usize,
    /// Channels and linear layer of the adaptive norms built so far: each takes a number, by which its scale and shift are found.
    pub norms: Vec<(usize, Weights)>,
}

/// `norm(x) * (1 + scale) + shift`, scale and shift from the time embedding.
struct AdaGroupNorm {
    groups: usize,
    eps: f64,
    number: usize,
}

impl AdaGroupNorm {
    fn new(build: &mut Builder, channels: usize, eps: f64, w: &Weights) -> Result<Self> {
        let groups = (channels / GROUP_SIZE).max(1);
        ensure!(
            channels.is_multiple_of(groups),
            "unet/config.json: block_out_channels: {channels} channels are not a multiple of the {groups} groups of {GROUP_SIZE} that they are normalised in"
        );
        build.norms.push((channels, w.pp("linear")));
        Ok(Self {
            groups,
            eps,
            number: build.norms.len() - 1,
        })
    }

    /// `norms`: of all norms, in the order of their numbers.
    fn then(&self, norms: &[ScaleShift], activation: Activation) -> NormAct {
        let (scale, shift) = norms[self.number].clone();
        NormAct {
            groups: self.groups,
            eps: self.eps,
            scale,
            shift,
            activation,
        }
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
        build: &mut Builder,
        inputs: usize,
        middle: usize,
        outputs: usize,
        w: &Weights,
    ) -> Result<Self> {
        let eps = build.config.norm_eps;
        Ok(Self {
            norm1: AdaGroupNorm::new(build, inputs, eps, &w.pp("norm1"))?,
            conv1: Conv2d::new(ConvShape::same(inputs, middle, 3), &w.pp("conv1"))?,
            norm2: AdaGroupNorm::new(build, middle, eps, &w.pp("norm2"))?,
            conv2: Conv2d::new(ConvShape::same(middle, outputs, 3), &w.pp("conv2"))?,
            conv_shortcut: (inputs != outputs)
                .then(|| {
                    let shape = ConvShape::same(inputs, outputs, 1);
                    Conv2d::without_bias(shape, &w.pp("conv_shortcut"))
                })
                .transpose()?,
            activation: build.activation,
        })
    }

    /// `x` is this resnet's own: its lines go as soon as nothing else reads them.
    fn forward<'a>(
        &'a self,
        x: Source<'a>,
        norms: &[ScaleShift],
        room: &Room,
    ) -> Result<Source<'a>> {
        let block = Residual {
            norm1: self.norm1.then(norms, self.activation),
            conv1: &self.conv1,
            norm2: self.norm2.then(norms, self.activation),
            conv2: &self.conv2,
            shortcut: self.conv_shortcut.as_ref(),
        };
        block.forward(x, room)
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
pub struct AttentionBlock {
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
            "unet/config.json: attention_head_dim {head} does not fit the {channels} channels of block_out_channels"
        );
        let heads = channels / head;
        let width = heads * head;
        w.agrees(
            &format!("unet/config.json: attention_head_dim is {head}: the width of all heads"),
            width,
            "attn2.to_q.weight",
            0,
        )?;
        let context = build
            .config
            .cross_attention_dim
            .get(level, "cross_attention_dim")?;
        let self_attention = || -> Result<SelfAttention> {
            let attn = w.pp("attn1");
            let parts = ["to_q", "to_k", "to_v"].map(|name| attn.pp(name));
            Ok(SelfAttention {
                norm1: AdaGroupNorm::new(build, channels, ATTENTION_NORM_EPS, &w.pp("norm1"))?,
                qkv: Linear::joined(channels, &[width; 3], &parts)?,
                to_out: Linear::new(width, channels, &attn.pp("to_out.0"))?,
            })
        };
        let self_attention = with_self_attention.then(self_attention).transpose()?;
        let attn = w.pp("attn2");
        let parts = ["to_k", "to_v"].map(|name| attn.pp(name));
        let cross_attention = CrossAttention {
            number: build.cross_attentions,
            norm2: AdaGroupNorm::new(build, channels, ATTENTION_NORM_EPS, &w.pp("norm2"))?,
            norm_cross: LayerNorm::new(context, 1e-5, &attn.pp("norm_cross"))?,
            to_q: Linear::new(channels, width, &attn.pp("to_q"))?,
            to_kv: Linear::joined_of_few_rows(context, &[width; 2], &parts)?,
            to_out: Linear::new(width, channels, &attn.pp("to_out.0"))?,
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
    pub fn keys_values(&self, context: &Tensor) -> Result<(Tensor, Tensor)> {
        let cross = &self.cross_attention;
        let both = cross.to_kv.forward(&cross.norm_cross.forward(context)?)?;
        let part = |index| part(&both, self.width, index, &self.placement);
        Ok((part(0)?, part(1)?))
    }

    /// The same of a network of shapes, for the tokens of a prompt.
    pub fn keys_values_of_shapes(&self, b: usize, dtype: DType) -> Result<(Tensor, Tensor)> {
        let tokens = || shapes::view((b, PROMPT_TOKENS, self.width), dtype);
        Ok((tokens()?, tokens()?))
    }

    fn forward<'a>(
        &self,
        mut x: Source<'a>,
        norms: &[ScaleShift],
        prompted: &Prompted,
        room: &Room,
    ) -> Result<Source<'a>> {
        if let Some(layer) = &self.self_attention {
            let (map, _) = x.into_whole()?;
            let normed = layer.norm1.then(norms, Activation::None).forward(&map)?;
            let y = map_tokens(&map, |tokens| {
                let qkv = layer.qkv.forward(&normed.tokens()?)?;
                let part = |index| part(&qkv, self.width, index, &self.placement);
                let (q, k, v) = (part(0)?, part(1)?, part(2)?);
                let y = attention(&q, &k, &v, self.heads, Mask::None, &self.placement)?;
                layer.to_out.forward_add(&y, Some(tokens))
            })?;
            x = Box::new(Stored::whole(y)?);
        }
        let layer = &self.cross_attention;
        let (k, v) = &prompted.keys_values[layer.number];
        let attend = |map: &FeatureMap, normed: &FeatureMap| {
            map_tokens(map, |tokens| {
                let q = layer.to_q.forward(&normed.tokens()?)?;
                let y = attention(&q, k, v, self.heads, Mask::None, &self.placement)?;
                layer.to_out.forward_add(&y, Some(tokens))
            })
        };
        let norm = layer.norm2.then(norms, Activation::None);
        if x.is_whole() {
            let (map, _) = x.into_whole()?;
            let normed = norm.forward(&map)?;
            return Ok(Box::new(Stored::whole(attend(&map, &normed)?)?));
        }
        let norm = Norm::of(&*x, norm, room)?;
        map_bands(x, room, |window, lines, x| {
            let normed = norm.apply_to(x, window, lines.clone())?;
            attend(&window.exactly(lines)?, &normed)
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
pub struct Block {
    resnets: Vec<Resnet>,
    /// Empty, or one a resnet.
    pub attentions: Vec<AttentionBlock>,
    resample: Resample,
    /// On the way down: whether the state before resampling is handed to the block on the way up.
    pub gives_skip: bool,
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
    pub fn down(build: &mut Builder, level: usize, w: &Weights) -> Result<Self> {
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

    pub fn up(build: &mut Builder, index: usize, w: &Weights) -> Result<Self> {
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

    /// The block's state before resampling.
    pub fn forward<'a>(
        &'a self,
        mut x: Source<'a>,
        norms: &[ScaleShift],
        prompted: &Prompted,
        room: &Room,
    ) -> Result<Source<'a>> {
        for (i, resnet) in self.resnets.iter().enumerate() {
            x = resnet.forward(x, norms, room)?;
            if let Some(attention) = self.attentions.get(i) {
                x = attention.forward(x, norms, prompted, room)?;
            }
        }
        Ok(x)
    }

    /// The state as the next block takes it.
    pub fn resampled<'a>(&self, x: Source<'a>, room: &Room) -> Result<Source<'a>> {
        let up = match self.resample {
            Resample::Half => false,
            Resample::Double => true,
            Resample::Not => return Ok(x),
        };
        store(Box::new(Resampled { input: x, up }), None, room)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn widths_that_do_not_divide_into_groups_are_refused_by_their_key() {
        let empty: &[u8] = b"\x02\0\0\0\0\0\0\0{}";
        let placement = Placement::new(&Device::Cpu, DType::F32);
        let w = Weights::built_in("empty", empty, &placement).unwrap();
        let config = UNetConfig::default();
        let mut build = Builder {
            config: &config,
            activation: Activation::Gelu,
            time_width: 64,
            cross_attentions: 0,
            norms: Vec::new(),
        };
        for (channels, refused) in [
            (31, false),
            (63, false),
            (64, false),
            (65, true),
            (97, true),
        ] {
            let error = AdaGroupNorm::new(&mut build, channels, 1e-5, &w).err();
            let named = error.is_some_and(|e| e.to_string().contains("block_out_channels"));
            assert_eq!(named, refused, "{channels}");
        }
    }
}
