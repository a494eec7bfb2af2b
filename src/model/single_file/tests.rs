//! The published checkpoints' names, by the code that was published with them, become diffusers'; other files are refused by what they are.
//! The names are written by tests/data/single_file.py.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::PathBuf;

use safetensors::Dtype;
use serde_json::Value;

use super::super::original::Checkpoint;
use super::*;

type Shapes = BTreeMap<String, Vec<usize>>;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name)
}

/// The leaves of dicts in dicts, by their dotted keys.
fn leaves(tree: &Value, prefix: &str, found: &mut Shapes) {
    for (key, value) in tree.as_object().unwrap() {
        let key = format!("{prefix}{key}");
        match value {
            Value::Array(shape) => {
                let sizes = shape.iter().map(|size| size.as_u64().unwrap() as usize);
                found.insert(key, sizes.collect());
            }
            _ => leaves(value, &format!("{key}."), found),
        }
    }
}

/// What the script says of a published checkpoint.
fn published(version: Version) -> Value {
    let text = fs::read(data("base/single_file.json")).unwrap();
    let mut all: Value = serde_json::from_slice(&text).unwrap();
    let version = match version {
        Version::One => "1",
        Version::Two => "2",
    };
    all["published"][version].take()
}

fn shapes(tree: &Value) -> Shapes {
    let mut found = Shapes::new();
    leaves(tree, "", &mut found);
    found
}

/// Tensors in float32 of a file that is not there.
fn tensors(shapes: Shapes) -> HashMap<String, Entry> {
    let entry = |(key, shape): (String, Vec<usize>)| {
        let count: usize = shape.iter().product();
        let mut strides = vec![1; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i] * shape[i];
        }
        let entry = Entry::of_strides(Dtype::F32, shape, strides, 0..4 * count);
        (key, entry)
    };
    shapes.into_iter().map(entry).collect()
}

fn original(version: Version) -> Shapes {
    shapes(&published(version)["original"])
}

fn configs(read: &Trained, version: Version) -> BTreeMap<&'static str, Value> {
    let files = config::all(read, version).unwrap().into_iter();
    files
        .map(|(path, bytes)| (path, serde_json::from_slice(&bytes).unwrap()))
        .collect()
}

fn read_of(shapes: Shapes, global_step: Option<i64>) -> Trained {
    Trained {
        tensors: tensors(shapes),
        global_step,
    }
}

/// Every tensor by its part and its name in diffusers.
fn renamed(shapes: Shapes, version: Version) -> Shapes {
    let parts = parts(&tensors(shapes), version).unwrap();
    let mut all = Shapes::new();
    for (part, tensors) in parts {
        let tensors = tensors.into_iter();
        all.extend(tensors.map(|(name, entry)| (format!("{part}/{name}"), entry.shape().to_vec())));
    }
    all
}

#[test]
fn the_published_names_and_shapes_become_those_of_diffusers() {
    for version in [Version::One, Version::Two] {
        let expected = shapes(&published(version)["diffusers"]);
        assert!(expected.len() > 1000);
        assert_eq!(renamed(original(version), version), expected, "{version:?}");
    }
    // Files are in use whose text encoder has one module less.
    let flat = original(Version::One).into_iter();
    let flat = flat.map(|(key, shape)| {
        (
            key.replace("transformer.text_model.", "transformer."),
            shape,
        )
    });
    let expected = shapes(&published(Version::One)["diffusers"]);
    assert_eq!(renamed(flat.collect(), Version::One), expected);
}

#[test]
fn the_configurations_are_those_that_diffusers_makes_of_the_published_ones() {
    for version in [Version::One, Version::Two] {
        let shapes = original(version);
        assert_eq!(kind::check(&tensors(shapes.clone())).unwrap(), version);
        let found = configs(&read_of(shapes, None), version);
        let mut compared = 0;
        for (part, expected) in published(version)["configs"].as_object().unwrap() {
            let found = &found[&*format!("{part}/config.json")];
            for (key, value) in expected.as_object().unwrap() {
                // What is no part of these networks is not said, which means the same.
                let is_none = value.is_null() || key == "transformer_layers_per_block";
                assert!(
                    found[key] == *value || is_none && found[key].is_null(),
                    "{version:?} {part} {key}: {}, expected {value}",
                    found[key]
                );
                compared += usize::from(!is_none);
            }
        }
        assert!(compared >= 25, "{compared}");
    }
}

