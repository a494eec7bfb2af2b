//! Metadata out of a JPEG's segments before its first scan.

use super::Metadata;
use super::exif::Exif;

/// Markers of the segments that hold metadata.
const APP1: u8 = 0xE1;
const APP2: u8 = 0xE2;

impl Metadata {
    /// From each segment's marker and payload, in file order. What is not whole is left out.
    pub(crate) fn from_jpeg<'a>(segments: impl Iterator<Item = (u8, &'a [u8])>) -> Self {
        let mut metadata = Self::default();
        let mut profile = Vec::new();
        for (marker, payload) in segments {
            match marker {
                APP1 => {
                    if let Some(block) = payload.strip_prefix(b"Exif\0") {
                        // A byte of padding, which is 0 but in a few files.
                        let block = block.get(1..).unwrap_or_default();
                        if metadata.exif.is_none() && Exif::parse(block).is_some() {
                            metadata.exif = Some(block.to_vec());
                        }
                    } else if let Some(packet) = payload.strip_prefix(b"http://ns.adobe.com/xap/1.0/\0") {
                        metadata.xmp.get_or_insert_with(|| packet.to_vec());
                    }
                }
                APP2 => {
                    if let Some([part, parts, data @ ..]) = payload.strip_prefix(b"ICC_PROFILE\0") {
                        profile.push((*part, *parts, data));
                    }
                }
                _ => {}
            }
        }
        metadata.icc = joined(profile);
        metadata
    }
}

/// A profile out of its numbered parts; `None` unless each is there once.
fn joined(mut parts: Vec<(u8, u8, &[u8])>) -> Option<Vec<u8>> {
    parts.sort_by_key(|(number, ..)| *number);
    let count = parts.first()?.1;
    let numbered = parts.iter().enumerate().all(|(i, (number, all, _))| usize::from(*number) == i + 1 && *all == count);
    (numbered && parts.len() == usize::from(count)).then(|| parts.iter().flat_map(|(.., data)| *data).copied().collect())
}
