//! The pipeline: encode the prompt and the picture, denoise, decode. Load once, upscale many.

mod augment;
#[doc(hidden)] // for the parity tests
pub mod base;
mod base_vae;
mod course;
mod denoise;
mod embeds;
mod generate;
mod loaded;
mod memory;
#[doc(hidden)] // for the parity tests
pub mod noise;
mod padding;
mod passes;
#[doc(hidden)] // for the parity tests
pub mod preconditioning;
mod preview;
mod progress;
mod prompts;
mod recover;
#[doc(hidden)] // for the parity tests
pub mod sampler;
#[doc(hidden)] // for the parity tests
pub mod schedule;
mod sinks;
mod types;

use std::cell::RefCell;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};

use self::base::BaseModel;
use self::base_vae::{Other, Whose};
use self::course::Course;
use self::denoise::{Denoiser, Passes};
pub use self::embeds::PromptEmbeds;
use self::loaded::loaded;
use self::memory::Planner;
pub use self::memory::{InputKind, PlanFor, StagePlan, TooLittle};
use self::noise::Generator;
use self::padding::Extent;
use self::passes::Pass;
use self::preview::Previews;
use self::progress::Progress;
use self::prompts::Prompts;
use self::recover::OnCpu;
pub use self::sampler::Sampler;
use self::sampler::dpm::NotANumber;
pub use self::schedule::Schedule;
use self::schedule::{SchedulerConfig, SigmaRange};
use self::sinks::{Guarded, Whole};
pub use self::types::{
    Enlargement, Event, LowRes, MAX_GUIDANCE, MAX_NOISE_LEVEL, MAX_TOLERANCE, MIN_TOLERANCE,
    Memory, NoiseType, NotFinite, OnEvent, Options, PictureSink, Settings, Stage, UpscaledLatents,
    refined_steps,
};
use self::types::{check_finite, check_latents, floats};
use crate::device::{Backend, Placement};
use crate::model::{ModelFiles, PartFiles};
use crate::networks;
use crate::networks::Room;
use crate::networks::text::Conditioning;
use crate::networks::unet::{UNet, UNetConfig, has_noise_level};
use crate::networks::vae::{Decoder, Encoder, VaeConfig};
use crate::pixels::Pixels;

/// The latent upscaler with all its parts.
///
/// ```no_run
/// use sd_upscale::{LowRes, Memory, ModelFiles, Options, Pixels, Settings, Upscaler};
/// # fn main() -> anyhow::Result<()> {
/// let mut upscaler = Upscaler::new(Options {
///     model: ModelFiles::Folder("models/sd-x2-latent-upscaler".into()),
///     vae: None,
///     device: candle_core::Device::Cpu,
///     dtype: candle_core::DType::F32,
///     keep_loaded: true,
///     memory: Memory { most: Some(8_000_000_000), temp_dir: None },
/// })?;
/// let low_res = LowRes::image(&Pixels::new(64, 64, vec![0.5; 64 * 64 * 3])?)?;
/// let settings = Settings { prompt: "a grey square".into(), ..Settings::default() };
/// let upscaled = upscaler.upscale(&[low_res], &settings, &mut |_| Ok(()))?;
/// let picture = upscaler.decode(&upscaled[0], &mut |_| Ok(()))?;
/// assert_eq!((picture.width, picture.height), (128, 128));
/// # Ok(())
/// # }
/// ```
pub struct Upscaler {
    options: Options,
    vae_files: PartFiles,
    unet_config: UNetConfig,
    vae_config: VaeConfig,
    sigma_range: SigmaRange,
    placement: Placement,
    /// The VAE's decoder.
    vae_placement: Placement,
    encoder_placement: Placement,
    /// Apart once one batch of both did not fit in memory.
    passes: Passes,
    prompts: Prompts,
    encoder: Option<Encoder>,
    unet: Option<UNet>,
    decoder: Option<Decoder>,
    other_vae: Option<Other>,
    base_files: Option<ModelFiles>,
    base: Option<BaseModel>,
    /// Of the layers' notes.
    notes_told: usize,
    /// What is too large for the card.
    on_cpu: OnCpu,
    planner: Planner,
    /// Bytes that plans keep to once a card ran out of memory all the same.
    smaller: Option<u64>,
    /// Whether steps are shown.
    previews: bool,
}

