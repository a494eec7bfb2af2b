//! Files and standard input -> pictures or latents, told apart by content and never by name.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::latents::Latents;
use crate::limits::ReadLimits;
use crate::npz;
use crate::picture::{self, Format, Picture};

/// What an input turned out to hold.
#[derive(Clone, Debug)]
pub enum Loaded {
    Picture(Picture),
    Latents(Latents),
}

/// What a file's first bytes say it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Image(Format),
    Safetensors,
    Npz,
}

/// Reads one file. Errors name the file.
pub fn read_path(path: &Path, limits: &ReadLimits) -> Result<Loaded> {
    let read = || {
        let mut file = File::open(path)?;
        ensure!(!file.metadata()?.is_dir(), "it is a folder, not a file");
        // The first bytes decide, so that a 100 GB file that is no image is not read whole.
        let mut bytes = Vec::new();
        file.by_ref().take(HEAD).read_to_end(&mut bytes)?;
        let kind = sniff(&bytes)?;
        file.read_to_end(&mut bytes)?;
        let mut loaded = parse(kind, &bytes, limits)?;
        if let (Loaded::Picture(picture), Kind::Image(format)) = (&mut loaded, kind) {
            picture.warnings.extend(misnamed(path, format));
        }
        Ok(loaded)
    };
    let named = |e: anyhow::Error| e.context(format!("cannot read {}", path.display()));
    read().map_err(named)
}

/// Reads bytes that came from elsewhere, such as standard input; `name` is what errors call them.
pub fn read_bytes(bytes: &[u8], name: &str, limits: &ReadLimits) -> Result<Loaded> {
    let read = sniff(bytes).and_then(|kind| parse(kind, bytes, limits));
    read.with_context(|| format!("cannot read {name}"))
}

/// Reads all of standard input.
pub fn read_stdin(limits: &ReadLimits) -> Result<Loaded> {
    let mut bytes = Vec::new();
    let stdin = &mut std::io::stdin().lock();
    let read = stdin
        .take(HEAD)
        .read_to_end(&mut bytes)
        .context("reading failed");
    let read = read.and_then(|_| {
        let kind = sniff(&bytes)?;
        stdin.read_to_end(&mut bytes).context("reading failed")?;
        parse(kind, &bytes, limits)
    });
    read.context("cannot read standard input")
}

/// Bytes that [`sniff`] wants to see.
const HEAD: u64 = 512;

fn parse(kind: Kind, bytes: &[u8], limits: &ReadLimits) -> Result<Loaded> {
    Ok(match kind {
        Kind::Image(format) => Loaded::Picture(picture::decode(format, bytes, limits)?),
        Kind::Safetensors => Loaded::Latents(Latents::from_safetensors(bytes, limits)?),
        Kind::Npz => Loaded::Latents(npz::read(bytes, limits)?),
    })
}

/// Tells a file's kind from its first bytes (512 are enough). Errors name what was found where that can be told.
pub fn sniff(head: &[u8]) -> Result<Kind> {
    let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|h| h.starts_with(magic));
    let image = |format| Ok(Kind::Image(format));
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
    // "BM" alone begins many a text; the length of the second header tells.
    if at(0, b"BM") && at(15, &[0, 0, 0]) && head[14] >= 12 {
        return image(Format::Bmp);
    }
    if at(0, b"PK\x03\x04") {
        return Ok(Kind::Npz);
    }
    // A safetensors file is a 64-bit header length, then JSON.
    if at(8, b"{") && at(4, &[0, 0, 0, 0]) {
        return Ok(Kind::Safetensors);
    }
    ensure!(!head.is_empty(), "it is empty");
    const CURE: &str = "convert it to PNG first";
    let (what, cure) = if at(4, b"ftypavif") || at(4, b"ftypavis") {
        ("an AVIF image", CURE)
    } else if at(4, b"ftyphei") || at(4, b"ftyphev") || at(4, b"ftypmif1") {
        ("a HEIC image", CURE)
    } else if at(4, b"ftyp") {
        ("a video", "extract its frames first")
    } else if at(0, b"\xFF\x0A") || at(4, b"JXL \r\n\x87\n") {
        ("a JPEG XL image", CURE)
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
            "its content is no known format (expected PNG, JPEG, WebP, TIFF, BMP or GIF, \
             or latents as .safetensors, .latent or .npz)"
        )
    };
    bail!("it is {what}, which is not supported; {cure}")
}

/// Whether the extension promises another format than the content has.
fn misnamed(path: &Path, format: Format) -> Option<String> {
    let extension = path.extension()?.to_str()?;
    let named = Format::from_extension(extension)?;
    (named != format).then(|| {
        format!(
            "named .{extension}, but its content is {}: read as {0}",
            format.name()
        )
    })
}
