//! The Hub's HTTP side: what a file is (`HEAD`) and its bytes (`GET`), with time limits on every wait.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, Uri, header};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::Environment;
use super::errors::Fault;
use crate::model::layout::is_plain;

/// As many redirects as browsers and `huggingface_hub` follow in practice; the Hub uses one or two.
const MAX_REDIRECTS: u32 = 10;

/// A connection to a Hub.
pub(super) struct Remote {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    /// Whether any request was answered: then a failing connection is worth another try.
    answered: AtomicBool,
}

/// What the Hub says of a file.
#[derive(Debug)]
pub(super) struct Meta {
    /// The commit that the revision stands for.
    pub commit: Option<String>,
    /// Names the blob: the SHA-256 of large files, a Git hash of small ones.
    pub etag: String,
    /// In bytes.
    pub size: Option<u64>,
}

impl Remote {
    pub fn new(settings: &Environment) -> Result<Self, Fault> {
        let mut config = Agent::config_builder()
            .user_agent(concat!(
                env!("CARGO_PKG_NAME"),
                "/",
                env!("CARGO_PKG_VERSION")
            ))
            // Compressed answers have other lengths and cannot be resumed.
            .accept_encoding("identity")
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(settings.connect_timeout))
            .timeout_connect(Some(settings.connect_timeout))
            .timeout_recv_response(Some(settings.read_timeout))
            .timeout_per_read(Some(settings.read_timeout))
            .timeout_per_write(Some(settings.read_timeout));
        if let Some(file) = &settings.certificates {
            let roots = RootCerts::new_with_certs(&read_certificates(file)?);
            config = config.tls_config(TlsConfig::builder().root_certs(roots).build());
        }
        Ok(Remote {
            agent: config.build().new_agent(),
            endpoint: settings.endpoint.clone(),
            token: settings.token.clone(),
            answered: AtomicBool::new(false),
        })
    }

    pub fn answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    fn url(&self, repo: &str, revision: &str, path: &str) -> String {
        let revision: String = revision.bytes().map(escape).collect();
        format!("{}/{repo}/resolve/{revision}/{path}", self.endpoint)
    }

    /// Asks what `path` is at `revision`.
    ///
    /// Large files are redirected to another host, and only the redirect itself carries their hash; so redirects are
    /// followed just as far as they carry none.
    pub fn head(&self, repo: &str, revision: &str, path: &str) -> Result<Meta, Fault> {
        let mut url = self.url(repo, revision, path);
        let host = host(&url);
        let mut commit = None;
        for _ in 0..MAX_REDIRECTS {
            let response = self.ask(
                &url,
                self.token.as_deref().filter(|_| self::host(&url) == host),
            )?;
            let text = |name: &str| header_text(&response, name);
            commit = text("x-repo-commit").or(commit);
            let etag = text("x-linked-etag").or_else(|| text("etag"));
            let status = response.status();
            if let (true, Some(location)) = (status.is_redirection(), text("location")) {
                let elsewhere = location.contains("://");
                if !elsewhere || etag.is_none() {
                    url = resolve(&url, &location)?;
                    continue;
                }
            } else if !status.is_success() {
                return Err(status_fault(&response));
            }
            let etag = etag.ok_or_else(|| Fault::NotAHub(format!("no ETag for {url}")))?;
            let etag = etag.trim_start_matches("W/").trim_matches('"').to_string();
            if !is_plain(&etag) {
                return Err(Fault::NotAHub(format!("{etag:?} as ETag of {url}")));
            }
            if let Some(commit) = commit.as_ref().filter(|commit| !is_plain(commit)) {
                return Err(Fault::NotAHub(format!(
                    "{commit:?} as X-Repo-Commit of {url}"
                )));
            }
            let size = match (text("x-linked-size"), status.as_u16()) {
                (Some(size), _) => size.parse().ok(),
                (None, 200) => text("content-length").and_then(|size| size.parse().ok()),
                (None, 206) => content_range(&response).and_then(|(_, total)| total),
                _ => None,
            };
            return Ok(Meta { commit, etag, size });
        }
        Err(Fault::NotAHub(format!(
            "more than {MAX_REDIRECTS} redirects, the last to {url}"
        )))
    }

    /// `HEAD`, or the first byte from servers that do not know `HEAD`.
    fn ask(&self, url: &str, token: Option<&str>) -> Result<Response<Body>, Fault> {
        let mut request = self.agent.head(url);
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let response = self.seen(request.call())?;
        if !matches!(response.status().as_u16(), 405 | 501) {
            return Ok(response);
        }
        let mut request = self.agent.get(url).header(header::RANGE, "bytes=0-0");
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        self.seen(request.call())
    }

    /// Asks for the bytes of `path` from `start` on; the answer's status is 200 (all), 206 (the rest) or 416.
    pub fn get(
        &self,
        repo: &str,
        revision: &str,
        path: &str,
        start: u64,
    ) -> Result<Response<Body>, Fault> {
        let mut request = self.agent.get(self.url(repo, revision, path));
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if start > 0 {
            request = request.header(header::RANGE, format!("bytes={start}-"));
        }
        let request = request
            .config()
            .max_redirects(MAX_REDIRECTS)
            // Never to the host that large files come from: its addresses are signed.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .build();
        let response = self.seen(request.call())?;
        match response.status().as_u16() {
            200 | 206 | 416 => Ok(response),
            _ => Err(status_fault(&response)),
        }
    }

    fn seen(&self, result: Result<Response<Body>, ureq::Error>) -> Result<Response<Body>, Fault> {
        let response = result.map_err(|error| self.connection_fault(error))?;
        self.answered.store(true, Ordering::Relaxed);
        Ok(response)
    }

    fn connection_fault(&self, error: ureq::Error) -> Fault {
        use std::io::ErrorKind;

        use ureq::{Error, Timeout};
        let host = host(&self.endpoint);
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

/// First byte and, where known, size of the whole file, from `Content-Range: bytes 5-9/10`.
pub(super) fn content_range(response: &Response<Body>) -> Option<(u64, Option<u64>)> {
    let text = header_text(response, "content-range")?;
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (start, _) = range.split_once('-')?;
    Some((start.parse().ok()?, total.parse().ok()))
}

fn header_text(response: &Response<Body>, name: &str) -> Option<String> {
    let text = response.headers().get(name)?.to_str().ok()?.trim();
    (!text.is_empty()).then(|| text.to_string())
}

fn status_fault(response: &Response<Body>) -> Fault {
    Fault::Status {
        status: response.status().as_u16(),
        code: header_text(response, "x-error-code").filter(|code| is_plain(code)),
    }
}

fn host(url: &str) -> String {
    url.parse::<Uri>()
        .ok()
        .and_then(|uri| uri.authority().map(ToString::to_string))
        .unwrap_or_else(|| url.to_string())
}

/// The address that a `Location` header means.
fn resolve(base: &str, location: &str) -> Result<String, Fault> {
    if location.contains("://") {
        return Ok(location.to_string());
    }
    let bad = || Fault::NotAHub(format!("a redirect from {base} to {location:?}"));
    let uri: Uri = base.parse().map_err(|_| bad())?;
    let scheme = uri.scheme_str().ok_or_else(bad)?;
    let authority = uri.authority().ok_or_else(bad)?;
    match location.strip_prefix("//") {
        Some(rest) => Ok(format!("{scheme}://{rest}")),
        None if location.starts_with('/') => Ok(format!("{scheme}://{authority}{location}")),
        None => Err(bad()),
    }
}

/// A byte of a revision as it is written in an address, `/` included.
fn escape(byte: u8) -> String {
    match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
            (byte as char).to_string()
        }
        _ => format!("%{byte:02X}"),
    }
}

fn read_certificates(file: &Path) -> Result<Vec<Certificate<'static>>, Fault> {
    let bad = |why: String| Fault::Certificates(format!("SSL_CERT_FILE {}: {why}", file.display()));
    let pem = std::fs::read(file).map_err(|e| bad(e.to_string()))?;
    let certificates: Vec<_> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    match certificates.is_empty() {
        true => Err(bad("expected PEM certificates, found none".into())),
        false => Ok(certificates),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_is_escaped_in_an_address() {
        let escaped: String = "refs/pr/1 ü".bytes().map(escape).collect();
        assert_eq!(escaped, "refs%2Fpr%2F1%20%C3%BC");
    }

    #[test]
    fn a_redirect_may_be_relative_to_the_host() {
        let base = "http://127.0.0.1:80/a/b";
        assert_eq!(
            resolve(base, "/c?d=1").unwrap(),
            "http://127.0.0.1:80/c?d=1"
        );
        assert_eq!(resolve(base, "https://x.y/z").unwrap(), "https://x.y/z");
        assert!(resolve(base, "elsewhere").is_err());
    }
}
