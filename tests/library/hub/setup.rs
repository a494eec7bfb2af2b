//! A repository on a loopback server, and a cache folder for one test.

pub use std::fs;
pub use std::path::{Path, PathBuf};
pub use std::time::{Duration, Instant};

pub use sd_upscale::model::Hub;
pub use sd_upscale::model::hub::{Environment, Part, Report};
use tempfile::TempDir;

pub use crate::hub_server::{COMMIT, Fault, HubServer, LIST, REPO, etag};

/// What no transfer of these tests takes, however busy the machine: a wait without a limit is longer.
pub const BOUND: Duration = Duration::from_secs(200);

pub const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
pub const VAE: &str = "vae/diffusion_pytorch_model.safetensors";

/// Bytes that differ from place to place and from file to file, so that a transfer put together wrongly shows.
pub fn bytes(seed: u32, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2654435761) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as u8
        })
        .collect()
}

/// A pipeline's repository, with files in it that no run needs.
pub fn pipeline() -> Vec<(&'static str, Vec<u8>)> {
    let names = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "unet/config.json",
        UNET,
        "vae/config.json",
        VAE,
    ];
    let needless = [
        "README.md",
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ];
    let size = |name: &str| {
        if name.ends_with(".safetensors") {
            100_000
        } else {
            300
        }
    };
    let all = names.iter().chain(&needless).enumerate();
    all.map(|(i, name)| (*name, bytes(i as u32 + 1, size(name))))
        .collect()
}

pub fn content(file: &str) -> Vec<u8> {
    pipeline()
        .into_iter()
        .find(|(name, _)| *name == file)
        .unwrap()
        .1
}

pub struct Setup {
    pub server: HubServer,
    pub cache: TempDir,
}

impl Setup {
    pub fn new() -> Self {
        Setup::serving(pipeline())
    }

    pub fn serving(files: Vec<(&'static str, Vec<u8>)>) -> Self {
        Setup {
            server: HubServer::start(files),
            cache: tempfile::tempdir().unwrap(),
        }
    }

    pub fn settings(&self) -> Environment {
        settings(&self.server.url(), self.cache.path())
    }

    pub fn hub(&self) -> Hub {
        Hub::new(self.settings())
    }

    pub fn run(&self) -> anyhow::Result<PathBuf> {
        self.hub().snapshot(REPO, COMMIT, &Part::PIPELINE)
    }

    pub fn error(&self) -> String {
        format!("{:#}", self.run().unwrap_err())
    }

    pub fn repo(&self) -> PathBuf {
        self.cache.path().join("models--org--model")
    }

    pub fn blob(&self, file: &str) -> PathBuf {
        self.repo().join("blobs").join(etag(file, &content(file)))
    }

    pub fn part(&self, file: &str) -> PathBuf {
        let blob = self.blob(file);
        blob.with_file_name(format!(
            "{}.incomplete",
            blob.file_name().unwrap().to_str().unwrap()
        ))
    }

    /// The files that were asked for, each once, in order of their names.
    pub fn asked(&self) -> Vec<String> {
        let seen = self.server.seen().into_iter();
        let mut asked: Vec<_> = seen
            .map(|seen| seen.file)
            .filter(|file| file != LIST)
            .collect();
        asked.sort();
        asked.dedup();
        asked
    }

    /// First bytes of the requests for the bytes themselves of `file`; 0 stands for the whole.
    pub fn transfers(&self, file: &str) -> Vec<usize> {
        let seen = self.server.seen().into_iter();
        seen.filter(|seen| seen.cdn && seen.file == file)
            .map(|seen| seen.range.unwrap_or(0))
            .collect()
    }
}

/// Waits that are short, since nothing here is far away.
pub fn settings(endpoint: &str, cache: &Path) -> Environment {
    Environment {
        cache: cache.to_path_buf(),
        endpoint: endpoint.to_string(),
        token: None,
        offline: false,
        certificates: None,
        report: Report::Quiet,
        connect_timeout: Duration::from_secs(20),
        // Far beyond what an answer on loopback takes on a busy machine; the tests of silence wait for it.
        read_timeout: Duration::from_secs(4),
        retry_pauses: vec![Duration::from_millis(10); 3],
        lock_patience: Duration::from_secs(4),
        named_by: "--model",
    }
}

#[track_caller]
pub fn assert_says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in: {error}");
    }
}

#[track_caller]
pub fn assert_complete(dir: &Path) {
    for (file, bytes) in &pipeline()[..12] {
        assert!(
            fs::read(dir.join(file)).unwrap() == *bytes,
            "{file} differs"
        );
    }
}