#[test]
fn a_2_that_predicts_noise_is_known_by_its_steps() {
    for (version, steps, class, prediction, side) in [
        (Version::One, Some(875_000), "PNDMScheduler", "epsilon", 64),
        (Version::One, None, "PNDMScheduler", "epsilon", 64),
        (Version::Two, None, "DDIMScheduler", "v_prediction", 96),
        (
            Version::Two,
            Some(110_000),
            "DDIMScheduler",
            "v_prediction",
            96,
        ),
        (Version::Two, Some(875_000), "DDIMScheduler", "epsilon", 64),
    ] {
        let found = configs(&read_of(original(version), steps), version);
        let scheduler = &found["scheduler/scheduler_config.json"];
        assert_eq!(scheduler["_class_name"], class);
        assert_eq!(scheduler["prediction_type"], prediction);
        for (key, value) in [
            ("steps_offset", 1.into()),
            ("beta_start", 0.00085.into()),
            ("set_alpha_to_one", Value::Bool(false)),
        ] {
            assert_eq!(scheduler[key], value, "{key}");
        }
        assert_eq!(found["unet/config.json"]["sample_size"], side);
        assert_eq!(found["vae/config.json"]["sample_size"], 8 * side);
        assert_eq!(found["model_index.json"]["scheduler"][1], class);
    }
}

/// Why a file with these tensors is refused.
fn refusal(shapes: Shapes) -> String {
    let read = read_of(shapes, None);
    let found = kind::check(&read.tensors).and_then(|version| {
        parts(&read.tensors, version)?;
        config::all(&read, version)
    });
    let text = format!("{:#}", found.expect_err("it is refused"));
    assert!(!text.contains('\n') && text.len() < 500, "{text}");
    text
}

#[test]
fn files_of_other_kinds_are_refused_by_name() {
    let unet = "model.diffusion_model.input_blocks.0.0.weight";
    let channels = |count: usize| {
        original(Version::One)
            .into_iter()
            .chain([(unet.into(), vec![320, count, 3, 3])])
            .collect()
    };
    let with = |version, key: &str| {
        original(version)
            .into_iter()
            .chain([(key.into(), vec![320])])
            .collect()
    };
    let only = |prefix: &str| -> Shapes {
        let of = original(Version::One).into_iter();
        of.filter(|(key, _)| key.starts_with(prefix)).collect()
    };
    let without = |prefix: &str| -> Shapes {
        let of = original(Version::One).into_iter();
        of.filter(|(key, _)| !key.starts_with(prefix)).collect()
    };
    let bare = |prefix: &str| -> Shapes {
        let of = only(prefix).into_iter();
        of.map(|(key, shape)| (key[prefix.len()..].to_owned(), shape))
            .collect()
    };
    let of_diffusers = |part: &str| -> Shapes {
        let all = shapes(&published(Version::One)["diffusers"]).into_iter();
        all.filter_map(|(key, shape)| Some((key.strip_prefix(part)?.to_owned(), shape)))
            .collect()
    };
    let keys = |keys: &[&str]| -> Shapes {
        keys.iter()
            .map(|key| ((*key).to_owned(), vec![4, 4]))
            .collect()
    };
    let cases: Vec<(Shapes, &[&str])> = vec![
        (channels(9), &["inpainting", "9 channels"]),
        (channels(8), &["instruct-pix2pix"]),
        (channels(7), &["x4 upscaler"]),
        (channels(5), &["for depth"]),
        (
            with(
                Version::One,
                "conditioner.embedders.1.model.ln_final.weight",
            ),
            &["Stable Diffusion XL's;"],
        ),
        (
            with(
                Version::One,
                "conditioner.embedders.0.model.ln_final.weight",
            ),
            &["refiner"],
        ),
        (
            with(Version::Two, "model.diffusion_model.label_emb.0.0.weight"),
            &["unCLIP"],
        ),
        (
            with(Version::One, "control_model.time_embed.0.weight"),
            &["ControlNet"],
        ),
        (
            keys(&["model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"]),
            &["Stable Diffusion 3's"],
        ),
        (keys(&["double_blocks.0.img_attn.qkv.weight"]), &["Flux's"]),
        (
            keys(&["lora_unet_down_blocks_0.lora_up.weight"]),
            &["a LoRA", "merge it"],
        ),
        (
            keys(&["unet.down_blocks.0.to_q.lora_A.weight"]),
            &["a LoRA"],
        ),
        (
            keys(&["down_blocks.0.motion_modules.0.temporal_transformer.norm.bias"]),
            &["AnimateDiff"],
        ),
        (
            bare("model.diffusion_model."),
            &["a UNet alone", "give the checkpoint"],
        ),
        (bare("first_stage_model."), &["a VAE alone", "--vae"]),
        (only("first_stage_model."), &["a VAE alone", "--vae"]),
        (
            of_diffusers("unet/"),
            &["diffusers layout, a UNet or a VAE", "model_index.json"],
        ),
        (
            of_diffusers("vae/"),
            &["diffusers layout, a UNet or a VAE", "model_index.json"],
        ),
        (
            of_diffusers("text_encoder/"),
            &["a text encoder alone", "model_index.json"],
        ),
        (
            keys(&["model_ema.decay", "model_ema.diffusion_modelout2bias"]),
            &["averaged weights alone"],
        ),
        (without("first_stage_model."), &["without its VAE"]),
        (without("cond_stage_model."), &["without its text encoder"]),
        (keys(&["blocks.0.attn.qkv.weight"]), &["of another model"]),
        (Shapes::new(), &["of another model"]),
    ];
    for (shapes, words) in cases {
        let refusal = refusal(shapes);
        for word in words
            .iter()
            .chain(&["expected a Stable Diffusion 1.x or 2.x"])
        {
            assert!(refusal.contains(word), "{word}: {refusal}");
        }
    }
}

