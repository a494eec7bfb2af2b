//! Which way up a picture is: EXIF says it, or else XMP.

use image::metadata::Orientation;

/// The orientation that the metadata state; upright where they state none.
pub(crate) fn of(exif: Option<&[u8]>, xmp: Option<&[u8]>) -> Orientation {
    let in_exif = exif.and_then(Orientation::from_exif_chunk);
    let in_xmp = || Orientation::from_exif(in_xmp(xmp?)?);
    in_exif.or_else(in_xmp).unwrap_or(Orientation::NoTransforms)
}

/// The value of `tiff:Orientation`, an attribute or an element.
fn in_xmp(xmp: &[u8]) -> Option<u8> {
    let text = String::from_utf8_lossy(xmp);
    for (at, name) in text.match_indices("tiff:Orientation") {
        let rest = &text[at + name.len()..];
        let value = rest.trim_start().strip_prefix(['=', '>']);
        let value = value.map(|v| v.trim_start_matches(|c: char| c.is_whitespace() || c == '"' || c == '\''));
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
            assert_eq!(of(None, Some(xmp.as_bytes())), Orientation::Rotate90, "{xmp}");
        }
        assert_eq!(of(None, Some(b"<tiff:Orientation>9<")), Orientation::NoTransforms);
        let exif = [&b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0\0\0\0\0"[..]].concat();
        assert_eq!(of(Some(&exif), Some(b"<tiff:Orientation>6<")), Orientation::Rotate180);
    }
}
