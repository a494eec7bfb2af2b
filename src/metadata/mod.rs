//! What a picture carries besides pixels: EXIF, ICC profile, XMP, PNG text. Read from each format, kept for the output,
//! joined by our own settings, and searched for the prompt.

pub(crate) mod a1111;
mod color;
pub(crate) mod comfy;
mod density;
pub(crate) mod exif;
pub(crate) mod exif_tiff;
pub(crate) mod iptc;
pub(crate) mod jpeg;
pub(crate) mod orientation;

use std::borrow::Cow;

pub use self::a1111::{FoundPrompt, Parameters};
pub use self::color::StatedColor;
pub use self::density::Density;
use self::exif::{ByteOrder, Comment, Directory, Exif, NOTE};
use crate::limits::{Budget, ReadLimits};

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
    /// IPTC records (captions, credits, keywords), as JPEG and TIFF files hold them.
    pub iptc: Option<Vec<u8>>,
    /// How many pixels a printed length takes.
    pub density: Option<Density>,
    /// The colour space where a PNG states it without a profile.
    pub color: Option<StatedColor>,
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

impl Metadata {
    /// Everything a PNG's chunks hold; text that cannot be inflated, or does not fit into `budget`, is left out.
    pub(crate) fn from_png(info: &png::Info, budget: &mut Budget) -> Self {
        let mut metadata = Self {
            exif: budget.keep("EXIF", info.exif_metadata.as_ref().map(|e| e.to_vec())),
            icc: budget.keep(
                "the colour profile",
                info.icc_profile.as_ref().map(|p| p.to_vec()),
            ),
            density: Density::from_png(info),
            color: StatedColor::from_png(info),
            ..Self::default()
        };
        for chunk in &info.uncompressed_latin1_text {
            metadata.add_text(&chunk.keyword, chunk.text.clone(), budget);
        }
        // Text that turns out too long has been inflated for nothing, which may not be asked for without end.
        let mut work = budget.left().saturating_mul(8);
        for chunk in &info.compressed_latin1_text {
            let mut chunk = chunk.clone();
            let limit = budget.left().min(work);
            let inflated = chunk.decompress_text_with_limit(limit);
            let text = inflated.and_then(|()| chunk.get_text());
            work -= text.as_ref().map_or(limit, String::len).min(work);
            metadata.add_inflated(&chunk.keyword, text, budget);
        }
        for chunk in &info.utf8_text {
            let mut chunk = chunk.clone();
            let limit = budget.left().min(work);
            let inflated = chunk.decompress_text_with_limit(limit);
            let text = inflated.and_then(|()| chunk.get_text());
            work -= text.as_ref().map_or(limit, String::len).min(work);
            metadata.add_inflated(&chunk.keyword, text, budget);
        }
        metadata
    }

    /// The parts that fit into `limits`, and a sentence on those that do not.
    pub(crate) fn within(self, limits: &ReadLimits) -> (Self, Option<String>) {
        let mut budget = limits.budget();
        let kept = Self {
            exif: budget.keep("EXIF", self.exif),
            icc: budget.keep("the colour profile", self.icc),
            xmp: budget.keep("XMP", self.xmp),
            text: self.text,
            iptc: budget.keep("IPTC", self.iptc),
            density: self.density,
            color: self.color,
        };
        (kept, budget.warning())
    }

    fn add_inflated(
        &mut self,
        key: &str,
        text: Result<String, png::DecodingError>,
        budget: &mut Budget,
    ) {
        match text {
            Ok(text) => self.add_text(key, text, budget),
            Err(error) if is_too_long(&error) => budget.refuse(format!("the text `{key}`")),
            Err(_) => {}
        }
    }

