//! The upscaler's UNet: k-diffusion's design in diffusers' names (UNet2DConditionModel with K-blocks).

mod blocks;
mod config;

use std::f64::consts::TAU;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor};

use self::blocks::{AttentionBlock, Block, Builder};
pub use self::config::{PerLevel, UNetConfig};
use crate::device::Placement;
pub use crate::layers::Sampling;
use crate::layers::bands::{Beside, Norm, Room, Stored, conv, store};
use crate::layers::{
    Activation, Conv2d, ConvShape, FeatureMap, GroupNorm, Linear, Modulations, NormAct, Replay,
    ScaleShift, guide, shapes, time_features,
};
use crate::model::{ModelFiles, Weights};
use crate::networks::text::Conditioning;

/// Fourier features of the noise level are this many cosines and as many sines (the original's
/// `low_res_noise_embed` has 64 frequencies).
const NOISE_LEVEL_FEATURES: usize = 64;
/// Its frequencies, which diffusers' conversion leaves out.
const NOISE_LEVEL: &str = "low_res_noise_embed.weight";

/// Everything that holds for one image at all its steps.
pub struct Prompted {
    /// Key and value of every cross-attention, (b, tokens, heads * d), in the order of their numbers.
    pub(super) keys_values: Vec<(Tensor, Tensor)>,
    /// Projection of the noise level and the pooled prompt, (b, time features).
    condition: Tensor,
    /// The network on these prompts, recorded. It reads their keys and values, and the weights of the network with this number.
    replay: Replay,
    network: u64,
}

impl Prompted {
    /// The batch that these prompts are for.
    pub fn rows(&self) -> Result<usize> {
        Ok(self.condition.dim(0)?)
    }
}

/// `linear_2(act(linear_1(features + cond_proj(condition))))`, with an activation behind it.
struct TimeEmbedding {
    /// Frequencies of the Fourier features, (features / 2), float32.
    frequencies: Tensor,
    cosine_first: bool,
    cond_proj: Option<Linear>,
    placement: Placement,
    linear_1: Linear,
    activation: Activation,
    linear_2: Linear,
    post_activation: Activation,
}

/// The denoising network.
pub struct UNet {
    conv_in: Conv2d,
    time: TimeEmbedding,
    /// Frequencies of the noise level's Fourier features, where the checkpoint has them.
    noise_level: Option<Vec<f32>>,
    /// Scales and shifts of all adaptive norms.
    norms: Modulations,
    down_blocks: Vec<Block>,
    up_blocks: Vec<Block>,
    norm_out: Option<NormAct>,
    conv_out: Conv2d,
    placement: Placement,
    pub config: UNetConfig,
    /// Of its own, by which prompts know it.
    number: u64,
}

/// Holds weights of a UNet to what a noise level needs.
///
/// # Errors
/// They lack it; the message names the tensor.
pub fn has_noise_level(w: &Weights) -> Result<()> {
    ensure!(w.contains(NOISE_LEVEL), NO_NOISE_LEVEL);
    Ok(())
}

/// What is said of a model without it.
pub const NO_NOISE_LEVEL: &str = "a noise level needs the tensor `low_res_noise_embed.weight` in unet/, which this model lacks: \
     diffusers' conversion leaves it out. Take the original checkpoint (--model FILE.pth), or a folder that --convert made of it";

/// (features / 2), where the checkpoint has them, as a column or flat.
fn noise_level_frequencies(w: &Weights) -> Result<Option<Vec<f32>>> {
    let Some(shape) = w.shape(NOISE_LEVEL).map(<[usize]>::to_vec) else {
        return Ok(None);
    };
    Ok(Some(w.f32(&shape, NOISE_LEVEL)?.to_vec()))
}

/// Networks made so far.
static NETWORKS: AtomicU64 = AtomicU64::new(0);

impl UNet {
    /// Reads `unet/`.
    ///
    /// # Errors
    /// A file is missing or damaged, a tensor does not fit config.json, or the configuration is not a latent upscaler's.
    pub fn load(files: &ModelFiles, placement: &Placement) -> Result<Self> {
        let config: UNetConfig = files.json("unet/config.json")?;
        Self::new(config, &Self::weights(files, placement)?)
    }

