//! `--convert`: a model as a folder in the diffusers layout, whole or not at all.

use std::collections::BTreeMap;

use safetensors::{Dtype, SafeTensors};

use super::setup::*;

const UPSCALER: &str = "original/upscaler.pth";
/// All that is read of a model.
const PARTS: [&str; 12] = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
];

/// The program in `folder` with the original checkpoint and the small model's other parts.
fn original(folder: &Path, arguments: &str) -> Ran {
    let mut command = program(folder);
    command.arg("--model").arg(data(UPSCALER));
    command.arg("--model-parts").arg(data("model"));
    command.args(arguments.split(' '));
    finish(command, b"")
}

fn latents(folder: &Path, name: &str) -> Vec<f32> {
    tensor(&fs::read(folder.join(name)).unwrap(), "latents").1
}

/// Types and shapes of the tensors of a file.
fn tensors(path: &Path) -> BTreeMap<String, (Dtype, Vec<usize>)> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let each = file.tensors().into_iter();
    each.map(|(name, view)| (name, (view.dtype(), view.shape().to_vec())))
        .collect()
}

/// |a - b| / |b|
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let squares = |values: &mut dyn Iterator<Item = f32>| {
        values.map(|value| f64::from(value).powi(2)).sum::<f64>()
    };
    let off = squares(&mut std::iter::zip(a, b).map(|(a, b)| a - b));
    (off / squares(&mut b.iter().copied())).sqrt()
}

#[test]
fn the_folder_of_a_checkpoint_gives_its_latents() {
    let folder = folder_of(&[("in.png", 64, 32)]);
    let run = "in.png -s 2 -p cat -g 2";
    original(folder.path(), &format!("{run} -o checkpoint.safetensors")).ends_in(0);
    original(folder.path(), "--convert model")
        .ends_in(0)
        .says(&["wrote model"]);
    assert_eq!(files(&folder.path().join("model")), PARTS);
    plain(
        folder.path(),
        &format!("{run} --model model -o folder.safetensors"),
    )
    .ends_in(0);
    let (checkpoint, converted) = (
        latents(folder.path(), "checkpoint.safetensors"),
        latents(folder.path(), "folder.safetensors"),
    );
    // The same numbers in the same type: not a bit is off.
    assert_eq!(checkpoint, converted);
    let unet = tensors(
        &folder
            .path()
            .join("model/unet/diffusion_pytorch_model.safetensors"),
    );
    assert_eq!(
        unet["low_res_noise_embed.weight"],
        (Dtype::F16, vec![64, 1])
    );
    assert!(unet.values().all(|(dtype, _)| *dtype == Dtype::F16));
}

#[test]
fn a_checkpoint_of_float32_gives_what_the_same_numbers_in_float16_do() {
    let folder = folder_of(&[("in.png", 64, 32)]);
    original(folder.path(), "--convert half --dtype f16").ends_in(0);
    original(folder.path(), "--convert whole --dtype f32").ends_in(0);
    for (name, width) in [("half", Dtype::F16), ("whole", Dtype::F32)] {
        for part in [
            "unet/diffusion_pytorch_model",
            "vae/diffusion_pytorch_model",
            "text_encoder/model",
        ] {
            let path = folder.path().join(name).join(format!("{part}.safetensors"));
            let floats = tensors(&path)
                .into_values()
                .filter(|(dtype, _)| *dtype != Dtype::I64);
            assert!(
                floats.map(|(dtype, _)| dtype).all(|dtype| dtype == width),
                "{name} {part}"
            );
        }
    }
    let size = |name: &str| {
        let path = folder
            .path()
            .join(name)
            .join("unet/diffusion_pytorch_model.safetensors");
        path.metadata().unwrap().len() as f64
    };
    assert!((size("whole") / size("half") - 2.0).abs() < 0.02);
    let arguments = "in.png -s 2 -o";
    original(folder.path(), &format!("{arguments} original.safetensors")).ends_in(0);
    let model = "--model whole";
    plain(
        folder.path(),
        &format!("{arguments} whole.safetensors {model}"),
    )
    .ends_in(0);
    assert_eq!(
        latents(folder.path(), "original.safetensors"),
        latents(folder.path(), "whole.safetensors")
    );
    // The VAE and the text encoder are rounded now, to 11 bits: 5e-4 of a weight, which the steps amplify by ten at most.
    plain(
        folder.path(),
        &format!("{arguments} half.safetensors --model half"),
    )
    .ends_in(0);
    let half = latents(folder.path(), "half.safetensors");
    let off = distance(&half, &latents(folder.path(), "original.safetensors"));
    assert!(off > 0.0 && off < 5e-3, "{off}");
}

