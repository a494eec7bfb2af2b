//! Configurations with one wrong value each: an error that names file and key, or a model that works; never a panic, and
//! no allocation that a small file asks for.

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use sd_upscale::{LowRes, ModelFiles, Options, Pixels, Settings, Upscaler};
use serde_json::{Map, Value, json};

use crate::data::data;

/// The system's, noting the largest allocation.
struct Noting;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Noting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's layout.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's layout.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller's place and layout.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: the caller's place, layout and size.
        unsafe { System.realloc(place, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Noting = Noting;

/// The most bytes that were asked for at once so far, by any test of this program.
pub fn largest_allocation() -> usize {
    LARGEST.load(Ordering::Relaxed)
}

/// The configurations, each with the keys that are read.
const READ: [(&str, &[&str]); 6] = [
    (
        "scheduler/scheduler_config.json",
        &[
            "num_train_timesteps",
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "prediction_type",
            "rescale_betas_zero_snr",
            "sigma_min",
            "sigma_max",
            "final_sigmas_type",
            "timestep_spacing",
        ],
    ),
    (
        "unet/config.json",
        &[
            "in_channels",
            "out_channels",
            "block_out_channels",
            "down_block_types",
            "up_block_types",
            "mid_block_type",
            "layers_per_block",
            "attention_head_dim",
            "cross_attention_dim",
            "act_fn",
            "norm_eps",
            "norm_num_groups",
            "conv_in_kernel",
            "conv_out_kernel",
            "time_embedding_type",
            "time_embedding_dim",
            "flip_sin_to_cos",
            "time_cond_proj_dim",
            "timestep_post_act",
        ],
    ),
    (
        "vae/config.json",
        &[
            "_class_name",
            "in_channels",
            "out_channels",
            "latent_channels",
            "block_out_channels",
            "layers_per_block",
            "norm_num_groups",
            "act_fn",
            "scaling_factor",
            "use_quant_conv",
            "use_post_quant_conv",
            "mid_block_add_attention",
        ],
    ),
    (
        "text_encoder/config.json",
        &[
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "hidden_act",
            "layer_norm_eps",
            "eos_token_id",
        ],
    ),
    (
        "tokenizer/tokenizer_config.json",
        &[
            "bos_token",
            "eos_token",
            "unk_token",
            "pad_token",
            "model_max_length",
        ],
    ),
    (
        "tokenizer/special_tokens_map.json",
        &["bos_token", "eos_token", "unk_token", "pad_token"],
    ),
];

/// Those of an AutoencoderTiny.
const READ_OF_TINY: [(&str, &[&str]); 1] = [(
    "vae/config.json",
    &[
        "_class_name",
        "in_channels",
        "out_channels",
        "latent_channels",
        "encoder_block_out_channels",
        "decoder_block_out_channels",
        "num_encoder_blocks",
        "num_decoder_blocks",
        "act_fn",
        "upsample_fn",
        "upsampling_scaling_factor",
        "scaling_factor",
        "shift_factor",
    ],
)];

/// The small model in a folder where one file can be replaced.
fn copied(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let copy = to.join(entry.file_name());
        if entry.path().is_dir() {
            copied(&entry.path(), &copy);
        } else {
            std::fs::copy(entry.path(), copy).unwrap();
        }
    }
}

/// Loads all of a model and upscales a picture of four pixels.
fn run(model: &Path) -> anyhow::Result<Vec<f32>> {
    let mut upscaler = Upscaler::new(Options {
        keep_loaded: false,
        ..Options::new(ModelFiles::Folder(model.to_owned()))
    })?;
    let picture = LowRes::image(&Pixels::new(2, 2, vec![0.5; 12])?)?;
    let settings = Settings {
        prompt: "a cat".into(),
        steps: 1,
        ..Settings::default()
    };
    let upscaled = upscaler.upscale(&[picture], &settings, &mut |_| Ok(()))?;
    Ok(upscaler.decode(&upscaled[0], &mut |_| Ok(()))?.values)
}

/// What a key may wrongly hold: each value, and, of a list, each as one of its elements.
fn wrong_values(sound: &Value) -> Vec<Value> {
    let values = [
        json!(0),
        json!(1),
        json!(-1),
        json!(1_000_000_000),
        json!(10_000_000_000_000_u64),
        json!(1e13),
        json!(1e308),
        json!("text"),
        Value::Null,
        json!([]),
    ];
    let within = |value: &Value| {
        let mut list = sound.as_array()?.clone();
        *list.get_mut(1)? = value.clone();
        Some(Value::from(list))
    };
    let within: Vec<Value> = values.iter().filter_map(within).collect();
    values.into_iter().chain(within).collect()
}

/// What is wrong with how a value was taken, if anything.
fn complaint(model: &Path, file: &str, key: &str) -> Option<String> {
    let result = catch_unwind(AssertUnwindSafe(|| run(model)));
    let Ok(result) = result else {
        return Some("panicked".into());
    };
    match result {
        Ok(values) => {
            let sound = values.len() == 48 && values.iter().all(|v| (0.0..=1.0).contains(v));
            (!sound).then(|| "gives no picture".into())
        }
        Err(error) => {
            let error = format!("{error:#}");
            let (folder, name) = file.split_once('/').unwrap();
            // A special token is looked for in the vocabulary beside it.
            let named = error.contains(name) || (folder == "tokenizer" && error.contains(folder));
            let clear = named && error.contains(key) && error.lines().count() == 1;
            (!clear || error.len() > 700).then_some(error)
        }
    }
}

#[test]
fn a_configuration_with_one_wrong_value_is_refused_by_its_key_or_works() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copied(&data("model"), &model);
    let tried = tried(&model, &READ);
    assert!(tried > 700, "{tried}");
    let vae = model.join("vae");
    std::fs::remove_dir_all(&vae).unwrap();
    copied(&data("vae-tiny"), &vae);
    let tried = self::tried(&model, &READ_OF_TINY);
    assert!(tried > 150, "{tried}");
    let largest = largest_allocation();
    assert!(largest < 1 << 30, "{largest} bytes were asked for at once");
}

