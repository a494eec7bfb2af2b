//! The standard Hub cache on disk, shared with `huggingface_hub`:
//! `models--ORG--NAME/{blobs/ETAG, snapshots/COMMIT/PATH -> blob, refs/REVISION, .no_exist/COMMIT/PATH}`
//! and `.locks/models--ORG--NAME/ETAG.lock`.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::errors::Fault;
use crate::model::layout::Part;

/// One repository at one revision in the cache.
pub(super) struct RepoCache {
    root: PathBuf,
    repo: hf_hub::Repo,
    layout: hf_hub::CacheRepo,
}

/// Held while a blob is written; let go when dropped.
pub(super) struct Lock {
    file: Option<File>,
}

impl RepoCache {
    pub fn new(root: &Path, repo: &str, revision: &str) -> Self {
        let repo = hf_hub::Repo::with_revision(
            repo.to_string(),
            hf_hub::RepoType::Model,
            revision.to_string(),
        );
        RepoCache {
            root: root.to_path_buf(),
            layout: hf_hub::Cache::new(root.to_path_buf()).repo(repo.clone()),
            repo,
        }
    }

    /// Everything of the repository.
    pub fn folder(&self) -> PathBuf {
        self.root.join(self.repo.folder_name())
    }

    /// The commit that the revision stands for, as far as the cache knows.
    pub fn commit(&self) -> Option<String> {
        let revision = self.repo.revision();
        if is_commit(revision) {
            return Some(revision.to_string());
        }
        let commit = fs::read_to_string(self.folder().join("refs").join(revision)).ok()?;
        let commit = commit.trim();
        crate::model::layout::is_plain(commit).then(|| commit.to_string())
    }

    /// Notes which commit a branch or tag stands for; a commit needs no note.
    pub fn set_commit(&self, commit: &str) -> Result<(), Fault> {
        if is_commit(self.repo.revision()) || self.commit().as_deref() == Some(commit) {
            return Ok(());
        }
        let refs = self.folder().join("refs");
        self.layout
            .create_ref(commit)
            .map_err(|e| Fault::disk(&refs, e))
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.layout.pointer_path(commit)
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.folder().join("blobs").join(etag)
    }

    /// Where a transfer collects a blob. Without a lock nobody else may share the file, so its name is this
    /// process's own.
    pub fn part(&self, etag: &str, lock: &Lock) -> PathBuf {
        let name = match lock.file {
            Some(_) => format!("{etag}.incomplete"),
            None => format!("{etag}.{}.incomplete", std::process::id()),
        };
        self.folder().join("blobs").join(name)
    }

    /// The optional files of `parts` of which it is not known whether the commit has them.
    pub fn unknown_optional(&self, commit: &str, parts: &[Part]) -> bool {
        let snapshot = self.snapshot(commit);
        crate::model::layout::wanted(parts)
            .into_iter()
            .filter(|(_, kind)| *kind == crate::model::layout::Kind::Optional)
            .any(|(path, _)| !snapshot.join(path).is_file() && !self.known_absent(commit, path))
    }

    pub fn known_absent(&self, commit: &str, path: &str) -> bool {
        self.no_exist(commit, path).is_file()
    }

    /// Remembers that the commit lacks a file, so that nobody has to ask again.
    pub fn set_absent(&self, commit: &str, path: &str) -> Result<(), Fault> {
        let mark = self.no_exist(commit, path);
        make_parent(&mark)?;
        File::create(&mark).map_err(|e| Fault::disk(&mark, e))?;
        Ok(())
    }

    fn no_exist(&self, commit: &str, path: &str) -> PathBuf {
        self.folder().join(".no_exist").join(commit).join(path)
    }

    /// Makes `path` of the commit's snapshot point to the blob.
    pub fn link(&self, commit: &str, path: &str, etag: &str) -> Result<(), Fault> {
        let pointer = self.snapshot(commit).join(path);
        let blob = self.blob(etag);
        make_parent(&pointer)?;
        let up = "../".repeat(path.split('/').count() + 1);
        match symlink(Path::new(&format!("{up}blobs/{etag}")), &pointer) {
            Ok(()) => Ok(()),
            // Another process was faster.
            Err(_) if pointer.is_file() => Ok(()),
            // No symbolic links here, or a dangling one in the way: the snapshot holds the file itself, as
            // `huggingface_hub` does it.
            Err(_) => fs::rename(&blob, &pointer).map_err(|e| Fault::disk(&pointer, e)),
        }
    }

    /// Waits until no other process writes the blob, at most `patience` after it last grew.
    pub fn lock(
        &self,
        etag: &str,
        patience: Duration,
        waiting: impl FnOnce(),
    ) -> Result<Lock, Fault> {
        let path = self
            .root
            .join(".locks")
            .join(self.repo.folder_name())
            .join(format!("{etag}.lock"));
        make_parent(&path)?;
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|e| Fault::disk(&path, e))?;
        let mut waiting = Some(waiting);
        let mut size = None;
        let mut since = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Lock { file: Some(file) }),
                // Not every network file system has locks.
                Err(TryLockError::Error(_)) => return Ok(Lock { file: None }),
                Err(TryLockError::WouldBlock) => {}
            }
            if let Some(tell) = waiting.take() {
                tell();
            }
            let now = Some(self.bytes_of(etag));
            if now != size {
                (size, since) = (now, Instant::now());
            }
            if since.elapsed() >= patience {
                return Err(Fault::Busy {
                    lock: path,
                    patience,
                });
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Bytes of the blob and its unfinished copies, under whatever names other programs give them.
    fn bytes_of(&self, etag: &str) -> u64 {
        let Ok(entries) = fs::read_dir(self.folder().join("blobs")) else {
            return 0;
        };
        entries
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(etag))
            .filter_map(|entry| entry.metadata().ok())
            .map(|metadata| metadata.len())
            .sum()
    }
}

pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

pub(super) fn make_parent(path: &Path) -> Result<(), Fault> {
    match path.parent() {
        Some(parent) => fs::create_dir_all(parent).map_err(|e| Fault::disk(parent, e)),
        None => Ok(()),
    }
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> std::io::Result<()> {
    std::os::windows::fs::symlink_file(target, link)
}
