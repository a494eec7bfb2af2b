//! Pickles as far as plain tensors need them. A pickle is a program that makes Python call what it names; here what it names is
//! looked up in a list ([`Global`]), what is not on it ends the reading, and a call of what is makes an entry in a table. Nothing is
//! ever run.
//!
//! candle's own reader (`candle_core::pickle`) is not used: of an evil file it hands back the tensors, since whatever it does not know it
//! passes over; what a pickle memorises it copies at every use, so that a kilobyte can ask for a terabyte; it knows neither legacy
//! files nor other storages than those of its own types.

use std::collections::HashMap;
use std::ops::Range;

use anyhow::{Context, Result, anyhow, bail, ensure};
use safetensors::Dtype;

use super::super::config::shortened;

/// Bytes of the longest pickle that is read. That of 700 tensors has 100 kB.
const MOST_BYTES: usize = 32 << 20;
/// Objects that a pickle may make: some thirty a tensor.
const MOST_OBJECTS: usize = 1 << 20;
/// Dimensions of a tensor. Those of networks have 5 at most.
const MOST_DIMENSIONS: usize = 8;

/// The number of an object in [`Objects`]. Numbers, not references: a pickle may put an object into itself.
pub type Id = usize;

/// What a pickle made.
#[derive(Default)]
pub struct Objects<'a> {
    all: Vec<Object<'a>>,
}

#[derive(Clone)]
enum Object<'a> {
    Int(i64),
    /// A number of more than eight bytes, the lowest first.
    Long(&'a [u8]),
    Text(&'a str),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(Storage<'a>),
    Tensor(Tensor<'a>),
    Truth(bool),
    /// What a call of [`Global::Training`] would give.
    Ignored,
    /// Anything of which only that it is there counts: None, floats, bytes, devices.
    Other,
}

/// Numbers of one type, one after the other.
#[derive(Clone, Copy, Debug)]
pub struct Storage<'a> {
    /// None where each tensor says what it takes the bytes for.
    pub dtype: Option<Dtype>,
    /// By which the file finds it.
    pub key: &'a str,
    /// Numbers in it; where it has no type, bytes.
    pub count: u64,
}

/// A view of a storage. Nothing is known yet of whether it lies within.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    pub dtype: Dtype,
    pub storage: Storage<'a>,
    /// Numbers of `dtype` before the first of it.
    pub offset: u64,
    pub shape: Vec<usize>,
    /// From one value to the next along each dimension, in numbers.
    pub strides: Vec<usize>,
}

/// All that a pickle may name: what PyTorch's own writer names for plain tensors (`Tensor.__reduce_ex__`,
/// `Parameter.__reduce_ex__` and `torch.serialization`, torch 0.4 to 2.15), and what PyTorch Lightning's checkpoints of Stable Diffusion
/// name beside them.
#[derive(Clone, Copy, PartialEq)]
enum Global {
    OrderedDict,
    Size,
    Device,
    Dtype(Dtype),
    Storage(Option<Dtype>),
    /// The numbers of arguments that it is called with.
    RebuildTensor {
        least: usize,
        most: usize,
    },
    RebuildTensorOfDtype,
    RebuildParameter,
    /// What a checkpoint of PyTorch Lightning says of its training beside the tensors: known by name, and passed over.
    Training,
}

impl Global {
    fn find(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch", "Size") => Self::Size,
            ("torch", "device") => Self::Device,
            ("torch.storage", "UntypedStorage") => Self::Storage(None),
            ("torch", storage) if storage.ends_with("Storage") => {
                Self::Storage(Some(match storage {
                    "FloatStorage" => Dtype::F32,
                    "HalfStorage" => Dtype::F16,
                    "BFloat16Storage" => Dtype::BF16,
                    "DoubleStorage" => Dtype::F64,
                    "LongStorage" => Dtype::I64,
                    "IntStorage" => Dtype::I32,
                    "ShortStorage" => Dtype::I16,
                    "CharStorage" => Dtype::I8,
                    "ByteStorage" => Dtype::U8,
                    "BoolStorage" => Dtype::BOOL,
                    "ComplexFloatStorage" => Dtype::C64,
                    _ => return None,
                }))
            }
            ("torch", dtype) => Self::Dtype(match dtype {
                "float32" => Dtype::F32,
                "float16" => Dtype::F16,
                "bfloat16" => Dtype::BF16,
                "float64" => Dtype::F64,
                "int64" => Dtype::I64,
                "int32" => Dtype::I32,
                "int16" => Dtype::I16,
                "int8" => Dtype::I8,
                "uint8" => Dtype::U8,
                "uint16" => Dtype::U16,
                "uint32" => Dtype::U32,
                "uint64" => Dtype::U64,
                "bool" => Dtype::BOOL,
                "float8_e4m3fn" => Dtype::F8_E4M3,
                "float8_e5m2" => Dtype::F8_E5M2,
                _ => return None,
            }),
            ("torch._utils", "_rebuild_tensor") => Self::RebuildTensor { least: 4, most: 4 },
            // The last one is the metadata of subclasses.
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor { least: 6, most: 7 },
            ("torch._utils", "_rebuild_tensor_v3") => Self::RebuildTensorOfDtype,
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => {
                Self::RebuildParameter
            }
            ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
            | ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar")
            | ("numpy", "dtype")
            | ("_codecs", "encode") => Self::Training,
            _ => return None,
        })
    }
}

