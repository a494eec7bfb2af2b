//! The run's model: found, or fetched, once for all threads, and loaded once a device.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use sd_upscale::model::hub::Part;
use sd_upscale::model::{self, Checkpoint, Hub, PartFiles, TINY, hub};
use sd_upscale::networks::unet::NO_NOISE_LEVEL;
use sd_upscale::pipeline::{InputKind, PlanFor, StagePlan};
use sd_upscale::plan::Written;
use sd_upscale::{Enlargement, ModelFiles, Options, Settings, Upscaler, device};

use crate::item::{Content, Size};
use crate::job::{Job, Verbosity};

pub struct Model {
    job: Arc<Job>,
    /// That memory is planned for: the run's first.
    device: Device,
    found: Mutex<Option<Found>>,
}

/// The model cannot be had: one error for all inputs.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
pub struct NoModel(anyhow::Error);

/// What is known of a model without its weights.
pub struct Facts {
    /// As the user calls it.
    name: String,
    scale: Enlargement,
    upscaler: Upscaler,
}

impl Facts {
    /// Width and height of an input's result, in pixels.
    ///
    /// # Errors
    /// It is latents of another kind than the model's.
    pub fn result_size(&self, content: &Content) -> Result<Size> {
        let size = match content {
            Content::Picture(picture) => Size::of(&picture.pixels),
            Content::Prompt { size, .. } => *size,
            Content::Latents(latents) => {
                let theirs = latents.pixels_per_position();
                let ours = self.upscaler.pixels_per_latent();
                ensure!(
                    theirs == ours,
                    "its latents stand for {theirs}x{theirs} pixels each, and those of the model {} for {ours}x{ours}: \
                     give --model the upscaler that they belong to, or an image",
                    self.name
                );
                Size {
                    width: theirs * latents.width,
                    height: theirs * latents.height,
                }
            }
        };
        Ok(size.enlarged(self.scale))
    }

    /// Of the pictures that the base checkpoint makes where no size is given.
    ///
    /// # Errors
    /// There is none.
    pub fn base_size(&mut self) -> Result<Size> {
        let (width, height) = self.upscaler.base_size()?;
        Ok(Size { width, height })
    }

    /// How often the UNet will be evaluated for an input; None where the sampler finds that out.
    pub fn evaluations(&self, settings: &Settings) -> Option<usize> {
        self.upscaler.evaluations(settings)
    }

    /// What an input takes of the device's memory, a stage after the other.
    ///
    /// # Errors
    /// [`TooLittle`](sd_upscale::pipeline::TooLittle), in the error's chain.
    pub fn plan(
        &mut self,
        content: &Content,
        settings: &Settings,
        kind: Written,
    ) -> Result<Vec<StagePlan>> {
        let factor = self.upscaler.pixels_per_latent();
        let (input, size) = match content {
            Content::Picture(picture) => (InputKind::Image, Size::of(&picture.pixels)),
            Content::Prompt { size, .. } => (InputKind::Prompt, *size),
            Content::Latents(latents) => {
                let size = Size {
                    width: factor * latents.width,
                    height: factor * latents.height,
                };
                (InputKind::Latents, size)
            }
        };
        let work = PlanFor {
            width: size.width,
            height: size.height,
            input,
            to_picture: matches!(kind, Written::Image(_)),
        };
        self.upscaler.plan(work, settings)
    }
}

/// Where its files are.
#[derive(Clone)]
struct Found {
    files: ModelFiles,
    vae: Option<PartFiles>,
    base: Option<ModelFiles>,
}

impl Model {
    pub fn new(job: Arc<Job>, device: Device) -> Self {
        Self {
            job,
            device,
            found: Mutex::new(None),
        }
    }

    /// What memory is planned for.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The upscaler on one device; its weights are read when they are needed.
    ///
    /// # Errors
    /// The model cannot be had, or is no latent upscaler.
    pub fn load(&self, device: &Device, keep_loaded: bool) -> Result<Upscaler> {
        let mut upscaler = self.upscaler(self.find()?, device, keep_loaded)?;
        self.check(&mut upscaler)?;
        Ok(upscaler)
    }

    /// Whether the model can do what is asked of it.
    fn check(&self, upscaler: &mut Upscaler) -> Result<()> {
        let name = || format!("the model {}", self.job.model);
        upscaler.check(&self.job.settings).with_context(name)?;
        if self.job.uses_base_vae() {
            let name = || format!("--base {}", self.job.base);
            upscaler.check_base_vae().with_context(name)?;
        }
        Ok(())
    }

    fn upscaler(&self, found: Found, device: &Device, keep_loaded: bool) -> Result<Upscaler> {
        let Found { files, vae, base } = found;
        let dtype = self.job.dtype;
        let mut upscaler = Upscaler::new(Options {
            model: files,
            vae,
            device: device.clone(),
            dtype: dtype.unwrap_or_else(|| device::default_dtype(device)),
            keep_loaded,
            memory: self.job.memory.clone(),
        })
        .with_context(|| format!("the model {}", self.job.model))?;
        if self.job.tf32 {
            upscaler.allow_tf32();
        }
        if self.job.preview {
            upscaler.send_previews();
        }
        if let Some(base) = base {
            let name = || format!("--base {}", self.job.base);
            upscaler.set_base(base).with_context(name)?;
        }
        Ok(upscaler)
    }

