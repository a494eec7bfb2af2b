//! Whether a file that an earlier run wrote is whole.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;

use super::{FileKind, sniff};
use crate::picture::{Format, heif_is_whole, jxl_is_whole, structure};

/// Whether a file at `path` is a whole image or safetensors file, by its structure (no pixel is decoded). Used to skip
/// what an earlier run finished, whatever killed it.
pub fn is_complete(path: &Path) -> bool {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|mut file| file.read_to_end(&mut bytes));
    read.is_ok() && is_whole(&bytes)
}

fn is_whole(bytes: &[u8]) -> bool {
    match sniff(bytes) {
        Ok(FileKind::Image(Format::Png)) => structure::png_is_whole(bytes),
        Ok(FileKind::Image(Format::Jpeg)) => {
            structure::map_jpeg(bytes).is_some_and(|map| map.end.is_some())
        }
        Ok(FileKind::Image(Format::WebP)) => {
            structure::webp_chunks(bytes).is_some_and(|c| !c.is_empty())
        }
        Ok(FileKind::Image(Format::Tiff)) => structure::tiff_is_whole(bytes),
        Ok(FileKind::Image(Format::Bmp)) => structure::bmp_is_whole(bytes),
        Ok(FileKind::Image(Format::Jxl)) => jxl_is_whole(bytes),
        Ok(FileKind::Image(Format::Heif)) => heif_is_whole(bytes),
        Ok(FileKind::Image(Format::Gif)) => structure::map_gif(bytes).whole,
        Ok(FileKind::Safetensors) => safetensors::SafeTensors::deserialize(bytes).is_ok(),
        Ok(FileKind::Npz) => zip::ZipArchive::new(Cursor::new(bytes)).is_ok(),
        Err(_) => false,
    }
}
