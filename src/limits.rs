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

    /// Errors where a file of `bytes` cannot be one that is read: no format needs more than [`Self::max_bytes`].
    pub(crate) fn check_length(&self, bytes: u64) -> Result<()> {
        let most = self.max_bytes();
        ensure!(
            bytes <= most,
            "it has more than {most} bytes, which nothing of up to {} pixels needs \
             (if the file is to be trusted, raise the limit with --max-pixels)",
            self.max_pixels
        );
        Ok(())
    }

    /// What compressed latents may unpack to: a byte a pixel, four times what one set in f32 has.
    pub(crate) fn check_unpacked(&self, bytes: u64) -> Result<()> {
        let most = self.max_pixels.saturating_add(16 << 20);
        ensure!(
            bytes <= most,
            "it unpacks to {bytes} bytes, above the limit of {most} \
             (if the file is to be trusted, raise it with --max-pixels {bytes})"
        );
        Ok(())
    }

    /// The part of [`Self::max_bytes`] that is not pixels: a byte for four of them, and room for a camera's
    /// or ComfyUI's own, which reach a few megabytes, where few pixels are allowed. 60 MB by default.
    fn max_metadata(&self) -> u64 {
        (self.max_pixels / 4).saturating_add(16 << 20)
    }

    /// What one file may take for its metadata.
    pub(crate) fn budget(&self) -> Budget {
        Budget {
            most: self.max_metadata(),
            left: self.max_metadata(),
            refused: Vec::new(),
        }
    }
}

/// What one file may still take for everything in it but pixels: text, EXIF, XMP, colour profile, headers.
pub(crate) struct Budget {
    most: u64,
    left: u64,
    /// What did not fit, as it is called in messages.
    refused: Vec<String>,
}

impl Budget {
    /// Bytes that can still be taken.
    pub fn left(&self) -> usize {
        usize::try_from(self.left).unwrap_or(usize::MAX)
    }

    /// Takes `bytes`, or notes that `what` is left out.
    pub fn take(&mut self, what: impl FnOnce() -> String, bytes: usize) -> bool {
        match self.left.checked_sub(bytes as u64) {
            Some(left) => {
                self.left = left;
                true
            }
            None => {
                self.refuse(what());
                false
            }
        }
    }

    /// Notes that `what` is left out, for it does not fit.
    pub fn refuse(&mut self, what: String) {
        self.refused.push(what);
    }

    /// `part` where it fits.
    pub fn keep(&mut self, what: &str, part: Option<Vec<u8>>) -> Option<Vec<u8>> {
        part.filter(|part| self.take(|| what.to_owned(), part.len()))
    }

    /// Takes `bytes` of a part without which the file cannot be read.
    pub fn need(&mut self, what: &str, bytes: u64) -> Result<()> {
        ensure!(
            bytes <= self.left,
            "its {what} of {bytes} bytes is above the limit of {} \
             (if the file is to be trusted, raise it with --max-pixels {})",
            self.most,
            bytes.saturating_mul(4)
        );
        self.left -= bytes;
        Ok(())
    }

    /// One sentence on all that was left out.
    pub fn warning(&self) -> Option<String> {
        let named = self.refused.iter().take(3).cloned().collect::<Vec<_>>();
        let more = self.refused.len() - named.len();
        let more = match more {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        (!named.is_empty()).then(|| {
            format!(
                "left out, as a file's metadata may take {} bytes (--max-pixels raises the limit): {}{more}",
                self.most,
                named.join(", ")
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_left_out_and_named_in_one_sentence_and_what_fits_later_is_kept() {
        let mut budget = ReadLimits { max_pixels: 0 }.budget();
        assert_eq!(budget.left(), 16 << 20);
        assert!(budget.take(|| "a".into(), 10 << 20));
        for i in 0..5 {
            assert!(!budget.take(|| format!("text `{i}`"), 7 << 20));
        }
        assert!(budget.take(|| "b".into(), 6 << 20));
        assert!(budget.need("header", 1).is_err());
        let warning = budget.warning().unwrap();
        assert!(
            warning.contains("--max-pixels")
                && warning.ends_with("text `0`, text `1`, text `2` and 2 more"),
            "{warning}"
        );
        assert_eq!(ReadLimits::default().budget().warning(), None);
    }

    #[test]
    fn no_limit_overflows() {
        let limits = ReadLimits {
            max_pixels: u64::MAX,
        };
        assert_eq!(limits.max_bytes(), u64::MAX);
        assert!(limits.check_length(u64::MAX).is_ok());
        assert!(limits.budget().take(String::new, usize::MAX >> 3));
    }
}
