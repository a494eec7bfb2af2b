//! The base checkpoint's VAE, which decodes what the base checkpoint made: it stands in the place of the upscaler's own while it does.

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;

use super::generate::NO_BASE;
use super::memory::Planner;
use super::padding::Extent;
use super::{OnEvent, PictureSink, Settings, UpscaledLatents, Upscaler};
use crate::model::PartFiles;
use crate::networks::vae::{Decoder, VaeConfig};

/// Whose VAE decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    /// The model's, or the one that was named in its place.
    Own,
    Base,
}

/// The VAE that does not decode now: the base checkpoint's, or while that does, the upscaler's own.
pub(super) struct Other {
    files: PartFiles,
    config: VaeConfig,
    pub(super) decoder: Option<Decoder>,
    planner: Planner,
}

impl Upscaler {
    /// Whether the base checkpoint's VAE is there and makes pictures of the upscaler's latents. Its weights are read when they are needed.
    ///
    /// # Errors
    /// It is not, or does not; or there is no base checkpoint.
    pub fn check_base_vae(&mut self) -> Result<()> {
        if self.other_vae.is_some() {
            return Ok(());
        }
        let files = self.base_files.clone().context(NO_BASE)?;
        let files = PartFiles {
            files,
            part: "vae",
            weights: None,
        };
        let config = VaeConfig::load(&files).context("the base checkpoint's VAE")?;
        let shape = |config: &VaeConfig| (config.latent_channels(), config.factor());
        let ((channels, factor), ours) = (shape(&config), shape(&self.vae_config));
        ensure!(
            (channels, factor) == ours,
            "the base checkpoint's VAE has latents of {channels} channels for {factor}x{factor} pixels each, the upscaler's {} for {1}x{1}; \
             the two do not belong together",
            ours.0,
            ours.1
        );
        self.other_vae = Some(Other {
            files,
            config,
            decoder: None,
            planner: Planner::default(),
        });
        Ok(())
    }

    /// Decode the base checkpoint's own picture, of a result that was made from a prompt, by its VAE and a number of lines at a time, into `sink`.
    ///
    /// # Errors
    /// As [`decode_to`](Self::decode_to); the result was made of something else.
    pub fn decode_base_to(
        &mut self,
        upscaled: &UpscaledLatents,
        sink: &mut dyn PictureSink,
        on_event: OnEvent,
    ) -> Result<()> {
        let latents = upscaled.base.clone();
        let latents = latents.context("the result was not made from a prompt")?;
        let base = self.as_they_are(&latents)?;
        self.decode_by(Whose::Base, &base, sink, on_event)
    }

    /// Whose VAE the result is for.
    pub(super) fn decoded_by(&self, refined: bool) -> Whose {
        if refined && self.options.vae.is_none() {
            Whose::Base
        } else {
            Whose::Own
        }
    }

    /// The same before the work.
    pub(super) fn will_be_decoded_by(&self, settings: &Settings) -> Whose {
        self.decoded_by(settings.refine.is_some())
    }

    /// Does `work` with the VAE of `whose` in the place that decodes.
    pub(super) fn with_vae<T>(
        &mut self,
        whose: Whose,
        work: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        if whose == Whose::Own {
            return work(self);
        }
        self.check_base_vae()?;
        self.exchange_vaes();
        let done = work(self);
        self.exchange_vaes();
        done
    }

    fn exchange_vaes(&mut self) {
        if let Some(other) = &mut self.other_vae {
            std::mem::swap(&mut self.vae_files, &mut other.files);
            std::mem::swap(&mut self.vae_config, &mut other.config);
            std::mem::swap(&mut self.decoder, &mut other.decoder);
            // What was planned for one is not so for the other.
            std::mem::swap(&mut self.planner, &mut other.planner);
        }
    }

    /// Drops both decoders.
    pub(super) fn forget_decoders(&mut self) {
        self.decoder = None;
        self.forget_other_decoder();
    }

    pub(super) fn forget_other_decoder(&mut self) {
        if let Some(other) = &mut self.other_vae {
            other.decoder = None;
        }
    }

    pub(super) fn has_other_decoder(&self) -> bool {
        self.other_vae
            .as_ref()
            .is_some_and(|other| other.decoder.is_some())
    }

    /// Low-res latents as if they were a result, to be decoded.
    ///
    /// # Errors
    /// They have no four dimensions.
    pub(super) fn as_they_are(&self, latents: &Tensor) -> Result<UpscaledLatents> {
        let (_, _, h, w) = latents.dims4()?;
        let factor = self.vae_config.factor();
        Ok(UpscaledLatents {
            padded: latents.clone(),
            width: w * factor,
            height: h * factor,
            positions: Extent {
                width: w,
                height: h,
            },
            evaluations: 0,
            refined: false,
            base: None,
        })
    }
}