/// The VAE's placements for a run in `dtype`: encoder and decoder.
///
/// The decoder's maps are what a picture takes of memory, so that they are kept in float16, which is 7 times as close to
/// float32 as bfloat16 (benches/README.md); those that overflow are done again, see [`recover`]. The encoder's maps
/// are a quarter of them, and its error is one that all steps start from: there half precision is float32, multiplied as
/// a card's tensor cores can. candle's operations sum float16 in float16, which overflows: float32 in its place.
fn vae_placements(device: &Device, dtype: DType) -> (Placement, Placement) {
    let mut encoder = Placement::new(device, dtype);
    let mut decoder = Placement::new(device, dtype);
    if dtype != DType::F32 && (decoder.has_own_kernels() || dtype == DType::F16) {
        encoder.dtype = DType::F32;
        encoder.tf32 = true;
    }
    if dtype == DType::F16 && !decoder.has_own_kernels() {
        decoder.dtype = DType::F32;
    }
    (encoder, decoder)
}

impl Upscaler {
    /// Reads the configurations; weights are read when their stage is first needed.
    ///
    /// # Errors
    /// A configuration is missing or damaged, or is not a latent upscaler's.
    pub fn new(options: Options) -> Result<Self> {
        let vae_files = options.vae.clone().unwrap_or_else(|| PartFiles {
            files: options.model.clone(),
            part: "vae",
            weights: None,
        });
        let scheduler: SchedulerConfig = options.model.json("scheduler/scheduler_config.json")?;
        let unet_config: UNetConfig = options.model.json("unet/config.json")?;
        unet_config.check()?;
        let vae_config = VaeConfig::load(&vae_files)?;
        let (encoder_placement, vae_placement) = vae_placements(&options.device, options.dtype);
        let channels = vae_config.latent_channels();
        ensure!(
            unet_config.in_channels == 2 * channels && unet_config.out_channels > channels,
            "unet/config.json: in_channels {} and out_channels {} do not go with the latent_channels {channels} of vae/config.json (expected {} and {}): a VAE of Stable Diffusion 1 or 2 has 4, those of SD3 and Flux have 16",
            unet_config.in_channels,
            unet_config.out_channels,
            2 * channels,
            channels + 1,
        );
        let mut upscaler = Self {
            sigma_range: scheduler.sigma_range()?,
            placement: Placement::new(&options.device, options.dtype),
            vae_placement,
            encoder_placement,
            vae_files,
            unet_config,
            vae_config,
            passes: Passes::Together,
            prompts: Prompts::default(),
            encoder: None,
            unet: None,
            decoder: None,
            other_vae: None,
            base_files: None,
            base: None,
            notes_told: 0,
            on_cpu: OnCpu::default(),
            planner: Planner::default(),
            smaller: None,
            previews: false,
            options,
        };
        // What is used once is not worth a copy.
        let once = !upscaler.options.keep_loaded;
        for placement in upscaler.placements() {
            placement.weights_in_place = once;
        }
        Ok(upscaler)
    }

    /// Latents are raw ones times this, so that their spread is near 1. Raw is what a KL VAE gives, whichever VAE this has: what is
    /// in files stays the same.
    pub fn scaling_factor(&self) -> f32 {
        self.vae_config.raw_factor() as f32
    }

    /// Pixels to a latent position, in each direction.
    pub fn pixels_per_latent(&self) -> usize {
        self.vae_config.factor()
    }

