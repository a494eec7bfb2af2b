//! Which way up a picture is: EXIF says it, or else XMP.

use image::metadata::Orientation;

/// The orientation that the metadata state; upright where they state none.
pub(crate) fn of(exif: Option<&[u8]>, xmp: Option<&[u8]>) -> Orientation {
    let in_exif = exif.and_then(in_exif).and_then(Orientation::from_exif);
    let in_xmp = || Orientation::from_exif(in_xmp(xmp?)?);
    in_exif.or_else(in_xmp).unwrap_or(Orientation::NoTransforms)
}

/// The value of the main directory's orientation, in whatever type of whole number it is written.
fn in_exif(block: &[u8]) -> Option<u8> {
    let block = block.strip_prefix(b"Exif\0\0").unwrap_or(block);
    let big_endian = match block.get(..4)? {
        b"MM\0*" => true,
        b"II*\0" => false,
        _ => return None,
    };
    let number = |at: usize, length: usize| {
        let bytes = block.get(at..at.checked_add(length)?)?;
        let push = |value: usize, byte: &u8| value << 8 | usize::from(*byte);
        Some(if big_endian {
            bytes.iter().fold(0, push)
        } else {
            bytes.iter().rev().fold(0, push)
        })
    };
    let directory = number(4, 4)?;
    let fields = (0..number(directory, 2)?).map(|i| directory + 2 + 12 * i);
    let field = fields
        .take_while(|&at| number(at, 12).is_some())
        .find(|&at| number(at, 2) == Some(0x0112))?;
    // BYTE; SHORT and SSHORT; LONG and SLONG.
    let length = match number(field + 2, 2)? {
        1 => 1,
        3 | 8 => 2,
        4 | 9 => 4,
        _ => return None,
    };
    u8::try_from(number(field + 8, length)?).ok()
}

/// The value of `tiff:Orientation`, an attribute or an element.
fn in_xmp(xmp: &[u8]) -> Option<u8> {
    let text = String::from_utf8_lossy(xmp);
    for (at, name) in text.match_indices("tiff:Orientation") {
        let rest = &text[at + name.len()..];
        let value = rest.trim_start().strip_prefix(['=', '>']);
        let value = value
            .map(|v| v.trim_start_matches(|c: char| c.is_whitespace() || c == '"' || c == '\''));
        if let Some(digit @ b'1'..=b'8') = value.and_then(|v| v.bytes().next()) {
            return Some(digit - b'0');
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xmps_orientation_is_found_as_attribute_and_as_element_and_exifs_comes_first() {
        for xmp in [
            r#"<a tiff:Orientation="6">"#,
            "<a tiff:Orientation = '6'>",
            "<tiff:Orientation>6</tiff:Orientation>",
        ] {
            assert_eq!(
                of(None, Some(xmp.as_bytes())),
                Orientation::Rotate90,
                "{xmp}"
            );
        }
        assert_eq!(
            of(None, Some(b"<tiff:Orientation>9<")),
            Orientation::NoTransforms
        );
        let exif =
            [&b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0\0\0\0\0"[..]].concat();
        assert_eq!(
            of(Some(&exif), Some(b"<tiff:Orientation>6<")),
            Orientation::Rotate180
        );
    }
}
