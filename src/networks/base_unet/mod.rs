//! Stable Diffusion's own UNet, versions 1 and 2 (diffusers' UNet2DConditionModel): from noise to latents of a picture.

mod blocks;
mod config;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};

use self::blocks::{Builder, Level, Middle};
pub use self::config::BaseUNetConfig;
use crate::device::Placement;
use crate::layers::bands::{Beside, Norm, Room, Source, Stored, conv, store};
use crate::layers::{
    Activation, Conv2d, ConvShape, FeatureMap, GroupNorm, Linear, NormAct, Sampling, shapes,
};
use crate::model::{ModelFiles, Weights};

/// Everything that holds for one prompt at all steps.
pub struct Prompted {
    /// Key and value of every cross-attention, (b, tokens, channels), in the order of their numbers.
    keys_values: Vec<(Tensor, Tensor)>,
}

impl Prompted {
    /// The batch that these prompts are for.
    pub fn rows(&self) -> Result<usize> {
        let rows = self.keys_values.first().map(|(key, _)| key.dim(0));
        Ok(rows.transpose()?.unwrap_or(1))
    }
}

/// What changes from step to step: the first convolution of every resnet, its bias shifted by the time, in the order of their numbers.
pub struct Step {
    conv1: Vec<Conv2d>,
}

/// `linear_2(act(linear_1(cosines and sines of the time)))`
struct TimeEmbedding {
    /// Of the cosines and sines.
    frequencies: Vec<f32>,
    cosine_first: bool,
    linear_1: Linear,
    linear_2: Linear,
    placement: Placement,
}

/// The base network.
pub struct BaseUNet {
    conv_in: Conv2d,
    time: TimeEmbedding,
    /// What the time adds to the first convolution of every resnet, one after the other.
    shifts: Linear,
    activation: Activation,
    down: Vec<Level>,
    middle: Middle,
    up: Vec<Level>,
    norm_out: NormAct,
    conv_out: Conv2d,
    placement: Placement,
    pub config: BaseUNetConfig,
}

impl BaseUNet {
    /// Reads `unet/`.
    ///
    /// # Errors
    /// A file is missing or damaged, a tensor does not fit config.json, or the configuration is not a Stable Diffusion 1's or 2's.
    pub fn load(files: &ModelFiles, placement: &Placement) -> Result<Self> {
        let config = BaseUNetConfig::load(files)?;
        let w = files.weights("unet", "diffusion_pytorch_model", placement)?;
        Self::new(config, &w)
    }

    /// Of shapes alone, for planning what a run in `placement` takes.
    ///
    /// # Errors
    /// The configuration is not a Stable Diffusion 1's or 2's.
    pub fn of_shapes(config: BaseUNetConfig, placement: &Placement) -> Result<Self> {
        config.check()?;
        Self::new(config, &Weights::none(placement))
    }

    fn new(config: BaseUNetConfig, w: &Weights) -> Result<Self> {
        config.check_weights(w)?;
        let first = config.block_out_channels[0];
        let width = 4 * first;
        let activation =
            Activation::from_name(&config.act_fn).context("unet/config.json: act_fn")?;
        // A few rows that every resnet of every step is shifted by: in half precision too they are float32.
        let embedding = w.pp("time_embedding").in_dtype(DType::F32);
        let time = TimeEmbedding {
            frequencies: frequencies(first / 2, config.freq_shift),
            cosine_first: config.flip_sin_to_cos,
            linear_1: Linear::of_few_rows(first, width, &embedding.pp("linear_1"))?,
            linear_2: Linear::of_few_rows(width, width, &embedding.pp("linear_2"))?,
            placement: embedding.placement().clone(),
        };
        let mut build = Builder::new(&config, activation);
        let levels = 0..config.levels();
        let down = levels
            .clone()
            .map(|level| Level::down(&mut build, level, &w.pp("down_blocks").pp(level)))
            .collect::<Result<_>>()?;
        let middle = Middle::new(&mut build, &w.pp("mid_block"))?;
        let up = levels
            .map(|index| Level::up(&mut build, index, &w.pp("up_blocks").pp(index)))
            .collect::<Result<_>>()?;
        let (outputs, parts): (Vec<usize>, Vec<Weights>) = build.shifts.into_iter().unzip();
        let norm_out = GroupNorm::new(
            config.norm_num_groups,
            first,
            config.norm_eps,
            &w.pp("conv_norm_out"),
        )?;
        Ok(Self {
            conv_in: Conv2d::new(
                ConvShape::same(config.in_channels, first, 3),
                &w.pp("conv_in"),
            )?,
            time,
            shifts: Linear::joined_of_few_rows(width, &outputs, &parts)?,
            activation,
            down,
            middle,
            up,
            norm_out: norm_out.then(activation),
            conv_out: Conv2d::new(
                ConvShape::same(first, config.out_channels, 3).last(),
                &w.pp("conv_out"),
            )?,
            placement: w.placement().clone(),
            config,
        })
    }

