//! An EXIF block: read into its directories once, edited there, written once. A TIFF file has the same structure and is
//! read with this too.
//!
//! Every directory and value must lie in the block and overlap nothing else (short values may overlap each other), and all
//! values together must not be longer than the block, so that it grows by little more than what is added. The maker note
//! keeps its offset, since offsets in it, which no one but the maker knows, mostly count from the beginning of the block;
//! so do the bytes that belong to no field, as some of those offsets point there. The thumbnail, which shows the old
//! picture, is left out.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap, HashSet};
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
/// Tags of the EXIF directory.
const IMAGE_HISTORY: u16 = 0x9213;
const MAKER_NOTE: u16 = 0x927C;
pub(crate) const USER_COMMENT: u16 = 0x9286;
const PIXEL_WIDTH: u16 = 0xA002;
const PIXEL_HEIGHT: u16 = 0xA003;

/// Of the main directory: where pixels and further directories lie, which says nothing of the block's next picture
/// (strips, tiles, SubIFDs, a JPEG stream).
const STORAGE: [u16; 7] = [0x0111, 0x0117, 0x0144, 0x0145, 0x014A, 0x0201, 0x0202];

/// Field types.
pub(crate) const ASCII: u16 = 2;
const SHORT: u16 = 3;
const LONG: u16 = 4;
const UNDEFINED: u16 = 7;
const IFD: u16 = 13;

/// The longest value that may overlap others: a date is 20 bytes, and some programs let several fields share one.
const MAX_SHARED: usize = 64;
/// How far from the beginning a maker note out of a TIFF file keeps its offset: that far, a JPEG can hold it.
const NEAR: usize = 60_000;

/// The directories that are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Directory {
    Main,
    Exif,
    Gps,
    /// Of the EXIF directory.
    Interop,
}

impl Directory {
    pub const ALL: [Self; 4] = [Self::Main, Self::Exif, Self::Gps, Self::Interop];

    /// The directory that points to it, and the tag of that field; `None` for the main one.
    pub fn pointer(self) -> Option<(Self, u16)> {
        match self {
            Self::Main => None,
            Self::Exif => Some((Self::Main, 0x8769)),
            Self::Gps => Some((Self::Main, 0x8825)),
            Self::Interop => Some((Self::Exif, 0xA005)),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Main => "main directory",
            Self::Exif => "camera settings",
            Self::Gps => "GPS position",
            Self::Interop => "interoperability directory",
        }
    }
}

/// One field of a directory.
#[derive(Clone, Debug)]
pub(crate) struct Field<'a> {
    pub tag: u16,
    pub kind: u16,
    /// In the block's byte order, whole values of the type.
    pub value: Cow<'a, [u8]>,
    /// Where the value lay, if apart from the field.
    at: Option<usize>,
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

    /// Big-endian bytes in this order.
    fn ordered<const N: usize>(self, mut value: [u8; N]) -> [u8; N] {
        if self == Self::Little {
            value.reverse();
        }
        value
    }

    fn u16(self, bytes: &[u8], at: usize) -> Option<u16> {
        let value = bytes.get(at..at.checked_add(2)?)?.try_into().ok()?;
        Some(u16::from_be_bytes(self.ordered(value)))
    }

    fn u32(self, bytes: &[u8], at: usize) -> Option<u32> {
        let value = bytes.get(at..at.checked_add(4)?)?.try_into().ok()?;
        Some(u32::from_be_bytes(self.ordered(value)))
    }
}

/// What a `UserComment` holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Comment {
    /// There is none, or nothing but padding.
    Empty,
    /// Without the padding.
    Text(String),
    /// Bytes of a camera's own, or in JIS.
    Opaque,
}

