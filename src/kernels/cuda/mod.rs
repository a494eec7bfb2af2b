//! The CUDA kernels and libraries: float32, float16 and bfloat16 with sums in float32, channels last.
//!
//! Maps are (b, h, w, c), tokens (b, n, c), on one card. Every function tells the device's stream what to do and returns at
//! once; each takes at most one piece of memory, its result, and nothing is sent to the card. The `.cu` files are compiled to PTX
//! by build.rs. An error says what did not fit; out of memory is the driver's or the library's own error.

mod arrays;
mod attention;
mod calls;
mod card;
mod conv;
#[cfg(feature = "cudnn")]
mod cudnn;
mod gemm;
mod graph;
mod maps;
mod norm;
mod own;

use candle_core::{Error, Result};

pub use self::attention::{attention, takes_heads};
pub use self::calls::{Filter, Float32, Read};
pub use self::card::Card;
pub use self::conv::Convolution;
pub use self::gemm::Linear;
pub use self::graph::{Graph, copy};
pub use self::maps::{
    Reading, activation, concatenate, denoised, downsample, gate, map_to_planes, planes_to_map,
    time_features, upsample,
};
pub use self::norm::{GroupNorm, affine, group_norm, group_norm_over, layer_norm, moments};
use crate::kernels::Activation;

/// As the kernels number it (sd_common.cuh).
fn number(activation: Activation) -> i32 {
    match activation {
        Activation::None => 0,
        Activation::Gelu => 1,
        Activation::Silu => 2,
        Activation::QuickGelu => 3,
        Activation::Relu => 4,
    }
}

/// A size as the kernels take it.
fn int(size: usize) -> Result<i32> {
    i32::try_from(size).map_err(|_| Error::Msg(format!("a size of {size} is too large for a card")))
}

/// Blocks of 256 threads for `vectors` pieces of work: a thread takes several where there are many.
fn blocks(vectors: usize) -> u32 {
    vectors.div_ceil(256).clamp(1, 2048) as u32
}