impl<'a> Objects<'a> {
    /// Reads the pickle at the beginning of `bytes`: what it stands for, and how long it is.
    ///
    /// # Errors
    /// It is cut short or damaged, names what is not of plain tensors (the message says what), or is beyond the bounds.
    pub fn read(&mut self, bytes: &'a [u8]) -> Result<(Id, usize)> {
        let bytes = &bytes[..bytes.len().min(MOST_BYTES)];
        let mut machine = Machine {
            bytes,
            next: 0,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            objects: self,
        };
        let root = machine.run()?;
        let next = machine.next;
        Ok((root, next))
    }

    fn push(&mut self, object: Object<'a>) -> Result<Id> {
        ensure!(
            self.all.len() < MOST_OBJECTS,
            "its pickle makes more than {MOST_OBJECTS} objects, which no checkpoint needs"
        );
        self.all.push(object);
        Ok(self.all.len() - 1)
    }

    /// The value of a key of a dict; None where it is no dict, or has none.
    pub fn value(&self, dict: Id, key: &str) -> Option<Id> {
        let entries = self.entries(dict)?.iter().rev();
        let mut found = entries.filter(|(name, _)| self.text(*name) == Some(key));
        found.next().map(|(_, value)| *value)
    }

    /// Keys and values of a dict; None where it is none.
    pub fn entries(&self, id: Id) -> Option<&[(Id, Id)]> {
        match &self.all[id] {
            Object::Dict(entries) => Some(entries),
            _ => None,
        }
    }

    pub fn text(&self, id: Id) -> Option<&'a str> {
        match &self.all[id] {
            Object::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A number of more than eight bytes, the lowest first.
    pub fn long(&self, id: Id) -> Option<&'a [u8]> {
        match &self.all[id] {
            Object::Long(bytes) => Some(bytes),
            _ => None,
        }
    }

    pub fn int(&self, id: Id) -> Option<i64> {
        match &self.all[id] {
            Object::Int(value) => Some(*value),
            _ => None,
        }
    }

    /// Whether it is `True`.
    pub fn truth(&self, id: Id) -> bool {
        matches!(self.all[id], Object::Truth(true))
    }

    /// Every storage that the pickle refers to, by its key.
    pub fn storages(&self) -> HashMap<&'a str, Storage<'a>> {
        let storages = self.all.iter().filter_map(|object| match object {
            Object::Storage(storage) => Some((storage.key, *storage)),
            _ => None,
        });
        storages.collect()
    }

    /// Every tensor that the pickle puts together.
    #[cfg(test)]
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor<'a>> {
        self.all.iter().filter_map(|object| match object {
            Object::Tensor(tensor) => Some(tensor),
            _ => None,
        })
    }

    pub fn list(&self, id: Id) -> Option<&[Id]> {
        match &self.all[id] {
            Object::Tuple(items) | Object::List(items) => Some(items),
            _ => None,
        }
    }

    pub fn tensor(&self, id: Id) -> Option<&Tensor<'a>> {
        match &self.all[id] {
            Object::Tensor(tensor) => Some(tensor),
            _ => None,
        }
    }

    fn storage(&self, id: Id) -> Option<Storage<'a>> {
        match &self.all[id] {
            Object::Storage(storage) => Some(*storage),
            _ => None,
        }
    }

    /// A tuple of whole numbers of 0 or more.
    fn sizes(&self, id: Id) -> Option<Vec<usize>> {
        let items = self.list(id)?;
        let size = |id: &Id| usize::try_from(self.int(*id)?).ok();
        (items.len() <= MOST_DIMENSIONS)
            .then(|| items.iter().map(size).collect())
            .flatten()
    }
}

