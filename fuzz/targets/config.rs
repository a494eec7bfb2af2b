//! Configuration and tokenizer files: one file of a small model is replaced, and the model loaded and run on one
//! position, or (bit 6) one pixel, as far as the file has a say in it. It is refused with an error, or gives numbers.
//!
//! The first byte names the file. Of the JSON files there are two ways: the rest is the file, or (bit 7) a list of edits
//! of the sound file, which pass its parser and reach what reads the numbers.
#![no_main]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::bail;
use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use sd_upscale::{Event, LowRes, ModelFiles, Options, Pixels, Settings, Stage, Upscaler};
use sd_upscale_fuzz::{root, scratch};
use serde_json::{Map, Value};

const FILES: [&str; 8] = [
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
];

#[derive(Arbitrary, Debug)]
enum New<'a> {
    Small(u8),
    Number(i64),
    Float(f64),
    Text(&'a str),
    Flag(bool),
    Numbers(Vec<u8>),
    Texts(Vec<&'a str>),
    Null,
    Absent,
    /// The list is cut to so many, or repeated.
    Length(u8),
}

/// A copy of the small model: links to its files, of which one is ours at a time.
fn model() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = scratch().join("model");
        let tiny = root().join("assets/tiny");
        for part in ["unet", "vae", "text_encoder", "scheduler", "tokenizer"] {
            std::fs::create_dir_all(folder.join(part)).unwrap();
            for file in std::fs::read_dir(tiny.join(part)).unwrap() {
                let file = file.unwrap();
                let link = folder.join(part).join(file.file_name());
                std::os::unix::fs::symlink(file.path(), link).unwrap();
            }
        }
        folder
    })
}

fn edited(name: &str, data: &[u8]) -> Option<Vec<u8>> {
    let sound = std::fs::read(root().join("assets/tiny").join(name)).unwrap();
    let mut json: Map<String, Value> = serde_json::from_slice(&sound).ok()?;
    let keys: Vec<String> = json.keys().cloned().collect();
    let mut data = Unstructured::new(data);
    for _ in 0..3 {
        let Ok((key, new)) = <(u8, New)>::arbitrary(&mut data) else {
            break;
        };
        let key = &keys[usize::from(key) % keys.len()];
        let value = match new {
            New::Small(n) => n.into(),
            New::Number(n) => n.into(),
            New::Float(n) => n.into(),
            New::Text(text) => text.into(),
            New::Flag(flag) => flag.into(),
            New::Numbers(list) => list.into(),
            New::Texts(list) => list.into(),
            New::Null => Value::Null,
            New::Absent => {
                json.remove(key);
                continue;
            }
            New::Length(n) => match json.get(key).and_then(Value::as_array) {
                Some(list) => {
                    let cycled = list.iter().cycle().take(usize::from(n));
                    cycled.cloned().collect()
                }
                None => n.into(),
            },
        };
        json.insert(key.clone(), value);
    }
    serde_json::to_vec(&json).ok()
}

#[derive(Clone, Copy)]
enum Input {
    Latents,
    Picture,
}

/// Runs the model as far as the file called `name` has a say in it.
fn run(name: &str, input: Input) -> anyhow::Result<Vec<f32>> {
    let mut upscaler = Upscaler::new(Options::new(ModelFiles::Folder(model().to_owned())))?;
    let settings = Settings {
        prompt: "a cat, 日本 1".into(),
        steps: 1,
        ..Settings::default()
    };
    let low_res = match input {
        Input::Latents => LowRes::latents(1, 1, vec![0.5; 4])?,
        Input::Picture => LowRes::image(&Pixels::new(1, 1, vec![0.5; 3])?)?,
    };
    if let (Input::Latents, "vae/config.json") = (input, name) {
        let picture = upscaler.decode_low_res(&low_res, &mut |_| Ok(()))?;
        return Ok(picture.values);
    }
    let denoises = matches!(name, "unet/config.json" | "scheduler/scheduler_config.json");
    let until = &mut |event| match event {
        Event::Loading(Stage::Denoise) if !denoises => bail!("far enough"),
        _ => Ok(()),
    };
    let upscaled = upscaler.upscale(&[low_res], &settings, until)?;
    Ok(upscaler.decode(&upscaled[0], &mut |_| Ok(()))?.values)
}

fuzz_target!(
    init: {
        // One thread, so that the same input covers the same code.
        // SAFETY: nothing else runs yet.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", "1") };
    },
    |data: &[u8]| {
        let Some((&choice, rest)) = data.split_first() else {
            return;
        };
        let name = FILES[usize::from(choice) % FILES.len()];
        let content = match choice & 0x80 {
            0 => Some(rest.to_vec()),
            _ => edited(name, rest),
        };
        let Some(content) = content else { return };
        let path = model().join(name);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, content).unwrap();
        let input = match choice & 0x40 {
            0 => Input::Latents,
            _ => Input::Picture,
        };
        let result = run(name, input);
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(root().join("assets/tiny").join(name), &path).unwrap();
        match result {
            Ok(values) => assert!(values.iter().all(|v| (0.0..=1.0).contains(v))),
            Err(error) => assert!(!format!("{error:#}").is_empty()),
        }
    }
);
