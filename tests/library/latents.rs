//! Latents written by safetensors, NumPy, and in ComfyUI's and sd-scripts' conventions, read and written by the library.

use std::collections::BTreeMap;

use safetensors::SafeTensors;
use sd_upscale::files::{self, Loaded};
use sd_upscale::latents::{LatentKind, LatentScale, Latents};
use sd_upscale::limits::ReadLimits;

use crate::data::data;
use crate::samples::{latents, refusal};

/// Latents in the upscaler's scale, and what was said of theirs.
fn scaled(latents: Latents, choice: LatentScale) -> (Latents, Option<String>) {
    let (scale, message) = latents.scale(choice);
    (latents.into_scaled(scale, 0.18215), message)
}

/// The largest difference from the latents that all the files hold, in scaled units.
fn off_by(name: &str, choice: LatentScale) -> (f32, Option<String>) {
    let (scaled, message) = scaled(latents(name), choice);
    assert_eq!(
        (scaled.batch, scaled.height, scaled.width),
        (1, 6, 8),
        "{name}"
    );
    let bytes = std::fs::read(data("files/expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let want = file
        .tensor("latents")
        .unwrap()
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|&b| f32::from_le_bytes(b));
    let differences = scaled.data.iter().zip(want).map(|(a, b)| (a - b).abs());
    (differences.fold(0.0, f32::max), message)
}

#[test]
fn every_kind_of_latents_is_read_to_the_same_scaled_values() {
    // Rounding of the values' own type: 11 bits for f16, 8 for bf16, at values up to 4; else of the scaling in f32.
    for (name, most, judged) in [
        ("f32.safetensors", 0.0, true),
        ("f16.safetensors", 4.0 / 2048.0, true),
        ("bf16.safetensors", 4.0 / 256.0, true),
        ("f64-rank3.safetensors", 0.0, true),
        ("unstated-raw.safetensors", 1e-6, true),
        ("marked.latent", 1e-6, false),
        ("unmarked.latent", 0.0, false),
        ("sd-scripts.npz", 1e-6, false),
        ("sd-scripts-sized.npz", 1e-6, false),
        ("fortran.npz", 1e-6, false),
    ] {
        let (difference, message) = off_by(name, LatentScale::Auto);
        assert!(difference <= most, "{name}: off by {difference}");
        assert_eq!(message.is_some(), judged, "{name}: {message:?}");
    }
    let (difference, _) = off_by("f32.safetensors", LatentScale::Raw);
    assert!(difference > 1.0, "--latent-scale raw overrules the spread");
    assert_eq!(off_by("unmarked.latent", LatentScale::Scaled), (0.0, None));
    assert_eq!(latents("batch3.safetensors").batch, 3);
    let several = &latents("sd-scripts-sized.npz").warnings;
    assert_eq!(several.len(), 1, "{several:?}");
}

#[test]
fn latents_are_written_so_that_each_kind_is_read_back_as_it_was() {
    let (ours, _) = scaled(latents("f32.safetensors"), LatentScale::Auto);
    let metadata = BTreeMap::from([("seed".to_owned(), "7".to_owned())]);
    let read = |bytes: &[u8]| match files::read_bytes(bytes, "the output", &ReadLimits::default())
        .unwrap()
    {
        Loaded::Latents(latents) => latents,
        Loaded::Picture(_) => panic!("a picture"),
    };
    let diffusers = read(&ours.to_safetensors(&metadata).unwrap());
    assert_eq!(diffusers.kind, LatentKind::Ours);
    assert_eq!(diffusers.data, ours.data);
    assert_eq!(
        diffusers.metadata.get("seed").map(String::as_str),
        Some("7")
    );
    let (again, message) = scaled(diffusers, LatentScale::Auto);
    assert_eq!((again.data, message), (ours.data.clone(), None));
    let comfy = read(&ours.to_comfy(0.18215, &metadata).unwrap());
    assert_eq!(comfy.kind, LatentKind::ComfyRaw);
    let (scaled, _) = scaled(comfy, LatentScale::Auto);
    let worst = scaled
        .data
        .iter()
        .zip(&ours.data)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    assert!(
        worst < 1e-6,
        "a division and a multiplication in f32: off by {worst}"
    );
}

#[test]
fn equal_latents_are_written_as_equal_bytes() {
    let (ours, _) = scaled(latents("f32.safetensors"), LatentScale::Auto);
    let keys = ["prompt", "seed", "steps", "schedule", "model", "guidance"];
    let metadata: BTreeMap<String, String> = keys.map(|key| (key.into(), "1".into())).into();
    let (first, comfy) = (
        ours.to_safetensors(&metadata).unwrap(),
        ours.to_comfy(0.18215, &metadata).unwrap(),
    );
    // Seven keys in a hash map's order: two writes alike by chance are one in 5040, twenty of them none.
    for _ in 0..20 {
        assert!(ours.to_safetensors(&metadata).unwrap() == first);
        assert!(ours.to_comfy(0.18215, &metadata).unwrap() == comfy);
    }
    for bytes in [first, comfy] {
        let (header, read) = SafeTensors::read_metadata(&bytes).unwrap();
        assert!(header.is_multiple_of(8), "the data are not aligned");
        let read = read.metadata().as_ref().unwrap();
        assert!(
            metadata
                .iter()
                .all(|(key, text)| read.get(key) == Some(text))
        );
    }
}

#[test]
fn foreign_latents_are_refused_with_their_reason() {
    for (name, reason) in [
        (
            "refused-flux.safetensors",
            "16 channels are those of Stable Diffusion 3, Flux",
        ),
        ("refused-integers.safetensors", "holds I64 values"),
        ("refused-rank2.safetensors", "has shape [6, 8]"),
        ("refused-channels-last.safetensors", "the channels are last"),
        (
            "refused-nan.safetensors",
            "holds NaN or infinity: 1 of 192 values",
        ),
        ("refused-empty.safetensors", "it is empty"),
        (
            "refused-weights.safetensors",
            "looks like a model's weights",
        ),
    ] {
        let message = refusal(name);
        assert!(message.contains(reason), "{name}: {message}");
        assert!(
            message.contains(name),
            "{name}: the message names the file: {message}"
        );
    }
}
