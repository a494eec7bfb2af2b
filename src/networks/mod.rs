//! What the checkpoints hold: the text encoder, the autoencoder and the upscaler's UNet.

pub mod text;
pub mod unet;
pub mod vae;

pub use crate::layers::bands::{Limits, Room};
pub use crate::layers::notes;
pub use crate::layers::shapes::{Counted, Work, counted, view as zeros_without_memory, works};