pub(crate) struct Exif<'a> {
    pub order: ByteOrder,
    /// By [`Directory`], each in ascending order of its tags.
    directories: [Vec<Field<'a>>; 4],
    /// Beside a maker note: bytes that belong to no field, with their offsets.
    loose: Vec<(usize, &'a [u8])>,
    /// What of the block cannot be kept, as a list for a message.
    lost: Vec<String>,
}

impl<'a> Exif<'a> {
    /// Takes a block from its TIFF header on; a leading `Exif\0\0` is dropped. `None` if it is no such block, or its main
    /// directory is damaged.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let stored = |directory, tag| directory == Directory::Main && STORAGE.contains(&tag);
        Reader::read(bytes, |directory, tag| !stored(directory, tag))
    }

    /// The same of those fields that `wanted` names, of a file that holds more than a block.
    pub(super) fn parse_only(
        bytes: &'a [u8],
        wanted: impl Fn(Directory, u16) -> bool,
    ) -> Option<Self> {
        let mut exif = Reader::read(bytes, wanted)?;
        exif.loose.clear();
        Some(exif)
    }

    /// A block with an empty main directory.
    pub fn new(order: ByteOrder) -> Self {
        Self {
            order,
            directories: Default::default(),
            loose: Vec::new(),
            lost: Vec::new(),
        }
    }

    /// What of the block cannot be kept, each as an item of a list.
    pub fn lost(&self) -> &[String] {
        &self.lost
    }

    pub fn fields(&self, directory: Directory) -> &[Field<'a>] {
        &self.directories[directory as usize]
    }

    pub fn field(&self, directory: Directory, tag: u16) -> Option<&Field<'a>> {
        self.fields(directory).iter().find(|f| f.tag == tag)
    }

    pub fn is_empty(&self) -> bool {
        self.directories.iter().all(Vec::is_empty)
    }

    /// What `UserComment` says, in whichever of its encodings.
    pub fn comment(&self) -> Comment {
        let Some(field) = self.field(Directory::Exif, USER_COMMENT) else {
            return Comment::Empty;
        };
        let value = &*field.value;
        let text = match value.split_at_checked(8) {
            Some((b"UNICODE\0", text)) => Some(decode_utf16(text, self.order)),
            Some((b"ASCII\0\0\0" | b"\0\0\0\0\0\0\0\0", text)) => utf8(text),
            Some((b"JIS\0\0\0\0\0", text)) => {
                let blank = text.iter().all(|b| b" \0".contains(b));
                blank.then(String::new)
            }
            // No code at all: some write the text alone.
            _ => utf8(value),
        };
        match text.as_deref().map(trimmed) {
            Some("") => Comment::Empty,
            Some(text) => Comment::Text(text.to_owned()),
            None => Comment::Opaque,
        }
    }

    /// Writes `UserComment` as UTF-16BE, as A1111 does and its readers expect whatever the block's byte order.
    pub fn set_comment(&mut self, text: &str) {
        let utf16 = text.encode_utf16().flat_map(u16::to_be_bytes);
        let value = b"UNICODE\0".iter().copied().chain(utf16).collect();
        self.set(Directory::Exif, USER_COMMENT, UNDEFINED, value);
    }

    /// The record of what was done to the picture (TIFF/EP's `ImageHistory`).
    pub fn history(&self) -> Option<String> {
        self.text(Directory::Exif, IMAGE_HISTORY)
    }

    pub fn set_history(&mut self, text: &str) {
        self.set_text(Directory::Exif, IMAGE_HISTORY, text);
    }

    /// A text field, without its final NUL.
    pub fn text(&self, directory: Directory, tag: u16) -> Option<String> {
        let text = String::from_utf8_lossy(&self.field(directory, tag)?.value);
        Some(text.trim_end_matches('\0').to_owned())
    }

    pub fn set_text(&mut self, directory: Directory, tag: u16, text: &str) {
        self.set(directory, tag, ASCII, format!("{text}\0").into_bytes());
    }

    /// Makes the block fit upright pixels of a new size: orientation 1, and the sizes that are stated.
    pub fn fit(&mut self, width: usize, height: usize) {
        for (directory, tag, value) in [
            (Directory::Main, IMAGE_WIDTH, width),
            (Directory::Main, IMAGE_HEIGHT, height),
            (Directory::Exif, PIXEL_WIDTH, width),
            (Directory::Exif, PIXEL_HEIGHT, height),
        ] {
            if self.field(directory, tag).is_some() {
                let value = self.order.ordered((value as u32).to_be_bytes()).to_vec();
                self.set(directory, tag, LONG, value);
            }
        }
        if self.field(Directory::Main, ORIENTATION).is_some() {
            let one = self.order.ordered(1u16.to_be_bytes()).to_vec();
            self.set(Directory::Main, ORIENTATION, SHORT, one);
        }
    }

    /// Writes a field, in the place of one of its tag. `value` is in the block's byte order.
    pub fn set(&mut self, directory: Directory, tag: u16, kind: u16, value: Vec<u8>) {
        let fields = &mut self.directories[directory as usize];
        let field = Field {
            tag,
            kind,
            value: Cow::Owned(value),
            at: None,
        };
        match fields.binary_search_by_key(&tag, |f| f.tag) {
            Ok(i) => fields[i] = field,
            Err(i) => fields.insert(i, field),
        }
    }

    /// Takes fields of the main directory out; `what` they say is lost.
    pub(super) fn drop_fields(&mut self, tags: &[u16], what: &str) {
        let fields = &mut self.directories[Directory::Main as usize];
        let before = fields.len();
        fields.retain(|f| !tags.contains(&f.tag));
        if fields.len() < before {
            self.lost.push(what.into());
        }
    }

    /// Takes the maker note out where it cannot keep its offset and needs it; `true` if it did.
    pub fn drop_bound_note(&mut self) -> bool {
        let fields = &mut self.directories[Directory::Exif as usize];
        let bound = |f: &Field| f.tag == MAKER_NOTE && !counts_from_itself(&f.value);
        let before = fields.len();
        fields.retain(|f| !bound(f));
        fields.len() < before
    }

    /// The same for a note that lay deep in a TIFF file.
    pub(super) fn drop_far_note(&mut self) {
        let far = self
            .note()
            .is_some_and(|note| note.start > NEAR || note.end > NEAR);
        if far && self.drop_bound_note() {
            self.lost.push(NOTE.into());
        }
        // One that counts from itself can lie anywhere.
        for field in &mut self.directories[Directory::Exif as usize] {
            if field.tag == MAKER_NOTE && far {
                field.at = None;
            }
        }
    }

    /// Where the maker note lay.
    fn note(&self) -> Option<Range<usize>> {
        let note = self.field(Directory::Exif, MAKER_NOTE)?;
        let at = note.at?;
        Some(at..at + note.value.len())
    }

    /// The block from its TIFF header on. `None` where it would pass the 4 GB that its offsets reach.
    pub fn to_bytes(&self) -> Option<Vec<u8>> {
        Writer::new(self).write()
    }
}

