//! Four and eight times: each pass is an upscale of the last one's latents, to the bit.

use candle_core::{DType, Device};
use sd_upscale::{Enlargement, Event, LowRes, Pixels, Settings, Stage};

use crate::common::*;
use crate::whole::upscaler_on;

fn picture(width: usize, height: usize) -> LowRes {
    let value = |i: usize| (i * 37 % 256) as f32 / 255.0;
    let values = (0..width * height * 3).map(value).collect();
    LowRes::image(&Pixels::new(width, height, values).unwrap()).unwrap()
}

fn settings(scale: Enlargement) -> Settings {
    Settings {
        prompt: "cat".into(),
        negative_prompt: "dog".into(),
        guidance: 3.0,
        steps: 2,
        seed: 5,
        scale,
        ..Settings::default()
    }
}

fn devices() -> impl Iterator<Item = Device> {
    [Device::Cpu].into_iter().chain(card())
}

#[test]
fn a_pass_is_an_upscale_of_the_last_ones_latents() {
    for device in devices() {
        let mut upscaler = upscaler_on(device, model(), DType::F32);
        let mut upscale = |input: &LowRes, scale: Enlargement| {
            let inputs = std::slice::from_ref(input);
            let mut upscaled = upscaler
                .upscale(inputs, &settings(scale), &mut |_| Ok(()))
                .unwrap();
            upscaled.remove(0)
        };
        // Both sides end within a latent position.
        let input = picture(37, 21);
        let two = upscale(&input, Enlargement::Two);
        let two = LowRes::Latents(two.latents().unwrap());
        let twice = upscale(&two, Enlargement::Two);
        let four = upscale(&input, Enlargement::Four);
        assert_eq!((four.width, four.height), (148, 84));
        let latents = four.latents().unwrap();
        assert_eq!(latents.dims4().unwrap(), (1, 4, 12, 20));
        assert_eq!(values(&latents), values(&twice.latents().unwrap()));
        let eight = upscale(&input, Enlargement::Eight);
        assert_eq!((eight.width, eight.height), (296, 168));
        let from_two = upscale(&two, Enlargement::Four);
        assert_eq!(
            values(&eight.latents().unwrap()),
            values(&from_two.latents().unwrap())
        );
    }
}

#[test]
fn a_pass_of_a_batch_gives_each_the_very_bits_it_gets_alone() {
    let LowRes::Image(first) = picture(21, 37) else {
        panic!("an image");
    };
    let inputs = [
        LowRes::Image((&first * -0.5).unwrap()),
        LowRes::Image(first),
    ];
    let mut upscaler = upscaler_on(Device::Cpu, model(), DType::F32);
    let settings = settings(Enlargement::Four);
    let mut upscale = |inputs: &[LowRes]| {
        upscaler
            .upscale(inputs, &settings, &mut |_| Ok(()))
            .unwrap()
    };
    for (together, input) in upscale(&inputs).iter().zip(&inputs) {
        let alone = upscale(std::slice::from_ref(input));
        assert_eq!(
            values(&alone[0].latents().unwrap()),
            values(&together.latents().unwrap())
        );
    }
}

#[test]
fn steps_are_counted_through_and_the_picture_is_encoded_once() {
    for keep_loaded in [true, false] {
        let mut upscaler = sd_upscale::Upscaler::new(sd_upscale::Options {
            keep_loaded,
            ..sd_upscale::Options::new(model())
        })
        .unwrap();
        let (mut steps, mut stages, mut loaded) = (Vec::new(), Vec::new(), Vec::new());
        let mut watch = |event| {
            match event {
                Event::Step { done, total, .. } => steps.push((done, total)),
                Event::Started(stage) => stages.push(stage),
                Event::Loading(stage) => loaded.push(stage),
                _ => {}
            }
            Ok(())
        };
        upscaler
            .upscale(&[picture(8, 8)], &settings(Enlargement::Eight), &mut watch)
            .unwrap();
        let expected: Vec<(usize, Option<usize>)> = (1..=6).map(|done| (done, Some(6))).collect();
        assert_eq!(steps, expected);
        let count = |stages: &[Stage], stage| stages.iter().filter(|s| **s == stage).count();
        assert_eq!(count(&stages, Stage::Encode), 1);
        assert_eq!(count(&stages, Stage::Denoise), 3);
        for stage in [Stage::Text, Stage::Encode, Stage::Denoise] {
            assert_eq!(count(&loaded, stage), 1, "{stage:?} {keep_loaded}");
        }
    }
}
