//! What a picture carries besides pixels: EXIF, ICC profile, XMP, PNG text. Read from each format, kept for the output,
//! joined by our own settings, and searched for the prompt.

mod a1111;
pub(crate) mod comfy;
pub(crate) mod exif;
pub(crate) mod exif_tiff;

pub use self::a1111::{FoundPrompt, Parameters};
use self::exif::{ByteOrder, Exif};

/// Metadata as the formats share it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    /// An EXIF block from its TIFF header on (`II*\0` or `MM\0*`).
    pub exif: Option<Vec<u8>>,
    /// An ICC profile.
    pub icc: Option<Vec<u8>>,
    /// An XMP packet (XML).
    pub xmp: Option<Vec<u8>>,
    /// PNG text: key and value, in file order. A1111's `parameters` of any format is kept here.
    pub text: Vec<(String, String)>,
}

/// What becomes of the `parameters` in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TextGoes {
    /// Into the EXIF comment, as A1111 does where the format has no text of its own.
    IntoExif,
    /// Into text chunks.
    Elsewhere,
}

/// The PNG text key that holds XMP.
pub(crate) const XMP_KEY: &str = "XML:com.adobe.xmp";
/// The PNG text key of A1111's settings.
const PARAMETERS: &str = "parameters";
/// Where ours go if `parameters` is another program's JSON; A1111's own upscalers write theirs here.
const POSTPROCESSING: &str = "postprocessing";
/// ComfyUI's PNG text keys; in WebP it keeps them in EXIF as `prompt:{...}` and `workflow:{...}`.
const COMFY: [(&str, u16); 2] = [("prompt", exif::MODEL), ("workflow", exif::MAKE)];

/// The compressed texts of a file are not inflated beyond this, all together: ComfyUI workflows reach a few megabytes.
const MAX_TEXT_BYTES: usize = 32 << 20;

impl Metadata {
    /// Everything a PNG's chunks hold; compressed text is left out from the first on that cannot be inflated, or that
    /// makes more than [`MAX_TEXT_BYTES`] with those before it.
    pub(crate) fn from_png(info: &png::Info) -> Self {
        let mut metadata = Self {
            exif: info.exif_metadata.as_ref().map(|e| e.to_vec()),
            icc: info.icc_profile.as_ref().map(|p| p.to_vec()),
            ..Self::default()
        };
        for chunk in &info.uncompressed_latin1_text {
            metadata.add_text(&chunk.keyword, &chunk.text);
        }
        let mut room = MAX_TEXT_BYTES;
        for chunk in &info.compressed_latin1_text {
            let mut chunk = chunk.clone();
            let inflated = chunk.decompress_text_with_limit(room);
            let text = inflated.and_then(|()| chunk.get_text()).ok();
            metadata.add_inflated(&chunk.keyword, text, &mut room);
        }
        for chunk in &info.utf8_text {
            let mut chunk = chunk.clone();
            let inflated = chunk.decompress_text_with_limit(room);
            let text = inflated.and_then(|()| chunk.get_text()).ok();
            metadata.add_inflated(&chunk.keyword, text, &mut room);
        }
        metadata
    }

    /// Adds a text, which takes of the `room` for those to come. One that did not inflate takes all of it: it may have
    /// been inflated to the last byte that was allowed, and so may the next.
    fn add_inflated(&mut self, key: &str, text: Option<String>, room: &mut usize) {
        *room = room.saturating_sub(text.as_ref().map_or(*room, String::len));
        if let Some(text) = text {
            self.add_text(key, &text);
        }
    }

    fn add_text(&mut self, key: &str, text: &str) {
        match key {
            XMP_KEY => self.xmp = Some(text.as_bytes().to_vec()),
            // ImageMagick's EXIF in text; a real eXIf chunk comes first, as it is what others rewrite.
            "Raw profile type exif" | "Raw profile type APP1" => {
                let raw = raw_profile(text).filter(|raw| Exif::parse(raw).is_some());
                self.exif = self.exif.take().or(raw);
            }
            _ => self.text.push((key.to_owned(), text.to_owned())),
        }
    }

