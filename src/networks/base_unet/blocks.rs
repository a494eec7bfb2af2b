//! The levels of the base UNet: resnets shifted by the time, transformers that attend to the prompt.

use anyhow::Result;
use candle_core::{DType, Tensor};

use super::config::attends;
use super::{BaseUNetConfig, Prompted, Step};
use crate::device::Placement;
use crate::layers::bands::{Residual, Room, Source, Stored};
use crate::layers::{
    Activation, Conv2d, ConvShape, GroupNorm, LayerNorm, Linear, Mask, NormAct, Padding, attention,
    gate, map_tokens, part,
};
use crate::model::Weights;

/// Of a transformer's norm over the map, which diffusers does not take from the configuration.
const MAP_NORM_EPS: f64 = 1e-6;
/// Of its norms over tokens.
const TOKEN_NORM_EPS: f64 = 1e-5;
/// Tokens whose feed-forward, eight times as wide as they are, is computed at a time.
const TOKENS: usize = 1 << 13;

/// What the blocks share while they are built.
pub struct Builder<'a> {
    config: &'a BaseUNetConfig,
    activation: Activation,
    /// Of each resnet built so far: channels of its first convolution, and the weights of the layer that shifts it by the time.
    pub shifts: Vec<(usize, Weights)>,
    /// Built so far: each takes a number.
    transformers: usize,
}

impl<'a> Builder<'a> {
    pub fn new(config: &'a BaseUNetConfig, activation: Activation) -> Self {
        Self {
            config,
            activation,
            shifts: Vec::new(),
            transformers: 0,
        }
    }
}

/// Two convolutions, the first shifted by the time.
pub struct Resnet {
    number: usize,
    norm1: NormAct,
    conv1: Conv2d,
    norm2: NormAct,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
}

impl Resnet {
    fn new(build: &mut Builder, inputs: usize, outputs: usize, w: &Weights) -> Result<Self> {
        let config = build.config;
        let norm = |channels: usize, name: &str| -> Result<NormAct> {
            let (groups, eps) = (config.norm_num_groups, config.norm_eps);
            let norm = GroupNorm::new(groups, channels, eps, &w.pp(name))?;
            Ok(norm.then(build.activation))
        };
        let shortcut = || Conv2d::new(ConvShape::same(inputs, outputs, 1), &w.pp("conv_shortcut"));
        let resnet = Self {
            number: build.shifts.len(),
            norm1: norm(inputs, "norm1")?,
            conv1: Conv2d::new(ConvShape::same(inputs, outputs, 3), &w.pp("conv1"))?,
            norm2: norm(outputs, "norm2")?,
            conv2: Conv2d::new(ConvShape::same(outputs, outputs, 3), &w.pp("conv2"))?,
            conv_shortcut: (inputs != outputs).then(shortcut).transpose()?,
        };
        let shift = w.pp("time_emb_proj").in_dtype(DType::F32);
        build.shifts.push((outputs, shift));
        Ok(resnet)
    }

    /// Channels of the first convolution.
    pub fn channels(&self) -> usize {
        self.conv1.outputs()
    }

    /// The first convolution at every time of a run, by its shifts, (times, channels), float32.
    pub fn conv1_at_each(&self, shifts: &Tensor) -> Result<Vec<Conv2d>> {
        self.conv1.shifted_by_each(shifts)
    }

    fn forward<'a>(&'a self, x: Source<'a>, step: &'a Step, room: &Room) -> Result<Source<'a>> {
        let block = Residual {
            norm1: self.norm1.clone(),
            conv1: &step.conv1[self.number],
            norm2: self.norm2.clone(),
            conv2: &self.conv2,
            shortcut: self.conv_shortcut.as_ref(),
        };
        block.forward(x, room)
    }
}

/// Self-attention, attention to the prompt and a feed-forward of every position.
pub struct Transformer {
    pub number: usize,
    heads: usize,
    width: usize,
    norm: NormAct,
    proj_in: Linear,
    norm1: LayerNorm,
    /// Query, key and value side by side.
    qkv: Linear,
    to_out1: Linear,
    norm2: LayerNorm,
    to_q: Linear,
    /// Key and value side by side.
    to_kv: Linear,
    to_out2: Linear,
    norm3: LayerNorm,
    /// Values and their gates side by side.
    proj: Linear,
    net: Linear,
    proj_out: Linear,
    placement: Placement,
}

