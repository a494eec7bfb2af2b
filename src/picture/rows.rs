//! A picture that comes a few lines at a time: what is known of it before, and its lines as the samples of a file.

use std::borrow::Cow;
use std::ops::Range;

use anyhow::{Result, ensure};
use rayon::prelude::*;

use super::{Depth, Format, Picture, RUN, alpha, luma, to_u8, to_u16};
use crate::metadata::Metadata;

/// Gives the next lines of a picture, (n, width, 3) interleaved RGB, 0..=1, n as it likes; asked until all are there.
pub type NextLines<'a> = &'a mut dyn FnMut() -> Result<Vec<f32>>;

/// What is known of a picture before its first line: all but its colours.
#[derive(Clone, Debug)]
pub struct Outline<'a> {
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// Absent where every pixel is opaque.
    pub alpha: Option<Alpha<'a>>,
    /// The three channels are to be written as one.
    pub gray: bool,
    /// Of the file, where its format can hold it.
    pub depth: Depth,
    /// What the file is to hold besides pixels, where its format can.
    pub metadata: Cow<'a, Metadata>,
}

/// Transparency, 0..=1, (height, width).
#[derive(Clone, Debug)]
pub enum Alpha<'a> {
    /// Of the picture's own size.
    Whole(Cow<'a, [f32]>),
    /// Of half its size in each direction; doubled as its lines are needed.
    Halved {
        /// (height, width).
        values: Cow<'a, [f32]>,
        /// Half of the picture's.
        width: usize,
        /// Half of the picture's.
        height: usize,
    },
}

impl Alpha<'_> {
    /// Of the lines in `range` of a picture of `width` pixels a line.
    fn lines(&self, range: Range<usize>, width: usize) -> Cow<'_, [f32]> {
        match self {
            Alpha::Whole(values) => Cow::Borrowed(&values[range.start * width..range.end * width]),
            Alpha::Halved {
                values,
                width,
                height,
            } => Cow::Owned(alpha::double_lines(values, *width, *height, range)),
        }
    }

    fn len(&self) -> usize {
        match self {
            Alpha::Whole(values) => values.len(),
            Alpha::Halved { values, .. } => 4 * values.len(),
        }
    }
}

impl<'a> Outline<'a> {
    /// Of a picture that is there.
    pub fn of(picture: &'a Picture) -> Self {
        Self {
            width: picture.pixels.width,
            height: picture.pixels.height,
            alpha: picture
                .alpha
                .as_deref()
                .map(|alpha| Alpha::Whole(alpha.into())),
            gray: picture.gray,
            depth: picture.depth,
            metadata: Cow::Borrowed(&picture.metadata),
        }
    }

    /// Whether a file of this format holds transparency of it.
    pub(super) fn keeps_alpha(&self, format: Format) -> bool {
        self.alpha.is_some() && format.keeps_alpha()
    }

    /// Whether it is written as one channel for grey.
    pub(super) fn keeps_gray(&self, format: Format) -> bool {
        self.gray && format.keeps_gray(self.keeps_alpha(format))
    }

    /// Channels of a pixel in a file of this format: 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA).
    pub(super) fn channels(&self, format: Format) -> usize {
        let colors = if self.keeps_gray(format) { 1 } else { 3 };
        colors + usize::from(self.keeps_alpha(format))
    }
}

/// A channel of a pixel in a file.
pub(super) trait Sample: Copy + Sync {
    /// From 0..=1.
    fn of_units(units: &[f32]) -> Vec<Self>;
}

impl Sample for u8 {
    fn of_units(units: &[f32]) -> Vec<Self> {
        to_u8(units)
    }
}

impl Sample for u16 {
    fn of_units(units: &[f32]) -> Vec<Self> {
        to_u16(units)
    }
}

/// The lines of a picture as samples of a file, as many at a time as its format wants.
pub(super) struct Rows<'a, S> {
    outline: &'a Outline<'a>,
    format: Format,
    next: NextLines<'a>,
    /// Lines that have come.
    come: usize,
    /// Samples of those that have not been taken, and before `taken` of those that have.
    waiting: Vec<S>,
    taken: usize,
}

