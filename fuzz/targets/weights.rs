//! Safetensors as weights: the file is refused, or every tensor in it can be asked for, in its own shape and in a
//! wrong one, and has the values that candle reads.
#![no_main]

use candle_core::{DType, Device};
use libfuzzer_sys::fuzz_target;
use safetensors::SafeTensors;
use sd_upscale::device::Placement;
use sd_upscale::model::Weights;
use sd_upscale_fuzz::scratch;

fuzz_target!(|data: &[u8]| {
    let path = scratch().join("model.safetensors");
    std::fs::write(&path, data).unwrap();
    let placement = Placement::new(&Device::Cpu, DType::F32);
    let Ok(weights) = Weights::open(&[path], &placement) else {
        return;
    };
    let file =
        SafeTensors::deserialize(data).expect("accepted by one reader and refused by another");
    for (name, view) in file.tensors() {
        let shape = view.shape();
        assert_eq!(weights.shape(&name), Some(shape));
        let one_more: Vec<usize> = shape.iter().copied().chain([1]).collect();
        assert!(weights.f32(&one_more, &name).is_err());
        let Ok(values) = weights.f32(shape, &name) else {
            continue;
        };
        assert_eq!(values.len(), shape.iter().product::<usize>());
        let _ = weights.tensor_in(shape, &name, DType::F16);
    }
    assert!(weights.f32(&[1], "\u{1}no such tensor").is_err());
});
