//! diffusers' AutoencoderTiny, alone and as the VAE of the whole.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use sd_upscale::device::Placement;
use sd_upscale::model::PartFiles;
use sd_upscale::networks::vae::{Decoder, Encoder};
use sd_upscale::pipeline::{InputKind, PlanFor};
use sd_upscale::{
    Enlargement, Event, LowRes, Memory, ModelFiles, Options, Pixels, Settings, UpscaledLatents,
    Upscaler,
};

use crate::card::{LATENTS, NETWORK};
use crate::common::*;
use crate::whole::{Case, assert_same_picture, run};
use crate::{FINAL_LATENTS, STAGE};

/// The small AutoencoderTiny's files.
pub fn tiny_vae_files() -> PartFiles {
    bare(&data("vae-tiny"))
}

fn bare(folder: &Path) -> PartFiles {
    PartFiles {
        files: ModelFiles::Folder(folder.to_path_buf()),
        part: "",
        weights: None,
    }
}

/// Both halves of `files` against the reference's numbers with the given names.
fn halves(files: &PartFiles, names: &str, placement: (&str, &Placement), tolerance: f64) {
    let reference = Reference::read("taesd");
    let (place, placement) = placement;
    let get = |name: &str| reference.get(&format!("{names}{name}"));
    let encoder = Encoder::load(files, placement).unwrap();
    let encoded = encoder.encode(&reference.get("encode.image")).unwrap();
    assert!(encoded.logvar.is_none(), "TAESD's latents have no spread");
    let what = |half: &str| format!("{names}{half} on {place} in {:?}", placement.dtype);
    assert_close(
        &what("encode"),
        &encoded.mean,
        &get("encode.latents"),
        tolerance,
    );
    let decoder = Decoder::load(files, placement).unwrap();
    let image = decoder.decode(&get("decode.latents")).unwrap();
    assert_close(&what("decode"), &image, &get("decode.image"), tolerance);
}

#[test]
fn taesd_alone() {
    for (name, placement) in placements(DType::F32) {
        halves(&tiny_vae_files(), "", (name, &placement), STAGE);
    }
}

/// Two levels, five channels, widths that fill no vector, SiLU where TAESD has ReLU, and keys that config.json leaves out.
#[test]
fn an_odd_autoencoder_tiny() {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"_class_name": "AutoencoderTiny", "act_fn": "silu", "latent_channels": 5,
        "encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [9, 9],
        "num_encoder_blocks": [1, 2], "num_decoder_blocks": [1, 1]}"#;
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let reference = Reference::read("taesd");
    let weights: HashMap<&str, Tensor> = reference
        .keys()
        .into_iter()
        .filter_map(|key| Some((key.strip_prefix("odd.weights.")?, reference.get(key))))
        .collect();
    let path = folder.path().join("diffusion_pytorch_model.safetensors");
    candle_core::safetensors::save(&weights, path).unwrap();
    for (name, placement) in placements(DType::F32) {
        halves(&bare(folder.path()), "odd.", (name, &placement), STAGE);
    }
}

/// A single file needs no configuration: the published one's is known.
#[test]
fn a_single_file_of_another_depth_is_refused_by_the_key() {
    let files = PartFiles {
        weights: Some(data("vae-tiny/diffusion_pytorch_model.safetensors")),
        ..vae_files()
    };
    let placement = Placement::new(&Device::Cpu, DType::F32);
    let error = Decoder::load(&files, &placement).err().unwrap();
    let error = format!("{error:#}");
    assert!(error.contains("num_encoder_blocks"), "{error}");
    // A model that has such a VAE itself lends its own.
    let files = PartFiles {
        files: ModelFiles::Folder(data("vae-tiny")),
        part: "",
        ..files
    };
    Decoder::load(&files, &placement).unwrap();
}

fn upscaler(device: &Device, dtype: DType) -> Upscaler {
    Upscaler::new(Options {
        device: device.clone(),
        dtype,
        vae: Some(tiny_vae_files()),
        ..Options::new(model())
    })
    .unwrap()
}

/// The reference's cases that were done with it.
fn cases() -> Vec<Case> {
    let reference = Reference::read("taesd");
    let name = |case: &Case| format!("taesd-{}", case.name);
    let keys = reference.keys();
    let done = Case::all()
        .into_iter()
        .filter(|case| keys.contains(&&*name(case)));
    let cases: Vec<Case> = done.collect();
    assert_eq!(cases.len(), 3);
    cases
}

/// Nothing is drawn for the encoder, so that the starting noise is the generator's first.
#[test]
fn latents_and_pictures_with_taesd_are_those_of_the_reference_pipeline() {
    let reference = Reference::read("taesd");
    for stock in [false, true] {
        let mut upscaler = upscaler(&Device::Cpu, DType::F32);
        if stock {
            upscaler.use_stock_operations();
        }
        for case in cases() {
            let name = format!("taesd-{}", case.name);
            let what = format!("{name}{}", if stock { " (stock)" } else { "" });
            let upscaled = run(&mut upscaler, &case);
            let latents = upscaled.latents().unwrap();
            assert_close(&what, &latents, &reference.get(&name), FINAL_LATENTS);
            let pixels = upscaler.decode(&upscaled, &mut |_| Ok(())).unwrap();
            let expected = data(&format!("reference/{name}.png"));
            assert_same_picture(&what, &pixels, &expected);
        }
    }
}

