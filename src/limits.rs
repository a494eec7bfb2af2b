//! What reading a file may cost at most.

use anyhow::{Result, ensure};
use image::ImageDecoder;

/// Bounds on what a file may make us allocate, so that a small file cannot claim a huge picture.
#[derive(Clone, Copy, Debug)]
pub struct ReadLimits {
    /// Width x height at most, in pixels of the image (for latents: of the image they stand for).
    pub max_pixels: u64,
}

/// Bytes a pixel that decoding takes at its peak: the file's own samples, of up to 16 bytes, and ours of 12, once more
/// where the picture is turned.
const DECODING: u64 = 40;

impl Default for ReadLimits {
    /// What Pillow takes before it suspects a decompression bomb (twice its `MAX_IMAGE_PIXELS`): 13377 x 13377.
    fn default() -> Self {
        Self {
            max_pixels: 178_956_970,
        }
    }
}

impl ReadLimits {
    /// Errors with the limit and the flag that lifts it.
    pub(crate) fn check_pixels(&self, width: u64, height: u64) -> Result<()> {
        ensure!(
            width > 0 && height > 0,
            "its header states a size of {width}x{height} pixels"
        );
        let pixels = width.saturating_mul(height);
        ensure!(
            pixels <= self.max_pixels,
            "its header states {width}x{height} = {pixels} pixels, above the limit of {} \
             (if the file is to be trusted, raise it with --max-pixels {pixels})",
            self.max_pixels
        );
        let bytes = usize::try_from(pixels.saturating_mul(DECODING)).unwrap_or(usize::MAX);
        ensure!(
            Vec::<u8>::new().try_reserve_exact(bytes).is_ok(),
            "its header states {width}x{height} pixels, for which {:.1} GB of memory are needed, more than this process \
             can have (ulimit -v): free some, or give a smaller picture",
            bytes as f64 / 1e9
        );
        Ok(())
    }

    pub(crate) fn check_decoder(&self, decoder: &impl ImageDecoder) -> Result<()> {
        let (width, height) = decoder.dimensions();
        self.check_pixels(u64::from(width), u64::from(height))
    }

    /// What a decoder may allocate: 16 bytes a pixel, the widest that is decoded (RGBA in f32), and some for tables.
    pub(crate) fn max_bytes(&self) -> u64 {
        self.max_pixels.saturating_mul(16).saturating_add(64 << 20)
    }
}
