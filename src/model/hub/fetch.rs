//! Brings one blob into the cache: locked, resumed, checked, and only then given its final name.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;

use indicatif::ProgressBar;
use sha2::{Digest, Sha256};

use super::Environment;
use super::cache::{RepoCache, make_parent};
use super::errors::Fault;
use super::remote::{Meta, Remote, content_range};

/// Bytes per read: large enough to cost nothing per call, small enough that an interruption loses little.
const CHUNK: usize = 256 * 1024;

/// A file of a repository, and where it goes.
pub(super) struct Transfer<'a> {
    pub remote: &'a Remote,
    pub cache: &'a RepoCache,
    pub settings: &'a Environment,
    pub repo: &'a str,
    pub commit: &'a str,
    pub path: &'a str,
    pub meta: &'a Meta,
}

/// Repeats what fails for a passing reason, with growing pauses. `progress` is a measure that grows when something
/// was achieved nevertheless; then the count starts anew.
pub(super) fn with_retries<T>(
    remote: &Remote,
    settings: &Environment,
    path: &str,
    progress: impl Fn() -> u64,
    mut attempt: impl FnMut() -> Result<T, Fault>,
) -> Result<T, Fault> {
    let mut best = progress();
    let mut pauses = settings.retry_pauses.iter();
    loop {
        let fault = match attempt() {
            Ok(value) => return Ok(value),
            // No network at all: say so at once.
            Err(fault @ Fault::Unreachable(_)) if !remote.answered() => return Err(fault),
            Err(fault) if fault.is_transient() => fault,
            Err(fault) => return Err(fault),
        };
        if progress() > best {
            best = progress();
            pauses = settings.retry_pauses.iter();
        }
        let Some(pause) = pauses.next() else {
            return Err(fault);
        };
        settings.report.note(&format!(
            "{path}: {}; trying again in {:.1} s",
            fault.cause(),
            pause.as_secs_f32()
        ));
        std::thread::sleep(*pause);
    }
}

