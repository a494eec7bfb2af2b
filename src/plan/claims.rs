//! Who writes which file: no output over an input, and none over another input's output.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::{Source, Variant};

/// macOS and Windows ignore case in file names, so there `A.png` and `a.png` are one file. On other systems they are
/// two, and refusing them would refuse folders that are in order.
const IGNORES_CASE: bool = cfg!(any(windows, target_os = "macos"));

/// Why a path cannot be written.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Conflict {
    /// The path is an input's.
    #[error("{} is an input and is never written over", .0.display())]
    Input(PathBuf),
    /// Another input's output goes there.
    #[error("it is where the output of {} goes", .0.source)]
    Output(Origin),
}

/// What an output comes of: an input, done by one of the run's variants.
#[derive(Clone, Debug, PartialEq)]
pub struct Origin {
    /// The input.
    pub source: Source,
    /// By what it is done.
    pub variant: Variant,
}

/// The inputs of the run, and the outputs handed out so far.
#[derive(Debug, Default)]
pub struct Claims {
    inputs: HashMap<FileId, PathBuf>,
    outputs: HashMap<PathBuf, Origin>,
    folders: Folders,
}

impl Claims {
    pub(super) fn new<'a>(inputs: impl Iterator<Item = &'a Source>) -> Self {
        let inputs = inputs.filter_map(|source| match source {
            Source::Path(path) => Some((file_id(path)?, path.clone())),
            Source::Stdin | Source::Prompt(_) => None,
        });
        Self {
            inputs: inputs.collect(),
            ..Self::default()
        }
    }

    /// Whether an output goes there.
    pub fn is_output(&mut self, path: &Path) -> bool {
        let key = self.folders.key(path);
        self.outputs.contains_key(&key)
    }

    /// Files that are inputs as well.
    pub(super) fn add_inputs<'a>(&mut self, inputs: impl Iterator<Item = &'a Source>) {
        self.inputs.extend(Self::new(inputs).inputs);
    }

    /// Takes `path` for an output of `origin`, or says whose it is. The same origin may take a path again. [`super::plan`]
    /// did this for every path it knew; names with a size or a batch's number are known only when the input was read,
    /// so call this before each write.
    ///
    /// # Errors
    /// The path is taken.
    pub fn claim(&mut self, path: &Path, origin: &Origin) -> Result<(), Conflict> {
        self.take(path, origin).map(|_| ())
    }

    /// As [`Self::claim`]; true where the path was not taken yet.
    pub(super) fn take(&mut self, path: &Path, origin: &Origin) -> Result<bool, Conflict> {
        // An output that does not exist yet is no input; one that does is compared as a file, whatever links, case or
        // `..` its name goes through.
        if let Some(input) = file_id(path).and_then(|id| self.inputs.get(&id)) {
            return Err(Conflict::Input(input.clone()));
        }
        let key = self.folders.key(path);
        match self.outputs.get(&key) {
            Some(holder) if holder != origin => Err(Conflict::Output(holder.clone())),
            Some(_) => Ok(false),
            None => {
                self.outputs.insert(key, origin.clone());
                Ok(true)
            }
        }
    }
}

/// A file whatever its name.
#[cfg(unix)]
type FileId = (u64, u64);

#[cfg(unix)]
fn file_id(path: &Path) -> Option<FileId> {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

#[cfg(not(unix))]
type FileId = PathBuf;

#[cfg(not(unix))]
fn file_id(path: &Path) -> Option<FileId> {
    fs::canonicalize(path).ok()
}

pub(super) fn same_file(a: &Path, b: &Path) -> bool {
    file_id(a).is_some_and(|id| file_id(b) == Some(id))
}

/// Folders by the names used for them -> one name each, asked of the system once a folder.
#[derive(Debug, Default)]
pub(super) struct Folders {
    known: HashMap<PathBuf, PathBuf>,
}

impl Folders {
    /// A folder's canonical path; of a folder that is yet to be created, what exists of it is canonical.
    pub fn canonical(&mut self, folder: &Path) -> PathBuf {
        if let Some(known) = self.known.get(folder) {
            return known.clone();
        }
        let here = Path::new(".");
        let asked = if folder.as_os_str().is_empty() {
            here
        } else {
            folder
        };
        let canonical = match (asked.canonicalize(), asked.parent(), asked.file_name()) {
            (Ok(canonical), _, _) => canonical,
            (Err(_), Some(parent), Some(name)) => self.canonical(parent).join(name),
            // `new/..`: `new` does not exist, so it is no link, and `..` leads to where it would lie.
            (Err(_), Some(parent), None) if asked.ends_with("..") => {
                let mut above = self.canonical(parent);
                above.pop();
                above
            }
            (Err(_), _, _) => asked.to_owned(),
        };
        self.known.insert(folder.to_owned(), canonical.clone());
        canonical
    }

    /// What two paths share exactly when they name one file.
    pub fn key(&mut self, path: &Path) -> PathBuf {
        let folder = self.canonical(path.parent().unwrap_or(path));
        let key = folder.join(path.file_name().unwrap_or_default());
        if IGNORES_CASE {
            key.to_string_lossy().to_lowercase().into()
        } else {
            key
        }
    }
}
