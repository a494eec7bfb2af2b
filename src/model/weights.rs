//! Tensors by name out of memory-mapped files, one or several (safetensors, PyTorch's), or of bytes built into the binary.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::Display;
use std::ops::{Deref, Range};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

use crate::device::Placement;

enum Bytes {
    /// Shared by the parts of one file.
    Mapped(Arc<Mmap>),
    BuiltIn(&'static [u8]),
    Made(Vec<u8>),
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::BuiltIn(bytes) => bytes,
            Bytes::Made(bytes) => bytes,
        }
    }

    /// Brings in the pages between two offsets at once; one by one, as they are touched, takes twice as long.
    fn fetch(&self, start: usize, end: usize) {
        #[cfg(target_os = "linux")]
        if let Bytes::Mapped(map) = self
            && end - start > 1 << 20
        {
            // A system that does not know this advice refuses it, which costs time, nothing else.
            let _ = map.advise_range(memmap2::Advice::PopulateRead, start, end - start);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (start, end);
    }

    /// Lets go of the pages between two offsets, which were read for good: they would count as this process's
    /// memory beside the copy made of them. The system keeps them in its cache.
    fn release(&self, start: usize, end: usize) {
        #[cfg(unix)]
        if let Bytes::Mapped(map) = self {
            const PAGE: usize = 4096;
            let start = start.next_multiple_of(PAGE);
            let length = (end / PAGE * PAGE).saturating_sub(start);
            if length > 0 {
                // SAFETY: the map is of a file and read-only, so that a dropped page has nothing unsaved and is read again from
                // the file, the same bytes, where it is touched again; the range lies inside the map. The advice failing
                // costs memory, nothing else.
                let _ = unsafe {
                    map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, length)
                };
            }
        }
        #[cfg(not(unix))]
        let _ = (start, end);
    }
}

/// A tensor's values in float32.
pub struct Values<'a> {
    values: Cow<'a, [f32]>,
    /// The file's bytes that they are, to be let go of with them.
    read: Option<(&'a Bytes, usize, usize)>,
}

impl Deref for Values<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values
    }
}

impl Drop for Values<'_> {
    fn drop(&mut self) {
        if let Some((bytes, start, end)) = self.read {
            bytes.release(start, end);
        }
    }
}

/// A tensor's float32 values where the file has them, which stays mapped as long as this lives.
pub struct InFile {
    store: Arc<Store>,
    file: usize,
    start: usize,
    end: usize,
}

impl Deref for InFile {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        let (_, bytes) = &self.store.files[self.file];
        as_f32(&bytes.as_slice()[self.start..self.end]).unwrap_or_default()
    }
}

/// Little-endian float32 values as such, where they lie as this machine has them.
fn as_f32(bytes: &[u8]) -> Option<&[f32]> {
    if cfg!(not(target_endian = "little")) {
        return None;
    }
    bytemuck::try_cast_slice(bytes).ok()
}

/// Where a tensor lies.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// From one value to the next along each dimension; None where they lie in C order without holes.
    strides: Option<Vec<usize>>,
    /// Bytes of the file, from the first value to behind the last.
    start: usize,
    end: usize,
}

impl Entry {
    /// Of the only file of a store, its values `strides` apart, which must lie within `range`.
    pub(super) fn of_strides(
        dtype: Dtype,
        shape: Vec<usize>,
        strides: Vec<usize>,
        range: Range<usize>,
    ) -> Self {
        let mut expected = 1;
        let dense = std::iter::zip(&shape, &strides)
            .rev()
            .all(|(size, stride)| {
                let fits = *size == 1 || *stride == expected;
                // Beyond all numbers where another size is 0.
                expected = expected.saturating_mul(*size);
                fits
            });
        Self {
            file: 0,
            strides: (!dense && !range.is_empty()).then_some(strides),
            dtype,
            shape,
            start: range.start,
            end: range.end,
        }
    }

    pub(super) fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Its value, where it is a whole number alone; `bytes` are the file's.
    pub(super) fn whole_number(&self, bytes: &[u8]) -> Option<i64> {
        let value = bytes.get(self.range())?.try_into().ok()?;
        (self.dtype == Dtype::I64).then(|| i64::from_le_bytes(value))
    }

