//! The CPU kernels: computed in f32, kept in f32 or 16 bits ([`Precision`]), channels last, several threads (rayon's global pool), AVX-512, AVX2, SSE2, NEON or portable vectors,
//! chosen at run time.
//!
//! Maps are (b, h, w, c), tokens (b, n, c); an [`Input`] says how a kernel reads its map (concatenated, normalised,
//! activated, upsampled), so that none of that is ever written to memory. Convolutions and linear layers take weights packed
//! once by [`PackedConv`]. Every value is summed in an order that depends on the layer's shape alone: results are the same bits
//! for any number of threads and any place in a batch. The functions panic where shapes do not fit: they are for layers that
//! know theirs.

#![allow(
    clippy::needless_range_loop,
    clippy::too_many_arguments,
    reason = "register tiles are walked by index, which the compiler unrolls; strides and pointers are many"
)]

mod act;
mod attention;
mod buf;
mod conv;
mod elementwise;
mod gemm;
mod input;
mod linear_in_place;
mod micro;
mod norm;
mod packed;
mod resample;
mod scalar;
mod simd;
mod transform;
mod values;
mod winograd;

pub use self::act::Act;
pub use self::attention::{AttentionShape, attention};
pub use self::buf::zeros;
pub use self::conv::{CONV_LINES, conv2d, conv2d_lines, linear};
pub use self::elementwise::{activate, gate, materialise, materialise_lines};
pub use self::input::{Input, Prologue};
pub use self::linear_in_place::LinearInPlace;
pub use self::micro::gemm_rate;
pub use self::norm::{GroupStats, GroupSums, NORM_LINES, layer_norm};
pub use self::packed::{Elsewhere, Filter, PackedConv, Padding};
pub use self::resample::{downsample_k, downsample_reach, upsample_k, upsample_reach};
pub use self::simd::Isa;
pub use self::values::{Precision, Value, Values};

#[cfg(test)]
mod tests;
