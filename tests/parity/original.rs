//! The original checkpoint, noise levels and masked padding, against k-diffusion's network and what its notebook does around it
//! (tests/data/original.py).

use candle_core::{DType, Device, Tensor};
use sd_upscale::device::Placement;
use sd_upscale::networks::unet::UNet;
use sd_upscale::{LowRes, ModelFiles, NoiseType, Settings, Upscaler};

use crate::common::*;
use crate::whole::{Case, upscaler};

/// Of the final latents. 2e-6 is seen, after twenty steps too; what is to be told apart (noise of a tenth, another kind of noise, a mask)
/// differs by 5e-3 at least, which original.py checks.
const ORIGINAL: f64 = 1e-4;
/// The same in half precision, plain and with guidance, which multiplies what two prompts differ by: what the other models are held to
/// (`precision.rs`).
const HALF: [(DType, f64, f64); 2] = [(DType::F16, 4e-3, 1.2e-2), (DType::BF16, 4e-2, 1e-1)];

pub fn original() -> ModelFiles {
    ModelFiles::original(&data("original/upscaler.pth"), model()).unwrap()
}

/// One case of original.json.
#[derive(serde::Deserialize)]
pub struct OriginalCase {
    #[serde(flatten)]
    pub case: Case,
    noise_level: f64,
    noise_type: String,
    mask_padding: bool,
}

impl OriginalCase {
    pub fn all() -> Vec<Self> {
        let text = std::fs::read(data("reference/original.json")).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    fn called(name: &str) -> Self {
        let mut all = Self::all().into_iter();
        all.find(|case| case.case.name == name).unwrap()
    }

    fn settings(&self) -> Settings {
        let mut types = NoiseType::ALL.into_iter();
        Settings {
            noise_level: self.noise_level,
            noise_type: types.find(|one| one.name() == self.noise_type).unwrap(),
            mask_padding: self.mask_padding,
            ..self.case.settings()
        }
    }

    pub fn run(&self, upscaler: &mut Upscaler) -> Tensor {
        let upscaled = upscaler
            .upscale(&[self.case.low_res()], &self.settings(), &mut |_| Ok(()))
            .unwrap();
        upscaled[0].latents().unwrap()
    }
}

#[test]
fn the_original_checkpoint_gives_the_latents_of_the_original_implementation() {
    let reference = Reference::read("original");
    let mut compared = 0;
    for stock in [false, true] {
        let mut upscaler = upscaler(original(), DType::F32);
        if stock {
            upscaler.use_stock_operations();
        }
        for case in OriginalCase::all() {
            let name = &case.case.name;
            if stock && case.settings().steps > 4 {
                continue; // as in whole.rs
            }
            let what = format!("{name}{}", if stock { " (stock)" } else { "" });
            assert_close(
                &what,
                &case.run(&mut upscaler),
                &reference.get(name),
                ORIGINAL,
            );
            compared += 1;
        }
    }
    assert!(compared >= 30, "{compared} cases");
}

#[test]
fn half_precision_stays_near_the_original_implementation() {
    let reference = Reference::read("original");
    let names = [
        "plain",
        "gaussian-0.6",
        "fake-0.6",
        "masked",
        "masked-guided",
        "masked-gaussian-0.6-guided",
    ];
    for (dtype, plain, guided) in HALF {
        let mut upscaler = upscaler(original(), dtype);
        for case in names.map(OriginalCase::called) {
            let name = &case.case.name;
            let bound = if case.case.guidance > 1.0 {
                guided
            } else {
                plain
            };
            let what = format!("{name} {dtype:?}");
            assert_close(&what, &case.run(&mut upscaler), &reference.get(name), bound);
        }
    }
}

#[test]
fn a_batch_has_each_pictures_own_noise_and_the_bits_it_gets_alone() {
    let mut upscaler = upscaler(original(), DType::F32);
    for name in ["gaussian-0.1-guided", "masked-guided"] {
        let case = OriginalCase::called(name);
        let LowRes::Image(first) = case.case.low_res() else {
            panic!("an image");
        };
        let second = LowRes::Image((&first * -0.5).unwrap());
        let inputs = [LowRes::Image(first), second];
        let settings = case.settings();
        let mut upscale = |inputs: &[LowRes]| -> Vec<Vec<f32>> {
            let upscaled = upscaler
                .upscale(inputs, &settings, &mut |_| Ok(()))
                .unwrap();
            upscaled
                .iter()
                .map(|one| values(&one.latents().unwrap()))
                .collect()
        };
        let together = upscale(&inputs);
        assert_ne!(together[0], together[1]);
        for (input, together) in inputs.iter().zip(together) {
            assert_eq!(upscale(std::slice::from_ref(input)), [together], "{name}");
        }
    }
}

#[test]
fn at_level_0_nothing_is_drawn_and_a_model_without_the_weight_will_do() {
    let case = Case::all()
        .into_iter()
        .find(|case| case.name == "square-karras-1")
        .unwrap();
    let mut upscaler = upscaler(model(), DType::F32);
    let mut latents = |settings: &Settings| {
        let upscaled = upscaler.upscale(&[case.low_res()], settings, &mut |_| Ok(()));
        upscaled.map(|upscaled| values(&upscaled[0].latents().unwrap()))
    };
    let plain = case.settings();
    let fake = Settings {
        noise_type: NoiseType::Fake,
        ..plain.clone()
    };
    assert_eq!(latents(&plain).unwrap(), latents(&fake).unwrap());
    let noisy = Settings {
        noise_level: 0.1,
        ..plain.clone()
    };
    let error = latents(&noisy).unwrap_err().to_string();
    assert!(error.contains("low_res_noise_embed.weight"), "{error}");
    for level in [-0.1, 0.7, f64::NAN] {
        let beyond = Settings {
            noise_level: level,
            ..plain.clone()
        };
        let error = latents(&beyond).unwrap_err().to_string();
        assert!(error.contains("expected 0 to 0.6"), "{error}");
    }
}

/// That keys which are left out weigh what keys with scores 10000 lower do, nothing, the masked cases show: the reference adds those.
#[test]
fn a_prompt_that_fills_all_positions_has_nothing_to_mask() {
    let unmasked = OriginalCase::called("masked-long");
    let mut upscaler = upscaler(original(), DType::F32);
    let masked = unmasked.run(&mut upscaler);
    let settings = Settings {
        mask_padding: false,
        ..unmasked.settings()
    };
    let upscaled = upscaler
        .upscale(&[unmasked.case.low_res()], &settings, &mut |_| Ok(()))
        .unwrap();
    assert_eq!(values(&masked), values(&upscaled[0].latents().unwrap()));
}

#[test]
fn the_network_at_a_level_is_not_the_network_at_another() {
    let placement = Placement::new(&Device::Cpu, DType::F32);
    let unet = UNet::load(&original(), &placement).unwrap();
    let conditioning = Reference::read("unet").conditioning("b1");
    let input = Tensor::zeros((1, 8, 8, 8), DType::F32, &Device::Cpu).unwrap();
    let at = |level: f64| {
        let prompted = unet.prompted_at(&conditioning, level).unwrap();
        values(&unet.forward(&input, 0.1, &prompted).unwrap())
    };
    let plain = unet.prompted(&conditioning).unwrap();
    assert_eq!(at(0.0), values(&unet.forward(&input, 0.1, &plain).unwrap()));
    assert_ne!(at(0.0), at(0.1));
    assert_ne!(at(0.1), at(0.6));
}
