//! `--watch`: files that appear while the program runs.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use super::interrupts::signal;
use super::setup::*;

struct Watching {
    child: Child,
    _watchdog: Watchdog,
}

impl Watching {
    fn of(folder: &Path, arguments: &str) -> Self {
        let mut command = small(folder, arguments);
        let child = command
            .args(["-s", "1", "--watch"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            _watchdog: Watchdog::of(&child),
            child,
        }
    }

    /// Waits until something holds, as long as the program is there and the watchdog has patience.
    #[track_caller]
    fn until(&mut self, what: &str, holds: impl Fn() -> bool) {
        let start = Instant::now();
        while !holds() {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "it ended ({ended:?}) before {what}");
            assert!(start.elapsed() < Duration::from_secs(250), "no {what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn interrupted(self) -> Ran {
        signal(&self.child, libc::SIGINT);
        let output = self.child.wait_with_output().unwrap();
        Ran {
            code: output.status.code(),
            stdout: output.stdout,
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

#[test]
fn files_are_done_as_they_come_once_they_are_whole() {
    let folder = folder_of(&[("in/a.png", 12, 8), ("b.png", 64, 64), ("c.png", 8, 8)]);
    let path = folder.path();
    let mut watching = Watching::of(path, "in -r -o out --json");
    let done = |name: &'static str| move || path.join("out").join(name).exists();
    watching.until("a.png", done("a.png"));
    // Half of one, and another that comes after it: so that there were looks.
    let b = fs::read(path.join("b.png")).unwrap();
    fs::write(path.join("in/b.png"), &b[..b.len() / 2]).unwrap();
    fs::create_dir(path.join("in/sub")).unwrap();
    fs::rename(path.join("c.png"), path.join("in/sub/c.png")).unwrap();
    watching.until("c.png", done("sub/c.png"));
    assert!(!path.join("out/b.png").exists());
    fs::write(path.join("in/b.png"), &b).unwrap();
    watching.until("b.png", done("b.png"));
    // One that is written again.
    let before = fs::read(path.join("out/a.png")).unwrap();
    picture(path, "in/other.bin.png", 12, 8);
    fs::rename(path.join("in/other.bin.png"), path.join("in/a.png")).unwrap();
    watching.until("a.png again", || {
        fs::read(path.join("out/a.png")).is_ok_and(|now| now != before)
    });
    let ran = watching.interrupted().ends_in(130);
    let told = |line: &serde_json::Value| line["status"] == "ok";
    assert_eq!(ran.json().iter().filter(|line| told(line)).count(), 4);
    ran.says(&[
        "watching for new files",
        "interrupted: 4 done, 0 skipped, 0 failed",
    ]);
    assert_eq!(files(&path.join("out")), ["a.png", "b.png", "sub/c.png"]);
}

#[test]
fn what_it_writes_is_never_taken_for_an_input() {
    let folder = folder_of(&[("in/a.png", 12, 8), ("b.png", 8, 8), ("c.png", 8, 8)]);
    let path = folder.path();
    let mut watching = Watching::of(path, "in --compare --seed 1,2");
    let done = |name: &'static str| move || path.join("in").join(name).exists();
    watching.until("a", done("a-2x-2.png"));
    // Without it nothing else tells whose the output is.
    fs::remove_file(path.join("in/a.png")).unwrap();
    for (name, output) in [("b.png", "b-2x-2.png"), ("c.png", "c-2x-2.png")] {
        fs::rename(path.join(name), path.join("in").join(name)).unwrap();
        watching.until(name, done(output));
    }
    watching.interrupted().ends_in(130);
    let left = files(&path.join("in"));
    assert!(left.iter().all(|name| name.matches("2x").count() <= 1));
    assert_eq!(left.len(), 2 + 3 * 4, "{left:?}");
}

#[test]
fn outputs_that_would_fall_on_each_other_fail_alone() {
    let folder = folder_of(&[("in/a.png", 12, 8), ("a.bmp", 8, 8), ("b.png", 8, 8)]);
    let path = folder.path();
    let mut watching = Watching::of(path, "in -o out --format png --json");
    let done = |name: &'static str| move || path.join("out").join(name).exists();
    watching.until("a.png", done("a.png"));
    let first = fs::read(path.join("out/a.png")).unwrap();
    fs::rename(path.join("a.bmp"), path.join("in/a.bmp")).unwrap();
    fs::rename(path.join("b.png"), path.join("in/b.png")).unwrap();
    watching.until("b.png", done("b.png"));
    let ran = watching.interrupted().ends_in(130);
    ran.says(&["in/a.bmp", "it is where the output of in/a.png goes"]);
    assert!(fs::read(path.join("out/a.png")).unwrap() == first);
}

#[test]
fn there_must_be_a_folder_to_watch() {
    let folder = folder_of(&[("in/a.png", 8, 8), ("b.png", 8, 8)]);
    let path = folder.path();
    fs::write(path.join("p.txt"), "a cat").unwrap();
    let both = data("reference/embeds.safetensors").display().to_string();
    for (arguments, said) in [
        ("b.png --watch".to_owned(), "no input is one"),
        ("missing --watch".into(), "no input is one"),
        (
            "in -o out --watch --prompt-file p.txt".into(),
            "takes no --prompt-file",
        ),
        ("in -o out --watch --dry-run".into(), "cannot be used with"),
        (
            "in -o out --watch --seed 1,2 --grid g.png".into(),
            "cannot be used with",
        ),
        (
            format!("in -o out --watch --prompt-embeds {both}"),
            "give one for all",
        ),
        (
            "--generate -p x -o x.png --watch".into(),
            "give --prompt-file a folder",
        ),
    ] {
        run(path, &arguments).ends_in(2).says(&[said]);
    }
}
