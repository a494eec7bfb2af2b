//! The pipeline: encode the prompt and the picture, denoise, decode. Load once, upscale many.

mod denoise;
pub mod noise;
mod padding;
pub mod sampler;
mod types;

use std::collections::HashMap;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};

use self::denoise::{Denoiser, out_of_memory, prompted_for};
use self::noise::Generator;
use self::padding::Extent;
use self::sampler::{Preconditioning, SchedulerConfig, SigmaRange};
pub use self::types::{Event, LowRes, NotFinite, OnEvent, Options, Rgb, Settings, Stage, Upscaled};
use crate::device::Placement;
use crate::model::PartFiles;
use crate::networks::text::{Conditioning, TextEncoder, Tokenizer};
use crate::networks::unet::{UNet, UNetConfig};
use crate::networks::vae::{Decoder, Encoder, Posterior, VaeConfig};

/// The latent upscaler with all its parts.
///
/// ```no_run
/// use sd_upscale::{LowRes, ModelFiles, Options, Settings, Upscaler};
/// # fn main() -> anyhow::Result<()> {
/// let mut upscaler = Upscaler::new(Options {
///     model: ModelFiles::Folder("models/sd-x2-latent-upscaler".into()),
///     vae: None,
///     device: candle_core::Device::Cpu,
///     dtype: candle_core::DType::F32,
///     keep_loaded: true,
/// })?;
/// let low_res = LowRes::image(64, 64, &vec![0.5; 64 * 64 * 3])?;
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
    vae_placement: Placement,
    /// Guidance's two passes one after the other: set once one batch of both did not fit in memory.
    split_guidance: bool,
    conditionings: HashMap<String, Conditioning>,
    text: Option<(Tokenizer, TextEncoder)>,
    encoder: Option<Encoder>,
    unet: Option<UNet>,
    decoder: Option<Decoder>,
}

/// Prompts whose conditioning is kept between pictures.
const PROMPTS_KEPT: usize = 16;

