//! Stable Diffusion's own pipeline: latents from a prompt, and the light second pass over latents.

mod samplers;
mod scheduler;

use std::collections::HashMap;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};

pub use self::scheduler::{BaseScheduler, Times};
use super::loaded::loaded;
use super::noise::Generator;
use super::prompts::warn_of_cut;
pub use super::types::BaseSettings;
use super::types::{Event, OnEvent, Stage, check_finite, check_latents, floats, refined_steps};
use crate::device::{Placement, STEPS_AHEAD, StepClock};
use crate::model::ModelFiles;
use crate::networks::Room;
use crate::networks::base_unet::{BaseUNet, BaseUNetConfig};
use crate::networks::text::{TextEncoder, Tokenizer};

/// A Stable Diffusion 1.x or 2.x checkpoint: its text encoder, UNet and sampler. Its VAE is a part like any other.
pub struct BaseModel {
    files: ModelFiles,
    placement: Placement,
    scheduler: BaseScheduler,
    config: BaseUNetConfig,
    /// Contexts of the prompts of the run, (1, tokens, width).
    contexts: HashMap<String, Tensor>,
    unet: Option<BaseUNet>,
}

/// The network's calls as they are done.
struct Calls {
    clock: StepClock,
    done: usize,
    total: usize,
}

impl Calls {
    /// Tells of those that are done, once no more than `ahead` are not.
    fn tell(&mut self, ahead: usize, on_event: OnEvent) -> Result<()> {
        for seconds in self.clock.finished(ahead)? {
            self.done += 1;
            on_event(Event::BaseStep {
                done: self.done,
                total: self.total,
                seconds,
            })?;
        }
        Ok(())
    }
}

impl BaseModel {
    /// Reads the configurations; weights are read when they are first needed.
    ///
    /// # Errors
    /// A configuration is missing or damaged, or is not a Stable Diffusion 1's or 2's.
    pub fn new(files: ModelFiles, placement: &Placement) -> Result<Self> {
        let config = BaseUNetConfig::load(&files)?;
        Ok(Self {
            scheduler: BaseScheduler::load(&files)?,
            placement: placement.clone(),
            files,
            config,
            contexts: HashMap::new(),
            unet: None,
        })
    }

    /// The checkpoint's sampler.
    pub fn scheduler(&self) -> &BaseScheduler {
        &self.scheduler
    }

    /// Channels of its latents.
    pub fn channels(&self) -> usize {
        self.config.in_channels
    }

    /// What it would take, of shapes alone.
    ///
    /// # Errors
    /// As [`BaseUNet::of_shapes`].
    pub fn of_shapes(&self) -> Result<BaseUNet> {
        BaseUNet::of_shapes(self.config.clone(), &self.placement)
    }

    /// Side of the latents that it was trained on.
    pub fn latent_size(&self) -> usize {
        const OF_STABLE_DIFFUSION_1: usize = 64;
        self.config.sample_size.unwrap_or(OF_STABLE_DIFFUSION_1)
    }

    /// Whether its UNet's weights are in memory.
    pub fn is_loaded(&self) -> bool {
        self.unet.is_some()
    }

    /// Latents (1, 4, h, w), scaled, float32, on the device, of what the prompt says: `generator` gives their first noise.
    ///
    /// # Errors
    /// Weights that cannot be read, settings out of range, or the device gives up.
    pub fn generate(
        &mut self,
        (h, w): (usize, usize),
        settings: &BaseSettings,
        generator: &mut Generator,
        room: &Room,
        on_event: OnEvent,
    ) -> Result<Tensor> {
        settings.check()?;
        let times = self.scheduler.times(settings.steps);
        let spread = f64::from(self.scheduler.initial_spread(&times));
        let x = (self.noise((1, self.config.in_channels, h, w), generator)? * spread)?;
        self.sample(x, &times, 0, settings, room, on_event)
    }

