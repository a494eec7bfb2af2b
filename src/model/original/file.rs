//! The files that `torch.save` writes: a zip of a pickle and of its storages, or, before torch 1.6 and on demand, pickles with the
//! storages behind them.

use std::collections::HashMap;
use std::io::Cursor;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use zip::{CompressionMethod, ZipArchive};

use super::pickle::{Id, Objects, Storage};

/// The numbers that legacy files begin with (`torch.serialization`): one of ten bytes, the lowest first, and their version.
const LEGACY_MAGIC: &[u8] = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
const LEGACY_VERSION: i64 = 1001;

/// A file's objects, and where its storages lie in it.
pub struct Saved<'a> {
    pub objects: Objects<'a>,
    pub root: Id,
    storages: HashMap<&'a str, Range<usize>>,
    zipped: HashMap<String, Range<usize>>,
}

impl<'a> Saved<'a> {
    /// Reads all of a file but the storages.
    ///
    /// # Errors
    /// It is not one of PyTorch's, is damaged, or holds other things than plain tensors.
    pub fn read(bytes: &'a [u8]) -> Result<Self> {
        match bytes {
            [b'P', b'K', ..] => Self::from_zip(bytes),
            // PyTorch's are of protocol 2 or above, the first; what an older one would run is named.
            [0x80, 2..=5, ..] | [b'c' | b'(' | b'}' | b']', ..] => Self::from_legacy(bytes),
            _ => bail!(
                "it is no file of PyTorch's: neither a zip nor a pickle; expected what torch.save wrote"
            ),
        }
    }

    /// Where the bytes of a storage lie in the file.
    ///
    /// # Errors
    /// There are none, or fewer than it is said to have.
    pub fn place(&self, storage: &Storage) -> Result<Range<usize>> {
        let key = storage.key;
        let place = self.storages.get(key).or_else(|| self.zipped.get(key));
        let place = place.with_context(|| format!("its storage `{}` is missing", shown(key)))?;
        ensure!(
            bytes_of(storage).is_some_and(|bytes| bytes <= place.len() as u64),
            "its storage `{}` has {} bytes, where {} values are said to be: it is damaged or was cut short",
            shown(key),
            place.len(),
            storage.count
        );
        Ok(place.clone())
    }

    fn from_zip(bytes: &'a [u8]) -> Result<Self> {
        let mut entries = entries(bytes)?;
        ensure!(
            !entries.keys().any(|name| name.ends_with("/constants.pkl")),
            "it is a program (TorchScript), not a checkpoint: save its state_dict with torch.save"
        );
        let mut pickles = entries.keys().filter(|name| name.ends_with("/data.pkl"));
        let prefix = match (pickles.next(), pickles.next()) {
            (Some(only), None) => only.trim_end_matches("data.pkl").to_owned(),
            (None, _) => bail!("it is a zip without a data.pkl; expected what torch.save wrote"),
            (Some(_), Some(_)) => {
                bail!("it has more than one data.pkl; expected what torch.save wrote")
            }
        };
        if let Some(order) = entries.get(&format!("{prefix}byteorder")) {
            little_endian(&bytes[order.clone()] == b"little")?;
        }
        // Neither its checksum nor those of storages are looked at: PyTorch can be told to leave them out.
        let pickle = &bytes[entries[&format!("{prefix}data.pkl")].clone()];
        let mut objects = Objects::default();
        let (root, length) = objects.read(pickle)?;
        nothing_behind(&pickle[length..])?;
        let folder = format!("{prefix}data/");
        entries.retain(|name, _| name.starts_with(&folder));
        let zipped = entries.into_iter();
        Ok(Self {
            objects,
            root,
            storages: HashMap::new(),
            zipped: zipped
                .map(|(name, place)| (name[folder.len()..].to_owned(), place))
                .collect(),
        })
    }

