//! What maps may take of memory while a network runs, and where those go that are more.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use super::super::{FeatureMap, shapes};
use super::spill::{Place, SpillFile};
use super::{Band, Size};
use crate::device::Backend;
use crate::kernels::cpu::{CONV_LINES, NORM_LINES};

const _: () = assert!(CONV_LINES.is_multiple_of(NORM_LINES));

/// How maps are kept while a network runs. The values that come out are the same whatever it says of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a band at most: a map of more is computed and kept in several.
    pub band: u64,
    /// Bytes at most of all maps that are kept at a time; what is more goes to a file, or from a card to this machine's memory.
    pub kept: u64,
    /// A map that one convolution hands to the next is computed anew whenever it is read, and not kept, from so many bytes on.
    pub recomputed: u64,
    /// Where the file is made; None for maps that all fit.
    pub folder: Option<PathBuf>,
    /// Positions that a position of the VAE's attention sees at most: of larger maps those of a window around it.
    pub most_keys: usize,
}

/// Those of a picture of 4096x4096 pixels. Beyond, the work of seeing all would grow with the square of the pixels: of an
/// 8192x8192 picture it would be 30 times all the rest.
const MOST_KEYS: usize = 512 * 512;

impl Limits {
    /// Every map whole, and in memory.
    pub fn none() -> Self {
        Self {
            band: u64::MAX,
            kept: u64::MAX,
            recomputed: u64::MAX,
            folder: None,
            most_keys: MOST_KEYS,
        }
    }
}

/// The memory for a network's maps, counted.
#[derive(Clone)]
pub struct Room(Rc<Inner>);

struct Inner {
    limits: Limits,
    /// Bytes of the maps that are kept now.
    held: Cell<u64>,
    /// The most that were.
    held_at_most: Cell<u64>,
    /// The same with what was computed beside them, where layers of shapes say so.
    peak: Cell<u64>,
    /// Bytes that are in the file, or in this machine's memory, now, and at most.
    elsewhere: Cell<u64>,
    elsewhere_at_most: Cell<u64>,
    /// Bytes that went to the file, or to this machine's memory, so far.
    spilled: Cell<u64>,
    file: RefCell<Option<SpillFile>>,
    /// Bytes of the maps between two convolutions that there were.
    between: RefCell<BTreeSet<u64>>,
}

impl Room {
    /// For one run of a network.
    pub fn new(limits: Limits) -> Self {
        Self(Rc::new(Inner {
            limits,
            held: Cell::new(0),
            held_at_most: Cell::new(0),
            peak: Cell::new(0),
            elsewhere: Cell::new(0),
            elsewhere_at_most: Cell::new(0),
            spilled: Cell::new(0),
            file: RefCell::new(None),
            between: RefCell::default(),
        }))
    }

    /// Without limits.
    pub fn unlimited() -> Self {
        Self::new(Limits::none())
    }

    /// Height and width of the keys that a position of a map (h, w) sees: all, or a window as near to a square as the map has.
    pub fn keys_window(&self, h: usize, w: usize) -> (usize, usize) {
        let most = self.0.limits.most_keys;
        let side = most.isqrt();
        if h * w <= most {
            (h, w)
        } else if h < side {
            (h, (most / h).min(w))
        } else if w < side {
            ((most / w).min(h), w)
        } else {
            (side, side)
        }
    }

    /// Whether no map is ever in several bands.
    pub fn is_unlimited(&self) -> bool {
        self.0.limits.band == u64::MAX
    }

    /// Bytes of kept maps at their most.
    pub fn held_at_most(&self) -> u64 {
        self.0.held_at_most.get()
    }

    /// The same with what was computed beside them, where layers of shapes say so.
    pub fn peak(&self) -> u64 {
        self.0.peak.get()
    }

    /// Bytes that were elsewhere at a time.
    pub fn elsewhere_at_most(&self) -> u64 {
        self.0.elsewhere_at_most.get()
    }

    /// The sizes in bytes of all maps that one convolution handed to the next, which can be computed anew in place of being kept.
    pub fn between(&self) -> BTreeSet<u64> {
        self.0.between.borrow().clone()
    }

    /// Bytes that did not stay where they were computed.
    pub fn spilled(&self) -> u64 {
        self.0.spilled.get()
    }

    /// Lines of a band of a map: all, or a multiple of 12 (tiles of convolutions, and what statistics are summed in).
    pub fn band_lines(&self, size: Size) -> usize {
        let line = size.bytes() / size.h.max(1) as u64;
        if size.bytes() <= self.0.limits.band {
            return size.h;
        }
        let fit = self.0.limits.band / line.max(1);
        let lines = usize::try_from(fit / Self::ALIGNED as u64)
            .unwrap_or(1)
            .max(1)
            * Self::ALIGNED;
        lines.min(size.h)
    }

    /// The bands that a map of this size is computed in.
    pub fn bands(&self, size: Size) -> Vec<Band> {
        let step = self.band_lines(size).max(1);
        (0..size.h)
            .step_by(step)
            .map(|start| start..size.h.min(start + step))
            .collect()
    }

    /// What bands begin at a multiple of: the lines of a tile of the CPU's convolutions, and those whose statistics are summed together.
    const ALIGNED: usize = CONV_LINES;

    /// Lines rounded outwards to what bands begin at a multiple of, inside a map of `h` lines.
    pub(super) fn aligned(lines: &Band, h: usize) -> Band {
        let start = lines.start / Self::ALIGNED * Self::ALIGNED;
        start..lines.end.next_multiple_of(Self::ALIGNED).min(h)
    }

    /// Whether a map between two convolutions is not kept.
    pub fn recomputes(&self, size: Size) -> bool {
        self.0.between.borrow_mut().insert(size.bytes());
        size.bytes() >= self.0.limits.recomputed && self.band_lines(size) < size.h
    }