    /// The first PNG text under a key.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.text
            .iter()
            .find(|(k, _)| k == key)
            .map(|(_, v)| v.as_str())
    }

    fn set_text(&mut self, key: &str, value: String) {
        match self.text.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value,
            None => self.text.push((key.to_owned(), value)),
        }
    }

    fn block(&self) -> Option<Exif> {
        Exif::parse(self.exif.as_deref()?)
    }

    /// The prompt that the file's metadata states: A1111's `parameters` (PNG text or EXIF comment), or ComfyUI's graph.
    pub fn prompt(&self) -> Option<FoundPrompt> {
        let comment = || self.block()?.user_comment();
        let a1111 = || a1111::from_parameters(&as_utf8(self.text(PARAMETERS)?));
        let in_comment = || {
            // A camera's comment is no prompt: only text with settings, or JSON, counts.
            let text = comment()?;
            let marked =
                a1111::split_settings(&text).1.is_some() || text.contains("Negative prompt:");
            (marked || text.starts_with('{')).then(|| a1111::from_parameters(&text))?
        };
        let graph = || comfy::from_graph(&as_utf8(self.text("prompt")?));
        let in_exif = || {
            let block = self.block()?;
            [exif::MODEL, exif::MAKE].into_iter().find_map(|tag| {
                let text = block.text(tag)?;
                let json = text
                    .strip_prefix("prompt:")
                    .or(text.strip_prefix("Prompt:"))?;
                comfy::from_graph(json)
            })
        };
        a1111().or_else(in_comment).or_else(graph).or_else(in_exif)
    }

    /// A1111's `parameters`, from text or from the EXIF comment.
    pub fn parameters(&self) -> Option<String> {
        let text = self.text(PARAMETERS).map(str::to_owned);
        text.or_else(|| self.block()?.user_comment())
    }

    /// Adds our settings to what the file says about its making, of which nothing is lost (see [`Parameters::after`]).
    pub fn add_settings(&mut self, settings: &Parameters) {
        let existing = self.parameters();
        match settings.after(existing.as_deref().unwrap_or_default()) {
            Some(text) => self.set_text(PARAMETERS, text),
            None => self.set_text(POSTPROCESSING, settings.to_parameters()),
        }
    }

    /// The EXIF block for a file of upright pixels of this size.
    pub(crate) fn exif_for(&self, width: usize, height: usize, text: TextGoes) -> Option<Vec<u8>> {
        let parameters = match text {
            TextGoes::IntoExif => self.text(PARAMETERS),
            TextGoes::Elsewhere => None,
        };
        let mut block = match (self.block(), parameters) {
            (Some(block), _) => block,
            // Big-endian, so that the comment's UTF-16BE is in the block's own order.
            (None, Some(_)) => Exif::new(ByteOrder::Big),
            (None, None) => return None,
        };
        block.fit(width, height);
        if let Some(text) = parameters {
            block.set_user_comment(text);
        }
        Some(block.into_bytes())
    }

    /// [`Self::exif_for`] with ComfyUI's graph and workflow where ComfyUI keeps them in WebP files.
    pub(crate) fn exif_for_webp(&self, width: usize, height: usize) -> Option<Vec<u8>> {
        let block = self.exif_for(width, height, TextGoes::IntoExif);
        let graphs: Vec<_> = COMFY
            .iter()
            .filter_map(|(key, tag)| Some((key, *tag, self.text(key)?)))
            .collect();
        if graphs.is_empty() {
            return block;
        }
        let mut block = block
            .as_deref()
            .and_then(Exif::parse)
            .unwrap_or_else(|| Exif::new(ByteOrder::Big));
        for (key, tag, json) in graphs {
            if block.text(tag).is_none() {
                block.set_text(tag, &format!("{key}:{json}"));
            }
        }
        Some(block.into_bytes())
    }

    /// The XMP packet with its orientation, if it states one, set to upright.
    pub(crate) fn xmp_upright(&self) -> Option<Vec<u8>> {
        let mut xmp = self.xmp.clone()?;
        for (before, after) in [
            (&b"tiff:Orientation=\""[..], b'"'),
            (b"tiff:Orientation='", b'\''),
            (b"tiff:Orientation>", b'<'),
        ] {
            let found = xmp.windows(before.len()).position(|w| w == before);
            if let Some(at) = found.map(|at| at + before.len())
                && xmp.get(at).is_some_and(u8::is_ascii_digit)
                && xmp.get(at + 1) == Some(&after)
            {
                xmp[at] = b'1';
            }
        }
        Some(xmp)
    }

    /// The ICC profile if it is one for grey or RGB pixels, as they will be written: a CMYK file's does not fit what it
    /// was converted to.
    pub(crate) fn icc_for(&self, gray: bool) -> Option<&[u8]> {
        let icc = self.icc.as_deref()?;
        let space = if gray { b"GRAY" } else { b"RGB " };
        (icc.get(16..20) == Some(space)).then_some(icc)
    }

    /// Text that only PNG can hold: everything but what goes into EXIF.
    pub(crate) fn lost_outside_png(&self, webp: bool) -> Vec<&str> {
        let elsewhere =
            |key: &str| key == PARAMETERS || (webp && COMFY.iter().any(|(k, _)| *k == key));
        self.text
            .iter()
            .map(|(k, _)| k.as_str())
            .filter(|k| !elsewhere(k))
            .collect()
    }
}

