//! Runs that are ended from outside: nothing half done is left, and a second run finishes the work.

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
        assert!(start.elapsed() < Duration::from_secs(60), "no output");
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

#[test]
fn an_interrupt_ends_a_batch_in_order() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let folder = many(200, 24);
        let child = start(folder.path(), "in -o out -s 20");
        wait_for_outputs(folder.path(), 2);
        // SAFETY: a signal to a process of ours that has not been waited for.
        assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
        let asked = Instant::now();
        let output = child.wait_with_output().unwrap();
        assert!(asked.elapsed() < Duration::from_secs(5));
        assert_eq!(output.status.code(), Some(130));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains("interrupted: "), "{stderr}");
        assert!(stderr.contains("not done"), "{stderr}");
        let left = files(&folder.path().join("out"));
        assert!(left.len() >= 2 && left.len() < 200, "{}", left.len());
        assert_eq!(left, outputs(folder.path()), "temporary files are left");
        all_are_whole(folder.path());
    }
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
        assert!(began.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(2));
    }
    // SAFETY: a signal to a process of ours that has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(!folder.path().join("out.png").exists());
    server.slow_down(Duration::ZERO);
    server.seen();
    assert_eq!(start().wait().unwrap().code(), Some(0));
    let resumed = server.seen().iter().any(|seen| seen.range.unwrap_or(0) > 0);
    assert!(resumed, "everything was fetched anew");
    assert!(folder.path().join("out.png").exists());
}

#[test]
fn after_50_kills_at_random_moments_a_rerun_has_every_output_whole() {
    const KILLS: u32 = 50;
    const FILES: usize = 12;
    let folder = many(FILES, 12);
    // How long a whole run takes, to kill within.
    let began = Instant::now();
    start(folder.path(), "in -o expected -s 1").wait().unwrap();
    let whole = began.elapsed().max(Duration::from_millis(30));
    let mut random = 0x5eed_u64;
    let (mut killed, mut torn) = (0, 0);
    for _ in 0..KILLS {
        // Half of the time start anew, so that kills fall into early and late files alike.
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        if random >> 63 == 1 && folder.path().join("out").exists() {
            fs::remove_dir_all(folder.path().join("out")).unwrap();
        }
        let moment = whole.mul_f64((random >> 40 & 0xffff) as f64 / 65536.0);
        let mut child = start(folder.path(), "in -o out -s 1 --skip-existing");
        std::thread::sleep(moment);
        child.kill().unwrap();
        killed += u32::from(child.wait().unwrap().code().is_none());
        all_are_whole(folder.path());
        let out = folder.path().join("out");
        torn += files_if_any(&out).len() - outputs(folder.path()).len();
    }
    println!("{killed} of {KILLS} runs were killed before their end; {torn} temporary files seen");
    assert!(killed >= KILLS / 2, "only {killed} runs were killed");
    let output = start(folder.path(), "in -o out -s 1 --skip-existing")
        .wait_with_output()
        .unwrap();
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
    start(folder.path(), "in -o out -s 1 --skip-existing")
        .wait()
        .unwrap();
    assert!(!stale.exists());
}
