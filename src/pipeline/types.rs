//! What goes into the pipeline and comes out of it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};

use super::embeds::PromptEmbeds;
use super::padding::Extent;
use super::sampler::Sampler;
use super::schedule::Schedule;
use crate::model::{ModelFiles, PartFiles};
use crate::pixels::Pixels;

/// What to run, and on what.
#[derive(Clone, Debug)]
pub struct Options {
    /// Text encoder, tokenizer, UNet, scheduler and, unless `vae` is given, the VAE.
    pub model: ModelFiles,
    /// Another VAE than the model's own.
    pub vae: Option<PartFiles>,
    /// Where the networks run.
    pub device: Device,
    /// Precision of the UNet and the VAE's decoder: F32, F16 or BF16, of weights and maps. Sums are F32, as are the text encoder and the
    /// VAE's encoder. What overflows in F16 is done again in BF16 or F32.
    pub dtype: DType,
    /// Keep the networks in memory between pictures. Otherwise each is dropped as soon as its stage is done,
    /// which halves the peak for a single picture.
    pub keep_loaded: bool,
    /// How much memory the work may take.
    pub memory: Memory,
}

/// How much memory the work may take, and where it puts what does not fit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// The most that the process may take, in bytes, what it has already among them; None: what is free.
    pub most: Option<u64>,
    /// The folder for maps that do not fit in memory, which must be there; None: the system's for temporary files.
    pub temp_dir: Option<PathBuf>,
}

impl Options {
    /// `model` on the CPU in float32, its networks kept in memory.
    pub fn new(model: ModelFiles) -> Self {
        Self {
            model,
            vae: None,
            device: Device::Cpu,
            dtype: DType::F32,
            keep_loaded: true,
            memory: Memory::default(),
        }
    }
}

/// The largest guidance scale. Pictures burn out above some 20; ComfyUI's own sliders end here, and what a network gives,
/// times this, stays far from overflow.
pub const MAX_GUIDANCE: f64 = 100.0;

/// How many times as large a result is, in each direction. The model doubles; what it made is doubled again, as latents: nothing
/// is decoded between, and every pass starts from the seed's own noise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Enlargement {
    /// One pass.
    #[default]
    Two,
    /// Two passes.
    Four,
    /// Three passes.
    Eight,
}

impl Enlargement {
    /// All of them, the smallest first.
    pub const ALL: [Self; 3] = [Self::Two, Self::Four, Self::Eight];

    /// 2, 4 or 8.
    pub fn times(self) -> usize {
        1 << self.passes()
    }

    /// How often the model doubles.
    pub fn passes(self) -> usize {
        match self {
            Self::Two => 1,
            Self::Four => 2,
            Self::Eight => 3,
        }
    }
}

impl fmt::Display for Enlargement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.times().fmt(f)
    }
}

impl FromStr for Enlargement {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|one| one.to_string() == text);
        found.ok_or_else(|| "expected 2, 4 or 8".into())
    }
}

/// The highest noise level: what the original's notebook offers.
pub const MAX_NOISE_LEVEL: f64 = 0.6;

/// What a noise level does to the low-res latents, of which the network is told the level either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NoiseType {
    /// Normal noise of that spread is added to them.
    #[default]
    Gaussian,
    /// They stay as they are.
    Fake,
}

impl NoiseType {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Gaussian, Self::Fake];

    /// As the command line and metadata call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gaussian => "gaussian",
            Self::Fake => "fake",
        }
    }
}

