//! A small Hugging Face Hub on loopback: one model repository, with the redirects and headers of the real one,
//! and faults on demand. Point `HF_ENDPOINT` (or `Environment::endpoint`) to `HubServer::url`.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sha2::{Digest, Sha256};

pub const REPO: &str = "org/model";
/// The one commit of the repository; `main` stands for it too.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What [`Seen::file`] is for a request for the list of files, and the name for [`HubServer::fail`] there.
pub const LIST: &str = "(the list of files)";

/// What a server can do wrong. All but the first two concern the bytes of a file, or of the list.
#[derive(Debug, Clone)]
pub enum Fault {
    /// This status, with this `X-Error-Code`.
    Status(u16, Option<&'static str>),
    /// No answer to anything.
    Silence,
    /// The connection ends after so many bytes.
    CutAfter(usize),
    /// No more than so many bytes, and the connection stays open.
    StallAfter(usize),
    /// Only so many bytes, as if they were all.
    Short(usize),
    /// All bytes, the middle one changed.
    WrongByte,
    /// More bytes than the list said.
    Longer,
    /// `Range` is not looked at.
    IgnoreRange,
}

/// A request as the server saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub method: String,
    /// Path within the repository, whatever address it was asked at.
    pub file: String,
    /// First byte asked for.
    pub range: Option<usize>,
    pub token: Option<String>,
    /// Asked at the host of large files, not at the Hub's own.
    pub cdn: bool,
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    faults: Vec<(String, Fault, usize)>,
    seen: Vec<Seen>,
    token: Option<String>,
    pace: Duration,
    web_page: bool,
    names_alone: bool,
}

pub struct HubServer {
    port: u16,
    state: Arc<Mutex<State>>,
}

impl HubServer {
    /// Serves `files` (path in the repository, bytes) as the repository [`REPO`] for as long as the test runs.
    pub fn start<P: Into<String>>(files: impl IntoIterator<Item = (P, Vec<u8>)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let files = files
            .into_iter()
            .map(|(path, bytes)| (path.into(), bytes))
            .collect();
        let state = Arc::new(Mutex::new(State {
            files,
            ..State::default()
        }));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                // A client that hangs up is none of the server's business.
                std::thread::spawn(move || serve(stream, port, &state).ok());
            }
        });
        HubServer { port, state }
    }

    /// Serves all files under `folder`.
    pub fn of_folder(folder: &Path) -> Self {
        fn walk(folder: &Path, prefix: &str, files: &mut Vec<(String, Vec<u8>)>) {
            for entry in std::fs::read_dir(folder).unwrap().flatten() {
                let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
                if entry.path().is_dir() {
                    walk(&entry.path(), &format!("{name}/"), files);
                } else {
                    files.push((name, std::fs::read(entry.path()).unwrap()));
                }
            }
        }
        let mut files = Vec::new();
        walk(folder, "", &mut files);
        HubServer::start(files)
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Lets the next `times` requests for `file` (`*`: any) meet `fault`.
    pub fn fail(&self, file: &str, fault: Fault, times: usize) {
        self.state
            .lock()
            .unwrap()
            .faults
            .push((file.into(), fault, times));
    }

    pub fn heal(&self) {
        self.state.lock().unwrap().faults.clear();
    }

    /// Asks for this token, as a gated repository does.
    pub fn require_token(&self, token: &str) {
        self.state.lock().unwrap().token = Some(token.into());
    }

    /// Pauses after every 16 KiB of a file.
    pub fn slow_down(&self, pace: Duration) {
        self.state.lock().unwrap().pace = pace;
    }

    /// Answers everything with a web page, as the login page of a hotel's network does.
    pub fn become_a_login_page(&self) {
        self.state.lock().unwrap().web_page = true;
    }

    /// Lists files without their sizes and hashes, as some mirrors do.
    pub fn list_names_alone(&self) {
        self.state.lock().unwrap().names_alone = true;
    }

    /// The requests since the last call.
    pub fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.state.lock().unwrap().seen)
    }
}

/// The hash that the Hub gives a file's blob: SHA-256 for large files; for small ones 40 digits, here of the same.
pub fn etag(file: &str, bytes: &[u8]) -> String {
    let hash = format!("{:x}", Sha256::digest(bytes));
    if is_large(file) {
        hash
    } else {
        hash[..40].to_string()
    }
}

fn is_large(file: &str) -> bool {
    file.ends_with(".safetensors")
}

