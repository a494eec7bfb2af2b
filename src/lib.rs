//! sd-upscale: images and latents 2x with the Stable Diffusion x2 latent upscaler.

pub mod alpha;
pub mod color;
mod comfy;
mod containers;
mod decode;
mod decode_tiff;
pub mod device;
pub mod encode;
mod encode_tiff;
mod exif;
mod exif_tiff;
pub mod files;
pub mod hub;
pub mod input;
pub mod kernels;
pub mod latents;
pub mod layers;
pub mod metadata;
pub mod model;
pub mod noise;
pub mod npz;
pub mod output;
pub mod padding;
pub mod picture;
mod pipeline;
pub mod plan;
pub mod prompt;
pub mod resize;
pub mod sampler;
pub mod settings;
pub mod text;
pub mod tiny;
pub mod tokenizer;
pub mod unet;
pub mod vae;
mod vae_names;
pub mod weights;

pub use files::ModelFiles;
pub use pipeline::{
    Event, LowRes, NotFinite, OnEvent, Options, Rgb, Settings, Stage, Upscaled, Upscaler,
};