/// The state that the instructions of a pickle work on.
struct Machine<'a, 'o> {
    bytes: &'a [u8],
    next: usize,
    stack: Vec<Id>,
    /// Heights of the stack that later instructions go back to.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    objects: &'o mut Objects<'a>,
}

const CUT_SHORT: &str = "its pickle is damaged or was cut short";

impl<'a> Machine<'a, '_> {
    /// Runs to the end, and gives what is left on the stack.
    fn run(&mut self) -> Result<Id> {
        loop {
            let at = self.next;
            let code = self.take(1)?[0];
            if code == b'.' {
                return self.pop();
            }
            self.step(code)
                .with_context(|| format!("at byte {at} of its pickle"))?;
        }
    }

    fn step(&mut self, code: u8) -> Result<()> {
        let other = Object::Other;
        let made = match code {
            // PROTO and FRAME say how the rest is written, which shows.
            0x80 => return self.take(1).map(|_| ()),
            0x95 => return self.take(8).map(|_| ()),
            b'(' => {
                self.marks.push(self.stack.len());
                return Ok(());
            }
            b'N' => other,
            0x88 | 0x89 => Object::Truth(code == 0x88),
            b'G' => self.take(8).map(|_| other)?,
            b'K' => Object::Int(self.number(1)?),
            b'M' => Object::Int(self.number(2)?),
            b'J' => {
                let value = self.number(4)? as u32;
                Object::Int(i64::from(value.cast_signed()))
            }
            0x8a => self.long()?,
            b'X' => self.text(4)?,
            0x8c => self.text(1)?,
            0x8d => self.text(8)?,
            // Texts of Python 2, and bytes.
            b'U' => text_or_bytes(self.prefixed(1)?),
            b'T' => text_or_bytes(self.prefixed(4)?),
            b'C' => self.prefixed(1).map(|_| other)?,
            b'B' => self.prefixed(4).map(|_| other)?,
            b')' => Object::Tuple(Vec::new()),
            b']' => Object::List(Vec::new()),
            b'}' => Object::Dict(Vec::new()),
            0x85..=0x87 => Object::Tuple(self.pop_many(usize::from(code - 0x84))?),
            b't' => Object::Tuple(self.pop_to_mark()?),
            b'l' => Object::List(self.pop_to_mark()?),
            b'd' => Object::Dict(pairs(&self.pop_to_mark()?)?),
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                global(module, name)?
            }
            0x93 => {
                let [module, name] = [1, 0].map(|back| {
                    let place = self.stack.len().checked_sub(1 + back);
                    place.and_then(|place| self.objects.text(self.stack[place]))
                });
                let (module, name) = module.zip(name).context("a name that is no text")?;
                self.pop_many(2)?;
                global(module, name)?
            }
            b'i' => {
                let (module, name) = (self.line()?, self.line()?);
                return Err(refused(module, name));
            }
            b'Q' => {
                let id = self.pop()?;
                Object::Storage(self.persistent(id)?)
            }
            b'R' | 0x81 => {
                let arguments = self.pop()?;
                let callee = self.pop()?;
                self.call(callee, arguments)?
            }
            b'q' | b'r' => {
                let number = self.number(if code == b'q' { 1 } else { 4 })?;
                return self.remember(number as u32);
            }
            0x94 => return self.remember(self.memo.len() as u32),
            b'h' | b'j' => {
                let number = self.number(if code == b'h' { 1 } else { 4 })? as u32;
                let id = self
                    .memo
                    .get(&number)
                    .context("nothing is remembered there")?;
                self.stack.push(*id);
                return Ok(());
            }
            b'a' => {
                let item = self.pop()?;
                return self.append(&[item]);
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                return self.append(&items);
            }
            b's' => {
                let pair = self.pop_many(2)?;
                return self.set(&pair);
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                return self.set(&items);
            }
            b'b' => {
                // The attributes of an OrderedDict, such as a state_dict's `_metadata`, say nothing of tensors.
                self.pop()?;
                let object = self.last()?;
                let ignored = matches!(self.objects.all[object], Object::Ignored);
                ensure!(
                    ignored || self.objects.entries(object).is_some(),
                    "it sets the state of what is no OrderedDict, which no plain tensor needs"
                );
                return Ok(());
            }
            code => bail!("the instruction {code:#04x}, which no checkpoint of plain tensors has"),
        };
        let id = self.objects.push(made)?;
        self.stack.push(id);
        Ok(())
    }

    // ---- what instructions read ----

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let end = self.next.checked_add(count);
        let taken = end.and_then(|end| self.bytes.get(self.next..end));
        let taken = taken.with_context(|| {
            if self.bytes.len() == MOST_BYTES {
                format!("its pickle has more than {MOST_BYTES} bytes, which no checkpoint needs")
            } else {
                CUT_SHORT.into()
            }
        })?;
        self.next += count;
        Ok(taken)
    }

    /// A number of `width` bytes up to 8, without a sign, the lowest byte first.
    fn number(&mut self, width: usize) -> Result<i64> {
        let mut all = [0; 8];
        all[..width].copy_from_slice(self.take(width)?);
        i64::try_from(u64::from_le_bytes(all)).context("a number that is too large")
    }

    /// A number with a sign, of as many bytes as the first says.
    fn long(&mut self) -> Result<Object<'a>> {
        let bytes = self.prefixed(1)?;
        let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
        let mut all = [if negative { 0xff } else { 0 }; 8];
        Ok(match all.get_mut(..bytes.len()) {
            Some(low) => {
                low.copy_from_slice(bytes);
                Object::Int(i64::from_le_bytes(all))
            }
            None => Object::Long(bytes),
        })
    }

    /// Bytes behind their number, itself of `width` bytes.
    fn prefixed(&mut self, width: usize) -> Result<&'a [u8]> {
        let count = self.number(width)?;
        self.take(usize::try_from(count).context(CUT_SHORT)?)
    }

    fn text(&mut self, width: usize) -> Result<Object<'a>> {
        let text =
            std::str::from_utf8(self.prefixed(width)?).context("a text that is not UTF-8")?;
        Ok(Object::Text(text))
    }

    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.bytes[self.next..];
        let length = rest
            .iter()
            .position(|byte| *byte == b'\n')
            .context(CUT_SHORT)?;
        self.next += length + 1;
        let line = std::str::from_utf8(&rest[..length]).context("a name that is not UTF-8")?;
        Ok(line.trim_end_matches('\r'))
    }

    // ---- the stack ----

    fn bottom(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn last(&self) -> Result<Id> {
        let own = &self.stack[self.bottom()..];
        own.last().copied().context(CUT_SHORT)
    }

    fn pop(&mut self) -> Result<Id> {
        let last = self.last()?;
        self.stack.pop();
        Ok(last)
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<Id>> {
        let start = self.stack.len().checked_sub(count);
        let start = start.filter(|start| *start >= self.bottom());
        Ok(self.stack.split_off(start.context(CUT_SHORT)?))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.marks.pop().context(CUT_SHORT)?;
        Ok(self.stack.split_off(mark))
    }

    fn remember(&mut self, number: u32) -> Result<()> {
        let last = self.last()?;
        self.memo.insert(number, last);
        Ok(())
    }

    // ---- what instructions do ----

    fn append(&mut self, items: &[Id]) -> Result<()> {
        let list = self.last()?;
        match &mut self.objects.all[list] {
            Object::List(list) => list.extend_from_slice(items),
            _ => bail!("it appends to what is no list"),
        }
        Ok(())
    }

    fn set(&mut self, items: &[Id]) -> Result<()> {
        let items = pairs(items)?;
        let dict = self.last()?;
        match &mut self.objects.all[dict] {
            Object::Dict(dict) => dict.extend(items),
            _ => bail!("it sets keys of what is no dict"),
        }
        Ok(())
    }

    /// The storage that `('storage', type, key, location, count)` names; legacy files add a view, which since torch 0.4 is None.
    fn persistent(&self, id: Id) -> Result<Storage<'a>> {
        let objects = &self.objects;
        let found = || {
            let fields = objects.list(id)?;
            let [kind, dtype, key, _location, count, view @ ..] = fields else {
                return None;
            };
            let Object::Global(Global::Storage(dtype)) = objects.all[*dtype] else {
                return None;
            };
            let no_view = view
                .iter()
                .all(|id| matches!(objects.all[*id], Object::Other));
            (objects.text(*kind)? == "storage" && no_view).then_some(Storage {
                dtype,
                key: objects.text(*key)?,
                count: u64::try_from(objects.int(*count)?).ok()?,
            })
        };
        found().context("what it refers to is no storage of PyTorch's")
    }

    /// What a call of something on the list stands for.
    fn call(&self, callee: Id, arguments: Id) -> Result<Object<'a>> {
        let objects = &self.objects;
        let Object::Global(global) = objects.all[callee] else {
            bail!("it calls what is no name");
        };
        let arguments = objects
            .list(arguments)
            .context("arguments that are no tuple")?;
        let made = match (global, arguments) {
            (Global::OrderedDict, []) => Some(Object::Dict(Vec::new())),
            (Global::Size, [sizes]) => {
                let sizes = objects.list(*sizes);
                let few = sizes.filter(|sizes| sizes.len() <= MOST_DIMENSIONS);
                few.map(|sizes| Object::Tuple(sizes.to_vec()))
            }
            (Global::Device, _) => Some(Object::Other),
            (Global::Training, _) => Some(Object::Ignored),
            (Global::RebuildTensor { least, most }, all) if (least..=most).contains(&all.len()) => {
                let dtype = objects.storage(all[0]).and_then(|storage| storage.dtype);
                self.tensor(all, dtype)
            }
            (Global::RebuildTensorOfDtype, all) if (7..=8).contains(&all.len()) => {
                let dtype = match objects.all[all[6]] {
                    Object::Global(Global::Dtype(dtype)) => Some(dtype),
                    _ => None,
                };
                self.tensor(all, dtype)
            }
            (Global::RebuildParameter, [tensor, ..]) => {
                objects.tensor(*tensor).cloned().map(Object::Tensor)
            }
            _ => None,
        };
        made.context(
            "a tensor, a dict or a size that is put together in another way than PyTorch's",
        )
    }

    /// Of (storage, offset, shape, strides, ...).
    fn tensor(&self, arguments: &[Id], dtype: Option<Dtype>) -> Option<Object<'a>> {
        let objects = &self.objects;
        let [storage, offset, shape, strides, ..] = arguments else {
            return None;
        };
        let (shape, strides) = (objects.sizes(*shape)?, objects.sizes(*strides)?);
        (shape.len() == strides.len()).then_some(Object::Tensor(Tensor {
            dtype: dtype?,
            storage: objects.storage(*storage)?,
            offset: u64::try_from(objects.int(*offset)?).ok()?,
            shape,
            strides,
        }))
    }
}

