//! A picture's lines -> TIFF: deflated strips, EXIF and GPS as their own directories, colour profile and XMP as tags.

use std::io::{Seek, Write};

use anyhow::{Context, Result};
use flate2::Compression;
use flate2::write::ZlibEncoder;
use tiff::encoder::colortype::{self, ColorType};
use tiff::encoder::{DirectoryEncoder, Predictor, Rational, TiffEncoder, TiffKind, TiffValue};
use tiff::tags::{CompressionMethod, ResolutionUnit, SampleFormat, Tag, Type};

use super::rows::{NextLines, Outline, Rows, Sample};
use super::{Depth, Format};
use crate::metadata::TextGoes;
use crate::metadata::exif::{self, Directory};

/// Bytes of a strip before it is compressed, or a little more.
const STRIP: usize = 1_000_000;

/// Writes a file of grey, RGB or RGBA of 8 or 16 bits.
///
/// # Errors
/// It is too large for the format, or those of `out` and `next`.
pub(super) fn encode(
    outline: &Outline,
    next: NextLines,
    out: &mut (impl Write + Seek),
) -> Result<()> {
    match (outline.depth, outline.channels(Format::Tiff)) {
        (Depth::Eight, 1) => write::<colortype::Gray8>(outline, next, out),
        (Depth::Eight, 3) => write::<colortype::RGB8>(outline, next, out),
        (Depth::Eight, _) => write::<colortype::RGBA8>(outline, next, out),
        (Depth::Sixteen, 1) => write::<colortype::Gray16>(outline, next, out),
        (Depth::Sixteen, 3) => write::<colortype::RGB16>(outline, next, out),
        (Depth::Sixteen, _) => write::<colortype::RGBA16>(outline, next, out),
    }
}

fn write<C: ColorType>(
    outline: &Outline,
    next: NextLines,
    out: &mut (impl Write + Seek),
) -> Result<()>
where
    C::Inner: Sample,
    [C::Inner]: TiffValue,
{
    let mut encoder = TiffEncoder::new(out)?;
    let metadata = &outline.metadata;
    let mut block = metadata.exif_block(outline.width, outline.height, TextGoes::IntoExif);
    if let Some(block) = &mut block {
        block.drop_bound_note();
    }
    let fields = |directory| {
        block
            .as_ref()
            .map(|block| block.for_tiff(directory))
            .unwrap_or_default()
    };
    // Those that are pointed to before those that point.
    let mut pointers: Vec<(Directory, u16, u32)> = Vec::new();
    for directory in [Directory::Interop, Directory::Exif, Directory::Gps] {
        let (fields, inner) = (fields(directory), take(&mut pointers, directory));
        if let (Some((parent, tag)), false) =
            (directory.pointer(), fields.is_empty() && inner.is_empty())
        {
            let mut extra = encoder.extra_directory()?;
            put(&mut extra, fields)?;
            for (_, tag, offset) in inner {
                extra.write_tag(Tag::Unknown(tag), offset)?;
            }
            let offset = extra.finish_with_offsets()?.offset;
            pointers.push((parent, tag, offset));
        }
    }
    let mut main = encoder.image_directory()?;
    let mut rows = Rows::new(outline, Format::Tiff, next)?;
    let lines = STRIP.div_ceil(rows.length() * size_of::<C::Inner>());
    describe::<C, _, _>(&mut main, outline, lines)?;
    put(&mut main, fields(Directory::Main))?;
    for (_, tag, offset) in pointers {
        main.write_tag(Tag::Unknown(tag), offset)?;
    }
    if let Some(icc) = metadata.profile_for(outline.keeps_gray(Format::Tiff)) {
        let icc = vec![(exif::ICC, Type::UNDEFINED.to_u16(), icc.into_owned())];
        put(&mut main, icc)?;
    }
    if let Some(records) = &metadata.iptc {
        const IPTC: u16 = 33723;
        let records = vec![(IPTC, Type::UNDEFINED.to_u16(), records.clone())];
        put(&mut main, records)?;
    }
    if let Some(xmp) = metadata.xmp_upright() {
        put(&mut main, vec![(exif::XMP, Type::BYTE.to_u16(), xmp)])?;
    }
    write_strips::<C, _, _>(&mut main, &mut rows, outline.height, lines)?;
    main.finish()?;
    Ok(())
}

