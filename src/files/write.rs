//! Finished bytes -> a file that is there whole or not at all.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

/// Parts of a temporary file's name.
const MARK: &str = ".sd-upscale-";
const SUFFIX: &str = ".tmp";
/// Age from which a temporary file is no one's any more.
const STALE: Duration = Duration::from_secs(600);

/// Writes beside `path` under a temporary name (`.NAME.sd-upscale-XXXXXX.tmp`), flushes to the disk, then renames:
/// after a crash at any moment `path` is as it was or complete. On an error nothing is left behind.
///
/// # Errors
/// The folder cannot be written to, or the disk is full.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> Result<()> {
        let name = path
            .file_name()
            .context("it names no file")?
            .to_string_lossy();
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let prefix = format!(".{}{MARK}", short(&name));
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(SUFFIX);
        // As any new file: what the umask allows, and not the 0600 of a secret; an existing file keeps its mode.
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(fs::Permissions::from_mode(0o666));
        }
        let mut file = builder
            .tempfile_in(folder)
            .with_context(|| format!("cannot create a file in {}", folder.display()))?;
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
        if let Ok(folder) = File::open(folder) {
            folder.sync_all().ok();
        }
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
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
