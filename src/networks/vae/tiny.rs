//! diffusers' AutoencoderTiny (TAESD): convolutions and ReLU, no norms and no attention, so that a pixel depends on its
//! neighbours alone. Its latents are those of Stable Diffusion in the UNet's scale, and have no spread.

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use serde::Deserialize;

use super::{Posterior, lines_of_picture};
use crate::device::Placement;
use crate::layers::bands::{Planes, Room, Source, Stored, conv, keep_between, store};
use crate::layers::{Activation, Conv2d, ConvShape, FeatureMap, Padding};
use crate::model::{MOST_CHANNELS, MOST_LAYERS, MOST_LEVELS, Weights, within};

/// Latents beyond this are bent back to it, which is fixed in diffusers' DecoderTiny.
const MAGNITUDE: f64 = 3.0;

/// `vae/config.json`; absent keys take the defaults of diffusers' AutoencoderTiny, which are TAESD's. `latent_magnitude` and
/// `latent_shift` are of latents kept as bytes, which nothing here does.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct TinyConfig {
    pub in_channels: usize,
    pub out_channels: usize,
    pub latent_channels: usize,
    pub encoder_block_out_channels: Vec<usize>,
    pub decoder_block_out_channels: Vec<usize>,
    /// Of each level, the largest map first.
    pub num_encoder_blocks: Vec<usize>,
    /// Of each level, the smallest map first.
    pub num_decoder_blocks: Vec<usize>,
    pub act_fn: String,
    pub upsample_fn: String,
    pub upsampling_scaling_factor: usize,
    pub scaling_factor: f64,
    pub shift_factor: f64,
}

impl Default for TinyConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            latent_channels: 4,
            encoder_block_out_channels: vec![64; 4],
            decoder_block_out_channels: vec![64; 4],
            num_encoder_blocks: vec![1, 3, 3, 3],
            num_decoder_blocks: vec![3, 3, 3, 1],
            act_fn: "relu".into(),
            upsample_fn: "nearest".into(),
            upsampling_scaling_factor: 2,
            scaling_factor: 1.0,
            shift_factor: 0.0,
        }
    }
}

/// A key as messages name it.
fn key(name: &str) -> String {
    format!("vae/config.json: {name}")
}

impl TinyConfig {
    /// # Errors
    /// It is of no such network, or of one that diffusers itself cannot run.
    pub(super) fn check(&self) -> Result<()> {
        // Pictures are RGB on both sides.
        within(&key("in_channels"), self.in_channels, 3..=3)?;
        within(&key("out_channels"), self.out_channels, 3..=3)?;
        within(
            &key("latent_channels"),
            self.latent_channels,
            1..=MOST_CHANNELS,
        )?;
        for (name, blocks) in [
            ("num_encoder_blocks", &self.num_encoder_blocks),
            ("num_decoder_blocks", &self.num_decoder_blocks),
        ] {
            within(
                &key(&format!("the number of {name}")),
                blocks.len(),
                1..=MOST_LEVELS,
            )?;
            for &count in blocks {
                within(&key(name), count, 0..=MOST_LAYERS)?;
            }
        }
        let levels = self.num_encoder_blocks.len();
        ensure!(
            self.num_decoder_blocks.len() == levels,
            "{}, for num_encoder_blocks has {levels}: latents of one size are expected on both sides",
            key(&format!(
                "num_decoder_blocks has {} levels",
                self.num_decoder_blocks.len()
            ))
        );
        for (name, widths) in [
            (
                "encoder_block_out_channels",
                &self.encoder_block_out_channels,
            ),
            (
                "decoder_block_out_channels",
                &self.decoder_block_out_channels,
            ),
        ] {
            ensure!(
                widths.len() == levels,
                "{}; expected {levels}, one for each level",
                key(&format!("{name} has {} numbers", widths.len()))
            );
            for &width in widths {
                within(&key(name), width, 1..=MOST_CHANNELS)?;
            }
            // No convolution of either half leads from one width to another.
            ensure!(
                widths.iter().all(|width| *width == widths[0]),
                "{}; expected numbers that are all the same, as diffusers' AutoencoderTiny has no layers between different ones",
                key(&format!("{name} is {widths:?}"))
            );
        }
        Activation::from_name(&self.act_fn).with_context(|| key("act_fn"))?;
        ensure!(
            self.upsample_fn == "nearest",
            "{}; expected nearest",
            key(&format!("upsample_fn is {:?}", self.upsample_fn))
        );
        within(
            &key("upsampling_scaling_factor"),
            self.upsampling_scaling_factor,
            2..=2,
        )?;
        within(&key("scaling_factor"), self.scaling_factor, 1e-4..=1e4)?;
        // The upscaler's pipeline shifts no latents: those of such a VAE are not its UNet's.
        within(&key("shift_factor"), self.shift_factor, 0.0..=0.0)
    }

