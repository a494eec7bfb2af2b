//! The Hub's HTTP side: what a repository holds, and the bytes of a file, with time limits on every wait.
//!
//! hf-hub writes the addresses and headers; an agent of our own sends them, since hf-hub's waits without limit, trusts
//! the public certificates alone and keeps the Hub's error codes to itself.

use std::cell::Cell;
use std::path::Path;

use hf_hub::api::sync::{Api, ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde::Deserialize;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response, Uri, header};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::Environment;
use super::cache::is_commit;
use super::errors::Fault;
use crate::model::layout::is_plain;

/// A connection to a repository of a Hub.
pub(super) struct Remote<'a> {
    agent: Agent,
    api: Api,
    /// The access token and the name of this program.
    headers: HeaderMap,
    pub settings: &'a Environment,
    pub repo: &'a str,
    /// Whether any request was answered: then a failing connection is worth another try.
    pub answered: Cell<bool>,
}

/// What a repository holds: the answer to `/api/models/REPO/revision/REVISION?blobs=true`.
#[derive(Deserialize)]
pub(super) struct Listing {
    #[serde(rename = "sha")]
    pub commit: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    #[serde(rename = "blobId")]
    git_hash: Option<String>,
    size: Option<u64>,
    /// Of a large file, of which Git, and so the fields above, may know only a pointer.
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

/// What the Hub says of a file.
pub(super) struct Meta {
    /// Names the blob: the SHA-256 of large files, a Git hash of small ones.
    pub etag: String,
    /// In bytes.
    pub size: Option<u64>,
}

impl Listing {
    fn find(&self, path: &str) -> Option<&Sibling> {
        self.siblings.iter().find(|file| file.rfilename == path)
    }

    pub fn has(&self, path: &str) -> bool {
        self.find(path).is_some()
    }

    pub fn meta(&self, path: &str) -> Meta {
        let said = self.find(path).and_then(|file| match &file.lfs {
            Some(lfs) => Some((&lfs.sha256, Some(lfs.size))),
            None => Some((file.git_hash.as_ref()?, file.size)),
        });
        match said {
            Some((etag, size)) if is_plain(etag) => Meta {
                etag: etag.clone(),
                size,
            },
            // Some mirrors list names alone. The blob needs no more than a name of its own; its size comes with it.
            _ => Meta {
                etag: format!("{}-{}", self.commit, path.replace('/', "-")),
                size: None,
            },
        }
    }
}

impl<'a> Remote<'a> {
    pub fn new(settings: &'a Environment, repo: &'a str) -> Result<Self, Fault> {
        let mut config = Agent::config_builder()
            // Compressed answers have other lengths and cannot be resumed.
            .accept_encoding("identity")
            .http_status_as_error(false)
            .max_redirects_will_error(false)
            // Never to the host that large files come from: its addresses are signed.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_resolve(Some(settings.connect_timeout))
            .timeout_connect(Some(settings.connect_timeout))
            .timeout_recv_response(Some(settings.read_timeout))
            .timeout_per_read(Some(settings.read_timeout))
            .timeout_per_write(Some(settings.read_timeout));
        if let Some(file) = &settings.certificates {
            let roots = RootCerts::new_with_certs(&read_certificates(file)?);
            config = config.tls_config(TlsConfig::builder().root_certs(roots).build());
        }
        let api = ApiBuilder::from_cache(Cache::new(settings.cache.clone()))
            .with_endpoint(settings.endpoint.clone())
            .with_token(settings.token.clone())
            .with_user_agent(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|error| Fault::NotAHub(error.to_string()))?;
        let request = api.model(repo.to_string()).info_request();
        let headers = request.headers_ref().ok_or_else(|| {
            Fault::NotAHub(format!("HF_ENDPOINT is no address: {}", settings.endpoint))
        })?;
        Ok(Remote {
            agent: config.build().new_agent(),
            headers: headers.clone(),
            api,
            settings,
            repo,
            answered: Cell::new(false),
        })
    }

    /// Asks what the repository holds at `revision`.
    pub fn list(&self, revision: &str) -> Result<Listing, Fault> {
        let request = self.at(revision).info_request();
        let url = request.uri_ref().map(ToString::to_string);
        let url = url.unwrap_or_default() + "?blobs=true";
        let text = self.send(&url, 0)?.body_mut().read_to_vec();
        let text = text.map_err(|error| self.connection_fault(error))?;
        let mut listing: Listing = serde_json::from_slice(&text).map_err(|error| {
            Fault::NotAHub(format!("no list of files in JSON at {url}: {error}"))
        })?;
        if is_commit(revision) {
            listing.commit = revision.to_string();
        }
        if is_plain(&listing.commit) {
            return Ok(listing);
        }
        let commit = listing.commit;
        Err(Fault::NotAHub(format!("{commit:?} as commit at {url}")))
    }