/// Some programs write UTF-8 into chunks that are Latin-1 by the standard.
fn as_utf8(text: &str) -> String {
    let bytes: Option<Vec<u8>> = text
        .chars()
        .map(|c| u8::try_from(u32::from(c)).ok())
        .collect();
    bytes
        .and_then(|b| String::from_utf8(b).ok())
        .unwrap_or_else(|| text.to_owned())
}

/// ImageMagick's text form of a profile: name, length, hexadecimal digits.
fn raw_profile(text: &str) -> Option<Vec<u8>> {
    let mut words = text.split_ascii_whitespace().skip(1);
    let length: usize = words.next()?.parse().ok()?;
    let digits: Vec<u8> = words.flat_map(str::bytes).collect();
    let byte = |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    let bytes: Option<Vec<u8>> = digits.as_chunks().0.iter().map(byte).collect();
    bytes.filter(|b| b.len() == length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xmp_orientation_is_reset_in_attribute_and_element_form_and_nothing_else_changes() {
        for (before, after) in [
            (
                r#"<a tiff:Orientation="6" tiff:Make="C">"#,
                r#"<a tiff:Orientation="1" tiff:Make="C">"#,
            ),
            (
                "<tiff:Orientation>8</tiff:Orientation>",
                "<tiff:Orientation>1</tiff:Orientation>",
            ),
            ("<a tiff:Orientation=\"", "<a tiff:Orientation=\""),
        ] {
            let metadata = Metadata {
                xmp: Some(before.into()),
                ..Metadata::default()
            };
            assert_eq!(metadata.xmp_upright().unwrap(), after.as_bytes());
        }
    }

    #[test]
    fn utf8_in_a_latin1_chunk_is_understood_and_latin1_is_left_alone() {
        let mojibake: String = "日本".bytes().map(char::from).collect();
        assert_eq!(as_utf8(&mojibake), "日本");
        assert_eq!(as_utf8("Ürsprung"), "Ürsprung");
        assert_eq!(as_utf8("日本"), "日本");
    }

    #[test]
    fn the_compressed_texts_of_a_png_are_bounded_all_together() {
        let large = |key: &str| {
            let mut chunk = png::text_metadata::ZTXtChunk::new(key, "x".repeat(20 << 20));
            chunk.compress_text().unwrap();
            chunk
        };
        let mut info = png::Info::with_size(1, 1);
        info.compressed_latin1_text = vec![large("first"), large("second"), large("third")];
        info.uncompressed_latin1_text =
            vec![png::text_metadata::TEXtChunk::new("parameters", "a cat")];
        let metadata = Metadata::from_png(&info);
        let keys: Vec<&str> = metadata.text.iter().map(|(key, _)| &**key).collect();
        assert_eq!(keys, ["parameters", "first"]);
    }

    #[test]
    fn imagemagicks_profile_text_is_decoded() {
        assert_eq!(
            raw_profile("\nexif\n       4\n45786966\n").unwrap(),
            b"Exif"
        );
        assert_eq!(raw_profile("\nexif\n       5\n45786966\n"), None);
    }

    #[test]
    fn a_cameras_comment_is_no_prompt() {
        let mut exif = Exif::new(ByteOrder::Little);
        exif.set_user_comment("holiday in Rome");
        let metadata = Metadata {
            exif: Some(exif.into_bytes()),
            ..Metadata::default()
        };
        assert_eq!(metadata.prompt(), None);
    }
}
