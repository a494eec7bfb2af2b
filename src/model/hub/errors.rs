//! What can go wrong on the way from the Hub to the cache, and how the user is told.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Environment, Part};

/// One thing that went wrong, before it is put into words.
#[derive(Debug)]
pub(super) enum Fault {
    /// The server answered with an error; `code` is the Hub's own name for it (`X-Error-Code`).
    Status { status: u16, code: Option<String> },
    /// There was no connection: no address, refused, no TLS, no answer in time.
    Unreachable(String),
    /// An answer broke off or stood still.
    Lost(String),
    /// The transfer ended in order but early.
    Short { got: u64, expected: u64 },
    /// All bytes came, and they are the wrong ones.
    Corrupt(String),
    /// The answer is not one that a Hub gives.
    NotAHub(String),
    /// A sharded model's index that cannot be used.
    BadIndex(String),
    /// The cache cannot be read or written.
    Disk { path: PathBuf, error: io::Error },
    /// The network is not to be used.
    Offline { looked_in: PathBuf },
    /// `SSL_CERT_FILE` cannot be used.
    Certificates(String),
    /// Another process holds the lock and gets nowhere.
    Busy { lock: PathBuf, patience: Duration },
}

impl Fault {
    /// Makes of an error that `path` met a fault.
    pub fn disk(path: &Path) -> impl Fn(io::Error) -> Self {
        let path = path.to_path_buf();
        move |error| Fault::Disk {
            path: path.clone(),
            error,
        }
    }

    /// Whether the same request may well succeed a moment later.
    pub fn is_transient(&self) -> bool {
        match self {
            Fault::Status { status, .. } => matches!(status, 408 | 429 | 500..=599),
            Fault::Unreachable(_) | Fault::Lost(_) | Fault::Short { .. } => true,
            _ => false,
        }
    }

    /// Whether the repository is there but this file is not in it.
    pub fn is_absent_file(&self) -> bool {
        matches!(self, Fault::Status { status: 404, code }
            if !matches!(code.as_deref(), Some("RepoNotFound" | "RevisionNotFound")))
    }

    /// The cause in a few words, for use within a sentence.
    pub fn cause(&self) -> String {
        match self {
            Fault::Status { status, code } => {
                let code = code.iter().map(|code| format!(", {code}"));
                let code: String = code.collect();
                let name = match status {
                    401 => "not authorised",
                    403 => "forbidden",
                    404 => "not found",
                    429 => "too many requests",
                    500..=599 => "the server failed",
                    _ => "an unexpected answer",
                };
                format!("{name} (HTTP {status}{code})")
            }
            Fault::Unreachable(why) | Fault::Lost(why) | Fault::Certificates(why) => why.clone(),
            Fault::Short { got, expected } => {
                format!("the file ended after {got} of {expected} bytes")
            }
            Fault::Corrupt(why) => format!("the file arrived corrupted: {why}; it was removed"),
            Fault::NotAHub(why) => format!("the answer is not a Hub's: {why}"),
            Fault::BadIndex(why) => format!("the index of the shards is unusable: {why}"),
            Fault::Disk { path, error } => format!("cannot use {}: {error}", path.display()),
            Fault::Offline { looked_in } => format!(
                "HF_HUB_OFFLINE is set, and the model is not whole in {}",
                looked_in.display()
            ),
            Fault::Busy { lock, patience } => format!(
                "another process has held {} for {} seconds without progress",
                lock.display(),
                patience.as_secs()
            ),
        }
    }
}

/// A fault and the file that it befell.
#[derive(Debug)]
pub(super) struct Failure {
    pub path: String,
    pub fault: Fault,
    /// Bytes of the file that are kept for the next try.
    pub kept: u64,
}

impl Failure {
    /// Makes of a fault that befell `path` a failure.
    pub fn of(path: &str) -> impl Fn(Fault) -> Self {
        move |fault| Failure {
            path: path.to_string(),
            fault,
            kept: 0,
        }
    }
}

/// The whole message: what was wanted, from where, the cause, and what to do.
pub(super) fn explain(
    failure: &Failure,
    repo: &str,
    revision: &str,
    parts: &[Part],
    settings: &Environment,
) -> anyhow::Error {
    let Failure { path, fault, kept } = failure;
    let endpoint = &settings.endpoint;
    let cause = fault.cause();
    let cure = cure(fault, *kept, repo, parts, settings);
    if let Fault::Offline { .. } = fault {
        return anyhow::anyhow!("{cause}: no {path} of {repo} (revision {revision}) there\n{cure}");
    }
    anyhow::anyhow!(
        "cannot download {path} of {repo} (revision {revision}) from {endpoint}: {cause}\n{cure}"
    )
}

