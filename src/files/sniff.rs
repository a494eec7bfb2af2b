//! What a file is, told by its first bytes and never by its name.

use anyhow::{Result, bail, ensure};

use crate::picture::Format;

/// What a file's first bytes say it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A raster image.
    Image(Format),
    /// Safetensors, by the shape of its header.
    Safetensors,
    /// A zip, which `.npz` files are.
    Npz,
}

/// Bytes that [`sniff`] wants to see.
pub(super) const HEAD: u64 = 512;

/// Tells a file's kind from its first bytes (512 are enough). Errors name what was found where that can be told.
///
/// # Errors
/// The kind is none that is read; the message names it where it is known.
pub fn sniff(head: &[u8]) -> Result<FileKind> {
    let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|h| h.starts_with(magic));
    let image = |format| Ok(FileKind::Image(format));
    if at(0, b"\x89PNG\r\n\x1a\n") {
        return image(Format::Png);
    }
    if at(0, b"\xFF\xD8\xFF") {
        return image(Format::Jpeg);
    }
    if at(0, b"RIFF") && at(8, b"WEBP") {
        return image(Format::WebP);
    }
    if [b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"]
        .iter()
        .any(|m| at(0, *m))
    {
        return image(Format::Tiff);
    }
    if at(0, b"GIF87a") || at(0, b"GIF89a") {
        return image(Format::Gif);
    }
    if at(0, b"\xFF\x0A") || at(0, b"\0\0\0\x0CJXL \r\n\x87\n") {
        return image(Format::Jxl);
    }
    let heif = [
        &b"avif"[..],
        b"avis",
        b"heic",
        b"heix",
        b"hevc",
        b"heim",
        b"heis",
        b"mif1",
        b"msf1",
    ];
    let is_heif = at(4, b"ftyp") && heif.iter().any(|brand| at(8, brand));
    if is_heif && Format::Heif.is_read_here() {
        return image(Format::Heif);
    }
    // "BM" alone begins many a text; the length of the second header tells.
    if at(0, b"BM") && at(15, &[0, 0, 0]) && head[14] >= 12 {
        return image(Format::Bmp);
    }
    if at(0, b"PK\x03\x04") {
        return Ok(FileKind::Npz);
    }
    // A safetensors file is a 64-bit header length, then JSON.
    if at(8, b"{") && at(4, &[0, 0, 0, 0]) {
        return Ok(FileKind::Safetensors);
    }
    ensure!(!head.is_empty(), "it is empty");
    const CURE: &str = "convert it to PNG first";
    const HEIF_CURE: &str = "install libheif 1.12 or newer (Debian's package libheif1), which reads it, or convert it first: heif-convert IN OUT.png, or magick IN OUT.png";
    let (what, cure) = if is_heif {
        let what = if at(8, b"avi") {
            "an AVIF image"
        } else {
            "a HEIC image"
        };
        (what, HEIF_CURE)
    } else if at(4, b"ftyp") {
        ("a video", "extract its frames first")
    } else if at(0, b"\0\0\0\x0CjP  ") {
        ("a JPEG 2000 image", CURE)
    } else if at(0, b"v/1\x01") {
        ("an OpenEXR image", CURE)
    } else if at(0, b"8BPS") {
        ("a Photoshop document", CURE)
    } else if at(0, b"\0\0\x01\0") {
        ("an icon", CURE)
    } else if at(0, b"%PDF") {
        ("a PDF document", CURE)
    } else if at(0, b"GGUF") {
        ("a GGUF model", "give an image or latents")
    } else if at(0, b"\x93NUMPY") {
        (
            "a bare .npy array",
            "save it as safetensors, under the key `latents`",
        )
    } else if at(0, b"\x80\x02") || at(0, b"\x80\x04") {
        ("a Python pickle", "save the latents as safetensors")
    } else if head
        .iter()
        .all(|b| !b.is_ascii_control() || b.is_ascii_whitespace())
    {
        ("text", "give an image or latents")
    } else {
        bail!(
            "its content is no known format (expected PNG, JPEG, WebP, TIFF, BMP, JPEG XL or GIF, \
             or latents as .safetensors, .latent or .npz)"
        )
    };
    bail!("it is {what}, which is not supported; {cure}")
}
