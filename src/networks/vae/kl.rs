//! Stable Diffusion's KL autoencoder: images to latents and back.

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use serde::Deserialize;

use super::{Posterior, lines_of_picture};
use crate::device::Placement;
use crate::layers::bands::{
    Norm, Planes, Residual, Room, Size, Source, Stored, conv, keep_between, map_bands,
    normed_lines, store,
};
use crate::layers::{
    Activation, Conv2d, ConvShape, FeatureMap, GroupNorm, Linear, Mask, NormAct, Padding,
    TokensInParts, attention, map_tokens,
};
use crate::model::{MOST_CHANNELS, MOST_LAYERS, MOST_LEVELS, Weights, vae_name, within};

/// Positions that attend to the keys of one window, in each direction: where all of a map is too much.
const TILE: usize = 64;
/// The eps of every norm in diffusers' AutoencoderKL.
const EPS: f64 = 1e-6;

/// `vae/config.json`; absent keys take the defaults of diffusers' AutoencoderKL.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct KlConfig {
    pub in_channels: usize,
    pub out_channels: usize,
    pub latent_channels: usize,
    pub block_out_channels: Vec<usize>,
    pub layers_per_block: usize,
    pub norm_num_groups: usize,
    pub act_fn: String,
    /// Latents are stored times this, so that their spread is near 1.
    pub scaling_factor: f64,
    pub use_quant_conv: bool,
    pub use_post_quant_conv: bool,
    pub mid_block_add_attention: bool,
}

impl Default for KlConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            latent_channels: 4,
            block_out_channels: vec![64],
            layers_per_block: 1,
            norm_num_groups: 32,
            act_fn: "silu".into(),
            scaling_factor: 0.18215,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

impl KlConfig {
    /// # Errors
    /// A number that no such network has.
    pub(super) fn check_numbers(&self) -> Result<()> {
        let within =
            |key: &str, value, range| within(&format!("vae/config.json: {key}"), value, range);
        let widths = &self.block_out_channels;
        within(
            "the number of block_out_channels",
            widths.len(),
            1..=MOST_LEVELS,
        )?;
        for &width in widths {
            within("block_out_channels", width, 1..=MOST_CHANNELS)?;
        }
        // Pictures are RGB on both sides.
        within("in_channels", self.in_channels, 3..=3)?;
        within("out_channels", self.out_channels, 3..=3)?;
        within("latent_channels", self.latent_channels, 1..=MOST_CHANNELS)?;
        within("layers_per_block", self.layers_per_block, 1..=MOST_LAYERS)?;
        within("norm_num_groups", self.norm_num_groups, 1..=MOST_CHANNELS)?;
        let groups = self.norm_num_groups;
        for width in widths {
            ensure!(
                width.is_multiple_of(groups),
                "vae/config.json: norm_num_groups is {groups}, which does not divide the {width} of block_out_channels"
            );
        }
        // Stable Diffusion's are 0.13 to 1.5; a product and a quotient of latents with it must stay finite.
        let factor = 1e-4..=1e4;
        crate::model::within(
            "vae/config.json: scaling_factor",
            self.scaling_factor,
            factor,
        )?;
        Activation::from_name(&self.act_fn).context("vae/config.json: act_fn")?;
        Ok(())
    }

    /// Holds the numbers to the weights, as far as these have the two halves.
    fn check_weights(&self, w: &Weights) -> Result<()> {
        let of = |key: &str| format!("vae/config.json: {key}");
        let widths = &self.block_out_channels;
        let levels = of("the number of block_out_channels");
        for (index, &width) in widths.iter().enumerate() {
            let down = format!("encoder.down_blocks.{index}");
            let up = format!("decoder.up_blocks.{}", widths.len() - 1 - index);
            let layers = self.layers_per_block;
            for list in ["encoder.down_blocks", "decoder.up_blocks"] {
                w.agrees_in_number(&levels, widths.len(), list)?;
            }
            for block in [&down, &up] {
                let conv = format!("{block}.resnets.0.conv1.weight");
                w.agrees(&of("block_out_channels"), width, &conv, 0)?;
            }
            w.agrees_in_number(&of("layers_per_block"), layers, &format!("{down}.resnets"))?;
            let above = of("layers_per_block and one more");
            w.agrees_in_number(&above, layers + 1, &format!("{up}.resnets"))?;
        }
        let channels = self.latent_channels;
        w.agrees(
            &of("latent_channels"),
            channels,
            "decoder.conv_in.weight",
            1,
        )?;
        w.agrees(
            &of("latent_channels, twice,"),
            2 * channels,
            "encoder.conv_out.weight",
            0,
        )
    }