#[test]
fn a_checkpoint_that_is_damaged_is_refused_by_its_tensor() {
    let changed = |version, change: &dyn Fn(&mut Shapes)| {
        let mut shapes = original(version);
        change(&mut shapes);
        refusal(shapes)
    };
    let with = |version, key: &'static str, shape: &'static [usize]| {
        changed(version, &move |shapes| {
            shapes.insert(key.into(), shape.into());
        })
    };
    for key in [
        "model.diffusion_model.middle_block.3.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.1.norm1.weight",
        "model.diffusion_model.other",
    ] {
        let refusal = with(Version::One, key, &[1]);
        assert!(
            refusal.contains(key) && refusal.contains("another model"),
            "{refusal}"
        );
    }
    let packed = "cond_stage_model.model.transformer.resblocks.4.attn.in_proj_weight";
    let refusal = with(Version::Two, packed, &[3071, 1024]);
    assert!(
        refusal.contains(packed) && refusal.contains("3 parts"),
        "{refusal}"
    );
    let attention = "first_stage_model.decoder.mid.attn_1.q.weight";
    let refusal = with(Version::One, attention, &[512, 512, 3, 3]);
    assert!(refusal.contains(attention), "{refusal}");
    let refusal = with(
        Version::One,
        "cond_stage_model.transformer.embeddings.token_embedding.weight",
        &[49408, 768],
    );
    assert!(refusal.contains("two spellings"), "{refusal}");
    let words = "cond_stage_model.model.token_embedding.weight";
    let refusal = with(Version::Two, words, &[49408, 768]);
    assert!(
        refusal.contains("1024 wide, but its text encoder is 768"),
        "{refusal}"
    );
    assert!(with(Version::Two, words, &[49408, 1000]).contains("no multiple of the 64"));
    assert!(with(Version::Two, words, &[49408]).contains("expected two dimensions"));
    for (version, missing) in [
        (
            Version::One,
            "model.diffusion_model.middle_block.1.proj_in.weight",
        ),
        (Version::One, "model.diffusion_model.out.2.weight"),
        (Version::Two, "first_stage_model.encoder.conv_in.weight"),
        (
            Version::Two,
            "first_stage_model.encoder.down.2.block.0.conv1.weight",
        ),
    ] {
        let refusal = changed(version, &|shapes| {
            shapes.remove(missing);
        });
        assert!(
            refusal.contains(missing) && refusal.contains("missing"),
            "{refusal}"
        );
    }
    let refusal = changed(Version::One, &|shapes| {
        shapes.retain(|key, _| !key.contains("mlp.fc1"));
    });
    assert!(
        refusal.contains("encoder.layers.0.mlp.fc1.weight`"),
        "{refusal}"
    );
}

