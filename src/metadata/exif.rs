//! An EXIF block, edited in place: values are patched or appended and nothing moves, so that maker notes, whose inner
//! offsets no one but the maker knows, stay readable. A TIFF file has the same structure and is read with this too.

use std::cmp::Ordering;
use std::ops::Range;

/// Tags of the main directory (TIFF 6.0, EXIF 2.32).
pub(crate) const IMAGE_WIDTH: u16 = 0x0100;
pub(crate) const IMAGE_HEIGHT: u16 = 0x0101;
pub(crate) const MAKE: u16 = 0x010F;
pub(crate) const MODEL: u16 = 0x0110;
pub(crate) const ORIENTATION: u16 = 0x0112;
/// A TIFF file's XMP packet and ICC profile.
pub(crate) const XMP: u16 = 0x02BC;
pub(crate) const ICC: u16 = 0x8773;
pub(crate) const EXIF_IFD: u16 = 0x8769;
pub(crate) const GPS_IFD: u16 = 0x8825;
/// Tags of the EXIF directory.
pub(crate) const USER_COMMENT: u16 = 0x9286;
pub(crate) const PIXEL_WIDTH: u16 = 0xA002;
pub(crate) const PIXEL_HEIGHT: u16 = 0xA003;

/// Bytes of the header: byte order, 42, and the main directory's offset.
const HEADER: usize = 8;

/// Field types.
pub(crate) const ASCII: u16 = 2;
const SHORT: u16 = 3;
const LONG: u16 = 4;
const UNDEFINED: u16 = 7;

/// One field of a directory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Field {
    pub tag: u16,
    pub kind: u16,
    count: u32,
    /// Where its 12 bytes lie.
    at: usize,
}

/// How a block stores numbers of several bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ByteOrder {
    Big,
    Little,
}

impl ByteOrder {
    /// This machine's.
    pub const NATIVE: Self = if cfg!(target_endian = "big") {
        Self::Big
    } else {
        Self::Little
    };
}

/// A field apart from a block: tag, type, and value.
pub(crate) type Entry = (u16, u16, Vec<u8>);

pub(crate) struct Exif {
    bytes: Vec<u8>,
    pub order: ByteOrder,
}