    /// Use candle's stock operations even where this program has kernels of its own: for comparisons.
    pub fn use_stock_operations(&mut self) {
        for placement in self.placements() {
            placement.backend = Backend::Stock;
        }
        if self.vae_placement.dtype == DType::F16 {
            self.vae_placement.dtype = DType::F32;
        }
        self.forget();
    }

    /// Let float32 values be rounded to TF32 (11 bits) where a CUDA card multiplies them, which its tensor cores are fast at. Elsewhere
    /// this changes nothing.
    pub fn allow_tf32(&mut self) {
        for placement in self.placements() {
            placement.tf32 = true;
        }
        self.forget();
    }

    /// Tell of every step what it shows so far, by [`Event::Preview`]: the result as the step takes it to be, decoded where the VAE is an
    /// AutoencoderTiny, else by a linear map at a pixel a latent position. The results stay the same to the bit. What it takes of memory is planned for; where
    /// there is too little, the linear map is taken.
    pub fn send_previews(&mut self) {
        self.previews = true;
    }

    /// What the layers had to tell since this was asked last that only a curious user wants to know: shapes that a library of CUDA's did
    /// not take, and what was done about it.
    pub fn notes(&mut self) -> Vec<String> {
        let all = networks::notes(&self.placement);
        let new = all.iter().skip(self.notes_told).cloned().collect();
        self.notes_told = all.len();
        new
    }

    /// Whether the settings are in their ranges, and the model can do what they ask of it, as far as the names of its tensors tell: a noise
    /// level above 0 is not for every one, and prompts in numbers are of one text encoder.
    ///
    /// # Errors
    /// They are not, or it cannot; the message names what it lacks. Or its UNet's weights cannot be read.
    pub fn check(&self, settings: &Settings) -> Result<()> {
        settings.check()?;
        if let Some(embeds) = &settings.prompt_embeds {
            let (width, pooled) = self.unet_config.prompt_widths()?;
            embeds.check(width, pooled)?;
        }
        let level = settings.noise_level;
        if level == 0.0 || self.unet.is_some() {
            return Ok(());
        }
        has_noise_level(&UNet::weights(&self.options.model, &self.placement)?)
    }

    fn placements(&mut self) -> [&mut Placement; 3] {
        [
            &mut self.placement,
            &mut self.encoder_placement,
            &mut self.vae_placement,
        ]
    }

    fn forget(&mut self) {
        self.prompts.clear();
        (self.encoder, self.unet, self.base) = (None, None, None);
        self.forget_decoders();
    }

    /// Upscale a batch of inputs of one kind and size, each from the seed's own noise: the latents are those
    /// that each would give alone. [`Sampler::DpmAdaptive`], whose steps are a picture's own, does them one after the other. At a scale above 2 they are those that the latents of half the scale give.
    ///
    /// # Errors
    /// Weights that cannot be read, a batch of unequal sizes, numbers that overflow even in float32, or an
    /// error from `on_event`.
    pub fn upscale(
        &mut self,
        inputs: &[LowRes],
        settings: &Settings,
        on_event: OnEvent,
    ) -> Result<Vec<UpscaledLatents>> {
        self.all_passes(inputs, settings, on_event)
    }

    /// How often the UNet will be evaluated for one input, in all passes; None where the sampler finds that out.
    pub fn evaluations(&self, settings: &Settings) -> Option<usize> {
        let of_pass = Course::new(settings, &self.sigma_range).evaluations()?;
        Some(settings.scale.passes() * of_pass)
    }

    /// Decode upscaled latents to the picture they stand for.
    ///
    /// # Errors
    /// As [`upscale`](Self::upscale).
    pub fn decode(&mut self, upscaled: &UpscaledLatents, on_event: OnEvent) -> Result<Pixels> {
        let mut whole = Whole::default();
        self.decode_to(upscaled, &mut whole, on_event)?;
        whole.into_pixels()
    }