    fn add_text(&mut self, key: &str, text: String, budget: &mut Budget) {
        if !budget.take(|| format!("the text `{key}`"), text.len()) {
            return;
        }
        match key {
            XMP_KEY => self.xmp = Some(text.into_bytes()),
            // ImageMagick's EXIF in text; a real eXIf chunk comes first, as it is what others rewrite.
            "Raw profile type exif" | "Raw profile type APP1" => {
                let raw = raw_profile(&text).filter(|raw| Exif::parse(raw).is_some());
                let raw = raw.map(|raw| {
                    raw.strip_prefix(b"Exif\0\0")
                        .map(<[u8]>::to_vec)
                        .unwrap_or(raw)
                });
                self.exif = self.exif.take().or(raw);
            }
            _ => self.text.push((key.to_owned(), text)),
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

    fn block(&self) -> Option<Exif<'_>> {
        Exif::parse(self.exif.as_deref()?)
    }

    /// What a program that makes pictures wrote into the EXIF comment, or into the history beside a person's comment.
    fn generated_in_exif(&self) -> Option<String> {
        let block = self.block()?;
        let comment = match block.comment() {
            Comment::Text(text) => Some(text),
            Comment::Empty | Comment::Opaque => None,
        };
        [comment, block.history()]
            .into_iter()
            .flatten()
            .find(|text| a1111::is_generated(text))
    }

    /// The prompt that the file's metadata states: A1111's `parameters` (PNG text or EXIF), or ComfyUI's graph. What a
    /// camera or a person wrote into the EXIF comment is none.
    pub fn prompt(&self) -> Option<FoundPrompt> {
        let a1111 = || a1111::from_parameters(&as_utf8(self.text(PARAMETERS)?));
        let in_exif = || a1111::from_parameters(&self.generated_in_exif()?);
        let graph = || comfy::from_graph(&as_utf8(self.text("prompt")?));
        let graph_in_exif = || {
            let block = self.block()?;
            [exif::MODEL, exif::MAKE].into_iter().find_map(|tag| {
                let text = block.text(Directory::Main, tag)?;
                let json = text
                    .strip_prefix("prompt:")
                    .or(text.strip_prefix("Prompt:"))?;
                comfy::from_graph(json)
            })
        };
        a1111()
            .or_else(in_exif)
            .or_else(graph)
            .or_else(graph_in_exif)
    }

    /// A1111's `parameters`, from text or from EXIF, where a program that makes pictures wrote them.
    pub fn parameters(&self) -> Option<String> {
        let text = self.text(PARAMETERS).map(str::to_owned);
        text.or_else(|| self.generated_in_exif())
    }

    /// Adds our settings to what the file says about its making, of which nothing is lost (see [`Parameters::after`]). An
    /// EXIF comment of a camera or a person stays as it is.
    pub fn add_settings(&mut self, settings: &Parameters) {
        let existing = self.parameters();
        match settings.after(existing.as_deref().unwrap_or_default()) {
            Some(text) => self.set_text(PARAMETERS, text),
            None => {
                let earlier = self.text(POSTPROCESSING).map(str::to_owned);
                let earlier = earlier.or_else(|| self.block()?.history());
                let text = settings.after(earlier.as_deref().unwrap_or_default());
                let text = text.unwrap_or_else(|| settings.to_parameters());
                self.set_text(POSTPROCESSING, text);
            }
        }
    }

    /// The EXIF block for a file of upright pixels of this size; its own list of what is lost includes what could not be
    /// put into it.
    pub(crate) fn exif_block(
        &self,
        width: usize,
        height: usize,
        text: TextGoes,
    ) -> Option<Exif<'_>> {
        let texts: Vec<&str> = match text {
            TextGoes::IntoExif => [PARAMETERS, POSTPROCESSING]
                .iter()
                .filter_map(|key| self.text(key))
                .collect(),
            TextGoes::Elsewhere => Vec::new(),
        };
        // PNG has a chunk for it, and JPEG a segment; what stands in EXIF too stays.
        let density = self.density.filter(|_| text == TextGoes::IntoExif);
        let mut block = match self.block() {
            Some(block) => block,
            // Big-endian, so that the comment's UTF-16BE is in the block's own order.
            None if !texts.is_empty() || density.is_some() => Exif::new(ByteOrder::Big),
            None => return None,
        };
        block.fit(width, height);
        if let Some(density) = density {
            density.into_exif(&mut block);
        }
        for text in texts {
            put_text(&mut block, text);
        }
        Some(block)
    }

    /// [`Self::exif_block`] as bytes.
    pub(crate) fn exif_for(&self, width: usize, height: usize, text: TextGoes) -> Option<Vec<u8>> {
        self.exif_block(width, height, text)?.to_bytes()
    }

    /// [`Self::exif_for`] with ComfyUI's graph and workflow where ComfyUI keeps them in WebP files.
    pub(crate) fn exif_for_webp(&self, width: usize, height: usize) -> Option<Vec<u8>> {
        let block = self.exif_block(width, height, TextGoes::IntoExif);
        let graphs: Vec<_> = COMFY
            .iter()
            .filter_map(|(key, tag)| Some((key, *tag, self.text(key)?)))
            .collect();
        if graphs.is_empty() {
            return block?.to_bytes();
        }
        let mut block = block.unwrap_or_else(|| Exif::new(ByteOrder::Big));
        for (key, tag, json) in graphs {
            if block.field(Directory::Main, tag).is_none() {
                block.set_text(Directory::Main, tag, &format!("{key}:{json}"));
            }
        }
        block.to_bytes()
    }

