//! Decoders' errors in words: one line that says what is wrong with the file, without a type's debug form, doubled text
//! or line breaks; and what would help. What they leave of animations, too.

use image::ImageError;
use zune_jpeg::errors::DecodeErrors;

/// What a file that ends too early most likely is.
pub(crate) const CUT_SHORT: &str = "it ends before its pixels do: the file was cut short";

/// A refusal with its cure, unless it names one.
pub(crate) fn with_cure(text: &str) -> String {
    if text.contains("; ") || text.contains("--max-pixels") {
        return text.to_owned();
    }
    let cure = if text.contains("cut short") {
        "copy or download it again"
    } else {
        "if another program opens it, save it again as PNG there"
    };
    format!("{text}; {cure}")
}

/// What `image` says of a GIF, WebP or BMP file.
pub(crate) fn of_image(error: &ImageError) -> String {
    match error {
        ImageError::IoError(error) => of_io(error),
        ImageError::Limits(_) => TOO_LARGE.to_owned(),
        other => known(&other.to_string()),
    }
}

/// What `png` says.
pub(crate) fn of_png(error: &png::DecodingError) -> String {
    match error {
        png::DecodingError::IoError(error) => of_io(error),
        png::DecodingError::LimitsExceeded => TOO_LARGE.to_owned(),
        other => known(&other.to_string()),
    }
}

/// What `zune-jpeg` says.
pub(crate) fn of_jpeg(error: &DecodeErrors) -> String {
    match error {
        DecodeErrors::ExhaustedData | DecodeErrors::IoErrors(_) => CUT_SHORT.to_owned(),
        DecodeErrors::HuffmanDecode(_) | DecodeErrors::MCUError(_) => {
            "its Huffman codes are damaged".into()
        }
        DecodeErrors::DqtError(_) => "its quantization tables are damaged".into(),
        DecodeErrors::SofError(_) => "the header of its frame is damaged".into(),
        DecodeErrors::SosError(_) => "the header of a scan is damaged".into(),
        DecodeErrors::ZeroError => "its header states a size of 0 pixels".into(),
        DecodeErrors::Unsupported(_) => "it is coded in a way that is not supported".into(),
        other => known(&other.to_string()),
    }
}

/// What `jxl-oxide` says, which names types of its own.
pub(crate) fn of_jxl(text: &str) -> String {
    if text.contains("::") {
        return "it is damaged (a value that its kind does not have)".into();
    }
    known(&text.replace("; ", ", "))
}

/// What a decoder that panicked is said to have met.
pub(crate) const PANICKED: &str = "its content is damaged in a way that its decoder did not expect";

const TOO_LARGE: &str = "its parts need more memory than its size allows: the file is damaged (or, if it is to be trusted, raise the limit with --max-pixels)";

fn of_io(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => CUT_SHORT.to_owned(),
        _ => known(&error.to_string()),
    }
}

/// Sentences that people meet, for what libraries say; the rest is theirs, tidied.
fn known(text: &str) -> String {
    const SAYINGS: [(&str, &str); 23] = [
        ("failed to fill whole buffer", CUT_SHORT),
        ("unexpected end of file", CUT_SHORT),
        ("unexpected EOF", CUT_SHORT),
        ("Not enough bytes", CUT_SHORT),
        ("Premature End", CUT_SHORT),
        ("Exhausted data", CUT_SHORT),
        ("CRC error", "a checksum is wrong: the file is damaged"),
        ("invalid code in LZW", "its LZW data is damaged"),
        ("invalid minimal code size", "its LZW data is damaged"),
        ("no color table", "it has no palette"),
        ("Missing palette", "it has no palette"),
        ("Not enough palette entries", "its palette is too short"),
        (
            "Number of components cannot be zero",
            "its header states no colours",
        ),
        ("can only parse 8-bit", "its samples do not have 8 bits"),
        (
            "Image too large",
            "its header states a size that no picture has",
        ),
        (
            "Negative width",
            "its header states a size that no picture has",
        ),
        (
            "Invalid image dimensions",
            "its header states a size of 0 pixels",
        ),
        ("appeared before IHDR", "its header is damaged"),
        (
            "Unrecognized critical chunk",
            "it has a chunk that no program knows: it is damaged",
        ),
        ("IDAT or fdAT chunk is missing", "it has no pixels"),
        ("Huffman", "its Huffman codes are damaged"),
        ("deflate", "its Deflate data is damaged"),
        ("Corrupt", "its compressed data is damaged"),
    ];
    let found = SAYINGS.iter().find(|(theirs, _)| text.contains(theirs));
    found.map_or_else(
        || format!("it is damaged ({})", tidy(text)),
        |(_, ours)| (*ours).to_owned(),
    )
}