    /// Decode upscaled latents, a number of lines at a time, into `sink`.
    ///
    /// # Errors
    /// As [`upscale`](Self::upscale), and the sink's own, as it gave it.
    pub fn decode_to(
        &mut self,
        upscaled: &UpscaledLatents,
        sink: &mut dyn PictureSink,
        on_event: OnEvent,
    ) -> Result<()> {
        let whose = self.decoded_by(upscaled.refined);
        self.decode_by(whose, upscaled, sink, on_event)
    }

    fn decode_by(
        &mut self,
        whose: Whose,
        latents: &UpscaledLatents,
        sink: &mut dyn PictureSink,
        on_event: OnEvent,
    ) -> Result<()> {
        let pixels = latents.width * latents.height;
        let mut sink = Guarded::new(sink);
        let decoded = self.recovering(Some(pixels), on_event, |upscaler, on_event| {
            upscaler.with_vae(whose, |upscaler| {
                upscaler.decode_once(latents, &mut sink, on_event)
            })
        });
        sink.or_refusal(decoded)
    }

    /// Decode the input itself, not upscaled: what the latents show before.
    ///
    /// # Errors
    /// As [`upscale`](Self::upscale).
    pub fn decode_low_res(&mut self, input: &LowRes, on_event: OnEvent) -> Result<Pixels> {
        let mut whole = Whole::default();
        self.decode_low_res_to(input, &mut whole, on_event)?;
        whole.into_pixels()
    }

    /// [`decode_low_res`](Self::decode_low_res), a number of lines at a time, into `sink`.
    ///
    /// # Errors
    /// As [`decode_to`](Self::decode_to).
    pub fn decode_low_res_to(
        &mut self,
        input: &LowRes,
        sink: &mut dyn PictureSink,
        on_event: OnEvent,
    ) -> Result<()> {
        let LowRes::Latents(latents) = input else {
            bail!("only latents are decoded for comparison; an image is its own");
        };
        let low_res = self.as_they_are(latents)?;
        self.decode_to(&low_res, sink, on_event)
    }

    /// The stages of a pass, in their order; [`recover`] does them again where they overflow.
    fn upscale_once(
        &mut self,
        inputs: &[LowRes],
        settings: &Settings,
        pass: Pass,
        on_event: OnEvent,
    ) -> Result<Vec<UpscaledLatents>> {
        self.check(settings)?;
        let conditioning = self.condition(settings, on_event)?;
        let mut generators = vec![Generator::new(settings.seed); inputs.len()];
        let mut batch = self.low_res(inputs, settings, &mut generators, on_event)?;
        batch.latents = augment::augmented(batch.latents, settings, &mut generators)?;
        let base = std::mem::take(&mut batch.base);
        let (latents, evaluations) = self.denoise(
            &batch,
            &mut generators,
            &conditioning,
            settings,
            pass,
            on_event,
        )?;
        let latents = if pass.is_last() {
            self.refined(latents, settings, &mut generators, on_event)?
        } else {
            latents
        };
        let factor = self.vae_config.factor();
        let refined = pass.is_last() && settings.refine.is_some();
        let one = |(i, (extent, base)): (usize, (Extent, Option<Tensor>))| {
            let Extent { width, height } = extent.doubled();
            Ok(UpscaledLatents {
                padded: latents.narrow(0, i, 1)?.contiguous()?,
                width,
                height,
                positions: Extent {
                    width: width.div_ceil(factor),
                    height: height.div_ceil(factor),
                },
                evaluations,
                refined,
                base,
            })
        };
        let each = std::iter::zip(batch.extents, base);
        each.enumerate().map(one).collect()
    }

    fn condition(&mut self, settings: &Settings, on_event: OnEvent) -> Result<Vec<Conditioning>> {
        let start = Instant::now();
        let placement = self.text_placement();
        let conditioning =
            self.prompts
                .conditioning(settings, &self.options.model, &placement, on_event)?;
        finished(Stage::Text, start, on_event)?;
        Ok(conditioning)
    }

