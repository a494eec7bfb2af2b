//! Metadata out of a JPEG's segments before its first scan.

use super::{Density, Metadata, iptc};

/// Markers of the segments that hold metadata.
const APP1: u8 = 0xE1;
const APP2: u8 = 0xE2;
const APP0: u8 = 0xE0;
const APP13: u8 = 0xED;
const COM: u8 = 0xFE;
/// The PNG text key of a comment.
pub(crate) const COMMENT: &str = "Comment";

impl Metadata {
    /// From each segment's marker and payload, in file order. What is not whole is left out.
    pub(crate) fn from_jpeg<'a>(segments: impl Iterator<Item = (u8, &'a [u8])>) -> Self {
        let mut metadata = Self::default();
        let (mut profile, mut resources) = (Vec::new(), Vec::new());
        for (marker, payload) in segments {
            match marker {
                APP1 => {
                    if let Some(block) = payload.strip_prefix(b"Exif\0") {
                        // A byte of padding, which is 0 but in a few files.
                        let block = block.get(1..).unwrap_or_default();
                        metadata.exif.get_or_insert_with(|| block.to_vec());
                    } else if let Some(packet) =
                        payload.strip_prefix(b"http://ns.adobe.com/xap/1.0/\0")
                    {
                        metadata.xmp.get_or_insert_with(|| packet.to_vec());
                    }
                }
                APP2 => {
                    if let Some([part, parts, data @ ..]) = payload.strip_prefix(b"ICC_PROFILE\0") {
                        profile.push((*part, *parts, data));
                    }
                }
                APP0 => metadata.density = metadata.density.or_else(|| Density::from_jfif(payload)),
                // Long ones go on in the next segment.
                APP13 => resources
                    .extend_from_slice(payload.strip_prefix(iptc::PHOTOSHOP).unwrap_or_default()),
                COM => metadata.add_comment(payload),
                _ => {}
            }
        }
        metadata.icc = joined(profile);
        metadata.iptc = iptc::from_resources(&resources);
        metadata.or_density_in_exif()
    }
}

impl Metadata {
    /// A comment in UTF-8 or Latin-1; several are lines of one.
    fn add_comment(&mut self, payload: &[u8]) {
        let latin1 = || payload.iter().map(|&b| char::from(b)).collect();
        let comment = String::from_utf8(payload.to_vec()).unwrap_or_else(|_| latin1());
        let comment = comment.trim_matches(|c: char| c == '\0' || c.is_whitespace());
        if comment.is_empty() {
            return;
        }
        let text = match self.text(COMMENT) {
            Some(before) => format!("{before}\n{comment}"),
            None => comment.to_owned(),
        };
        self.set_text(COMMENT, text);
    }
}

/// A profile out of its numbered parts; `None` unless each is there once.
fn joined(mut parts: Vec<(u8, u8, &[u8])>) -> Option<Vec<u8>> {
    parts.sort_by_key(|(number, ..)| *number);
    let count = parts.first()?.1;
    let numbered = parts
        .iter()
        .enumerate()
        .all(|(i, (number, all, _))| usize::from(*number) == i + 1 && *all == count);
    (numbered && parts.len() == usize::from(count))
        .then(|| parts.iter().flat_map(|(.., data)| *data).copied().collect())
}
