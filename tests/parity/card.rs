//! The networks and the whole on a card, in every precision that it is used in.
//!
//! SD_UPSCALE_TEST_DEVICE names the card: a real one, or that of tests/cuda_card, on which `.ci/run` runs these.

use candle_core::DType;
use sd_upscale::device::Placement;
use sd_upscale::networks::unet::UNet;
use sd_upscale::networks::vae::{Decoder, Encoder};
use sd_upscale::pipeline::preconditioning::Preconditioning;
use sd_upscale::{Event, LowRes, Settings};

use crate::STAGE;
use crate::common::*;
use crate::original::{OriginalCase, original};
use crate::samplers::assert_latents_are_k_diffusions;
use crate::whole::{Case, assert_same_picture, upscaler_on};

/// What a network's output may differ by. float16 rounds to 5e-4 relative, bfloat16 to 4e-3, and a network's layers leave
/// two to sixteen times one rounding; a wrong formula leaves 10 % and more in any of them.
pub const NETWORK: [(DType, f64); 3] =
    [(DType::F32, STAGE), (DType::F16, 8e-3), (DType::BF16, 4e-2)];

/// What latents may differ by at the end of the steps, without and with guidance: float32 sums in another order leave 3e-6
/// and are given three times that, the halves what their roundings leave. Guidance takes that many times one pass less nearly
/// as many times the other, and of their roundings with them: three to six times are seen.
pub const LATENTS: [(DType, f64, f64); 3] = [
    (DType::F32, 1e-5, 1e-5),
    (DType::F16, 3e-3, 5e-3),
    (DType::BF16, 3e-2, 4e-2),
];

#[test]
fn the_vae_in_every_precision() {
    let Some(device) = card_or_word("the VAE") else {
        return;
    };
    let reference = Reference::read("vae");
    for (dtype, tolerance) in NETWORK {
        let placement = Placement::new(&device, dtype);
        let encoder = Encoder::load(&vae_files(), &placement).unwrap();
        let posterior = encoder.encode(&reference.get("encode.image")).unwrap();
        let expected = reference.get("encode.mean");
        let what = format!("encode {dtype:?}");
        assert_close(&what, &posterior.mean, &expected, tolerance);
        let decoder = Decoder::load(&vae_files(), &placement).unwrap();
        let image = decoder.decode(&reference.get("decode.latents")).unwrap();
        let expected = reference.get("decode.image");
        let what = format!("decode {dtype:?}");
        assert_close(&what, &image, &expected, tolerance);
    }
}

/// The decoder of a run in tf32. cuDNN rounds to TF32 on a real card and where SIM_TF32=1 says so; cuBLASLt always, when it is
/// asked for.
#[test]
fn the_decoder_in_tf32() {
    let Some(device) = card_or_word("the decoder in TF32") else {
        return;
    };
    let reference = Reference::read("vae");
    let placement = Placement {
        tf32: true,
        ..Placement::new(&device, DType::F32)
    };
    let decoder = Decoder::load(&vae_files(), &placement).unwrap();
    let image = decoder.decode(&reference.get("decode.latents")).unwrap();
    // TF32 has float16's 11 bits, for products alone.
    assert_close("decode TF32", &image, &reference.get("decode.image"), 4e-3);
}

#[test]
fn the_unet_in_every_precision() {
    let Some(device) = card_or_word("the UNet") else {
        return;
    };
    let reference = Reference::read("unet");
    for (dtype, tolerance) in NETWORK {
        let unet = UNet::load(&model(), &Placement::new(&device, dtype)).unwrap();
        for case in ["b1", "b2"] {
            let get = |key: &str| reference.get(&format!("{case}.{key}"));
            let conditioning = reference.conditioning(case);
            let time = Preconditioning::new(values(&get("sigma"))[0]).time;
            let prompted = unet.prompted(&conditioning).unwrap();
            let output = unet.forward(&get("sample"), time, &prompted).unwrap();
            let what = format!("{case} {dtype:?}");
            assert_close(&what, &output, &get("output"), tolerance);
        }
    }
}

#[test]
fn latents_and_pictures_in_every_precision() {
    let Some(device) = card_or_word("the whole") else {
        return;
    };
    let reference = Reference::read("end_to_end");
    for (dtype, plain, guided) in LATENTS {
        let mut upscaler = upscaler_on(device.clone(), model(), dtype);
        for case in Case::all().iter().filter(|case| case.weights == "f32") {
            let what = format!("{} {dtype:?}", case.name);
            let tolerance = if case.guidance > 1.0 { guided } else { plain };
            let mut on_event = |event| {
                if let Event::Warning(text) = event {
                    println!("{what}: {text}");
                }
                Ok(())
            };
            let upscaled = upscaler
                .upscale(&[case.low_res()], &case.settings(), &mut on_event)
                .unwrap()
                .remove(0);
            let latents = upscaled.latents().unwrap();
            assert_close(&what, &latents, &reference.get(&case.name), tolerance);
            let pixels = upscaler.decode(&upscaled, &mut |_| Ok(())).unwrap();
            if case.image && dtype == DType::F32 {
                let expected = data(&format!("reference/{}.png", case.name));
                assert_same_picture(&what, &pixels, &expected);
            }
        }
    }
}

#[test]
fn a_decoder_that_overflows_is_done_again_in_bfloat16() {
    let Some(device) = card_or_word("the decoder's overflow") else {
        return;
    };
    // Values that float16 cannot hold, which bfloat16 can.
    let values: Vec<f32> = (0..4 * 64)
        .map(|i| if i % 7 == 0 { 9e4 } else { -9e4 })
        .collect();
    let latents = LowRes::latents(8, 8, values).unwrap();
    let mut upscaler = upscaler_on(device, model(), DType::F16);
    let mut warnings = Vec::new();
    let mut on_event = |event| {
        if let Event::Warning(text) = event {
            warnings.push(text);
        }
        Ok(())
    };
    for _ in 0..2 {
        let pixels = upscaler.decode_low_res(&latents, &mut on_event).unwrap();
        assert!(pixels.values.iter().all(|v| v.is_finite()));
    }
    // The second picture is decoded in bfloat16 at once.
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(
        warnings[0].contains("doing it again in bfloat16"),
        "{warnings:?}"
    );
}

/// A case of each sampler, schedule and eta: those of latents, with guidance.
#[test]
fn every_sampler_gives_k_diffusions_latents() {
    let Some(device) = card_or_word("the samplers") else {
        return;
    };
    let mut upscaler = upscaler_on(device, model(), DType::F32);
    let of = |settings: &Settings, input: &LowRes| {
        settings.guidance > 1.0 && matches!(input, LowRes::Latents(_))
    };
    let done = assert_latents_are_k_diffusions(&mut upscaler, of);
    assert!(done >= 20, "only {done} cases");
}

/// Noise levels and masked padding: of a mask the keys are as many as a prompt has tokens, from two on, where kernels else meet 77.
#[test]
fn the_original_implementation_in_every_precision() {
    let Some(device) = card_or_word("the original implementation") else {
        return;
    };
    let reference = Reference::read("original");
    for (dtype, plain, guided) in LATENTS {
        let mut upscaler = upscaler_on(device.clone(), original(), dtype);
        for case in OriginalCase::all() {
            let what = format!("{} {dtype:?}", case.case.name);
            let tolerance = if case.case.guidance > 1.0 {
                guided
            } else {
                plain
            };
            let expected = reference.get(&case.case.name);
            assert_close(&what, &case.run(&mut upscaler), &expected, tolerance);
        }
    }
}
