//! The VAE and the UNet, one call each, and the resampling between their levels.

use candle_core::DType;
use sd_upscale::layers::{FeatureMap, downsample, upsample};
use sd_upscale::networks::unet::UNet;
use sd_upscale::networks::vae::{Decoder, Encoder};
use sd_upscale::pipeline::preconditioning::Preconditioning;

use crate::STAGE;
use crate::common::*;

#[test]
fn vae_encoder() {
    let reference = Reference::read("vae");
    for (name, placement) in placements(DType::F32) {
        let encoder = Encoder::load(&vae_files(), &placement).unwrap();
        let posterior = encoder.encode(&reference.get("encode.image")).unwrap();
        let what = format!("{name} encode");
        assert_close(&what, &posterior.mean, &reference.get("encode.mean"), STAGE);
        assert_close(
            &what,
            posterior.logvar.as_ref().unwrap(),
            &reference.get("encode.logvar"),
            STAGE,
        );
    }
}

#[test]
fn vae_decoder() {
    let reference = Reference::read("vae");
    for (name, placement) in placements(DType::F32) {
        let decoder = Decoder::load(&vae_files(), &placement).unwrap();
        let image = decoder.decode(&reference.get("decode.latents")).unwrap();
        let expected = reference.get("decode.image");
        assert_close(&format!("{name} decode"), &image, &expected, STAGE);
    }
}

#[test]
fn unet_call() {
    let reference = Reference::read("unet");
    for (name, placement) in placements(DType::F32) {
        let unet = UNet::load(&model(), &placement).unwrap();
        for case in ["b1", "b2"] {
            let get = |key: &str| reference.get(&format!("{case}.{key}"));
            let conditioning = reference.conditioning(case);
            let sigma = values(&get("sigma"))[0];
            let time = Preconditioning::new(sigma).time;
            assert_eq!(time, values(&get("timestep"))[0]);
            let prompted = unet.prompted(&conditioning).unwrap();
            let output = unet.forward(&get("sample"), time, &prompted).unwrap();
            assert_close(&format!("{name} {case}"), &output, &get("output"), STAGE);
        }
    }
}

#[test]
fn resampling_between_levels() {
    let reference = Reference::read("unet");
    for (name, placement) in placements(DType::F32) {
        for (input, down, up) in [
            (
                reference.get("resample.input"),
                "resample.down",
                "resample.up",
            ),
            (
                reference
                    .get("resample.input")
                    .narrow(2, 0, 2)
                    .unwrap()
                    .narrow(3, 0, 3)
                    .unwrap(),
                "resample.tiny_down",
                "resample.tiny_up",
            ),
        ] {
            let map = FeatureMap::from_nchw(&input, &placement).unwrap();
            // one short sum of exact products: only rounding
            let halved = downsample(&map).unwrap().to_nchw().unwrap();
            assert_close(
                &format!("{name} {down}"),
                &halved,
                &reference.get(down),
                1e-6,
            );
            let doubled = upsample(&map).unwrap().to_nchw().unwrap();
            assert_close(&format!("{name} {up}"), &doubled, &reference.get(up), 1e-6);
        }
    }
}
