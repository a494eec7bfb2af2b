//! Runs that are ended from outside: nothing half done is left, and a second run finishes the work.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use super::hub_server::{HubServer, REPO};
use super::setup::*;

fn many(count: usize, side: u32) -> TempDir {
    let folder = folder();
    fs::create_dir(folder.path().join("in")).unwrap();
    for number in 0..count {
        picture(folder.path(), &format!("in/{number}.png"), side, side);
    }
    folder
}

fn start(folder: &Path, arguments: &str) -> Child {
    small(folder, arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What is under a folder that may not be there yet.
fn files_if_any(folder: &Path) -> Vec<String> {
    if folder.exists() {
        files(folder)
    } else {
        Vec::new()
    }
}

/// Outputs in `out`, without temporary files.
fn outputs(folder: &Path) -> Vec<String> {
    files_if_any(&folder.join("out"))
        .into_iter()
        .filter(|name| !name.starts_with('.'))
        .collect()
}

fn wait_for_outputs(folder: &Path, count: usize) {
    let start = Instant::now();
    while outputs(folder).len() < count {
        assert!(start.elapsed() < Duration::from_secs(300), "no output");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[track_caller]
fn all_are_whole(folder: &Path) {
    for name in outputs(folder) {
        // Decodes every pixel.
        image(folder.join("out").join(name));
    }
}

pub(super) fn signal(child: &Child, signal: i32) {
    // SAFETY: a signal to a process of ours that has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}

/// A pipe with a name, which a run that reads it waits for until someone writes there.
pub(super) fn named_pipe(path: &Path) {
    let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: the path ends in a zero byte.
    assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
}

/// Writes to a named pipe once someone reads it.
pub(super) struct PipeWriter(fs::File);

impl PipeWriter {
    /// Waits until someone has opened the pipe to read it.
    pub(super) fn of(path: &Path) -> Self {
        let start = Instant::now();
        loop {
            let open = fs::File::options()
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path);
            match open {
                Ok(file) => return Self(file),
                Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENXIO), "{error}"),
            }
            assert!(start.elapsed() < Duration::from_secs(300), "no reader");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Less than what a pipe holds.
    pub(super) fn write(mut self, bytes: &[u8]) {
        assert!(bytes.len() < 65536);
        self.0.write_all(bytes).unwrap();
    }
}

#[test]
fn an_interrupt_ends_a_batch_in_order() {
    for sent in [libc::SIGINT, libc::SIGTERM] {
        let folder = many(3, 24);
        // The run cannot end by itself: its last input never comes.
        named_pipe(&folder.path().join("never.png"));
        let child = start(folder.path(), "in never.png -o out -s 1");
        wait_for_outputs(folder.path(), 2);
        signal(&child, sent);
        let output = end(child);
        assert_eq!(output.status.code(), Some(130));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains("interrupted: "), "{stderr}");
        assert!(stderr.contains("not done"), "{stderr}");
        let left = files(&folder.path().join("out"));
        assert!(left.len() >= 2, "{left:?}");
        assert_eq!(left, outputs(folder.path()), "temporary files are left");
        // What was written is what was counted.
        let counted = format!("interrupted: {} done", left.len());
        assert!(stderr.contains(&counted), "{left:?}: {stderr}");
        all_are_whole(folder.path());
    }
}

#[test]
fn an_interrupt_removes_the_file_that_is_being_written() {
    let folder = folder();
    fs::create_dir(folder.path().join("in")).unwrap();
    for number in 0..4 {
        picture(folder.path(), &format!("in/{number}.png"), 320, 320);
    }
    named_pipe(&folder.path().join("never.png"));
    let mut seen = 0;
    for sent in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let child = start(folder.path(), "in never.png -o out -s 1");
        let out = folder.path().join("out");
        let is_temporary = |name: &String| name.starts_with('.');
        let began = Instant::now();
        // The first of the four that can be caught at it.
        while !files_if_any(&out).iter().any(is_temporary) {
            assert!(began.elapsed() < Duration::from_secs(300), "no file begun");
            if outputs(folder.path()).len() == 4 {
                break;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        signal(&child, sent);
        seen += usize::from(outputs(folder.path()).len() < 4);
        let output = end(child);
        assert_eq!(output.status.code(), Some(130));
        assert_eq!(files_if_any(&out), outputs(folder.path()), "left");
        all_are_whole(folder.path());
        fs::remove_dir_all(&out).unwrap();
    }
    println!("{seen} of 3 runs were caught at it");
}

#[test]
fn an_interrupt_works_while_a_pipe_is_full() {
    let folder = folder();
    picture(folder.path(), "in.png", 256, 256);
    let full = |arguments: &str, read: fn(&mut Child)| {
        for sent in [libc::SIGINT, libc::SIGTERM] {
            let mut child = start(folder.path(), arguments);
            // The first bytes are there, so that the rest, more than a pipe holds, waits for someone to read it.
            read(&mut child);
            signal(&child, sent);
            let _watchdog = Watchdog::of(&child);
            assert_eq!(child.wait().unwrap().code(), Some(130), "{arguments}");
        }
    };
    fn first_byte(child: &mut Child) {
        let stdout = child.stdout.as_mut().unwrap();
        stdout.read_exact(&mut [0]).unwrap();
    }
    full("in.png -o - -s 1 --format bmp", first_byte);
    // Lines of JSON for more inputs than a pipe holds, each of them missing.
    let inputs: Vec<String> = (0..2000).map(|i| format!("missing-{i}.png")).collect();
    full(
        &format!("{} -o out --json -q", inputs.join(" ")),
        first_byte,
    );
}

#[test]
fn a_signal_that_is_ignored_from_the_start_stays_ignored() {
    let folder = many(1, 24);
    named_pipe(&folder.path().join("last.png"));
    let program = env!("CARGO_BIN_EXE_sd-upscale");
    let model = data("model");
    // As `nohup` and a shell's `&` start a program.
    let script = format!(
        "trap '' HUP INT; exec {program} in last.png -o out -s 1 --model {}",
        model.display()
    );
    let mut child = std::process::Command::new("sh")
        .args(["-c", &script])
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for_outputs(folder.path(), 1);
    signal(&child, libc::SIGHUP);
    signal(&child, libc::SIGINT);
    let bytes = fs::read(folder.path().join("in/0.png")).unwrap();
    PipeWriter::of(&folder.path().join("last.png")).write(&bytes);
    let _watchdog = Watchdog::of(&child);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(outputs(folder.path()), ["0.png", "last.png"]);
}

#[test]
fn an_interrupted_download_goes_on_at_the_next_run() {
    let server = HubServer::of_folder(&data("model"));
    server.slow_down(Duration::from_millis(20));
    let folder = folder_of(&[("in.png", 16, 16)]);
    let start = || {
        program(folder.path())
            .env("HF_ENDPOINT", server.url())
            .env("HF_HOME", folder.path().join("hf"))
            .args(["in.png", "-o", "out.png", "-s", "1", "--model", REPO])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let child = start();
    let began = Instant::now();
    let is_cut = |name: &String| name.ends_with(".incomplete");
    // Some of a weights file is there.
    let partial = || {
        let hf = folder.path().join("hf");
        let found = files_if_any(&hf).into_iter().find(is_cut);
        found.is_some_and(|name| fs::metadata(hf.join(name)).is_ok_and(|m| m.len() > 40_000))
    };
    while !partial() {
        assert!(began.elapsed() < Duration::from_secs(300));
        std::thread::sleep(Duration::from_millis(2));
    }
    signal(&child, libc::SIGINT);
    let output = end(child);
    assert_eq!(output.status.code(), Some(130));
    assert!(!folder.path().join("out.png").exists());
    server.slow_down(Duration::ZERO);
    server.seen();
    assert_eq!(end(start()).status.code(), Some(0));
    let resumed = server.seen().iter().any(|seen| seen.range.unwrap_or(0) > 0);
    assert!(resumed, "everything was fetched anew");
    assert!(folder.path().join("out.png").exists());
}

#[test]
fn after_50_kills_at_random_moments_a_rerun_has_every_output_whole() {
    const KILLS: u32 = 50;
    const FILES: usize = 12;
    let folder = many(FILES, 12);
    let expected = end(start(folder.path(), "in -o expected -s 1 -v"));
    let lines = String::from_utf8(expected.stderr).unwrap().lines().count();
    // The last input never comes, so that no run ends before it is killed, however fast the machine.
    named_pipe(&folder.path().join("never.png"));
    let mut random = 0x5eed_u64;
    let mut next = |below: usize| {
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (random >> 33) as usize % below
    };
    let mut torn = 0;
    for _ in 0..KILLS {
        // Half of the time start anew, so that kills fall into early and late files alike.
        if next(2) == 1 && folder.path().join("out").exists() {
            fs::remove_dir_all(folder.path().join("out")).unwrap();
        }
        let mut child = start(folder.path(), "in never.png -o out -s 1 -v --skip-existing");
        let _watchdog = Watchdog::of(&child);
        // At something that it says, and a moment after: it says when it computes, and writes right after that. A run
        // that skips much says less than the lines waited for, and is killed when all of the outputs are there.
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
        for _ in 0..next(lines) {
            if outputs(folder.path()).len() == FILES || said.next().is_none() {
                break;
            }
        }
        std::thread::sleep(Duration::from_micros(next(2000) as u64));
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().code(), None, "it ended by itself");
        all_are_whole(folder.path());
        let out = folder.path().join("out");
        torn += files_if_any(&out).len() - outputs(folder.path()).len();
    }
    println!("{KILLS} runs were killed; {torn} temporary files seen");
    let output = end(start(folder.path(), "in -o out -s 1 --skip-existing"));
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(
        outputs(folder.path()),
        files(&folder.path().join("expected"))
    );
    for name in outputs(folder.path()) {
        let bytes = |place: &str| fs::read(folder.path().join(place).join(&name)).unwrap();
        assert!(bytes("out") == bytes("expected"), "{name}");
    }
    // Temporary files that no one is writing to any more go at the next run, ten minutes later.
    let stale = folder.path().join("out/.0.png.sd-upscale-abcdef.tmp");
    fs::write(&stale, "half").unwrap();
    let old = std::time::SystemTime::now() - Duration::from_secs(3600);
    fs::File::options()
        .write(true)
        .open(&stale)
        .unwrap()
        .set_modified(old)
        .unwrap();
    end(start(folder.path(), "in -o out -s 1 --skip-existing"));
    assert!(!stale.exists());
}