#[test]
fn any_model_is_converted() {
    let folder = folder_of(&[("in.png", 64, 32)]);
    let arguments = "in.png -s 1 -o";
    for (model, name) in [
        ("tiny".to_string(), "tiny"),
        (data("model").display().to_string(), "small"),
    ] {
        plain(
            folder.path(),
            &format!("--model {model} --convert {name} -q"),
        )
        .ends_in(0)
        .never_says("wrote");
        assert_eq!(files(&folder.path().join(name)), PARTS);
        for (from, output) in [(&*model, "a"), (name, "b")] {
            plain(
                folder.path(),
                &format!("{arguments} {output}.safetensors --model {from}"),
            )
            .ends_in(0);
        }
        assert_eq!(
            latents(folder.path(), "a.safetensors"),
            latents(folder.path(), "b.safetensors"),
            "{model}"
        );
    }
    // Shards become one file.
    let shards = tensors(&data(
        "model/unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    ));
    let whole = tensors(
        &folder
            .path()
            .join("small/unet/diffusion_pytorch_model.safetensors"),
    );
    assert!(shards.len() < whole.len());
    for (name, tensor) in shards {
        assert_eq!(whole[&name], tensor);
    }
}

#[test]
fn a_folder_that_holds_something_is_left_alone() {
    let folder = folder();
    fs::create_dir_all(folder.path().join("full")).unwrap();
    fs::write(folder.path().join("full/mine.txt"), "mine").unwrap();
    fs::write(folder.path().join("file"), "mine").unwrap();
    for (target, words) in [
        ("full", "not empty"),
        ("file", "a file of this name"),
        ("file/model", "file/model"),
    ] {
        plain(folder.path(), &format!("--model tiny --convert {target}"))
            .ends_in(1)
            .says(&[target, words]);
    }
    assert_eq!(files(folder.path()), ["file", "full/mine.txt"]);
    fs::create_dir(folder.path().join("empty")).unwrap();
    plain(folder.path(), "--model tiny --convert empty").ends_in(0);
    plain(folder.path(), "--model tiny --convert new/one").ends_in(0);
    for made in ["empty", "new/one"] {
        assert_eq!(files(&folder.path().join(made)), PARTS);
    }
}

#[test]
fn a_conversion_that_fails_leaves_nothing() {
    let folder = folder();
    // The unet's weights, which come after other files, are cut short.
    let model = copy_of_model(folder.path());
    let weights = model.join("vae/diffusion_pytorch_model.safetensors");
    let whole = fs::read(&weights).unwrap();
    fs::write(&weights, &whole[..whole.len() - 1]).unwrap();
    let before = files(folder.path());
    plain(folder.path(), "--model ./model --convert some/new")
        .ends_in(1)
        .says(&["vae/diffusion_pytorch_model.safetensors", "cut short"]);
    assert_eq!(files(folder.path()), before);
    assert!(!folder.path().join("some").exists());
    for evil in [
        "evil-whole.pth",
        "evil-hidden.pth",
        "evil-late.pth",
        "evil-legacy.pth",
    ] {
        let mut command = program(folder.path());
        command.arg("--model").arg(data(&format!("torch/{evil}")));
        command
            .arg("--model-parts")
            .arg(data("model"))
            .args(["--convert", "new"]);
        finish(command, b"")
            .ends_in(1)
            .says(&["`posix system`", "nothing in the file was run"]);
        assert_eq!(files(folder.path()), before, "{evil}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_fills_up_leaves_nothing() {
    let folder = folder();
    let mut command = std::process::Command::new("sh");
    let script = "ulimit -f 500; exec \"$0\" --model tiny --convert new";
    command
        .current_dir(folder.path())
        .args(["-c", script, env!("CARGO_BIN_EXE_sd-upscale")]);
    finish(command, b"")
        .ends_in(1)
        .says(&["cannot write", "safetensors"]);
    assert_eq!(files(folder.path()), Vec::<String>::new());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_value_that_a_type_does_not_hold_is_named() {
    let folder = folder();
    let model = copy_of_model(folder.path());
    let path = model.join("vae/diffusion_pytorch_model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (name, _) = file
        .tensors()
        .into_iter()
        .find(|(_, view)| view.dtype() == Dtype::F32)
        .unwrap();
    let at = {
        let view = file.tensor(&name).unwrap();
        view.data().as_ptr() as usize - bytes.as_ptr() as usize
    };
    let mut changed = bytes.clone();
    changed[at..at + 4].copy_from_slice(&70_000f32.to_le_bytes());
    fs::write(&path, changed).unwrap();
    plain(folder.path(), "--model ./model --convert new --dtype f16")
        .ends_in(1)
        .says(&[&name, "70000", "--dtype bf16"]);
    plain(folder.path(), "--model ./model --convert new --dtype bf16").ends_in(0);
}

#[test]
fn options_of_a_run_do_not_go_with_a_conversion() {
    let folder = folder_of(&[("in.png", 32, 32)]);
    for options in [
        "in.png",
        "-o out.png",
        "-s 3",
        "--vae tiny",
        "--json",
        "--device cpu",
        "--export-tiny x",
    ] {
        plain(
            folder.path(),
            &format!("--model tiny --convert new {options}"),
        )
        .ends_in(2)
        .says(&["--convert"]);
    }
    plain(folder.path(), "--model tiny --convert new --dtype tf32")
        .ends_in(2)
        .says(&["tf32"]);
    assert_eq!(files(folder.path()), ["in.png"]);
}
