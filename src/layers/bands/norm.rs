//! Group norms over maps in bands: the statistics of all lines first, then line by line what they come to.

use std::cell::OnceCell;
use std::rc::Rc;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use super::super::{Activation, FeatureMap, NormAct, cpu, cuda, shapes, stock};
use super::{Band, Lines, Room, Size, Window};
use crate::device::Backend;
use crate::kernels::cpu::{GroupSums, Prologue};

/// A norm and its activation, as they are to be applied to a map.
#[derive(Clone)]
pub enum Norm {
    /// Of a map that is whole: its statistics are taken when it is applied.
    Own(Rc<Own>),
    /// Of statistics that are known.
    Known(Rc<Known>),
}

/// A norm that has not seen its map.
pub struct Own {
    pub norm: NormAct,
    /// What it came to, where that was asked for.
    known: OnceCell<Rc<Known>>,
}

/// What a norm comes to, given its map's statistics.
pub enum Known {
    /// Of a map without values.
    Shapes,
    /// For our CPU kernels.
    Cpu(Prologue),
    /// `act(x * scale + shift)`, (b, c) each, float32.
    Tensors {
        scale: Tensor,
        shift: Tensor,
        activation: Activation,
    },
}

impl Norm {
    /// `norm` for this map, which is read once for its statistics where it is not whole or has not told them.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn of<'a>(map: &(dyn Lines<'a> + 'a), norm: NormAct, room: &Room) -> Result<Self> {
        if map.is_whole() {
            let known = OnceCell::new();
            return Ok(Self::Own(Rc::new(Own { norm, known })));
        }
        let sums = match map.sums(norm.groups) {
            Some(sums) => sums,
            None => sums_of(map, norm.groups, room)?,
        };
        Ok(Self::Known(Rc::new(sums.known(&norm)?)))
    }

    /// The lines of a map that are in `window`, normed.
    ///
    /// # Errors
    /// They are not there.
    pub fn apply_to<'a>(
        &self,
        map: &(dyn Lines<'a> + 'a),
        window: &Window,
        lines: Band,
    ) -> Result<FeatureMap> {
        self.known(map)?.apply(window, map.size(), lines)
    }

    /// The same with its statistics known, for parts of a map.
    pub(super) fn known<'a>(&self, map: &(dyn Lines<'a> + 'a)) -> Result<Rc<Known>> {
        match self {
            Self::Known(known) => Ok(known.clone()),
            Self::Own(own) => {
                if let Some(known) = own.known.get() {
                    return Ok(known.clone());
                }
                let sums = sums_of(map, own.norm.groups, &Room::unlimited())?;
                let known = Rc::new(sums.known(&own.norm)?);
                Ok(own.known.get_or_init(|| known).clone())
            }
        }
    }
}

impl Known {
    /// Applies it to lines of the map.
    ///
    /// # Errors
    /// They are not here.
    pub fn apply(&self, window: &Window, size: Size, lines: Band) -> Result<FeatureMap> {
        match self {
            Self::Shapes => {
                let x = window.exactly(lines)?;
                Ok(x.like(shapes::result(x.tensor.dims(), x.tensor.dtype())?))
            }
            Self::Cpu(prologue) => cpu::normed_lines(window, size, prologue, lines),
            Self::Tensors {
                scale,
                shift,
                activation,
            } => {
                let x = window.exactly(lines)?;
                let y = match x.backend {
                    Backend::CardKernels => cuda::affine(&x.tensor, scale, shift, *activation)?,
                    _ => stock::affine(&x.tensor, scale, shift, *activation)?,
                };
                Ok(x.like(y))
            }
        }
    }
}

/// Sums over the lines of a map so far, for the statistics of a group norm.
#[derive(Clone)]
pub enum Sums {
    /// Of a map without values.
    Shapes,
    Cpu(GroupSums),
    Other(Vec<Moments>),
}

/// Count, mean and mean square deviation of some of the values of a group of a batch item.
#[derive(Clone, Copy, Default)]
pub struct Moments {
    pub count: f64,
    pub mean: f64,
    pub variance: f64,
}

