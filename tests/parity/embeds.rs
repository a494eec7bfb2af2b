//! Prompts in numbers: what diffusers' pipeline makes of them.

use candle_core::{DType, Device};
use sd_upscale::{LowRes, PromptEmbeds, Settings, Upscaler};

use crate::common::*;
use crate::whole::{low_res, upscaler_on};

/// Of the largest value; both compute in float32, in other orders: the other end-to-end cases stay below as well.
const TOLERANCE: f64 = 1e-5;

fn rows(name: &str) -> Vec<PromptEmbeds> {
    PromptEmbeds::read(&data(&format!("reference/{name}.safetensors"))).unwrap()
}

/// As `EMBEDS` in tests/data/make_reference.py.
fn settings(embeds: &PromptEmbeds, guidance: f64) -> Settings {
    Settings {
        prompt: "a prompt that does not count".into(),
        prompt_embeds: Some(embeds.clone()),
        guidance,
        steps: 3,
        seed: 6,
        ..Settings::default()
    }
}

fn upscale(upscaler: &mut Upscaler, input: &LowRes, settings: &Settings) -> candle_core::Tensor {
    let inputs = std::slice::from_ref(input);
    let upscaled = upscaler.upscale(inputs, settings, &mut |_| Ok(())).unwrap();
    upscaled[0].latents().unwrap()
}

#[test]
fn prompts_in_numbers_give_diffusers_latents() {
    let (reference, input) = (Reference::read("embeds"), low_res("square-64x64.png"));
    for device in [Device::Cpu].into_iter().chain(card()) {
        let mut upscaler = upscaler_on(device, model(), DType::F32);
        for (number, row) in rows("embeds").iter().enumerate() {
            for (name, guidance) in [("guided", 4.0), ("alone", 1.0)] {
                let name = format!("latents.{number}.{name}");
                let latents = upscale(&mut upscaler, &input, &settings(row, guidance));
                assert_close(&name, &latents, &reference.get(&name), TOLERANCE);
            }
        }
    }
}

#[test]
fn what_to_steer_away_from_may_be_words() {
    let (reference, input) = (Reference::read("embeds"), low_res("square-64x64.png"));
    let mut upscaler = upscaler_on(Device::Cpu, model(), DType::F32);
    for (number, row) in rows("embeds-positive").iter().enumerate() {
        assert!(!row.has_negative());
        let settings = Settings {
            negative_prompt: "blurry".into(),
            ..settings(row, 4.0)
        };
        let name = format!("latents.{number}.guided");
        let latents = upscale(&mut upscaler, &input, &settings);
        assert_close(&name, &latents, &reference.get(&name), TOLERANCE);
    }
}

#[test]
fn guidance_0_ignores_them_and_another_models_are_refused() {
    let input = low_res("square-64x64.png");
    let mut upscaler = upscaler_on(Device::Cpu, model(), DType::F32);
    let row = &rows("embeds")[0];
    let words = Settings {
        prompt_embeds: None,
        ..settings(row, 0.0)
    };
    let ignored = upscale(&mut upscaler, &input, &settings(row, 0.0));
    assert_eq!(
        values(&ignored),
        values(&upscale(&mut upscaler, &input, &words))
    );
    let tiny = upscaler_on(Device::Cpu, sd_upscale::ModelFiles::built_in(), DType::F32);
    let error = tiny.check(&settings(row, 1.0)).unwrap_err().to_string();
    assert!(error.contains("made by another one"), "{error}");
}
