//! Files and standard input -> pictures or latents, told apart by content and never by name.

mod sniff;
mod whole;
mod write;

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use self::sniff::HEAD;
pub use self::sniff::{FileKind, sniff};
pub use self::whole::is_complete;
pub use self::write::{Pending, clean_stale, try_write, write};
use crate::latents::{self, Latents};
use crate::limits::ReadLimits;
use crate::picture::{self, Format, Header, Picture};

/// What an input turned out to hold.
#[derive(Clone, Debug)]
pub enum Loaded {
    /// An image.
    Picture(Picture),
    /// One or several latents.
    Latents(Latents),
}

/// Reads one file. Errors name the file.
///
/// # Errors
/// It cannot be read, is of no kind that is read, is damaged, or is beyond `limits`.
pub fn read_path(path: &Path, limits: &ReadLimits) -> Result<Loaded> {
    let read = || {
        let mut file = File::open(path)?;
        let metadata = file.metadata()?;
        ensure!(!metadata.is_dir(), "it is a folder, not a file");
        let (kind, bytes) = read_whole(&mut file, metadata.len(), limits)?;
        let mut loaded = parse(kind, &bytes, limits)?;
        if let (Loaded::Picture(picture), FileKind::Image(format)) = (&mut loaded, kind) {
            picture.warnings.extend(misnamed(path, format));
        }
        Ok(loaded)
    };
    let named = |e: anyhow::Error| e.context(format!("cannot read {}", path.display()));
    read().map_err(named)
}

/// Reads one file that is to be an image.
///
/// # Errors
/// Those of [`read_path`], and that it holds latents.
pub fn read_picture(path: &Path, limits: &ReadLimits) -> Result<Picture> {
    match read_path(path, limits)? {
        Loaded::Picture(picture) => Ok(picture),
        Loaded::Latents(_) => bail!("{} holds latents, not an image", path.display()),
    }
}

/// Size and metadata of an image file, without decoding it.
///
/// # Errors
/// It cannot be read, is no image, or is damaged where it states them.
pub fn read_header(path: &Path) -> Result<Header> {
    let read = || {
        let mut file = BufReader::new(File::open(path)?);
        let mut head = Vec::new();
        file.by_ref().take(HEAD).read_to_end(&mut head)?;
        let FileKind::Image(format) = sniff(&head)? else {
            bail!("it holds latents, not an image");
        };
        file.rewind()?;
        Header::read(format, file)
    };
    read().with_context(|| format!("cannot read {}", path.display()))
}

/// Reads bytes that came from elsewhere, such as standard input; `name` is what errors call them.
///
/// # Errors
/// As [`read_path`].
pub fn read_bytes(bytes: &[u8], name: &str, limits: &ReadLimits) -> Result<Loaded> {
    let read = sniff(bytes).and_then(|kind| parse(kind, bytes, limits));
    read.with_context(|| format!("cannot read {name}"))
}

/// Reads all of standard input.
///
/// # Errors
/// As [`read_path`].
pub fn read_stdin(limits: &ReadLimits) -> Result<Loaded> {
    let read = read_whole(&mut std::io::stdin().lock(), 0, limits);
    read.and_then(|(kind, bytes)| parse(kind, &bytes, limits))
        .context("cannot read standard input")
}

/// Reads a source to its end once its beginning has shown that it can be something that is read: a checkpoint of
/// gigabytes, or a video, is refused by its first bytes. `length` is the source's as far as it is known.
fn read_whole(
    source: &mut impl Read,
    length: u64,
    limits: &ReadLimits,
) -> Result<(FileKind, Vec<u8>)> {
    let mut bytes = Vec::new();
    let read = |source: &mut dyn Read, bytes: &mut Vec<u8>, most: u64| {
        let read = source.take(most).read_to_end(bytes);
        read.context("reading failed")
    };
    read(source, &mut bytes, HEAD)?;
    let kind = sniff(&bytes)?;
    match kind {
        FileKind::Safetensors => {
            let header = 8 + latents::header_length(&bytes, limits)?;
            let missing = header.saturating_sub(bytes.len());
            read(source, &mut bytes, missing as u64)?;
            latents::check_header(&bytes, limits)?;
        }
        FileKind::Npz => latents::check_npz_head(&bytes)?,
        FileKind::Image(_) => {}
    }
    limits.check_length(length)?;
    let most = limits.max_bytes().saturating_add(1);
    let held = bytes.len() as u64;
    read(source, &mut bytes, most.saturating_sub(held))?;
    limits.check_length(bytes.len() as u64)?;
    Ok((kind, bytes))
}

fn parse(kind: FileKind, bytes: &[u8], limits: &ReadLimits) -> Result<Loaded> {
    Ok(match kind {
        FileKind::Image(format) => Loaded::Picture(picture::decode(format, bytes, limits)?),
        FileKind::Safetensors => Loaded::Latents(Latents::from_safetensors(bytes, limits)?),
        FileKind::Npz => Loaded::Latents(Latents::from_npz(bytes, limits)?),
    })
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
