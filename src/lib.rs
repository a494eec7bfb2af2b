//! sd-upscale: images and latents 2x with the Stable Diffusion x2 latent upscaler.

pub mod hub;
pub mod input;
pub mod kernels;
pub mod latents;
pub mod metadata;
pub mod output;