    /// The text encoder's: on our kernels in float32 at least, since the error of a prompt is one that all steps share, and guidance
    /// multiplies what two prompts differ by. It runs once a prompt.
    fn text_placement(&self) -> Placement {
        let mut placement = self.placement.clone();
        if placement.has_own_kernels() {
            placement.dtype = DType::F32;
        }
        placement
    }

    /// The inputs as one batch.
    fn low_res(
        &mut self,
        inputs: &[LowRes],
        settings: &Settings,
        generators: &mut [Generator],
        on_event: OnEvent,
    ) -> Result<Batch> {
        let mut batch = Vec::with_capacity(inputs.len());
        let mut extents = Vec::with_capacity(inputs.len());
        let mut base = Vec::with_capacity(inputs.len());
        for (input, generator) in inputs.iter().zip(generators) {
            let mut made = None;
            let (latents, extent) = match input {
                LowRes::Latents(latents) => self.extended(latents)?,
                LowRes::Image(image) => self.encode(image, generator, on_event)?,
                &LowRes::Prompt { width, height } => {
                    let latents = self.generate((width, height), settings, generator, on_event)?;
                    self.extended(made.insert(latents))?
                }
            };
            // From here to the last stage before the decoder they stay there.
            batch.push(latents.to_device(&self.placement.device)?);
            extents.push(extent);
            base.push(made);
        }
        if !self.options.keep_loaded && settings.refine.is_none() {
            self.base = None;
        }
        if !self.options.keep_loaded {
            self.encoder = None;
        }
        let latents =
            Tensor::cat(&batch, 0).context("the inputs of a batch must be of one size")?;
        Ok(Batch {
            latents,
            extents,
            base,
        })
    }

    /// What the sides of low-res latents must be a multiple of, and their least: half of the UNet's, which sees them
    /// doubled.
    fn low_res_sides(&self) -> (usize, usize) {
        (
            self.unet_config.side_multiple().div_ceil(2),
            self.unet_config.side_minimum().div_ceil(2),
        )
    }

    /// Latents (1, 4, h, w) of a size that the UNet takes. Nothing is drawn.
    fn extended(&self, latents: &Tensor) -> Result<(Tensor, Extent)> {
        let (_, channels, h, w) = latents.dims4()?;
        ensure!(
            channels == self.vae_config.latent_channels(),
            "latents of {channels} channels were given; the model's VAE has {}",
            self.vae_config.latent_channels()
        );
        let factor = self.vae_config.factor();
        let extent = Extent {
            width: w * factor,
            height: h * factor,
        };
        let (multiple, minimum) = self.low_res_sides();
        Ok((padding::extend(latents, multiple, minimum)?, extent))
    }

    /// An image (1, 3, h, w) as scaled latents (1, 4, h, w) of a size that the UNet takes. The posterior's noise, where
    /// it has a spread, is drawn from `generator`.
    fn encode(
        &mut self,
        image: &Tensor,
        generator: &mut Generator,
        on_event: OnEvent,
    ) -> Result<(Tensor, Extent)> {
        let start = Instant::now();
        let (_, _, height, width) = image.dims4()?;
        let (multiple, minimum) = self.low_res_sides();
        let factor = self.vae_config.factor();
        let padded = padding::extend(image, multiple * factor, minimum * factor)?;
        let (_, _, h, w) = padded.dims4()?;
        let room = self.room_to_encode(h, w)?;
        let encoder = loaded(&mut self.encoder, Stage::Encode, on_event, || {
            Encoder::load(&self.vae_files, &self.encoder_placement)
        })?;
        on_event(Event::Started(Stage::Encode))?;
        let posterior = encoder.encode_within(&padded, &room)?;
        let posterior = posterior.to_device(&Device::Cpu)?;
        let sample = posterior.sample(|count| generator.randn(count))?;
        let latents = (sample * self.vae_config.scaling_factor())?;
        check_finite(
            &floats(&latents)?,
            Stage::Encode,
            self.encoder_placement.dtype,
        )?;
        finished(Stage::Encode, start, on_event)?;
        Ok((latents, Extent { width, height }))
    }