    /// The density that a file without one of its own states in EXIF.
    pub(crate) fn or_density_in_exif(mut self) -> Self {
        self.density = self.density.or_else(|| Density::from_exif(&self.block()?));
        self
    }

    /// What of the EXIF block does not go into a file: a list for a message. `in_tiff`: a TIFF file has no place where
    /// the camera's maker note can keep its offset.
    pub(crate) fn lost_exif(&self, in_tiff: bool) -> Vec<String> {
        let Some(mut block) = self.block() else {
            return match self.exif {
                Some(_) => vec!["EXIF (damaged)".into()],
                None => Vec::new(),
            };
        };
        let mut lost = block.lost().to_vec();
        if in_tiff && block.drop_bound_note() {
            lost.push(NOTE.into());
        }
        lost
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

    /// The profile for pixels of a file that is no PNG: [`Self::icc_for`], or one that says what a PNG stated otherwise.
    pub(crate) fn profile_for(&self, gray: bool) -> Option<Cow<'_, [u8]>> {
        let overruled = self.color.is_some_and(|color| color.cicp.is_some());
        let stated = || Some(Cow::Owned(self.color?.profile(gray)?));
        let given = || self.icc_for(gray).map(Cow::Borrowed);
        match (overruled, &self.icc) {
            (true, _) => stated().or_else(given),
            (false, Some(_)) => given(),
            (false, None) => stated(),
        }
    }

    /// Whether the colours are not those of sRGB, by what the file states without a profile.
    pub(crate) fn states_other_color(&self) -> bool {
        self.icc.is_none() && self.color.is_some_and(|color| !color.is_srgb())
    }

    /// What decides how the pixels look, and nothing else: the colour profile.
    pub fn color_only(self) -> Self {
        Self {
            icc: self.icc,
            color: self.color,
            ..Self::default()
        }
    }

    /// Text that only PNG can hold: everything but what goes into EXIF.
    pub(crate) fn lost_outside_png(&self, webp: bool) -> Vec<&str> {
        let elsewhere = |key: &str| {
            [PARAMETERS, POSTPROCESSING].contains(&key)
                || (webp && COMFY.iter().any(|(k, _)| *k == key))
        };
        self.text
            .iter()
            .map(|(k, _)| k.as_str())
            .filter(|k| !elsewhere(k))
            .collect()
    }
}

/// Puts a text into the comment, or, where that holds something of another's, beside it into the history.
fn put_text(block: &mut Exif, text: &str) {
    let comment_goes_on = match block.comment() {
        Comment::Empty => true,
        Comment::Text(comment) => text.starts_with(&comment),
        Comment::Opaque => false,
    };
    if comment_goes_on {
        block.set_comment(text);
        return;
    }
    let history = block.history().unwrap_or_default();
    let history = history.trim();
    // Another's history goes on with ours on a line of its own.
    if history.is_empty() || text.starts_with(history) {
        block.set_history(text);
    } else {
        block.set_history(&format!("{history}\n{text}"));
    }
}

