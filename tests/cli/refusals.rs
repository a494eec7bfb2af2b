//! What the program refuses: the exit code, a message that names the file and the cause, and nothing left behind.

use super::setup::*;

/// Runs `in.EXT` of these bytes and expects exit code 1, these words, and no new file.
#[track_caller]
fn refused(extension: &str, bytes: &[u8], words: &[&str]) {
    let folder = folder();
    let name = format!("in.{extension}");
    fs::write(folder.path().join(&name), bytes).unwrap();
    let ran = run(folder.path(), &format!("{name} -o out.png"));
    ran.ends_in(1).says(&[&name]).says(words);
    assert_eq!(files(folder.path()), [name]);
}

#[test]
fn a_truncated_png_is_refused() {
    let bytes = fs::read(data("inputs/square-64x64.png")).unwrap();
    refused(
        "png",
        &bytes[..bytes.len() / 2],
        &["the file was cut short; copy or download it again"],
    );
}

#[test]
fn a_text_file_named_png_is_refused() {
    refused("png", b"hello\n", &["it is text"]);
}

#[test]
fn an_empty_file_is_refused() {
    refused("png", b"", &["empty"]);
}

#[test]
fn a_safetensors_header_cut_short_is_refused() {
    let bytes = fs::read(data("inputs/latents-8x12.safetensors")).unwrap();
    refused("safetensors", &bytes[..40], &["header", "cut short"]);
}

#[test]
fn latents_of_16_channels_are_refused_by_name() {
    let bytes = safetensors("latents", &[1, 16, 4, 4], &[0.5; 256]);
    refused(
        "safetensors",
        &bytes,
        &["[1, 16, 4, 4]", "16 channels", "Flux"],
    );
}

#[test]
fn latents_that_hold_nan_or_infinity_are_refused() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut values = [0.5; 64];
        values[17] = bad;
        let bytes = safetensors("latents", &[1, 4, 4, 4], &values);
        refused("safetensors", &bytes, &["NaN or infinity", "index 17"]);
    }
}

#[test]
fn an_input_that_is_not_there_is_exit_code_1() {
    let folder = folder();
    run(folder.path(), "nothing.png")
        .ends_in(1)
        .says(&["nothing.png", "no such file"]);
}

#[test]
fn an_output_folder_that_cannot_be_made_is_refused_before_the_work() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    fs::write(folder.path().join("file"), "").unwrap();
    run(folder.path(), "in.png -o file/out.png")
        .ends_in(2)
        .says(&["file/out.png", "is a file, not a folder"]);
    assert_eq!(files(folder.path()), ["file", "in.png"]);
}

#[cfg(target_os = "linux")]
#[test]
fn an_output_folder_that_cannot_be_written_is_exit_code_1() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    // Even root makes no files in /proc.
    run(folder.path(), "in.png -o /proc/sd-upscale/out.png")
        .ends_in(1)
        .says(&["in.png", "/proc/sd-upscale"]);
    run(folder.path(), "in.png -o /proc/out.png")
        .ends_in(1)
        .says(&["in.png", "/proc/out.png"]);
    assert_eq!(files(folder.path()), ["in.png"]);
}

#[test]
fn a_missing_weight_file_is_named() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    let model = copy_of_model(folder.path());
    fs::remove_file(model.join("vae/diffusion_pytorch_model.safetensors")).unwrap();
    plain(folder.path(), "in.png -o out.png -s 1 --model model")
        .ends_in(1)
        .says(&["model/vae/diffusion_pytorch_model.safetensors", "missing"]);
    assert!(!folder.path().join("out.png").exists());
}

#[test]
fn without_a_model_json_still_has_a_line_for_each_input() {
    let folder = folder_of(&[("in/a.png", 8, 8), ("in/b.png", 8, 8)]);
    fs::write(folder.path().join("in/c.png"), "no image").unwrap();
    let ran = plain(folder.path(), "in -o out --json --model ./nothing").ends_in(1);
    let mut told: Vec<(String, String)> = Vec::new();
    for line in ran.json() {
        assert_eq!(line["status"], "error");
        let text = |key: &str| line[key].as_str().unwrap().to_string();
        told.push((text("input"), text("error")));
    }
    told.sort();
    let inputs: Vec<&str> = told.iter().map(|(input, _)| &**input).collect();
    assert_eq!(inputs, ["in/a.png", "in/b.png", "in/c.png"]);
    assert!(told[0].1.contains("./nothing"), "{}", told[0].1);
    assert!(
        files(folder.path())
            .iter()
            .all(|file| file.starts_with("in/"))
    );
}

#[test]
fn a_missing_shard_and_a_missing_config_are_named() {
    for file in [
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/merges.txt",
        "text_encoder/model.safetensors",
    ] {
        let folder = folder_of(&[("in.png", 8, 8)]);
        let model = copy_of_model(folder.path());
        fs::remove_file(model.join(file)).unwrap();
        plain(folder.path(), "in.png -o out.png -s 1 --model model")
            .ends_in(1)
            .says(&[file]);
        assert!(!folder.path().join("out.png").exists());
    }
}

