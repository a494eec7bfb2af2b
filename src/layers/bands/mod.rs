//! Maps that need not be whole in memory: their lines in bands, from the top down, kept here, in a file, or computed when they
//! are read. Every value is that of the whole map: convolutions read the lines around a band, norms the statistics of all
//! bands, and our CPU kernels even give the same bits.

mod norm;
mod residual;
mod room;
mod source;
mod spill;
mod stored;

use std::ops::Range;

use anyhow::{Result, bail, ensure};
use candle_core::Tensor;

pub use self::norm::{Known, Moments, Norm, normed_lines};
pub use self::residual::Residual;
pub use self::room::{Limits, Room};
pub use self::source::{BandReading, Beside, Convolved, Lines, Planes, Resampled, Source, conv};
pub use self::stored::{Stored, keep_between, map_bands, store, store_both};
use super::{FeatureMap, shapes};
use crate::device::Backend;

/// Lines of a map, from the top.
pub type Band = Range<usize>;

/// A map's sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub b: usize,
    pub c: usize,
    pub h: usize,
    pub w: usize,
    /// Bytes of a value.
    pub value: usize,
}

impl Size {
    /// Of the whole map.
    pub fn bytes(&self) -> u64 {
        (self.b * self.c * self.h * self.w * self.value) as u64
    }
}

/// Lines of a map that are at hand: pieces (b, c, lines, w) that follow each other.
#[derive(Clone)]
pub struct Window {
    /// Of the map, the first line that is here.
    pub first: usize,
    pub pieces: Vec<FeatureMap>,
    /// More channels of the same lines, behind the others.
    pub beside: Vec<FeatureMap>,
}

impl Window {
    /// One piece.
    pub fn of(first: usize, map: FeatureMap) -> Self {
        Self {
            first,
            pieces: vec![map],
            beside: Vec::new(),
        }
    }

    /// Just these lines, as one map.
    ///
    /// # Errors
    /// They are not all here.
    pub fn exactly(&self, lines: Band) -> Result<FeatureMap> {
        let left = cut(&self.pieces, self.first, &lines)?;
        if self.beside.is_empty() {
            return Ok(left);
        }
        left.cat_channels(&cut(&self.beside, self.first, &lines)?)
    }
}

/// `lines` of pieces the first of which begins at line `first`.
fn cut(pieces: &[FeatureMap], first: usize, lines: &Band) -> Result<FeatureMap> {
    let mut parts = Vec::new();
    let mut at = first;
    for piece in pieces {
        let end = at + piece.dims()?.2;
        let part = lines.start.max(at)..lines.end.min(end);
        if !part.is_empty() {
            parts.push(piece.lines(part.start - at..part.end - at)?);
        }
        at = end;
    }
    let there = first..at;
    ensure!(
        there.start <= lines.start && lines.end <= there.end && !parts.is_empty(),
        "lines {lines:?} of a map were asked for, and {there:?} are here"
    );
    FeatureMap::below_each_other(&parts)
}

impl FeatureMap {
    fn line_dimension(&self) -> usize {
        match self.backend {
            Backend::Stock => 2,
            Backend::CpuKernels | Backend::CardKernels | Backend::Shapes { .. } => 1,
        }
    }

    /// Some of its lines.
    pub(super) fn lines(&self, lines: Band) -> Result<Self> {
        let dimension = self.line_dimension();
        if lines == (0..self.tensor.dim(dimension)?) {
            return Ok(self.clone());
        }
        let part = self.tensor.narrow(dimension, lines.start, lines.len())?;
        self.together(part)
    }

    /// Some of its lines and columns.
    pub fn part(&self, lines: Band, columns: Range<usize>) -> Result<Self> {
        let dimension = self.line_dimension();
        let part = self.tensor.narrow(dimension, lines.start, lines.len())?;
        let part = part.narrow(dimension + 1, columns.start, columns.len())?;
        self.together(part)
    }

    /// A part of this map's tensor as a map, its values one after the other.
    fn together(&self, part: Tensor) -> Result<Self> {
        if self.is_of_shapes() {
            return Ok(self.like(part));
        }
        Ok(self.like(part.contiguous()?))
    }

    /// Maps one below the other.
    pub fn below_each_other(parts: &[Self]) -> Result<Self> {
        Self::joined(parts, 0)
    }

    /// Maps from left to right.
    pub fn beside_each_other(parts: &[Self]) -> Result<Self> {
        Self::joined(parts, 1)
    }

    /// Along lines (0) or columns (1).
    fn joined(parts: &[Self], along: usize) -> Result<Self> {
        match parts {
            [] => bail!("no parts of a map to join"),
            [one] => Ok(one.clone()),
            [first, ..] if first.is_of_shapes() => {
                let mut shape = first.tensor.dims().to_vec();
                for part in &parts[1..] {
                    shape[1 + along] += part.tensor.dim(1 + along)?;
                }
                Ok(first.like(shapes::result(shape, first.tensor.dtype())?))
            }
            [first, ..] => {
                let tensors: Vec<&Tensor> = parts.iter().map(|part| &part.tensor).collect();
                Ok(first.like(Tensor::cat(&tensors, first.line_dimension() + along)?))
            }
        }
    }

    /// Its sizes.
    pub fn size(&self) -> Result<Size> {
        let (b, c, h, w) = self.dims()?;
        Ok(Size {
            b,
            c,
            h,
            w,
            value: self.tensor.dtype().size_in_bytes(),
        })
    }
}
