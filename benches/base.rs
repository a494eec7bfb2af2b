//! A call of the base UNet of a checkpoint in a folder: `cargo bench --bench base -- FOLDER [SIDE ...]`, the sides of latents (64).
//! benches/base_unet.py runs it beside diffusers and OpenVINO.

use std::path::PathBuf;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use sd_upscale::ModelFiles;
use sd_upscale::device::{Placement, Reuse};
use sd_upscale::networks::Room;
use sd_upscale::networks::base_unet::BaseUNet;

#[global_allocator]
static ALLOCATOR: Reuse = Reuse;

/// Calls that are timed, after one that brings everything in.
const CALLS: usize = 5;

fn main() {
    let mut words = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'));
    let folder = PathBuf::from(words.next().expect("the folder of a checkpoint"));
    let mut sides: Vec<usize> = words.map(|side| side.parse().expect("a side")).collect();
    if sides.is_empty() {
        sides.push(64);
    }
    let placement = Placement::new(&Device::Cpu, DType::F32);
    let unet = BaseUNet::load(&ModelFiles::Folder(folder), &placement).expect("the network");
    let width = unet.config.cross_attention_dim;
    let context = Tensor::randn(0f32, 1.0, (1, 77, width), &Device::Cpu).expect("a context");
    let prompted = unet.prompted(&context).expect("a prompt");
    let steps = unet.steps(&[500.0]).expect("a time");
    for side in sides {
        let x = Tensor::randn(0f32, 1.0, (1, 4, side, side), &Device::Cpu).expect("latents");
        let call = || {
            let start = Instant::now();
            unet.forward(&x, &steps[0], &prompted, &Room::unlimited())
                .expect("a call");
            start.elapsed().as_secs_f64()
        };
        call();
        let mut seconds: Vec<f64> = (0..CALLS).map(|_| call()).collect();
        seconds.sort_by(f64::total_cmp);
        println!(
            "{side}x{side}: {:.3} s (median of {CALLS})",
            seconds[CALLS / 2]
        );
    }
}
