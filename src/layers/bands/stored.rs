//! Maps that are kept: a list of bands, each of which goes as soon as nobody will read it again.

use std::cell::RefCell;
use std::rc::Rc;

use anyhow::{Result, bail};

use super::super::FeatureMap;
use super::norm::Sums;
use super::room::Kept;
use super::source::{Lines, Source};
use super::{Band, Room, Size, Window};
use crate::device::Backend;

/// A reader of a map that is kept. Its bands go when all readers have released them or are gone.
pub struct Stored {
    map: Rc<RefCell<Bands>>,
    /// Of the map's readers.
    number: usize,
}

struct Bands {
    size: Size,
    backend: Backend,
    /// Of a band; the last may have fewer.
    step: usize,
    bands: Vec<Option<Kept>>,
    /// The first line that each reader may still ask for.
    readers: Vec<usize>,
    /// Of a norm in so many groups, where they were taken when the map was made.
    sums: Option<(usize, Sums)>,
}

impl Bands {
    fn drop_what_nobody_reads(&mut self) {
        let first = self.readers.iter().copied().min().unwrap_or(self.size.h);
        let done = if first >= self.size.h {
            self.bands.len()
        } else {
            first / self.step
        };
        for band in self.bands.iter_mut().take(done) {
            *band = None;
        }
    }
}

impl Stored {
    /// A map that is whole.
    ///
    /// # Errors
    /// It has no four dimensions.
    pub fn whole(map: FeatureMap) -> Result<Self> {
        // It is not counted: it was here before.
        Self::kept(map, &Room::unlimited())
    }

    /// A map of one band, which `room` keeps.
    fn kept(map: FeatureMap, room: &Room) -> Result<Self> {
        let (size, backend) = (map.size()?, map.backend);
        Ok(Self::of(Bands {
            size,
            backend,
            step: size.h,
            bands: vec![Some(room.keep(map)?)],
            readers: Vec::new(),
            sums: None,
        }))
    }

    fn of(bands: Bands) -> Self {
        let map = Rc::new(RefCell::new(bands));
        map.borrow_mut().readers.push(0);
        Self { map, number: 0 }
    }

    /// Another reader, of the lines that this one has not released.
    pub fn share(&self) -> Self {
        let mut bands = self.map.borrow_mut();
        let first = bands.readers[self.number];
        bands.readers.push(first);
        let number = bands.readers.len() - 1;
        drop(bands);
        Self {
            map: self.map.clone(),
            number,
        }
    }

    /// The map in one piece, and whether nobody else has it.
    ///
    /// # Errors
    /// Lines of it are gone, or the file cannot be read.
    pub fn into_whole(self) -> Result<(FeatureMap, bool)> {
        let size = self.size();
        let only = {
            let mut bands = self.map.borrow_mut();
            let alone = Rc::strong_count(&self.map) == 1;
            match &mut *bands.bands {
                [band] if alone && band.as_ref().is_some_and(Kept::is_here) => band.take(),
                _ => None,
            }
        };
        match only.and_then(Kept::into_map) {
            Some(map) => Ok((map, true)),
            None => Ok((self.window(0..size.h)?.exactly(0..size.h)?, false)),
        }
    }
}

impl Drop for Stored {
    fn drop(&mut self) {
        let mut bands = self.map.borrow_mut();
        bands.readers[self.number] = usize::MAX;
        bands.drop_what_nobody_reads();
    }
}

impl<'a> Lines<'a> for Stored {
    fn size(&self) -> Size {
        self.map.borrow().size
    }

    fn backend(&self) -> Backend {
        self.map.borrow().backend
    }

    fn window(&self, lines: Band) -> Result<Window> {
        let bands = self.map.borrow();
        let (step, h) = (bands.step, bands.size.h);
        let mut pieces = Vec::new();
        let mut first = lines.start;
        for (number, band) in bands.bands.iter().enumerate() {
            let of_band = number * step..h.min((number + 1) * step);
            let part = lines.start.max(of_band.start)..lines.end.min(of_band.end);
            if part.is_empty() {
                continue;
            }
            let Some(band) = band else {
                bail!("lines {part:?} of a map were read after they were released");
            };
            // A band that is here costs nothing to hand out, and its neighbours' kernels like it whole.
            let here = band.is_here();
            let wanted = if here { of_band.clone() } else { part };
            if pieces.is_empty() {
                first = wanted.start;
            }
            pieces.push(band.lines(wanted.start - of_band.start..wanted.end - of_band.start)?);
        }
        Ok(Window {
            first,
            pieces,
            beside: Vec::new(),
        })
    }

    fn release(&self, before: usize) {
        let mut bands = self.map.borrow_mut();
        let number = self.number;
        bands.readers[number] = bands.readers[number].max(before);
        bands.drop_what_nobody_reads();
    }