/// The answer to `/api/models/REPO/revision/REVISION?blobs=true`, as far as clients read it.
fn list(state: &State) -> String {
    let siblings = state.files.iter().map(|(file, bytes)| {
        let (size, hash) = (bytes.len(), etag(file, bytes));
        if state.names_alone {
            return serde_json::json!({"rfilename": file});
        }
        if !is_large(file) {
            return serde_json::json!({"rfilename": file, "blobId": hash, "size": size});
        }
        let lfs = serde_json::json!({"sha256": hash, "size": size, "pointerSize": 134});
        // Git's hash is that of the pointer.
        let pointer = format!("{:x}", Sha256::digest(&hash))[..40].to_string();
        serde_json::json!({"rfilename": file, "blobId": pointer, "size": size, "lfs": lfs})
    });
    serde_json::json!({
        "id": REPO, "modelId": REPO, "private": false, "gated": false, "disabled": false, "sha": COMMIT, "tags": [],
        "siblings": siblings.collect::<Vec<_>>(),
    })
    .to_string()
}

fn serve(stream: TcpStream, port: u16, state: &Mutex<State>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or(Ok(String::new()))?;
    let mut words = request.split(' ').map(str::to_string);
    let (method, url) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let (mut range, mut token, mut host) = (None, None, String::new());
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else {
            break;
        };
        match name.to_lowercase().as_str() {
            "range" => {
                range = value
                    .strip_prefix("bytes=")
                    .and_then(|v| v.split('-').next()?.parse().ok())
            }
            "authorization" => token = value.strip_prefix("Bearer ").map(str::to_string),
            "host" => host = value.to_string(),
            _ => {}
        }
    }
    answer(
        stream,
        port,
        state,
        &method,
        &url,
        range,
        token,
        host.starts_with("localhost"),
    )
}

#[allow(clippy::too_many_arguments, reason = "the parts of one request")]
fn answer(
    mut stream: TcpStream,
    port: u16,
    state: &Mutex<State>,
    method: &str,
    url: &str,
    range: Option<usize>,
    token: Option<String>,
    cdn: bool,
) -> std::io::Result<()> {
    let resolve = format!("/{REPO}/resolve/");
    let direct = format!("/api/resolve-cache/models/{REPO}/{COMMIT}/");
    let info = format!("/api/models/{REPO}/revision/");
    let (file, revision, redirected) = if let Some(rest) = url.strip_prefix(&info) {
        let revision = rest.split('?').next().unwrap_or(rest);
        (LIST.to_string(), revision.to_string(), false)
    } else if let Some(rest) = url.strip_prefix(&resolve) {
        let (revision, file) = rest.split_once('/').unwrap_or((rest, ""));
        (file.to_string(), revision.to_string(), false)
    } else if let Some(file) = url.strip_prefix("/cdn/").or(url.strip_prefix(&direct)) {
        (file.to_string(), COMMIT.to_string(), true)
    } else {
        (url.to_string(), String::new(), false)
    };
    let (bytes, fault, pace, list) = {
        let mut state = state.lock().unwrap();
        state.seen.push(Seen {
            method: method.into(),
            file: file.clone(),
            range,
            token: token.clone(),
            cdn,
        });
        if state.web_page {
            return head(&mut stream, "200 OK", &["Content-Length: 15"])
                .and_then(|()| stream.write_all(b"<html>Log in</>"));
        }
        // Anyone may see what a gated repository holds.
        if !cdn && file != LIST && state.token.is_some() && state.token != token {
            return head(
                &mut stream,
                "401 Unauthorized",
                &["X-Error-Code: GatedRepo", "Content-Length: 0"],
            );
        }
        let of_bytes = method == "GET" && (redirected || file == LIST);
        let fault = state.faults.iter_mut().find(|(name, fault, left)| {
            let applies = match fault {
                Fault::Status(..) | Fault::Silence => true,
                _ => of_bytes,
            };
            (name == "*" || *name == file) && *left > 0 && applies
        });
        let fault = fault.map(|(_, fault, left)| {
            *left -= 1;
            fault.clone()
        });
        let list = list(&state);
        (state.files.get(&file).cloned(), fault, state.pace, list)
    };
    match &fault {
        Some(Fault::Status(status, code)) => {
            let code = code.map_or(String::new(), |code| format!("X-Error-Code: {code}\r\n"));
            return head(
                &mut stream,
                &format!("{status} Fault"),
                &[&format!("{code}Content-Length: 0")],
            );
        }
        Some(Fault::Silence) => return wait_for_hangup(&mut stream),
        _ => {}
    }
    let is_list = file == LIST;
    let is_known = is_list || redirected || url.starts_with(&resolve);
    let absent = match (is_known, &*revision, &bytes) {
        (false, _, _) => Some("RepoNotFound"),
        (_, revision, _) if ![COMMIT, "main", "refs%2Fpr%2F1"].contains(&revision) => {
            Some("RevisionNotFound")
        }
        (_, _, None) if !is_list => Some("EntryNotFound"),
        _ => None,
    };
    let commit = format!("X-Repo-Commit: {COMMIT}");
    if let Some(code) = absent {
        return head(
            &mut stream,
            "404 Not Found",
            &[
                &format!("X-Error-Code: {code}"),
                &commit,
                "Content-Length: 0",
            ],
        );
    }
    if is_list {
        let fields = ["Content-Type: application/json; charset=utf-8"];
        return send_bytes(stream, method, list.into(), None, fault, pace, &fields);
    }
    let bytes = bytes.unwrap_or_default();
    let etag = etag(&file, &bytes);
    if !redirected && is_large(&file) {
        let location = format!("Location: http://localhost:{port}/cdn/{file}");
        let size = format!("X-Linked-Size: {}", bytes.len());
        let linked = format!("X-Linked-ETag: \"{etag}\"");
        let fields = [&*location, &size, &linked, &commit, "Content-Length: 0"];
        return head(&mut stream, "302 Found", &fields);
    }
    if !redirected {
        let location = format!("Location: {direct}{file}");
        return head(
            &mut stream,
            "307 Temporary Redirect",
            &[&location, &commit, "Content-Length: 0"],
        );
    }
    let etag = if cdn {
        "ETag: \"the-storage-has-its-own\"".to_string()
    } else {
        format!("ETag: W/\"{etag}\"")
    };
    send_bytes(stream, method, bytes, range, fault, pace, &[&etag, &commit])
}