    /// What holds for all steps: the keys and values of prompts, whose `context` is (b, tokens, width).
    ///
    /// # Errors
    /// The context's width is not what this network was made for.
    pub fn prompted(&self, context: &Tensor) -> Result<Prompted> {
        let (_, _, width) = context.dims3()?;
        ensure!(
            width == self.config.cross_attention_dim,
            "unet/config.json: cross_attention_dim is {}, but the text encoder gives {width}; text_encoder/ and unet/ do not belong together",
            self.config.cross_attention_dim
        );
        let context = context
            .to_device(&self.placement.device)?
            .to_dtype(self.placement.dtype)?;
        let levels = self.down.iter().chain(&self.up);
        let attentions = levels.flat_map(|level| &level.transformers);
        let mut numbered: Vec<_> = attentions.chain([&self.middle.transformer]).collect();
        numbered.sort_by_key(|transformer| transformer.number);
        let keys_values = numbered
            .into_iter()
            .map(|transformer| transformer.keys_values(&context))
            .collect::<Result<_>>()?;
        Ok(Prompted { keys_values })
    }

    /// What a call on a map of (b, in_channels, h, w) takes, by a network of shapes: `room` and the layers count it.
    ///
    /// # Errors
    /// It is no such network.
    pub fn measure(&self, (b, h, w): (usize, usize, usize), room: &Room) -> Result<()> {
        const TOKENS: usize = 77;
        let dtype = self.placement.dtype;
        let context = shapes::view((b, TOKENS, self.config.cross_attention_dim), dtype)?;
        let x = shapes::view((b, self.config.in_channels, h, w), dtype)?;
        for step in &self.steps(&[0.0])? {
            self.forward(&x, step, &self.prompted(&context)?, room)?;
        }
        room.passing();
        Ok(())
    }

    /// What holds at each time of a run, of the training's 1000, which may lie between two.
    ///
    /// # Errors
    /// The device gives up.
    pub fn steps(&self, timesteps: &[f32]) -> Result<Vec<Step>> {
        let embedding = self.time.forward(timesteps, self.activation)?;
        let embedding = self.activation.apply(&embedding, &self.time.placement)?;
        let all = self.shifts.forward(&embedding)?;
        // In the order that they are built in.
        let resnets = (self.down.iter().flat_map(|level| &level.resnets))
            .chain(&self.middle.resnets)
            .chain(self.up.iter().flat_map(|level| &level.resnets));
        let mut steps: Vec<Step> = Vec::new();
        steps.resize_with(timesteps.len(), || Step { conv1: Vec::new() });
        let mut first = 0;
        for resnet in resnets {
            let shifts = all.narrow(1, first, resnet.channels())?;
            first += resnet.channels();
            for (step, conv1) in steps.iter_mut().zip(resnet.conv1_at_each(&shifts)?) {
                step.conv1.push(conv1);
            }
        }
        Ok(steps)
    }

    /// One call: `x` (b, in_channels, h, w), float32, as the sampler scales it; out comes what the network predicts, of the same shape,
    /// float32. Any sides of 1 or more.
    ///
    /// # Errors
    /// The shapes do not fit, or the device gives up.
    pub fn forward(
        &self,
        x: &Tensor,
        step: &Step,
        prompted: &Prompted,
        room: &Room,
    ) -> Result<Tensor> {
        let input = FeatureMap::from_nchw(x, &self.placement)?;
        self.timed(&input, step, prompted, room)?.to_nchw()
    }

