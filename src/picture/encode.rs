//! [`Picture`], or its lines as they come -> a PNG, JPEG, WebP, TIFF, BMP or JPEG XL file, with the metadata that the format can hold.

use std::io::{BufWriter, Cursor, Seek, Write};

use anyhow::{Context, Result, bail, ensure};

use super::rows::{NextLines, Outline};
use super::{
    Depth, Format, PIECE, Picture, encode_bmp, encode_jpeg, encode_jxl, encode_png, encode_tiff,
    encode_webp,
};
use crate::metadata::Density;
use crate::metadata::jpeg::COMMENT;

/// JPEG quality where none is given: artefacts are below what one sees, at a third of the size of 100.
pub const DEFAULT_JPEG_QUALITY: u8 = 95;

/// An encoded file, and what the format could not keep.
#[derive(Debug)]
pub struct Encoded {
    /// The whole file.
    pub bytes: Vec<u8>,
    /// One a thing that the format could not keep.
    pub warnings: Vec<String>,
}

/// Encodes a picture. `quality` is 1..=100 for JPEG (default 95) and WebP (default: lossless); it means nothing to
/// the others. Transparent pixels are laid on white where the format has no alpha; a warning says so.
///
/// # Errors
/// The format cannot be written, or not at this size.
pub fn encode(picture: &Picture, format: Format, quality: Option<u8>) -> Result<Encoded> {
    let row = 3 * picture.pixels.width;
    let mut pieces = picture.pixels.values.chunks((PIECE * row).max(1));
    let mut next = || {
        pieces
            .next()
            .map(<[f32]>::to_vec)
            .context("lines are missing")
    };
    let mut bytes = Cursor::new(Vec::new());
    let outline = Outline::of(picture);
    let warnings = encode_lines(&outline, format, quality, &mut next, &mut bytes)?;
    Ok(Encoded {
        bytes: bytes.into_inner(),
        warnings,
    })
}

/// Encodes a picture whose lines come as they are asked for, into `out` from its beginning: the file that [`encode`] gives. Of
/// the picture a few lines are in memory at a time; of a WebP or JPEG XL all, as their samples. Gives one warning a thing that the
/// format could not keep.
///
/// # Errors
/// Those of [`encode`], of `next` and of `out`, which then holds a part of a file.
pub fn encode_lines(
    outline: &Outline,
    format: Format,
    quality: Option<u8>,
    next: NextLines,
    out: &mut (impl Write + Seek),
) -> Result<Vec<String>> {
    let (w, h) = (outline.width, outline.height);
    let most = format.max_side();
    ensure!(
        w <= most && h <= most,
        "a {} file holds at most {most} pixels a side, but the picture has {w}x{h}; write it as PNG",
        format.name()
    );
    let mut warnings = Vec::new();
    if outline.alpha.is_some() && !format.keeps_alpha() {
        warnings.push(format!(
            "{} keeps no transparency: laid on white",
            format.name()
        ));
    }
    if format == Format::Jxl && outline.alpha.is_some() && outline.depth == Depth::Sixteen {
        warnings.push("8 bits of 16: JPEG XL is written with 8 where there is transparency".into());
    }
    let mut out = BufWriter::with_capacity(BUFFER, out);
    let encoded = match format {
        Format::Png => encode_png::encode(outline, next, &mut out),
        Format::Jpeg => {
            let quality = quality.unwrap_or(DEFAULT_JPEG_QUALITY);
            encode_jpeg::encode(outline, quality, next, &mut out)
                .map(|dropped| warnings.extend(dropped))
        }
        Format::WebP => encode_webp::encode(outline, quality, next, &mut out),
        Format::Tiff => encode_tiff::encode(outline, next, &mut out),
        Format::Bmp => encode_bmp::encode(outline, next, &mut out),
        Format::Jxl => encode_jxl::encode(outline, next, &mut out),
        Format::Gif | Format::Heif => {
            bail!(
                "{} is read, but not written; choose PNG, JPEG, WebP, TIFF, BMP or JPEG XL",
                format.name()
            )
        }
    };
    encoded
        .and_then(|()| Ok(out.flush()?))
        .with_context(|| format!("cannot encode the {w}x{h} picture as {}", format.name()))?;
    warnings.extend(lost_metadata(outline, format));
    Ok(warnings)
}

/// Bytes of a file that are written at once.
const BUFFER: usize = 1 << 16;

/// What of the metadata the format cannot hold, in a sentence.
fn lost_metadata(outline: &Outline, format: Format) -> Option<String> {
    let metadata = &outline.metadata;
    let exif = match format {
        Format::Bmp => Vec::new(),
        _ => metadata.lost_exif(format == Format::Tiff),
    };
    let mut lost: Vec<&str> = match format {
        Format::Png => Vec::new(),
        _ => metadata.lost_outside_png(format == Format::WebP),
    };
    lost.extend(exif.iter().map(String::as_str));
    if format == Format::Jpeg {
        lost.retain(|key| *key != COMMENT);
    }
    let gray = outline.keeps_gray(format);
    let profile = match format {
        Format::Bmp | Format::Jxl => None,
        // PNG has chunks for what is stated without a profile.
        Format::Png => metadata.icc_for(gray).map(Into::into),
        _ => metadata.profile_for(gray),
    };
    if metadata.icc.is_some() && profile.is_none() {
        lost.push("the colour profile");
    } else if metadata.states_other_color() && profile.is_none() && format != Format::Png {
        lost.push("the colour space (gAMA, cHRM or cICP)");
    }
    if metadata.iptc.is_some() && !matches!(format, Format::Jpeg | Format::Tiff) {
        lost.push("IPTC");
    }
    if format == Format::Bmp && matches!(metadata.density, Some(Density::Ratio(..))) {
        lost.push("the shape of pixels");
    }
    if format == Format::Bmp {
        let others = [
            ("EXIF", metadata.exif.is_some()),
            ("XMP", metadata.xmp.is_some()),
        ];
        lost.extend(
            others
                .iter()
                .filter(|(_, there)| *there)
                .map(|(name, _)| name),
        );
    }
    (!lost.is_empty()).then(|| format!("not kept in {}: {}", format.name(), lost.join(", ")))
}