#[test]
fn a_tensor_of_another_shape_is_named_with_both_shapes() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    let config = copy_of_model(folder.path()).join("vae/config.json");
    let text = fs::read_to_string(&config).unwrap();
    let fewer = text.replacen("24,", "40,", 1);
    assert_ne!(fewer, text);
    fs::write(config, fewer).unwrap();
    plain(folder.path(), "in.png -o out.png -s 1 --model model")
        .ends_in(1)
        .says(&[
            "model/vae/diffusion_pytorch_model.safetensors",
            "encoder.down_blocks.1.resnets.0.conv1.weight",
            "[24, 16, 3, 3]",
            "[40, 16, 3, 3]",
        ]);
    assert!(!folder.path().join("out.png").exists());
}

#[test]
fn weights_cut_short_are_named() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    let file = copy_of_model(folder.path()).join("text_encoder/model.safetensors");
    let bytes = fs::read(&file).unwrap();
    for length in [0, 4, 5000, bytes.len() - 1] {
        fs::write(&file, &bytes[..length]).unwrap();
        plain(folder.path(), "in.png -o out.png -s 1 --model model")
            .ends_in(1)
            .says(&["model/text_encoder/model.safetensors", "cut short"]);
        assert!(!folder.path().join("out.png").exists());
    }
}

#[test]
fn wrong_usage_is_exit_code_2_and_does_nothing() {
    let folder = folder_of(&[("in.png", 8, 8), ("other.png", 8, 8)]);
    for (arguments, words) in [
        ("in.png -s 0", "1..=1000"),
        ("in.png -s 1001", "1..=1000"),
        ("in.png -g -1", "0 or more"),
        ("in.png -g nan", "0 or more"),
        ("in.png --seed -1", "--seed"),
        ("in.png --schedule linear", "log-linear"),
        ("in.png --dtype f8", "bf16"),
        ("in.png --dtype tf32 --device cpu", "--dtype f32"),
        ("in.png --batch 0", "1..=64"),
        ("in.png --quality 0", "--quality"),
        ("in.png --shard 3/3", "3/3"),
        ("in.png -o out.xyz", "out.xyz"),
        ("in.png -o out.gif", "gif"),
        ("in.png -o out.npz", "npz"),
        ("in.png -o in.png", "over the input"),
        ("in.png other.png -o one.png", "one.png"),
        ("in.png --json -o -", "standard output"),
        ("in.png -q -v", "--verbose"),
        ("in.png -o out.png -g 1e30", "up to 100"),
        ("in.png -o out.png -g NaN", "up to 100"),
        ("in.png --nonsense", "--nonsense"),
        ("in.png --max-memory 8G", "8GB, 1.5GB or 600MiB"),
        ("in.png --max-memory 0", "8GB, 1.5GB or 600MiB"),
        (
            "in.png --temp-dir nowhere",
            "nowhere: there is no such folder",
        ),
        ("in.png --temp-dir in.png", "in.png: it is not a folder"),
        ("in.png --dry-run --temp-dir nowhere", "no such folder"),
        ("-", "-o"),
    ] {
        run(folder.path(), arguments).ends_in(2).says(&[words]);
    }
    finish(program(folder.path()), b"")
        .ends_in(2)
        .says(&["<INPUT>"]);
    assert_eq!(files(folder.path()), ["in.png", "other.png"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_folder_for_maps_that_cannot_be_written_is_refused_before_the_work() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    // Even root makes no files in /proc.
    run(folder.path(), "in.png -o out.png --temp-dir /proc -v")
        .ends_in(2)
        .says(&[
            "--temp-dir /proc: no file can be made in it",
            "expected a folder",
        ])
        .never_says("weights");
    // One that can be is left as it was.
    fs::create_dir(folder.path().join("maps")).unwrap();
    run(
        folder.path(),
        "in.png -o out.png --temp-dir maps --max-memory 6.5GB",
    )
    .ends_in(0);
    assert_eq!(files(folder.path()), ["in.png", "out.png"]);
}

#[test]
fn more_pixels_than_allowed_are_refused_with_the_flag_that_lifts_the_limit() {
    let folder = folder_of(&[("in.png", 40, 30)]);
    run(folder.path(), "in.png -o out.png --max-pixels 1199")
        .ends_in(1)
        .says(&["in.png", "40x30", "--max-pixels"]);
    run(folder.path(), "in.png -o out.png --max-pixels 1200").ends_in(0);
}

#[test]
fn a_negative_prompt_without_guidance_is_warned_of() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    run(folder.path(), "in.png -o out.png -n blurry")
        .ends_in(0)
        .says(&["--negative-prompt", "above 1"]);
    run(folder.path(), "in.png -o out.png -n blurry -g 2")
        .ends_in(0)
        .never_says("--negative-prompt");
}

#[test]
fn a_prompt_of_ten_thousand_characters_is_warned_of_in_a_short_line() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    let prompt = "cat,dog,".repeat(1250);
    let ran = run(folder.path(), &format!("in.png -o out.png -p {prompt}"));
    let ran = ran.ends_in(0).says(&["tokens were left out, from \""]);
    let warning = ran
        .stderr
        .lines()
        .find(|line| line.contains("were left out"))
        .unwrap();
    assert!(warning.len() < 250, "{warning}");
}