/// The maker note, as it is called in messages.
pub(super) const NOTE: &str =
    "the camera's maker note, which can be read at its old place in the file alone";

/// Reads a block's directories and checks what overlaps.
struct Reader<'a> {
    bytes: &'a [u8],
    order: ByteOrder,
    /// Start and end of the header and of all directories.
    directories: BTreeMap<usize, usize>,
    /// Of the long values.
    values: BTreeMap<usize, usize>,
    /// What all values together may still have.
    room: usize,
    /// Everything that a field owns, the thumbnail's too, in no order.
    owned: Vec<Range<usize>>,
    /// Directories that are damaged, by name.
    broken: Vec<&'static str>,
    /// Fields that are damaged.
    damaged: Vec<u16>,
}

/// A field as it stands in its directory.
#[derive(Clone, Copy)]
struct Entry {
    tag: u16,
    kind: u16,
    count: u32,
    /// Where its value or the value's offset stands.
    at: usize,
}

impl<'a> Reader<'a> {
    fn read(bytes: &'a [u8], wanted: impl Fn(Directory, u16) -> bool) -> Option<Exif<'a>> {
        let bytes = bytes.strip_prefix(b"Exif\0\0").unwrap_or(bytes);
        let order = match bytes.get(..4)? {
            b"II*\0" => ByteOrder::Little,
            b"MM\0*" => ByteOrder::Big,
            _ => return None,
        };
        let mut reader = Self {
            bytes,
            order,
            directories: BTreeMap::from([(0, HEADER)]),
            values: BTreeMap::new(),
            room: bytes.len(),
            owned: Vec::new(),
            broken: Vec::new(),
            damaged: Vec::new(),
        };
        // All directories before any value, so that no value can be taken for one.
        let mut entries: [Vec<Entry>; 4] = Default::default();
        let main_at = order.u32(bytes, 4)? as usize;
        entries[Directory::Main as usize] = reader.directory(main_at)?;
        for directory in [Directory::Exif, Directory::Gps, Directory::Interop] {
            let Some((parent, tag)) = directory.pointer() else {
                continue;
            };
            let pointer = entries[parent as usize].iter().find(|e| e.tag == tag);
            let Some(&pointer) = pointer else { continue };
            match reader.pointed(pointer) {
                Some(found) => entries[directory as usize] = found,
                None => reader.broken.push(directory.name()),
            }
        }
        let mut directories: [Vec<Field>; 4] = Default::default();
        for directory in Directory::ALL {
            let fields = entries[directory as usize]
                .iter()
                .filter(|e| !is_pointer(e.tag) && wanted(directory, e.tag))
                .filter_map(|&entry| reader.field(entry));
            let mut fields: Vec<Field> = fields.collect();
            // Readers differ in which of two they take.
            fields.sort_by_key(|f| f.tag);
            fields.dedup_by_key(|f| f.tag);
            directories[directory as usize] = fields;
        }
        let main = &entries[Directory::Main as usize];
        reader.own_thumbnail(main_at + 2 + 12 * main.len());
        let has_note = directories[Directory::Exif as usize]
            .iter()
            .any(|f| f.tag == MAKER_NOTE);
        Some(Exif {
            order,
            directories,
            loose: if has_note { reader.loose() } else { Vec::new() },
            lost: reader.lost(),
        })
    }

    /// Notes what the directory that `link` points to owns, which is the thumbnail's.
    fn own_thumbnail(&mut self, link: usize) {
        let at = self.order.u32(self.bytes, link).unwrap_or(0) as usize;
        let Some(entries) = self.directory(at) else {
            return;
        };
        for &entry in &entries {
            self.owned.extend(self.place(entry));
        }
        let number = |tag| {
            let entry = entries.iter().find(|e| e.tag == tag)?;
            self.order.u32(self.bytes, entry.at).map(|n| n as usize)
        };
        // A JPEG stream, or one strip.
        for (offset, length) in [(0x0201, 0x0202), (0x0111, 0x0117)] {
            let range = number(offset).zip(number(length));
            let range = range.and_then(|(at, length)| Some(at..at.checked_add(length)?));
            self.owned.extend(range);
        }
    }

    /// The bytes that no field owns.
    fn loose(&mut self) -> Vec<(usize, &'a [u8])> {
        // A directory's link to the next follows it.
        let directories = self.directories.iter().map(|(&start, &end)| start..end + 4);
        let mut owned = std::mem::take(&mut self.owned);
        owned.extend(directories);
        owned.sort_by_key(|range| range.start);
        let mut loose = Vec::new();
        let mut free = HEADER;
        for range in owned
            .into_iter()
            .chain(std::iter::once(self.bytes.len()..usize::MAX))
        {
            let part = self.bytes.get(free..range.start).unwrap_or_default();
            if part.iter().any(|&b| b != 0) {
                loose.push((free, part));
            }
            free = free.max(range.end);
        }
        loose
    }

    fn pointed(&mut self, pointer: Entry) -> Option<Vec<Entry>> {
        let at = self.order.u32(self.bytes, pointer.at)? as usize;
        matches!(pointer.kind, LONG | IFD)
            .then(|| self.directory(at))
            .flatten()
    }

    /// A directory's fields; `None` if it passes the end of the block or overlaps what was read before.
    fn directory(&mut self, at: usize) -> Option<Vec<Entry>> {
        let (bytes, order) = (self.bytes, self.order);
        let count = usize::from(order.u16(bytes, at)?);
        let end = at + 2 + 12 * count;
        bytes.get(at..end)?;
        take(&mut self.directories, at..end).then_some(())?;
        let entry = |i| {
            let at = at + 2 + 12 * i;
            Some(Entry {
                tag: order.u16(bytes, at)?,
                kind: order.u16(bytes, at + 2)?,
                count: order.u32(bytes, at + 4)?,
                at: at + 8,
            })
        };
        (0..count).map(entry).collect()
    }

    fn field(&mut self, entry: Entry) -> Option<Field<'a>> {
        let field = self.sound_field(entry);
        if field.is_none() {
            self.damaged.push(entry.tag);
        }
        field
    }

