//! The outer structure of image files, walked without decoding a pixel: is the file whole, how many frames, where are
//! the segments. Used to refuse truncated files, to judge outputs under `--skip-existing`, and to place metadata.

use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::ops::Range;

/// Where a JPEG's parts lie.
pub(crate) struct JpegMap {
    /// Each marker segment before the first scan: its marker byte, and the range of its payload.
    pub segments: Vec<(u8, Range<usize>)>,
    /// Offset of the first scan's marker.
    pub scans: Option<usize>,
    /// Offset just after the end-of-image marker; `None` if the file ends before it.
    pub end: Option<usize>,
}

/// Walks a JPEG's markers, scans included. `None` if it does not begin as a JPEG.
pub(crate) fn map_jpeg(bytes: &[u8]) -> Option<JpegMap> {
    if !bytes.starts_with(&[0xFF, 0xD8]) {
        return None;
    }
    let mut map = JpegMap {
        segments: Vec::new(),
        scans: None,
        end: None,
    };
    let mut at = 2;
    loop {
        // Between a scan's bytes and the next marker anything may lie; FF 00 and FF D0..D7 belong to the scan.
        let Some(step) = bytes.get(at..).and_then(|rest| find(rest, 0xFF)) else {
            return Some(map);
        };
        at += step;
        let Some(&marker) = bytes.get(at + 1) else {
            return Some(map);
        };
        match marker {
            0xFF => at += 1,
            0x00 | 0x01 | 0xD0..=0xD8 => at += 2,
            0xD9 => {
                map.end = Some(at + 2);
                return Some(map);
            }
            _ => {
                let Some(length) = be16(bytes, at + 2).filter(|&n| n >= 2) else {
                    return Some(map);
                };
                let payload = at + 4..at + 2 + length;
                if payload.end > bytes.len() {
                    return Some(map);
                }
                if marker == 0xDA {
                    map.scans.get_or_insert(at);
                }
                at = payload.end;
                if map.scans.is_none() {
                    map.segments.push((marker, payload));
                }
            }
        }
    }
}

/// The chunks of a RIFF file of type `WEBP`: name and payload range. `None` if a chunk passes the end of the file.
pub(crate) fn webp_chunks(bytes: &[u8]) -> Option<Vec<([u8; 4], Range<usize>)>> {
    let size = le32(bytes, 4)? as usize;
    let end = size.checked_add(8).filter(|&end| end <= bytes.len())?;
    let mut chunks = Vec::new();
    let mut at = 12;
    while at + 8 <= end {
        let name: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
        let length = le32(bytes, at + 4)? as usize;
        let payload = at + 8..(at + 8).checked_add(length).filter(|&e| e <= end)?;
        at = payload.end + length % 2;
        chunks.push((name, payload));
    }
    Some(chunks)
}

/// The PNG chunk at an offset, from its length to its checksum; `None` if it passes the end of the file.
pub(crate) fn png_chunk(bytes: &[u8], at: usize) -> Option<Range<usize>> {
    let end = at.checked_add(12)?.checked_add(be32(bytes, at)? as usize)?;
    (end <= bytes.len()).then_some(at..end)
}

/// Whether a chunk's checksum is that of its name and data.
pub(crate) fn png_checksum_is_right(chunk: &[u8]) -> bool {
    let (data, stated) = chunk.split_at(chunk.len() - 4);
    let mut sum = flate2::Crc::new();
    sum.update(&data[4..]);
    sum.sum().to_be_bytes() == stated
}

/// Whether [`webp_chunks`] would find every chunk within the file; reads nothing but their heads.
pub(crate) fn webp_chunks_fit(file: &mut (impl Read + Seek)) -> io::Result<bool> {
    let held = file.seek(SeekFrom::End(0))?;
    let mut length_at = |at| {
        let mut length = [0; 4];
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut length)?;
        io::Result::Ok(u64::from(u32::from_le_bytes(length)))
    };
    let end = 8 + length_at(4)?;
    let mut at = 12;
    while end <= held && at + 8 <= end {
        let length = length_at(at + 4)?;
        if at + 8 + length > end {
            return Ok(false);
        }
        at += 8 + length + length % 2;
    }
    Ok(end <= held)
}