    /// Without the dimensions from `dimension` on, each of which has one value.
    pub(super) fn squeezed(mut self, dimension: usize) -> Result<Self> {
        let rest = self.shape.get(dimension..).unwrap_or_default();
        ensure!(
            rest.iter().all(|size| *size == 1),
            "it is of shape {:?}; expected {dimension} dimensions, and others of 1",
            self.shape
        );
        self.shape.truncate(dimension);
        if let Some(strides) = &mut self.strides {
            strides.truncate(dimension);
        }
        Ok(self)
    }

    /// One of `count` equal parts along the first dimension.
    pub(super) fn part(&self, number: usize, count: usize) -> Result<Self> {
        let rows = self.shape.first().copied().unwrap_or(0);
        ensure!(
            rows > 0 && rows.is_multiple_of(count) && self.end > self.start,
            "it is of shape {:?}; expected {count} parts of one size, one above the other",
            self.shape
        );
        let rows = rows / count;
        let mut part = self.clone();
        part.shape[0] = rows;
        let width = self.width();
        let values = |strides: &[usize], shape: &[usize]| -> usize {
            let along = std::iter::zip(strides, shape).map(|(stride, size)| stride * (size - 1));
            1 + along.sum::<usize>()
        };
        let (step, length) = match &self.strides {
            Some(strides) => (rows * strides[0], values(strides, &part.shape)),
            None => {
                let length = part.shape.iter().product();
                (length, length)
            }
        };
        part.start = self.start + number * step * width;
        part.end = part.start + length * width;
        Ok(part)
    }

    /// The bytes of the file from the first value to behind the last.
    pub(super) fn range(&self) -> Range<usize> {
        self.start..self.end
    }

    /// Bytes of a value.
    fn width(&self) -> usize {
        self.dtype.bitsize() / 8
    }

    /// Bytes of all values.
    pub(super) fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.width()
    }

    /// Its values in C order, of the bytes from `start` to `end`.
    pub(super) fn in_order<'a>(&self, bytes: &'a [u8]) -> Cow<'a, [u8]> {
        let Some(strides) = &self.strides else {
            return Cow::Borrowed(bytes);
        };
        let width = self.width();
        let mut ordered = Vec::with_capacity(self.bytes());
        let mut index = vec![0; self.shape.len()];
        while ordered.len() < self.bytes() {
            let at: usize = std::iter::zip(&index, strides)
                .map(|(i, stride)| i * stride)
                .sum();
            ordered.extend_from_slice(&bytes[at * width..][..width]);
            for (i, size) in std::iter::zip(&mut index, &self.shape).rev() {
                *i += 1;
                if *i < *size {
                    break;
                }
                *i = 0;
            }
        }
        Cow::Owned(ordered)
    }
}

struct Store {
    /// Name for messages, and content.
    files: Vec<(String, Bytes)>,
    entries: HashMap<String, Entry>,
}

/// A view of a checkpoint under a name prefix, in the manner of candle's `VarBuilder`.
///
/// Unlike that, its errors name the file, the tensor, the shape expected and the shape found, and each
/// weight is converted straight from the file into the form it is used in.
#[derive(Clone)]
pub struct Weights {
    store: Arc<Store>,
    prefix: String,
    placement: Placement,
    /// Names used here -> names in the file, where they differ.
    names: Option<Arc<HashMap<String, String>>>,
}

impl Weights {
    /// Map `files` (the shards of one checkpoint) into memory. They must stay as they are as long as they are in use: of one
    /// written over, the new numbers are read; one cut short ends the process (SIGBUS).
    ///
    /// # Errors
    /// A file that cannot be opened, or whose safetensors header is cut short or damaged.
    pub fn open(files: &[PathBuf], placement: &Placement) -> Result<Self> {
        let mut mapped = Vec::with_capacity(files.len());
        for path in files {
            let file = std::fs::File::open(path)
                .with_context(|| format!("cannot open the weights {}", path.display()))?;
            // SAFETY: the map is only read. That nobody else writes to the file meanwhile, as Rust asks of what a reference
            // points to, cannot be enforced; where somebody does, it shows as wrong numbers: the header is read once, its
            // offsets are held to the map's length, and all the rest is plain numbers. A file that is cut short
            // under the map ends the process with SIGBUS at the first page that is gone, which no check here prevents.
            let map = unsafe { Mmap::map(&file) }
                .with_context(|| format!("cannot map the weights {}", path.display()))?;
            mapped.push((path.display().to_string(), Bytes::Mapped(Arc::new(map))));
        }
        Self::index(mapped, placement)
    }

