//! Finished bytes -> a file that is there whole or not at all.

use std::fs::{self, File, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
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
    let mut file = Pending::create(path)?;
    if let Err(error) = file.write_all(bytes) {
        return Err(file.failure().unwrap_or_else(|| error.into()));
    }
    file.commit()
}

/// A file that is being written, under a temporary name beside its own: [`Pending::commit`] puts it in its place, as [`write()`]
/// does; without that it is removed.
#[derive(Debug)]
pub struct Pending {
    /// As it was named.
    path: PathBuf,
    /// What that leads to.
    target: PathBuf,
    file: tempfile::NamedTempFile,
    /// What the first write that failed said.
    failure: Option<io::Error>,
}

impl Pending {
    /// Begins a file that will be at `path`.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn create(path: &Path) -> Result<Self> {
        let create = || -> Result<_> {
            let target = through_links(path)?;
            let file = temporary(&target, folder_of(&target))?;
            if let Ok(existing) = fs::metadata(&target) {
                file.as_file().set_permissions(existing.permissions()).ok();
            }
            // Held while it is written, however long that takes: see `clean_stale`.
            file.as_file().try_lock().ok();
            Ok((target, file))
        };
        let (target, file) = create().with_context(|| cannot_write(path))?;
        Ok(Self {
            path: path.to_path_buf(),
            target,
            file,
            failure: None,
        })
    }

    /// Where it is until it is committed.
    pub fn temporary(&self) -> &Path {
        self.file.path()
    }

    /// What a write failed with, in words, once. Who writes through others may have got nothing but its kind from them.
    pub fn failure(&mut self) -> Option<anyhow::Error> {
        let error = anyhow::Error::new(self.failure.take()?);
        let error = error.context("cannot write (is the disk full?)");
        Some(error.context(cannot_write(&self.path)))
    }

    /// Flushes what was written to the disk, which may take its time.
    ///
    /// # Errors
    /// The disk fails.
    pub fn flush_to_disk(&self) -> Result<()> {
        let flushed = self.file.as_file().sync_all();
        flushed
            .context("cannot flush to the disk")
            .with_context(|| cannot_write(&self.path))
    }

    /// Flushes to the disk and puts the file in its place.
    ///
    /// # Errors
    /// The disk fails, or the place is one of a folder.
    pub fn commit(self) -> Result<()> {
        self.flush_to_disk()?;
        let target = self.target.clone();
        self.show()?;
        // The rename itself is lasting once the folder is flushed; where folders cannot be opened it is best effort.
        if let Ok(folder) = File::open(folder_of(&target)) {
            folder.sync_all().ok();
        }
        Ok(())
    }

    /// Puts the file in its place without waiting for the disk: for one that is soon replaced or removed.
    ///
    /// # Errors
    /// The place is one of a folder.
    pub fn show(self) -> Result<()> {
        let renamed = self.file.persist(&self.target).map_err(|e| e.error);
        renamed.with_context(|| cannot_write(&self.path))?;
        Ok(())
    }

    fn kept<T>(&mut self, done: io::Result<T>) -> io::Result<T> {
        done.map_err(|error| match error.kind() {
            io::ErrorKind::Interrupted => error,
            kind => {
                self.failure.get_or_insert(error);
                kind.into()
            }
        })
    }
}

impl Write for Pending {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes);
        self.kept(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.file.flush();
        self.kept(flushed)
    }
}

impl Seek for Pending {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let sought = self.file.seek(to);
        self.kept(sought)
    }
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write {}", path.display())
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
    attempt().with_context(|| cannot_write(path))
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

/// Removes what writes that were killed left in a folder, and gives their number. Only our temporary files, only those
/// untouched for ten minutes, and none that another process holds: it may be at a large picture.
pub fn clean_stale(folder: &Path) -> usize {
    let stale = |entry: &fs::DirEntry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let ours = name.starts_with('.') && name.contains(MARK) && name.ends_with(SUFFIX);
        let age = entry
            .metadata()
            .and_then(|m| m.modified())
            .map(|t| t.elapsed().unwrap_or_default());
        ours && age.is_ok_and(|age| age > STALE) && !is_held(&entry.path())
    };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(stale)
        .filter(|entry| fs::remove_file(entry.path()).is_ok())
        .count()
}

/// Whether a process is writing a temporary file; false where the file system does not tell.
fn is_held(path: &Path) -> bool {
    let tried = File::open(path).map(|file| file.try_lock());
    matches!(tried, Ok(Err(TryLockError::WouldBlock)))
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name();
        let mut names: Vec<String> = entries
            .map(|entry| name(entry).into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_pending_file_is_in_its_place_when_it_is_committed_and_gone_when_it_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        fs::write(&path, "before").unwrap();
        let mut file = Pending::create(&path).unwrap();
        file.write_all(b"abc").unwrap();
        file.seek(SeekFrom::Start(1)).unwrap();
        file.write_all(b"x").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"before");
        assert_eq!(fs::read(file.temporary()).unwrap(), b"axc");
        drop(file);
        assert_eq!(names(folder.path()), ["a.png"]);
        let mut file = Pending::create(&path).unwrap();
        file.write_all(b"after").unwrap();
        file.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"after");
        assert_eq!(names(folder.path()), ["a.png"]);
    }

    #[test]
    fn a_file_that_is_written_for_long_is_not_stale() {
        let folder = tempfile::tempdir().unwrap();
        let file = Pending::create(&folder.path().join("a.png")).unwrap();
        let long_ago = SystemTime::now() - 2 * STALE;
        file.file.as_file().set_modified(long_ago).unwrap();
        assert_eq!(clean_stale(folder.path()), 0);
        assert!(file.temporary().exists());
        // As a process that was killed leaves it.
        let (left, _) = file
            .file
            .keep()
            .map(|(file, path)| (path, drop(file)))
            .unwrap();
        assert_eq!(clean_stale(folder.path()), 1);
        assert!(!left.exists());
    }

    #[test]
    fn what_a_write_fails_with_is_told_with_the_files_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let mut file = Pending::create(&path).unwrap();
        assert!(file.failure().is_none());
        file.failure = Some(io::Error::other("the disk is gone"));
        let told = format!("{:#}", file.failure().unwrap());
        assert!(told.starts_with(&cannot_write(&path)), "{told}");
        assert!(told.ends_with(": the disk is gone"), "{told}");
    }
}
