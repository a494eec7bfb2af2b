//! EXIF out of a TIFF file's own directories, and into those of one that is written.

use std::collections::HashSet;

use crate::metadata::exif::{ByteOrder, EXIF_IFD, Entry, Exif, GPS_IFD, MAKE, MODEL, unit};

/// Points to a directory that few write and none read; not carried into another file's structure.
const INTEROP_IFD: u16 = 0xA005;

/// Descriptive tags that a TIFF's main directory shares with EXIF's: what, who, when, with what, resolution.
const DESCRIPTIVE: [u16; 10] = [
    0x010E, MAKE, MODEL, 0x011A, 0x011B, 0x0128, 0x0131, 0x0132, 0x013B, 0x8298,
];

impl Exif {
    /// What a TIFF file's directories say about the picture (not about its storage), as an EXIF block.
    pub fn from_tiff(file: &[u8]) -> Option<Self> {
        let tiff = Self::parse(file)?;
        let main = tiff.entries(None);
        let parts = [EXIF_IFD, GPS_IFD].map(|pointer| (pointer, tiff.entries(Some(pointer))));
        let any = !main.is_empty() || parts.iter().any(|(_, entries)| !entries.is_empty());
        any.then(|| Self::of(tiff.order, main, parts))
    }

    /// The fields that a TIFF file written on this machine can take over, their values in its byte order.
    /// `directory` is [`EXIF_IFD`], [`GPS_IFD`], or `None` for the descriptive ones of the main directory.
    pub fn for_tiff(&self, directory: Option<u16>) -> Vec<Entry> {
        let mut entries = self.entries(directory);
        if self.order != ByteOrder::NATIVE {
            for (_, kind, value) in &mut entries {
                value
                    .chunks_exact_mut(number(*kind))
                    .for_each(<[u8]>::reverse);
            }
        }
        entries
    }

    /// The fields of a directory that another file can take over. Of a tag that stands twice the first, as readers
    /// take it. All values together are no longer than the block: fields that share one could be made of any size.
    fn entries(&self, directory: Option<u16>) -> Vec<Entry> {
        let at = directory.map_or(self.main(), |tag| self.directory(tag));
        let fields = at.and_then(|at| self.fields(at)).unwrap_or_default();
        let mut seen = HashSet::new();
        let mut room = self.size();
        let mut entries = Vec::new();
        for field in fields {
            let kept = match directory {
                None => DESCRIPTIVE.contains(&field.tag),
                Some(_) => field.tag != INTEROP_IFD,
            };
            let value = self.value(field).filter(|_| kept && seen.insert(field.tag));
            let Some(value) = value else { continue };
            let Some(left) = room.checked_sub(value.len()) else {
                break;
            };
            room = left;
            entries.push((field.tag, field.kind, value.to_vec()));
        }
        entries
    }
}

/// Bytes of the numbers in it: a rational is two.
fn number(kind: u16) -> usize {
    match kind {
        5 | 10 => 4,
        other => unit(other).unwrap_or(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::exif::USER_COMMENT;

    /// A little-endian block of a main directory of `count` fields that share one value, and that value.
    fn sharing(tag: impl Fn(u16) -> u16, count: u16, value: &[u8]) -> Vec<u8> {
        let mut block = b"II*\0\x08\0\0\0".to_vec();
        block.extend(count.to_le_bytes());
        let at = 8 + 2 + 12 * u32::from(count) + 4;
        for i in 0..count {
            block.extend(tag(i).to_le_bytes());
            block.extend(7u16.to_le_bytes());
            block.extend((value.len() as u32).to_le_bytes());
            block.extend(at.to_le_bytes());
        }
        block.extend([0; 4]);
        block.extend(value);
        block
    }

    #[test]
    fn fields_that_share_a_value_make_no_more_than_the_block_has() {
        let shared = sharing(|i| DESCRIPTIVE[usize::from(i) % 10], 5000, &[1; 60_000]);
        let block = Exif::parse(&shared).unwrap();
        let bytes: usize = block
            .for_tiff(None)
            .iter()
            .map(|(.., value)| value.len())
            .sum();
        assert!(bytes <= shared.len());
        let exif = Exif::from_tiff(&shared).unwrap();
        assert!(exif.size() <= 2 * shared.len());
    }

    #[test]
    fn many_fields_of_a_tiff_are_written_in_their_own_size() {
        let mut file = sharing(|_| EXIF_IFD, 1, b"");
        let at = file.len() as u32;
        file[18..22].copy_from_slice(&at.to_le_bytes());
        file.extend(6000u16.to_le_bytes());
        for i in 0..6000u16 {
            file.extend([&i.to_le_bytes()[..], &[1, 0, 1, 0, 0, 0, 5, 0, 0, 0]].concat());
        }
        let exif = Exif::from_tiff(&file).unwrap();
        assert!(
            exif.size() <= file.len() + 64,
            "{} of {}",
            exif.size(),
            file.len()
        );
        assert_eq!(exif.for_tiff(Some(EXIF_IFD)).len(), 6000);
    }

    #[test]
    fn of_a_tag_that_stands_twice_the_first_is_kept() {
        let entry = |value: u8| (USER_COMMENT, 7, vec![value; 9]);
        let exif = Exif::of(
            ByteOrder::Big,
            vec![],
            [(EXIF_IFD, vec![entry(1), entry(2)]), (GPS_IFD, vec![])],
        );
        assert_eq!(exif.for_tiff(Some(EXIF_IFD)), [entry(1)]);
    }
}