    fn sound_field(&mut self, entry: Entry) -> Option<Field<'a>> {
        let place = self.place(entry)?;
        let value = self.bytes.get(place.clone())?;
        let inside = place.start == entry.at;
        if !inside {
            self.owned.push(place.clone());
            let free = is_free(&self.directories, &place)
                && (value.len() <= MAX_SHARED || take(&mut self.values, place.clone()));
            self.room = self.room.checked_sub(value.len()).filter(|_| free)?;
        }
        Some(Field {
            tag: entry.tag,
            kind: entry.kind,
            value: Cow::Borrowed(value),
            at: (!inside).then_some(place.start),
        })
    }

    /// Where a field's value should lie.
    fn place(&self, entry: Entry) -> Option<Range<usize>> {
        let length = (entry.count as usize).checked_mul(unit(entry.kind)?)?;
        let at = match length {
            0..=4 => entry.at,
            _ => self.order.u32(self.bytes, entry.at)? as usize,
        };
        Some(at..at.checked_add(length)?)
    }

    fn lost(self) -> Vec<String> {
        let mut lost: Vec<String> = self
            .broken
            .iter()
            .map(|name| format!("the EXIF's {name} (damaged)"))
            .collect();
        let first: Vec<String> = self
            .damaged
            .iter()
            .take(4)
            .map(|tag| format!("0x{tag:04x}"))
            .collect();
        if !first.is_empty() {
            let more = if self.damaged.len() > first.len() {
                ", ..."
            } else {
                ""
            };
            lost.push(format!("damaged EXIF fields ({}{more})", first.join(", ")));
        }
        lost
    }
}

