//! A file as the original checkpoint: it is refused in a line, or every tensor in it can be asked for.
#![no_main]

use candle_core::{DType, Device};
use libfuzzer_sys::fuzz_target;
use sd_upscale::device::Placement;
use sd_upscale::model::Checkpoint;
use sd_upscale_fuzz::scratch;

/// Of a small upscaler, which the seeds are cut from.
const SOME: [&str; 4] = ["conv_in.weight", "time_proj.weight", "conv_out.bias", "low_res_noise_embed.weight"];

fuzz_target!(|data: &[u8]| {
    let path = scratch().join("model.pth");
    std::fs::write(&path, data).unwrap();
    let checkpoint = match Checkpoint::open(&path) {
        Ok(checkpoint) => checkpoint,
        Err(error) => {
            let text = format!("{error:#}");
            assert!(text.starts_with("the checkpoint ") && !text.contains('\n'), "{text}");
            return;
        }
    };
    let weights = checkpoint.weights(&Placement::new(&Device::Cpu, DType::F32));
    for name in SOME {
        let Some(shape) = weights.shape(name) else {
            continue;
        };
        let raw = weights.raw(name).expect("it has a shape");
        assert!(raw.len() <= data.len());
        if let Ok(values) = weights.f32(shape, name) {
            assert_eq!(values.len(), shape.iter().product::<usize>());
        }
    }
});
