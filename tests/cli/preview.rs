//! `--preview`: what the steps show is there while they pass, whole, and gone at every end; the results are as without.

use super::setup::*;

/// Both ways of showing a step, for an input of 64x64: arguments, the preview's name and its side.
#[cfg(target_os = "linux")]
fn ways() -> [(String, &'static str, u32); 3] {
    let taesd = data("vae-tiny");
    [
        ("-o out.png".into(), "out-preview.png", 16),
        ("-o out.safetensors".into(), "out-preview.png", 16),
        (
            format!("-o out.jpg --vae {}", taesd.display()),
            "out-preview.jpg",
            128,
        ),
    ]
}

#[cfg(target_os = "linux")]
#[test]
fn a_preview_is_replaced_as_steps_pass_and_an_interrupt_takes_it_away() {
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    for (arguments, name, side) in ways() {
        let folder = folder_of(&[("in.png", 64, 64)]);
        // More steps than are waited for.
        let mut child = small(
            folder.path(),
            &format!("in.png -s 1000 --preview {arguments}"),
        )
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
        let path = folder.path().join(name);
        let mut seen: Vec<Vec<u8>> = Vec::new();
        let began = Instant::now();
        while seen.len() < 3 {
            assert!(
                began.elapsed() < Duration::from_secs(300),
                "{name}: {seen:?}"
            );
            assert!(child.try_wait().unwrap().is_none(), "{name}: it has ended");
            let bytes = fs::read(&path).unwrap_or_default();
            // Before the first its place is empty.
            if !bytes.is_empty() && seen.last() != Some(&bytes) {
                let shown = image::load_from_memory(&bytes).unwrap();
                assert_eq!((shown.width(), shown.height()), (side, side), "{name}");
                seen.push(bytes);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // SAFETY: a signal to a process of ours that has not been waited for.
        assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
        assert_eq!(end(child).status.code(), Some(130));
        assert_eq!(files(folder.path()), ["in.png"], "{name}");
    }
}

#[test]
fn results_are_the_same_with_previews_and_nothing_else_is_left() {
    let folder = folder_of(&[
        ("in/a.png", 24, 16),
        ("in/b.png", 24, 16),
        ("in/c.png", 9, 20),
    ]);
    let taesd = format!("--vae {}", data("vae-tiny").display());
    for arguments in [
        "-s 3 -q --json",
        "-s 3 --batch 2",
        "-s 2 --scale 4 --format tif",
        "-s 2 --format safetensors",
        &format!("-s 3 --batch 2 -g 3 {taesd}"),
        &format!("-s 2 --scale 4 --format webp {taesd}"),
    ] {
        for (to, preview) in [("without", ""), ("with", " --preview")] {
            let ran = run(folder.path(), &format!("in -o {to} {arguments}{preview}")).ends_in(0);
            if arguments.contains("--json") {
                assert_eq!((ran.json().len(), &*ran.stderr), (3, ""));
            }
        }
        let of = |name: &str| {
            let folder = folder.path().join(name);
            let read = |file: String| (fs::read(folder.join(&file)).unwrap(), file);
            files(&folder).into_iter().map(read).collect::<Vec<_>>()
        };
        assert_eq!(of("without").len(), 3, "{arguments}");
        assert!(of("without") == of("with"), "{arguments}");
        for name in ["with", "without"] {
            fs::remove_dir_all(folder.path().join(name)).unwrap();
        }
    }
}

#[test]
fn a_file_in_a_previews_place_is_left_alone() {
    let folder = folder_of(&[("in.png", 8, 8), ("a.png", 8, 8), ("a-preview.png", 8, 8)]);
    let theirs = folder.path().join("out-preview.png");
    fs::write(&theirs, "theirs").unwrap();
    run(folder.path(), "in.png -o out.png -s 2 --preview")
        .ends_in(0)
        .says(&["out-preview.png is there already, and no preview is written over it"]);
    assert_eq!(fs::read(&theirs).unwrap(), b"theirs");
    assert_eq!(size(folder.path().join("out.png")), (16, 16));
    // What another input's output will be is no place for a preview either.
    run(folder.path(), "a.png a-preview.png -o both -s 2 --preview")
        .ends_in(0)
        .says(&["no preview is written to both/a-preview.png"]);
    assert_eq!(
        files(&folder.path().join("both")),
        ["a-preview.png", "a.png"]
    );
}

#[test]
fn where_there_is_no_place_for_a_preview_it_is_said_and_a_dry_run_writes_none() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    let ran = run(folder.path(), "in.png -o - --preview")
        .ends_in(0)
        .says(&["--compare and --name have no effect with -o -"]);
    assert!(ran.stdout.starts_with(b"\x89PNG"));
    run(folder.path(), "in.png -o out.png --preview --dry-run").ends_in(0);
    assert_eq!(files(folder.path()), ["in.png"]);
}

/// After its last step: the result is larger than files may be, and the preview is not.
#[cfg(target_os = "linux")]
#[test]
fn a_run_that_fails_takes_its_preview_away() {
    let folder = folder_of(&[("in.png", 64, 64)]);
    let mut command = std::process::Command::new("bash");
    command
        .current_dir(folder.path())
        .env("MODEL", data("model"))
        .env("RAYON_NUM_THREADS", "1")
        .args([
            "-c",
            r#"ulimit -f 8; exec "$0" in.png -o out.bmp -s 2 --preview --model "$MODEL""#,
        ])
        .arg(env!("CARGO_BIN_EXE_sd-upscale"));
    finish(command, b"")
        .ends_in(1)
        .says(&["out.bmp"])
        .never_says("preview");
    assert_eq!(files(folder.path()), ["in.png"]);
}

#[test]
fn the_built_in_model_shows_its_steps_by_its_own_decoder() {
    let folder = folder_of(&[("in.png", 16, 16)]);
    for (to, preview) in [("a.png", ""), ("b.png", " --preview")] {
        plain(
            folder.path(),
            &format!("in.png -o {to} --model tiny -s 4{preview}"),
        )
        .ends_in(0)
        .never_says("preview");
    }
    let read = |name| fs::read(folder.path().join(name)).unwrap();
    assert!(read("a.png") == read("b.png"));
    assert_eq!(files(folder.path()), ["a.png", "b.png", "in.png"]);
}
