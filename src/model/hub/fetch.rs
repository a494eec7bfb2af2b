//! Brings one file into the cache: locked, resumed, checked, and only then given its final name.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;

use indicatif::ProgressBar;
use sha2::{Digest, Sha256};
use ureq::Body;
use ureq::http::Response;

use super::Job;
use super::cache::make_parent;
use super::errors::{Failure, Fault};
use super::remote::{Meta, Remote, range_start};

/// Bytes per read: large enough to cost nothing per call, small enough that an interruption loses little.
const CHUNK: usize = 256 * 1024;

/// A file of a repository on its way into the cache.
pub(super) struct Transfer<'a> {
    pub job: &'a Job<'a>,
    pub path: &'a str,
    pub meta: Meta,
}

/// Repeats what fails for a passing reason, with growing pauses. `progress` is a measure that grows when something
/// was achieved nevertheless; then the count starts anew.
pub(super) fn with_retries<T>(
    remote: &Remote,
    path: &str,
    progress: impl Fn() -> u64,
    mut attempt: impl FnMut() -> Result<T, Fault>,
) -> Result<T, Fault> {
    let settings = remote.settings;
    let mut best = progress();
    let mut pauses = settings.retry_pauses.iter();
    loop {
        let fault = match attempt() {
            // No network at all: say so at once.
            Err(fault @ Fault::Unreachable(_)) if !remote.answered.get() => return Err(fault),
            Err(fault) if fault.is_transient() => fault,
            result => return result,
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
        fs::metadata(self.job.cache.blob(&self.meta.etag)).is_ok_and(|blob| {
            blob.is_file() && self.meta.size.is_none_or(|size| size == blob.len())
        })
    }

    /// Downloads the blob unless it is there, and links it into the snapshot.
    ///
    /// # Errors
    /// The fault, and how many bytes are kept for the next time.
    pub fn run(&self) -> Result<(), Failure> {
        let cache = self.job.cache;
        let etag = &self.meta.etag;
        let failed = Failure::of(self.path);
        if !self.is_done() {
            let settings = self.job.remote.settings;
            make_parent(&cache.blob(etag)).map_err(&failed)?;
            let wait = || {
                settings.report.note(&format!(
                    "waiting for another process that downloads {}",
                    self.path
                ));
            };
            let lock = cache.lock(etag, settings.lock_patience, wait);
            let lock = lock.map_err(&failed)?;
            let part = cache.part(etag, &lock);
            if !self.is_done() {
                self.collect(&part).map_err(|fault| Failure {
                    kept: len(&part),
                    ..failed(fault)
                })?;
                let blob = cache.blob(etag);
                fs::rename(&part, &blob).map_err(|e| failed(Fault::disk(&blob)(e)))?;
            }
        }
        let commit = &self.job.listing.commit;
        cache.link(commit, self.path, etag).map_err(failed)
    }

    /// Collects all bytes of the file in `part`.
    fn collect(&self, part: &Path) -> Result<(), Fault> {
        let (remote, path) = (self.job.remote, self.path);
        let report = remote.settings.report;
        let before = len(part);
        let bar = report.file(path, self.meta.size);
        let fetch = || with_retries(remote, path, || len(part), || self.attempt(part, &bar));
        let mut result = fetch();
        if before > 0 && matches!(result, Err(Fault::Corrupt(_))) {
            // Perhaps what an earlier run left was at fault; a whole transfer tells.
            report.note(&format!(
                "{path}: the part from an earlier run was bad; starting anew"
            ));
            result = fetch();
        }
        bar.finish_and_clear();
        result
    }

    /// One request: appends to the part what is missing of it, and checks the whole.
    fn attempt(&self, part: &Path, bar: &ProgressBar) -> Result<(), Fault> {
        let disk = Fault::disk(part);
        let mut file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .open(part)
            .map_err(&disk)?;
        let mut have = file.metadata().map_err(&disk)?.len();
        if self.meta.size.is_some_and(|size| have > size) {
            file.set_len(0).map_err(&disk)?;
            have = 0;
        }
        let mut hash = Sha256::new();
        if have > 0 {
            std::io::copy(&mut file, &mut hash).map_err(&disk)?;
        }
        if self.meta.size != Some(have) {
            let commit = &self.job.listing.commit;
            let answer = self.job.remote.get(commit, self.path, have)?;
            let resumed = resumes(&answer, have, self.meta.size);
            if have > 0 && !matches!(resumed, Ok(true)) {
                file.set_len(0).map_err(&disk)?;
                (have, hash) = (0, Sha256::new());
            }
            resumed?;
            let rest = answer.body().content_length();
            let total = self.meta.size.or(rest.map(|rest| have + rest));
            if let Some(total) = total {
                bar.set_length(total);
            }
            bar.set_position(have);
            bar.reset_eta();
            let mut body = answer.into_body().into_reader();
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
                if let Some(total) = total.filter(|total| have > *total) {
                    fs::remove_file(part).map_err(&disk)?;
                    return Err(Fault::Corrupt(format!("more than {total} bytes")));
                }
                file.write_all(&chunk[..n]).map_err(&disk)?;
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
        file.sync_all().map_err(&disk)?;
        self.check(hash, part)
    }

    /// Compares with the hash that names the blob, and removes a part that differs. A Git hash is not looked at.
    fn check(&self, hash: Sha256, part: &Path) -> Result<(), Fault> {
        let expected = &self.meta.etag;
        let found = format!("{:x}", hash.finalize());
        let is_sha256 = expected.len() == 64 && expected.bytes().all(|b| b.is_ascii_hexdigit());
        if !is_sha256 || found.eq_ignore_ascii_case(expected) {
            return Ok(());
        }
        fs::remove_file(part).map_err(Fault::disk(part))?;
        Err(Fault::Corrupt(format!(
            "its SHA-256 is {found}, expected {expected}"
        )))
    }
}

/// Whether an answer goes on at byte `have`, rather than being the whole file.
fn resumes(answer: &Response<Body>, have: u64, size: Option<u64>) -> Result<bool, Fault> {
    match (answer.status().as_u16(), size) {
        (200, _) => Ok(false),
        (206, _) if range_start(answer) == Some(have) => Ok(true),
        // There is no byte after those that have come: the server's file is too short.
        (416, Some(expected)) => Err(Fault::Short {
            got: have,
            expected,
        }),
        _ => Err(Fault::Lost("the server does not resume there".into())),
    }
}

fn len(part: &Path) -> u64 {
    fs::metadata(part).map_or(0, |part| part.len())
}