    /// The weights of `unet/`, of which nothing is read yet.
    ///
    /// # Errors
    /// They are missing or damaged.
    pub fn weights(files: &ModelFiles, placement: &Placement) -> Result<Weights> {
        files.weights("unet", "diffusion_pytorch_model", placement)
    }

    /// Of shapes alone, for planning what a run in `placement` takes.
    ///
    /// # Errors
    /// The configuration is not a latent upscaler's.
    pub fn of_shapes(config: UNetConfig, placement: &Placement) -> Result<Self> {
        Self::new(config, &Weights::none(placement))
    }

    /// What a call on a map of (b, in_channels, h, w) takes, by a network of shapes: `room` and the layers count it.
    ///
    /// # Errors
    /// It is no such network.
    pub fn measure(&self, (b, h, w): (usize, usize, usize), room: &Room) -> Result<()> {
        let dtype = self.placement.dtype;
        let zeros = |shape: &[usize]| shapes::view(shape, dtype);
        let keys = |attention: &AttentionBlock| attention.keys_values_of_shapes(b, dtype);
        let attentions = self.blocks().flat_map(|block| &block.attentions);
        let prompted = Prompted {
            keys_values: attentions.map(keys).collect::<Result<_>>()?,
            condition: zeros(&[b, 1])?,
            replay: Replay::default(),
            network: self.number,
        };
        let embedding = shapes::view(&[b, self.time.linear_2.outputs], DType::F32)?;
        let norms = self.norms.forward(&embedding)?;
        let input = zeros(&[b, self.config.in_channels, h, w])?;
        let input = FeatureMap::from_nchw(&input, &self.placement)?;
        self.untimed(&input, &norms.each, &prompted, room)?;
        room.passing();
        Ok(())
    }

    fn new(config: UNetConfig, w: &Weights) -> Result<Self> {
        config.check()?;
        config.check_weights(w)?;
        let first = config.block_out_channels[0];
        let time_width = config.time_embedding_dim.unwrap_or(2 * first);
        let activation =
            Activation::from_name(&config.act_fn).context("unet/config.json: act_fn")?;
        let mut build = Builder {
            config: &config,
            activation,
            time_width,
            cross_attentions: 0,
            norms: Vec::new(),
        };
        // A few rows that every norm of every step is scaled by: in half precision too they are float32 to their end.
        let embedding = w.pp("time_embedding").in_dtype(DType::F32);
        let time = TimeEmbedding {
            frequencies: w
                .pp("time_proj")
                .tensor_in(&[time_width / 2], "weight", DType::F32)?,
            cosine_first: config.flip_sin_to_cos,
            cond_proj: config
                .time_cond_proj_dim
                .map(|dim| Linear::without_bias(dim, time_width, &embedding.pp("cond_proj")))
                .transpose()?,
            linear_1: Linear::of_few_rows(time_width, time_width, &embedding.pp("linear_1"))?,
            activation,
            placement: embedding.placement().clone(),
            linear_2: Linear::of_few_rows(time_width, time_width, &embedding.pp("linear_2"))?,
            post_activation: match &config.timestep_post_act {
                Some(name) => {
                    Activation::from_name(name).context("unet/config.json: timestep_post_act")?
                }
                None => Activation::None,
            },
        };
        let noise_level = noise_level_frequencies(w)?;
        let levels = 0..config.block_out_channels.len();
        let down_blocks = levels
            .clone()
            .map(|level| Block::down(&mut build, level, &w.pp("down_blocks").pp(level)))
            .collect::<Result<_>>()?;
        let up_blocks = levels
            .map(|index| Block::up(&mut build, index, &w.pp("up_blocks").pp(index)))
            .collect::<Result<_>>()?;
        let norms = Modulations::new(time_width, &build.norms, w.placement())?;
        let norm_out = config
            .norm_num_groups
            .map(|groups| -> Result<NormAct> {
                let norm = GroupNorm::new(groups, first, config.norm_eps, &w.pp("conv_norm_out"))?;
                Ok(norm.then(activation))
            })
            .transpose()?;
        Ok(Self {
            conv_in: Conv2d::new(
                ConvShape::same(config.in_channels, first, config.conv_in_kernel),
                &w.pp("conv_in"),
            )?,
            time,
            noise_level,
            norms,
            down_blocks,
            up_blocks,
            norm_out,
            conv_out: Conv2d::new(
                ConvShape::same(first, config.out_channels, config.conv_out_kernel).last(),
                &w.pp("conv_out"),
            )?,
            placement: w.placement().clone(),
            config,
            number: NETWORKS.fetch_add(1, Ordering::Relaxed),
        })
    }