impl Moments {
    /// Those of both together (Chan, Golub and LeVeque).
    fn merge(self, other: Self) -> Self {
        let count = self.count + other.count;
        if count == 0.0 {
            return self;
        }
        let (apart, share) = (other.mean - self.mean, other.count / count);
        Self {
            count,
            mean: self.mean + apart * share,
            variance: self.variance * (1.0 - share)
                + other.variance * share
                + apart * apart * share * (1.0 - share),
        }
    }
}

impl Sums {
    /// Of no lines of a map of this size.
    pub fn new(size: Size, groups: usize, backend: Backend) -> Self {
        match backend {
            Backend::CpuKernels => Self::Cpu(GroupSums::new(size.b, size.c, groups)),
            Backend::Shapes { .. } => Self::Shapes,
            _ => Self::Other(vec![Moments::default(); size.b * groups]),
        }
    }

    /// Adds the next lines.
    ///
    /// # Errors
    /// They are not here.
    pub fn add(&mut self, window: &Window, size: Size, lines: Band, groups: usize) -> Result<()> {
        match self {
            Self::Shapes => Ok(()),
            Self::Cpu(sums) => cpu::add_lines(sums, window, size, lines),
            Self::Other(all) => {
                let x = window.exactly(lines)?;
                let moments = match x.backend {
                    Backend::CardKernels => cuda::moments(&x.tensor, groups)?,
                    _ => stock::moments(&x.tensor, groups)?,
                };
                for (sum, moments) in all.iter_mut().zip(moments) {
                    *sum = sum.merge(moments);
                }
                Ok(())
            }
        }
    }

    /// What `norm` comes to.
    fn known(&self, norm: &NormAct) -> Result<Known> {
        match self {
            Self::Shapes => Ok(Known::Shapes),
            Self::Cpu(sums) => Ok(Known::Cpu(cpu::known_prologue(sums, norm)?)),
            Self::Other(moments) => known_tensors(moments, norm),
        }
    }
}

fn known_tensors(moments: &[Moments], norm: &NormAct) -> Result<Known> {
    let b = moments.len() / norm.groups;
    let device = norm.scale.device();
    let host = |tensor: &Tensor| -> Result<Vec<f32>> {
        let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        Ok(tensor.flatten_all()?.to_vec1()?)
    };
    let (scale, shift) = (host(&norm.scale)?, host(&norm.shift)?);
    let c = norm.scale.dim(1)?;
    let pair = |i: usize| {
        let (item, channel) = (i / c, i % c);
        let moments = moments[item * norm.groups + channel / (c / norm.groups)];
        let at = i % scale.len();
        let factor = f64::from(scale[at]) / (moments.variance.max(0.0) + norm.eps).sqrt();
        let addend = f64::from(shift[at]) - moments.mean * factor;
        (factor as f32, addend as f32)
    };
    let (scale, shift): (Vec<f32>, Vec<f32>) = (0..b * c).map(pair).unzip();
    Ok(Known::Tensors {
        scale: Tensor::from_vec(scale, (b, c), device)?,
        shift: Tensor::from_vec(shift, (b, c), device)?,
        activation: norm.activation,
    })
}

/// Reads the map once.
fn sums_of<'a>(map: &(dyn Lines<'a> + 'a), groups: usize, room: &Room) -> Result<Sums> {
    let size = map.size();
    let mut sums = Sums::new(size, groups, map.backend());
    for lines in room.bands(size) {
        sums.add(&map.window(lines.clone())?, size, lines, groups)?;
        room.passing();
    }
    Ok(sums)
}

/// Lines of a map, normed.
///
/// # Errors
/// The map cannot be read.
pub fn normed_lines<'a>(
    map: &(dyn Lines<'a> + 'a),
    norm: &Norm,
    lines: Band,
) -> Result<FeatureMap> {
    norm.apply_to(map, &map.window(lines.clone())?, lines)
}