impl Transformer {
    fn new(build: &mut Builder, level: usize, channels: usize, w: &Weights) -> Result<Self> {
        let config = build.config;
        let norm = GroupNorm::new(
            config.norm_num_groups,
            channels,
            MAP_NORM_EPS,
            &w.pp("norm"),
        )?;
        let block = w.pp("transformer_blocks").pp(0);
        let (attn1, attn2) = (block.pp("attn1"), block.pp("attn2"));
        let qkv = ["to_q", "to_k", "to_v"].map(|name| attn1.pp(name));
        let kv = ["to_k", "to_v"].map(|name| attn2.pp(name));
        let context = config.cross_attention_dim;
        let linear = |name: &str, w: &Weights| Linear::new(channels, channels, &w.pp(name));
        let token_norm = |name: &str| LayerNorm::new(channels, TOKEN_NORM_EPS, &block.pp(name));
        let inner = 4 * channels;
        let transformer = Self {
            number: build.transformers,
            heads: config.heads(level)?,
            width: channels,
            norm: norm.then(Activation::None),
            proj_in: linear("proj_in", w)?,
            norm1: token_norm("norm1")?,
            qkv: Linear::joined_without_bias(channels, &[channels; 3], &qkv)?,
            to_out1: linear("to_out.0", &attn1)?,
            norm2: token_norm("norm2")?,
            to_q: Linear::without_bias(channels, channels, &attn2.pp("to_q"))?,
            to_kv: Linear::joined_without_bias(context, &[channels; 2], &kv)?,
            to_out2: linear("to_out.0", &attn2)?,
            norm3: token_norm("norm3")?,
            proj: Linear::new(channels, 2 * inner, &block.pp("ff.net.0.proj"))?,
            net: Linear::new(inner, channels, &block.pp("ff.net.2"))?,
            proj_out: linear("proj_out", w)?,
            placement: w.placement().clone(),
        };
        build.transformers += 1;
        Ok(transformer)
    }

    /// Key and value of the cross-attention for a context (b, tokens, context width).
    pub fn keys_values(&self, context: &Tensor) -> Result<(Tensor, Tensor)> {
        let both = self.to_kv.forward(context)?;
        let part = |index| part(&both, self.width, index, &self.placement);
        Ok((part(0)?, part(1)?))
    }

    fn forward<'a>(&self, x: Source<'a>, prompted: &Prompted) -> Result<Source<'a>> {
        let (map, _) = x.into_whole()?;
        let normed = self.norm.forward(&map)?;
        let (key, value) = &prompted.keys_values[self.number];
        let y = map_tokens(&map, |input| {
            let x = self.proj_in.forward(&normed.tokens()?)?;
            let x = self.attend_to_itself(&x)?;
            let q = self.to_q.forward(&self.norm2.forward(&x)?)?;
            let y = attention(&q, key, value, self.heads, Mask::None, &self.placement)?;
            let x = self.to_out2.forward_add(&y, Some(&x))?;
            let x = self.feed_forward(&x)?;
            self.proj_out.forward_add(&x, Some(input))
        })?;
        Ok(Box::new(Stored::whole(y)?))
    }

    fn attend_to_itself(&self, x: &Tensor) -> Result<Tensor> {
        let qkv = self.qkv.forward(&self.norm1.forward(x)?)?;
        let part = |index| part(&qkv, self.width, index, &self.placement);
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let y = attention(&q, &k, &v, self.heads, Mask::None, &self.placement)?;
        self.to_out1.forward_add(&y, Some(x))
    }

    /// Some tokens at a time: what is between the two layers would be the largest tensor of all.
    fn feed_forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, n, _) = x.dims3()?;
        let some = |x: &Tensor| -> Result<Tensor> {
            let hidden = self.proj.forward(&self.norm3.forward(x)?)?;
            let hidden = gate(&hidden, Activation::Gelu, &self.placement)?;
            self.net.forward_add(&hidden, Some(x))
        };
        let at_once = (TOKENS / b).max(1);
        if n <= at_once {
            return some(x);
        }
        let parts: Vec<Tensor> = (0..n)
            .step_by(at_once)
            .map(|first| some(&x.narrow(1, first, at_once.min(n - first))?.contiguous()?))
            .collect::<Result<_>>()?;
        Ok(Tensor::cat(&parts, 1)?)
    }
}