    /// The same over bytes built into the binary; `name` stands for the file in messages.
    ///
    /// # Errors
    /// They are no safetensors file.
    pub fn built_in(name: &str, bytes: &'static [u8], placement: &Placement) -> Result<Self> {
        Self::index(vec![(name.to_string(), Bytes::BuiltIn(bytes))], placement)
    }

    /// The same over bytes made by this program.
    ///
    /// # Errors
    /// As [`built_in`](Self::built_in).
    pub fn made(bytes: Vec<u8>, placement: &Placement) -> Result<Self> {
        Self::index(vec![("made here".into(), Bytes::Made(bytes))], placement)
    }

    /// No tensors, for a network of shapes alone.
    pub fn none(placement: &Placement) -> Self {
        Self {
            store: Arc::new(Store {
                files: Vec::new(),
                entries: HashMap::new(),
            }),
            prefix: String::new(),
            placement: placement.shapes(),
            names: None,
        }
    }

    /// Tensors of one mapped file, which `entries` lie within.
    pub(super) fn mapped(name: String, map: Arc<Mmap>, entries: Vec<(String, Entry)>) -> Self {
        let files = vec![(name, Bytes::Mapped(map))];
        let entries = entries.into_iter().collect();
        Self {
            store: Arc::new(Store { files, entries }),
            prefix: String::new(),
            placement: Placement::new(&Device::Cpu, DType::F32),
            names: None,
        }
    }

    /// The same tensors for another placement.
    pub(super) fn at(&self, placement: &Placement) -> Self {
        Self {
            placement: placement.clone(),
            ..self.clone()
        }
    }

    fn index(files: Vec<(String, Bytes)>, placement: &Placement) -> Result<Self> {
        let mut entries = HashMap::new();
        for (number, (name, bytes)) in files.iter().enumerate() {
            for (key, entry) in safetensors_entries(name, bytes.as_slice())? {
                let file = number;
                entries.insert(key, Entry { file, ..entry });
            }
        }
        Ok(Self {
            store: Arc::new(Store { files, entries }),
            prefix: String::new(),
            placement: placement.clone(),
            names: None,
        })
    }

    /// The same tensors under other names: `rename` gives a key's new name, or `None` to keep it.
    pub fn renamed(self, rename: impl Fn(&str) -> Option<String>) -> Self {
        if !self.store.entries.keys().any(|key| rename(key).is_some()) {
            return self;
        }
        let names = self
            .store
            .entries
            .keys()
            .map(|key| (rename(key).unwrap_or_else(|| key.clone()), key.clone()))
            .collect();
        Self {
            names: Some(Arc::new(names)),
            ..self
        }
    }

    /// The view one level down: `pp("conv1")` of `down_blocks.0` reads `down_blocks.0.conv1.…`.
    pub fn pp(&self, name: impl Display) -> Self {
        Self {
            store: self.store.clone(),
            prefix: self.key(name),
            placement: self.placement.clone(),
            names: self.names.clone(),
        }
    }

    /// The same view, its tensors kept in `dtype`.
    pub fn in_dtype(&self, dtype: DType) -> Self {
        let mut view = self.clone();
        view.placement.dtype = dtype;
        view
    }

    fn key(&self, name: impl Display) -> String {
        if self.prefix.is_empty() {
            name.to_string()
        } else {
            format!("{}.{name}", self.prefix)
        }
    }