/// One line without quotes, brackets of debug output and doubled parts.
fn tidy(text: &str) -> String {
    let mut parts: Vec<String> = Vec::new();
    let plain = without_structures(text).replace(['"', '\\', '`', '“', '”'], "");
    let words = plain.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in words.split(": ") {
        let part = part.trim_matches(['.', ':', ' ']);
        let wrapping = part.starts_with("Format error")
            || part.starts_with("The decoder for")
            || part.ends_with("rror")
            || part.is_empty();
        if !wrapping && !parts.iter().any(|p| p.contains(part)) {
            parts.push(part.to_owned());
        }
    }
    let mut line = parts.join(", ");
    line.retain(|c| !c.is_control());
    if let Some((end, _)) = line.char_indices().nth(160) {
        line.truncate(end);
    }
    line
}

/// `ChunkType { type: IHDR, critical: true }` -> `IHDR`; `[1, 2]` is left out.
fn without_structures(text: &str) -> String {
    let mut out = String::new();
    let mut depth = 0usize;
    for (i, c) in text.char_indices() {
        match c {
            '{' | '[' => {
                if depth == 0 && c == '{' {
                    let name = text[i..]
                        .strip_prefix("{ type: ")
                        .and_then(|rest| rest.split([',', ' ', '}']).next());
                    if out.trim_end().ends_with("ChunkType") {
                        out.truncate(out.trim_end().len() - "ChunkType".len());
                    }
                    out.push_str(name.unwrap_or_default());
                }
                depth += 1;
            }
            '}' | ']' => depth = depth.saturating_sub(1),
            _ if depth == 0 => out.push(c),
            _ => {}
        }
    }
    out
}

/// What is said of an animation of so many frames; nothing of a still picture.
pub(super) fn dropped_frames(frames: usize) -> Vec<String> {
    if frames > 1 {
        vec![format!(
            "animated: the first of {frames} frames is used, the others are dropped"
        )]
    } else {
        Vec::new()
    }
}

/// What is said where only the first frame of an animation is whole.
pub(super) const DAMAGED_LATER: &str =
    "the file was cut short or is damaged after its first frame, which is used";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_librarys_error_becomes_one_plain_line() {
        for (theirs, ours) in [
            (
                "Format error decoding Jpeg: \"Premature End of image\": \"Premature End of image\"",
                CUT_SHORT,
            ),
            (
                "ChunkType { type: iCCP, critical: false, private: false } chunk appeared before IHDR chunk",
                "its header is damaged",
            ),
            (
                "Format error decoding WebP: Invalid Chunk header: [45, 58]: Invalid Chunk header: [45, 58]",
                "it is damaged (Invalid Chunk header)",
            ),
            (
                "Chunk length wrong: ChunkType { type: IHDR, critical: true }\n",
                "it is damaged (Chunk length wrong, IHDR)",
            ),
        ] {
            assert_eq!(known(theirs), ours);
        }
    }

    #[test]
    fn every_refusal_has_a_cure_and_no_more_than_one() {
        assert!(with_cure("it has no palette").ends_with("save it again as PNG there"));
        assert!(with_cure(CUT_SHORT).ends_with("copy or download it again"));
        assert_eq!(with_cure("a; b"), "a; b");
    }
}
