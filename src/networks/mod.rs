//! What the checkpoints hold: the text encoder, the autoencoder, the upscaler's UNet and Stable Diffusion's own.

pub mod base_unet;
pub mod text;
pub mod unet;
pub mod vae;

pub use crate::layers::bands::{Limits, Room};
pub use crate::layers::notes;
pub use crate::layers::shapes::{Counted, Work, counted, view as zeros_without_memory, works};
