//! What the tests share: the small model, the reference numbers, distances.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use sd_upscale::ModelFiles;
use sd_upscale::device::Placement;
use sd_upscale::model::PartFiles;
use sd_upscale::networks::text::Conditioning;

pub use crate::data::data;

pub fn model() -> ModelFiles {
    ModelFiles::Folder(data("model"))
}

pub fn vae_files() -> PartFiles {
    PartFiles {
        files: model(),
        part: "vae",
        weights: None,
    }
}

/// The ways to run a model here: this program's CPU kernels, candle's stock operations, and the card's where there is one.
pub fn placements(dtype: DType) -> Vec<(&'static str, Placement)> {
    let kernels = Placement::new(&Device::Cpu, dtype);
    let stock = Placement::stock(&Device::Cpu, dtype);
    let mut all = vec![("kernels", kernels), ("stock", stock)];
    all.extend(card().map(|device| ("card", Placement::new(&device, dtype))));
    all
}

/// The card to test on as well, which SD_UPSCALE_TEST_DEVICE names as `--device` would; None where it names none.
pub fn card() -> Option<Device> {
    let name = std::env::var("SD_UPSCALE_TEST_DEVICE").ok()?;
    let choice = name.parse().expect("SD_UPSCALE_TEST_DEVICE");
    let (devices, _) = sd_upscale::device::open(&choice).expect("SD_UPSCALE_TEST_DEVICE");
    Some(devices[0].clone())
}

/// The card, or a word about why a test has nothing to do.
pub fn card_or_word(test: &str) -> Option<Device> {
    let found = card();
    if found.is_none() {
        println!("{test}: passed over, SD_UPSCALE_TEST_DEVICE names no card");
    }
    found
}

/// Numbers that tests/data/make_reference.py wrote.
pub struct Reference {
    name: &'static str,
    tensors: HashMap<String, Tensor>,
}

impl Reference {
    pub fn read(name: &'static str) -> Self {
        let path = data(&format!("reference/{name}.safetensors"));
        let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        Self { name, tensors }
    }

    pub fn get(&self, key: &str) -> Tensor {
        let found = self.tensors.get(key);
        let name = self.name;
        found
            .unwrap_or_else(|| {
                panic!("{name}.safetensors lacks `{key}`: run tests/data/make_reference.py")
            })
            .clone()
    }

    /// What a call of the UNet was told of the prompt: its context, and the pooled prompt behind the 128 features of noise level 0.
    pub fn conditioning(&self, case: &str) -> Conditioning {
        let timestep_cond = self.get(&format!("{case}.timestep_cond"));
        let width = timestep_cond.dim(1).unwrap() - 128;
        Conditioning {
            context: self.get(&format!("{case}.context")),
            pooled: timestep_cond.narrow(1, 128, width).unwrap(),
        }
    }

    pub fn keys(&self) -> Vec<&str> {
        let mut keys: Vec<&str> = self.tensors.keys().map(|key| &**key).collect();
        keys.sort();
        keys
    }
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    tensor
        .to_dtype(DType::F32)
        .and_then(|t| t.flatten_all()?.to_vec1())
        .unwrap()
}

/// |a - b| / |b| in the Euclidean norm; infinite where a number is missing or none.
pub fn relative_error(actual: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(actual.dims(), expected.dims(), "shapes differ");
    let (mut difference, mut norm) = (0f64, 0f64);
    for (a, e) in values(actual).into_iter().zip(values(expected)) {
        difference += f64::from(a - e).powi(2);
        norm += f64::from(e).powi(2);
    }
    let error = (difference / norm).sqrt();
    if error.is_nan() { f64::INFINITY } else { error }
}

/// Fails, with what was seen, where `actual` is further from `expected` than `tolerance`.
#[track_caller]
pub fn assert_close(what: &str, actual: &Tensor, expected: &Tensor, tolerance: f64) {
    let error = relative_error(actual, expected);
    println!("{what}: relative error {error:.2e}");
    assert!(
        error <= tolerance,
        "{what}: relative error {error:.2e} against tests/data/make_reference.py's numbers, at most {tolerance:.0e} is allowed"
    );
}
