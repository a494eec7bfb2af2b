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
fn a_file_called_tiny_is_not_taken_for_the_built_in_model() {
    let folder = folder_of(&[("in.png", 32, 32)]);
    fs::write(folder.path().join("tiny"), "").unwrap();
    plain(folder.path(), "in.png -o out.png -s 1 --model tiny").ends_in(0);
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

#[test]
fn a_noise_level_and_a_mask_change_the_latents_and_stand_in_what_is_written() {
    let folder = folder_of(&[("in.png", 64, 32)]);
    let run = |arguments: &str, name: &str| -> Vec<f32> {
        let arguments = format!("in.png -s 1 -p cat {arguments} -o {name}.safetensors");
        original(folder.path(), &data(UPSCALER), arguments.trim()).ends_in(0);
        let bytes = fs::read(folder.path().join(format!("{name}.safetensors"))).unwrap();
        tensor(&bytes, "latents").1
    };
    let plain = run("--noise-level 0", "plain");
    let mut seen = vec![plain];
    for (arguments, name, stated) in [
        (
            "--noise-level 0.3",
            "gaussian",
            "Noise level: 0.3, Noise type: gaussian",
        ),
        (
            "--noise-level 0.3 --noise-type fake",
            "fake",
            "Noise level: 0.3, Noise type: fake",
        ),
        ("--mask-padding", "masked", "Padding: masked"),
    ] {
        let latents = run(arguments, name);
        assert!(!seen.contains(&latents), "{arguments}");
        seen.push(latents);
        let text = fs::read(folder.path().join(format!("{name}.safetensors"))).unwrap();
        let text = String::from_utf8_lossy(&text[..2000]).into_owned();
        assert!(text.contains(stated), "{text}");
        let key = if name == "masked" {
            "sd_upscale.padding"
        } else {
            "sd_upscale.noise_level"
        };
        assert!(text.contains(key), "{text}");
        // Made again from what was written, it says what it was made with, not what its input was.
        let again = format!("{name}.safetensors -s 1 -o again.safetensors");
        original(folder.path(), &data(UPSCALER), &again).ends_in(0);
        let text = fs::read(folder.path().join("again.safetensors")).unwrap();
        let text = String::from_utf8_lossy(&text[..2000]).into_owned();
        assert!(!text.contains(key), "{text}");
    }
    let dry = original(
        folder.path(),
        &data(UPSCALER),
        "in.png --dry-run --noise-level 0.3 --noise-type fake --mask-padding",
    );
    let dry = dry.ends_in(0);
    assert!(
        dry.text().contains("noise level: 0.3 (fake)"),
        "{}",
        dry.text()
    );
    assert!(
        dry.text().contains("padding of prompts: masked"),
        "{}",
        dry.text()
    );
}

#[test]
fn what_was_made_with_another_noise_level_or_mask_is_said_by_skip_existing() {
    let folder = folder_of(&[("in.png", 32, 32)]);
    let run = |arguments: &str| {
        let arguments = format!("in.png -s 1 -p cat -o out.png {arguments}");
        original(folder.path(), &data(UPSCALER), arguments.trim()).ends_in(0)
    };
    run("--noise-level 0.1 --mask-padding");
    let same = "--skip-existing --noise-level 0.1 --mask-padding";
    run(same).never_says("other settings");
    for other in [
        "",
        "--noise-level 0.1",
        "--noise-level 0.2 --mask-padding",
        "--noise-level 0.1 --noise-type fake --mask-padding",
    ] {
        run(&format!("--skip-existing {other}")).says(&["other settings"]);
    }
}

#[test]
fn a_noise_level_without_its_weight_or_out_of_range_is_refused_before_the_work() {
    let folder = folder_of(&[("a.png", 32, 32), ("b.png", 32, 32)]);
    for model in ["tiny", data("model").to_str().unwrap()] {
        for arguments in [
            "a.png b.png -o out --noise-level 0.1",
            "a.png --noise-level 0.1 --dry-run",
        ] {
            let ran = plain(folder.path(), &format!("{arguments} --model {model}")).ends_in(1);
            let ran = ran.says(&["low_res_noise_embed.weight", "--model FILE.pth"]);
            let errors = ran.stderr.lines().filter(|line| line.starts_with("error:"));
            assert_eq!(errors.count(), 1, "{}", ran.stderr);
        }
    }
    // The usual repository lacks it, which is known before anything is fetched.
    let mut command = program(folder.path());
    command.env("HF_ENDPOINT", "http://127.0.0.1:1");
    command.args(["a.png", "--noise-level", "0.1"]);
    finish(command, b"")
        .ends_in(1)
        .says(&["low_res_noise_embed.weight"]);
    for level in ["-0.1", "0.61", "NaN", "much"] {
        run(folder.path(), &format!("a.png --noise-level {level}"))
            .ends_in(2)
            .says(&["expected a number from 0 to 0.6"]);
    }
    assert_eq!(files(folder.path()), ["a.png", "b.png"]);
}

#[test]
fn options_of_the_original_that_do_nothing_are_said() {
    let folder = folder_of(&[("in.png", 32, 32)]);
    run(folder.path(), "in.png -o out.png --noise-type fake")
        .ends_in(0)
        .says(&["--noise-type has no effect"]);
    plain(
        folder.path(),
        "in.png -o out.png -s 1 --model tiny --mask-padding",
    )
    .ends_in(0)
    .says(&["--mask-padding does nothing in the built-in model"]);
}

#[test]
fn every_pass_has_the_level_and_the_mask() {
    let folder = folder_of(&[("in.png", 64, 32)]);
    let checkpoint = data(UPSCALER);
    let latents = |arguments: &str, out: &str| {
        let level = "-s 1 -p cat --noise-level 0.3 --mask-padding";
        let all = format!("{arguments} {level} -o {out}");
        original(folder.path(), &checkpoint, &all).ends_in(0);
        fs::read(folder.path().join(out)).unwrap()
    };
    let at_once = latents("in.png --scale 4", "four.safetensors");
    latents("in.png", "two.safetensors");
    let again = latents("two.safetensors", "again.safetensors");
    let values = |bytes: &[u8]| tensor(bytes, "latents");
    assert!(values(&at_once) == values(&again));
}
