//! Running the program in a folder of its own, and looking at what it left there.

pub use std::fs;
use std::io::Write;
pub use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use image::{DynamicImage, RgbImage};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
pub use tempfile::TempDir;

pub use crate::data::data;

/// What a run of the program left on its two outputs.
#[derive(Debug)]
pub struct Ran {
    /// None: a signal ended it.
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Ran {
    /// Fails unless the run ended in `code`.
    #[track_caller]
    pub fn ends_in(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}", self.stderr);
        self
    }

    /// Fails unless the run said all of `parts` on standard error.
    #[track_caller]
    pub fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(
                self.stderr.contains(part),
                "{part:?} is not in: {}",
                self.stderr
            );
        }
        self
    }

    #[track_caller]
    pub fn never_says(self, part: &str) -> Self {
        assert!(
            !self.stderr.contains(part),
            "{part:?} is in: {}",
            self.stderr
        );
        self
    }

    /// Standard output as text.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    /// The lines of `--json`.
    pub fn json(&self) -> Vec<serde_json::Value> {
        let lines = self.text().lines();
        lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

/// The program, in `folder`, without what the developer's environment says. One thread, as the tests run side by side.
pub fn program(folder: &Path) -> Command {
    heed_signals();
    let mut command = Command::new(env!("CARGO_BIN_EXE_sd-upscale"));
    command.current_dir(folder).env("RAYON_NUM_THREADS", "1");
    // Nor what his configuration folder holds.
    command.env("XDG_CONFIG_HOME", "/nowhere");
    for name in [
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_TOKEN",
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
    ] {
        command.env_remove(name);
    }
    command
}

/// The tests themselves may have been started by `nohup` or a shell's `&`, and the program rightly goes on ignoring the
/// signals that those ignore.
fn heed_signals() {
    #[cfg(unix)]
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the default action is no function, so that nothing of ours runs in a handler.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// How long any one run may take before the test kills it: far beyond what the slowest machine needs.
const LIMIT: Duration = Duration::from_secs(300);

/// Kills a process that is still there after [`LIMIT`], so that no test waits for ever. Dropped, it lets the process be.
pub struct Watchdog {
    _alive: Sender<()>,
}

impl Watchdog {
    pub fn of(child: &Child) -> Self {
        let (alive, ended) = channel::<()>();
        let id = child.id();
        std::thread::spawn(move || {
            if ended.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                eprintln!(
                    "process {id} was killed: it was there for {} s",
                    LIMIT.as_secs()
                );
                // By a program, so that this works wherever the tests do.
                let _ = Command::new("kill").args(["-9", &id.to_string()]).status();
            }
        });
        Self { _alive: alive }
    }
}

/// Waits for a process, at most [`LIMIT`], and reads what it says.
pub fn end(child: Child) -> Output {
    let _watchdog = Watchdog::of(&child);
    child.wait_with_output().unwrap()
}

/// Runs a command to its end with `input` on its standard input. Whatever it is, it must not panic.
#[track_caller]
pub fn finish(mut command: Command, input: &[u8]) -> Ran {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let feed = std::thread::spawn(move || {
        // A program that refuses its arguments does not read.
        let _ = stdin.write_all(&input);
    });
    let output = end(child);
    feed.join().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(!stderr.contains("panicked"), "{stderr}");
    Ran {
        code: output.status.code(),
        stdout: output.stdout,
        stderr,
    }
}

/// Runs the program in `folder`; `arguments` are separated by single spaces.
#[track_caller]
pub fn plain(folder: &Path, arguments: &str) -> Ran {
    let mut command = program(folder);
    command.args(arguments.split(' '));
    finish(command, b"")
}

/// The same with the small model, and one step unless `arguments` say `-s`.
#[track_caller]
pub fn run(folder: &Path, arguments: &str) -> Ran {
    run_fed(folder, arguments, b"")
}

/// The same with `input` on standard input.
#[track_caller]
pub fn run_fed(folder: &Path, arguments: &str, input: &[u8]) -> Ran {
    let mut command = small(folder, arguments);
    if !arguments.split(' ').any(|argument| argument == "-s") {
        command.args(["-s", "1"]);
    }
    finish(command, input)
}

/// The program with the small model and `arguments`.
pub fn small(folder: &Path, arguments: &str) -> Command {
    let mut command = program(folder);
    command.arg("--model").arg(data("model"));
    command.args(arguments.split(' '));
    command
}

pub fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// A folder with these pictures: (name, width, height).
pub fn folder_of(pictures: &[(&str, u32, u32)]) -> TempDir {
    let folder = folder();
    for (name, width, height) in pictures {
        picture(folder.path(), name, *width, *height);
    }
    folder
}

/// Writes a picture whose colours vary in both directions, differently in each channel and for each name.
pub fn picture(folder: &Path, name: &str, width: u32, height: u32) {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    colours(name, width, height).save(path).unwrap();
}

pub fn colours(name: &str, width: u32, height: u32) -> RgbImage {
    let shift = name.bytes().map(u32::from).sum::<u32>();
    RgbImage::from_fn(width, height, |x, y| {
        let [r, g, b] = [x * 5 + shift, y * 7 + 2 * shift, (x + y) * 3 + shift / 2];
        image::Rgb([wave(r), wave(g), wave(b)])
    })
}

/// 0 to 255 and back, so that neighbours are alike.
fn wave(at: u32) -> u8 {
    let at = at % 510;
    at.min(510 - at).min(255) as u8
}

#[track_caller]
pub fn image(path: impl AsRef<Path>) -> DynamicImage {
    let path = path.as_ref();
    image::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[track_caller]
pub fn size(path: impl AsRef<Path>) -> (u32, u32) {
    let image = image(path);
    (image.width(), image.height())
}

/// A safetensors file of one float32 tensor.
pub fn safetensors(name: &str, shape: &[usize], values: &[f32]) -> Vec<u8> {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, shape.to_vec(), &bytes).unwrap();
    safetensors::serialize([(name, view)], None).unwrap()
}

/// The one tensor of a safetensors file: shape and values.
#[track_caller]
pub fn tensor(bytes: &[u8], name: &str) -> (Vec<usize>, Vec<f32>) {
    let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
    let tensor = file.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), Dtype::F32);
    let (values, _) = tensor.data().as_chunks::<4>();
    let values = values.iter().map(|v| f32::from_le_bytes(*v)).collect();
    (tensor.shape().to_vec(), values)
}

/// All files under `folder`, hidden ones too, by relative path and in order.
pub fn files(folder: &Path) -> Vec<String> {
    fn walk(folder: &Path, prefix: &str, found: &mut Vec<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
            if entry.file_type().unwrap().is_dir() {
                walk(&entry.path(), &format!("{name}/"), found);
            } else {
                found.push(name);
            }
        }
    }
    let mut found = Vec::new();
    walk(folder, "", &mut found);
    found.sort();
    found
}

/// A copy of the small model, to change.
pub fn copy_of_model(folder: &Path) -> PathBuf {
    let copy = folder.join("model");
    for file in files(&data("model")) {
        let to = copy.join(&file);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(data("model").join(file), to).unwrap();
    }
    copy
}
