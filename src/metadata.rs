//! What a picture carries besides pixels: EXIF, ICC profile, XMP, PNG text.

/// Metadata as the formats share it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    /// An EXIF block from its TIFF header on (`II*\0` or `MM\0*`).
    pub exif: Option<Vec<u8>>,
    pub icc: Option<Vec<u8>>,
    /// An XMP packet (XML).
    pub xmp: Option<Vec<u8>>,
    /// PNG text: key and value, in file order.
    pub text: Vec<(String, String)>,
}

/// The PNG text key that holds XMP.
pub(crate) const XMP_KEY: &str = "XML:com.adobe.xmp";

/// A compressed text is not inflated beyond this: ComfyUI workflows reach a few megabytes.
const MAX_TEXT_BYTES: usize = 32 << 20;

impl Metadata {
    /// Everything a PNG's chunks hold; text that cannot be inflated is left out.
    pub(crate) fn from_png(info: &png::Info) -> Self {
        let mut metadata = Self {
            exif: info.exif_metadata.as_ref().map(|e| e.to_vec()),
            icc: info.icc_profile.as_ref().map(|p| p.to_vec()),
            ..Self::default()
        };
        for chunk in &info.uncompressed_latin1_text {
            metadata.add_text(&chunk.keyword, Some(chunk.text.clone()));
        }
        for chunk in &info.compressed_latin1_text {
            let mut chunk = chunk.clone();
            let text = chunk
                .decompress_text_with_limit(MAX_TEXT_BYTES)
                .and_then(|()| chunk.get_text());
            metadata.add_text(&chunk.keyword, text.ok());
        }
        for chunk in &info.utf8_text {
            let mut chunk = chunk.clone();
            let text = chunk
                .decompress_text_with_limit(MAX_TEXT_BYTES)
                .and_then(|()| chunk.get_text());
            metadata.add_text(&chunk.keyword, text.ok());
        }
        metadata
    }

    fn add_text(&mut self, key: &str, text: Option<String>) {
        match text {
            Some(text) if key == XMP_KEY => self.xmp = Some(text.into_bytes()),
            Some(text) => self.text.push((key.to_owned(), text)),
            None => {}
        }
    }
}