    /// Pixels to a latent position, in each direction.
    pub(super) fn factor(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1)
    }
}

/// A VAE's tensors under diffusers' names, whichever spelling its file has.
///
/// # Errors
/// A number of the configuration is not the weights'.
pub(super) fn checked(config: &KlConfig, weights: Weights) -> Result<Weights> {
    let levels = config.block_out_channels.len();
    let weights = weights.renamed(|key| vae_name(key, levels));
    config.check_weights(&weights)?;
    Ok(weights)
}

struct Resnet {
    norm1: NormAct,
    conv1: Conv2d,
    norm2: NormAct,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
}

impl Resnet {
    fn new(config: &KlConfig, inputs: usize, outputs: usize, w: &Weights) -> Result<Self> {
        let activation = Activation::from_name(&config.act_fn)?;
        let norm = |channels: usize, name: &str| -> Result<NormAct> {
            let norm = GroupNorm::new(config.norm_num_groups, channels, EPS, &w.pp(name))?;
            Ok(norm.then(activation))
        };
        let shortcut = || {
            let shape = ConvShape::same(inputs, outputs, 1);
            Conv2d::new(shape, &w.pp("conv_shortcut"))
        };
        Ok(Self {
            norm1: norm(inputs, "norm1")?,
            conv1: Conv2d::new(ConvShape::same(inputs, outputs, 3), &w.pp("conv1"))?,
            norm2: norm(outputs, "norm2")?,
            conv2: Conv2d::new(ConvShape::same(outputs, outputs, 3), &w.pp("conv2"))?,
            conv_shortcut: (inputs != outputs).then(shortcut).transpose()?,
        })
    }

    /// `x` is this resnet's own: its lines go as soon as nothing else reads them.
    fn forward<'a>(&'a self, x: Source<'a>, room: &Room) -> Result<Source<'a>> {
        let block = Residual {
            norm1: self.norm1.clone(),
            conv1: &self.conv1,
            norm2: self.norm2.clone(),
            conv2: &self.conv2,
            shortcut: self.conv_shortcut.as_ref(),
        };
        block.forward(x, room)
    }
}

/// Self-attention with one head over all positions.
struct Attention {
    group_norm: NormAct,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    placement: Placement,
}

impl Attention {
    /// Both spellings are in use: `to_q …` and the older `query …`.
    fn new(config: &KlConfig, channels: usize, w: &Weights) -> Result<Self> {
        let names = if w.contains("query.weight") {
            ["query", "key", "value", "proj_attn"]
        } else {
            ["to_q", "to_k", "to_v", "to_out.0"]
        };
        let linear = |name: &str| Linear::new(channels, channels, &w.pp(name));
        let norm = GroupNorm::new(config.norm_num_groups, channels, EPS, &w.pp("group_norm"))?;
        Ok(Self {
            group_norm: norm.then(Activation::None),
            q: linear(names[0])?,
            k: linear(names[1])?,
            v: linear(names[2])?,
            out: linear(names[3])?,
            placement: w.placement().clone(),
        })
    }

