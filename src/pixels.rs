//! The pixels of a picture, as the networks take and give them.

use anyhow::{Result, ensure};

/// RGB pixels.
#[derive(Clone, Debug, PartialEq)]
pub struct Pixels {
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// (height, width, 3) interleaved, 0..=1; an 8-bit value v is exactly `v as f32 / 255.0`.
    pub values: Vec<f32>,
}

impl Pixels {
    /// A picture of `width` x `height` pixels; `values` is (height, width, 3) interleaved, 0..=1.
    ///
    /// # Errors
    /// The values are not width * height * 3, or there are none.
    pub fn new(width: usize, height: usize, values: Vec<f32>) -> Result<Self> {
        ensure!(
            width > 0 && height > 0 && values.len() == width * height * 3,
            "a picture of {width}x{height} has {} values, found {}",
            width * height * 3,
            values.len()
        );
        Ok(Self {
            width,
            height,
            values,
        })
    }
}
