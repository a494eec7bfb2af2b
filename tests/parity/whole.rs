//! The whole pipeline: latents and pictures.

use candle_core::{DType, Device};
use sd_upscale::{
    LowRes, ModelFiles, Options, Pixels, Schedule, Settings, UpscaledLatents, Upscaler,
};

use crate::FINAL_LATENTS;
use crate::common::*;

/// One case of end_to_end.json.
#[derive(serde::Deserialize)]
pub struct Case {
    pub name: String,
    input: String,
    steps: usize,
    schedule: String,
    pub guidance: f64,
    prompt: String,
    negative_prompt: Option<String>,
    seed: u64,
    #[serde(default)]
    pub weights: String,
    #[serde(default)]
    pub image: bool,
}

impl Case {
    pub fn all() -> Vec<Self> {
        let text = std::fs::read(data("reference/end_to_end.json")).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    pub fn settings(&self) -> Settings {
        Settings {
            prompt: self.prompt.clone(),
            negative_prompt: self.negative_prompt.clone().unwrap_or_default(),
            steps: self.steps,
            guidance: self.guidance,
            seed: self.seed,
            schedule: match &*self.schedule {
                "karras" => Schedule::Karras,
                "log-linear" => Schedule::LogLinear,
                other => panic!("schedule {other}"),
            },
            ..Settings::default()
        }
    }

    pub fn low_res(&self) -> LowRes {
        low_res(&self.input)
    }
}

/// A file of tests/data/inputs.
pub fn low_res(name: &str) -> LowRes {
    let path = data(&format!("inputs/{name}"));
    if name.ends_with(".safetensors") {
        let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        return LowRes::Latents(tensors["latents"].clone());
    }
    let image = image::open(path).unwrap().to_rgb8();
    let values = image.iter().map(|&v| f32::from(v) / 255.0).collect();
    let (width, height) = (image.width() as usize, image.height() as usize);
    LowRes::image(&Pixels::new(width, height, values).unwrap()).unwrap()
}

pub fn upscaler(model: ModelFiles, dtype: DType) -> Upscaler {
    upscaler_on(Device::Cpu, model, dtype)
}

pub fn upscaler_on(device: Device, model: ModelFiles, dtype: DType) -> Upscaler {
    Upscaler::new(Options {
        device,
        dtype,
        ..Options::new(model)
    })
    .unwrap()
}

pub fn run(upscaler: &mut Upscaler, case: &Case) -> UpscaledLatents {
    upscaler
        .upscale(&[case.low_res()], &case.settings(), &mut |_| Ok(()))
        .unwrap()
        .remove(0)
}

/// The picture's levels against the reference's PNG: at most 2 anywhere and 0.05 in the mean, the bounds a viewer
/// cannot see; where the latents agree to 1e-5, a level flips only when it lay on the edge of rounding.
#[track_caller]
pub fn assert_same_picture(what: &str, pixels: &Pixels, expected: &std::path::Path) {
    let expected = image::open(expected).unwrap().to_rgb8();
    let size = (pixels.width as u32, pixels.height as u32);
    assert_eq!(size, expected.dimensions(), "{what}");
    let differences: Vec<f64> = pixels
        .values
        .iter()
        .zip(expected.iter())
        .map(|(v, e)| (f64::from((v * 255.0).round_ties_even()) - f64::from(*e)).abs())
        .collect();
    let worst = differences.iter().copied().fold(0.0, f64::max);
    let mean = differences.iter().sum::<f64>() / differences.len() as f64;
    println!("{what}: levels off by {worst} at most, {mean:.4} in the mean");
    assert!(
        worst <= 2.0 && mean <= 0.05,
        "{what}: levels off by {worst} at most, {mean:.4} in the mean"
    );
}

#[test]
fn latents_and_pictures_are_those_of_the_reference_pipeline() {
    let reference = Reference::read("end_to_end");
    let mut pictures = 0;
    for stock in [false, true] {
        let mut upscaler = upscaler(model(), DType::F32);
        if stock {
            upscaler.use_stock_operations();
        }
        for case in Case::all().iter().filter(|case| case.weights == "f32") {
            if stock && case.steps > 4 {
                continue; // candle's CPU convolution takes its time; 4 steps go through all of it
            }
            let what = format!("{}{}", case.name, if stock { " (stock)" } else { "" });
            let upscaled = run(&mut upscaler, case);
            let latents = upscaled.latents().unwrap();
            assert_close(&what, &latents, &reference.get(&case.name), FINAL_LATENTS);
            if case.image {
                let pixels = upscaler.decode(&upscaled, &mut |_| Ok(())).unwrap();
                let expected = data(&format!("reference/{}.png", case.name));
                assert_same_picture(&what, &pixels, &expected);
                pictures += 1;
            }
        }
    }
    assert!(pictures >= 8, "only {pictures} pictures were compared");
}

#[test]
fn the_built_in_model_gives_what_diffusers_makes_of_its_files() {
    let reference = Reference::read("tiny");
    let mut upscaler = upscaler(ModelFiles::built_in(), DType::F32);
    let case = |steps: usize| Case {
        name: format!("tiny {steps} steps"),
        input: "square-64x64.png".into(),
        steps,
        schedule: "karras".into(),
        guidance: 1.0,
        prompt: String::new(),
        negative_prompt: None,
        seed: 0,
        weights: "f32".into(),
        image: true,
    };
    for steps in [1, 20] {
        let case = case(steps);
        let upscaled = run(&mut upscaler, &case);
        let expected = reference.get(&format!("steps-{steps}"));
        assert_close(
            &case.name,
            &upscaled.latents().unwrap(),
            &expected,
            FINAL_LATENTS,
        );
        if steps == 20 {
            let pixels = upscaler.decode(&upscaled, &mut |_| Ok(())).unwrap();
            assert_same_picture(&case.name, &pixels, &data("reference/tiny.png"));
        }
    }
}

#[test]
fn a_batch_gives_each_input_the_very_bits_it_gets_alone() {
    let cases = Case::all();
    let plain = cases
        .iter()
        .find(|c| c.name == "wide-guided-karras-4")
        .unwrap();
    let LowRes::Image(first) = plain.low_res() else {
        panic!("an image");
    };
    let second = LowRes::Image((&first * -0.5).unwrap());
    let inputs = [LowRes::Image(first), second];
    let mut upscaler = upscaler(model(), DType::F32);
    let settings = plain.settings();
    let together = upscaler
        .upscale(&inputs, &settings, &mut |_| Ok(()))
        .unwrap();
    for (input, together) in inputs.iter().zip(together) {
        let alone = upscaler
            .upscale(std::slice::from_ref(input), &settings, &mut |_| Ok(()))
            .unwrap();
        let (alone, together) = (alone[0].latents().unwrap(), together.latents().unwrap());
        assert_eq!(values(&alone), values(&together));
    }
}