/// What a directory says of its picture, of `lines` lines a strip. (`tiff` writes strips that come one by one uncompressed, whatever
/// the compression that it was told.)
fn describe<C: ColorType, W: Write + Seek, K: TiffKind>(
    main: &mut DirectoryEncoder<W, K>,
    outline: &Outline,
    lines: usize,
) -> Result<()> {
    main.write_tag(Tag::ImageWidth, outline.width as u32)?;
    main.write_tag(Tag::ImageLength, outline.height as u32)?;
    main.write_tag(Tag::Compression, CompressionMethod::Deflate.to_u16())?;
    main.write_tag(Tag::Predictor, Predictor::Horizontal.to_u16())?;
    main.write_tag(Tag::PhotometricInterpretation, C::TIFF_VALUE.to_u16())?;
    main.write_tag(Tag::RowsPerStrip, u32::try_from(lines)?)?;
    let channels = u16::try_from(C::BITS_PER_SAMPLE.len())?;
    main.write_tag(Tag::SamplesPerPixel, channels)?;
    main.write_tag(Tag::XResolution, Rational { n: 1, d: 1 })?;
    main.write_tag(Tag::YResolution, Rational { n: 1, d: 1 })?;
    main.write_tag(Tag::ResolutionUnit, ResolutionUnit::None)?;
    Ok(())
}

/// Writes the lines, and where they lie.
fn write_strips<C: ColorType, W: Write + Seek, K: TiffKind>(
    main: &mut DirectoryEncoder<W, K>,
    rows: &mut Rows<C::Inner>,
    height: usize,
    lines: usize,
) -> Result<()>
where
    C::Inner: Sample,
    [C::Inner]: TiffValue,
{
    const TOO_LARGE: &str = "it is larger than the 4 GB that a TIFF file can hold";
    let length = rows.length();
    let (mut offsets, mut counts) = (Vec::new(), Vec::new());
    for top in (0..height).step_by(lines) {
        let strip = rows.take(lines.min(height - top))?;
        let mut left = Vec::with_capacity(strip.len());
        for line in strip.chunks_exact(length) {
            C::horizontal_predict(line, &mut left);
        }
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::new(6));
        encoder.write_all(&left.as_slice().data())?;
        let strip = encoder.finish()?;
        offsets.push(u32::try_from(main.write_data(strip.as_slice())?).context(TOO_LARGE)?);
        counts.push(u32::try_from(strip.len()).context(TOO_LARGE)?);
    }
    let formats: Vec<u16> = C::SAMPLE_FORMAT.iter().map(SampleFormat::to_u16).collect();
    main.write_tag(Tag::BitsPerSample, C::BITS_PER_SAMPLE)?;
    main.write_tag(Tag::SampleFormat, formats.as_slice())?;
    main.write_tag(Tag::StripOffsets, offsets.as_slice())?;
    main.write_tag(Tag::StripByteCounts, counts.as_slice())?;
    Ok(())
}

/// Takes out the pointers that belong into `directory`.
fn take(
    pointers: &mut Vec<(Directory, u16, u32)>,
    directory: Directory,
) -> Vec<(Directory, u16, u32)> {
    let (inner, rest) = pointers.drain(..).partition(|(of, ..)| *of == directory);
    *pointers = rest;
    inner
}

/// Writes fields of (tag, type, value in this machine's byte order) into a directory; types that TIFF does not know are left out.
fn put<W: Write + Seek, K: TiffKind>(
    directory: &mut DirectoryEncoder<W, K>,
    fields: Vec<(u16, u16, Vec<u8>)>,
) -> Result<()> {
    for (tag, kind, value) in fields {
        if let Some(kind) = Type::from_u16(kind) {
            let entry = directory.write_entry_bytes(kind, &value)?;
            directory
                .extend_from(&std::iter::once((Tag::from_u16_exhaustive(tag), entry)).collect());
        }
    }
    Ok(())
}