/// The VAE's precision for a run in `dtype`: half precision overflows in its decoder.
fn vae_dtype(dtype: DType) -> DType {
    match dtype {
        DType::F16 => DType::F32,
        other => other,
    }
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
        let vae_config = VaeConfig::load(&vae_files)?;
        let channels = vae_config.latent_channels;
        ensure!(
            unet_config.in_channels == 2 * channels && unet_config.out_channels > channels,
            "unet/config.json: in_channels {} and out_channels {} do not go with a VAE of {channels} latent channels (expected {} and {})",
            unet_config.in_channels,
            unet_config.out_channels,
            2 * channels,
            channels + 1,
        );
        Ok(Self {
            sigma_range: scheduler.sigma_range()?,
            placement: Placement::new(&options.device, options.dtype),
            vae_placement: Placement::new(&options.device, vae_dtype(options.dtype)),
            vae_files,
            unet_config,
            vae_config,
            split_guidance: false,
            conditionings: HashMap::new(),
            text: None,
            encoder: None,
            unet: None,
            decoder: None,
            options,
        })
    }

    pub fn unet_config(&self) -> &UNetConfig {
        &self.unet_config
    }

    pub fn vae_config(&self) -> &VaeConfig {
        &self.vae_config
    }

    /// Use candle's stock operations even where this program has kernels of its own: for comparisons.
    pub fn use_stock_operations(&mut self) {
        self.placement.kernels = false;
        self.vae_placement.kernels = false;
        self.forget();
    }

    fn forget(&mut self) {
        self.conditionings.clear();
        (self.text, self.encoder, self.unet, self.decoder) = (None, None, None, None);
    }

    /// Upscale a batch of inputs of one kind and size, each from the seed's own noise: the latents are those
    /// that each would give alone.
    ///
    /// # Errors
    /// Weights that cannot be read, a batch of unequal sizes, numbers that overflow even in float32, or an
    /// error from `on_event`.
    pub fn upscale(
        &mut self,
        inputs: &[LowRes],
        settings: &Settings,
        on_event: OnEvent,
    ) -> Result<Vec<Upscaled>> {
        match self.upscale_once(inputs, settings, on_event) {
            Err(error) if self.can_retry(&error) => {
                self.fall_back_to_f32(&error, on_event)?;
                self.upscale_once(inputs, settings, on_event)
            }
            other => other,
        }
    }

    /// Decode upscaled latents to the picture they stand for.
    ///
    /// # Errors
    /// As [`upscale`](Self::upscale).
    pub fn decode(&mut self, upscaled: &Upscaled, on_event: OnEvent) -> Result<Rgb> {
        match self.decode_once(upscaled, on_event) {
            Err(error) if self.can_retry(&error) => {
                self.fall_back_to_f32(&error, on_event)?;
                self.decode_once(upscaled, on_event)
            }
            other => other,
        }
    }

    /// Decode the input itself, not upscaled: what the latents show before.
    ///
    /// # Errors
    /// As [`upscale`](Self::upscale).
    pub fn decode_low_res(&mut self, input: &LowRes, on_event: OnEvent) -> Result<Rgb> {
        let LowRes::Latents(latents) = input else {
            bail!("only latents are decoded for comparison; an image is its own");
        };
        let (_, _, h, w) = latents.dims4()?;
        let factor = self.vae_config.factor();
        self.decode(
            &Upscaled {
                padded: latents.clone(),
                width: w * factor,
                height: h * factor,
                factor,
            },
            on_event,
        )
    }

    /// Whether an error is numbers that overflowed, in a precision that has a safer one.
    fn can_retry(&self, error: &anyhow::Error) -> bool {
        error
            .downcast_ref::<NotFinite>()
            .is_some_and(|error| error.dtype != DType::F32)
    }

    fn fall_back_to_f32(&mut self, error: &anyhow::Error, on_event: OnEvent) -> Result<()> {
        on_event(Event::Warning(format!(
            "{error}; doing it again in float32"
        )))?;
        self.placement.dtype = DType::F32;
        self.vae_placement.dtype = DType::F32;
        self.forget();
        Ok(())
    }

    fn upscale_once(
        &mut self,
        inputs: &[LowRes],
        settings: &Settings,
        on_event: OnEvent,
    ) -> Result<Vec<Upscaled>> {
        ensure!(settings.steps > 0, "at least one step is needed");
        let conditioning = self.condition(settings, on_event)?;
        let mut generators = vec![Generator::new(settings.seed); inputs.len()];
        let mut low_res = Vec::with_capacity(inputs.len());
        let mut extents = Vec::with_capacity(inputs.len());
        for (input, generator) in inputs.iter().zip(&mut generators) {
            let (latents, extent) = self.low_res_latents(input, generator, on_event)?;
            low_res.push(latents);
            extents.push(extent);
        }
        let low_res =
            Tensor::cat(&low_res, 0).context("the inputs of a batch must be of one size")?;
        if !self.options.keep_loaded {
            self.encoder = None;
        }
        let noise = self.noise(&low_res, &mut generators)?;
        let latents = self.denoise(&low_res, noise, &conditioning, settings, on_event)?;
        let factor = self.vae_config.factor();
        extents
            .into_iter()
            .enumerate()
            .map(|(i, extent)| {
                Ok(Upscaled {
                    padded: latents.narrow(0, i, 1)?.contiguous()?,
                    width: 2 * extent.width,
                    height: 2 * extent.height,
                    factor,
                })
            })
            .collect()
    }

    /// The prompt's conditioning; with guidance above 1 the negative prompt's before it, as a batch of two.
    fn condition(&mut self, settings: &Settings, on_event: OnEvent) -> Result<Conditioning> {
        let start = Instant::now();
        let guided = settings.guidance > 1.0;
        let prompt = if settings.guidance == 0.0 {
            ""
        } else {
            &settings.prompt
        };
        let mut texts = vec![prompt];
        if guided {
            texts.push(&settings.negative_prompt);
        }
        for text in &texts {
            if !self.conditionings.contains_key(*text) {
                let conditioning = self.encode_text(text, on_event)?;
                // A folder may bring a prompt a file, each of a quarter of a megabyte.
                if self.conditionings.len() >= PROMPTS_KEPT {
                    self.conditionings
                        .retain(|kept, _| texts.contains(&&**kept));
                }
                self.conditionings.insert(text.to_string(), conditioning);
            }
        }
        // In a batch the prompts are nearly always the same; kept is what they became, not the network.
        self.text = None;
        let positive = self.conditionings[prompt].clone();
        let conditioning = match guided {
            true => self.conditionings[&*settings.negative_prompt].cat(&positive)?,
            false => positive,
        };
        on_event(Event::Finished {
            stage: Stage::Text,
            seconds: start.elapsed().as_secs_f64(),
        })?;
        Ok(conditioning)
    }

    fn encode_text(&mut self, text: &str, on_event: OnEvent) -> Result<Conditioning> {
        let (tokenizer, encoder) = match self.text.take() {
            Some(loaded) => loaded,
            None => {
                on_event(Event::Loading(Stage::Text))?;
                let encoder = TextEncoder::load(&self.options.model, &self.placement)?;
                (
                    Tokenizer::new(&self.options.model, encoder.positions())?,
                    encoder,
                )
            }
        };
        let tokens = tokenizer.encode(text)?;
        if let Some(cut) = &tokens.cut {
            on_event(Event::Warning(format!(
                "the prompt is longer than the {} tokens that the model reads; this was left out: \"{cut}\"",
                encoder.positions()
            )))?;
        }
        let conditioning = encoder.encode(&tokens)?;
        self.check(&conditioning.pooled, Stage::Text, self.placement.dtype)?;
        self.text = Some((tokenizer, encoder));
        Ok(conditioning)
    }

    /// The input as scaled latents (1, 4, h, w) of a size that the UNet takes, and the size of the picture
    /// that they stand for. An image draws the posterior's noise; latents draw nothing.
    fn low_res_latents(
        &mut self,
        input: &LowRes,
        generator: &mut Generator,
        on_event: OnEvent,
    ) -> Result<(Tensor, Extent)> {
        let factor = self.vae_config.factor();
        // Latents are doubled before the UNet sees them, so it needs half of its multiple here.
        let multiple = self.unet_config.side_multiple().div_ceil(2);
        let minimum = self.unet_config.side_minimum().div_ceil(2);
        match input {
            LowRes::Latents(latents) => {
                let (_, channels, h, w) = latents.dims4()?;
                ensure!(
                    channels == self.vae_config.latent_channels,
                    "latents of {channels} channels were given; the model's VAE has {}",
                    self.vae_config.latent_channels
                );
                let extent = Extent {
                    width: w * factor,
                    height: h * factor,
                };
                Ok((padding::extend(latents, multiple, minimum)?, extent))
            }
            LowRes::Image(image) => {
                let start = Instant::now();
                let (_, _, height, width) = image.dims4()?;
                let padded = padding::extend(image, multiple * factor, minimum * factor)?;
                if self.encoder.is_none() {
                    on_event(Event::Loading(Stage::Encode))?;
                    self.encoder = Some(Encoder::load(&self.vae_files, &self.vae_placement)?);
                }
                let Some(encoder) = &self.encoder else {
                    bail!("the encoder is not loaded");
                };
                let posterior = encoder.encode(&padded)?;
                let mean = posterior.mean.to_device(&Device::Cpu)?;
                let noise = Tensor::from_vec(
                    generator.randn(mean.elem_count()),
                    mean.shape(),
                    mean.device(),
                )?;
                let posterior = Posterior {
                    logvar: posterior.logvar.to_device(&Device::Cpu)?,
                    mean,
                };
                let latents = (posterior.sample(&noise)? * self.vae_config.scaling_factor)?;
                self.check(&latents, Stage::Encode, self.vae_placement.dtype)?;
                on_event(Event::Finished {
                    stage: Stage::Encode,
                    seconds: start.elapsed().as_secs_f64(),
                })?;
                Ok((latents, Extent { width, height }))
            }
        }
    }

    /// Standard normal noise (b, 4, 2h, 2w) for low-res latents (b, 4, h, w), each row from its own generator.
    fn noise(&self, low_res: &Tensor, generators: &mut [Generator]) -> Result<Tensor> {
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

    fn denoise(
        &mut self,
        low_res: &Tensor,
        noise: Tensor,
        conditioning: &Conditioning,
        settings: &Settings,
        on_event: OnEvent,
    ) -> Result<Tensor> {
        let start = Instant::now();
        if self.unet.is_none() {
            on_event(Event::Loading(Stage::Denoise))?;
            self.unet = Some(UNet::load(&self.options.model, &self.placement)?);
        }
        let Some(unet) = &self.unet else {
            bail!("the UNet is not loaded");
        };
        let device = &self.placement.device;
        let (b, _, h, w) = low_res.dims4()?;
        let condition = low_res
            .to_device(device)?
            .upsample_nearest2d(2 * h, 2 * w)?;
        let sigmas = sampler::sigmas(settings.schedule, settings.steps, &self.sigma_range);
        let passes = conditioning.pooled.dim(0)?;
        let mut denoiser = Denoiser {
            unet,
            prompted: prompted_for(unet, conditioning, b, self.split_guidance)?,
            condition,
            channels: self.vae_config.latent_channels,
        };
        let mut split = self.split_guidance;
        let spread = self.sigma_range.initial_spread(sigmas[0]);
        let x = (noise * f64::from(spread))?.to_device(device)?;
        let mut step_start = Instant::now();
        let latents = sampler::euler(x, &sigmas, |x, step| {
            let preconditioning = Preconditioning::new(sigmas[step]);
            let mut denoised = denoiser.denoise(x, &preconditioning);
            if passes > 1 && !split && denoised.as_ref().is_err_and(out_of_memory) {
                split = true;
                denoiser.prompted = prompted_for(unet, conditioning, b, true)?;
                denoised = denoiser.denoise(x, &preconditioning);
            }
            let denoised = denoised?;
            let seconds = step_start.elapsed().as_secs_f64();
            step_start = Instant::now();
            on_event(Event::Step {
                done: step + 1,
                total: settings.steps,
                seconds,
            })?;
            match passes {
                1 => Ok(denoised),
                _ => sampler::guide(&denoised, settings.guidance),
            }
        })?;
        self.split_guidance = split;
        let latents = latents.to_device(&Device::Cpu)?;
        self.check(&latents, Stage::Denoise, self.placement.dtype)?;
        if !self.options.keep_loaded {
            self.unet = None;
        }
        on_event(Event::Finished {
            stage: Stage::Denoise,
            seconds: start.elapsed().as_secs_f64(),
        })?;
        Ok(latents)
    }

    fn decode_once(&mut self, upscaled: &Upscaled, on_event: OnEvent) -> Result<Rgb> {
        let start = Instant::now();
        if self.decoder.is_none() {
            on_event(Event::Loading(Stage::Decode))?;
            self.decoder = Some(Decoder::load(&self.vae_files, &self.vae_placement)?);
        }
        let Some(decoder) = &self.decoder else {
            bail!("the decoder is not loaded");
        };
        let raw = (&upscaled.padded / self.vae_config.scaling_factor)?;
        let image = decoder.decode(&raw)?.to_device(&Device::Cpu)?;
        let image = image
            .narrow(2, 0, upscaled.height)?
            .narrow(3, 0, upscaled.width)?;
        let interleaved = image.squeeze(0)?.permute((1, 2, 0))?.flatten_all()?;
        let mut values: Vec<f32> = interleaved.to_vec1()?;
        if values.iter().any(|v| !v.is_finite()) {
            bail!(NotFinite {
                stage: Stage::Decode,
                dtype: self.vae_placement.dtype
            });
        }
        for v in &mut values {
            *v = (*v / 2.0 + 0.5).clamp(0.0, 1.0);
        }
        if !self.options.keep_loaded {
            self.decoder = None;
        }
        on_event(Event::Finished {
            stage: Stage::Decode,
            seconds: start.elapsed().as_secs_f64(),
        })?;
        Ok(Rgb {
            width: upscaled.width,
            height: upscaled.height,
            values,
        })
    }

    /// An error where `values` holds anything that is not a number.
    fn check(&self, values: &Tensor, stage: Stage, dtype: DType) -> Result<()> {
        let values: Vec<f32> = values.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        ensure!(
            values.iter().all(|v| v.is_finite()),
            NotFinite { stage, dtype }
        );
        Ok(())
    }
}
