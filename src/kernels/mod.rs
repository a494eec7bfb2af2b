//! CPU kernels.
mod act;
mod buf;
mod conv;
mod gemm;
mod input;
mod micro;
mod packed;
mod simd;
mod transform;
mod winograd;

pub use act::Act;
pub use buf::release_scratch;
pub use conv::{conv2d, conv2d_add, linear};
pub use input::{Input, Prologue};
pub use packed::PackedConv;
pub use simd::Isa;

#[cfg(test)]
mod tests;
