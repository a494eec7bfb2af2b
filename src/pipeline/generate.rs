//! Stable Diffusion's own pipeline around the upscaler: low-res latents from a prompt, and a light second pass over the result. One
//! generator serves all of it, and latents stay on the device from the base checkpoint to the end of that pass.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};

use super::base::BaseModel;
use super::noise::Generator;
use super::types::{BaseSettings, OnEvent, Settings, Stage};
use super::{Upscaler, finished};
use crate::model::ModelFiles;
use crate::networks::Room;

/// Of Stable Diffusion 1.x and 2.x, in each direction.
const PIXELS_PER_LATENT: usize = 8;

/// What is said where there is none.
pub(super) const NO_BASE: &str = "there is no base checkpoint to make a picture from a prompt, or to refine one, with: name it by Upscaler::set_base";

impl Upscaler {
    /// Names the Stable Diffusion 1.x or 2.x checkpoint that [`LowRes::Prompt`](super::LowRes::Prompt) and [`Settings::refine`] take. Its weights are read when
    /// they are needed.
    ///
    /// # Errors
    /// A configuration is missing or damaged, is another kind of checkpoint's, or its latents are not the upscaler's.
    pub fn set_base(&mut self, files: ModelFiles) -> Result<()> {
        let base = BaseModel::new(files.clone(), &self.placement)?;
        let theirs = (base.channels(), PIXELS_PER_LATENT);
        let ours = (self.vae_config.latent_channels(), self.vae_config.factor());
        ensure!(
            theirs == ours,
            "the base checkpoint's latents have {} channels for {1}x{1} pixels each, the upscaler's {2} for {3}x{3}; the two do not belong together",
            theirs.0,
            theirs.1,
            ours.0,
            ours.1
        );
        self.base_files = Some(files);
        (self.base, self.other_vae) = (None, None);
        Ok(())
    }

    /// Width and height, in pixels, that the base checkpoint was trained on.
    ///
    /// # Errors
    /// There is none.
    pub fn base_size(&mut self) -> Result<(usize, usize)> {
        let factor = self.vae_config.factor();
        let side = factor * self.base()?.latent_size();
        Ok((side, side))
    }

    pub(super) fn base(&mut self) -> Result<&mut BaseModel> {
        let files = self.base_files.as_ref().context(NO_BASE)?;
        match &mut self.base {
            Some(base) => Ok(base),
            none => Ok(none.insert(BaseModel::new(files.clone(), &self.placement)?)),
        }
    }

    /// Latents (1, 4, h, w), scaled, on the device, of what the prompt says.
    pub(super) fn generate(
        &mut self,
        (width, height): (usize, usize),
        settings: &Settings,
        generator: &mut Generator,
        on_event: OnEvent,
    ) -> Result<Tensor> {
        let factor = self.vae_config.factor();
        ensure!(
            width > 0
                && height > 0
                && width.is_multiple_of(factor)
                && height.is_multiple_of(factor),
            "a base picture of {width}x{height} was asked for; its sides must be multiples of {factor}"
        );
        let sides = (height / factor, width / factor);
        self.with_base(
            sides,
            settings,
            on_event,
            |base, settings, room, on_event| {
                base.generate(sides, settings, generator, room, on_event)
            },
        )
    }

    /// Upscaled latents (b, 4, h, w), each with the next draw of its generator as noise, refined where the settings say so; on the CPU then.
    pub(super) fn refined(
        &mut self,
        latents: Tensor,
        settings: &Settings,
        generators: &mut [Generator],
        on_event: OnEvent,
    ) -> Result<Tensor> {
        let Some(strength) = settings.refine else {
            return Ok(latents);
        };
        let (_, _, h, w) = latents.dims4()?;
        let mut rows = Vec::with_capacity(generators.len());
        for (row, generator) in generators.iter_mut().enumerate() {
            let row = latents.narrow(0, row, 1)?;
            let refined = self.with_base(
                (h, w),
                settings,
                on_event,
                |base, settings, room, on_event| {
                    base.refine(&row, strength, settings, generator, room, on_event)
                },
            )?;
            rows.push(refined);
        }
        if !self.options.keep_loaded {
            self.base = None;
        }
        Ok(Tensor::cat(&rows, 0)?.to_device(&Device::Cpu)?)
    }

    /// Runs the base checkpoint on latents (h, w), as a stage of its own.
    fn with_base(
        &mut self,
        (h, w): (usize, usize),
        settings: &Settings,
        on_event: OnEvent,
        run: impl FnOnce(&mut BaseModel, &BaseSettings, &Room, OnEvent) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let start = Instant::now();
        let settings = settings.base();
        let rows = if settings.is_guided() { 2 } else { 1 };
        let room = self.room(Stage::Base, (rows, h, w))?;
        let latents = run(self.base()?, &settings, &room, on_event)?;
        finished(Stage::Base, start, on_event)?;
        Ok(latents)
    }
}