    /// Holds the numbers to the weights, as far as these have the two halves.
    pub(super) fn check_weights(&self, w: &Weights) -> Result<()> {
        let (encoder, decoder) = (w.pp("encoder.layers"), w.pp("decoder.layers"));
        let counted = |name: &str| key(&format!("the number of layers that {name} come to"));
        for (name, half, layers) in [
            (
                "num_encoder_blocks",
                "encoder.layers",
                self.encoder_layers(),
            ),
            (
                "num_decoder_blocks",
                "decoder.layers",
                self.decoder_layers(),
            ),
        ] {
            w.agrees_in_number(&counted(name), layers, half)?;
        }
        let first = "0.weight";
        let encoder_width = self.encoder_block_out_channels[0];
        encoder.agrees(&key("encoder_block_out_channels"), encoder_width, first, 0)?;
        let decoder_width = self.decoder_block_out_channels[0];
        decoder.agrees(&key("decoder_block_out_channels"), decoder_width, first, 0)?;
        let channels = self.latent_channels;
        decoder.agrees(&key("latent_channels"), channels, first, 1)?;
        let last = format!("{}.weight", self.encoder_layers() - 1);
        encoder.agrees(&key("latent_channels"), channels, &last, 0)
    }

    /// A convolution before each level's blocks, and one behind all.
    fn encoder_layers(&self) -> usize {
        self.num_encoder_blocks
            .iter()
            .map(|blocks| 1 + blocks)
            .sum::<usize>()
            + 1
    }

    /// A convolution and an activation, and behind each level's blocks an enlargement, but for the last, and a convolution.
    fn decoder_layers(&self) -> usize {
        2 + self
            .num_decoder_blocks
            .iter()
            .map(|blocks| blocks + 2)
            .sum::<usize>()
            - 1
    }

    /// Pixels to a latent position, in each direction.
    pub(super) fn factor(&self) -> usize {
        1 << self.num_encoder_blocks.len().saturating_sub(1)
    }
}

/// The layers of a half in their order, each under its number.
struct Layers {
    all: Weights,
    next: usize,
}

impl Layers {
    fn of(half: &str, all: &Weights) -> Self {
        Self {
            all: all.pp(half).pp("layers"),
            next: 0,
        }
    }

    fn next(&mut self) -> Weights {
        self.next += 1;
        self.all.pp(self.next - 1)
    }
}

/// `relu(conv(act(conv(act(conv(x))))) + x)`
struct Block {
    convs: [Conv2d; 3],
}

impl Block {
    fn new(width: usize, activation: Activation, w: &Weights) -> Result<Self> {
        let conv = |name: usize, activation: Activation| {
            let shape = ConvShape::same(width, width, 3).then(activation);
            Conv2d::new(shape, &w.pp("conv").pp(name))
        };
        Ok(Self {
            // Whatever the others are, the sum's is ReLU.
            convs: [
                conv(0, activation)?,
                conv(2, activation)?,
                conv(4, Activation::Relu)?,
            ],
        })
    }

    fn forward<'a>(&'a self, x: Source<'a>, room: &Room) -> Result<Source<'a>> {
        let [first, second, third] = &self.convs;
        let hidden = keep_between(conv(x.again(), first).boxed(), None, room)?;
        let hidden = keep_between(conv(hidden, second).boxed(), None, room)?;
        store(conv(hidden, third).plus(x).boxed(), None, room)
    }
}

/// The blocks of a level and the convolution that leads to it.
struct EncoderLevel {
    conv: Conv2d,
    blocks: Vec<Block>,
}

pub(super) struct Encoder {
    levels: Vec<EncoderLevel>,
    conv_out: Conv2d,
    placement: Placement,
}