    fn forward<'a>(&self, x: Source<'a>, room: &Room) -> Result<Source<'a>> {
        let size = x.size();
        let window = room.keys_window(size.h, size.w);
        let sees_all = window == (size.h, size.w);
        if sees_all && x.is_whole() {
            let (x, _) = x.into_whole()?;
            return Ok(Box::new(Stored::whole(self.whole(&x)?)?));
        }
        let norm = Norm::of(&*x, self.group_norm.clone(), room)?;
        if sees_all {
            self.in_bands(x, &norm, room)
        } else {
            self.in_windows(x, &norm, window, room)
        }
    }

    fn whole(&self, x: &FeatureMap) -> Result<FeatureMap> {
        let normed = self.group_norm.forward(x)?.tokens()?;
        map_tokens(x, |tokens| {
            let (q, k, v) = (
                self.q.forward(&normed)?,
                self.k.forward(&normed)?,
                self.v.forward(&normed)?,
            );
            let y = attention(&q, &k, &v, 1, Mask::None, &self.placement)?;
            self.out.forward_add(&y, Some(tokens))
        })
    }

    /// A band of positions after the other, each over the keys of all.
    fn in_bands<'a>(&self, x: Source<'a>, norm: &Norm, room: &Room) -> Result<Source<'a>> {
        let Size { b, c, h, w, .. } = x.size();
        let all = || TokensInParts::new(b, h * w, c, &self.placement);
        let (mut keys, mut values) = (all()?, all()?);
        let _held = room.hold(&[keys.tensor(), values.tensor()]);
        for lines in room.bands(x.size()) {
            let normed = normed_lines(&*x, norm, lines)?.tokens()?;
            keys.push(&self.k.forward(&normed)?)?;
            values.push(&self.v.forward(&normed)?)?;
            room.passing();
        }
        let (k, v) = (keys.tensor(), values.tensor());
        map_bands(x, room, |window, lines, x| {
            let normed = norm.apply_to(x, window, lines.clone())?.tokens()?;
            let map = window.exactly(lines)?;
            let q = self.q.forward(&normed)?;
            let y = attention(&q, k, v, 1, Mask::None, &self.placement)?;
            map_tokens(&map, |tokens| self.out.forward_add(&y, Some(tokens)))
        })
    }

    /// Tiles of positions, each over the keys of a window around it.
    fn in_windows<'a>(
        &self,
        x: Source<'a>,
        norm: &Norm,
        (high, wide): (usize, usize),
        room: &Room,
    ) -> Result<Source<'a>> {
        let size = x.size();
        let others = x.again();
        map_bands(x, room, |window, lines, x| {
            let mut strips = Vec::new();
            for tile in tiles(&lines) {
                let rows = tile.len();
                let near = around(&whole_tile(tile.start), high, size.h);
                let seen = normed_lines(&*others, norm, near.clone())?;
                others.release(near.start);
                let _held = room.hold(&[&seen.tokens()?]);
                let map = window.exactly(tile.clone())?;
                let normed = norm.apply_to(x, window, tile)?;
                let mut parts = Vec::new();
                for columns in tiles(&(0..size.w)) {
                    let near = around(&whole_tile(columns.start), wide, size.w);
                    let keys = seen.part(0..high, near)?.tokens()?;
                    let queries = normed.part(0..rows, columns.clone())?.tokens()?;
                    let (q, k, v) = (
                        self.q.forward(&queries)?,
                        self.k.forward(&keys)?,
                        self.v.forward(&keys)?,
                    );
                    let y = attention(&q, &k, &v, 1, Mask::None, &self.placement)?;
                    let own = map.part(0..rows, columns)?;
                    parts.push(map_tokens(&own, |tokens| {
                        self.out.forward_add(&y, Some(tokens))
                    })?);
                    room.passing();
                }
                strips.push(FeatureMap::beside_each_other(&parts)?);
            }
            FeatureMap::below_each_other(&strips)
        })
    }
}

/// The tiles that cover `positions` along one side, as far as they are in them.
fn tiles(positions: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let Range { start, end } = *positions;
    let first = start / TILE;
    (first..end.div_ceil(TILE)).map(move |tile| start.max(tile * TILE)..end.min((tile + 1) * TILE))
}

/// The tile that a position is in.
fn whole_tile(position: usize) -> Range<usize> {
    let start = position / TILE * TILE;
    start..start + TILE
}

/// A window of so many positions of a side, the tile in its middle where the side's ends allow it.
fn around(tile: &Range<usize>, window: usize, side: usize) -> Range<usize> {
    let middle = (tile.start + tile.end) / 2;
    let start = middle.saturating_sub(window / 2).min(side - window);
    start..start + window
}

struct MidBlock {
    first: Resnet,
    attention: Option<Attention>,
    second: Resnet,
}

