//! Stable Diffusion's own pipeline: latents from a prompt, and the light second pass over latents.

mod samplers;
mod scheduler;

pub use self::scheduler::{BaseScheduler, Times};