impl Transfer<'_> {
    /// Whether the blob is in the cache already.
    pub fn is_done(&self) -> bool {
        fs::metadata(self.cache.blob(&self.meta.etag)).is_ok_and(|blob| {
            blob.is_file() && self.meta.size.is_none_or(|size| size == blob.len())
        })
    }

    /// Downloads the blob unless it is there.
    ///
    /// # Errors
    /// The fault, and how many bytes are kept for the next time.
    pub fn run(&self) -> Result<(), (Fault, u64)> {
        if self.is_done() {
            return Ok(());
        }
        let blob = self.cache.blob(&self.meta.etag);
        make_parent(&blob).map_err(|fault| (fault, 0))?;
        let report = self.settings.report;
        let path = self.path;
        let lock = self
            .cache
            .lock(&self.meta.etag, self.settings.lock_patience, || {
                report.note(&format!(
                    "waiting for another process that downloads {path}"
                ));
            })
            .map_err(|fault| (fault, 0))?;
        if self.is_done() {
            return Ok(());
        }
        let part = self.cache.part(&self.meta.etag, &lock);
        let kept = || fs::metadata(&part).map_or(0, |part| part.len());
        let before = kept();
        let bar = report.file(path, self.meta.size);
        let fetch = || {
            with_retries(self.remote, self.settings, path, kept, || {
                self.attempt(&part, &bar)
            })
        };
        let mut result = fetch();
        if before > 0 && matches!(result, Err(Fault::Corrupt(_))) {
            // Perhaps what an earlier run left was at fault; a whole transfer tells.
            report.note(&format!(
                "{path}: the part from an earlier run was bad; starting anew"
            ));
            result = fetch();
        }
        bar.finish_and_clear();
        result.map_err(|fault| (fault, kept()))?;
        fs::rename(&part, &blob).map_err(|e| (Fault::disk(&blob, e), 0))
    }

    /// One request: appends to the part what is missing of it, and checks the whole.
    fn attempt(&self, part: &Path, bar: &ProgressBar) -> Result<(), Fault> {
        let disk = |e| Fault::disk(part, e);
        let mut file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .open(part)
            .map_err(disk)?;
        let mut have = file.metadata().map_err(disk)?.len();
        if self.meta.size.is_some_and(|size| have > size) {
            file.set_len(0).map_err(disk)?;
            have = 0;
        }
        let mut hash = Sha256::new();
        if have > 0 && self.is_sha256() {
            std::io::copy(&mut file, &mut hash).map_err(disk)?;
        }
        if self.meta.size != Some(have) {
            let (total, mut body) = self.open(&mut file, &mut have, &mut hash, part)?;
            if let Some(total) = total {
                bar.set_length(total);
            }
            bar.set_position(have);
            bar.reset_eta();
            let mut chunk = vec![0; CHUNK];
            loop {
                let n = match body.read(&mut chunk) {
                    Ok(0) => break,
                    Ok(n) => n,
                    Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                    Err(e) => {
                        return Err(Fault::Lost(format!(
                            "the transfer broke off after {have} bytes: {e}"
                        )));
                    }
                };
                have += n as u64;
                if total.is_some_and(|total| have > total) {
                    fs::remove_file(part).map_err(disk)?;
                    return Err(Fault::Corrupt(format!(
                        "more than {} bytes",
                        total.unwrap_or(0)
                    )));
                }
                file.write_all(&chunk[..n]).map_err(disk)?;
                hash.update(&chunk[..n]);
                bar.set_position(have);
            }
            if let Some(expected) = total.filter(|total| have < *total) {
                return Err(Fault::Short {
                    got: have,
                    expected,
                });
            }
        }
        // So that not even a power failure leaves a whole-looking file with holes.
        file.sync_all().map_err(disk)?;
        self.check(hash, part)
    }

    /// Starts the answer at byte `have`, or the file anew where the server does not resume.
    /// Returns the whole file's size, where known, and the bytes from `have` on.
    fn open(
        &self,
        file: &mut File,
        have: &mut u64,
        hash: &mut Sha256,
        part: &Path,
    ) -> Result<(Option<u64>, impl Read + use<>), Fault> {
        let response = self.remote.get(self.repo, self.commit, self.path, *have)?;
        let range = content_range(&response);
        let resumed = response.status() == 206 && range.is_some_and(|(start, _)| start == *have);
        if *have > 0 && !resumed {
            file.set_len(0).map_err(|e| Fault::disk(part, e))?;
            let got = std::mem::take(have);
            *hash = Sha256::new();
            match (response.status().as_u16(), self.meta.size) {
                (200, _) => {}
                // There is no byte after those that have come: the server's file is too short.
                (416, Some(expected)) => return Err(Fault::Short { got, expected }),
                _ => return Err(Fault::Lost("the server does not resume there".into())),
            }
        } else if response.status() == 416 {
            return Err(Fault::Lost("the server offers no bytes".into()));
        }
        let total = match range {
            Some((_, total)) => total,
            None => response.body().content_length(),
        };
        Ok((self.meta.size.or(total), response.into_body().into_reader()))
    }

    fn is_sha256(&self) -> bool {
        let etag = &self.meta.etag;
        etag.len() == 64 && etag.bytes().all(|b| b.is_ascii_hexdigit())
    }

    /// Compares with the hash that names the blob, and removes a part that differs.
    fn check(&self, hash: Sha256, part: &Path) -> Result<(), Fault> {
        if !self.is_sha256() {
            return Ok(());
        }
        let found = format!("{:x}", hash.finalize());
        if found.eq_ignore_ascii_case(&self.meta.etag) {
            return Ok(());
        }
        fs::remove_file(part).map_err(|e| Fault::disk(part, e))?;
        Err(Fault::Corrupt(format!(
            "its SHA-256 is {found}, expected {}",
            self.meta.etag
        )))
    }
}