    /// What holds for all steps of an image: keys and values of its prompt, the projected condition.
    ///
    /// # Errors
    /// The prompt's width is not what this network was made for.
    pub fn prompted(&self, conditioning: &Conditioning) -> Result<Prompted> {
        self.prompted_at(conditioning, 0.0)
    }

    /// The same for low-res latents with noise of `noise_level` in them.
    ///
    /// The condition is the Fourier features of log1p(noise level), cosines first, before the pooled prompt (the original's
    /// NoiseLevelAndTextConditionedUpscaler). At level 0 these are ones and zeros, whatever the frequencies, which is all that diffusers
    /// has (pipeline_stable_diffusion_latent_upscale.py, 0.42).
    ///
    /// # Errors
    /// As [`prompted`](Self::prompted), or the level is above 0 and the checkpoint lacks its frequencies.
    pub fn prompted_at(&self, conditioning: &Conditioning, noise_level: f64) -> Result<Prompted> {
        let placement = &self.placement;
        let place = |t: &Tensor, dtype| t.to_device(&placement.device)?.to_dtype(dtype);
        let context = place(&conditioning.context, placement.dtype)?;
        let pooled = place(&conditioning.pooled, DType::F32)?;
        let (b, width) = pooled.dims2()?;
        let Some(projection) = &self.time.cond_proj else {
            bail!(
                "unet/config.json: time_cond_proj_dim is missing; the latent upscaler's prompt enters there"
            );
        };
        let expected = self.config.time_cond_proj_dim.unwrap_or(0);
        let level = self.noise_level_features(noise_level)?;
        let features = level.len();
        ensure!(
            features + width == expected,
            "unet/config.json: time_cond_proj_dim is {expected}, expected {features} + {width}, the text encoder's width"
        );
        let level = Tensor::from_vec(level.repeat(b), (b, features), &placement.device)?;
        let condition = Tensor::cat(&[&level, &pooled], 1)?;
        Ok(Prompted {
            keys_values: self
                .blocks()
                .flat_map(|block| &block.attentions)
                .map(|attention| attention.keys_values(&context))
                .collect::<Result<_>>()?,
            condition: projection.forward(&condition)?,
            replay: Replay::default(),
            network: self.number,
        })
    }

    /// Of one picture: cosines, then sines.
    fn noise_level_features(&self, level: f64) -> Result<Vec<f32>> {
        let none = [0.0; NOISE_LEVEL_FEATURES];
        let frequencies = match &self.noise_level {
            Some(frequencies) => frequencies,
            None if level == 0.0 => &none[..],
            None => bail!(NO_NOISE_LEVEL),
        };
        let angle = |frequency: &f32| TAU * level.ln_1p() * f64::from(*frequency);
        let cosines = frequencies
            .iter()
            .map(|frequency| angle(frequency).cos() as f32);
        let sines = frequencies
            .iter()
            .map(|frequency| angle(frequency).sin() as f32);
        Ok(cosines.chain(sines).collect())
    }

    fn blocks(&self) -> impl Iterator<Item = &Block> {
        self.down_blocks.iter().chain(&self.up_blocks)
    }

    /// The time embedding (b, time width), float32, for one network time, 0.25 ln(sigma).
    fn embed_time(&self, time: f32, prompted: &Prompted) -> Result<Tensor> {
        let parts = &self.time;
        let angle = f64::from(time) * TAU;
        let x = time_features(
            &prompted.condition,
            &parts.frequencies,
            angle,
            parts.cosine_first,
            &parts.placement,
        )?;
        let x = parts
            .activation
            .apply(&parts.linear_1.forward(&x)?, &parts.placement)?;
        let x = parts.linear_2.forward(&x)?;
        parts.post_activation.apply(&x, &parts.placement)
    }