fn send_bytes(
    mut stream: TcpStream,
    method: &str,
    mut bytes: Vec<u8>,
    range: Option<usize>,
    fault: Option<Fault>,
    pace: Duration,
    fields: &[&str],
) -> std::io::Result<()> {
    let mut range = range;
    match fault {
        Some(Fault::Short(n)) => bytes.truncate(n),
        Some(Fault::WrongByte) => {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        }
        Some(Fault::Longer) => bytes.extend_from_slice(b"and more"),
        Some(Fault::IgnoreRange) => range = None,
        _ => {}
    }
    let total = bytes.len();
    let start = range.unwrap_or(0);
    if range.is_some() && start >= total {
        let fields = [
            &format!("Content-Range: bytes */{total}"),
            "Content-Length: 0",
        ];
        return head(&mut stream, "416 Range Not Satisfiable", &fields);
    }
    let length = format!("Content-Length: {}", total - start);
    let mut fields = [fields, &[&length]].concat();
    let content_range = format!("Content-Range: bytes {start}-{}/{total}", total - 1);
    if range.is_some() {
        fields.push(&content_range);
        head(&mut stream, "206 Partial Content", &fields)?;
    } else {
        head(&mut stream, "200 OK", &fields)?;
    }
    if method == "HEAD" {
        return Ok(());
    }
    let body = &bytes[start..];
    let (sent, stall) = match fault {
        Some(Fault::CutAfter(n)) => (&body[..n.min(body.len())], false),
        Some(Fault::StallAfter(n)) => (&body[..n.min(body.len())], true),
        _ => (body, false),
    };
    for chunk in sent.chunks(16 * 1024) {
        stream.write_all(chunk)?;
        std::thread::sleep(pace);
    }
    if stall {
        wait_for_hangup(&mut stream)?;
    }
    Ok(())
}

/// One connection per request, so that each fault stays with its own request.
fn head(stream: &mut TcpStream, status: &str, fields: &[&str]) -> std::io::Result<()> {
    let fields = fields.join("\r\n");
    write!(
        stream,
        "HTTP/1.1 {status}\r\n{fields}\r\nConnection: close\r\n\r\n"
    )
}

fn wait_for_hangup(stream: &mut TcpStream) -> std::io::Result<()> {
    std::io::copy(stream, &mut std::io::sink()).map(drop)
}
