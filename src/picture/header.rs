//! What a picture's file says before its pixels: size and metadata, without decoding.

use std::io::{BufRead, Seek};

use anyhow::{Context, Result, ensure};
use image::metadata::Orientation;
use image::{ImageDecoder, ImageReader};

use super::decode::TiffStated;
use super::tiff::{self, Directory};
use super::{Format, decode_jxl, heif, structure};
use crate::limits::ReadLimits;
use crate::metadata::{Metadata, orientation};

/// Size and metadata of a picture.
#[derive(Clone, Debug)]
pub struct Header {
    /// In pixels, upright.
    pub width: usize,
    /// In pixels, upright.
    pub height: usize,
    /// What stands before the pixels.
    pub metadata: Metadata,
}

impl Header {
    /// Reads no further than it must.
    ///
    /// # Errors
    /// It is damaged, or of a kind that only decoding tells the size of.
    pub fn read(format: Format, mut file: impl BufRead + Seek) -> Result<Self> {
        // The decoder makes room for whatever length a chunk of metadata states.
        if format == Format::WebP {
            ensure!(
                structure::webp_chunks_fit(&mut file)?,
                "it ends before the length its header states: the file was cut short"
            );
            file.rewind()?;
        }
        let kind = match format {
            Format::Png => return png_header(file),
            Format::Jpeg => image::ImageFormat::Jpeg,
            Format::WebP => image::ImageFormat::WebP,
            Format::Tiff => return tiff_header(file),
            Format::Jxl => return jxl_header(file),
            Format::Heif => return heif_header(file),
            Format::Bmp => image::ImageFormat::Bmp,
            Format::Gif => image::ImageFormat::Gif,
        };
        let mut decoder = ImageReader::with_format(file, kind).into_decoder()?;
        let metadata = Metadata {
            exif: decoder.exif_metadata().ok().flatten(),
            xmp: decoder.xmp_metadata().ok().flatten(),
            ..Metadata::default()
        };
        let orientation = orientation::of(metadata.exif.as_deref(), metadata.xmp.as_deref());
        Ok(Self::upright(decoder.dimensions(), orientation, metadata))
    }

    fn upright((width, height): (u32, u32), turned: Orientation, metadata: Metadata) -> Self {
        let (width, height) = match turned {
            Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH => (height, width),
            _ => (width, height),
        };
        Self {
            width: width as usize,
            height: height as usize,
            metadata,
        }
    }
}

fn png_header(file: impl BufRead + Seek) -> Result<Header> {
    let reader = png::Decoder::new(file)
        .read_info()
        .context("its header is damaged")?;
    let info = reader.info();
    let metadata = Metadata::from_png(info, &mut ReadLimits::default().budget());
    let orientation = orientation::of(metadata.exif.as_deref(), metadata.xmp.as_deref());
    Ok(Header::upright(
        (info.width, info.height),
        orientation,
        metadata,
    ))
}

/// Its boxes may stand in any order.
fn jxl_header(mut file: impl BufRead + Seek) -> Result<Header> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let (size, metadata) = decode_jxl::header(&bytes)?;
    Ok(Header::upright(size, Orientation::NoTransforms, metadata))
}

fn heif_header(mut file: impl BufRead + Seek) -> Result<Header> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let (size, metadata) = heif::header(&bytes)?;
    Ok(Header::upright(size, Orientation::NoTransforms, metadata))
}

/// A TIFF's directory may lie anywhere, mostly behind the pixels.
fn tiff_header(mut file: impl BufRead + Seek) -> Result<Header> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let directory = Directory::first(&bytes)?;
    let stated = TiffStated::read(&bytes, &directory, &ReadLimits::default());
    Ok(Header::upright(
        tiff::dimensions(&directory)?,
        stated.orientation,
        stated.metadata,
    ))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    #[test]
    fn metadata_of_a_webp_that_claims_a_gigabyte_is_refused_before_room_is_made_for_it() {
        let claiming = |length: u32| {
            let mut file = b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\x08\0\0\0\0\0\0\0\0\0".to_vec();
            file.extend(b"VP8L\x0d\0\0\0\x2f\0\0\0\x10\x07\x10\x11\x11\x88\x88\xfe\x07\0");
            file.extend([b"EXIF", &length.to_le_bytes()[..], b"Exif"].concat());
            file[4] = file.len() as u8 - 8;
            Header::read(Format::WebP, Cursor::new(file))
        };
        let header = claiming(4).unwrap();
        assert_eq!((header.width, header.height), (1, 1));
        let error = claiming(1 << 30).unwrap_err().to_string();
        assert!(error.contains("cut short"), "{error}");
    }
}
