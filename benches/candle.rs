//! candle-transformers' VAE decoder and CLIP beside ours, on the CPU in float32: `cargo bench --bench candle [-- PART OF A NAME]`.
//!
//! Both have the same random weights of Stable Diffusion's sizes and take turns in one process. For each: the shortest wall
//! and CPU time of a call, how many times ours goes into theirs, the memory that a call needs beyond what was resident before
//! it, and how far the results are apart (largest difference over root mean square).

mod clock;
#[path = "../tests/parity/oracle/peer.rs"]
mod peer;

use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_transformers::models::stable_diffusion::clip::{ClipTextTransformer, Config};
use candle_transformers::models::stable_diffusion::vae::AutoEncoderKL;
use clock::cpu_seconds;
use sd_upscale::ModelFiles;
use sd_upscale::device::Placement;
use sd_upscale::model::PartFiles;
use sd_upscale::networks::text::{TextEncoder, Tokens};
use sd_upscale::networks::vae::Decoder;

/// Calls of each, in turns, after one of each that warms up and shows the memory.
const TURNS: usize = 2;

fn main() {
    let filter: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let bench = Bench { filter };
    println!("{} threads", rayon::current_num_threads());
    println!(
        "{:<24}{:>28}{:>28}{:>22}{:>9}",
        "", "wall s: ours, candle's", "CPU s: ours, candle's", "MiB: ours, candle's", "apart"
    );
    bench.text();
    bench.vae();
}

struct Bench {
    filter: Vec<String>,
}

impl Bench {
    fn wants(&self, name: &str) -> bool {
        self.filter.is_empty() || self.filter.iter().any(|part| name.contains(part.as_str()))
    }

    fn text(&self) {
        let name = "CLIP, 77 tokens";
        if !self.wants(name) {
            return;
        }
        let config = Config::v1_5();
        let (theirs, tensors) = peer::draw(peer::text_gain, |weights| {
            ClipTextTransformer::new(weights, &config)
        });
        let folder = tempfile::tempdir().unwrap();
        let json = peer::clip_v1_5_json();
        peer::save(folder.path(), "text_encoder", "model", &json, &tensors);
        let ours = TextEncoder::load(&model(folder.path()), &placement()).unwrap();
        let mut ids = vec![49407; 77];
        ids[..6].copy_from_slice(&[49406, 320, 1125, 539, 550, 18376]);
        let input = Tensor::new(&ids[..], &Device::Cpu).unwrap();
        let input = input.unsqueeze(0).unwrap();
        let tokens = Tokens {
            visible: ids.len(),
            ids,
            cut: None,
        };
        self.race(
            name,
            || ours.encode(&tokens).unwrap().context,
            || {
                let states = theirs.forward_until_encoder_layer(&input, usize::MAX, -1);
                states.unwrap().1
            },
        );
    }

    fn vae(&self) {
        let sides = [32, 64];
        let decode = |side: usize| format!("VAE decode to {0}x{0}", 8 * side);
        if !sides.iter().any(|&side| self.wants(&decode(side))) {
            return;
        }
        let config = peer::vae_config(&[128, 256, 512, 512], 32);
        let (theirs, tensors) = peer::draw(peer::vae_gain, |weights| {
            AutoEncoderKL::new(weights, 3, 3, config.clone())
        });
        let folder = tempfile::tempdir().unwrap();
        let (json, stem) = (peer::vae_json(&config), "diffusion_pytorch_model");
        peer::save(folder.path(), "vae", stem, &json, &tensors);
        let files = PartFiles {
            files: model(folder.path()),
            part: "vae",
            weights: None,
        };
        let decoder = Decoder::load(&files, &placement()).unwrap();
        for side in sides {
            let latents = peer::noise("latents", (1, 4, side, side));
            self.race(
                &decode(side),
                || decoder.decode(&latents).unwrap(),
                || theirs.decode(&latents).unwrap(),
            );
        }
    }

    /// Lets both run in turns and prints a line.
    fn race(&self, name: &str, ours: impl Fn() -> Tensor, theirs: impl Fn() -> Tensor) {
        if !self.wants(name) {
            return;
        }
        let (our_result, our_memory) = with_peak(&ours);
        let (their_result, their_memory) = with_peak(&theirs);
        let apart = peer::peak_error(&our_result, &their_result);
        drop((our_result, their_result));
        let (mut our_least, mut their_least) = (Cost::MOST, Cost::MOST);
        for _ in 0..TURNS {
            our_least = our_least.min(Cost::of(&ours));
            their_least = their_least.min(Cost::of(&theirs));
        }
        let column =
            |ours: f64, theirs: f64| format!("{ours:.2} {theirs:.2} {:6.1}x", theirs / ours);
        let wall = column(our_least.wall, their_least.wall);
        let cpu = column(our_least.cpu, their_least.cpu);
        let memory = format!("{} {}", mebibytes(our_memory), mebibytes(their_memory));
        println!("{name:<24}{wall:>28}{cpu:>28}{memory:>22}{apart:>9.1e}");
    }
}

/// Seconds.
struct Cost {
    wall: f64,
    cpu: f64,
}

impl Cost {
    const MOST: Self = Self {
        wall: f64::INFINITY,
        cpu: f64::INFINITY,
    };

    fn of(call: impl Fn() -> Tensor) -> Self {
        let (start, cpu) = (Instant::now(), cpu_seconds());
        std::hint::black_box(call());
        Self {
            wall: start.elapsed().as_secs_f64(),
            cpu: cpu_seconds() - cpu,
        }
    }

    /// The lesser of each.
    fn min(self, other: Self) -> Self {
        Self {
            wall: self.wall.min(other.wall),
            cpu: self.cpu.min(other.cpu),
        }
    }
}

fn model(folder: &Path) -> ModelFiles {
    ModelFiles::Folder(folder.to_path_buf())
}

fn placement() -> Placement {
    Placement::new(&Device::Cpu, DType::F32)
}

fn mebibytes(kib: Option<u64>) -> String {
    kib.map_or("?".into(), |kib| (kib >> 10).to_string())
}

/// The KiB that `call` had resident at its most, beyond what was so before; `None` where the system does not tell.
fn with_peak(call: impl Fn() -> Tensor) -> (Tensor, Option<u64>) {
    // Linux: 5 sets the peak back to what is resident now.
    let reset = std::fs::write("/proc/self/clear_refs", "5").ok();
    let before = reset.and_then(|()| status("VmRSS:"));
    let result = call();
    let peak = before.and_then(|before| Some(status("VmHWM:")?.saturating_sub(before)));
    (result, peak)
}

/// A field of this process's status, in KiB.
fn status(field: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with(field))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