/// How to upscale one picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// What the picture shows; only the first 75 tokens or so count.
    pub prompt: String,
    /// What to steer away from; used with a guidance scale above 1 alone.
    pub negative_prompt: String,
    /// The text encoder's numbers in place of `prompt`, and where they have one in place of `negative_prompt`; the base checkpoint, which
    /// has a text encoder of its own, takes the words. [`mask_padding`](Self::mask_padding) is of words alone.
    pub prompt_embeds: Option<PromptEmbeds>,
    /// How many times as large the result is.
    pub scale: Enlargement,
    /// Denoising steps of each pass, at least 1; of no account to [`Sampler::DpmAdaptive`].
    pub steps: usize,
    /// 0 ignores the prompt; up to 1 uses it in one pass; above 1, up to [`MAX_GUIDANCE`], is classifier-free guidance in
    /// two passes.
    pub guidance: f64,
    /// The noise that PyTorch's CPU generator gives for this seed.
    pub seed: u64,
    /// How the noise levels of the steps are spaced; of no account to samplers that take none ([`Sampler::takes_a_schedule`]).
    pub schedule: Schedule,
    /// The way from noise to the result.
    pub sampler: Sampler,
    /// How much of the noise samplers that add some as they go ([`Sampler::takes_eta`]) do add: 0, none, to 1.
    pub eta: f64,
    /// The error that [`Sampler::DpmAdaptive`] allows in a step, as the original's `tol_scale`: [`MIN_TOLERANCE`] to [`MAX_TOLERANCE`],
    /// less is closer and takes more evaluations.
    pub tolerance: f64,
    /// Noise augmentation of the low-res latents, 0 (none) to [`MAX_NOISE_LEVEL`]: the network takes them to have noise of this spread,
    /// and keeps less to them. Above 0 it needs a model with `low_res_noise_embed.weight` ([`Upscaler::check`](super::Upscaler::check)).
    pub noise_level: f64,
    /// What the noise level does to the latents. Its noise is the seed's next draw behind the posterior's and before the starting noise.
    pub noise_type: NoiseType,
    /// Whether the picture attends to a prompt's own tokens alone, as the model was trained, and not to the padding behind them, as
    /// diffusers' pipeline does.
    pub mask_padding: bool,
    /// Steps of the base checkpoint's sampler, 1 to 1000, where one is used.
    pub base_steps: usize,
    /// Guidance of the base checkpoint, 0 to [`MAX_GUIDANCE`]: above 1 in two passes, else the prompt alone.
    pub base_guidance: f64,
    /// Refine the result by the base checkpoint at this strength, above 0 to 1: that share of [`base_steps`](Self::base_steps) is done again.
    pub refine: Option<f64>,
}

/// How the base checkpoint is run.
#[derive(Clone, Debug, PartialEq)]
pub struct BaseSettings {
    /// What the picture shows.
    pub prompt: String,
    /// What to steer away from; used with a guidance above 1 alone.
    pub negative_prompt: String,
    /// Steps of the sampler, 1 to 1000.
    pub steps: usize,
    /// Up to 1 the prompt alone, in one pass; above, up to 100, classifier-free guidance in two.
    pub guidance: f64,
}

impl Default for BaseSettings {
    fn default() -> Self {
        Self {
            prompt: String::new(),
            negative_prompt: String::new(),
            steps: 50,
            guidance: 7.5,
        }
    }
}

impl BaseSettings {
    /// Whether there are two passes.
    pub fn is_guided(&self) -> bool {
        self.guidance > 1.0
    }

    pub(super) fn check(&self) -> Result<()> {
        ensure!(
            (1..=1000).contains(&self.steps),
            "{} steps of the base checkpoint were asked for; expected 1 to 1000",
            self.steps
        );
        ensure!(
            (0.0..=MAX_GUIDANCE).contains(&self.guidance),
            "a guidance of {} was given for the base checkpoint; expected 0 to {MAX_GUIDANCE}",
            self.guidance
        );
        Ok(())
    }
}

/// How many of so many steps a pass over latents at a strength, 0 to 1, does again; as diffusers counts them.
pub fn refined_steps(steps: usize, strength: f64) -> usize {
    // In double precision, as there: 50 * 0.58 is 28.
    ((steps as f64 * strength) as usize).min(steps)
}

/// The smallest tolerance: what it allows is float32's rounding.
pub const MIN_TOLERANCE: f64 = 1e-6;
/// The largest tolerance: an error as large as the value.
pub const MAX_TOLERANCE: f64 = 20.0;

impl Settings {
    /// Of the base checkpoint, where it is used.
    pub(super) fn base(&self) -> BaseSettings {
        BaseSettings {
            prompt: self.prompt.clone(),
            negative_prompt: self.negative_prompt.clone(),
            steps: self.base_steps,
            guidance: self.base_guidance,
        }
    }