    /// The same picture again, lightly: `latents` (1, 4, h, w), scaled, float32, are given the noise of a share `strength` of the steps, which
    /// is then taken away. `generator` gives that noise.
    ///
    /// # Errors
    /// As [`generate`](Self::generate); a strength that leaves no step to do.
    pub fn refine(
        &mut self,
        latents: &Tensor,
        strength: f64,
        settings: &BaseSettings,
        generator: &mut Generator,
        room: &Room,
        on_event: OnEvent,
    ) -> Result<Tensor> {
        settings.check()?;
        let steps = refined_steps(settings.steps, strength);
        if steps == 0 {
            bail!(
                "refining at a strength of {strength} over {} steps leaves no step to do: raise --refine or --base-steps",
                settings.steps
            );
        }
        let start = settings.steps - steps;
        let times = self.scheduler.times(settings.steps);
        let latents = latents.to_device(&self.placement.device)?;
        let noise = self.noise(latents.dims4()?, generator)?;
        let x = self.scheduler.noised(&latents, &noise, &times, start)?;
        self.sample(x, &times, start, settings, room, on_event)
    }

    fn noise(
        &self,
        shape: (usize, usize, usize, usize),
        generator: &mut Generator,
    ) -> Result<Tensor> {
        let (b, c, h, w) = shape;
        let noise = Tensor::from_vec(generator.randn(b * c * h * w), shape, &Device::Cpu)?;
        Ok(noise.to_device(&self.placement.device)?)
    }

    fn sample(
        &mut self,
        x: Tensor,
        times: &Times,
        start: usize,
        settings: &BaseSettings,
        room: &Room,
        on_event: OnEvent,
    ) -> Result<Tensor> {
        let context = self.context(settings, on_event)?;
        let unet = loaded(&mut self.unet, Stage::Base, on_event, || {
            BaseUNet::load(&self.files, &self.placement)
        })?;
        on_event(Event::Started(Stage::Base))?;
        // Everything but the latents is known before the first step.
        let prompted = unet.prompted(&context)?;
        let steps = unet.steps(&times.timesteps[start..])?;
        let mut calls = Calls {
            clock: StepClock::start(&self.placement.device)?,
            done: 0,
            total: steps.len(),
        };
        let mut steps = steps.iter();
        let x = self.scheduler.run(x, times, start, |x, _| {
            let step = steps.next().context("a step for each time")?;
            let predicted = unet.guided(x, step, &prompted, settings.guidance, room)?;
            calls.clock.mark()?;
            calls.tell(STEPS_AHEAD, on_event)?;
            Ok(predicted)
        })?;
        calls.tell(0, on_event)?;
        check_latents(&x, Stage::Base, self.placement.dtype)?;
        Ok(x)
    }

    /// The prompts of a run, (1 or 2, tokens, width): the negative one first, where there is guidance.
    fn context(&mut self, settings: &BaseSettings, on_event: OnEvent) -> Result<Tensor> {
        let negative = settings.is_guided().then_some(&*settings.negative_prompt);
        let texts: Vec<&str> = negative.into_iter().chain([&*settings.prompt]).collect();
        self.contexts.retain(|text, _| texts.contains(&&**text));
        if texts.iter().any(|&text| !self.contexts.contains_key(text)) {
            on_event(Event::Loading(Stage::Text))?;
            // In float32 at least, as the upscaler's: all steps share its error.
            let placement = Placement {
                dtype: DType::F32,
                ..self.placement.clone()
            };
            let encoder = TextEncoder::load(&self.files, &placement)?;
            let tokenizer = Tokenizer::new(&self.files, encoder.positions())?;
            for &text in &texts {
                if self.contexts.contains_key(text) {
                    continue;
                }
                let tokens = tokenizer.encode(text)?;
                warn_of_cut("base checkpoint", &tokens, encoder.positions(), on_event)?;
                let context = encoder.encode_normed(&tokens)?;
                check_finite(&floats(&context)?, Stage::Text, placement.dtype)?;
                self.contexts.insert(text.to_owned(), context);
            }
        }
        let each: Vec<&Tensor> = texts.iter().map(|&text| &self.contexts[text]).collect();
        Ok(Tensor::cat(&each, 0)?)
    }
}
