//! Stable Diffusion's KL autoencoder: images to latents and back.

mod original_names;

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use serde::Deserialize;

use crate::device::Placement;
use crate::layers::{
    Activation, Conv2d, ConvShape, FeatureMap, GroupNorm, Linear, Mask, NormAct, Padding,
    attention, map_tokens,
};
use crate::model::{MOST_CHANNELS, MOST_LAYERS, MOST_LEVELS, PartFiles, Weights, within};

/// The eps of every norm in diffusers' AutoencoderKL.
const EPS: f64 = 1e-6;

/// `vae/config.json`; absent keys take the defaults of diffusers' AutoencoderKL.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct VaeConfig {
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

impl Default for VaeConfig {
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

impl VaeConfig {
    /// Reads a VAE's `config.json`.
    ///
    /// # Errors
    /// It is missing or is not an AutoencoderKL's.
    pub fn load(files: &PartFiles) -> Result<Self> {
        let config: VaeConfig = files.json("config.json")?;
        config.check_numbers()?;
        Ok(config)
    }

    fn check_numbers(&self) -> Result<()> {
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
    pub fn factor(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1)
    }
}

/// A VAE's tensors under diffusers' names, whichever spelling its file has.
fn weights(files: &PartFiles, config: &VaeConfig, placement: &Placement) -> Result<Weights> {
    let levels = config.block_out_channels.len();
    let weights = files.weights("diffusion_pytorch_model", placement)?;
    let weights = weights.renamed(|key| original_names::to_diffusers(key, levels));
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
    fn new(config: &VaeConfig, inputs: usize, outputs: usize, w: &Weights) -> Result<Self> {
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

    /// `x` is this resnet's own: a map of a large picture is written over as soon as nothing else reads it.
    fn forward(&self, x: FeatureMap) -> Result<FeatureMap> {
        let (hidden, residual) = match &self.conv_shortcut {
            Some(shortcut) => {
                let residual = shortcut.forward(&x)?;
                let hidden = self.conv1.forward_normed_over(x, &self.norm1, None)?;
                (hidden, residual)
            }
            None => (self.conv1.forward_normed(&x, &self.norm1, None)?, x),
        };
        self.conv2
            .forward_normed_over(hidden, &self.norm2, Some(&residual))
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
    fn new(config: &VaeConfig, channels: usize, w: &Weights) -> Result<Self> {
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

    fn forward(&self, x: &FeatureMap) -> Result<FeatureMap> {
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
}

struct MidBlock {
    first: Resnet,
    attention: Option<Attention>,
    second: Resnet,
}

impl MidBlock {
    fn new(config: &VaeConfig, channels: usize, w: &Weights) -> Result<Self> {
        let attention = config
            .mid_block_add_attention
            .then(|| Attention::new(config, channels, &w.pp("attentions.0")));
        Ok(Self {
            first: Resnet::new(config, channels, channels, &w.pp("resnets.0"))?,
            attention: attention.transpose()?,
            second: Resnet::new(config, channels, channels, &w.pp("resnets.1"))?,
        })
    }

    fn forward(&self, x: FeatureMap) -> Result<FeatureMap> {
        let mut x = self.first.forward(x)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.second.forward(x)
    }
}

/// Resnets of one level and the convolution that leaves it.
struct Level {
    resnets: Vec<Resnet>,
    resample: Option<Conv2d>,
}

/// The `count` resnets of level `index`; `widths` are the levels' channels in the order in which data passes them.
fn resnets(
    config: &VaeConfig,
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

/// The distribution that an image is encoded to, before scaling. Each (b, latent channels, h, w), float32.
pub struct Posterior {
    pub mean: Tensor,
    pub logvar: Tensor,
}

impl Posterior {
    /// `mean + std * noise`; noise of the mean's shape. The logarithm is clamped to -30..20 as in diffusers'
    /// DiagonalGaussianDistribution.
    pub fn sample(&self, noise: &Tensor) -> Result<Tensor> {
        let std = (self.logvar.clamp(-30f32, 20f32)? * 0.5)?.exp()?;
        Ok((&self.mean + (std * noise)?)?)
    }
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
    pub config: VaeConfig,
}

impl Encoder {
    /// Reads the encoder's half of a VAE.
    ///
    /// # Errors
    /// A file is missing or damaged, or a tensor does not fit config.json.
    pub fn load(files: &PartFiles, placement: &Placement) -> Result<Self> {
        let config = VaeConfig::load(files)?;
        let all = weights(files, &config, placement)?;
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
            };
            let down = || Conv2d::new(shape, &w.pp("downsamplers.0.conv"));
            Ok(Level {
                resnets: resnets(&config, widths, index, config.layers_per_block, &w)?,
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
            mid_block: MidBlock::new(&config, last, &w.pp("mid_block"))?,
            norm_out: norm.then(Activation::Silu),
            conv_out: conv(last, moments, "conv_out")?,
            quant_conv: config.use_quant_conv.then(quant).transpose()?,
            placement: placement.clone(),
            config,
        })
    }

    /// (b, 3, H, W) in [-1, 1], sides multiples of [`VaeConfig::factor`] -> posterior of (b, 4, H / f, W / f).
    ///
    /// # Errors
    /// The image does not have the channels that config.json says.
    pub fn encode(&self, image: &Tensor) -> Result<Posterior> {
        let mut x = self
            .conv_in
            .forward(&FeatureMap::from_nchw(image, &self.placement)?)?;
        for level in &self.levels {
            for resnet in &level.resnets {
                x = resnet.forward(x)?;
            }
            if let Some(conv) = &level.resample {
                x = conv.forward(&x)?;
            }
        }
        x = self.mid_block.forward(x)?;
        x = self.conv_out.forward_normed(&x, &self.norm_out, None)?;
        if let Some(conv) = &self.quant_conv {
            x = conv.forward(&x)?;
        }
        let moments = x.to_nchw()?;
        let halves = moments.chunk(2, 1)?;
        Ok(Posterior {
            mean: halves[0].contiguous()?,
            logvar: halves[1].contiguous()?,
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
    pub config: VaeConfig,
}

impl Decoder {
    /// Reads the decoder's half of a VAE.
    ///
    /// # Errors
    /// A file is missing or damaged, or a tensor does not fit config.json.
    pub fn load(files: &PartFiles, placement: &Placement) -> Result<Self> {
        let config = VaeConfig::load(files)?;
        let all = weights(files, &config, placement)?;
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
                resnets: resnets(&config, &widths, index, config.layers_per_block + 1, &w)?,
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
            mid_block: MidBlock::new(&config, first, &w.pp("mid_block"))?,
            levels: (0..widths.len()).map(level).collect::<Result<_>>()?,
            norm_out: norm.then(Activation::Silu),
            conv_out: conv(last, config.out_channels, "conv_out")?,
            placement: placement.clone(),
            config,
        })
    }

    /// (b, 4, h, w), *not* scaled (divided by the scaling factor) -> (b, 3, h * f, w * f), about [-1, 1], float32.
    ///
    /// # Errors
    /// The latents do not have the channels that config.json says.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let mut x = FeatureMap::from_nchw(latents, &self.placement)?;
        if let Some(conv) = &self.post_quant_conv {
            x = conv.forward(&x)?;
        }
        x = self.mid_block.forward(self.conv_in.forward(&x)?)?;
        for level in &self.levels {
            for resnet in &level.resnets {
                x = resnet.forward(x)?;
            }
            if let Some(conv) = &level.resample {
                x = conv.forward_upsampled(&x)?;
            }
        }
        let image = self.conv_out.forward_normed(&x, &self.norm_out, None)?;
        image.to_nchw()
    }
}