    /// What the model asks of inputs, by its configurations.
    ///
    /// # Errors
    /// [`NoModel`]: those of [`load`](Self::load).
    pub fn facts(&self) -> Result<Facts> {
        let upscaler = self.load(&self.device, false).map_err(NoModel)?;
        Ok(self.facts_of(upscaler))
    }

    fn facts_of(&self, upscaler: Upscaler) -> Facts {
        Facts {
            name: self.job.model.clone(),
            scale: self.job.settings.scale,
            upscaler,
        }
    }

    /// Those of the published model, for one of which nothing is at hand.
    fn published_facts(&self) -> Result<Facts> {
        let found = Found {
            files: ModelFiles::published_configurations(),
            vae: None,
            base: self.base_at_hand()?,
        };
        let upscaler = self.upscaler(found, &self.device, false)?;
        Ok(self.facts_of(upscaler))
    }

    /// The base checkpoint, where the run uses it and it need not be fetched; else the published one's configurations.
    fn base_at_hand(&self) -> Result<Option<ModelFiles>> {
        let job = &self.job;
        if !job.uses_base() {
            return Ok(None);
        }
        if Path::new(&job.base).exists() {
            // Where the model's own files are not at hand either, those of the built-in one tell as much of it.
            return self.find_base(&ModelFiles::built_in());
        }
        Ok(Some(ModelFiles::published_base_configurations()))
    }

    /// Those of the model where nothing has to be fetched for it, else of the published one; of the original checkpoint the parts
    /// may be the published one's.
    ///
    /// # Errors
    /// The checkpoint cannot be read, or the device does not answer.
    pub fn facts_at_hand(&self) -> Result<Facts> {
        let job = &self.job;
        let local = |name: &str| name == TINY || Path::new(name).is_dir();
        if !model::is_checkpoint(&job.model) {
            let at_hand = local(&job.model).then(|| {
                let found = Found {
                    base: self.base_at_hand()?,
                    ..self.find_model()?
                };
                self.upscaler(found, &self.device, false)
            });
            let mut upscaler = match at_hand {
                Some(Ok(upscaler)) => upscaler,
                // What is wrong with a base checkpoint is told here too.
                Some(Err(error)) if job.uses_base() => return Err(error),
                _ => return self.published_facts(),
            };
            self.check(&mut upscaler)?;
            return Ok(self.facts_of(upscaler));
        }
        if local(&job.model_parts) && job.vae.is_none() && !job.uses_base() {
            return self.facts();
        }
        let files =
            ModelFiles::original(job.model.as_ref(), ModelFiles::published_configurations())?;
        let found = Found {
            files,
            vae: None,
            base: self.base_at_hand()?,
        };
        let mut upscaler = self.upscaler(found, &self.device, false)?;
        self.check(&mut upscaler)?;
        Ok(self.facts_of(upscaler))
    }

    fn find(&self) -> Result<Found> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = &*found {
            return Ok(found.clone());
        }
        let mut all = self.find_model()?;
        if self.job.uses_base() {
            all.base = self.find_base(&all.files)?;
        }
        Ok(found.insert(all).clone())
    }

    /// Without the base checkpoint.
    fn find_model(&self) -> Result<Found> {
        let job = &self.job;
        let files = files(job, || self.hub())?;
        let vae = job
            .vae
            .as_deref()
            .map(|name| model::locate_vae(name, &files, || self.hub()))
            .transpose()?;
        Ok(Found {
            files,
            vae,
            base: None,
        })
    }

    /// The base checkpoint. Of a single file, which holds no vocabulary, that is `model`'s.
    fn find_base(&self, model: &ModelFiles) -> Result<Option<ModelFiles>> {
        let job = &self.job;
        let is_wanted = |part: &Part| *part != Part::Vae || job.uses_base_vae();
        let parts: Vec<Part> = Part::PIPELINE.into_iter().filter(is_wanted).collect();
        let revision = match &*job.base {
            hub::DEFAULT_BASE => hub::DEFAULT_BASE_REVISION,
            _ => "main",
        };
        let base = model::locate_base(&job.base, revision, &parts, model, || self.hub())?;
        Ok(Some(base))
    }

    fn hub(&self) -> Result<Hub> {
        Hub::from_env(self.job.verbosity > Verbosity::Quiet)
    }
}

/// The model's files, without those of a VAE that `--vae` replaces.
///
/// # Errors
/// One of them is missing, or the checkpoint is none.
pub fn files(job: &Job, hub: impl Fn() -> Result<Hub>) -> Result<ModelFiles> {
    let original = model::is_checkpoint(&job.model);
    let is_wanted = |part: &Part| match part {
        Part::Vae => job.vae.is_none(),
        Part::Unet => !original,
        _ => true,
    };
    let parts: Vec<Part> = Part::PIPELINE.into_iter().filter(is_wanted).collect();
    if !original {
        let published = job.model == hub::DEFAULT_REPO && job.revision == hub::DEFAULT_REVISION;
        // Of this one it is known before gigabytes are fetched.
        ensure!(
            !published || job.settings.noise_level == 0.0,
            "the model {}: {NO_NOISE_LEVEL}",
            job.model
        );
        return model::locate("--model", &job.model, &job.revision, &parts, hub);
    }
    // Before anything is fetched for it.
    let unet = Checkpoint::open(job.model.as_ref())?;
    let parts = model::locate(
        "--model-parts",
        &job.model_parts,
        &job.revision,
        &parts,
        hub,
    )?;
    Ok(ModelFiles::of_checkpoint(unet, parts))
}
