//! Images and latents 2x, 4x and 8x with the Stable Diffusion x2 latent upscaler, on candle.
//!
//! [`Upscaler`] is the way in: it loads a model once and upscales many. A picture goes through four rooms:
//!
//! ```text
//! files      a path or bytes -> Picture or Latents         picture, latents, metadata: what they hold, format by format
//! pipeline   LowRes -> UpscaledLatents -> Pixels            the Upscaler: encode, denoise (schedule, sampler, noise), decode
//! picture    Pixels with what the file had besides -> the bytes of a file
//! files      bytes -> a file that is there whole or not at all
//! ```
//!
//! What the pipeline stands on, each room knowing only those after it:
//!
//! ```text
//! networks   what the checkpoints hold: text encoder, autoencoder, UNet
//! layers     what networks are made of: this program's kernels on the CPU, candle's operations elsewhere
//! kernels    float32 kernels for the CPU, channels last
//! model      a model's files: a folder, the Hub's cache, built in; tensors by name
//! device     what all of it runs on, and in which precision
//! ```
//!
//! `plan` turns a command line's inputs into a checked list of work; `limits` bounds what reading may cost. The tool
//! itself is `src/bin/sd-upscale/`. Who may use whom is a table in CONTRIBUTING.md, which `tests/library/house.rs` holds.
//!
//! ```no_run
//! use sd_upscale::limits::ReadLimits;
//! use sd_upscale::picture::{self, Format, Picture};
//! use sd_upscale::{LowRes, ModelFiles, Options, Settings, Upscaler, files};
//!
//! # fn main() -> anyhow::Result<()> {
//! let mut upscaler = Upscaler::new(Options::new(ModelFiles::built_in()))?;
//! let pixels = files::read_picture("photo.png".as_ref(), &ReadLimits::default())?.pixels;
//! let upscaled = upscaler.upscale(&[LowRes::image(&pixels)?], &Settings::default(), &mut |_| Ok(()))?;
//! let picture = Picture::from_pixels(upscaler.decode(&upscaled[0], &mut |_| Ok(()))?);
//! files::write("photo-2x.png".as_ref(), &picture::encode(&picture, Format::Png, None)?.bytes)?;
//! # Ok(())
//! # }
//! ```

#[doc(hidden)] // for the tool
pub mod check;
pub mod device;
pub mod files;
#[doc(hidden)] // for the benchmarks
pub mod kernels;
pub mod latents;
#[doc(hidden)] // for the parity tests
pub mod layers;
pub mod limits;
pub mod metadata;
pub mod model;
#[doc(hidden)] // for the parity tests
pub mod networks;
pub mod picture;
pub mod pipeline;
mod pixels;
pub mod plan;

pub use model::ModelFiles;
pub use pipeline::{
    Enlargement, Event, LowRes, Memory, NoiseType, NotFinite, OnEvent, Options, PictureSink,
    PromptEmbeds, Sampler, Schedule, Settings, Stage, UpscaledLatents, Upscaler,
};
pub use pixels::Pixels;