impl Exif {
    /// Takes a block from its TIFF header on; a leading `Exif\0\0` is dropped. `None` if it is no such block.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.strip_prefix(b"Exif\0\0").unwrap_or(bytes);
        let order = match bytes.get(..4)? {
            b"II*\0" => ByteOrder::Little,
            b"MM\0*" => ByteOrder::Big,
            _ => return None,
        };
        let exif = Self {
            bytes: bytes.to_vec(),
            order,
        };
        exif.fields(exif.main()?).map(|_| exif)
    }

    /// A block with an empty main directory.
    pub fn new(order: ByteOrder) -> Self {
        let mut exif = Self {
            bytes: vec![0; 14],
            order,
        };
        exif.bytes[..4].copy_from_slice(match order {
            ByteOrder::Big => b"MM\0*",
            ByteOrder::Little => b"II*\0",
        });
        exif.put(4, &8u32.to_be_bytes());
        exif
    }

    /// A block of these fields, written once; `parts` are directories of their own, which fields of the main one point to.
    /// The values are in `order`.
    pub fn of(order: ByteOrder, mut main: Vec<Entry>, parts: [(u16, Vec<Entry>); 2]) -> Self {
        let mut exif = Self::new(order);
        exif.bytes.truncate(HEADER);
        for (pointer, entries) in parts {
            if !entries.is_empty() {
                let at = exif.append_directory(entries) as u32;
                main.push((pointer, LONG, exif.ordered(at.to_be_bytes()).to_vec()));
            }
        }
        let at = exif.append_directory(main) as u32;
        exif.put(4, &at.to_be_bytes());
        exif
    }

    /// Adds a directory, its values behind it, and gives its offset.
    fn append_directory(&mut self, mut entries: Vec<Entry>) -> usize {
        entries.sort_by_key(|(tag, ..)| *tag);
        let link = 4;
        let at = self.append(&vec![0; 2 + 12 * entries.len() + link]);
        self.put(at, &(entries.len() as u16).to_be_bytes());
        for (i, (tag, kind, value)) in entries.iter().enumerate() {
            let field = at + 2 + 12 * i;
            self.put(field, &tag.to_be_bytes());
            self.write(field, *kind, value);
        }
        at
    }

    /// Its length in bytes.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Offset of the main directory, which lies behind the header.
    pub fn main(&self) -> Option<usize> {
        let at = self.u32(4)? as usize;
        (at >= HEADER).then_some(at)
    }

    /// Offset of the directory that a field of the main one points to. None where it lies on the header or on the main
    /// directory: what is written into one would change the other.
    pub fn directory(&self, tag: u16) -> Option<usize> {
        let field = self.field(self.main()?, tag)?;
        let at = self.u32(field.at + 8)? as usize;
        let (this, main) = (self.span(at)?, self.span(self.main()?)?);
        let apart = this.end <= main.start || main.end <= this.start;
        (at >= HEADER && apart).then_some(at)
    }

    /// The bytes of a directory's count and fields; `None` if it passes the end of the block.
    fn span(&self, directory: usize) -> Option<Range<usize>> {
        let count = usize::from(self.u16(directory)?);
        let end = directory + 2 + 12 * count;
        (end <= self.bytes.len()).then_some(directory..end)
    }

    /// A directory's fields; `None` if it passes the end of the block.
    pub fn fields(&self, directory: usize) -> Option<Vec<Field>> {
        let span = self.span(directory)?;
        let field = |at| {
            Some(Field {
                tag: self.u16(at)?,
                kind: self.u16(at + 2)?,
                count: self.u32(at + 4)?,
                at,
            })
        };
        (span.start + 2..span.end).step_by(12).map(field).collect()
    }

    pub fn field(&self, directory: usize, tag: u16) -> Option<Field> {
        self.fields(directory)?.into_iter().find(|f| f.tag == tag)
    }

    /// A field's bytes, in the block's byte order.
    pub fn value(&self, field: Field) -> Option<&[u8]> {
        self.bytes.get(self.place(field)?)
    }

    fn place(&self, field: Field) -> Option<Range<usize>> {
        let length = (field.count as usize).checked_mul(unit(field.kind)?)?;
        let at = if length <= 4 {
            field.at + 8
        } else {
            self.u32(field.at + 8)? as usize
        };
        Some(at..at.checked_add(length)?)
    }

    /// The text of `UserComment`, in whichever of its encodings; without the padding.
    pub fn user_comment(&self) -> Option<String> {
        let field = self.field(self.directory(EXIF_IFD)?, USER_COMMENT)?;
        let (code, text) = self.value(field)?.split_at_checked(8)?;
        let text = match code {
            b"UNICODE\0" => decode_utf16(text, self.order),
            _ => String::from_utf8_lossy(text).into_owned(),
        };
        let text = text.trim_matches(|c: char| c == '\0' || c.is_whitespace());
        (!text.is_empty()).then(|| text.to_owned())
    }

    /// Writes `UserComment` as UTF-16BE, as A1111 does and its readers expect whatever the block's byte order.
    pub fn set_user_comment(&mut self, text: &str) {
        let utf16 = text.encode_utf16().flat_map(u16::to_be_bytes);
        let value: Vec<u8> = b"UNICODE\0".iter().copied().chain(utf16).collect();
        self.set(Some(EXIF_IFD), USER_COMMENT, UNDEFINED, &value);
    }

    /// A text field of the main directory, without its final NUL.
    pub fn text(&self, tag: u16) -> Option<String> {
        let value = self.value(self.field(self.main()?, tag)?)?;
        Some(
            String::from_utf8_lossy(value)
                .trim_end_matches('\0')
                .to_owned(),
        )
    }

    pub fn set_text(&mut self, tag: u16, text: &str) {
        self.set(None, tag, ASCII, format!("{text}\0").as_bytes());
    }

    /// Makes the block fit upright pixels of a new size: orientation 1, the sizes that are stated, and no thumbnail,
    /// which would show the old picture.
    pub fn fit(&mut self, width: usize, height: usize) {
        for (directory, tag, value) in [
            (None, IMAGE_WIDTH, width),
            (None, IMAGE_HEIGHT, height),
            (Some(EXIF_IFD), PIXEL_WIDTH, width),
            (Some(EXIF_IFD), PIXEL_HEIGHT, height),
        ] {
            let at = directory.map_or(self.main(), |tag| self.directory(tag));
            if at.and_then(|at| self.field(at, tag)).is_some() {
                let value = self.ordered((value as u32).to_be_bytes());
                self.set(directory, tag, LONG, &value);
            }
        }
        if self
            .main()
            .and_then(|at| self.field(at, ORIENTATION))
            .is_some()
        {
            let one = self.ordered(1u16.to_be_bytes());
            self.set(None, ORIENTATION, SHORT, &one);
        }
        self.drop_thumbnail();
    }

    /// Ends the list of directories with the main one. A sloppy block has no link there, but the next directory.
    fn drop_thumbnail(&mut self) {
        let Some(main) = self.main().and_then(|at| self.span(at)) else {
            return;
        };
        let link = main.end..main.end + 4;
        let taken = [EXIF_IFD, GPS_IFD]
            .into_iter()
            .filter_map(|tag| self.span(self.directory(tag)?))
            .any(|span| span.start < link.end && link.start < span.end);
        if !taken {
            self.put(link.start, &[0; 4]);
        }
    }

    /// Writes a field of the main directory, or of the one that `directory`'s field points to, made where it is not.
    /// `value` is in the block's byte order.
    pub fn set(&mut self, directory: Option<u16>, tag: u16, kind: u16, value: &[u8]) {
        let at = match directory {
            None => self.main(),
            Some(pointer) => self.directory(pointer).or_else(|| {
                let at = self.append(&[0; 6]);
                let place = self.ordered((at as u32).to_be_bytes());
                self.set(None, pointer, LONG, &place);
                Some(at)
            }),
        };
        let Some(at) = at else { return };
        let field = match self.field(at, tag) {
            Some(field) => field.at,
            None => self.insert(at, directory, tag),
        };
        self.write(field, kind, value);
    }

    /// Fills the field at `field` but for its tag.
    fn write(&mut self, field: usize, kind: u16, value: &[u8]) {
        let count = value.len() / unit(kind).unwrap_or(1);
        self.put(field + 2, &kind.to_be_bytes());
        self.put(field + 4, &(count as u32).to_be_bytes());
        if value.len() <= 4 {
            self.bytes[field + 8..field + 12].fill(0);
            self.bytes[field + 8..field + 8 + value.len()].copy_from_slice(value);
        } else {
            let place = self.append(value);
            self.put(field + 8, &(place as u32).to_be_bytes());
        }
    }

    /// Copies the directory at `at` to the end with room for `tag`, in order, and points to the copy. Gives the new
    /// field's offset.
    fn insert(&mut self, at: usize, directory: Option<u16>, tag: u16) -> usize {
        let fields = self.fields(at).unwrap_or_default();
        let before = fields.iter().filter(|f| f.tag < tag).count();
        let (first, end) = (at + 2, at + 2 + 12 * fields.len());
        // The link to the next directory follows the fields; it may be missing at the end of a sloppy block.
        let next = self.bytes.get(end..end + 4).unwrap_or(&[0; 4]).to_vec();
        let mut copy = self
            .ordered(((fields.len() + 1) as u16).to_be_bytes())
            .to_vec();
        copy.extend_from_slice(&self.bytes[first..first + 12 * before]);
        copy.extend_from_slice(&self.ordered(tag.to_be_bytes()));
        copy.extend_from_slice(&[0; 10]);
        copy.extend_from_slice(&self.bytes[first + 12 * before..end]);
        copy.extend_from_slice(&next);
        let copy_at = self.append(&copy);
        let pointer = match directory {
            None => 4,
            Some(pointer) => {
                let field = self.main().and_then(|main| self.field(main, pointer));
                field.map_or(4, |f| f.at + 8)
            }
        };
        self.put(pointer, &(copy_at as u32).to_be_bytes());
        copy_at + 2 + 12 * before
    }

    /// Adds bytes at an even offset, as TIFF wants, and gives it.
    fn append(&mut self, value: &[u8]) -> usize {
        self.bytes.resize(self.bytes.len().next_multiple_of(2), 0);
        let at = self.bytes.len();
        self.bytes.extend_from_slice(value);
        at
    }

    /// Overwrites a number given in big-endian order; nothing happens past the end.
    fn put<const N: usize>(&mut self, at: usize, value: &[u8; N]) {
        let value = self.ordered(*value);
        if let Some(place) = self.bytes.get_mut(at..at + N) {
            place.copy_from_slice(&value);
        }
    }

    /// Big-endian bytes in the block's order.
    fn ordered<const N: usize>(&self, mut value: [u8; N]) -> [u8; N] {
        if self.order == ByteOrder::Little {
            value.reverse();
        }
        value
    }

    fn u16(&self, at: usize) -> Option<u16> {
        let bytes = self.bytes.get(at..at.checked_add(2)?)?.try_into().ok()?;
        Some(u16::from_be_bytes(self.ordered(bytes)))
    }

    fn u32(&self, at: usize) -> Option<u32> {
        let bytes = self.bytes.get(at..at.checked_add(4)?)?.try_into().ok()?;
        Some(u32::from_be_bytes(self.ordered(bytes)))
    }
}

