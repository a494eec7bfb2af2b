//! The model from a Hub repository, on a small Hub on loopback.

use std::process::Command;

use super::hub_server::{Fault, HubServer, REPO};
use super::setup::*;

struct Setup {
    server: HubServer,
    folder: TempDir,
}

impl Setup {
    fn new() -> Self {
        Setup {
            server: HubServer::of_folder(&data("model")),
            folder: folder_of(&[("in.png", 16, 16)]),
        }
    }

    fn command(&self) -> Command {
        let mut command = program(self.folder.path());
        command
            .env("HF_ENDPOINT", self.server.url())
            .env("HF_HOME", self.folder.path().join("hf"))
            .args(["in.png", "-o", "out.png", "-s", "1", "--model", REPO]);
        command
    }

    fn run(&self) -> Ran {
        finish(self.command(), b"")
    }

    fn offline(&self) -> Ran {
        let mut command = self.command();
        command.env("HF_HUB_OFFLINE", "1");
        finish(command, b"")
    }

    fn output(&self) -> PathBuf {
        self.folder.path().join("out.png")
    }
}

#[test]
fn the_first_run_downloads_and_the_next_ones_ask_for_nothing() {
    let setup = Setup::new();
    run(setup.folder.path(), "in.png -o local.png").ends_in(0);
    setup.run().ends_in(0);
    let seen = setup.server.seen();
    assert!(
        seen.iter()
            .any(|seen| seen.file.ends_with("-00002-of-00002.safetensors"))
    );
    let pixels = |path: &Path| image(path).to_rgb8();
    assert!(pixels(&setup.output()) == pixels(&setup.folder.path().join("local.png")));
    for again in [Setup::run, Setup::offline] {
        fs::remove_file(setup.output()).unwrap();
        again(&setup).ends_in(0);
        assert!(setup.output().exists());
        assert_eq!(setup.server.seen(), []);
    }
}

/// The test model in float16 alone, named as diffusers names that: the UNet in shards, the rest whole.
fn fp16_model() -> TempDir {
    use candle_core::{DType, Device, safetensors};
    let folder = tempfile::tempdir().unwrap();
    let to_fp16 = |from: &Path, to: &Path| {
        let mut tensors = safetensors::load(from, &Device::Cpu).unwrap();
        for tensor in tensors.values_mut() {
            *tensor = tensor.to_dtype(DType::F16).unwrap();
        }
        safetensors::save(&tensors, to).unwrap();
    };
    for part in ["scheduler", "text_encoder", "tokenizer", "unet", "vae"] {
        let target = folder.path().join(part);
        fs::create_dir(&target).unwrap();
        for entry in fs::read_dir(data("model").join(part)).unwrap().flatten() {
            let name = entry.file_name().into_string().unwrap();
            if let Some(stem) = name.strip_suffix(".safetensors") {
                let (stem, shard) = stem.split_at(stem.find("-0").unwrap_or(stem.len()));
                let name = format!("{stem}.fp16{shard}.safetensors");
                to_fp16(&entry.path(), &target.join(name));
            } else if name.ends_with(".index.json") {
                let index = fs::read_to_string(entry.path()).unwrap();
                let index = index.replace("_model-0", "_model.fp16-0");
                let name = name.replace(".index.json", ".index.fp16.json");
                fs::write(target.join(name), index).unwrap();
            } else {
                fs::copy(entry.path(), target.join(name)).unwrap();
            }
        }
    }
    folder
}

#[test]
fn a_repository_in_float16_alone_is_downloaded_and_used_as_such_a_folder_is() {
    let model = fp16_model();
    let setup = Setup {
        server: HubServer::of_folder(model.path()),
        folder: folder_of(&[("in.png", 16, 16)]),
    };
    let mut local = program(setup.folder.path());
    local
        .args(["in.png", "-o", "local.png", "-s", "1", "--model"])
        .arg(model.path());
    finish(local, b"").ends_in(0);
    setup.run().ends_in(0);
    let seen = setup.server.seen();
    for file in [
        "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ] {
        assert!(seen.iter().any(|seen| seen.file == file), "{file}");
    }
    let pixels = |path: &Path| image(path).to_rgb8();
    assert!(pixels(&setup.output()) == pixels(&setup.folder.path().join("local.png")));
    fs::remove_file(setup.output()).unwrap();
    setup.offline().ends_in(0);
    assert_eq!(setup.server.seen(), []);
}

