//! sd-upscale: images and latents 2x with the Stable Diffusion x2 latent upscaler.

mod containers;
mod decode;
pub mod encode;
pub mod hub;
pub mod input;
pub mod kernels;
pub mod latents;
pub mod metadata;
pub mod npz;
pub mod output;
pub mod picture;