    /// Pickles of a magic number, a version, what wrote it, the objects and the storages' keys; then each storage behind the number of
    /// its values.
    fn from_legacy(bytes: &'a [u8]) -> Result<Self> {
        let mut next = 0;
        let mut read = |objects: &mut Objects<'a>| -> Result<Id> {
            let (root, length) = objects.read(&bytes[next..])?;
            next += length;
            Ok(root)
        };
        let mut head = Objects::default();
        let magic = read(&mut head)?;
        ensure!(
            head.long(magic) == Some(LEGACY_MAGIC),
            "it is a pickle, but not PyTorch's; expected what torch.save wrote"
        );
        let version = read(&mut head)?;
        ensure!(
            head.int(version) == Some(LEGACY_VERSION),
            "it is of a version of PyTorch's format that is not known (expected {LEGACY_VERSION})"
        );
        let system = read(&mut head)?;
        let order = head.value(system, "little_endian");
        little_endian(order.is_some_and(|order| head.truth(order)))?;
        let mut objects = Objects::default();
        let root = read(&mut objects)?;
        let keys = read(&mut head)?;
        let keys = head.list(keys).context("its list of storages is damaged")?;
        let counts = objects.storages();
        let mut storages = HashMap::new();
        for key in keys {
            let key = head.text(*key).context("its list of storages is damaged")?;
            let storage = counts
                .get(key)
                .with_context(|| format!("its storage `{}` is not of any tensor", shown(key)))?;
            let place = legacy_place(bytes, next, storage)
                .context("its storages are damaged or were cut short")?;
            next = place.end;
            storages.insert(key, place);
        }
        nothing_behind(&bytes[next..])?;
        Ok(Self {
            objects,
            root,
            storages,
            zipped: HashMap::new(),
        })
    }
}

/// The values of a storage behind their number, which stands at `at`.
fn legacy_place(bytes: &[u8], at: usize, storage: &Storage) -> Option<Range<usize>> {
    let start = at.checked_add(8)?;
    let count = bytes.get(at..start)?;
    (count == storage.count.to_le_bytes()).then_some(())?;
    let end = start.checked_add(usize::try_from(bytes_of(storage)?).ok()?)?;
    (end <= bytes.len()).then_some(start..end)
}

/// How many bytes a storage takes; None where no machine has as many.
fn bytes_of(storage: &Storage) -> Option<u64> {
    let width = storage.dtype.map_or(1, |dtype| dtype.bitsize() / 8);
    storage.count.checked_mul(width as u64)
}

/// Where the entries of a zip lie, by their names.
fn entries(bytes: &[u8]) -> Result<HashMap<String, Range<usize>>> {
    const DAMAGED: &str = "its zip directory is damaged, or it was cut short: fetch it again";
    let mut zip = ZipArchive::new(Cursor::new(bytes)).context(DAMAGED)?;
    let mut found = HashMap::new();
    for number in 0..zip.len() {
        let entry = zip.by_index_raw(number).context(DAMAGED)?;
        let name = entry.name().context(DAMAGED)?.into_owned();
        ensure!(
            entry.compression() == CompressionMethod::Stored
                && !entry.encrypted()
                && entry.size() == entry.compressed_size(),
            "its entry `{}` is packed or encrypted, which torch.save does not do: save it again",
            shown(&name)
        );
        let start = entry.data_start().context(DAMAGED)?;
        let end = start.checked_add(entry.size()).context(DAMAGED)?;
        ensure!(end <= bytes.len() as u64, DAMAGED);
        found.insert(name, start as usize..end as usize);
    }
    Ok(found)
}

fn little_endian(is: bool) -> Result<()> {
    ensure!(
        is,
        "its numbers have their highest byte first (a big-endian machine wrote them): load and save it with PyTorch on another machine"
    );
    Ok(())
}

/// What stands behind the end, which PyTorch would not read either: named where it would run something.
fn nothing_behind(rest: &[u8]) -> Result<()> {
    if rest.is_empty() {
        return Ok(());
    }
    let mut objects = Objects::default();
    objects.read(rest).context("behind its end")?;
    bail!("something stands behind its end, where torch.save writes nothing")
}

fn shown(name: &str) -> String {
    super::super::config::shortened(name)
}