    /// One call: `input` (b, in_channels, h, w), the scaled noisy latents and the condition; `time` is
    /// 0.25 ln(sigma); out comes (b, out_channels, h, w), float32. Sides are multiples of
    /// [`UNetConfig::side_multiple`] and no smaller than [`UNetConfig::side_minimum`].
    ///
    /// # Errors
    /// The input does not have the shape described.
    pub fn forward(&self, input: &Tensor, time: f32, prompted: &Prompted) -> Result<Tensor> {
        let input = FeatureMap::from_nchw(input, &self.placement)?;
        self.call(&input, time, prompted, &Room::unlimited())?
            .to_nchw()
    }

    /// Noisy latents `x` (b, c, h, w) and their condition, the low-res latents at that size, both float32, as latents without
    /// noise, (b, c, h, w), float32. One call of the network an entry of `prompted`: both prompts of guidance, or each. Maps are kept as
    /// `room` says.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn denoise(
        &self,
        x: &Tensor,
        condition: &Tensor,
        sampling: &Sampling,
        time: f32,
        prompted: &[Prompted],
        room: &Room,
    ) -> Result<Tensor> {
        let pictures = x.dim(0)?;
        let one = |prompted: &Prompted| -> Result<Tensor> {
            let prompts = prompted.rows()? / pictures;
            let input = sampling.input(x, Some(condition), prompts, &self.placement)?;
            // The last channel of the output is a variance that nobody reads.
            sampling.denoised(x, &self.call(&input, time, prompted, room)?)
        };
        match prompted {
            [all] => one(all),
            _ => {
                let each: Vec<Tensor> = prompted.iter().map(one).collect::<Result<_>>()?;
                guide(&Tensor::cat(&each, 0)?, sampling.guidance)
            }
        }
    }

    fn call(
        &self,
        input: &FeatureMap,
        time: f32,
        prompted: &Prompted,
        room: &Room,
    ) -> Result<FeatureMap> {
        ensure!(
            prompted.network == self.number,
            "prompts that another network has prepared"
        );
        let modulated = self.norms.forward(&self.embed_time(time, prompted)?)?;
        let all =
            |input: &FeatureMap, norms: &[ScaleShift]| self.untimed(input, norms, prompted, room);
        if room.is_unlimited() {
            return prompted.replay.run(input, &modulated, all);
        }
        // What goes to this machine's memory and back cannot be recorded.
        all(input, &modulated.each)
    }

    /// Everything behind the time embedding: the same work at every step.
    fn untimed(
        &self,
        input: &FeatureMap,
        norms: &[ScaleShift],
        prompted: &Prompted,
        room: &Room,
    ) -> Result<FeatureMap> {
        let input = Box::new(Stored::whole(input.clone())?);
        let mut x = store(conv(input, &self.conv_in).boxed(), None, room)?;
        let mut skips = Vec::with_capacity(self.down_blocks.len());
        for block in &self.down_blocks {
            x = block.forward(x, norms, prompted, room)?;
            skips.push(block.gives_skip.then(|| x.again()));
            x = block.resampled(x, room)?;
        }
        for block in &self.up_blocks {
            if let Some(skip) = skips.pop().flatten() {
                x = Box::new(Beside {
                    left: x,
                    right: skip,
                });
                if !x.reads_in_place() {
                    x = store(x, None, room)?;
                }
            }
            x = block.forward(x, norms, prompted, room)?;
            x = block.resampled(x, room)?;
        }
        let norm = match &self.norm_out {
            Some(norm) => Some(Norm::of(&*x, norm.clone(), room)?),
            None => None,
        };
        let out = conv(x, &self.conv_out);
        let out = match norm {
            Some(norm) => out.normed(norm),
            None => out,
        };
        Ok(out.boxed().into_whole()?.0)
    }
}