/// Bytes of one value of a field type.
pub(crate) fn unit(kind: u16) -> Option<usize> {
    Some(match kind {
        1 | ASCII | 6 | UNDEFINED => 1,
        SHORT | 8 => 2,
        LONG | 9 | 11 | 13 => 4,
        5 | 10 | 12 => 8,
        _ => return None,
    })
}

/// A1111 writes big-endian; others follow the block's order. A text's most frequent high byte is 0, which tells.
fn decode_utf16(bytes: &[u8], block: ByteOrder) -> String {
    let pairs = bytes.as_chunks::<2>().0;
    let zeros = |i: usize| pairs.iter().filter(|p| p[i] == 0).count();
    let order = match zeros(0).cmp(&zeros(1)) {
        Ordering::Greater => ByteOrder::Big,
        Ordering::Less => ByteOrder::Little,
        Ordering::Equal => block,
    };
    let unit = |p: &[u8; 2]| match order {
        ByteOrder::Big => u16::from_be_bytes(*p),
        ByteOrder::Little => u16::from_le_bytes(*p),
    };
    String::from_utf16_lossy(&pairs.iter().map(unit).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comment_set_in_a_new_block_is_read_back_in_either_byte_order() {
        for order in [ByteOrder::Little, ByteOrder::Big] {
            let mut exif = Exif::new(order);
            exif.set_text(MAKE, "Camera");
            exif.set_user_comment("first");
            exif.set_user_comment("Ürsprünglich 日本");
            let exif = Exif::parse(&exif.into_bytes()).unwrap();
            assert_eq!(exif.user_comment().unwrap(), "Ürsprünglich 日本");
            assert_eq!(exif.text(MAKE).unwrap(), "Camera");
        }
    }

    #[test]
    fn what_is_there_stays_at_its_offset_when_fields_are_added() {
        let mut exif = Exif::new(ByteOrder::Big);
        exif.set(
            Some(EXIF_IFD),
            0x927C,
            UNDEFINED,
            b"a maker note with offsets",
        );
        let note = |exif: &Exif| exif.place(exif.field(exif.directory(EXIF_IFD)?, 0x927C)?);
        let before = note(&exif).unwrap();
        exif.set_user_comment("added");
        exif.set_text(MODEL, "added too");
        assert_eq!(note(&exif).unwrap(), before);
        assert_eq!(&exif.bytes[before], b"a maker note with offsets");
    }

    #[test]
    fn a_directory_on_the_header_or_on_another_is_none_and_one_is_made_in_its_place() {
        for (order, place) in [
            (ByteOrder::Big, 6),
            (ByteOrder::Little, 4),
            (ByteOrder::Big, 8),
            (ByteOrder::Little, 10),
        ] {
            let mut exif = Exif::new(order);
            let offset = exif.ordered(u32::to_be_bytes(place));
            exif.set(None, EXIF_IFD, LONG, &offset);
            // The main directory was moved to the end; back to where the field points.
            let main = exif.main().unwrap();
            let directory = exif.bytes[main..].to_vec();
            exif.bytes.truncate(8);
            exif.bytes.extend(directory);
            exif.put(4, &8u32.to_be_bytes());
            let mut exif = Exif::parse(&exif.into_bytes()).unwrap();
            exif.fit(2, 2);
            exif.set_user_comment("a cat");
            let exif = Exif::parse(&exif.into_bytes()).unwrap();
            assert_eq!(exif.user_comment().as_deref(), Some("a cat"), "at {place}");
        }
    }

    #[test]
    fn fitting_resets_the_orientation_and_the_stated_sizes_and_adds_none() {
        let mut exif = Exif::new(ByteOrder::Little);
        exif.set(None, ORIENTATION, SHORT, &6u16.to_le_bytes());
        exif.set(Some(EXIF_IFD), PIXEL_WIDTH, SHORT, &40u16.to_le_bytes());
        exif.fit(80, 60);
        let orientation = exif.field(exif.main().unwrap(), ORIENTATION).unwrap();
        assert_eq!(exif.value(orientation).unwrap(), 1u16.to_le_bytes());
        let directory = exif.directory(EXIF_IFD).unwrap();
        let width = exif.field(directory, PIXEL_WIDTH).unwrap();
        assert_eq!(exif.value(width).unwrap(), 80u32.to_le_bytes());
        assert!(exif.field(directory, PIXEL_HEIGHT).is_none());
    }
}