/// Whether nothing in `taken` (start to end, none overlapping) overlaps `range`.
fn is_free(taken: &BTreeMap<usize, usize>, range: &Range<usize>) -> bool {
    let before = taken.range(..range.end).next_back();
    before.is_none_or(|(_, &end)| end <= range.start)
}

/// Takes a range for one thing; `false` if a part of it is taken.
fn take(taken: &mut BTreeMap<usize, usize>, range: Range<usize>) -> bool {
    let free = is_free(taken, &range);
    if free {
        taken.insert(range.start, range.end);
    }
    free
}

fn is_pointer(tag: u16) -> bool {
    Directory::ALL
        .iter()
        .any(|d| d.pointer().is_some_and(|(_, pointer)| pointer == tag))
}

/// Lays a block out and writes it.
struct Writer<'a> {
    exif: &'a Exif<'a>,
    bytes: Vec<u8>,
    /// What is not taken, in order; the last has no end.
    free: Vec<Range<usize>>,
    /// Values written, by their old place.
    written: HashMap<(usize, usize), usize>,
}

const HEADER: usize = 8;

impl<'a> Writer<'a> {
    fn new(exif: &'a Exif<'a>) -> Self {
        // The maker note and the bytes around it keep their places.
        let loose = exif.loose.iter().map(|(at, part)| *at..at + part.len());
        let mut kept: Vec<Range<usize>> = loose.chain(exif.note()).collect();
        kept.sort_by_key(|range| range.start);
        let mut free = Vec::new();
        let mut end = HEADER;
        for range in kept {
            free.push(end..range.start);
            end = end.max(range.end.next_multiple_of(2));
        }
        free.push(end..usize::MAX);
        Self {
            exif,
            bytes: Vec::new(),
            free,
            written: HashMap::new(),
        }
    }