    /// Keeps a band, here or where there is room.
    ///
    /// # Errors
    /// It has to go to a file, which cannot be written.
    pub(super) fn keep(&self, map: FeatureMap) -> Result<Kept> {
        let bytes = bytes_of(&map.tensor);
        self.passing();
        // candle's own operations are there to compare with: their maps, channels first, all stay.
        let stays = map.backend == Backend::Stock;
        if stays || self.0.held.get().saturating_add(bytes) <= self.0.limits.kept {
            let held = self.0.held.get() + bytes;
            self.0.held.set(held);
            raise(&self.0.held_at_most, held);
            raise(&self.0.peak, held);
            return Ok(self.kept(State::Here(map), bytes));
        }
        self.0.spilled.set(self.0.spilled.get() + bytes);
        let elsewhere = self.0.elsewhere.get() + bytes;
        self.0.elsewhere.set(elsewhere);
        raise(&self.0.elsewhere_at_most, elsewhere);
        if map.is_of_shapes() {
            return Ok(self.kept(State::Elsewhere(map), bytes));
        }
        if !map.tensor.device().is_cpu() {
            let device = map.tensor.device().clone();
            let backend = map.backend;
            let host = map.tensor.to_device(&Device::Cpu)?;
            return Ok(self.kept(
                State::Host {
                    host,
                    device,
                    backend,
                },
                bytes,
            ));
        }
        let mut file = self.0.file.borrow_mut();
        let file = match &mut *file {
            Some(file) => file,
            none => none.insert(SpillFile::create(self.0.limits.folder.as_deref())?),
        };
        let place = file.write(&map.tensor)?;
        let (dtype, backend) = (map.tensor.dtype(), map.backend);
        let shape = map.tensor.dims().to_vec();
        Ok(self.kept(
            State::File {
                place,
                shape,
                dtype,
                backend,
            },
            bytes,
        ))
    }

    /// Takes into account what was computed since the last call and is not kept, by layers of shapes.
    pub fn passing(&self) {
        raise(&self.0.peak, self.0.held.get() + shapes::made());
    }

    /// Counts tensors that stay for a while beside the maps.
    pub fn hold(&self, tensors: &[&Tensor]) -> Held {
        let bytes = tensors.iter().map(|tensor| bytes_of(tensor)).sum();
        // They were computed since the last call, and are not to be counted twice.
        shapes::made();
        let held = self.0.held.get() + bytes;
        self.0.held.set(held);
        raise(&self.0.held_at_most, held);
        raise(&self.0.peak, held);
        Held {
            bytes,
            room: self.clone(),
        }
    }

    fn kept(&self, state: State, bytes: u64) -> Kept {
        Kept {
            state,
            bytes,
            room: self.clone(),
        }
    }
}

/// To `value`, where that is more.
fn raise(most: &Cell<u64>, value: u64) {
    most.set(most.get().max(value));
}

fn bytes_of(tensor: &Tensor) -> u64 {
    (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64
}

/// Tensors that are counted until this is dropped.
pub struct Held {
    bytes: u64,
    room: Room,
}

impl Drop for Held {
    fn drop(&mut self) {
        let held = &self.room.0.held;
        held.set(held.get() - self.bytes);
    }
}

/// A band that is kept somewhere until it is dropped.
pub(super) struct Kept {
    state: State,
    bytes: u64,
    room: Room,
}

enum State {
    Here(FeatureMap),
    /// Of a map without values, not in memory.
    Elsewhere(FeatureMap),
    /// In this machine's memory, from a card.
    Host {
        host: Tensor,
        device: Device,
        backend: Backend,
    },
    /// Channels last, in the room's file.
    File {
        place: Place,
        shape: Vec<usize>,
        dtype: DType,
        backend: Backend,
    },
}

impl Kept {
    /// Whether it is in memory.
    pub fn is_here(&self) -> bool {
        matches!(self.state, State::Here(_))
    }

    /// Some of its lines, counted from its first.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn lines(&self, lines: Band) -> Result<FeatureMap> {
        match &self.state {
            State::Here(map) => map.lines(lines),
            State::Elsewhere(map) => {
                let lines = map.lines(lines)?;
                // It is read into memory.
                Ok(lines.like(shapes::result(lines.tensor.dims(), lines.tensor.dtype())?))
            }
            State::Host {
                host,
                device,
                backend,
            } => {
                let map = FeatureMap {
                    tensor: host.clone(),
                    backend: *backend,
                };
                let lines = map.lines(lines)?;
                Ok(FeatureMap {
                    tensor: lines.tensor.to_device(device)?,
                    ..lines
                })
            }
            State::File {
                place,
                shape,
                dtype,
                backend,
            } => {
                let file = self.room.0.file.borrow();
                let file = file.as_ref().ok_or_else(|| {
                    anyhow::anyhow!("a map was to be in a file that there is not")
                })?;
                file.read(place, shape, lines, *dtype, *backend)
            }
        }
    }

    /// The band itself where it is here.
    pub fn into_map(self) -> Option<FeatureMap> {
        // Dropping what is left takes it off the count.
        match &self.state {
            State::Here(map) => Some(map.clone()),
            State::Elsewhere(_) | State::Host { .. } | State::File { .. } => None,
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let room = &self.room.0;
        let count = match &self.state {
            State::Here(_) => &room.held,
            State::Elsewhere(_) | State::Host { .. } | State::File { .. } => &room.elsewhere,
        };
        count.set(count.get() - self.bytes);
        if let (State::File { place, .. }, Some(file)) = (&self.state, &mut *room.file.borrow_mut())
        {
            file.free(place);
        }
    }
}
