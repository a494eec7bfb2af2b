//! Where the lines of a map come from: a map that is kept, or layers that compute them when they are read.

use std::cell::RefCell;
use std::rc::Rc;

use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};

use super::super::{Conv2d, FeatureMap, cpu, downsample, shapes, upsample};
use super::norm::{Norm, Sums};
use super::{Band, Room, Size, Window};
use crate::device::{Backend, Placement};

/// A map whose lines can be asked for, from the top down.
pub trait Lines<'a> {
    fn size(&self) -> Size;

    /// What computes with it.
    fn backend(&self) -> Backend;

    /// These lines, and perhaps more around them.
    ///
    /// # Errors
    /// They were released, or cannot be computed.
    fn window(&self, lines: Band) -> Result<Window>;

    /// Says that this reader will not ask for lines before `before` again.
    fn release(&self, before: usize);

    /// Another reader of the same.
    fn again(&self) -> Source<'a>;

    /// Whether it is there in one piece.
    fn is_whole(&self) -> bool {
        false
    }

    /// Whether reading it costs no more than a map that is kept: not so where parts have to be joined first.
    fn reads_in_place(&self) -> bool {
        true
    }

    /// All of it in one piece, and whether nobody else has it.
    ///
    /// # Errors
    /// As [`window`](Self::window).
    fn into_whole(self: Box<Self>) -> Result<(FeatureMap, bool)>;

    /// The statistics for a norm in `groups` groups, where they are known.
    fn sums(&self, _groups: usize) -> Option<Sums> {
        None
    }
}

/// A reader of a map.
pub type Source<'a> = Box<dyn Lines<'a> + 'a>;

/// How a convolution in bands reads its map.
#[derive(Clone)]
enum Reading {
    Plain,
    Normed(Norm),
    /// Enlarged 2x by repeating every value.
    Upsampled,
}

/// `conv(act(norm(x))) + residual`, computed when it is read.
pub struct Convolved<'a> {
    input: Source<'a>,
    conv: &'a Conv2d,
    reading: Reading,
    residual: Option<Source<'a>>,
    /// The lines that were computed last, for other readers: they read the same lines one after the other.
    last: Rc<RefCell<Option<Window>>>,
}

/// `conv(x)`
pub fn conv<'a>(input: Source<'a>, conv: &'a Conv2d) -> Convolved<'a> {
    Convolved {
        input,
        conv,
        reading: Reading::Plain,
        residual: None,
        last: Rc::default(),
    }
}

impl<'a> Convolved<'a> {
    /// Reads its map through a norm.
    pub fn normed(mut self, norm: Norm) -> Self {
        self.reading = Reading::Normed(norm);
        self
    }

    /// Reads its map enlarged 2x by repeating every value.
    pub fn upsampled(mut self) -> Self {
        self.reading = Reading::Upsampled;
        self
    }

    /// Adds a map of the output's size.
    pub fn plus(mut self, residual: Source<'a>) -> Self {
        self.residual = Some(residual);
        self
    }

    pub fn boxed(self) -> Source<'a> {
        Box::new(self)
    }

    fn enlarges(&self) -> bool {
        matches!(self.reading, Reading::Upsampled)
    }

    fn compute(&self, lines: &Band) -> Result<FeatureMap> {
        let size = self.input.size();
        let needed = self.reach(lines);
        let window = self.input.window(needed)?;
        let residual = match &self.residual {
            Some(residual) => Some(residual.window(lines.clone())?.exactly(lines.clone())?),
            None => None,
        };
        let known = match &self.reading {
            Reading::Normed(norm) => Some(norm.known(&*self.input)?),
            Reading::Plain | Reading::Upsampled => None,
        };
        let reading = match &known {
            Some(known) => BandReading::Known(known),
            None if self.enlarges() => BandReading::Upsampled,
            None => BandReading::Plain,
        };
        self.conv
            .lines(&window, size, reading, residual.as_ref(), lines.clone())
    }

    /// The lines of the input that lines of the output are made of.
    fn reach(&self, lines: &Band) -> Band {
        self.conv.reach(lines, self.input.size(), self.enlarges())
    }
}

/// How lines of a convolution read theirs.
pub enum BandReading<'a> {
    Plain,
    Known(&'a super::norm::Known),
    Upsampled,
}