    /// Where its tensors go.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// The shape of a tensor, or `None` where the checkpoint lacks it.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.find(&self.key(name))
            .map(|entry| entry.shape.as_slice())
    }

    fn find(&self, key: &str) -> Option<&Entry> {
        let key = match &self.names {
            Some(names) => names.get(key)?,
            None => key,
        };
        self.store.entries.get(key)
    }

    /// Whether the checkpoint has a tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.shape(name).is_some()
    }

    /// Holds a number of config.json to the size that a dimension of a tensor has, where the checkpoint has it: a
    /// wrong number is named by its `key` (`unet/config.json: in_channels`), not by the first tensor of another shape.
    ///
    /// # Errors
    /// The two differ.
    pub fn agrees(&self, key: &str, value: usize, name: &str, dimension: usize) -> Result<()> {
        let shape = self.shape(name).unwrap_or_default();
        match shape.get(dimension) {
            Some(&found) if found != value => {
                let mut expected = shape.to_vec();
                expected[dimension] = value;
                bail!(
                    "{key} is {value}, but the weights in {} are of {found} (tensor `{}` has shape {shape:?}, expected {expected:?}); the two do not belong together",
                    self.names(),
                    self.key(name)
                )
            }
            _ => Ok(()),
        }
    }

    /// The same for how many parts there are of a list, such as `down_blocks`, where there are any.
    ///
    /// # Errors
    /// As [`agrees`](Self::agrees).
    pub fn agrees_in_number(&self, key: &str, value: usize, list: &str) -> Result<()> {
        let prefix = format!("{}.", self.key(list));
        let number = |name: &str| -> Option<usize> {
            let (number, _) = name.strip_prefix(&prefix)?.split_once('.')?;
            number.parse().ok()
        };
        let last = match &self.names {
            Some(names) => names.keys().filter_map(|name| number(name)).max(),
            None => self
                .store
                .entries
                .keys()
                .filter_map(|name| number(name))
                .max(),
        };
        match last.map(|last| last.saturating_add(1)) {
            Some(found) if found != value => bail!(
                "{key} is {value}, but the weights in {} have {found} (`{prefix}0` and so on); the two do not belong together",
                self.names(),
            ),
            _ => Ok(()),
        }
    }

    fn names(&self) -> String {
        let names: Vec<&str> = self.store.files.iter().map(|(name, _)| &**name).collect();
        names.join(", ")
    }

    fn entry(&self, shape: &[usize], name: &str) -> Result<(&Entry, &[u8])> {
        let key = self.key(name);
        let entry = self.find(&key).ok_or_else(|| {
            anyhow!(
                "{}: tensor `{key}` of shape {shape:?} is missing; the file does not fit its config.json",
                self.names()
            )
        })?;
        let (file, bytes) = &self.store.files[entry.file];
        if entry.shape != shape {
            bail!(
                "{file}: tensor `{key}` has shape {:?}, expected {shape:?} from config.json; the two do not belong together",
                entry.shape
            );
        }
        Ok((entry, &bytes.as_slice()[entry.start..entry.end]))
    }

    /// The values of a tensor in float32, whatever type the file keeps: straight from the mapped file where that
    /// holds float32.
    ///
    /// # Errors
    /// The tensor is missing, has another shape than `shape`, or is not of a float type.
    pub fn f32(&self, shape: &[usize], name: &str) -> Result<Values<'_>> {
        let (entry, _) = self.entry(shape, name)?;
        self.store.files[entry.file].1.fetch(entry.start, entry.end);
        self.table(shape, name)
    }

    /// The same for a tensor of which little is read: what is not touched stays in the file.
    ///
    /// # Errors
    /// As [`f32`](Self::f32).
    pub fn table(&self, shape: &[usize], name: &str) -> Result<Values<'_>> {
        let (entry, bytes) = self.entry(shape, name)?;
        let file = &self.store.files[entry.file].1;
        if entry.dtype == Dtype::F32
            && entry.strides.is_none()
            && let Some(values) = as_f32(bytes)
        {
            return Ok(Values {
                values: Cow::Borrowed(values),
                read: Some((file, entry.start, entry.end)),
            });
        }
        let values = to_f32(entry.dtype, &entry.in_order(bytes));
        file.release(entry.start, entry.end);
        let values = values.ok_or_else(|| {
            anyhow!(
                "{}: tensor `{}` is of type {:?}; expected F32, F16, BF16 or F64",
                self.names(),
                self.key(name),
                entry.dtype
            )
        })?;
        Ok(Values {
            values: Cow::Owned(values),
            read: None,
        })
    }

    /// The same values, left where they are; None where the placement [copies weights](Placement::weights_in_place), or the file
    /// does not have them as this machine computes with them.
    ///
    /// # Errors
    /// The tensor is missing or has another shape than `shape`.
    pub fn in_file(&self, shape: &[usize], name: &str) -> Result<Option<InFile>> {
        let (entry, bytes) = self.entry(shape, name)?;
        let usable = self.placement.reads_in_place()
            && entry.dtype == Dtype::F32
            && entry.strides.is_none()
            && as_f32(bytes).is_some();
        Ok(usable.then(|| InFile {
            store: self.store.clone(),
            file: entry.file,
            start: entry.start,
            end: entry.end,
        }))
    }

    /// The bytes of a tensor, in C order, lowest byte of a value first, of the type that the file keeps; None where it has none of this
    /// name.
    pub fn raw(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        let entry = self.find(&self.key(name))?;
        let (_, bytes) = &self.store.files[entry.file];
        Some(entry.in_order(&bytes.as_slice()[entry.range()]))
    }

    /// All tensors: name, type and shape.
    pub(super) fn tensors(&self) -> Vec<(String, Dtype, Vec<usize>)> {
        let entries = self.store.entries.iter();
        entries
            .map(|(name, entry)| (name.clone(), entry.dtype, entry.shape.clone()))
            .collect()
    }

    /// Lets go of the memory that a tensor was read into, which is not read again soon.
    pub(super) fn release(&self, name: &str) {
        if let Some(entry) = self.find(&self.key(name)) {
            self.store.files[entry.file]
                .1
                .release(entry.start, entry.end);
        }
    }

    /// The same as a tensor in the placement's dtype, on its device.
    ///
    /// # Errors
    /// As [`f32`](Self::f32).
    pub fn tensor(&self, shape: &[usize], name: &str) -> Result<Tensor> {
        self.tensor_in(shape, name, self.placement.dtype)
    }

    /// The same in a dtype of the caller's choice.
    ///
    /// # Errors
    /// As [`f32`](Self::f32).
    pub fn tensor_in(&self, shape: &[usize], name: &str, dtype: DType) -> Result<Tensor> {
        if self.placement.is_of_shapes() {
            let one = Tensor::zeros((), dtype, &self.placement.device)?;
            return Ok(one.broadcast_as(shape)?);
        }
        let values = self.f32(shape, name)?;
        let placement = Placement {
            dtype,
            ..self.placement.clone()
        };
        placement.upload(&values, shape)
    }
}