    /// Low-res latents (b, 4, h, w) -> upscaled latents (b, 4, 2h, 2w), on the CPU where no other stage goes on with them, and how often
    /// the UNet was evaluated. The starting noise is the generators' next draw, one a picture; what the sampler adds are those after it.
    fn denoise(
        &mut self,
        batch: &Batch,
        generators: &mut [Generator],
        conditioning: &[Conditioning],
        settings: &Settings,
        pass: Pass,
        on_event: OnEvent,
    ) -> Result<(Tensor, usize)> {
        let start = Instant::now();
        let (pictures, _, h, w) = batch.latents.dims4()?;
        let prompts = conditioning.len();
        self.planner.plan_for(settings.sampler);
        let plan = self.plan_to_denoise(pictures, prompts, (2 * h, 2 * w))?;
        let decoding = self.plan_to_preview((2 * h, 2 * w))?;
        let decoder = match decoding {
            Some(plan) => {
                let decoder = loaded(&mut self.decoder, Stage::Decode, on_event, || {
                    Decoder::load(&self.vae_files, &self.vae_placement)
                })?;
                Some((decoder, plan.limits))
            }
            None => None,
        };
        let mut previews = self.previews.then(|| Previews {
            decoder,
            config: &self.vae_config,
            sizes: batch
                .extents
                .iter()
                .map(|extent| extent.doubled())
                .collect(),
        });
        if let Some(text) = previews.as_ref().and_then(Previews::shortage) {
            on_event(Event::Warning(text.into()))?;
        }
        if previews.as_ref().is_some_and(Previews::shows_nothing) {
            previews = None;
        }
        let unet = loaded(&mut self.unet, Stage::Denoise, on_event, || {
            UNet::load(&self.options.model, &self.placement)
        })?;
        on_event(Event::Started(Stage::Denoise))?;
        let device = &self.placement.device;
        let low_res = batch.latents.upsample_nearest2d(2 * h, 2 * w)?;
        let mut denoiser = Denoiser::new(
            unet,
            conditioning,
            (settings.guidance, settings.noise_level),
            low_res,
            self.passes,
            Room::new(plan.limits),
        )?;

        let course = Course::new(settings, &self.sigma_range);
        let mut noise = || noise_for(&batch.latents, generators);
        let spread = self.sigma_range.initial_spread(course.first());
        let x = (noise()? * f64::from(spread))?.to_device(device)?;
        let progress = RefCell::new(Progress::start(device, pass, course.evaluations())?);
        let mut denoise = |x: &Tensor, sigma: f32| {
            let denoised = denoiser.denoise(x, sigma)?;
            progress.borrow_mut().step(on_event)?;
            show(&mut previews, &denoised, on_event)?;
            Ok(denoised)
        };
        let latents = course.run(
            x,
            &mut denoise,
            &mut || Ok(noise()?.to_device(device)?),
            &mut |way| progress.borrow_mut().come(way),
        );
        let dtype = self.placement.dtype;
        let latents = latents.map_err(|error| not_finite(error, dtype))?;

        self.passes = denoiser.passes();
        let evaluations = progress.into_inner().end(on_event)?;
        let goes_on = !pass.is_last() || settings.refine.is_some();
        let latents = if goes_on {
            latents
        } else {
            latents.to_device(&Device::Cpu)?
        };
        check_latents(&latents, Stage::Denoise, dtype)?;
        if !self.options.keep_loaded && pass.is_last() {
            self.unet = None;
        }
        finished(Stage::Denoise, start, on_event)?;
        Ok((latents, evaluations))
    }