impl<'a> Lines<'a> for Convolved<'a> {
    fn size(&self) -> Size {
        self.conv.output_size(self.input.size(), self.enlarges())
    }

    fn backend(&self) -> Backend {
        self.input.backend()
    }

    fn window(&self, lines: Band) -> Result<Window> {
        let lines = Room::aligned(&lines, self.size().h);
        if let Some(last) = &*self.last.borrow()
            && last.first <= lines.start
            && lines.end <= last.first + last.pieces[0].dims()?.2
        {
            return Ok(last.clone());
        }
        *self.last.borrow_mut() = None;
        let window = Window::of(lines.start, self.compute(&lines)?);
        if Rc::strong_count(&self.last) > 1 {
            *self.last.borrow_mut() = Some(window.clone());
        }
        Ok(window)
    }

    fn release(&self, before: usize) {
        let h = self.size().h;
        let (input, residual) = if before >= h {
            (usize::MAX, usize::MAX)
        } else {
            // The band that begins there is computed from its rounded beginning.
            let start = Room::aligned(&(before..before + 1), h).start;
            (self.reach(&(start..start + 1)).start, start)
        };
        self.input.release(input);
        if let Some(map) = &self.residual {
            map.release(residual);
        }
    }

    fn again(&self) -> Source<'a> {
        Box::new(Self {
            input: self.input.again(),
            conv: self.conv,
            reading: self.reading.clone(),
            residual: self.residual.as_ref().map(|map| map.again()),
            last: self.last.clone(),
        })
    }

    fn into_whole(self: Box<Self>) -> Result<(FeatureMap, bool)> {
        let h = self.size().h;
        if !self.input.is_whole() {
            return Ok((self.window(0..h)?.exactly(0..h)?, true));
        }
        let Self {
            input,
            conv,
            reading,
            residual,
            ..
        } = *self;
        let size = input.size();
        let residual = match residual {
            Some(map) => Some(map.into_whole()?.0),
            None => None,
        };
        let residual = residual.as_ref();
        let (x, only) = input.into_whole()?;
        let y = match reading {
            Reading::Plain => conv.run(&x, super::super::Reading::Plain, residual)?,
            Reading::Upsampled => conv.run(&x, super::super::Reading::Upsampled, residual)?,
            Reading::Normed(Norm::Own(own)) if only => {
                conv.forward_normed_over(x, &own.norm, residual)?
            }
            Reading::Normed(Norm::Own(own)) => conv.forward_normed(&x, &own.norm, residual)?,
            Reading::Normed(Norm::Known(known)) => {
                let window = Window::of(0, x);
                conv.lines(&window, size, BandReading::Known(&known), residual, 0..h)?
            }
        };
        Ok((y, true))
    }
}

/// Two maps side by side in the channels.
pub struct Beside<'a> {
    pub left: Source<'a>,
    pub right: Source<'a>,
}

impl<'a> Lines<'a> for Beside<'a> {
    fn reads_in_place(&self) -> bool {
        matches!(
            self.backend(),
            Backend::CpuKernels | Backend::Shapes { card: false }
        )
    }

    fn size(&self) -> Size {
        let size = self.left.size();
        Size {
            c: size.c + self.right.size().c,
            ..size
        }
    }

    fn backend(&self) -> Backend {
        self.left.backend()
    }

    fn window(&self, lines: Band) -> Result<Window> {
        let (left, right) = (
            self.left.window(lines.clone())?,
            self.right.window(lines.clone())?,
        );
        // Both of the same lines: their bands may be of different heights.
        let ends = |window: &Window| -> Result<Band> {
            let mut count = 0;
            for piece in &window.pieces {
                count += piece.dims()?.2;
            }
            Ok(window.first..window.first + count)
        };
        if ends(&left)? == ends(&right)? {
            return Ok(Window {
                first: left.first,
                pieces: left.pieces,
                beside: right.pieces,
            });
        }
        Ok(Window {
            first: lines.start,
            pieces: vec![left.exactly(lines.clone())?],
            beside: vec![right.exactly(lines)?],
        })
    }

    fn release(&self, before: usize) {
        self.left.release(before);
        self.right.release(before);
    }

    fn again(&self) -> Source<'a> {
        Box::new(Self {
            left: self.left.again(),
            right: self.right.again(),
        })
    }

    fn into_whole(self: Box<Self>) -> Result<(FeatureMap, bool)> {
        let (left, _) = self.left.into_whole()?;
        let (right, _) = self.right.into_whole()?;
        Ok((left.cat_channels(&right)?, true))
    }
}

/// A map at half or twice its size by the UNet's fixed filters, computed when it is read.
pub struct Resampled<'a> {
    pub input: Source<'a>,
    /// Twice the size, else half.
    pub up: bool,
}

