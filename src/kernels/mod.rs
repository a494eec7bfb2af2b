//! What the layers are computed with: a room a kind of device.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
