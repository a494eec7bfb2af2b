//! Maps in bands, recomputed and spilled, beside whole ones: on our CPU kernels the same bits.

use candle_core::{DType, Device, Tensor};
use sd_upscale::device::{Backend, Placement};
use sd_upscale::model::PartFiles;
use sd_upscale::networks::unet::{Prompted, Sampling, UNet};
use sd_upscale::networks::vae::{Decoder, Encoder};
use sd_upscale::networks::{Limits, Room};
use sd_upscale::pipeline::noise::Generator;

use crate::common::*;
use crate::taesd::tiny_vae_files;

const KIB: u64 = 1 << 10;

/// The ways of keeping maps: in bands, those between two convolutions recomputed, most of all spilled, both. The same lines in
/// every precision.
fn ways(placement: &Placement) -> Vec<Limits> {
    let size = |kib: u64| kib * KIB * placement.dtype.size_in_bytes() as u64 / 4;
    let bands = Limits {
        band: size(256),
        ..Limits::none()
    };
    let recomputed = Limits {
        recomputed: size(300),
        ..bands.clone()
    };
    let spilled = Limits {
        kept: size(600),
        ..bands.clone()
    };
    let both = Limits {
        kept: size(600),
        ..recomputed.clone()
    };
    vec![bands, recomputed, spilled, both]
}

/// Everything in float32, our CPU kernels in 16 bits as well.
fn all_placements() -> Vec<(String, Placement)> {
    let mut all: Vec<(String, Placement)> = placements(DType::F32)
        .into_iter()
        .map(|(name, placement)| (name.to_string(), placement))
        .collect();
    for dtype in [DType::F16, DType::BF16] {
        let placement = Placement::new(&Device::Cpu, dtype);
        all.push((format!("the CPU in {dtype:?}"), placement));
    }
    all
}

