//! NumPy's `.npz` (a zip of `.npy` arrays) as far as cached latents need it: kohya's sd-scripts keep one
//! `latents` or `latents_HxW` of [4, h, w] among sizes and crops.

use std::io::{Cursor, Read};

use anyhow::{Context, Result, bail, ensure};
use half::f16;
use zip::ZipArchive;

use super::{LatentKind, Latents, check_size, shortened};
use crate::limits::ReadLimits;

impl Latents {
    /// Reads the latents of an `.npz`: `latents`, else the largest `latents_HxW`, else the only array.
    ///
    /// # Errors
    /// It is damaged, holds no latents, or is beyond `limits`.
    pub fn from_npz(bytes: &[u8], limits: &ReadLimits) -> Result<Self> {
        let mut zip = ZipArchive::new(Cursor::new(bytes))
            .context("its zip directory cannot be read: it was cut short, or is no .npz")?;
        let entries = zip.file_names().map(|n| Ok(n?.into_owned()));
        let entries: Vec<String> = entries
            .collect::<Result<_>>()
            .context("its zip directory is damaged")?;
        if entries.iter().any(|n| n.ends_with("data.pkl")) {
            bail!(PICKLED);
        }
        let mut arrays: Vec<&str> = entries
            .iter()
            .filter_map(|n| n.strip_suffix(".npy"))
            .collect();
        arrays.sort_unstable();
        let sized = arrays.iter().filter_map(|n| Some((area_of(n)?, *n)));
        let (name, kind) = if arrays.contains(&"latents") {
            ("latents", LatentKind::SdScripts)
        } else if let Some((_, name)) = sized.max() {
            (name, LatentKind::SdScripts)
        } else if let [only] = arrays[..] {
            (only, LatentKind::Unstated)
        } else {
            bail!(
                "its arrays ({}) hold no latents; expected `latents` or `latents_HxW`",
                named(&arrays)
            )
        };
        let others = arrays
            .iter()
            .filter(|n| area_of(n).is_some() && **n != name)
            .count();

        let mut entry = zip
            .by_name(&format!("{name}.npy"))
            .with_context(|| format!("its array `{name}` cannot be unpacked"))?;
        let array = Npy::read(&mut entry, name, limits)
            .with_context(|| format!("its array `{name}` is damaged"))?;
        let mut latents =
            Latents::from_array(name, &array.shape, kind, limits, || array.values(name))?;
        if others > 0 {
            let warning = format!(
                "it holds latents of {} sizes; the largest, `{name}`, is used",
                others + 1
            );
            latents.warnings.push(warning);
        }
        Ok(latents)
    }
}

/// h x w of `latents_HxW`.
fn area_of(name: &str) -> Option<u64> {
    let (h, w) = name.strip_prefix("latents_")?.split_once('x')?;
    h.parse::<u32>()
        .ok()
        .zip(w.parse::<u32>().ok())
        .map(|(h, w)| u64::from(h) * u64::from(w))
}

/// The first names of a list.
fn named(arrays: &[&str]) -> String {
    let first: Vec<String> = arrays.iter().take(3).map(|n| shortened(n)).collect();
    match arrays.len() {
        0 => "none".into(),
        1..=3 => first.join(", "),
        _ => format!("{}, ...", first.join(", ")),
    }
}

/// Checks what the first bytes of a zip tell, its first entry's name: PyTorch's checkpoints are zips too, of gigabytes.
///
/// # Errors
/// It is one.
pub(crate) fn check_head(head: &[u8]) -> Result<()> {
    // Of a local file header: the name's length at 26, the name at 30.
    let length = head
        .get(26..28)
        .map_or(0, |b| usize::from(b[0]) | usize::from(b[1]) << 8);
    let name = head.get(30..).and_then(|rest| rest.get(..length));
    ensure!(!name.is_some_and(|name| name.ends_with(b".pkl")), PICKLED);
    Ok(())
}

/// What is said of PyTorch's files.
const PICKLED: &str =
    "it is a PyTorch file, which is not supported; save the latents as safetensors";

/// The longest header read: an array's takes some hundred bytes.
const MAX_HEADER: usize = 1 << 16;

/// One array, as NumPy's format 1.0, 2.0 or 3.0 holds it.
struct Npy {
    header: Header,
    /// As many bytes as the header asks for.
    data: Vec<u8>,
}

/// What stands before an array's values.
struct Header {
    /// Such as `<f4`: byte order, kind, bytes of a value.
    descr: String,
    fortran: bool,
    shape: Vec<usize>,
    /// Where the values begin.
    end: usize,
}

impl std::ops::Deref for Npy {
    type Target = Header;

    fn deref(&self) -> &Header {
        &self.header
    }
}