fn cure(fault: &Fault, kept: u64, repo: &str, parts: &[Part], settings: &Environment) -> String {
    let endpoint = &settings.endpoint;
    let flag = flag(parts, settings);
    match fault {
        Fault::Status { status, code } => match (status, code.as_deref()) {
            // The Hub answers 401 for repositories that do not exist, lest private ones be found out.
            (401 | 403, code) => {
                let token = match settings.token {
                    Some(_) => "the access token in use does not open it",
                    None => "no access token is set",
                };
                let absent = match code {
                    Some("RepoNotFound") => {
                        format!("\nIf it is not a private repository, check its spelling in {flag}.")
                    }
                    _ => String::new(),
                };
                format!(
                    "The repository is private or gated, and {token}. Accept its licence on {endpoint}/{repo}, \
                     make a token on {endpoint}/settings/tokens, and set HF_TOKEN to it.{absent}"
                )
            }
            (404, Some("RepoNotFound")) => format!("There is no such repository: check {flag}."),
            (404, Some("RevisionNotFound")) => {
                format!("The repository has no such revision: check --revision, see {endpoint}/{repo}/commits/main")
            }
            (404, _) => format!(
                "Check {flag} and --revision: the repository must exist, hold this revision, and be in the diffusers \
                 layout with .safetensors weights. See {endpoint}/{repo}"
            ),
            (429, _) => "Wait some minutes and run the same command again; HF_TOKEN raises the limit.".into(),
            (500..=599, _) => format!(
                "The server is in trouble: run the same command again later.\n{}",
                ways_round(parts, settings)
            ),
            _ => format!(
                "Check HF_ENDPOINT and the proxy settings.\n{}",
                ways_round(parts, settings)
            ),
        },
        Fault::Unreachable(_) => ways_round(parts, settings),
        Fault::Lost(_) | Fault::Short { .. } => {
            let resume = match kept {
                0 => "Run the same command again.".to_string(),
                _ => format!("{kept} bytes of it are kept: the same command goes on from there."),
            };
            let again = match fault {
                Fault::Short { .. } => " If it ends early again, the server's file is at fault.",
                _ => "",
            };
            format!("{resume}{again}\n{}", ways_round(parts, settings))
        }
        Fault::Corrupt(_) => format!(
            "Run the same command again. If it happens again, {endpoint} or a proxy on the way changes files: try \
             another network, or give a folder as {flag}."
        ),
        Fault::NotAHub(_) => format!(
            "Check HF_ENDPOINT, and that no proxy or login page answers in its place.\n{}",
            ways_round(parts, settings)
        ),
        Fault::BadIndex(_) => {
            format!("The repository is broken: give another one, or a folder, as {flag}.")
        }
        Fault::Disk { error, .. } => match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => format!(
                "Free some space there, or put the cache elsewhere by setting HF_HUB_CACHE; what has arrived is kept, \
                 and the same command goes on from there. The cache is {}",
                settings.cache.display()
            ),
            _ => format!(
                "The cache {} must be a folder that can be written: mend its permissions, or set HF_HUB_CACHE to \
                 another one.",
                settings.cache.display()
            ),
        },
        Fault::Offline { .. } => offline_cure(parts, settings),
        Fault::Certificates(_) => "Correct SSL_CERT_FILE, or unset it.".into(),
        Fault::Busy { .. } => {
            "End that process (perhaps another download of the same model), then run this command again.".into()
        }
    }
}

/// What to do where there is no network.
fn ways_round(parts: &[Part], settings: &Environment) -> String {
    let cache = settings.cache.display();
    let flag = flag(parts, settings);
    let tiny = match flag {
        "--model" => {
            "\n  --model tiny       to try the program out with the small model built into it"
        }
        _ => "",
    };
    let folder = format!("{flag} DIR");
    format!(
        "Ways round it:\n  {folder:18} with a folder in the diffusers layout, such as a copy from another machine\n  \
         HF_HUB_OFFLINE=1   with a cache filled on another machine and copied to {cache}\n{:21}(HF_HOME or \
         HF_HUB_CACHE name another place){tiny}",
        ""
    )
}

/// For `HF_HUB_OFFLINE=1` and a cache that lacks something.
fn offline_cure(parts: &[Part], settings: &Environment) -> String {
    let flag = flag(parts, settings);
    let tiny = match flag {
        "--model" => ", or --model tiny for the small model built into the program",
        _ => "",
    };
    format!(
        "Run once without HF_HUB_OFFLINE to download it, copy a filled cache to {} (HF_HOME or HF_HUB_CACHE name \
         another place), or give {flag} DIR with a folder in the diffusers layout{tiny}.",
        settings.cache.display(),
    )
}

/// The option that names the repository.
fn flag(parts: &[Part], settings: &Environment) -> &'static str {
    match parts {
        [Part::Vae | Part::BareVae] => "--vae",
        _ => settings.named_by,
    }
}
