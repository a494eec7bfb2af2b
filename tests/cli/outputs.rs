//! Outputs: tried before the work, written through links, kept or made again, and never lost in silence.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Stdio;

use super::interrupts::{PipeWriter, named_pipe};
use super::setup::*;

/// A shell's command with the program as `$0`, the small model as `$MODEL`, in `folder`.
fn shell(folder: &Path, script: &str) -> Ran {
    let mut command = std::process::Command::new("sh");
    command
        .args(["-c", script, env!("CARGO_BIN_EXE_sd-upscale")])
        .env("MODEL", data("model"))
        .env("RAYON_NUM_THREADS", "1")
        .current_dir(folder);
    finish(command, b"")
}

#[test]
fn a_closed_standard_output_fails_and_a_terminal_is_refused() {
    let folder = folder_of(&[("in.png", 12, 12)]);
    shell(
        folder.path(),
        r#"exec "$0" in.png -o - -s 1 --model "$MODEL" >&-"#,
    )
    .ends_in(1)
    .says(&["standard output is closed"]);
    shell(
        folder.path(),
        r#"exec "$0" in.png -o out.png --json -s 1 --model "$MODEL" >&-"#,
    )
    .ends_in(1)
    .says(&["standard output is closed"]);
    // `script` runs a command on a terminal of its own; where it is missing there is nothing to try it with.
    let found = std::process::Command::new("script")
        .arg("--version")
        .output();
    if found.is_err() {
        println!("passed over the terminal: there is no `script`");
        return;
    }
    let ran = shell(
        folder.path(),
        r#"script -qec "$0 in.png -o - -s 1 --model $MODEL; echo status \$?" /dev/null"#,
    );
    assert!(
        ran.text()
            .contains("would write the result's bytes to a terminal"),
        "{}",
        ran.text()
    );
    assert!(ran.text().contains("status 2"), "{}", ran.text());
}

#[test]
fn a_symbolic_link_is_written_through() {
    let folder = folder_of(&[("in.png", 12, 12), ("elsewhere/old.png", 3, 3)]);
    let path = |name: &str| folder.path().join(name);
    symlink("elsewhere/old.png", path("link.png")).unwrap();
    symlink("link.png", path("link-to-link.png")).unwrap();
    symlink("elsewhere/new.png", path("dangling.png")).unwrap();
    for (link, file) in [
        ("link-to-link.png", "elsewhere/old.png"),
        ("dangling.png", "elsewhere/new.png"),
    ] {
        run(folder.path(), &format!("in.png -o {link}")).ends_in(0);
        assert!(path(link).is_symlink(), "{link} is a link still");
        assert!(!path(file).is_symlink());
        assert_eq!(size(path(file)), (24, 24));
    }
    symlink("loop-b.png", path("loop-a.png")).unwrap();
    symlink("loop-a.png", path("loop-b.png")).unwrap();
    let ran = run(folder.path(), "in.png -o loop-a.png");
    assert!(ran.code == Some(1) || ran.code == Some(2), "{}", ran.stderr);
}