/// Of each input of a batch, what its last step showed, and how many steps did; and the latents.
fn shown(
    upscaler: &mut Upscaler,
    inputs: &[LowRes],
    settings: &Settings,
) -> (Vec<(Pixels, usize)>, Vec<UpscaledLatents>) {
    let mut seen: Vec<(Pixels, usize)> = Vec::new();
    let mut watch = |event| {
        if let Event::Preview { index, picture } = event {
            match seen.get_mut(index) {
                Some((last, count)) => (*last, *count) = (picture, *count + 1),
                None => seen.push((picture, 1)),
            }
        }
        Ok(())
    };
    let upscaled = upscaler.upscale(inputs, settings, &mut watch).unwrap();
    (seen, upscaled)
}

/// Karras' last step ends at no noise, so that what it takes for the result is the result: the reference's picture.
#[test]
fn the_last_preview_is_the_result() {
    let case = cases()
        .into_iter()
        .find(|case| case.name == "square-karras-4");
    let case = case.unwrap();
    for device in [Some(Device::Cpu), card()].into_iter().flatten() {
        let new = || upscaler(&device, DType::F32);
        let (mut plain, mut previewing) = (new(), new());
        previewing.send_previews();
        let inputs = [case.low_res(), case.low_res()];
        let (none, expected) = shown(&mut plain, &inputs, &case.settings());
        assert!(none.is_empty());
        let (seen, found) = shown(&mut previewing, &inputs, &case.settings());
        assert_eq!(seen.len(), 2);
        for (picture, steps) in &seen {
            assert_eq!(*steps, 4);
            let reference = data("reference/taesd-square-karras-4.png");
            assert_same_picture("the last preview", picture, &reference);
        }
        for (found, expected) in found.iter().zip(&expected) {
            let latents = |latents: &UpscaledLatents| values(&latents.latents().unwrap());
            assert!(
                latents(found) == latents(expected),
                "previews change latents"
            );
        }
    }
}

/// The linear map of the reference's latents, of a KL VAE, at each of its passes' sizes; and no extension in it.
#[test]
fn without_a_decoder_for_it_a_preview_is_a_linear_map_of_the_latents() {
    let mut upscaler = crate::whole::upscaler(model(), DType::F32);
    upscaler.send_previews();
    let case = cases()
        .into_iter()
        .find(|case| case.name == "square-karras-4");
    let case = case.unwrap();
    let (seen, _) = shown(&mut upscaler, &[case.low_res()], &case.settings());
    let (picture, _) = &seen[0];
    assert_eq!((picture.width, picture.height), (16, 16));
    let latents = values(&Reference::read("end_to_end").get(&case.name));
    let red = |at: usize| {
        let parts = [0.298, 0.187, -0.158, -0.184];
        let sum: f32 = (0..4).map(|c| parts[c] * latents[c * 256 + at]).sum();
        (sum / 2.0 + 0.5).clamp(0.0, 1.0)
    };
    for at in 0..256 {
        // Latents that agree to 1e-3 are a quarter of a level apart.
        let found = picture.values[3 * at];
        assert!((found - red(at)).abs() < 1e-3, "{at}: {found} {}", red(at));
    }
    let pixels = Pixels::new(20, 12, vec![0.25; 20 * 12 * 3]).unwrap();
    let settings = Settings {
        steps: 2,
        scale: Enlargement::Four,
        ..Settings::default()
    };
    let (seen, _) = shown(&mut upscaler, &[LowRes::image(&pixels).unwrap()], &settings);
    let (picture, steps) = &seen[0];
    // Of 80x48 pixels, from the latents of 40x24 before it.
    assert_eq!((picture.width, picture.height, *steps), (10, 6, 4));
}

/// What decoding a step takes is in the plan, and what there is no memory for is shown by the linear map.
#[test]
fn previews_are_planned_for() {
    let work = PlanFor {
        width: 2048,
        height: 2048,
        input: InputKind::Latents,
        to_picture: false,
    };
    let steps = |most: u64, previews: bool| -> u64 {
        let mut upscaler = Upscaler::new(Options {
            vae: Some(tiny_vae_files()),
            memory: Memory {
                most: Some(most),
                temp_dir: None,
            },
            ..Options::new(model())
        })
        .unwrap();
        if previews {
            upscaler.send_previews();
        }
        let plans = upscaler.plan(work, &Settings::default()).unwrap();
        assert_eq!(plans.len(), 1);
        plans[0].peak
    };
    let (without, with) = (steps(64 << 30, false), steps(64 << 30, true));
    // Of 4096x4096 pixels: three maps of 16 channels.
    assert!(with > without + (1 << 30), "{with} {without}");
    // Where that is too much, the plan is that of the steps alone.
    let most = without + without / 10;
    assert_eq!(steps(most, true), steps(most, false));
}

#[test]
fn taesd_on_the_card_in_every_precision() {
    let Some(device) = card_or_word("TAESD") else {
        return;
    };
    let reference = Reference::read("taesd");
    for ((dtype, tolerance), (_, plain, guided)) in NETWORK.into_iter().zip(LATENTS) {
        let placement = Placement::new(&device, dtype);
        halves(&tiny_vae_files(), "", ("card", &placement), tolerance);
        let mut upscaler = upscaler(&device, dtype);
        for case in cases() {
            let name = format!("taesd-{}", case.name);
            let upscaled = run(&mut upscaler, &case);
            let latents = upscaled.latents().unwrap();
            let tolerance = if case.guidance > 1.0 { guided } else { plain };
            let what = format!("{name} {dtype:?}");
            assert_close(&what, &latents, &reference.get(&name), tolerance);
            upscaler.decode(&upscaled, &mut |_| Ok(())).unwrap();
        }
    }
}
