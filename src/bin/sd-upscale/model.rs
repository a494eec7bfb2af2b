//! The run's model: found, or fetched, once for all threads, and loaded once a device.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use candle_core::Device;
use sd_upscale::model::{self, Hub, PartFiles};
use sd_upscale::{ModelFiles, Options, Upscaler, device};

use crate::item::Size;
use crate::job::{Job, Verbosity};

pub struct Model {
    job: Arc<Job>,
    found: Mutex<Option<Found>>,
}

/// The model cannot be had: one error for all inputs.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
pub struct NoModel(anyhow::Error);

/// What is known of a model without its weights.
pub struct Facts {
    upscaler: Upscaler,
}

impl Facts {
    /// Pixels to a latent position, in each direction.
    pub fn pixels_per_latent(&self) -> usize {
        self.upscaler.pixels_per_latent()
    }

    /// A picture's peak of memory in bytes, weights apart.
    pub fn bytes_needed(&self, result: Size) -> u64 {
        self.upscaler.bytes_needed(result.width, result.height)
    }
}

/// Where its files are.
#[derive(Clone)]
struct Found {
    files: ModelFiles,
    vae: Option<PartFiles>,
}

impl Model {
    pub fn new(job: Arc<Job>) -> Self {
        Self {
            job,
            found: Mutex::new(None),
        }
    }

    /// The upscaler on one device; its weights are read when they are needed.
    ///
    /// # Errors
    /// The model cannot be had, or is no latent upscaler.
    pub fn load(&self, device: &Device, keep_loaded: bool) -> Result<Upscaler> {
        let Found { files, vae } = self.find()?;
        let dtype = self.job.dtype;
        Upscaler::new(Options {
            model: files,
            vae,
            device: device.clone(),
            dtype: dtype.unwrap_or_else(|| device::default_dtype(device)),
            keep_loaded,
        })
        .with_context(|| format!("the model {}", self.job.model))
    }

    /// What the model asks of inputs, by its configurations.
    ///
    /// # Errors
    /// [`NoModel`]: those of [`load`](Self::load).
    pub fn facts(&self) -> Result<Facts> {
        let upscaler = self.load(&Device::Cpu, false).map_err(NoModel)?;
        Ok(Facts { upscaler })
    }

    fn find(&self) -> Result<Found> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = &*found {
            return Ok(found.clone());
        }
        let job = &self.job;
        let hub = || Hub::from_env(job.verbosity > Verbosity::Quiet);
        let files = model::locate(&job.model, &job.revision, job.vae.is_none(), hub)?;
        let vae = job
            .vae
            .as_deref()
            .map(|name| model::locate_vae(name, &files, hub))
            .transpose()?;
        Ok(found.insert(Found { files, vae }).clone())
    }
}