/// Whether inflating ended at its limit, not at damage.
fn is_too_long(error: &png::DecodingError) -> bool {
    // The error's kind is the crate's own; its `Debug` text names it.
    format!("{error:?}").contains("OutOfDecompressionSpace")
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
    fn imagemagicks_profile_text_is_decoded() {
        assert_eq!(
            raw_profile("\nexif\n       4\n45786966\n").unwrap(),
            b"Exif"
        );
        assert_eq!(raw_profile("\nexif\n       5\n45786966\n"), None);
    }

    fn with_comment(value: &[u8]) -> Metadata {
        let mut exif = Exif::new(ByteOrder::Little);
        exif.set(Directory::Exif, 0x9286, 7, value.to_vec());
        Metadata {
            exif: exif.to_bytes(),
            ..Metadata::default()
        }
    }

    fn ours(prompt: &str) -> Parameters {
        let fields = [
            ("Steps", "20"),
            ("Sampler", "Euler"),
            ("Seed", "0"),
            ("Upscaler", "sd-upscale"),
        ];
        Parameters {
            prompt: prompt.into(),
            negative_prompt: String::new(),
            fields: fields.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec(),
        }
    }

    /// What a JPEG, WebP or TIFF file gives back.
    fn through_exif(metadata: &Metadata) -> Metadata {
        Metadata {
            exif: metadata.exif_for(2, 2, TextGoes::IntoExif),
            ..Metadata::default()
        }
    }

    #[test]
    fn a_cameras_or_a_persons_comment_is_no_prompt_and_stays_to_the_byte() {
        for value in [
            &b"ASCII\0\0\0holiday in Rome"[..],
            b"UNICODE\0h\0o\0l\0i\0d\0a\0y\0",
            b"ASCII\0\0\0Place: Rome, With: Anna, Day: Monday",
            b"ASCII\0\0\0ISO: 100, Lens: 50 mm, Mode: P\n",
            b"\0\0\0\0\0\0\0\0{\"mirror\": false, \"hdr\": \"off\"}",
            b"JIS\0\0\0\0\0\x1b$B%F%9%H\x1b(B",
            b"\0\0\0\0\0\0\0\0\xff\xfe\x01\x02",
        ] {
            let mut metadata = with_comment(value);
            assert_eq!(metadata.prompt(), None, "{value:?}");
            metadata.add_settings(&ours("a cat"));
            assert_eq!(
                metadata.text(PARAMETERS),
                Some(&*ours("a cat").to_parameters())
            );
            let once = through_exif(&metadata);
            assert_eq!(once.prompt().unwrap().prompt, "a cat", "{value:?}");
            // Twice: the first run's settings go on, the comment stays.
            let mut twice = once.clone();
            twice.add_settings(&ours("a cat"));
            let twice = through_exif(&twice);
            assert_eq!(twice.prompt().unwrap().prompt, "a cat", "{value:?}");
            let block = twice.block().unwrap();
            assert_eq!(&*block.field(Directory::Exif, 0x9286).unwrap().value, value);
            assert_eq!(block.history().unwrap().matches("sd-upscale").count(), 2);
        }
    }

    #[test]
    fn an_empty_prompt_beside_a_comment_is_not_replaced_by_it() {
        let mut metadata = with_comment(b"ASCII\0\0\0holiday in Rome");
        metadata.add_settings(&ours(""));
        let again = through_exif(&metadata);
        assert_eq!(again.prompt(), None);
        assert_eq!(
            again.block().unwrap().comment(),
            Comment::Text("holiday in Rome".into())
        );
    }

    #[test]
    fn a_blank_comment_is_taken_and_a_generators_goes_on() {
        for value in [&b"ASCII\0\0\0       "[..], b"\0\0\0\0\0\0\0\0\0\0\0"] {
            let mut metadata = with_comment(value);
            metadata.add_settings(&ours("a cat"));
            let block = through_exif(&metadata);
            let block = block.block().unwrap();
            assert_eq!(
                block.comment(),
                Comment::Text(ours("a cat").to_parameters())
            );
            assert_eq!(block.history(), None);
        }
        let theirs = "a dog\nSteps: 30, Sampler: DDIM, CFG scale: 7, Seed: 99";
        let mut metadata = with_comment(format!("ASCII\0\0\0{theirs}").as_bytes());
        metadata.add_settings(&ours("a cat"));
        let again = through_exif(&metadata);
        assert_eq!(again.prompt().unwrap().prompt, "a dog");
        match again.block().unwrap().comment() {
            Comment::Text(text) => assert!(text.starts_with(theirs) && text.contains("sd-upscale")),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn json_in_the_comment_stays_whole_with_our_settings_beside_it() {
        let json = r#"{"sui_image_params": {"prompt": "a dog"}}"#;
        let mut metadata = with_comment(format!("ASCII\0\0\0{json}").as_bytes());
        for runs in 1..=2 {
            metadata.add_settings(&ours("a cat"));
            metadata = through_exif(&metadata);
            assert_eq!(metadata.prompt().unwrap().prompt, "a dog");
            let block = metadata.block().unwrap();
            assert_eq!(block.comment(), Comment::Text(json.into()));
            assert_eq!(block.history().unwrap().matches("sd-upscale").count(), runs);
        }
    }

    #[test]
    fn a_damaged_block_is_named_as_lost() {
        let metadata = Metadata {
            exif: Some(b"II*\0\x04\0\0\0".to_vec()),
            ..Metadata::default()
        };
        assert_eq!(metadata.lost_exif(false), ["EXIF (damaged)"]);
        assert!(Metadata::default().lost_exif(true).is_empty());
    }
}