    /// The same of `x` for every prompt at once, of which there are as many as `x` has rows, or with a `guidance` twice as many, the
    /// negative ones first: what is predicted with them is put together by classifier-free guidance.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn guided(
        &self,
        x: &Tensor,
        step: &Step,
        prompted: &Prompted,
        guidance: f64,
        room: &Room,
    ) -> Result<Tensor> {
        let sampling = Sampling {
            c_in: 1.0,
            c_skip: 0.0,
            c_out: 1.0,
            guidance,
        };
        let prompts = prompted.rows()? / x.dim(0)?;
        let input = sampling.input(x, None, prompts, &self.placement)?;
        sampling.denoised(x, &self.timed(&input, step, prompted, room)?)
    }

    fn timed(
        &self,
        input: &FeatureMap,
        step: &Step,
        prompted: &Prompted,
        room: &Room,
    ) -> Result<FeatureMap> {
        let input = Box::new(Stored::whole(input.clone())?);
        let mut x = store(conv(input, &self.conv_in).boxed(), None, room)?;
        let mut skips = vec![x.again()];
        for level in &self.down {
            for index in 0..level.resnets.len() {
                x = level.layer(index, x, step, prompted, room)?;
                skips.push(x.again());
            }
            if let Some(resample) = &level.resample {
                x = store(conv(x, resample).boxed(), None, room)?;
                skips.push(x.again());
            }
        }
        x = self.middle.forward(x, step, prompted, room)?;
        for level in &self.up {
            for index in 0..level.resnets.len() {
                let skip = skips
                    .pop()
                    .context("as many skips as layers on the way up")?;
                x = beside(x, skip, room)?;
                x = level.layer(index, x, step, prompted, room)?;
            }
            if let Some(resample) = &level.resample {
                let next = skips.last().context("a skip of the next level")?.size();
                x = enlarged(x, resample, (next.h, next.w), room)?;
            }
        }
        let norm = Norm::of(&*x, self.norm_out.clone(), room)?;
        Ok(conv(x, &self.conv_out).normed(norm).boxed().into_whole()?.0)
    }
}

/// Two maps' channels, read where they are if that is possible.
fn beside<'a>(left: Source<'a>, right: Source<'a>, room: &Room) -> Result<Source<'a>> {
    let both: Source = Box::new(Beside { left, right });
    if both.reads_in_place() {
        return Ok(both);
    }
    store(both, None, room)
}

/// `conv(x enlarged to (h, w))`, where each side is twice that of `x`, or one less.
fn enlarged<'a>(
    x: Source<'a>,
    resample: &'a Conv2d,
    (h, w): (usize, usize),
    room: &Room,
) -> Result<Source<'a>> {
    let size = x.size();
    if (h, w) == (2 * size.h, 2 * size.w) {
        return store(conv(x, resample).upsampled().boxed(), None, room);
    }
    let (map, _) = x.into_whole()?;
    let map = Stored::whole(map.enlarged_to(h, w)?)?;
    store(conv(Box::new(map), resample).boxed(), None, room)
}

/// `exp(-ln 10000 * k / (half - shift))` for k in 0..half, in float32 as PyTorch has them
/// (diffusers `models/embeddings.py`, `get_timestep_embedding`).
fn frequencies(half: usize, shift: f64) -> Vec<f32> {
    let ln = -(10000f64.ln()) as f32;
    let divisor = (half as f64 - shift) as f32;
    (0..half).map(|k| (ln * k as f32 / divisor).exp()).collect()
}

impl TimeEmbedding {
    /// (times, 4 * channels), float32.
    fn forward(&self, timesteps: &[f32], activation: Activation) -> Result<Tensor> {
        let features = timesteps.iter().flat_map(|time| self.features(*time));
        let shape = (timesteps.len(), 2 * self.frequencies.len());
        let x = Tensor::from_vec(features.collect(), shape, &Device::Cpu)?;
        let x = x.to_device(&self.placement.device)?;
        let x = activation.apply(&self.linear_1.forward(&x)?, &self.placement)?;
        self.linear_2.forward(&x)
    }

    /// Cosines and sines of a time.
    fn features(&self, timestep: f32) -> Vec<f32> {
        let angles = || {
            self.frequencies
                .iter()
                .map(move |frequency| timestep * frequency)
        };
        let (cosines, sines) = (angles().map(f32::cos), angles().map(f32::sin));
        if self.cosine_first {
            cosines.chain(sines).collect()
        } else {
            sines.chain(cosines).collect()
        }
    }
}