    fn again(&self) -> Source<'a> {
        Box::new(self.share())
    }

    fn is_whole(&self) -> bool {
        self.map.borrow().bands.len() == 1
    }

    fn into_whole(self: Box<Self>) -> Result<(FeatureMap, bool)> {
        Stored::into_whole(*self)
    }

    fn sums(&self, groups: usize) -> Option<Sums> {
        let bands = self.map.borrow();
        let (of, sums) = bands.sums.as_ref()?;
        (*of == groups).then(|| sums.clone())
    }
}

/// Computes a map and keeps it, releasing what it is made of on the way. Where it is in bands, the statistics for a norm
/// in `groups` groups are taken on the way too.
///
/// # Errors
/// The map cannot be computed, or there is no place for it.
pub fn store<'a>(source: Source<'a>, groups: Option<usize>, room: &Room) -> Result<Source<'a>> {
    let size = source.size();
    if room.band_lines(size) == size.h {
        let (map, _) = source.into_whole()?;
        return Ok(Box::new(Stored::kept(map, room)?));
    }
    let mut making = Making::new(&*source, groups, room);
    while let Some(lines) = making.next() {
        making.add(&*source, lines, room)?;
    }
    Ok(Box::new(making.done()))
}

/// The same for two maps of one height that are made of the same ones: together, so that what both are made of can be
/// released on the way.
///
/// # Errors
/// As [`store`].
pub fn store_both<'a>(
    one: (Source<'a>, Option<usize>),
    other: (Source<'a>, Option<usize>),
    room: &Room,
) -> Result<(Source<'a>, Source<'a>)> {
    let step = |source: &Source| room.band_lines(source.size());
    let same = one.0.size().h == other.0.size().h && step(&one.0) == step(&other.0);
    if step(&one.0) == one.0.size().h || !same {
        let one = store(one.0, one.1, room)?;
        return Ok((one, store(other.0, other.1, room)?));
    }
    let mut first = Making::new(&*one.0, one.1, room);
    let mut second = Making::new(&*other.0, other.1, room);
    while let Some(lines) = first.next() {
        first.add(&*one.0, lines.clone(), room)?;
        second.add(&*other.0, lines, room)?;
    }
    Ok((Box::new(first.done()), Box::new(second.done())))
}

/// Keeps what one convolution hands to the next, or computes it whenever it is read, as the room says.
///
/// # Errors
/// As [`store`].
pub fn keep_between<'a>(
    source: Source<'a>,
    groups: Option<usize>,
    room: &Room,
) -> Result<Source<'a>> {
    if room.recomputes(source.size()) {
        return Ok(source);
    }
    store(source, groups, room)
}

/// A map of the same size, band by band: `make` is given a window that has a band's lines, which lines these are, and the map.
///
/// # Errors
/// As [`store`], and those of `make`.
pub fn map_bands<'a>(
    x: Source<'a>,
    room: &Room,
    mut make: impl FnMut(&Window, Band, &(dyn Lines<'a> + 'a)) -> Result<FeatureMap>,
) -> Result<Source<'a>> {
    let mut making = Making::new(&*x, None, room);
    while let Some(lines) = making.next() {
        let map = make(&x.window(lines.clone())?, lines.clone(), &*x)?;
        x.release(lines.end);
        making.keep(map, lines, room)?;
    }
    Ok(Box::new(making.done()))
}

/// A map that is being made, from the top down.
struct Making {
    bands: Bands,
}

impl Making {
    fn new<'a>(source: &(dyn Lines<'a> + 'a), groups: Option<usize>, room: &Room) -> Self {
        let (size, backend) = (source.size(), source.backend());
        Self {
            bands: Bands {
                size,
                backend,
                step: room.band_lines(size),
                bands: Vec::new(),
                readers: Vec::new(),
                sums: groups.map(|groups| (groups, Sums::new(size, groups, backend))),
            },
        }
    }

    /// The lines of the next band.
    fn next(&self) -> Option<Band> {
        let start = self.bands.bands.len() * self.bands.step;
        let end = self.bands.size.h.min(start + self.bands.step);
        (start < end).then_some(start..end)
    }

    fn add<'a>(&mut self, source: &(dyn Lines<'a> + 'a), lines: Band, room: &Room) -> Result<()> {
        let map = source.window(lines.clone())?.exactly(lines.clone())?;
        source.release(lines.end);
        self.keep(map, lines, room)
    }

    fn keep(&mut self, map: FeatureMap, lines: Band, room: &Room) -> Result<()> {
        if let Some((groups, sums)) = &mut self.bands.sums {
            let window = Window::of(lines.start, map.clone());
            sums.add(&window, self.bands.size, lines, *groups)?;
        }
        self.bands.bands.push(Some(room.keep(map)?));
        Ok(())
    }

    fn done(self) -> Stored {
        Stored::of(self.bands)
    }
}