/// Where the tensors of a safetensors file lie in it; `name` is the file's in messages.
///
/// # Errors
/// Its header is cut short or damaged, or says more than the file has.
pub(super) fn safetensors_entries(name: &str, bytes: &[u8]) -> Result<HashMap<String, Entry>> {
    let damaged = || {
        format!(
            "{name}: not a whole safetensors file ({} bytes); it is damaged or was cut short: delete it and fetch it again",
            bytes.len()
        )
    };
    let (header, metadata) = SafeTensors::read_metadata(bytes).with_context(damaged)?;
    let data = header + 8;
    let mut entries = HashMap::new();
    for (key, info) in metadata.tensors() {
        let (start, end) = info.data_offsets;
        if data + end > bytes.len() {
            bail!(damaged());
        }
        entries.insert(
            key,
            Entry {
                file: 0,
                dtype: info.dtype,
                shape: info.shape.clone(),
                strides: None,
                start: data + start,
                end: data + end,
            },
        );
    }
    Ok(entries)
}

/// Little-endian floats of `dtype` as float32; `None` for integer and 8-bit types.
fn to_f32(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    fn each<const W: usize>(bytes: &[u8], convert: impl Fn([u8; W]) -> f32) -> Vec<f32> {
        let (values, _) = bytes.as_chunks::<W>();
        values.iter().map(|value| convert(*value)).collect()
    }
    Some(match dtype {
        Dtype::F32 => each(bytes, f32::from_le_bytes),
        Dtype::F64 => each(bytes, |b| f64::from_le_bytes(b) as f32),
        Dtype::F16 => each(bytes, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => each(bytes, |b| bf16::from_le_bytes(b).to_f32()),
        _ => return None,
    })
}