/// Whether a PNG's chunks run unbroken from the signature to IEND.
pub(crate) fn png_is_whole(bytes: &[u8]) -> bool {
    let mut at = 8;
    while let Some(chunk) = png_chunk(bytes, at) {
        if &bytes[chunk.start + 4..chunk.start + 8] == b"IEND" {
            return true;
        }
        at = chunk.end;
    }
    false
}

/// Where a GIF's parts lie.
pub(crate) struct GifMap {
    /// End of the header with the palette of the whole file.
    pub header: usize,
    /// The graphic control extension of the first frame.
    pub control: Option<Range<usize>>,
    /// Each complete frame, from its descriptor to its last sub-block.
    pub frames: Vec<Range<usize>>,
    /// Whether the trailer was reached.
    pub whole: bool,
}

/// Walks a GIF's blocks.
pub(crate) fn map_gif(bytes: &[u8]) -> GifMap {
    let table = |flags: u8| {
        if flags & 0x80 != 0 {
            3 << ((flags & 7) + 1)
        } else {
            0
        }
    };
    let mut map = GifMap {
        header: 0,
        control: None,
        frames: Vec::new(),
        whole: false,
    };
    let Some(&flags) = bytes.get(10) else {
        return map;
    };
    map.header = 13 + table(flags);
    let mut at = map.header;
    loop {
        let start = at;
        let is_frame = match bytes.get(at) {
            Some(0x3B) => {
                map.whole = true;
                return map;
            }
            Some(0x21) => {
                at += 2;
                false
            }
            Some(0x2C) => {
                let Some(&flags) = bytes.get(at + 9) else {
                    return map;
                };
                at += 11 + table(flags);
                true
            }
            // Some programs pad blocks.
            Some(0) => {
                at += 1;
                continue;
            }
            _ => return map,
        };
        // Sub-blocks, each led by its length, end with an empty one.
        loop {
            match bytes.get(at) {
                Some(0) => break,
                Some(&n) => at += 1 + usize::from(n),
                None => return map,
            }
        }
        at += 1;
        if is_frame {
            map.frames.push(start..at);
        } else if map.frames.is_empty() && bytes[start + 1] == 0xF9 {
            map.control = Some(start..at);
        }
    }
}

/// Whether a TIFF's first directory and the pixel data it points to lie inside the file.
pub(crate) fn tiff_is_whole(bytes: &[u8]) -> bool {
    use tiff::decoder::Decoder;
    use tiff::tags::Tag;
    let Ok(mut decoder) = Decoder::new(Cursor::new(bytes)) else {
        return false;
    };
    let mut list = |tag| decoder.get_tag_u64_vec(tag).ok();
    let offsets = list(Tag::StripOffsets).or_else(|| list(Tag::TileOffsets));
    let counts = list(Tag::StripByteCounts).or_else(|| list(Tag::TileByteCounts));
    let (Some(offsets), Some(counts)) = (offsets, counts) else {
        return false;
    };
    let inside = |(&o, &n): (&u64, &u64)| o.checked_add(n).is_some_and(|e| e <= bytes.len() as u64);
    offsets.len() == counts.len() && offsets.iter().zip(&counts).all(inside)
}

/// Whether a BMP is as long as its header says.
pub(crate) fn bmp_is_whole(bytes: &[u8]) -> bool {
    bytes.len() > 54 && le32(bytes, 2).is_some_and(|size| size as usize <= bytes.len())
}

fn find(bytes: &[u8], byte: u8) -> Option<usize> {
    bytes.iter().position(|&b| b == byte)
}

pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<usize> {
    let b = bytes.get(at..at.checked_add(2)?)?;
    Some(usize::from(u16::from_be_bytes([b[0], b[1]])))
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    let b = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(b.try_into().ok()?))
}

pub(crate) fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    let b = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(b.try_into().ok()?))
}