    fn write(mut self) -> Option<Vec<u8>> {
        let order = self.exif.order;
        let written: Vec<Directory> = Directory::ALL
            .into_iter()
            .filter(|&d| self.is_written(d))
            .collect();
        let mut offsets = [0; 4];
        for &directory in &written {
            offsets[directory as usize] = self.place(2 + 12 * self.count(directory) + 4);
        }
        self.put(
            0,
            match order {
                ByteOrder::Big => b"MM\0*",
                ByteOrder::Little => b"II*\0",
            },
        );
        self.put(4, &self.number(offsets[Directory::Main as usize])?);
        for &directory in &written {
            self.directory(directory, &offsets)?;
        }
        for &(at, part) in &self.exif.loose {
            self.put(at, part);
        }
        Some(self.bytes)
    }

    /// The main directory, and those that hold anything.
    fn is_written(&self, directory: Directory) -> bool {
        directory == Directory::Main
            || !self.exif.fields(directory).is_empty()
            || self.children(directory).next().is_some()
    }

    /// The directories that fields of this one point to, with those fields' tags.
    fn children(&self, parent: Directory) -> impl Iterator<Item = (u16, Directory)> {
        Directory::ALL.into_iter().filter_map(move |child| {
            let (of, tag) = child.pointer()?;
            (of == parent && self.is_written(child)).then_some((tag, child))
        })
    }

    fn count(&self, directory: Directory) -> usize {
        self.exif.fields(directory).len() + self.children(directory).count()
    }

    fn directory(&mut self, directory: Directory, offsets: &[usize; 4]) -> Option<()> {
        let exif = self.exif;
        let pointers: HashSet<(u16, usize)> = self
            .children(directory)
            .map(|(tag, child)| (tag, offsets[child as usize]))
            .collect();
        let mut entries = Vec::with_capacity(self.count(directory));
        for field in exif.fields(directory) {
            let count = field.value.len() / unit(field.kind)?;
            let value = match field.value.len() {
                0..=4 => {
                    let mut value = field.value.to_vec();
                    value.resize(4, 0);
                    value
                }
                _ => {
                    let at = self.value(field);
                    self.number(at)?.to_vec()
                }
            };
            entries.push((field.tag, field.kind, count, value));
        }
        for (tag, offset) in pointers {
            entries.push((tag, LONG, 1, self.number(offset)?.to_vec()));
        }
        entries.sort_by_key(|(tag, ..)| *tag);

        let order = exif.order;
        let mut at = offsets[directory as usize];
        self.put(
            at,
            &order.ordered(u16::try_from(entries.len()).ok()?.to_be_bytes()),
        );
        at += 2;
        for (tag, kind, count, value) in entries {
            let head = [
                order.ordered(tag.to_be_bytes()),
                order.ordered(kind.to_be_bytes()),
            ];
            let count = self.number(count)?;
            self.put(at, &[&head.concat()[..], &count, &value].concat());
            at += 12;
        }
        // No directory follows.
        self.put(at, &[0; 4]);
        Some(())
    }

