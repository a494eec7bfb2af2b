//! A TIFF file's first directory: its fields, read where they are asked for. Classic and BigTIFF, either byte order.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

/// What a file whose structure points outside of it most likely is.
pub(super) const BEYOND: &str =
    "its directory points beyond its end: the file was cut short or is damaged";

/// The first directory of a file.
pub(crate) struct Directory<'a> {
    bytes: &'a [u8],
    pub(super) big_endian: bool,
    fields: BTreeMap<u16, Field>,
    /// Offset of the next page's directory; 0 where there is none.
    next: u64,
}

/// Where a field's values lie, and of which type they are.
struct Field {
    kind: u16,
    count: usize,
    at: usize,
}

/// How a file counts: offsets of 4 bytes, or BigTIFF's of 8.
struct Sizes {
    count: usize,
    offset: usize,
}

impl<'a> Directory<'a> {
    /// Reads the first directory.
    pub fn first(bytes: &'a [u8]) -> Result<Self> {
        let big_endian = bytes.starts_with(b"MM");
        let number = |at: usize, length: usize| number(bytes, big_endian, at, length);
        let (sizes, at) = match number(2, 2) {
            Some(42) => (
                Sizes {
                    count: 2,
                    offset: 4,
                },
                number(4, 4),
            ),
            Some(43) => (
                Sizes {
                    count: 8,
                    offset: 8,
                },
                number(8, 8),
            ),
            _ => anyhow::bail!("its header is not that of a TIFF"),
        };
        let at = usize::try_from(at.context(BEYOND)?).context(BEYOND)?;
        let count = number(at, sizes.count).context(BEYOND)?;
        ensure!(count > 0, "its directory is empty");
        let entry = 4 + 2 * sizes.offset;
        let first = at + sizes.count;
        let end = usize::try_from(count)
            .ok()
            .and_then(|count| count.checked_mul(entry)?.checked_add(first))
            .filter(|&end| end <= bytes.len())
            .context(BEYOND)?;
        let mut fields = BTreeMap::new();
        for at in (first..end).step_by(entry) {
            let (Some(tag), Some(kind)) = (number(at, 2), number(at + 2, 2)) else {
                continue;
            };
            let value = at + 4 + sizes.offset;
            let (Some(count), Some(offset)) =
                (number(at + 4, sizes.offset), number(value, sizes.offset))
            else {
                continue;
            };
            let (kind, count) = (kind as u16, usize::try_from(count).unwrap_or(usize::MAX));
            let fits = size(kind)
                .and_then(|n| n.checked_mul(count))
                .is_some_and(|n| n <= sizes.offset);
            let at = if fits {
                value
            } else {
                usize::try_from(offset).unwrap_or(usize::MAX)
            };
            // Of a field that is there twice the first counts, as for libtiff.
            fields
                .entry(tag as u16)
                .or_insert(Field { kind, count, at });
        }
        let next = number(end, sizes.offset).unwrap_or(0);
        Ok(Self {
            bytes,
            big_endian,
            fields,
            next,
        })
    }

    /// Whether another page follows.
    pub fn has_next(&self) -> bool {
        self.next != 0
    }

    pub fn contains(&self, tag: u16) -> bool {
        self.fields.contains_key(&tag)
    }

    /// A field's bytes, as they lie in the file; `None` where it is not there or not whole.
    pub fn raw(&self, tag: u16) -> Option<&'a [u8]> {
        let field = self.fields.get(&tag)?;
        let length = size(field.kind)?.checked_mul(field.count)?;
        self.bytes.get(field.at..field.at.checked_add(length)?)
    }

    /// A field's whole numbers; `None` where it is not there.
    ///
    /// # Errors
    /// The field is there and holds something else, or lies beyond the end of the file.
    pub fn numbers(&self, tag: u16) -> Result<Option<Vec<u64>>> {
        let Some(field) = self.fields.get(&tag) else {
            return Ok(None);
        };
        let unit = match field.kind {
            BYTE | UNDEFINED => 1,
            SHORT => 2,
            LONG | IFD => 4,
            LONG8 | IFD8 => 8,
            _ => anyhow::bail!("its field {tag} is of the wrong type: the file is damaged"),
        };
        let raw = self.raw(tag).context(BEYOND)?;
        let values = raw
            .chunks_exact(unit)
            .map(|chunk| join(chunk, self.big_endian));
        Ok(Some(values.collect()))
    }

    /// The first of a field's whole numbers.
    pub fn number(&self, tag: u16) -> Result<Option<u64>> {
        Ok(self
            .numbers(tag)?
            .and_then(|values| values.first().copied()))
    }

    /// A field's rational numbers; `None` where it is not there or no such field.
    pub fn rationals(&self, tag: u16) -> Option<Vec<f64>> {
        if self.fields.get(&tag)?.kind != RATIONAL {
            return None;
        }
        let halves = self.raw(tag)?.as_chunks::<8>().0.iter();
        let ratio = |pair: &[u8; 8]| {
            join(&pair[..4], self.big_endian) as f64
                / (join(&pair[4..], self.big_endian) as f64).max(1.0)
        };
        Some(halves.map(ratio).collect())
    }
}

/// Field types (TIFF 6.0, BigTIFF).
const BYTE: u16 = 1;
const SHORT: u16 = 3;
const LONG: u16 = 4;
const RATIONAL: u16 = 5;
const UNDEFINED: u16 = 7;
const IFD: u16 = 13;
const LONG8: u16 = 16;
const IFD8: u16 = 18;

/// Bytes of one value of a type.
fn size(kind: u16) -> Option<usize> {
    Some(match kind {
        BYTE | 2 | 6 | UNDEFINED => 1,
        SHORT | 8 => 2,
        LONG | 9 | 11 | IFD => 4,
        RATIONAL | 10 | 12 | LONG8 | 17 | IFD8 => 8,
        _ => return None,
    })
}

fn number(bytes: &[u8], big_endian: bool, at: usize, length: usize) -> Option<u64> {
    Some(join(bytes.get(at..at.checked_add(length)?)?, big_endian))
}

/// At most 8 bytes as one number.
pub(super) fn join(bytes: &[u8], big_endian: bool) -> u64 {
    let push = |value: u64, byte: &u8| value << 8 | u64::from(*byte);
    if big_endian {
        bytes.iter().fold(0, push)
    } else {
        bytes.iter().rev().fold(0, push)
    }
}