/// Tries the wrong values of each key, and gives their number.
fn tried(model: &Path, configurations: &[(&str, &[&str])]) -> usize {
    assert_eq!(run(model).unwrap().len(), 48);
    let (mut tried, mut complaints) = (0, Vec::new());
    for (file, read) in configurations {
        let path = model.join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        let sound: Map<String, Value> = serde_json::from_str(&text).unwrap();
        for (key, value) in &sound {
            let values = if read.contains(&key.as_str()) {
                wrong_values(value)
            } else {
                // Nothing reads it, whatever it holds.
                vec![json!("text"), json!(1e308)]
            };
            for value in values {
                let mut edited = sound.clone();
                edited.insert(key.clone(), value.clone());
                std::fs::write(&path, serde_json::to_vec(&edited).unwrap()).unwrap();
                tried += 1;
                if let Some(complaint) = complaint(model, file, key) {
                    complaints.push(format!("{file}: {key} = {value}: {complaint}"));
                }
            }
        }
        std::fs::write(&path, text).unwrap();
        let absent = read.iter().filter(|key| !sound.contains_key(**key));
        assert_eq!(absent.count(), 0, "{file} lacks a key that is read");
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    tried
}

#[test]
fn files_that_are_too_large_are_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copied(&data("model"), &model);
    for file in [
        "unet/config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
    ] {
        let path = model.join(file);
        let sound = std::fs::read(&path).unwrap();
        // Sparse: it takes no room on the disk.
        let large = std::fs::File::create(&path).unwrap();
        large.set_len(1 << 40).unwrap();
        let error = format!("{:#}", run(&model).unwrap_err());
        assert!(
            error.contains(file) && error.contains("more than"),
            "{error}"
        );
        std::fs::write(&path, sound).unwrap();
    }
    let lines = "a b\n".repeat((1 << 20) + 1);
    std::fs::write(model.join("tokenizer/merges.txt"), lines).unwrap();
    let error = format!("{:#}", run(&model).unwrap_err());
    assert!(error.contains("merges.txt has more than"), "{error}");
}

#[test]
fn a_guidance_that_no_picture_survives_is_refused() {
    let mut upscaler = Upscaler::new(Options::new(ModelFiles::Folder(data("model")))).unwrap();
    for guidance in [-1.0, 100.1, 1e30, f64::NAN, f64::INFINITY] {
        let picture = LowRes::image(&Pixels::new(1, 1, vec![0.5; 3]).unwrap()).unwrap();
        let settings = Settings {
            guidance,
            ..Settings::default()
        };
        let error = upscaler
            .upscale(&[picture], &settings, &mut |_| Ok(()))
            .unwrap_err();
        assert!(error.to_string().contains("guidance"), "{error}");
    }
}