#[test]
fn an_output_that_cannot_be_written_is_said_before_anything_is_computed() {
    let folder = folder_of(&[("in.png", 12, 12), ("a/x.png", 12, 12)]);
    let closed = folder.path().join("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).unwrap();
    // Root writes wherever it likes, but not into /proc.
    let is_root = fs::write(closed.join("trial"), b"").is_ok();
    let target = if is_root { "/proc" } else { "closed" };
    run(folder.path(), &format!("in.png -o {target}/out.png -v"))
        .ends_in(1)
        .says(&["cannot write", "out.png"])
        .never_says("weights");
    // The others of a batch are done.
    let ran = run(
        folder.path(),
        &format!("in.png a/x.png -o {target}/new/ --json -v"),
    )
    .ends_in(1);
    assert_eq!(ran.json().len(), 2);
}

#[test]
fn a_limit_of_file_size_is_an_error_and_leaves_nothing() {
    let folder = folder_of(&[("big.png", 64, 64), ("a.png", 4, 4)]);
    // 4 blocks of 512 or 1024 bytes; the trial of the folder fits, the picture does not.
    shell(
        folder.path(),
        r#"ulimit -f 8; exec "$0" big.png a.png -o out/ -s 1 --format bmp --model "$MODEL""#,
    )
    .ends_in(1)
    .says(&["big.bmp", "1 done, 0 skipped, 1 failed"]);
    assert_eq!(files(&folder.path().join("out")), ["a.bmp"]);
}

#[test]
fn memory_that_cannot_be_had_fails_that_file_alone() {
    let folder = folder_of(&[("small.png", 12, 12)]);
    // White, so that 16000 x 10000 pixels are a small file.
    let white = image::GrayImage::from_pixel(16000, 10000, image::Luma([255]));
    white.save(folder.path().join("huge.png")).unwrap();
    let ran = shell(
        folder.path(),
        r#"ulimit -v 4000000; exec "$0" huge.png small.png -o out -s 1 --json --model "$MODEL""#,
    )
    .ends_in(1)
    .says(&["memory"]);
    let status = |at: usize| ran.json()[at]["status"].clone();
    assert_eq!((status(0), status(1)), ("error".into(), "ok".into()));
    assert_eq!(size(folder.path().join("out/small.png")), (24, 24));
}

#[test]
fn skip_existing_makes_outputs_of_the_wrong_size_again_and_says_what_changed() {
    let folder = folder_of(&[
        ("in/a.png", 12, 8),
        ("in/b.png", 12, 8),
        ("in/c.png", 12, 8),
    ]);
    let path = |name: &str| folder.path().join(name);
    run(folder.path(), "in -o out -p cat").ends_in(0);
    picture(folder.path(), "out/b.png", 5, 5);
    // The same command again: nothing changed, and nothing is said.
    let ran = run(folder.path(), "in -o out -p cat --skip-existing").ends_in(0);
    let ran = ran.says(&["1 done, 2 skipped"]);
    ran.never_says("is kept");
    assert_eq!(size(path("out/b.png")), (24, 16));
    run(folder.path(), "in -o out -p dog --skip-existing")
        .ends_in(0)
        .says(&[
            "0 done, 3 skipped",
            "is kept, but it was made with other settings",
        ]);
    let later = fs::metadata(path("out/c.png")).unwrap().modified().unwrap()
        + std::time::Duration::from_secs(60);
    let input = fs::File::options()
        .write(true)
        .open(path("in/c.png"))
        .unwrap();
    input.set_modified(later).unwrap();
    run(folder.path(), "in -o out -p cat --skip-existing")
        .ends_in(0)
        .says(&["in/c.png: out/c.png is kept, but the input was changed after it"]);
}

#[test]
fn two_runs_into_one_folder_share_the_work() {
    let folder = folder_of(&[("a.png", 12, 8), ("b.png", 12, 8)]);
    let path = |name: &str| folder.path().join(name);
    named_pipe(&path("pipe.png"));
    // The first run has read a.png and waits for the other of the batch.
    let mut command = small(
        folder.path(),
        "a.png pipe.png -o out -s 1 --batch 2 --skip-existing --json",
    );
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Once it opens the pipe, it has read a.png.
    let pipe = PipeWriter::of(&path("pipe.png"));
    // The second run makes it in the meantime.
    run(folder.path(), "a.png -o out/").ends_in(0);
    let made = fs::metadata(path("out/a.png")).unwrap().modified().unwrap();
    pipe.write(&fs::read(path("b.png")).unwrap());
    let output = end(child);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains(r#""input":"a.png","output":"out/a.png","status":"skipped""#),
        "{text}"
    );
    assert_eq!(
        fs::metadata(path("out/a.png")).unwrap().modified().unwrap(),
        made
    );
    assert!(path("out/pipe.png").exists());
}