/// A text of Python 2, in which bytes are texts.
fn text_or_bytes(bytes: &[u8]) -> Object<'_> {
    std::str::from_utf8(bytes).map_or(Object::Other, Object::Text)
}

fn pairs(items: &[Id]) -> Result<Vec<(Id, Id)>> {
    let (pairs, rest) = items.as_chunks::<2>();
    ensure!(rest.is_empty(), "a key without a value");
    Ok(pairs.iter().map(|[key, value]| (*key, *value)).collect())
}

fn global<'a>(module: &str, name: &str) -> Result<Object<'a>> {
    let global = Global::find(module, name).ok_or_else(|| refused(module, name))?;
    Ok(Object::Global(global))
}

fn refused(module: &str, name: &str) -> anyhow::Error {
    let named = shortened(&format!("{module} {name}"));
    anyhow!(
        "it names `{named}`, which plain tensors are not made of; nothing in the file was run. Take the checkpoint from where it was \
         published, or save its weights alone with torch.save"
    )
}

/// How many bytes into a file a tensor's values lie, from the first to behind the last, for a storage at `place` of it.
///
/// # Errors
/// It reaches beyond its storage, or has more values than that.
pub fn extent(tensor: &Tensor, place: &Range<usize>) -> Result<Range<usize>> {
    let width = (tensor.dtype.bitsize() / 8) as u64;
    let available = place.len() as u64 / width;
    let beyond = || {
        anyhow!(
            "a tensor of shape {:?}, strides {:?} and offset {} reaches beyond its storage of {available} values",
            tensor.shape,
            tensor.strides,
            tensor.offset
        )
    };
    let product = |product: u64, size: &usize| product.checked_mul(*size as u64);
    let count = tensor
        .shape
        .iter()
        .try_fold(1, product)
        .ok_or_else(beyond)?;
    if count == 0 {
        return Ok(place.start..place.start);
    }
    // One whose dimensions lie on each other would take more memory than the file.
    ensure!(count <= available, beyond());
    let along = |sum: u64, (size, stride): (&usize, &usize)| {
        sum.checked_add((*size as u64 - 1).checked_mul(*stride as u64)?)
    };
    let mut dimensions = tensor.shape.iter().zip(&tensor.strides);
    let last = dimensions
        .try_fold(tensor.offset, along)
        .ok_or_else(beyond)?;
    ensure!(last < available, beyond());
    // Both are within the file now.
    let byte = |number: u64| place.start + (number * width) as usize;
    Ok(byte(tensor.offset)..byte(last + 1))
}