impl Npy {
    /// Unpacks an array: its header, and then, where `limits` allow that, the values that it states.
    fn read(mut entry: impl Read, name: &str, limits: &ReadLimits) -> Result<Self> {
        let mut bytes = Vec::new();
        let unpack = |bytes: &mut Vec<u8>, entry: &mut dyn Read, most: u64| {
            let read = entry.take(most).read_to_end(bytes);
            read.context("it cannot be unpacked")
        };
        unpack(&mut bytes, &mut entry, MAX_HEADER as u64)?;
        let header = Header::parse(&bytes)?;
        check_size(name, &header.shape, limits)?;
        let length = header.length(name)?;
        limits.check_unpacked(length as u64)?;
        let mut data = bytes.split_off(header.end);
        // One more tells a longer array from a whole one.
        let missing = (length + 1).saturating_sub(data.len()) as u64;
        unpack(&mut data, &mut entry, missing)?;
        ensure!(
            data.len() == length,
            "array `{name}` of shape {:?} should have {length} bytes, but has {}",
            header.shape,
            if data.len() > length {
                "more".into()
            } else {
                data.len().to_string()
            }
        );
        Ok(Self { header, data })
    }

    /// The values in C order.
    fn values(&self, name: &str) -> Result<Vec<f32>> {
        let size = self.value_size(name)?;
        let swap = self.descr.starts_with('>');
        let value = |chunk: &[u8]| {
            let mut le = [0; 8];
            le[..size].copy_from_slice(chunk);
            if swap {
                le[..size].reverse();
            }
            match size {
                2 => f16::from_le_bytes([le[0], le[1]]).to_f32(),
                4 => f32::from_le_bytes([le[0], le[1], le[2], le[3]]),
                _ => f64::from_le_bytes(le) as f32,
            }
        };
        let values: Vec<f32> = self.data.chunks_exact(size).map(value).collect();
        Ok(if self.fortran {
            to_c_order(&values, &self.shape)
        } else {
            values
        })
    }
}

impl Header {
    fn parse(bytes: &[u8]) -> Result<Self> {
        ensure!(bytes.starts_with(b"\x93NUMPY"), "it has no .npy header");
        let length = |range: std::ops::Range<usize>| {
            let le = bytes.get(range).context("its header was cut short")?;
            Ok::<usize, anyhow::Error>(le.iter().rev().fold(0, |n, &b| n << 8 | usize::from(b)))
        };
        let start = match length(6..7)? {
            1 => 10,
            2 | 3 => 12,
            other => bail!("its .npy version {other} is not known"),
        };
        let end = start + length(8..start)?;
        ensure!(end <= MAX_HEADER, "its header of {end} bytes is too long");
        let header = bytes.get(start..end).context("its header was cut short")?;
        let header = std::str::from_utf8(header).context("its header is no text")?;
        // A Python dict: {'descr': '<f4', 'fortran_order': False, 'shape': (4, 64, 64), }
        let after = |key: &str| {
            let found = header
                .split_once(key)
                .and_then(|(_, rest)| rest.split_once(':'));
            found
                .map(|(_, value)| value.trim_start())
                .with_context(|| format!("its header lacks {key}"))
        };
        let descr = after("'descr'")?
            .strip_prefix('\'')
            .and_then(|d| d.split_once('\''));
        let (descr, _) = descr.context("it is no plain array")?;
        let shape = after("'shape'")?
            .strip_prefix('(')
            .and_then(|s| s.split_once(')'));
        let (shape, _) = shape.context("its header has no shape")?;
        let sides = shape.split(',').map(str::trim).filter(|s| !s.is_empty());
        Ok(Self {
            descr: descr.to_owned(),
            fortran: after("'fortran_order'")?.starts_with("True"),
            shape: sides
                .map(str::parse)
                .collect::<Result<_, _>>()
                .context("its shape is no list of numbers")?,
            end,
        })
    }

    /// Bytes of a value.
    fn value_size(&self, name: &str) -> Result<usize> {
        match (self.descr.get(..1), self.descr.get(1..)) {
            (Some("<" | ">"), Some("f2")) => Ok(2),
            (Some("<" | ">"), Some("f4")) => Ok(4),
            (Some("<" | ">"), Some("f8")) => Ok(8),
            _ => bail!(
                "array `{name}` holds `{}` values; expected f2, f4 or f8",
                shortened(&self.descr)
            ),
        }
    }

    /// Bytes of all values.
    fn length(&self, name: &str) -> Result<usize> {
        let size = self.value_size(name)?;
        let bytes = self
            .shape
            .iter()
            .try_fold(size, |n, &side| n.checked_mul(side));
        bytes.context("its shape overflows")
    }
}

/// Column-major to row-major.
fn to_c_order(values: &[f32], shape: &[usize]) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for mut index in 0..values.len() {
        // The C index's digits, last axis first, weighed with the Fortran strides.
        let mut stride = values.len();
        let mut at = 0;
        for &side in shape.iter().rev() {
            stride /= side;
            at += index % side * stride;
            index /= side;
        }
        out.push(values[at]);
    }
    out
}