/// Both kinds of VAE.
fn vaes() -> [(&'static str, PartFiles); 2] {
    [("KL", vae_files()), ("TAESD", tiny_vae_files())]
}

fn noise(shape: [usize; 4]) -> Tensor {
    let values = Generator::new(7).randn(shape.iter().product());
    Tensor::from_vec(values, &shape, &Device::Cpu).unwrap()
}

/// The same bits from our CPU kernels, whose sums do not depend on the bands. A card's libraries choose by the size of what they are
/// given, and sum in another order: 1e-5 is five times what a network in float32 leaves (`card::NETWORK`).
fn assert_same(what: &str, found: &Tensor, whole: &Tensor, placement: &Placement) {
    if placement.backend == Backend::CpuKernels {
        let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(
            values(found) == values(whole),
            "{what} differs from the whole"
        );
        return;
    }
    assert_close(what, found, whole, 1e-5);
}

fn decoded(decoder: &Decoder, latents: &Tensor, room: &Room) -> Tensor {
    let mut bands = Vec::new();
    let keep = |band: Tensor| {
        bands.push(band.to_device(&Device::Cpu)?);
        Ok(())
    };
    decoder.decode_within(latents, room, keep).unwrap();
    Tensor::cat(&bands, 2).unwrap()
}

/// Latents (h, w): of 512x512, 1024x768, 4096x64 and odd sides on the CPU; elsewhere less, which takes its time.
fn sizes(placement: &Placement) -> Vec<(usize, usize)> {
    match placement.backend {
        Backend::CpuKernels => vec![(64, 64), (96, 128), (8, 512), (65, 33)],
        _ => vec![(33, 17)],
    }
}

#[test]
fn the_decoder_in_bands() {
    for (name, placement) in all_placements() {
        for (vae, files) in vaes() {
            let decoder = Decoder::load(&files, &placement).unwrap();
            for (h, w) in sizes(&placement) {
                let latents = noise([1, 4, h, w]);
                let whole = decoder.decode(&latents).unwrap();
                for limits in ways(&placement) {
                    let room = Room::new(limits.clone());
                    let found = decoded(&decoder, &latents, &room);
                    let what = format!("decode of {w}x{h} latents by {vae} on {name}, {limits:?}");
                    assert_same(&what, &found, &whole, &placement);
                    // Maps channels first, candle's own operations', all stay.
                    if limits.kept < u64::MAX && name != "stock" {
                        // The attention's keys and values stand beside the maps.
                        let value = placement.dtype.size_in_bytes();
                        let keys_and_values = (2 * 32 * h * w * value) as u64;
                        let most = limits.kept + keys_and_values;
                        assert!(room.held_at_most() <= most && room.spilled() > 0, "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn the_encoder_in_bands() {
    for (name, placement) in all_placements() {
        for (vae, files) in vaes() {
            let encoder = Encoder::load(&files, &placement).unwrap();
            for (h, w) in sizes(&placement) {
                let image = noise([1, 3, 8 * h, 8 * w]).tanh().unwrap();
                let whole = encoder.encode(&image).unwrap();
                for limits in ways(&placement) {
                    let room = Room::new(limits.clone());
                    let found = encoder.encode_within(&image, &room).unwrap();
                    let what = format!("encode to {w}x{h} latents by {vae} on {name}, {limits:?}");
                    assert_same(&what, &found.mean, &whole.mean, &placement);
                    if let Some(logvar) = &whole.logvar {
                        assert_same(&what, &found.logvar.unwrap(), logvar, &placement);
                    }
                }
            }
        }
    }
}

#[test]
fn the_unet_in_bands() {
    for (name, placement) in all_placements() {
        let unet = UNet::load(&model(), &placement).unwrap();
        let one = Reference::read("unet").conditioning("b1");
        let prompted = || -> Vec<Prompted> { vec![unet.prompted(&one).unwrap()] };
        let sampling = Sampling {
            c_in: 0.5,
            c_skip: 0.25,
            c_out: 0.9,
            guidance: 1.0,
        };
        let rows = one.pooled.dim(0).unwrap();
        for (h, w) in [(64, 64), (72, 40)] {
            let place = |t: Tensor| t.to_device(&placement.device).unwrap();
            let (x, low) = (place(noise([rows, 4, h, w])), place(noise([rows, 4, h, w])));
            let denoised = |room: &Room| {
                let found = unet.denoise(&x, &low, &sampling, 0.3, &prompted(), room);
                found.unwrap().to_device(&Device::Cpu).unwrap()
            };
            let whole = denoised(&Room::unlimited());
            for limits in ways(&placement) {
                let found = denoised(&Room::new(limits.clone()));
                let what = format!("a step of {w}x{h} latents on {name}, {limits:?}");
                assert_same(&what, &found, &whole, &placement);
            }
        }
    }
}

/// The statistics are those of all positions, so that a window changes what its attention sees and nothing else.
#[test]
fn attention_within_a_window_is_that_of_all_where_the_window_has_all() {
    let placement = Placement::new(&Device::Cpu, DType::F32);
    let decoder = Decoder::load(&vae_files(), &placement).unwrap();
    let latents = noise([1, 4, 96, 72]);
    let whole = decoder.decode(&latents).unwrap();
    let within = |most_keys: usize, band: u64| {
        let limits = Limits {
            most_keys,
            band,
            ..Limits::none()
        };
        decoded(&decoder, &latents, &Room::new(limits))
    };
    let all = within(96 * 72, 64 * KIB);
    assert_same("attention over all", &all, &whole, &placement);
    // Two thirds of the lines, or a half of each side: close to it, and not it.
    for (most_keys, most) in [(64 * 72, 0.2), (36 * 48, 0.3)] {
        let windowed = within(most_keys, 64 * KIB);
        let error = relative_error(&windowed, &whole);
        let off = (&windowed - &whole)
            .unwrap()
            .abs()
            .unwrap()
            .mean_all()
            .unwrap();
        let levels = off.to_scalar::<f32>().unwrap() * 127.5;
        println!(
            "windows of {most_keys} of {} keys: {error:.1e}, {levels:.2} levels in the mean",
            96 * 72
        );
        assert!(
            error > 1e-6 && error < most,
            "attention within windows of {most_keys}: {error:e}"
        );
        // Whatever the bands.
        let other = within(most_keys, u64::MAX);
        assert_same("the same windows", &other, &windowed, &placement);
    }
}
