//! Images and latents 2x with the Stable Diffusion x2 latent upscaler, on candle.
//!
//! [`Upscaler`] is the way in: it loads a model once and upscales many. The map, in the order in which data flows:
//!
//! ```text
//! plan       inputs, folders, names, shards -> a list of work      input, decode*, latents, npz   files -> Picture, Latents
//! hub, model, files, weights   where a model is, its tensors       metadata, prompt, settings     what files say besides pixels
//! pipeline   encode, denoise, decode; retries in float32           alpha, color, resize           what the networks do not see
//!   tokenizer, text    prompt -> Conditioning                      encode*, output                Picture -> file, atomically
//!   vae                image <-> latents
//!   sampler, noise     schedules, guidance, Euler; PyTorch's noise
//!   unet               one denoising call
//! layers     what the networks are made of: `kernels` on the CPU (channels last), candle's stock operations on CUDA
//! ```
//!
//! Arrows go one way: the binary uses everything; `pipeline` uses the networks; networks use `layers` and `weights`; the
//! sampler takes closures and knows no network.

pub mod device;
pub mod files;
pub mod kernels;
pub mod latents;
pub mod layers;
pub mod limits;
pub mod metadata;
pub mod model;
pub mod networks;
pub mod picture;
pub mod pipeline;
mod pixels;
pub mod plan;

pub use model::ModelFiles;
pub use pipeline::{
    Event, LowRes, NotFinite, OnEvent, Options, Settings, Stage, UpscaledLatents, Upscaler,
};
pub use pixels::Pixels;