impl MidBlock {
    fn new(config: &KlConfig, channels: usize, w: &Weights) -> Result<Self> {
        let attention = config
            .mid_block_add_attention
            .then(|| Attention::new(config, channels, &w.pp("attentions.0")));
        Ok(Self {
            first: Resnet::new(config, channels, channels, &w.pp("resnets.0"))?,
            attention: attention.transpose()?,
            second: Resnet::new(config, channels, channels, &w.pp("resnets.1"))?,
        })
    }

    fn forward<'a>(&'a self, x: Source<'a>, room: &Room) -> Result<Source<'a>> {
        let mut x = self.first.forward(x, room)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(x, room)?;
        }
        self.second.forward(x, room)
    }
}

/// Resnets of one level and the convolution that leaves it.
struct Level {
    resnets: Vec<Resnet>,
    resample: Option<Conv2d>,
}

/// The `count` resnets of level `index`; `widths` are the levels' channels in the order in which data passes them.
fn resnets(
    config: &KlConfig,
    widths: &[usize],
    index: usize,
    count: usize,
    w: &Weights,
) -> Result<Vec<Resnet>> {
    let outputs = widths[index];
    let resnet = |i: usize| {
        let inputs = if i == 0 {
            widths[index.saturating_sub(1)]
        } else {
            outputs
        };
        Resnet::new(config, inputs, outputs, &w.pp("resnets").pp(i))
    };
    (0..count).map(resnet).collect()
}

/// Image to latents.
pub struct Encoder {
    conv_in: Conv2d,
    levels: Vec<Level>,
    mid_block: MidBlock,
    norm_out: NormAct,
    conv_out: Conv2d,
    quant_conv: Option<Conv2d>,
    placement: Placement,
}

impl Encoder {
    /// `all`: the tensors of both halves.
    ///
    /// # Errors
    /// One is missing or does not fit the configuration.
    pub(super) fn new(config: &KlConfig, all: &Weights) -> Result<Self> {
        let w = all.pp("encoder");
        let widths = &config.block_out_channels;
        let (first, last) = (widths[0], widths[widths.len() - 1]);
        let level = |index: usize| -> Result<Level> {
            let w = w.pp("down_blocks").pp(index);
            let outputs = widths[index];
            // diffusers pads this convolution below and on the right alone
            let shape = ConvShape {
                inputs: outputs,
                outputs,
                kernel: 3,
                stride: 2,
                padding: Padding {
                    before: 0,
                    after: 1,
                },
                last: false,
                activation: Activation::None,
            };
            let down = || Conv2d::new(shape, &w.pp("downsamplers.0.conv"));
            Ok(Level {
                resnets: resnets(config, widths, index, config.layers_per_block, &w)?,
                resample: (index + 1 < widths.len()).then(down).transpose()?,
            })
        };
        let moments = 2 * config.latent_channels;
        let norm = GroupNorm::new(config.norm_num_groups, last, EPS, &w.pp("conv_norm_out"))?;
        let quant = || Conv2d::new(ConvShape::same(moments, moments, 1), &all.pp("quant_conv"));
        let conv = |inputs, outputs, name: &str| {
            Conv2d::new(ConvShape::same(inputs, outputs, 3), &w.pp(name))
        };
        Ok(Self {
            conv_in: conv(config.in_channels, first, "conv_in")?,
            levels: (0..widths.len()).map(level).collect::<Result<_>>()?,
            mid_block: MidBlock::new(config, last, &w.pp("mid_block"))?,
            norm_out: norm.then(Activation::Silu),
            conv_out: conv(last, moments, "conv_out")?,
            quant_conv: config.use_quant_conv.then(quant).transpose()?,
            placement: all.placement().clone(),
        })
    }

