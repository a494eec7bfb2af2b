//! The run's model: found, or fetched, once for all threads, and loaded once a device.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use sd_upscale::model::hub::Part;
use sd_upscale::model::{self, Checkpoint, Hub, PartFiles, TINY, hub};
use sd_upscale::networks::unet::NO_NOISE_LEVEL;
use sd_upscale::pipeline::{PlanFor, StagePlan};
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
            Content::Picture(picture) => Size {
                width: picture.pixels.width,
                height: picture.pixels.height,
            },
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
        let (width, height) = match content {
            Content::Picture(picture) => (picture.pixels.width, picture.pixels.height),
            Content::Latents(latents) => (factor * latents.width, factor * latents.height),
        };
        let work = PlanFor {
            width,
            height,
            from_image: matches!(content, Content::Picture(_)),
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
        let upscaler = self.upscaler(self.find()?, device, keep_loaded)?;
        self.check(&upscaler)?;
        Ok(upscaler)
    }

    /// Whether the model can do what is asked of it.
    fn check(&self, upscaler: &Upscaler) -> Result<()> {
        let name = || format!("the model {}", self.job.model);
        upscaler.check(&self.job.settings).with_context(name)
    }

    fn upscaler(&self, found: Found, device: &Device, keep_loaded: bool) -> Result<Upscaler> {
        let Found { files, vae } = found;
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
        };
        let upscaler = self.upscaler(found, &self.device, false)?;
        Ok(self.facts_of(upscaler))
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
            let at_hand =
                local(&job.model).then(|| self.upscaler(self.find()?, &self.device, false));
            let Some(Ok(upscaler)) = at_hand else {
                return self.published_facts();
            };
            self.check(&upscaler)?;
            return Ok(self.facts_of(upscaler));
        }
        if local(&job.model_parts) && job.vae.is_none() {
            return self.facts();
        }
        let files =
            ModelFiles::original(job.model.as_ref(), ModelFiles::published_configurations())?;
        let upscaler = self.upscaler(Found { files, vae: None }, &self.device, false)?;
        self.check(&upscaler)?;
        Ok(self.facts_of(upscaler))
    }

    fn find(&self) -> Result<Found> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = &*found {
            return Ok(found.clone());
        }
        let job = &self.job;
        let hub = || Hub::from_env(job.verbosity > Verbosity::Quiet);
        let files = files(job, hub)?;
        let vae = job
            .vae
            .as_deref()
            .map(|name| model::locate_vae(name, &files, hub))
            .transpose()?;
        Ok(found.insert(Found { files, vae }).clone())
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
