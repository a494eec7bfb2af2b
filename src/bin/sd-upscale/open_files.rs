//! The files that a run is writing: none of them outlives it half written, and all that are in their place were told of. Among them
//! those that are there for a while only.

use std::fs::OpenOptions;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use anyhow::{Context, Result};
use sd_upscale::files::Pending;

/// The temporary files that there are, and those that pass. The lock is held while one is made, put in its place or removed, and until what is in its
/// place is told of: who holds it knows of all files.
#[derive(Default)]
pub struct OpenFiles(Mutex<Vec<PathBuf>>);

impl OpenFiles {
    /// Begins a file, in a folder that is made where it is not there.
    ///
    /// # Errors
    /// The folder cannot be made or written to.
    pub fn create(self: &Arc<Self>, path: &Path) -> Result<OpenFile> {
        let mut open = self.lock();
        let folder = path.parent();
        if let Some(folder) = folder.filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot create the folder {}", folder.display()))?;
        }
        let pending = Pending::create(path)?;
        open.push(pending.temporary().to_path_buf());
        Ok(OpenFile {
            pending: Some(pending),
            all: self.clone(),
        })
    }

    /// Puts files in their places, and tells of it by `tell` before anyone else can know of them.
    pub fn commit(&self, files: Vec<OpenFile>, tell: impl FnOnce(Result<()>)) {
        let mut files = files;
        let flush = |file: &OpenFile| file.pending.as_ref().map_or(Ok(()), Pending::flush_to_disk);
        let flushed: Result<()> = files.iter().try_for_each(flush);
        let mut open = self.lock();
        let pending: Vec<Pending> = files
            .iter_mut()
            .filter_map(|file| file.pending.take())
            .collect();
        for pending in &pending {
            open.retain(|path| path != pending.temporary());
        }
        tell(flushed.and_then(|()| pending.into_iter().try_for_each(Pending::commit)));
    }

    /// Makes an empty file where there is none: one that passes is put in its place by [`Self::show`], and removed when what this gives
    /// is dropped, or the run ends.
    ///
    /// # Errors
    /// Something is there, or the folder cannot be written to.
    pub fn take_place(self: &Arc<Self>, path: &Path) -> io::Result<Passing> {
        let mut open = self.lock();
        OpenOptions::new().write(true).create_new(true).open(path)?;
        open.push(path.to_path_buf());
        Ok(Passing {
            path: path.to_path_buf(),
            all: self.clone(),
        })
    }

    /// Puts a file that passes in its place, which was taken.
    ///
    /// # Errors
    /// It cannot be put there.
    pub fn show(&self, mut file: OpenFile) -> Result<()> {
        let mut open = self.lock();
        let Some(pending) = file.pending.take() else {
            return Ok(());
        };
        open.retain(|path| path != pending.temporary());
        pending.show()
    }

    /// Removes what is half written, and what passes. As long as what this gives is kept, no other file is begun or put in its place: it is for a
    /// process that ends.
    pub fn give_up(&self) -> MutexGuard<'_, Vec<PathBuf>> {
        let mut open = self.lock();
        remove(&mut open);
        open
    }

    /// [`Self::give_up`], unless another is at it and does not come to an end: it may be waiting for someone to read what it says.
    pub fn give_up_soon(&self) -> Option<MutexGuard<'_, Vec<PathBuf>>> {
        for _ in 0..TRIES {
            match self.0.try_lock() {
                Err(TryLockError::WouldBlock) => std::thread::sleep(WAIT),
                Err(TryLockError::Poisoned(_)) => return Some(self.give_up()),
                Ok(mut open) => {
                    remove(&mut open);
                    return Some(open);
                }
            }
        }
        None
    }

    fn lock(&self) -> MutexGuard<'_, Vec<PathBuf>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How often [`OpenFiles::give_up_soon`] looks, and how long it waits between: a second in all. Whoever makes a file, or puts it in
/// its place, takes less.
const TRIES: usize = 100;
const WAIT: Duration = Duration::from_millis(10);

fn remove(open: &mut Vec<PathBuf>) {
    for path in open.drain(..) {
        // One that cannot be removed is no reason to go on.
        let _ = std::fs::remove_file(path);
    }
}

/// A file of [`OpenFiles`]. Dropped, it is removed.
pub struct OpenFile {
    /// There until it is put in its place.
    pending: Option<Pending>,
    all: Arc<OpenFiles>,
}

impl OpenFile {
    /// [`Pending::failure`].
    pub fn failure(&mut self) -> Option<anyhow::Error> {
        self.pending.as_mut()?.failure()
    }

    fn file(&mut self) -> io::Result<&mut Pending> {
        let closed = || io::Error::other("the file is in its place already");
        self.pending.as_mut().ok_or_else(closed)
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        if let Some(pending) = self.pending.take() {
            let mut open = self.all.lock();
            open.retain(|path| path != pending.temporary());
            drop(pending);
        }
    }
}

impl Write for OpenFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file()?.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file()?.flush()
    }
}

impl Seek for OpenFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file()?.seek(to)
    }
}

/// A file that is there as long as this.
pub struct Passing {
    path: PathBuf,
    all: Arc<OpenFiles>,
}

impl Drop for Passing {
    fn drop(&mut self) {
        let mut open = self.all.lock();
        open.retain(|path| *path != self.path);
        // One that cannot be removed is no reason to go on about.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_given_up_is_gone_and_what_was_put_in_its_place_stays() {
        let folder = tempfile::tempdir().unwrap();
        let files = Arc::new(OpenFiles::default());
        let create = |name: &str| {
            let mut file = files.create(&folder.path().join(name)).unwrap();
            file.write_all(name.as_bytes()).unwrap();
            file
        };
        let mut told = None;
        files.commit(vec![create("a"), create("b")], |done| told = Some(done));
        assert!(told.unwrap().is_ok());
        assert_eq!(names(folder.path()), ["a", "b"]);
        drop(create("c"));
        assert_eq!(names(folder.path()), ["a", "b"]);
        let _half = create("d");
        assert_eq!(names(folder.path()).len(), 3);
        let ending = files.give_up();
        assert_eq!(names(folder.path()), ["a", "b"]);
        // Another end is not kept waiting by the first.
        assert!(files.give_up_soon().is_none());
        drop(ending);
        let _half = create("e");
        assert!(files.give_up_soon().is_some());
        assert_eq!(names(folder.path()), ["a", "b"]);
    }

    #[test]
    fn what_passes_is_replaced_and_goes_and_nothing_else_does() {
        let folder = tempfile::tempdir().unwrap();
        let files = Arc::new(OpenFiles::default());
        let path = folder.path().join("p");
        let show = |text: &str| {
            let mut file = files.create(&path).unwrap();
            file.write_all(text.as_bytes()).unwrap();
            files.show(file).unwrap();
        };
        let passing = files.take_place(&path).unwrap();
        for text in ["one", "two"] {
            show(text);
            assert_eq!(std::fs::read(&path).unwrap(), text.as_bytes());
            assert_eq!(names(folder.path()), ["p"]);
        }
        drop(passing);
        assert!(names(folder.path()).is_empty());
        // One of someone else's stays.
        std::fs::write(&path, "theirs").unwrap();
        let error = files.take_place(&path).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        drop(files.give_up());
        assert_eq!(names(folder.path()), ["p"]);
        std::fs::remove_file(&path).unwrap();
        // The end of the run takes what passes with it.
        let _passing = files.take_place(&path).unwrap();
        show("three");
        drop(files.give_up());
        assert!(names(folder.path()).is_empty());
    }
}