/// A level on the way down or up: resnets, each followed by a transformer where the block has them, and what leads to the next level.
pub struct Level {
    pub resnets: Vec<Resnet>,
    /// Empty, or one a resnet.
    pub transformers: Vec<Transformer>,
    pub resample: Option<Conv2d>,
}

impl Level {
    pub fn down(build: &mut Builder, level: usize, w: &Weights) -> Result<Self> {
        let config = build.config;
        let channels = config.block_out_channels[level];
        let inputs = config.block_out_channels[level.saturating_sub(1)];
        let mut made = Self::empty();
        for index in 0..config.layers_per_block {
            let inputs = if index == 0 { inputs } else { channels };
            let attends = attends(&config.down_block_types[level]);
            made.push(
                build,
                (inputs, channels),
                attends.then_some(level),
                index,
                w,
            )?;
        }
        if level + 1 < config.levels() {
            let shape = ConvShape {
                stride: 2,
                padding: Padding {
                    before: 1,
                    after: 1,
                },
                ..ConvShape::same(channels, channels, 3)
            };
            made.resample = Some(Conv2d::new(shape, &w.pp("downsamplers.0.conv"))?);
        }
        Ok(made)
    }

    pub fn up(build: &mut Builder, index: usize, w: &Weights) -> Result<Self> {
        let config = build.config;
        let levels = config.levels();
        let level = levels - 1 - index;
        let width = |level: usize| config.block_out_channels[level];
        let channels = width(level);
        let mut made = Self::empty();
        for layer in 0..=config.layers_per_block {
            let x = if layer == 0 {
                width((level + 1).min(levels - 1))
            } else {
                channels
            };
            let last = layer == config.layers_per_block;
            let skip = if last {
                width(level.saturating_sub(1))
            } else {
                channels
            };
            let attends = attends(&config.up_block_types[index]);
            made.push(
                build,
                (x + skip, channels),
                attends.then_some(level),
                layer,
                w,
            )?;
        }
        if level > 0 {
            let shape = ConvShape::same(channels, channels, 3);
            made.resample = Some(Conv2d::new(shape, &w.pp("upsamplers.0.conv"))?);
        }
        Ok(made)
    }

    fn empty() -> Self {
        Self {
            resnets: Vec::new(),
            transformers: Vec::new(),
            resample: None,
        }
    }

    /// A resnet from so many channels to so many, and where the level attends a transformer with this level's heads.
    fn push(
        &mut self,
        build: &mut Builder,
        (inputs, outputs): (usize, usize),
        attends: Option<usize>,
        index: usize,
        w: &Weights,
    ) -> Result<()> {
        let resnet = w.pp("resnets").pp(index);
        self.resnets
            .push(Resnet::new(build, inputs, outputs, &resnet)?);
        if let Some(level) = attends {
            let w = w.pp("attentions").pp(index);
            self.transformers
                .push(Transformer::new(build, level, outputs, &w)?);
        }
        Ok(())
    }

    /// Resnet `index` and what follows it.
    pub fn layer<'a>(
        &'a self,
        index: usize,
        x: Source<'a>,
        step: &'a Step,
        prompted: &Prompted,
        room: &Room,
    ) -> Result<Source<'a>> {
        let x = self.resnets[index].forward(x, step, room)?;
        match self.transformers.get(index) {
            Some(transformer) => transformer.forward(x, prompted),
            None => Ok(x),
        }
    }
}

/// Between the ways down and up: resnet, transformer, resnet.
pub struct Middle {
    pub resnets: [Resnet; 2],
    pub transformer: Transformer,
}

impl Middle {
    pub fn new(build: &mut Builder, w: &Weights) -> Result<Self> {
        let level = build.config.levels() - 1;
        let channels = build.config.block_out_channels[level];
        let mut resnet =
            |index: usize| Resnet::new(build, channels, channels, &w.pp("resnets").pp(index));
        let resnets = [resnet(0)?, resnet(1)?];
        let transformer = Transformer::new(build, level, channels, &w.pp("attentions.0"))?;
        Ok(Self {
            resnets,
            transformer,
        })
    }

    pub fn forward<'a>(
        &'a self,
        x: Source<'a>,
        step: &'a Step,
        prompted: &Prompted,
        room: &Room,
    ) -> Result<Source<'a>> {
        let [first, second] = &self.resnets;
        let x = first.forward(x, step, room)?;
        second.forward(self.transformer.forward(x, prompted)?, step, room)
    }
}
