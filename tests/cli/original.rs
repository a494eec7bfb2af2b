//! The original checkpoint as a model: `--model FILE.pth` with `--model-parts`.

use super::setup::*;

const UPSCALER: &str = "original/upscaler.pth";

/// The program in `folder` with `checkpoint` and the small model's other parts.
fn original(folder: &Path, checkpoint: &Path, arguments: &str) -> Ran {
    let mut command = program(folder);
    command.arg("--model").arg(checkpoint);
    command.arg("--model-parts").arg(data("model"));
    command.args(arguments.split(' '));
    finish(command, b"")
}

#[test]
fn the_original_checkpoint_upscales_with_another_models_parts() {
    let folder = folder_of(&[("in.png", 64, 32)]);
    let ran = original(folder.path(), &data(UPSCALER), "in.png -s 1 -o out.png");
    ran.ends_in(0);
    assert_eq!(size(folder.path().join("out.png")), (128, 64));
    let text = fs::read(folder.path().join("out.png")).unwrap();
    let text = String::from_utf8_lossy(&text);
    assert!(text.contains("Model: upscaler.pth"), "{text}");
}

#[test]
fn a_checkpoint_that_would_run_something_ends_in_exit_code_1_and_nothing_is_run() {
    let evil = fs::read_dir(data("torch"))
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let evil: Vec<PathBuf> = evil
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("evil-"))
        })
        .collect();
    assert!(evil.len() >= 9);
    for path in evil {
        for arguments in ["in.png -o out.png", "in.png --dry-run"] {
            let folder = folder_of(&[("in.png", 32, 32)]);
            let ran = original(folder.path(), &path, arguments).ends_in(1);
            let ran = ran.says(&[
                path.to_str().unwrap(),
                "`posix system`",
                "nothing in the file was run",
            ]);
            assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
            // The payload makes a file.
            assert_eq!(files(folder.path()), ["in.png"]);
        }
    }
}

#[test]
fn a_file_that_is_no_checkpoint_is_refused_in_a_line() {
    let folder = folder_of(&[("in.png", 32, 32)]);
    let picture = folder.path().join("in.png");
    let ran = original(folder.path(), &picture, "in.png -o out.png").ends_in(1);
    ran.says(&[
        "in.png",
        "no file of PyTorch's",
        "expected what torch.save wrote",
    ]);
    let other = data("torch/zip.pth");
    let ran = original(folder.path(), &other, "in.png -o out.png").ends_in(1);
    ran.says(&["zip.pth", "not the latent upscaler's checkpoint"]);
    assert_eq!(files(folder.path()), ["in.png"]);
}

#[test]
fn parts_that_do_not_go_with_the_checkpoint_are_refused_by_the_number_that_differs() {
    let folder = folder_of(&[("in.png", 32, 32)]);
    let mut command = program(folder.path());
    command.arg("--model").arg(data(UPSCALER));
    command.args([
        "--model-parts",
        "tiny",
        "in.png",
        "-s",
        "1",
        "-o",
        "out.png",
    ]);
    finish(command, b"")
        .ends_in(1)
        .says(&["time_cond_proj_dim is 176"]);
    let ran = original(
        folder.path(),
        &data(UPSCALER),
        "in.png -o out.png --model-parts ./no/where",
    );
    ran.ends_in(1)
        .says(&["--model-parts ./no/where", "no such folder"]);
}

#[test]
fn a_dry_run_knows_the_checkpoint_and_fetches_nothing() {
    let folder = folder_of(&[("in.png", 64, 32)]);
    let ran = original(folder.path(), &data(UPSCALER), "in.png --dry-run").ends_in(0);
    assert!(ran.text().contains("in-2x.png 128x64"), "{}", ran.text());
    assert!(
        ran.text()
            .contains("upscaler.pth (original checkpoint; everything but the UNet from")
    );
    let mut command = program(folder.path());
    command
        .arg("--model")
        .arg(data(UPSCALER))
        .args(["in.png", "--dry-run"]);
    let ran = finish(command, b"").ends_in(0);
    assert!(
        ran.text()
            .contains("everything but the UNet from stabilityai/sd-x2-latent-upscaler")
    );
}

#[test]
fn parts_without_a_checkpoint_have_no_effect_and_that_is_said() {
    let folder = folder_of(&[("in.png", 32, 32)]);
    run(folder.path(), "in.png -o out.png --model-parts tiny")
        .ends_in(0)
        .says(&["--model-parts has no effect"]);
    original(
        folder.path(),
        &data(UPSCALER),
        "in.png -s 1 -o out.png --revision main",
    )
    .ends_in(0)
    .says(&["--revision has no effect"]);
}
