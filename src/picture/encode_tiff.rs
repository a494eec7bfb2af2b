//! [`Picture`] -> TIFF: deflated strips, EXIF and GPS as their own directories, colour profile and XMP as tags.

use std::io::Cursor;

use anyhow::Result;
use tiff::encoder::colortype::{self, ColorType};
use tiff::encoder::{
    Compression, DeflateLevel, DirectoryEncoder, Predictor, TiffEncoder, TiffKind, TiffValue,
};
use tiff::tags::{Tag, Type};

use super::{Depth, Format, Picture, to_u8, to_u16};
use crate::metadata::TextGoes;
use crate::metadata::exif::{self, Directory};

type File<'a> = TiffEncoder<&'a mut Cursor<Vec<u8>>>;

pub(crate) fn encode(picture: &Picture) -> Result<Vec<u8>> {
    let mut file = Cursor::new(Vec::new());
    let mut encoder = TiffEncoder::new(&mut file)?
        .with_compression(Compression::Deflate(DeflateLevel::Balanced))
        .with_predictor(Predictor::Horizontal);
    let gray = picture.gray && Format::Tiff.keeps_gray(picture.alpha.is_some());
    let colored = Picture {
        gray,
        ..picture.clone()
    };
    let (samples, channels) = colored.interleaved();
    match (picture.depth, channels) {
        (Depth::Eight, 1) => write::<colortype::Gray8>(&mut encoder, &colored, &to_u8(&samples))?,
        (Depth::Eight, 3) => write::<colortype::RGB8>(&mut encoder, &colored, &to_u8(&samples))?,
        (Depth::Eight, _) => write::<colortype::RGBA8>(&mut encoder, &colored, &to_u8(&samples))?,
        (Depth::Sixteen, 1) => {
            write::<colortype::Gray16>(&mut encoder, &colored, &to_u16(&samples))?
        }
        (Depth::Sixteen, 3) => {
            write::<colortype::RGB16>(&mut encoder, &colored, &to_u16(&samples))?
        }
        (Depth::Sixteen, _) => {
            write::<colortype::RGBA16>(&mut encoder, &colored, &to_u16(&samples))?
        }
    }
    Ok(file.into_inner())
}

fn write<C: ColorType>(encoder: &mut File, picture: &Picture, data: &[C::Inner]) -> Result<()>
where
    [C::Inner]: TiffValue,
{
    let (width, height) = (picture.pixels.width, picture.pixels.height);
    let mut block = picture
        .metadata
        .exif_block(width, height, TextGoes::IntoExif);
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
    let mut image = encoder.new_image::<C>(width as u32, height as u32)?;
    let main = image.encoder();
    put(main, fields(Directory::Main))?;
    for (_, tag, offset) in pointers {
        main.write_tag(Tag::Unknown(tag), offset)?;
    }
    if let Some(icc) = picture.metadata.icc_for(picture.gray) {
        put(
            main,
            vec![(exif::ICC, Type::UNDEFINED.to_u16(), icc.to_vec())],
        )?;
    }
    if let Some(xmp) = picture.metadata.xmp_upright() {
        put(main, vec![(exif::XMP, Type::BYTE.to_u16(), xmp)])?;
    }
    image.write_data(data)?;
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
fn put<K: TiffKind>(
    directory: &mut DirectoryEncoder<&mut Cursor<Vec<u8>>, K>,
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
