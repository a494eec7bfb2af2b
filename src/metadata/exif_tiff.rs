//! EXIF out of a TIFF file's own directories, and into those of one that is written.

use crate::metadata::exif::{
    ByteOrder, Directory, Exif, MAKE, MODEL, USER_COMMENT, turn_comment, unit,
};

/// Descriptive tags that a TIFF's main directory shares with EXIF's: what, who, when, with what, resolution, rating, and
/// Windows' own (title, comment, author, keywords, subject).
const DESCRIPTIVE: [u16; 19] = [
    0x010D, 0x010E, MAKE, MODEL, 0x011A, 0x011B, 0x0128, 0x0131, 0x0132, 0x013B, 0x013C, 0x4746,
    0x8298, 0x9C9B, 0x9C9C, 0x9C9D, 0x9C9E, 0x9C9F, 0x4749,
];

/// GeoTIFF: which place of a map a pixel shows, by the pixel's number, which is another's once the picture is enlarged.
const ON_A_MAP: [u16; 6] = [0x830E, 0x8482, 0x85D8, 0x87AF, 0x87B0, 0x87B1];

impl<'a> Exif<'a> {
    /// What a TIFF file's directories say about the picture (not about its storage), as an EXIF block. `None` where
    /// they say nothing, and nothing of them is lost.
    pub fn from_tiff(file: &'a [u8]) -> Option<Self> {
        let mut exif = Self::parse_only(file, |directory, tag| {
            directory != Directory::Main || DESCRIPTIVE.contains(&tag) || ON_A_MAP.contains(&tag)
        })?;
        exif.drop_fields(&ON_A_MAP, "its place on the map (GeoTIFF)");
        exif.drop_far_note();
        (!exif.is_empty() || !exif.lost().is_empty()).then_some(exif)
    }

    /// The fields that a TIFF file written on this machine can take over: tag, type, and value in its byte order.
    pub fn for_tiff(&self, directory: Directory) -> Vec<(u16, u16, Vec<u8>)> {
        let fields = self.fields(directory).iter();
        let wanted =
            fields.filter(|f| directory != Directory::Main || DESCRIPTIVE.contains(&f.tag));
        let convert = |(tag, kind, mut value): (u16, u16, Vec<u8>)| {
            if self.order != ByteOrder::NATIVE {
                value
                    .chunks_exact_mut(number(kind))
                    .for_each(<[u8]>::reverse);
                if tag == USER_COMMENT {
                    turn_comment(&mut value);
                }
            }
            (tag, kind, value)
        };
        wanted
            .map(|f| convert((f.tag, f.kind, f.value.to_vec())))
            .collect()
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
    use crate::metadata::exif::Comment;

    #[test]
    fn a_comment_that_only_the_blocks_order_tells_is_read_the_same_from_a_tiff() {
        for text in ["日本", "Rome"] {
            let units = text.encode_utf16().flat_map(u16::to_be_bytes);
            let value: Vec<u8> = b"UNICODE\0".iter().copied().chain(units).collect();
            let mut camera = Exif::new(ByteOrder::Big);
            camera.set(Directory::Exif, USER_COMMENT, 7, value);
            let mut written = Exif::new(ByteOrder::NATIVE);
            for (tag, kind, value) in camera.for_tiff(Directory::Exif) {
                written.set(Directory::Exif, tag, kind, value);
            }
            assert_eq!(written.comment(), Comment::Text(text.into()));
        }
    }

    #[test]
    fn many_fields_of_one_large_value_take_no_more_than_the_file() {
        // 72 KB of TIFF: 6,000 fields that share all of it, which took 4.6 GB.
        let mut file = b"II*\0\x08\0\0\0".to_vec();
        let fields = 3000u16;
        file.extend((fields + 1).to_le_bytes());
        let directory = |file: &mut Vec<u8>, first: u16| {
            for i in 0..fields {
                file.extend((first + i).to_le_bytes());
                file.extend(2u16.to_le_bytes());
                file.extend(70_000u32.to_le_bytes());
                file.extend(0u32.to_le_bytes());
            }
        };
        directory(&mut file, 0x0100);
        let at = file.len() as u32 + 12 + 4;
        file.extend([0x69, 0x87, 4, 0, 1, 0, 0, 0]);
        file.extend(at.to_le_bytes());
        file.extend([0; 4]);
        file.extend(fields.to_le_bytes());
        directory(&mut file, 0x9000);
        assert!(file.len() > 70_000 && file.len() < 73_000);
        let exif = Exif::from_tiff(&file).unwrap();
        assert!(exif.is_empty() && exif.to_bytes().unwrap().len() < 32);
        let lost = Exif::parse(&file).unwrap().lost().join(";");
        assert!(lost.contains("damaged EXIF fields"), "{lost}");
    }
}