    /// Writes a value that does not fit into its field, once for all fields that share it, and gives its place.
    fn value(&mut self, field: &Field) -> usize {
        let old = field.at.map(|at| (at, field.value.len()));
        if let Some(&at) = old.and_then(|old| self.written.get(&old)) {
            return at;
        }
        let at = match self.exif.note() {
            Some(note) if field.tag == MAKER_NOTE && field.at == Some(note.start) => note.start,
            _ => self.place(field.value.len()),
        };
        self.put(at, &field.value);
        self.written.extend(old.map(|old| (old, at)));
        at
    }

    /// Room for `length` bytes at an even offset, as TIFF wants: the first where they fit.
    fn place(&mut self, length: usize) -> usize {
        // The last range has no end: there is always one.
        let fits = |range: &&mut Range<usize>| range.start.saturating_add(length) <= range.end;
        let Some(range) = self.free.iter_mut().find(fits) else {
            return self.bytes.len();
        };
        let at = range.start;
        range.start = (at + length).next_multiple_of(2);
        at
    }

    fn put(&mut self, at: usize, value: &[u8]) {
        let end = at + value.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[at..end].copy_from_slice(value);
    }

    fn number(&self, value: usize) -> Option<[u8; 4]> {
        Some(
            self.exif
                .order
                .ordered(u32::try_from(value).ok()?.to_be_bytes()),
        )
    }
}

/// Bytes of one value of a field type.
pub(crate) fn unit(kind: u16) -> Option<usize> {
    Some(match kind {
        1 | ASCII | 6 | UNDEFINED => 1,
        SHORT | 8 => 2,
        LONG | 9 | 11 | IFD => 4,
        5 | 10 | 12 => 8,
        _ => return None,
    })
}

/// Whether the offsets in a maker note count from its own beginning, so that it can be moved: those with a TIFF header of
/// their own, or known to (exiftool's MakerNotes.pm).
fn counts_from_itself(note: &[u8]) -> bool {
    [
        &b"Nikon\0\x02"[..],
        b"FUJIFILM",
        b"OLYMPUS\0",
        b"OM SYSTEM\0",
        b"Apple iOS\0",
        b"PENTAX \0",
    ]
    .iter()
    .any(|head| note.starts_with(head))
}

fn utf8(bytes: &[u8]) -> Option<String> {
    String::from_utf8(bytes.to_vec()).ok()
}

fn trimmed(text: &str) -> &str {
    text.trim_matches(|c: char| c == '\0' || c.is_whitespace())
}

/// A1111 writes big-endian; others follow the block's order. A text's most frequent high byte is 0, which tells.
fn decode_utf16(bytes: &[u8], block: ByteOrder) -> String {
    let pairs = bytes.as_chunks::<2>().0;
    let order = order_of_utf16(pairs).unwrap_or(block);
    let unit = |p: &[u8; 2]| match order {
        ByteOrder::Big => u16::from_be_bytes(*p),
        ByteOrder::Little => u16::from_le_bytes(*p),
    };
    String::from_utf16_lossy(&pairs.iter().map(unit).collect::<Vec<_>>())
}

/// The byte order that a text tells by itself.
fn order_of_utf16(pairs: &[[u8; 2]]) -> Option<ByteOrder> {
    let zeros = |i: usize| pairs.iter().filter(|p| p[i] == 0).count();
    match zeros(0).cmp(&zeros(1)) {
        Ordering::Greater => Some(ByteOrder::Big),
        Ordering::Less => Some(ByteOrder::Little),
        Ordering::Equal => None,
    }
}

/// Turns the value of a `UserComment` for a block of the other byte order: a text that does not tell its own, such as
/// one without a Latin letter, is read in the block's.
pub(super) fn turn_comment(value: &mut [u8]) {
    let Some((b"UNICODE\0", text)) = value.split_at_mut_checked(8).map(|(c, t)| (&*c, t)) else {
        return;
    };
    let pairs = text.as_chunks_mut::<2>().0;
    if order_of_utf16(pairs).is_none() {
        for pair in pairs {
            pair.reverse();
        }
    }
}

#[cfg(test)]
mod tests;
