//! Where an output goes: its folder, name and format.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::template::{Fields, Template};
use super::{UsageError, Variant};
use crate::picture::Format;

/// What a file's extension says it holds, among what can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// An image.
    Image(Format),
    /// Latents as diffusers keeps them.
    Safetensors,
    /// Latents as ComfyUI keeps them: `.latent`.
    ComfyLatent,
}

impl Written {
    /// `extension` in any case, without the dot. None where nothing of the kind is written: GIF and `.npz` are only read.
    pub fn from_extension(extension: &str) -> Option<Self> {
        match extension.to_ascii_lowercase().as_str() {
            "safetensors" => Some(Written::Safetensors),
            "latent" => Some(Written::ComfyLatent),
            other => Format::from_extension(other)
                .filter(|format| format.is_writable())
                .map(Written::Image),
        }
    }

    /// The kind of `--format`.
    pub(super) fn from_flag(format: &str) -> Result<Self, UsageError> {
        Self::from_extension(format).ok_or_else(|| {
            UsageError(format!(
                "--format {format} cannot be written; choose {WRITTEN}"
            ))
        })
    }
}

/// For messages.
pub(super) const WRITTEN: &str =
    "png, jpg, webp, tif, bmp or jxl for an image, safetensors or latent for latents";

/// Whether `extension` is of a file that can be read: an image or latents.
pub(super) fn is_readable(extension: &str) -> bool {
    Format::from_extension(extension).is_some_and(Format::is_read_here) || is_latents(extension)
}

pub(super) fn is_latents(extension: &str) -> bool {
    ["safetensors", "latent", "npz"]
        .iter()
        .any(|known| extension.eq_ignore_ascii_case(known))
}

/// Which of the outputs of one input: a batch of latents has several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbered {
    /// From 1.
    pub number: usize,
    /// How many the input has in all.
    pub count: usize,
}

/// An output file whose name is settled but for its size and, for a batch of latents, the item's number.
#[derive(Clone)]
pub struct Naming {
    pub(super) folder: PathBuf,
    pub(super) template: Arc<Template>,
    pub(super) stem: OsString,
    /// Without the dot, as it is written.
    pub(super) extension: String,
    /// The input's, likewise.
    pub(super) in_extension: String,
    /// Whether the name ends in the extension; not so where `-o` names a file without one and `--format` is given.
    pub(super) dotted: bool,
    pub(super) kind: Written,
    pub(super) variant: Variant,
}

impl Naming {
    /// The output's path. `width` and `height` are the output's, in pixels. One of several is `NAME-1.EXT`, with
    /// leading zeros where the count has more digits.
    pub fn path(&self, width: u32, height: u32, numbered: Option<Numbered>) -> PathBuf {
        self.expand(Some((width, height)), numbered)
    }

    /// The path with `{width}` and `{height}` as they stand: for what is said before the size is known.
    pub fn pattern(&self) -> PathBuf {
        self.expand(None, None)
    }

    /// What is written, by the extension or `--format`.
    pub fn kind(&self) -> Written {
        self.kind
    }

    fn expand(&self, size: Option<(u32, u32)>, numbered: Option<Numbered>) -> PathBuf {
        let mut name = self.template.expand(&Fields {
            stem: &self.stem,
            extension: &self.extension,
            in_extension: &self.in_extension,
            variant: self.variant,
            size,
        });
        if let Some(Numbered { number, count }) = numbered {
            let digits = count.to_string().len();
            name.push(format!("-{number:0digits$}"));
        }
        if self.dotted {
            name.push(".");
            name.push(&self.extension);
        }
        self.folder.join(name)
    }
}

impl fmt::Debug for Naming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} as {:?}", self.pattern(), self.kind)
    }
}

/// The same of a name that need not have an extension: one that says nothing of what is to be written is part of the name.
pub(super) fn split_written_name(path: &Path) -> (OsString, Option<String>) {
    match split_name(path) {
        (stem, Some(extension)) if Written::from_extension(&extension).is_some() => {
            (stem, Some(extension))
        }
        _ => (
            path.file_name().unwrap_or(path.as_os_str()).to_owned(),
            None,
        ),
    }
}

/// The file name without its extension, and the extension. A stem of nothing but dots would name a folder: such a
/// name is kept whole.
pub(super) fn split_name(path: &Path) -> (OsString, Option<String>) {
    let name = path.file_name().unwrap_or(path.as_os_str());
    let stem = path.file_stem().unwrap_or(name);
    let only_dots = stem.as_encoded_bytes().iter().all(|byte| *byte == b'.');
    let stem = if only_dots { name } else { stem };
    let extension = path.extension().and_then(|e| e.to_str());
    (stem.to_owned(), extension.map(str::to_owned))
}