#[test]
fn whatever_is_left_out_misnamed_or_of_another_shape_ends_in_a_line() {
    let mut state = 7u64;
    let mut below = |count: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as usize % count
    };
    let names = ["18446744073709551615", "-1", "+1", "", "23", "weight"];
    let sizes = [0, 1, 3, 65, 1 << 40];
    let mut refused = 0;
    for round in 0..300 {
        let version = [Version::One, Version::Two][round % 2];
        let mut shapes = original(version);
        for _ in 0..=below(4) {
            let key = shapes.keys().nth(below(shapes.len())).unwrap().clone();
            let mut shape = shapes.remove(&key).unwrap();
            match below(4) {
                0 => continue,
                1 => {
                    let mut parts: Vec<&str> = key.split('.').collect();
                    let at = below(parts.len());
                    parts[at] = names[below(names.len())];
                    shapes.insert(parts.join("."), shape);
                    continue;
                }
                2 => shape.truncate(below(shape.len() + 1)),
                _ => {
                    if let Some(size) = shape.first_mut() {
                        *size = sizes[below(sizes.len())];
                    }
                }
            }
            shapes.insert(key, shape);
        }
        let read = Trained {
            tensors: shapes
                .into_iter()
                .map(|(key, shape)| {
                    (
                        key,
                        Entry::of_strides(Dtype::F32, shape.clone(), vec![1; shape.len()], 0..64),
                    )
                })
                .collect(),
            global_step: None,
        };
        let found = kind::check(&read.tensors).and_then(|version| {
            parts(&read.tensors, version)?;
            config::all(&read, version)
        });
        if let Err(error) = found {
            let text = format!("{error:#}");
            assert!(!text.contains('\n') && text.len() < 500, "{text}");
            refused += 1;
        }
    }
    // What is missing or of another shape is told where it is read.
    assert!((50..250).contains(&refused), "{refused}");
}

#[test]
fn what_lightning_says_of_a_training_is_passed_over() {
    let bytes = fs::read(data("torch/lightning.ckpt")).unwrap();
    let read = trained(&bytes).unwrap();
    assert_eq!(read.global_step, Some(875_000));
    let mut found: Vec<(&str, &[usize])> = read
        .tensors
        .iter()
        .map(|(key, entry)| (&**key, entry.shape()))
        .collect();
    found.sort();
    assert_eq!(
        found,
        [
            ("betas", &[3][..]),
            ("model.diffusion_model.out.2.bias", &[4][..])
        ]
    );
    let values = &bytes[read.tensors["model.diffusion_model.out.2.bias"].range()];
    assert_eq!(values, [0f32, 1.0, 2.0, 3.0].map(f32::to_le_bytes).concat());
}

/// Why a file is refused, in a line that begins with its name.
fn refused(path: &Path) -> String {
    let error = SingleFile::open(path).expect_err("it is refused");
    let text = format!("{error:#}");
    assert!(!text.contains('\n') && text.len() < 600, "{text}");
    assert!(text.contains(path.to_str().unwrap()), "{text}");
    text
}

#[test]
fn a_pickle_that_would_run_something_is_refused_and_nothing_is_run() {
    let all = fs::read_dir(data("torch"))
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let evil: Vec<PathBuf> = all
        .filter(|path| path.to_str().unwrap().contains("evil-"))
        .collect();
    assert!(evil.len() >= 9);
    for path in evil {
        let protocol_0 = path.ends_with("evil-protocol-0.pth");
        let refusal = refused(&path);
        // Older than what torch.save has ever written.
        let word = if protocol_0 {
            "neither a safetensors file nor"
        } else {
            "`posix system`"
        };
        assert!(refusal.contains(word), "{refusal}");
    }
}

#[test]
fn files_of_other_formats_and_other_checkpoints_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    for (name, bytes) in [
        ("empty.safetensors", &b""[..]),
        ("picture.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
        ("short.ckpt", b"P"),
    ] {
        assert!(refused(&file(name, bytes)).contains("neither a safetensors file nor"));
    }
    let part = fs::read(data("base/sd1/unet/diffusion_pytorch_model.safetensors")).unwrap();
    assert!(refused(&file("cut.safetensors", &part[..part.len() / 2])).contains("cut short"));
    assert!(refused(&file("cut-header.safetensors", &part[..100])).contains("cut short"));
    assert!(refused(&file("unet.safetensors", &part)).contains("a UNet or a VAE"));
    assert!(refused(&file("zip.ckpt", b"PK\x03\x04")).contains("zip directory"));
    assert!(refused(&data("torch/lightning.ckpt")).contains("without its VAE"));
    assert!(refused(&data("torch/zip.pth")).contains("--model"));
    let upscaler = data("original/upscaler.pth");
    assert!(Checkpoint::open(&upscaler).is_ok());
    assert!(refused(&upscaler).contains("give that to --model"));
    assert!(refused(&folder.path().join("no such file")).contains("cannot open"));
}
