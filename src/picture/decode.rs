//! Image bytes -> [`Picture`]: pixels turned upright, metadata kept, truncation refused. Formats whose files need more than
//! their decoder have a file of their own.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::{Context, Result, anyhow, bail};
use image::codecs::bmp::BmpDecoder;
use image::codecs::gif::GifDecoder;
use image::codecs::webp::WebPDecoder;
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, Limits};

use super::tiff::{self, Directory};
use super::{
    Format, Picture, decode_bmp, decode_gif, decode_jpeg, decode_jxl, decode_png, heif, structure,
    words,
};
use crate::limits::ReadLimits;
use crate::metadata::exif::{self, Exif};
use crate::metadata::{Density, Metadata, iptc, orientation};

/// Decodes a whole file of a known format. Errors say in one line what is wrong with the content and what would help; the
/// caller adds the name.
pub(crate) fn decode(format: Format, bytes: &[u8], limits: &ReadLimits) -> Result<Picture> {
    let read = || match format {
        Format::Png => decode_png::decode(bytes, limits),
        Format::Jpeg => decode_jpeg::decode(bytes, limits),
        Format::WebP => webp(bytes, limits),
        Format::Tiff => tiff(bytes, limits),
        Format::Bmp => bmp(bytes, limits),
        Format::Jxl => decode_jxl::decode(bytes, limits),
        Format::Heif => heif::decode(bytes, limits),
        Format::Gif => gif(bytes, limits),
    };
    // A decoder that panics on a damaged file must not take the other files with it. It owns all that it changes.
    let read =
        catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err(anyhow!(words::PANICKED)));
    read.map_err(|error| {
        let text = match error.downcast_ref::<ImageError>() {
            Some(error) => words::of_image(error),
            None => match error.downcast_ref::<png::DecodingError>() {
                Some(error) => words::of_png(error),
                None => format!("{error:#}"),
            },
        };
        anyhow!(
            "this {} image cannot be decoded: {}",
            format.name(),
            words::with_cure(&text)
        )
    })
}

fn webp(bytes: &[u8], limits: &ReadLimits) -> Result<Picture> {
    let chunks = structure::webp_chunks(bytes)
        .context("it ends before the length its header states: the file was cut short")?;
    let frames = chunks.iter().filter(|(name, _)| name == b"ANMF").count();
    let decoder = WebPDecoder::new(Cursor::new(bytes))?;
    finish(decoder, Format::WebP, limits, words::dropped_frames(frames))
}

/// A TIFF's fields of IPTC records and of Photoshop's resources.
const IPTC: u16 = 33723;
const PHOTOSHOP: u16 = 34377;

fn tiff(bytes: &[u8], limits: &ReadLimits) -> Result<Picture> {
    let directory = Directory::first(bytes)?;
    let page = tiff::decode(bytes, &directory, limits)?;
    let mut warnings = page.warnings;
    if directory.has_next() {
        warnings.push("several pages: the first is used, the others are dropped".into());
    }
    let stated = TiffStated::read(bytes, &directory, limits);
    warnings.extend(stated.warnings);
    Ok(Picture::from_decoded(
        page.image,
        stated.orientation,
        Format::Tiff,
        stated.metadata,
        warnings,
    ))
}

/// What a TIFF's directories say of the picture.
pub(super) struct TiffStated {
    pub metadata: Metadata,
    pub orientation: Orientation,
    warnings: Vec<String>,
}

impl TiffStated {
    pub fn read(bytes: &[u8], directory: &Directory, limits: &ReadLimits) -> Self {
        let mut warnings = Vec::new();
        let block = Exif::from_tiff(bytes);
        let lost = block.as_ref().map(Exif::lost).unwrap_or_default();
        if !lost.is_empty() {
            warnings.push(format!("not read: {}", lost.join(", ")));
        }
        let raw = |tag| directory.raw(tag).map(<[u8]>::to_vec);
        let (metadata, warning) = Metadata {
            exif: block
                .filter(|block| !block.is_empty())
                .and_then(|block| block.to_bytes()),
            icc: raw(exif::ICC),
            xmp: raw(exif::XMP),
            iptc: raw(IPTC).or_else(|| iptc::from_resources(directory.raw(PHOTOSHOP)?)),
            ..Metadata::default()
        }
        .or_density_in_exif()
        .within(limits);
        warnings.extend(warning);
        let stated = directory.number(tiff::ORIENTATION).ok().flatten();
        let stated = stated.and_then(|n| Orientation::from_exif(u8::try_from(n).ok()?));
        let orientation = stated.unwrap_or_else(|| orientation::of(None, metadata.xmp.as_deref()));
        Self {
            metadata,
            orientation,
            warnings,
        }
    }
}

fn bmp(bytes: &[u8], limits: &ReadLimits) -> Result<Picture> {
    let known = decode_bmp::with_known_header(bytes, limits)?;
    let decoder = BmpDecoder::new(Cursor::new(&known[..]))?;
    let mut picture = finish(decoder, Format::Bmp, limits, Vec::new())?;
    picture.metadata.density = Density::from_bmp(bytes);
    Ok(picture)
}

fn gif(bytes: &[u8], limits: &ReadLimits) -> Result<Picture> {
    let first = decode_gif::first_frame(bytes)?;
    let decoder = GifDecoder::new(Cursor::new(&first.bytes))?;
    finish(decoder, Format::Gif, limits, first.warnings)
}

/// Decodes the pixels once the size has been checked, and collects what `image` knows of the metadata.
fn finish<D: ImageDecoder>(
    mut decoder: D,
    format: Format,
    limits: &ReadLimits,
    mut warnings: Vec<String>,
) -> Result<Picture> {
    limits.check_decoder(&decoder)?;
    let mut allocation = Limits::no_limits();
    allocation.max_alloc = Some(limits.max_bytes());
    decoder.set_limits(allocation)?;
    // Metadata that cannot be read is no reason to refuse the pixels.
    let exif = decoder.exif_metadata().ok().flatten();
    let (metadata, warning) = Metadata {
        // A WebP's block should begin with its TIFF header; many programs write a JPEG segment's name before it.
        exif: exif.map(|block| {
            block
                .strip_prefix(b"Exif\0\0")
                .map(<[u8]>::to_vec)
                .unwrap_or(block)
        }),
        icc: decoder.icc_profile().ok().flatten(),
        xmp: decoder.xmp_metadata().ok().flatten(),
        ..Metadata::default()
    }
    .or_density_in_exif()
    .within(limits);
    warnings.extend(warning);
    let orientation = orientation::of(metadata.exif.as_deref(), metadata.xmp.as_deref());
    let image = DynamicImage::from_decoder(decoder)?;
    if image.width() == 0 || image.height() == 0 {
        bail!("its header states a size of 0 pixels");
    }
    Ok(Picture::from_decoded(
        image,
        orientation,
        format,
        metadata,
        warnings,
    ))
}