impl Encoder {
    pub(super) fn new(config: &TinyConfig, all: &Weights) -> Result<Self> {
        let activation = Activation::from_name(&config.act_fn)?;
        let width = config.encoder_block_out_channels[0];
        let mut layers = Layers::of("encoder", all);
        let mut levels = Vec::new();
        for (index, &blocks) in config.num_encoder_blocks.iter().enumerate() {
            let conv = match index {
                0 => Conv2d::new(
                    ConvShape::same(config.in_channels, width, 3),
                    &layers.next(),
                )?,
                _ => Conv2d::with_zero_bias(halving(width), &layers.next())?,
            };
            let blocks = (0..blocks).map(|_| Block::new(width, activation, &layers.next()));
            levels.push(EncoderLevel {
                conv,
                blocks: blocks.collect::<Result<_>>()?,
            });
        }
        let shape = ConvShape::same(width, config.latent_channels, 3);
        Ok(Self {
            levels,
            conv_out: Conv2d::new(shape, &layers.next())?,
            placement: all.placement().clone(),
        })
    }

    /// As [`Encoder::encode_within`](super::Encoder::encode_within).
    pub(super) fn encode_within(&self, image: &Tensor, room: &Room) -> Result<Posterior> {
        // It was trained on [0, 1].
        let image = Planes::new(image, &self.placement).affine(0.5, 0.5);
        let mut x: Source = Box::new(image);
        for level in &self.levels {
            x = store(conv(x, &level.conv).boxed(), None, room)?;
            for block in &level.blocks {
                x = block.forward(x, room)?;
            }
        }
        let (latents, _) = conv(x, &self.conv_out).boxed().into_whole()?;
        Ok(Posterior {
            mean: latents.to_nchw()?,
            logvar: None,
        })
    }
}

/// Half the size.
fn halving(width: usize) -> ConvShape {
    ConvShape {
        stride: 2,
        padding: Padding {
            before: 1,
            after: 1,
        },
        ..ConvShape::same(width, width, 3)
    }
}

/// The blocks of a level and the convolution that leads from it to the next, enlarged.
struct DecoderLevel {
    blocks: Vec<Block>,
    up: Option<Conv2d>,
}

pub(super) struct Decoder {
    conv_in: Conv2d,
    levels: Vec<DecoderLevel>,
    conv_out: Conv2d,
    placement: Placement,
}

impl Decoder {
    pub(super) fn new(config: &TinyConfig, all: &Weights) -> Result<Self> {
        let activation = Activation::from_name(&config.act_fn)?;
        let width = config.decoder_block_out_channels[0];
        let mut layers = Layers::of("decoder", all);
        let shape = ConvShape::same(config.latent_channels, width, 3).then(activation);
        let conv_in = Conv2d::new(shape, &layers.next())?;
        let _activation = layers.next();
        let last = config.num_decoder_blocks.len() - 1;
        let mut levels = Vec::new();
        for (index, &blocks) in config.num_decoder_blocks.iter().enumerate() {
            let blocks = (0..blocks).map(|_| Block::new(width, activation, &layers.next()));
            let blocks = blocks.collect::<Result<_>>()?;
            let mut up = None;
            if index < last {
                let _enlargement = layers.next();
                let shape = ConvShape::same(width, width, 3);
                up = Some(Conv2d::with_zero_bias(shape, &layers.next())?);
            }
            levels.push(DecoderLevel { blocks, up });
        }
        // It was trained on [0, 1]: twice that less 1 is [-1, 1].
        let shape = ConvShape::same(width, config.out_channels, 3).last();
        Ok(Self {
            conv_in,
            levels,
            conv_out: Conv2d::scaled(shape, 2.0, -1.0, &layers.next())?,
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
        let latents = FeatureMap::from_nchw(&self.bent(latents)?, &self.placement)?;
        let latents = Box::new(Stored::whole(latents)?);
        let mut x = store(conv(latents, &self.conv_in).boxed(), None, room)?;
        for level in &self.levels {
            for block in &level.blocks {
                x = block.forward(x, room)?;
            }
            if let Some(up) = &level.up {
                x = store(conv(x, up).upsampled().boxed(), None, room)?;
            }
        }
        let bands = room.bands(x.size());
        let image = conv(x, &self.conv_out).boxed();
        lines_of_picture(image, bands, room, finished)
    }

    /// Latents held to what TAESD was trained on.
    fn bent(&self, latents: &Tensor) -> Result<Tensor> {
        if self.placement.is_of_shapes() {
            return Ok(latents.clone());
        }
        Ok(((latents / MAGNITUDE)?.tanh()? * MAGNITUDE)?)
    }
}
