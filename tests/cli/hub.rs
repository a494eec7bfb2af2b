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
    for offline in [false, true] {
        fs::remove_file(setup.output()).unwrap();
        match offline {
            false => setup.run().ends_in(0),
            true => setup.offline().ends_in(0),
        };
        assert!(setup.output().exists());
        assert_eq!(setup.server.seen(), []);
    }
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