    /// As [`Encoder::encode_within`](super::Encoder::encode_within).
    pub(super) fn encode_within(&self, image: &Tensor, room: &Room) -> Result<Posterior> {
        let groups = Some(self.norm_out.groups);
        let image = Box::new(Planes::new(image, &self.placement));
        let mut x = store(conv(image, &self.conv_in).boxed(), groups, room)?;
        for level in &self.levels {
            for resnet in &level.resnets {
                x = resnet.forward(x, room)?;
            }
            if let Some(down) = &level.resample {
                x = store(conv(x, down).boxed(), groups, room)?;
            }
        }
        x = self.mid_block.forward(x, room)?;
        let norm = Norm::of(&*x, self.norm_out.clone(), room)?;
        x = conv(x, &self.conv_out).normed(norm).boxed();
        let (mut x, _) = x.into_whole()?;
        if let Some(conv) = &self.quant_conv {
            x = conv.forward(&x)?;
        }
        let moments = x.to_nchw()?;
        let halves = moments.chunk(2, 1)?;
        Ok(Posterior {
            mean: halves[0].contiguous()?,
            logvar: Some(halves[1].contiguous()?),
        })
    }
}

/// Latents to image.
pub struct Decoder {
    post_quant_conv: Option<Conv2d>,
    conv_in: Conv2d,
    mid_block: MidBlock,
    levels: Vec<Level>,
    norm_out: NormAct,
    conv_out: Conv2d,
    placement: Placement,
}

impl Decoder {
    /// `all`: the tensors of both halves.
    ///
    /// # Errors
    /// One is missing or does not fit the configuration.
    pub(super) fn new(config: &KlConfig, all: &Weights) -> Result<Self> {
        let w = all.pp("decoder");
        let widths: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last) = (widths[0], widths[widths.len() - 1]);
        let level = |index: usize| -> Result<Level> {
            let w = w.pp("up_blocks").pp(index);
            let outputs = widths[index];
            let up = || {
                let shape = ConvShape::same(outputs, outputs, 3);
                Conv2d::new(shape, &w.pp("upsamplers.0.conv"))
            };
            Ok(Level {
                resnets: resnets(config, &widths, index, config.layers_per_block + 1, &w)?,
                resample: (index + 1 < widths.len()).then(up).transpose()?,
            })
        };
        let channels = config.latent_channels;
        let norm = GroupNorm::new(config.norm_num_groups, last, EPS, &w.pp("conv_norm_out"))?;
        let quant = || {
            let shape = ConvShape::same(channels, channels, 1);
            Conv2d::new(shape, &all.pp("post_quant_conv"))
        };
        let conv = |inputs, outputs, name: &str| {
            Conv2d::new(ConvShape::same(inputs, outputs, 3), &w.pp(name))
        };
        Ok(Self {
            post_quant_conv: config.use_post_quant_conv.then(quant).transpose()?,
            conv_in: conv(channels, first, "conv_in")?,
            mid_block: MidBlock::new(config, first, &w.pp("mid_block"))?,
            levels: (0..widths.len()).map(level).collect::<Result<_>>()?,
            norm_out: norm.then(Activation::Silu),
            conv_out: Conv2d::new(
                ConvShape::same(last, config.out_channels, 3).last(),
                &w.pp("conv_out"),
            )?,
            placement: all.placement().clone(),
        })
    }

    /// As [`Decoder::decode_within`](super::Decoder::decode_within).
    pub(super) fn decode_within(
        &self,
        latents: &Tensor,
        room: &Room,
        finished: impl FnMut(Tensor) -> Result<()>,
    ) -> Result<()> {
        let groups = Some(self.norm_out.groups);
        let mut first = FeatureMap::from_nchw(latents, &self.placement)?;
        if let Some(conv) = &self.post_quant_conv {
            first = conv.forward(&first)?;
        }
        let first = Box::new(Stored::whole(first)?);
        let mut x = store(conv(first, &self.conv_in).boxed(), groups, room)?;
        x = self.mid_block.forward(x, room)?;
        for level in &self.levels {
            for resnet in &level.resnets {
                x = resnet.forward(x, room)?;
            }
            if let Some(up) = &level.resample {
                x = keep_between(conv(x, up).upsampled().boxed(), groups, room)?;
            }
        }
        let norm = Norm::of(&*x, self.norm_out.clone(), room)?;
        let bands = room.bands(x.size());
        let image = conv(x, &self.conv_out).normed(norm).boxed();
        lines_of_picture(image, bands, room, finished)
    }
}
