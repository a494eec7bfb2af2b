//! Configurations whose numbers no model has: refused by their key, before anything is made of them.

use std::fs;

use sd_upscale::model::BUILT_IN_FILES;
use sd_upscale::{LowRes, ModelFiles, Options, Settings, Upscaler};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The built-in model with one key of one file changed.
fn changed(file: &str, key: &str, value: Value) -> TempDir {
    let folder = TempDir::new().unwrap();
    for (name, content) in BUILT_IN_FILES {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    let path = folder.path().join(file);
    let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    json[key] = value;
    fs::write(&path, json.to_string()).unwrap();
    folder
}

/// The error of a model, at whatever stage it comes; a picture goes through every part of it.
fn refusal(folder: &TempDir) -> String {
    let run = || -> anyhow::Result<()> {
        let mut upscaler = Upscaler::new(Options::new(ModelFiles::Folder(folder.path().into())))?;
        let pixels = sd_upscale::Pixels::new(1, 1, vec![0.5; 3])?;
        let settings = Settings {
            steps: 1,
            ..Settings::default()
        };
        let upscaled = upscaler.upscale(&[LowRes::image(&pixels)?], &settings, &mut |_| Ok(()))?;
        upscaler.decode(&upscaled[0], &mut |_| Ok(()))?;
        Ok(())
    };
    format!("{:#}", run().expect_err("it is refused"))
}

#[test]
fn numbers_that_no_model_has_are_refused_by_their_key() {
    let huge = json!(10_000_000_000_000_u64);
    let (unet, vae, text) = (
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
    );
    let scheduler = "scheduler/scheduler_config.json";
    for (file, key, value) in [
        (scheduler, "num_train_timesteps", huge.clone()),
        (scheduler, "num_train_timesteps", json!(0)),
        (scheduler, "trained_betas", json!([])),
        (unet, "block_out_channels", json!(vec![32; 60])),
        (unet, "block_out_channels", json!([])),
        (unet, "layers_per_block", json!(u64::MAX)),
        (unet, "conv_in_kernel", json!(0)),
        (unet, "in_channels", json!(u64::MAX)),
        (unet, "time_embedding_dim", huge.clone()),
        (vae, "block_out_channels", json!(vec![8; 70])),
        (vae, "latent_channels", json!(u64::MAX)),
        (vae, "layers_per_block", json!(u64::MAX)),
        (vae, "out_channels", json!(4)),
        (text, "max_position_embeddings", huge.clone()),
        (text, "max_position_embeddings", json!(0)),
        (text, "num_hidden_layers", huge.clone()),
        (text, "hidden_size", json!(0)),
    ] {
        let error = refusal(&changed(file, key, value.clone()));
        assert!(error.contains(key), "{key} {value}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn noise_levels_that_are_no_range_are_refused() {
    let scheduler = "scheduler/scheduler_config.json";
    for (key, value) in [
        ("beta_start", json!(-1.0)),
        ("beta_end", json!(1e30)),
        ("trained_betas", json!([0.0, 0.0])),
        ("sigma_max", json!(-5.0)),
    ] {
        let error = refusal(&changed(scheduler, key, value));
        assert!(error.contains("noise levels"), "{key}: {error}");
    }
}