impl Resampled<'_> {
    fn reach(&self, lines: &Band) -> Band {
        let h = self.input.size().h;
        match (self.backend(), self.up) {
            (Backend::CpuKernels, true) => cpu::upsample_reach(lines, h),
            (Backend::CpuKernels, false) => cpu::downsample_reach(lines, h),
            // Whole steps of the filter and one more on either side, which is cut off: what is reflected there is not the map.
            (_, true) => (lines.start / 2).saturating_sub(1)..(lines.end.div_ceil(2) + 1).min(h),
            (_, false) => (2 * lines.start).saturating_sub(2)..(2 * lines.end + 2).min(h),
        }
    }
}

impl<'a> Lines<'a> for Resampled<'a> {
    fn size(&self) -> Size {
        let size = self.input.size();
        let (h, w) = if self.up {
            (2 * size.h, 2 * size.w)
        } else {
            (size.h / 2, size.w / 2)
        };
        Size { h, w, ..size }
    }

    fn backend(&self) -> Backend {
        self.input.backend()
    }

    fn window(&self, lines: Band) -> Result<Window> {
        let size = self.input.size();
        ensure!(
            size.h >= 2 && size.w >= 2,
            "a map of {}x{} is too small to reflect",
            size.w,
            size.h
        );
        let there = self.reach(&lines);
        let window = self.input.window(there.clone())?;
        if self.backend() == Backend::CpuKernels {
            let map = cpu::resampled_lines(&window, size, self.up, lines.clone())?;
            return Ok(Window::of(lines.start, map));
        }
        let x = window.exactly(there.clone())?;
        let (y, first) = if self.up {
            (upsample(&x)?, 2 * there.start)
        } else {
            (downsample(&x)?, there.start / 2)
        };
        let y = y.lines(lines.start - first..lines.end - first)?;
        Ok(Window::of(lines.start, y))
    }

    fn release(&self, before: usize) {
        let end = before >= self.size().h;
        let input = if end {
            usize::MAX
        } else {
            self.reach(&(before..before + 1)).start
        };
        self.input.release(input);
    }

    fn again(&self) -> Source<'a> {
        Box::new(Self {
            input: self.input.again(),
            up: self.up,
        })
    }

    fn into_whole(self: Box<Self>) -> Result<(FeatureMap, bool)> {
        if !self.input.is_whole() {
            let h = self.size().h;
            return Ok((self.window(0..h)?.exactly(0..h)?, true));
        }
        let (x, _) = self.input.into_whole()?;
        let y = if self.up {
            upsample(&x)?
        } else {
            downsample(&x)?
        };
        Ok((y, true))
    }
}

/// Planes (b, c, h, w), float32, as a map.
#[derive(Clone)]
pub struct Planes {
    planes: Tensor,
    placement: Placement,
    /// What values are multiplied by, and what is added then.
    affine: Option<(f64, f64)>,
}

impl Planes {
    /// `planes` may be on another device than the map.
    pub fn new(planes: &Tensor, placement: &Placement) -> Self {
        Self {
            planes: planes.clone(),
            placement: placement.clone(),
            affine: None,
        }
    }

    /// The same with every value times `factor`, plus `addend`.
    pub fn affine(self, factor: f64, addend: f64) -> Self {
        Self {
            affine: Some((factor, addend)),
            ..self
        }
    }

    fn map(&self, planes: &Tensor) -> Result<FeatureMap> {
        match self.affine {
            Some(_) if self.placement.is_of_shapes() => {
                // Of the values in between there is a copy.
                shapes::scratch((planes.elem_count() * planes.dtype().size_in_bytes()) as u64);
                FeatureMap::from_nchw(planes, &self.placement)
            }
            Some((factor, addend)) => {
                let planes = planes.to_dtype(DType::F32)?.affine(factor, addend)?;
                FeatureMap::from_nchw(&planes, &self.placement)
            }
            None => FeatureMap::from_nchw(planes, &self.placement),
        }
    }
}

impl<'a> Lines<'a> for Planes {
    fn size(&self) -> Size {
        let dims = self.planes.dims();
        Size {
            b: dims[0],
            c: dims[1],
            h: dims[2],
            w: dims[3],
            value: self.placement.dtype.size_in_bytes(),
        }
    }

    fn backend(&self) -> Backend {
        self.placement.backend
    }

    fn window(&self, lines: Band) -> Result<Window> {
        let planes = self.planes.narrow(2, lines.start, lines.len())?;
        Ok(Window::of(lines.start, self.map(&planes)?))
    }

    fn release(&self, _before: usize) {}

    fn again(&self) -> Source<'a> {
        Box::new(self.clone())
    }

    fn into_whole(self: Box<Self>) -> Result<(FeatureMap, bool)> {
        Ok((self.map(&self.planes)?, true))
    }
}