    /// Asks for the bytes of `path` from `start` on; the answer's status is 200 (all of them) or, where `start` is not
    /// 0, 206 (the rest) or 416 (there is no rest).
    pub fn get(&self, commit: &str, path: &str, start: u64) -> Result<Response<Body>, Fault> {
        self.send(&self.at(commit).url(&escape(path)), start)
    }

    fn at(&self, revision: &str) -> ApiRepo {
        let (repo, revision) = (self.repo.to_string(), escape(revision));
        self.api
            .repo(Repo::with_revision(repo, RepoType::Model, revision))
    }

    /// Sends what hf-hub would, and within this program's limits.
    fn send(&self, url: &str, start: u64) -> Result<Response<Body>, Fault> {
        let mut request = self.agent.get(url);
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        if start > 0 {
            request = request.header(header::RANGE, format!("bytes={start}-"));
        }
        let response = request
            .call()
            .map_err(|error| self.connection_fault(error))?;
        self.answered.set(true);
        match response.status().as_u16() {
            200 => Ok(response),
            206 | 416 if start > 0 => Ok(response),
            status => Err(Fault::Status {
                status,
                code: header_text(&response, "x-error-code").filter(|code| is_plain(code)),
            }),
        }
    }

    fn connection_fault(&self, error: ureq::Error) -> Fault {
        use std::io::ErrorKind;

        use ureq::{Error, Timeout};
        let host = host(&self.settings.endpoint);
        let no_address = || {
            Fault::Unreachable(format!(
                "{host} has no address: there is no network, or HF_ENDPOINT is wrong"
            ))
        };
        let insecure = |why: String| {
            Fault::Unreachable(format!(
                "no secure connection to {host}: {why} (if a proxy has its own certificate, name it in SSL_CERT_FILE)"
            ))
        };
        match error {
            Error::HostNotFound => no_address(),
            Error::Timeout(Timeout::Resolve | Timeout::Connect) => {
                Fault::Unreachable(format!("{host} cannot be reached: no connection in time"))
            }
            Error::Timeout(_) => Fault::Lost(format!("{host} does not answer")),
            Error::Io(error) => match error.kind() {
                ErrorKind::ConnectionRefused => {
                    Fault::Unreachable(format!("{host} refuses the connection"))
                }
                ErrorKind::ConnectionReset
                | ErrorKind::BrokenPipe
                | ErrorKind::UnexpectedEof
                | ErrorKind::ConnectionAborted => {
                    Fault::Lost(format!("the connection to {host} broke: {error}"))
                }
                // How rustls reports a failed handshake.
                ErrorKind::InvalidData => insecure(error.to_string()),
                // The standard library has no kind for it, but these words for every platform.
                _ if error.to_string().contains("failed to lookup address") => no_address(),
                _ => Fault::Unreachable(format!("no connection to {host}: {error}")),
            },
            Error::Rustls(error) => insecure(error.to_string()),
            Error::BadUri(what) => Fault::NotAHub(format!("HF_ENDPOINT is no address: {what}")),
            error => Fault::NotAHub(error.to_string()),
        }
    }
}

/// The first byte of a part of a file, from `Content-Range: bytes 5-9/10`.
pub(super) fn range_start(response: &Response<Body>) -> Option<u64> {
    let text = header_text(response, "content-range")?;
    let (start, _) = text.strip_prefix("bytes ")?.split_once('-')?;
    start.parse().ok()
}

fn header_text(response: &Response<Body>, name: &str) -> Option<String> {
    let value = response.headers().get(name)?.to_str().ok()?;
    Some(value.trim().to_string())
}

fn host(url: &str) -> String {
    url.parse::<Uri>()
        .ok()
        .and_then(|uri| uri.authority().map(ToString::to_string))
        .unwrap_or_else(|| url.to_string())
}

/// A revision or path as it is written in an address; the slashes of a revision hf-hub escapes.
fn escape(text: &str) -> String {
    let escape = |byte| match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
            char::from(byte).to_string()
        }
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(escape).collect()
}

fn read_certificates(file: &Path) -> Result<Vec<Certificate<'static>>, Fault> {
    let bad = |why: String| Fault::Certificates(format!("SSL_CERT_FILE {}: {why}", file.display()));
    let pem = std::fs::read(file).map_err(|e| bad(e.to_string()))?;
    let certificates = parse_pem(&pem).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    let certificates: Vec<_> = certificates.collect();
    if certificates.is_empty() {
        return Err(bad("expected PEM certificates, found none".into()));
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_is_escaped_in_an_address() {
        let revision = escape("refs/pr/1 ü");
        let repo = Repo::with_revision("a/b".into(), RepoType::Model, revision);
        assert_eq!(repo.url_revision(), "refs%2Fpr%2F1%20%C3%BC");
    }
}