impl<'a, S: Sample> Rows<'a, S> {
    /// # Errors
    /// The transparency is not of the picture's size.
    pub(super) fn new(
        outline: &'a Outline<'a>,
        format: Format,
        next: NextLines<'a>,
    ) -> Result<Self> {
        let pixels = outline.width * outline.height;
        let alpha = outline.alpha.as_ref().map_or(pixels, Alpha::len);
        ensure!(
            alpha == pixels,
            "its transparency is of {alpha} pixels, expected {pixels}"
        );
        Ok(Self {
            outline,
            format,
            next,
            come: 0,
            waiting: Vec::new(),
            taken: 0,
        })
    }

    /// Samples of a line.
    pub(super) fn length(&self) -> usize {
        self.outline.width * self.outline.channels(self.format)
    }

    /// The next `lines` lines: interleaved samples of [`Outline::channels`].
    ///
    /// # Errors
    /// Those of whoever gives the lines, or that they are not of the picture's size.
    pub(super) fn take(&mut self, lines: usize) -> Result<&[S]> {
        let wanted = lines * self.length();
        if self.waiting.len() - self.taken < wanted {
            self.waiting.drain(..self.taken);
            self.taken = 0;
        }
        while self.waiting.len() < self.taken + wanted {
            let samples = self.come()?;
            self.waiting.extend(samples);
        }
        let from = self.taken;
        self.taken += wanted;
        Ok(&self.waiting[from..self.taken])
    }

    /// What comes next.
    fn come(&mut self) -> Result<Vec<S>> {
        let mut colors = (self.next)()?;
        let (row, left) = (3 * self.outline.width, self.outline.height - self.come);
        let lines = colors.len() / row;
        ensure!(
            lines > 0 && lines <= left && colors.len() == lines * row,
            "{} values came where {left} lines of {row} were left",
            colors.len()
        );
        let range = self.come..self.come + lines;
        self.come = range.end;
        let alpha = self.outline.alpha.as_ref();
        let alpha = alpha.map(|alpha| alpha.lines(range, self.outline.width));
        let alpha = match alpha {
            Some(alpha) if !self.format.keeps_alpha() => {
                lay_on_white(&mut colors, &alpha);
                None
            }
            alpha => alpha,
        };
        if self.outline.gray && self.format == Format::WebP {
            // libwebp takes no grey.
            let even = |pixel: &mut [f32]| pixel.fill(luma(pixel));
            colors.par_chunks_exact_mut(3).for_each(even);
        }
        let gray = self.outline.keeps_gray(self.format);
        Ok(S::of_units(&interleaved(colors, alpha.as_deref(), gray)))
    }
}

/// Colours over a white ground.
fn lay_on_white(colors: &mut [f32], alpha: &[f32]) {
    for (pixel, &a) in colors.chunks_exact_mut(3).zip(alpha) {
        for v in pixel {
            *v = *v * a + (1.0 - a);
        }
    }
}

/// RGB and alpha as a file has them: 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA) channels. Grey is taken with Rec. 601
/// weights, as Pillow's `convert("L")` does.
fn interleaved(colors: Vec<f32>, alpha: Option<&[f32]>, gray: bool) -> Vec<f32> {
    let color_channels = if gray { 1 } else { 3 };
    let channels = color_channels + usize::from(alpha.is_some());
    if channels == 3 {
        return colors;
    }
    let mut out = vec![0.0; colors.len() / 3 * channels];
    let runs = out.par_chunks_mut(RUN * channels).enumerate();
    runs.for_each(|(run, out)| {
        for (i, pixel) in out.chunks_exact_mut(channels).enumerate() {
            let at = run * RUN + i;
            let color = &colors[3 * at..3 * at + 3];
            if gray {
                pixel[0] = luma(color);
            } else {
                pixel[..3].copy_from_slice(color);
            }
            if let Some(alpha) = alpha {
                pixel[color_channels] = alpha[at];
            }
        }
    });
    out
}