    /// # Errors
    /// A number is out of its range.
    pub(super) fn check(&self) -> Result<()> {
        ensure!(self.steps > 0, "at least one step is needed");
        for (name, value, from, to) in [
            ("a guidance", self.guidance, 0.0, MAX_GUIDANCE),
            ("an eta", self.eta, 0.0, 1.0),
            ("a tolerance", self.tolerance, MIN_TOLERANCE, MAX_TOLERANCE),
            ("a noise level", self.noise_level, 0.0, MAX_NOISE_LEVEL),
        ] {
            ensure!(
                (from..=to).contains(&value),
                "{name} of {value} was given; expected {from} to {to}"
            );
        }
        ensure!(
            self.refine
                .is_none_or(|strength| strength > 0.0 && strength <= 1.0),
            "a strength of {} was given to refine by; expected above 0, up to 1",
            self.refine.unwrap_or_default()
        );
        Ok(())
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            prompt: String::new(),
            negative_prompt: String::new(),
            prompt_embeds: None,
            scale: Enlargement::Two,
            steps: 20,
            guidance: 1.0,
            seed: 0,
            schedule: Schedule::Karras,
            sampler: Sampler::Euler,
            eta: 1.0,
            tolerance: 0.25,
            base_steps: 50,
            base_guidance: 7.5,
            refine: None,
            noise_level: 0.0,
            noise_type: NoiseType::Gaussian,
            mask_padding: false,
        }
    }
}

/// What is to be upscaled.
#[derive(Clone, Debug)]
pub enum LowRes {
    /// (1, 3, h, w) in [-1, 1], float32, on the CPU; any h and w from 1.
    Image(Tensor),
    /// (1, 4, h, w), scaled latents, float32, on the CPU; any h and w from 1.
    Latents(Tensor),
    /// Nothing: a picture of so many pixels, multiples of 8, is first made of [`Settings::prompt`] by the base checkpoint
    /// ([`Upscaler::set_base`](super::Upscaler::set_base)).
    Prompt {
        /// In pixels.
        width: usize,
        /// In pixels.
        height: usize,
    },
}

impl LowRes {
    /// A picture of any size from 1x1.
    ///
    /// # Errors
    /// The values are not width * height * 3, or there are none.
    pub fn image(pixels: &Pixels) -> Result<Self> {
        let (width, height) = (pixels.width, pixels.height);
        ensure!(
            width > 0 && height > 0 && pixels.values.len() == width * height * 3,
            "a picture of {width}x{height} has {} values, found {}",
            width * height * 3,
            pixels.values.len()
        );
        let signed: Vec<f32> = pixels.values.iter().map(|v| 2.0 * v - 1.0).collect();
        let tensor = Tensor::from_vec(signed, (1, height, width, 3), &Device::Cpu)?
            .permute((0, 3, 1, 2))?
            .contiguous()?;
        Ok(Self::Image(tensor))
    }

    /// Latents in the scale of Stable Diffusion's UNets (VAE output times the scaling factor): (4, height, width).
    ///
    /// # Errors
    /// The values are not 4 * height * width, or there are none.
    pub fn latents(width: usize, height: usize, values: Vec<f32>) -> Result<Self> {
        ensure!(
            width > 0 && height > 0 && values.len().is_multiple_of(width * height),
            "latents of {width}x{height} were given {} values",
            values.len()
        );
        let channels = values.len() / (width * height);
        let tensor = Tensor::from_vec(values, (1, channels, height, width), &Device::Cpu)?;
        Ok(Self::Latents(tensor))
    }
}

/// Latents of the upscaled picture, extended to what the networks take.
#[derive(Clone, Debug)]
pub struct UpscaledLatents {
    /// (1, 4, H, W), scaled, float32; on the CPU, but for those that the next pass of the same upscale goes on with.
    pub(super) padded: Tensor,
    /// The picture's width in pixels, exactly the input's times [`Settings::scale`].
    pub width: usize,
    /// The picture's height in pixels, exactly the input's times [`Settings::scale`].
    pub height: usize,
    /// How often the UNet was evaluated for it, in all passes: what was done again in another precision or on another device counts once.
    pub evaluations: usize,
    /// Whether the base checkpoint had the last word on it, whose VAE decodes it then where no other was named.
    pub(super) refined: bool,
    /// Of a picture that was made from a prompt, the base checkpoint's latents: (1, 4, h, w), scaled, float32.
    pub(super) base: Option<Tensor>,
    /// Latent positions without the extension: enough for the picture, and for an input whose sides are no multiples of
    /// theirs a few more.
    pub(super) positions: Extent,
}

impl UpscaledLatents {
    /// The latents without the extension: (1, 4, h, w), scaled, float32, on the CPU.
    ///
    /// # Errors
    /// candle's own only.
    pub fn latents(&self) -> Result<Tensor> {
        Ok(self.where_they_are()?.to_device(&Device::Cpu)?)
    }

    /// The same where it is.
    pub(super) fn where_they_are(&self) -> Result<Tensor> {
        let Extent { width, height } = self.positions;
        let latents = self.padded.narrow(2, 0, height)?.narrow(3, 0, width)?;
        Ok(latents.contiguous()?)
    }