#[test]
fn offline_with_a_cold_cache_names_the_ways_round() {
    let setup = Setup::new();
    let ran = setup.offline().ends_in(1);
    ran.says(&[REPO, "HF_HUB_OFFLINE", "--model DIR", "--model tiny", "hf"]);
    assert_eq!(setup.server.seen(), []);
    assert!(!setup.output().exists());
}

#[test]
fn a_repository_that_is_not_there_is_named() {
    let setup = Setup::new();
    let mut command = setup.command();
    command.args(["--revision", "nothing"]);
    finish(command, b"")
        .ends_in(1)
        .says(&[REPO, "nothing", "--revision", "404"]);
    setup
        .server
        .fail("*", Fault::Status(404, Some("RepoNotFound")), 100);
    setup.run().ends_in(1).says(&[REPO, "no such repository"]);
    assert!(!setup.output().exists());
}

#[test]
fn a_gated_repository_asks_for_a_token_and_takes_it() {
    let setup = Setup::new();
    setup.server.require_token("hf_secret");
    setup
        .run()
        .ends_in(1)
        .says(&[REPO, "401", "HF_TOKEN"])
        .never_says("hf_secret");
    let mut command = setup.command();
    command.env("HF_TOKEN", "hf_secret");
    finish(command, b"").ends_in(0);
    assert!(setup.output().exists());
}

#[test]
fn a_vae_repository_is_downloaded_too() {
    let setup = Setup::new();
    let mut command = setup.command();
    command.args(["--vae", REPO]);
    finish(command, b"").ends_in(0);
    assert!(setup.output().exists());
}

#[test]
fn without_a_network_the_published_model_points_to_the_small_one() {
    let folder = folder_of(&[("in.png", 16, 16)]);
    let mut command = program(folder.path());
    // A port that nothing listens on.
    command
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .env("HF_HOME", folder.path().join("hf"))
        .args(["in.png", "-o", "out.png"]);
    finish(command, b"").ends_in(1).says(&[
        "stabilityai/sd-x2-latent-upscaler",
        "127.0.0.1:9",
        "--model DIR",
        "HF_HUB_OFFLINE=1",
        "--model tiny",
    ]);
    assert!(!folder.path().join("out.png").exists());
}

#[test]
fn of_a_base_checkpoint_what_is_used_is_fetched_and_no_more() {
    let setup = Setup {
        server: HubServer::of_folder(&data("base/sd1")),
        folder: folder(),
    };
    let base = |more: &[&str], offline: bool| {
        let mut command = small(setup.folder.path(), "--generate -p cat -o out.png -s 1");
        command
            .env("HF_ENDPOINT", setup.server.url())
            .env("HF_HOME", setup.folder.path().join("hf"))
            .args(["--base", REPO, "--base-steps", "1"])
            .args(more);
        if offline {
            command.env("HF_HUB_OFFLINE", "1");
        }
        finish(command, b"")
    };
    let fetched = |part: &str| {
        let seen = setup.server.seen();
        assert!(seen.iter().any(|seen| seen.file.ends_with(".safetensors")));
        seen.iter().any(|seen| seen.file.starts_with(part))
    };
    base(&["--save-low-res"], true)
        .ends_in(1)
        .says(&["HF_HUB_OFFLINE", "or give --base DIR"])
        .never_says("give --model");
    base(&[], false).ends_in(0);
    assert!(!fetched("vae/"));
    base(&["--save-low-res"], false).ends_in(0);
    assert!(fetched("vae/"));
    base(&["--save-low-res", "--refine", "1"], true).ends_in(0);
    assert_eq!(setup.server.seen(), []);
}
