//! Sizes of pictures.

use sd_upscale::{Enlargement, Pixels};

/// Width and height in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub width: usize,
    pub height: usize,
}

impl Size {
    pub fn of(pixels: &Pixels) -> Self {
        Self {
            width: pixels.width,
            height: pixels.height,
        }
    }

    pub fn turned(self) -> Self {
        Self {
            width: self.height,
            height: self.width,
        }
    }

    pub fn enlarged(self, scale: Enlargement) -> Self {
        Self {
            width: scale.times() * self.width,
            height: scale.times() * self.height,
        }
    }
}