    /// The base checkpoint's latents that it was upscaled from: (1, 4, h, w), scaled, float32, on the CPU. None where it was not made
    /// from a prompt alone.
    ///
    /// # Errors
    /// candle's own only.
    pub fn base_latents(&self) -> Result<Option<Tensor>> {
        let base = self.base.as_ref();
        Ok(base.map(|base| base.to_device(&Device::Cpu)).transpose()?)
    }
}

/// The parts of the work, for progress and messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// The base checkpoint: noise, or upscaled latents with some noise, to latents.
    Base,
    /// Prompt to conditioning.
    Text,
    /// Image to latents.
    Encode,
    /// Noise to upscaled latents, a step at a time.
    Denoise,
    /// Latents to image.
    Decode,
}

impl Stage {
    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Base => "base",
            Stage::Text => "text",
            Stage::Encode => "encode",
            Stage::Denoise => "denoise",
            Stage::Decode => "decode",
        }
    }
}

/// What a caller may want to show while a picture is made.
#[derive(Clone, Debug)]
pub enum Event {
    /// A stage begins, its weights loaded.
    Started(Stage),
    /// A stage's weights are being read.
    Loading(Stage),
    /// The UNet was evaluated once more: a step, or a part of one ([`Sampler`] says of which).
    Step {
        /// Evaluations so far, from 1, those of earlier passes among them. Where the inputs of a batch are done one by one, those of each.
        done: usize,
        /// Evaluations in all, of every pass; None where the sampler finds its steps as it goes.
        total: Option<usize>,
        /// What part of the way is done, 0..=1: of all passes, each counted as much.
        way: f64,
        /// Of this evaluation alone.
        seconds: f64,
    },
    /// The base checkpoint's UNet was called once more.
    BaseStep {
        /// Calls so far, from 1.
        done: usize,
        /// Calls in all.
        total: usize,
        /// Of this call alone.
        seconds: f64,
    },
    /// What a step shows so far, where that was asked for ([`Upscaler::send_previews`](super::Upscaler::send_previews)).
    Preview {
        /// Of the input within its batch, from 0.
        index: usize,
        /// The result of this pass as the step takes it to be, perhaps smaller than it will be.
        picture: Pixels,
    },
    /// A stage is done, after so many seconds, loading included.
    Finished {
        /// Which one.
        stage: Stage,
        /// From its beginning, loading included.
        seconds: f64,
    },
    /// Something the user should know.
    Warning(String),
}

/// Told of every [`Event`]; an error it returns ends the work (how a caller cancels).
pub type OnEvent<'a> = &'a mut dyn FnMut(Event) -> Result<()>;

/// Takes a picture as it is made, from the top line down.
pub trait PictureSink {
    /// A picture of so many pixels begins; what was given of it before counts no more (it is done again in another precision,
    /// or on the CPU).
    ///
    /// # Errors
    /// The sink's own, which end the work.
    fn begin(&mut self, width: usize, height: usize) -> Result<()>;

    /// The next lines, (n, width, 3) interleaved RGB, 0..=1.
    ///
    /// # Errors
    /// The sink's own, which end the work.
    fn lines(&mut self, values: Vec<f32>) -> Result<()>;
}

/// Denotes results that are not numbers: the stage overflowed in its precision.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the {} stage gave values that are not numbers (in {dtype:?})", stage.name())]
pub struct NotFinite {
    /// Where it happened.
    pub stage: Stage,
    /// The precision that the stage ran in.
    pub dtype: DType,
}

/// # Errors
/// [`NotFinite`], where `values` holds anything that is not a number.
pub fn check_finite(values: &[f32], stage: Stage, dtype: DType) -> Result<()> {
    ensure!(
        values.iter().all(|v| v.is_finite()),
        NotFinite { stage, dtype }
    );
    Ok(())
}

/// The same of latents, float32, that stay where they are: of a card's, one number is read back.
///
/// # Errors
/// As [`check_finite`].
pub fn check_latents(latents: &Tensor, stage: Stage, dtype: DType) -> Result<()> {
    if latents.device().is_cpu() {
        return check_finite(&floats(latents)?, stage, dtype);
    }
    // 0 of a number, and not a number of anything else: so is the sum.
    let sum = (latents * 0.0)?.sum_all()?;
    check_finite(&[sum.to_scalar()?], stage, dtype)
}

/// A tensor's values in C order, whatever its dtype and device.
pub fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}
