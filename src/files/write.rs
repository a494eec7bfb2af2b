//! Finished bytes -> a file that is there whole or not at all.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// Parts of a temporary file's name.
const MARK: &str = ".sd-upscale-";
const SUFFIX: &str = ".tmp";
/// Age from which a temporary file is no one's any more.
const STALE: Duration = Duration::from_secs(600);

/// Writes beside `path` under a temporary name (`.NAME.sd-upscale-XXXXXX.tmp`), flushes to the disk, then renames:
/// after a crash at any moment `path` is as it was or complete. On an error nothing is left behind. A symbolic link is
/// written through: the file that it names is replaced, and the link stays.
///
/// # Errors
/// The folder cannot be written to, or the disk is full.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> Result<()> {
        let path = &through_links(path)?;
        let mut file = temporary(path, folder_of(path))?;
        if let Ok(existing) = fs::metadata(path) {
            file.as_file().set_permissions(existing.permissions()).ok();
        }
        file.write_all(bytes)
            .context("cannot write (is the disk full?)")?;
        file.as_file()
            .sync_all()
            .context("cannot flush to the disk")?;
        file.persist(path).map_err(|e| e.error)?;
        // The rename itself is lasting once the folder is flushed; where folders cannot be opened it is best effort.
        if let Ok(folder) = File::open(folder_of(path)) {
            folder.sync_all().ok();
        }
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Whether [`write()`] could write to `path`, as far as can be known before there are bytes: a little is written to its
/// folder (of a folder that does not exist, to the one that it would be made in), and removed again.
///
/// # Errors
/// Those of [`write()`].
pub fn try_write(path: &Path) -> Result<()> {
    let attempt = || -> Result<()> {
        let path = through_links(path)?;
        ensure!(!path.is_dir(), "it is a folder");
        let folder = folder_of(&path);
        let existing = folder.ancestors().find(|folder| folder.exists());
        let mut file = temporary(&path, existing.unwrap_or(Path::new(".")))?;
        file.write_all(&[0; TRIAL])
            .and_then(|()| file.flush())
            .context("cannot write (is the disk full?)")
    };
    attempt().with_context(|| format!("cannot write {}", path.display()))
}

/// Bytes written on trial: a block of most file systems.
const TRIAL: usize = 4096;

/// A file in `folder` under a temporary name for `path`. It is removed where it is dropped.
fn temporary(path: &Path, folder: &Path) -> Result<tempfile::NamedTempFile> {
    let name = path
        .file_name()
        .context("it names no file")?
        .to_string_lossy();
    let prefix = format!(".{}{MARK}", short(&name));
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(SUFFIX);
    // As any new file: what the umask allows, and not the 0600 of a secret; an existing file keeps its mode.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    builder
        .tempfile_in(folder)
        .with_context(|| format!("cannot create a file in {}", folder.display()))
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// The file that `path` leads to by symbolic links, which need not exist.
fn through_links(path: &Path) -> Result<PathBuf> {
    // What Linux follows at most.
    const MOST: usize = 40;
    let mut path = path.to_path_buf();
    for _ in 0..MOST {
        match fs::read_link(&path) {
            // Relative to the link's own folder; an absolute one replaces it.
            Ok(target) => path = folder_of(&path).join(target),
            Err(_) => return Ok(path),
        }
    }
    bail!("too many symbolic links lead from one to the next")
}

/// File names end at 255 bytes on most systems, and ours adds 23 to the target's.
fn short(name: &str) -> &str {
    let end = (0..=name.len().min(200))
        .rev()
        .find(|&at| name.is_char_boundary(at));
    &name[..end.unwrap_or(0)]
}

/// Removes what writes that were killed left in a folder, and gives their number. Only our temporary files, and only those
/// untouched for ten minutes: another process may be writing there, which takes seconds.
pub fn clean_stale(folder: &Path) -> usize {
    let stale = |entry: &fs::DirEntry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let ours = name.starts_with('.') && name.contains(MARK) && name.ends_with(SUFFIX);
        let age = entry
            .metadata()
            .and_then(|m| m.modified())
            .map(|t| t.elapsed().unwrap_or_default());
        ours && age.is_ok_and(|age| age > STALE)
    };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(stale)
        .filter(|entry| fs::remove_file(entry.path()).is_ok())
        .count()
}
