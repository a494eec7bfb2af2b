//! The standard Hub cache on disk, shared with `huggingface_hub`; its layout is hf-hub's:
//! `models--ORG--NAME/{blobs/ETAG, snapshots/COMMIT/PATH -> blob, refs/REVISION, .no_exist/COMMIT/PATH}`
//! and `.locks/models--ORG--NAME/ETAG.lock`.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::errors::Fault;
use crate::model::layout::{Kind, Part, is_fp16, is_plain, wanted, weight_file};

/// One repository at one revision in the cache.
pub(super) struct RepoCache {
    root: PathBuf,
    repo: hf_hub::Repo,
    layout: hf_hub::CacheRepo,
}

/// Held while a blob is written; let go when dropped. `None` on a file system without locks.
pub(super) type Lock = Option<File>;

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
        is_plain(commit).then(|| commit.to_string())
    }

    /// Notes which commit a branch or tag stands for; a commit needs no note.
    pub fn set_commit(&self, commit: &str) -> Result<(), Fault> {
        if self.commit().as_deref() == Some(commit) {
            return Ok(());
        }
        self.layout
            .create_ref(commit)
            .map_err(Fault::disk(&self.folder().join("refs")))
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.layout.pointer_path(commit)
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.layout.blob_path(etag)
    }

    /// Where a transfer collects a blob. Without a lock nobody else may share the file, so its name is this
    /// process's own.
    pub fn part(&self, etag: &str, lock: &Lock) -> PathBuf {
        self.blob(&match lock {
            Some(_) => format!("{etag}.incomplete"),
            None => format!("{etag}.{}.incomplete", std::process::id()),
        })
    }

    /// The files of `parts` that a commit's snapshot lacks and the repository may have: other programs fetch no more
    /// than they need, among it weights in float16 where there are better ones.
    pub fn unsettled(&self, commit: &str, parts: &[Part]) -> Vec<(&'static str, Kind)> {
        let snapshot = self.snapshot(commit);
        let is_here = |name: &str| snapshot.join(name).is_file();
        let is_settled = |path: &str, kind| match kind {
            Kind::Weights => weight_file(path, is_here).is_some_and(|file| !is_fp16(&file)),
            _ => is_here(path),
        };
        let mut files = wanted(parts);
        files.retain(|(path, kind)| {
            !is_settled(path, *kind) && !self.no_exist(commit, path).is_file()
        });
        files
    }

    /// Remembers that the commit lacks a file, so that nobody has to ask again.
    pub fn set_absent(&self, commit: &str, path: &str) -> Result<(), Fault> {
        let mark = self.no_exist(commit, path);
        make_parent(&mark)?;
        fs::write(&mark, "").map_err(Fault::disk(&mark))
    }

    fn no_exist(&self, commit: &str, path: &str) -> PathBuf {
        self.folder().join(".no_exist").join(commit).join(path)
    }

    /// Makes `path` of the commit's snapshot point to the blob.
    pub fn link(&self, commit: &str, path: &str, etag: &str) -> Result<(), Fault> {
        let pointer = self.snapshot(commit).join(path);
        make_parent(&pointer)?;
        let up = "../".repeat(path.split('/').count() + 1);
        match symlink(Path::new(&format!("{up}blobs/{etag}")), &pointer) {
            Ok(()) => Ok(()),
            // Another process was faster.
            Err(_) if pointer.is_file() => Ok(()),
            // No symbolic links here, or a dangling one in the way: the snapshot holds the file itself, as
            // `huggingface_hub` does it.
            Err(_) => fs::rename(self.blob(etag), &pointer).map_err(Fault::disk(&pointer)),
        }
    }

    /// Waits until no other process writes the blob, at most `patience` after it last grew.
    pub fn lock(
        &self,
        etag: &str,
        patience: Duration,
        waiting: impl FnOnce(),
    ) -> Result<Lock, Fault> {
        let locks = self.root.join(".locks").join(self.repo.folder_name());
        let path = locks.join(format!("{etag}.lock"));
        make_parent(&path)?;
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(Fault::disk(&path))?;
        let mut waiting = Some(waiting);
        let (mut size, mut since) = (None, Instant::now());
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                // Not every network file system has locks.
                Err(TryLockError::Error(_)) => return Ok(None),
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
                let lock = path;
                return Err(Fault::Busy { lock, patience });
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

/// `ORG/NAME` of each folder `models--ORG--NAME` under `root`, in their order, with its `snapshots/COMMIT` folders. What cannot be
/// read is not there.
pub(super) fn repositories(root: &Path) -> Vec<(String, Vec<PathBuf>)> {
    let paths = |folder: &Path| -> Vec<PathBuf> {
        let listed = fs::read_dir(folder).into_iter().flatten().flatten();
        listed.map(|entry| entry.path()).collect()
    };
    let mut found: Vec<(String, Vec<PathBuf>)> = paths(root)
        .into_iter()
        .filter_map(|folder| {
            let name = folder.file_name()?.to_str()?.strip_prefix("models--")?;
            Some((
                name.replacen("--", "/", 1),
                paths(&folder.join("snapshots")),
            ))
        })
        .collect();
    found.sort();
    found
}

pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

pub(super) fn make_parent(path: &Path) -> Result<(), Fault> {
    match path.parent() {
        Some(parent) => fs::create_dir_all(parent).map_err(Fault::disk(parent)),
        None => Ok(()),
    }
}

#[cfg(unix)]
use std::os::unix::fs::symlink;
#[cfg(windows)]
use std::os::windows::fs::symlink_file as symlink;
