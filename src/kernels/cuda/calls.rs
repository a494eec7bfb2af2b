//! What the libraries and the kernels of our own are asked for alike.

use candle_core::{DType, Error, Result};

use crate::kernels::Activation;

/// What float32 products are rounded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Float32 {
    /// Nothing: all 24 bits.
    Exact,
    /// TF32, 11 bits, which the tensor cores multiply; sums stay float32.
    Tf32,
}

/// What a convolution is, apart from its weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Filter {
    pub inputs: usize,
    pub outputs: usize,
    /// Height and width.
    pub kernel: usize,
    pub stride: usize,
    /// Zeros above and left of the map.
    pub before: usize,
    /// Zeros below and right of it.
    pub after: usize,
}

impl Filter {
    /// Whether it is of one position, and so a product.
    pub fn is_product(&self) -> bool {
        (self.kernel, self.stride, self.before, self.after) == (1, 1, 0, 0)
    }

    /// Height or width of the result for a map's.
    ///
    /// # Errors
    /// The map is smaller than the kernel.
    pub fn output(&self, side: usize) -> Result<usize> {
        let padded = side + self.before + self.after;
        let room = padded.checked_sub(self.kernel).ok_or_else(|| {
            Error::Msg(format!(
                "a map of {side} is smaller than a kernel of {}",
                self.kernel
            ))
        })?;
        Ok(room / self.stride + 1)
    }
}

/// How a convolution reads its map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    Plain,
    /// As if every value were there twice in each direction.
    Enlarged,
}

/// One call of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Convolve {
    pub filter: Filter,
    /// (b, h, w) of the map as it is in memory.
    pub map: (usize, usize, usize),
    /// Height and width of the result.
    pub out: (usize, usize),
    pub dtype: DType,
    /// Of the sum of products, bias and residual.
    pub activation: Activation,
}

/// A product of a matrix (rows, inputs) with the transposed of a matrix (outputs, inputs).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Multiply {
    pub rows: usize,
    pub inputs: usize,
    pub outputs: usize,
    pub dtype: DType,
}

/// Where what is multiplied lies, and where the result goes; null for none.
#[derive(Clone, Copy)]
pub struct Places {
    pub weight: u64,
    pub input: u64,
    pub bias: u64,
    pub residual: u64,
    pub output: u64,
}

impl Places {
    /// The libraries want something to add also where it is multiplied by zero.
    pub fn addend(&self) -> u64 {
        if self.residual == 0 {
            self.output
        } else {
            self.residual
        }
    }
}