    fn decode_once(
        &mut self,
        upscaled: &UpscaledLatents,
        sink: &mut dyn PictureSink,
        on_event: OnEvent,
    ) -> Result<()> {
        let start = Instant::now();
        let (_, _, h, w) = upscaled.padded.dims4()?;
        let room = self.room_to_decode(h, w)?;
        let decoder = loaded(&mut self.decoder, Stage::Decode, on_event, || {
            Decoder::load(&self.vae_files, &self.vae_placement)
        })?;
        on_event(Event::Started(Stage::Decode))?;
        let raw = (&upscaled.padded / self.vae_config.scaling_factor())?;
        let (width, height) = (upscaled.width, upscaled.height);
        let dtype = self.vae_placement.dtype;
        let mut done = 0;
        decoder.decode_within(&raw, &room, |band| {
            if done == 0 {
                sink.begin(width, height)?;
            }
            // What is below the picture is of its extension.
            let lines = band.dim(2)?.min(height - done);
            let band = band.to_device(&Device::Cpu)?.narrow(3, 0, width)?;
            for top in (0..lines).step_by(LINES) {
                let piece = band.narrow(2, top, LINES.min(lines - top))?;
                let mut values = floats(&piece.squeeze(0)?.permute((1, 2, 0))?)?;
                check_finite(&values, Stage::Decode, dtype)?;
                for v in &mut values {
                    *v = (*v / 2.0 + 0.5).clamp(0.0, 1.0);
                }
                sink.lines(values)?;
            }
            done += lines;
            Ok(())
        })?;
        if !self.options.keep_loaded {
            self.decoder = None;
        }
        finished(Stage::Decode, start, on_event)
    }
}

/// Inputs that go through the networks together.
struct Batch {
    /// (b, 4, h, w), scaled, on the device, of a size that the UNet takes.
    latents: Tensor,
    /// Of each, in pixels, what it stands for without its extension.
    extents: Vec<Extent>,
    /// Of each that was made from a prompt, what the base checkpoint made: (1, 4, h, w).
    base: Vec<Option<Tensor>>,
}

/// Tells of what a step shows. What goes wrong with that is no reason to end the work.
fn show(previews: &mut Option<Previews>, denoised: &Tensor, on_event: OnEvent) -> Result<()> {
    let Some(making) = previews else {
        return Ok(());
    };
    let pictures = match making.of(denoised) {
        Ok(pictures) => pictures,
        Err(error) => {
            let goes_on = making.without_decoder();
            let what = if goes_on {
                "previews are made by a linear map from here on"
            } else {
                *previews = None;
                "there are no previews from here on"
            };
            return on_event(Event::Warning(format!("{what}: {error:#}")));
        }
    };
    for (index, picture) in pictures.into_iter().enumerate() {
        on_event(Event::Preview { index, picture })?;
    }
    Ok(())
}

/// What a sampler that looks at its numbers found of them, in the words of all others.
fn not_finite(error: anyhow::Error, dtype: DType) -> anyhow::Error {
    let stage = Stage::Denoise;
    if error.is::<NotANumber>() {
        NotFinite { stage, dtype }.into()
    } else {
        error
    }
}

/// Lines of a picture that are handed on at a time.
const LINES: usize = 64;

/// Standard normal noise (b, 4, 2h, 2w) for low-res latents (b, 4, h, w), each row from its own generator.
fn noise_for(low_res: &Tensor, generators: &mut [Generator]) -> Result<Tensor> {
    let (b, c, h, w) = low_res.dims4()?;
    let values: Vec<f32> = generators
        .iter_mut()
        .flat_map(|generator| generator.randn(c * 4 * h * w))
        .collect();
    Ok(Tensor::from_vec(
        values,
        (b, c, 2 * h, 2 * w),
        &Device::Cpu,
    )?)
}

fn finished(stage: Stage, start: Instant, on_event: OnEvent) -> Result<()> {
    on_event(Event::Finished {
        stage,
        seconds: start.elapsed().as_secs_f64(),
    })
}
