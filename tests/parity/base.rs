//! Stable Diffusion's own networks and samplers against diffusers (tests/data/make_base_reference.py).

use candle_core::{DType, Device, Tensor};
use sd_upscale::device::Placement;
use sd_upscale::networks::Room;
use sd_upscale::networks::base_unet::BaseUNet;
use sd_upscale::networks::text::{TextEncoder, Tokenizer};
use sd_upscale::pipeline::base::{BaseModel, BaseScheduler, BaseSettings};
use sd_upscale::pipeline::noise::Generator;
use sd_upscale::{Event, LowRes, Memory, ModelFiles, Options, Schedule, Settings, Upscaler};
use serde_json::{Map, Value};

use crate::STAGE;
use crate::common::*;

/// Of a run of up to 16 steps, which amplifies the rounding of a call less than once (`make_base_reference.py --check`); 6e-6 is seen, and the
/// smallest mistake in a formula moves it by 1e-3.
const BASE: f64 = 1e-4;

/// The same in half precision on a card, without and with guidance. Of a call, roundings leave what they do of the upscaler's
/// (`card.rs`); guidance of 7.5 takes 7.5 times one pass less 6.5 times the other, with their roundings. Seen are 2e-3 and 1e-2 of float16, 1.4e-2
/// and 6.6e-2 of bfloat16.
const HALVES: [(DType, f64, f64); 2] = [(DType::F16, 5e-3, 2e-2), (DType::BF16, 4e-2, 1.3e-1)];

/// Of `HALVES`, for a guidance.
fn halves(guidance: f64) -> [(DType, f64); 2] {
    HALVES.map(|(dtype, plain, guided)| (dtype, if guidance > 1.0 { guided } else { plain }))
}

const MODELS: [&str; 2] = ["sd1", "sd2"];
const PROMPT: &str = "a cat on a red sofa, wow!!";

fn base(model: &str) -> ModelFiles {
    ModelFiles::Folder(data(&format!("base/{model}")))
}

#[test]
fn prompts_are_tokenized_and_encoded_as_each_version_does() {
    let reference = Reference::read("base_networks");
    for model in MODELS {
        for (name, placement) in placements(DType::F32) {
            let encoder = TextEncoder::load(&base(model), &placement).unwrap();
            let tokenizer = Tokenizer::new(&base(model), encoder.positions()).unwrap();
            for (label, prompt) in [("prompt", PROMPT), ("empty", "")] {
                let tokens = tokenizer.encode(prompt).unwrap();
                let expected = reference.get(&format!("{model}.{label}.ids"));
                let expected: Vec<i64> = expected.flatten_all().unwrap().to_vec1().unwrap();
                let ids: Vec<i64> = tokens.ids.iter().map(|&id| id.into()).collect();
                assert_eq!(ids, expected, "{model} {label}");
                let context = encoder.encode_normed(&tokens).unwrap();
                let expected = reference.get(&format!("{model}.{label}.context"));
                assert_close(
                    &format!("{name} {model} {label}"),
                    &context,
                    &expected,
                    STAGE,
                );
            }
        }
    }
}

#[test]
fn base_unet_call() {
    let reference = Reference::read("base_networks");
    for model in MODELS {
        let context = |label: &str| reference.get(&format!("{model}.{label}.context"));
        let both = Tensor::cat(&[context("empty"), context("prompt")], 0).unwrap();
        for (name, placement) in placements(DType::F32) {
            let unet = BaseUNet::load(&base(model), &placement).unwrap();
            for case in ["b1", "b2", "odd"] {
                let get = |key: &str| reference.get(&format!("{model}.{case}.{key}"));
                let x = get("x");
                let batch = x.dim(0).unwrap();
                let rows = both.narrow(0, 2 - batch, batch).unwrap();
                let prompted = unet.prompted(&rows).unwrap();
                let time = values(&get("time"))[0];
                // At another time too, which is none of this one's.
                let steps = unet.steps(&[500.0, time]).unwrap();
                let output = unet
                    .forward(&x, &steps[1], &prompted, &Room::unlimited())
                    .unwrap();
                let what = format!("{name} {model} {case}");
                assert_close(&what, &output, &get("output"), STAGE);
            }
        }
    }
}

/// What stands for the network in the reference.
fn predicted(x: &Tensor, time: f32) -> Tensor {
    let values = values(x);
    let y: Vec<f32> = values
        .iter()
        .map(|&x| 0.8 * x / (1.0 + x * x).sqrt() + 0.3 * (time / 1000.0 - 0.5))
        .collect();
    Tensor::from_vec(y, x.shape(), &Device::Cpu).unwrap()
}

#[test]
fn every_sampler_leads_where_diffusers_does() {
    let text = std::fs::read(data("reference/base_schedules.json")).unwrap();
    let rows: Vec<Value> = serde_json::from_slice(&text).unwrap();
    let (mut cases, mut worst) = (0, 0f32);
    for row in rows {
        let config: Map<String, Value> = row["config"].as_object().unwrap().clone();
        let what = Value::Object(config.clone());
        let scheduler = BaseScheduler::from_json(config).unwrap();
        for result in row["results"].as_array().unwrap() {
            let number = |i: usize| result[i].as_f64().unwrap();
            let (steps, start) = (number(0) as usize, number(1) as usize);
            let times = scheduler.times(steps);
            let spread = scheduler.initial_spread(&times);
            let x = Tensor::new(&[0.7 * spread, -1.1 * spread], &Device::Cpu).unwrap();
            let x = scheduler
                .run(x, &times, start, |x, time| Ok(predicted(x, time)))
                .unwrap();
            for (i, value) in values(&x).into_iter().enumerate() {
                let expected = number(2 + i) as f32;
                // What float32 loses where numbers of this size are subtracted, over up to 20 steps.
                let error = (value - expected).abs() / (1.0 + expected.abs());
                worst = worst.max(error);
                assert!(
                    error <= 1e-5,
                    "{what} {steps} steps from {start}: {value}, expected {expected}"
                );
                cases += 1;
            }
        }
    }
    println!("{cases} numbers, at most {worst:.1e} off");
    assert!(cases > 2500, "{cases}");
}

/// A case's checkpoint with the case's sampler, in a folder of its own.
fn checkpoint(case: &Value) -> (tempfile::TempDir, ModelFiles) {
    let folder = tempfile::tempdir().unwrap();
    let model = data(&format!("base/{}", case["model"].as_str().unwrap()));
    for part in ["unet", "vae", "text_encoder", "tokenizer", "scheduler"] {
        let to = folder.path().join(part);
        std::fs::create_dir(&to).unwrap();
        for file in std::fs::read_dir(model.join(part)).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    }
    let path = folder.path().join("scheduler/scheduler_config.json");
    let mut config: Map<String, Value> =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config.extend(case["scheduler"].as_object().unwrap().clone());
    std::fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
    let files = ModelFiles::Folder(folder.path().to_owned());
    (folder, files)
}

fn settings(all: &Value, case: &Value) -> BaseSettings {
    let text = |key: &str| all[key].as_str().unwrap().to_owned();
    BaseSettings {
        prompt: text("prompt"),
        negative_prompt: text("negative_prompt"),
        steps: case["steps"].as_u64().unwrap() as usize,
        guidance: case["guidance"].as_f64().unwrap(),
    }
}

fn end_to_end() -> Value {
    let text = std::fs::read(data("reference/base_end_to_end.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// The ways to run the networks on the CPU; where a card is named, on that, in every precision.
fn backends(settings: &BaseSettings) -> Vec<(&'static str, Placement, f64)> {
    let exact = |(backend, placement)| (backend, placement, BASE);
    let Some(device) = card() else {
        return placements(DType::F32).into_iter().map(exact).collect();
    };
    let mut all = vec![("card", Placement::new(&device, DType::F32), BASE)];
    // A card that the CPU plays takes its time: float32 alone of the longest.
    if settings.steps <= 10 {
        let of_half = |(dtype, tolerance)| ("card", Placement::new(&device, dtype), tolerance);
        all.extend(halves(settings.guidance).map(of_half));
    }
    all
}

/// Every case of `list`, on every backend, against what the reference calls `prefix` and the case's name.
fn each_case(
    list: &str,
    prefix: &str,
    run: impl Fn(&mut BaseModel, &Value, &BaseSettings, &mut Generator) -> anyhow::Result<Tensor>,
) {
    let reference = Reference::read("base_end_to_end");
    let all = end_to_end();
    for case in all[list].as_array().unwrap() {
        let name = format!("{prefix}{}", case["name"].as_str().unwrap());
        let (_folder, files) = checkpoint(case);
        let settings = settings(&all, case);
        for (backend, placement, tolerance) in backends(&settings) {
            let mut base = BaseModel::new(files.clone(), &placement).unwrap();
            let mut generator = Generator::new(case["seed"].as_u64().unwrap());
            let latents = run(&mut base, case, &settings, &mut generator).unwrap();
            let what = format!("{backend} {name} {:?}", placement.dtype);
            assert_close(&what, &latents, &reference.get(&name), tolerance);
        }
    }
}

#[test]
fn base_latents() {
    each_case("generated", "", |base, case, settings, generator| {
        let side = |i: usize| case["size"][i].as_u64().unwrap() as usize / 8;
        let (room, sides) = (Room::unlimited(), (side(1), side(0)));
        base.generate(sides, settings, generator, &room, &mut |_| Ok(()))
    });
}

#[test]
fn refined_latents() {
    let latents = Reference::read("base_end_to_end").get("refine.latents");
    each_case("refined", "refine.", |base, case, settings, generator| {
        let strength = case["strength"].as_f64().unwrap();
        let room = Room::unlimited();
        base.refine(&latents, strength, settings, generator, &room, &mut |_| {
            Ok(())
        })
    });
}

/// A way to do a whole run, which is held to the reference.
struct Way {
    device: Device,
    dtype: DType,
    tolerance: f64,
    keep_loaded: bool,
    /// How often the same in a batch.
    pictures: usize,
}

/// On the CPU; where a card is named, on that, in every precision.
fn ways(guidance: f64) -> Vec<Way> {
    let Some(device) = card() else {
        return [true, false]
            .map(|keep_loaded| Way {
                device: Device::Cpu,
                dtype: DType::F32,
                tolerance: BASE,
                keep_loaded,
                pictures: 2,
            })
            .into();
    };
    let [half, brain] = halves(guidance);
    [(DType::F32, BASE), half, brain]
        .map(|(dtype, tolerance)| Way {
            device: device.clone(),
            dtype,
            tolerance,
            keep_loaded: dtype != DType::F32,
            pictures: 1,
        })
        .into()
}

/// One generator runs through the base checkpoint, the upscaler and the refining pass, as it does where diffusers' pipelines share one.
#[test]
fn from_a_prompt_to_upscaled_and_refined_latents() {
    let reference = Reference::read("base_end_to_end");
    let all = end_to_end();
    for case in all["whole"].as_array().unwrap() {
        let name = format!("whole.{}", case["name"].as_str().unwrap());
        let (_folder, files) = checkpoint(case);
        let number = |key: &str| case[key].as_f64().unwrap();
        let side = |i: usize| case["size"][i].as_u64().unwrap() as usize;
        let base = settings(&all, case);
        let settings = Settings {
            prompt: base.prompt,
            negative_prompt: base.negative_prompt,
            steps: number("upscaler_steps") as usize,
            guidance: number("upscaler_guidance"),
            seed: number("seed") as u64,
            schedule: match case["schedule"].as_str().unwrap() {
                "karras" => Schedule::Karras,
                _ => Schedule::LogLinear,
            },
            base_steps: base.steps,
            base_guidance: base.guidance,
            refine: case["strength"].as_f64(),
            ..Settings::default()
        };
        for way in ways(settings.base_guidance) {
            let what = format!("{name} {:?} {:?}", way.dtype, way.device.location());
            let mut upscaler = Upscaler::new(Options {
                model: model(),
                vae: None,
                device: way.device,
                dtype: way.dtype,
                keep_loaded: way.keep_loaded,
                memory: Memory::default(),
            })
            .unwrap();
            upscaler.set_base(files.clone()).unwrap();
            let low_res = LowRes::Prompt {
                width: side(0),
                height: side(1),
            };
            let mut steps = Vec::new();
            let upscaled = upscaler
                .upscale(&vec![low_res; way.pictures], &settings, &mut |event| {
                    match event {
                        Event::BaseStep { done, total, .. } => steps.push((done, total)),
                        Event::Warning(text) => panic!("{what}: {text}"),
                        _ => {}
                    }
                    Ok(())
                })
                .unwrap();
            for upscaled in &upscaled {
                let latents = upscaled.latents().unwrap();
                assert_close(&what, &latents, &reference.get(&name), way.tolerance);
            }
            let calls = steps.iter().filter(|(done, total)| done == total).count();
            // Each picture, and each once more where it is refined.
            let times = if settings.refine.is_some() { 2 } else { 1 };
            assert_eq!(calls, times * way.pictures);
        }
    }
}

/// The small checkpoint, whose first map is a million times as large: more than float16 holds, and nothing to the norms behind it.
fn overflowing() -> (tempfile::TempDir, ModelFiles) {
    let (folder, files) = checkpoint(&end_to_end()["generated"][0]);
    let path = folder
        .path()
        .join("unet/diffusion_pytorch_model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    for name in ["conv_in.weight", "conv_in.bias"] {
        let large = tensors[name].to_dtype(DType::F32).unwrap();
        tensors.insert(name.into(), (large * 1e6).unwrap());
    }
    candle_core::safetensors::save(&tensors, &path).unwrap();
    (folder, files)
}

#[test]
fn a_base_checkpoint_that_overflows_is_done_again_in_float32() {
    let (_folder, files) = overflowing();
    let settings = Settings {
        steps: 1,
        base_steps: 3,
        ..Settings::default()
    };
    let refined = Settings {
        refine: Some(0.5),
        ..settings.clone()
    };
    let (width, height) = (64, 64);
    let numbers = (0..4 * 64).map(|i| (i % 7) as f32 / 3.0 - 1.0).collect();
    let latents = LowRes::latents(8, 8, numbers).unwrap();
    let cases = [
        (LowRes::Prompt { width, height }, settings),
        (latents, refined),
    ];
    let device = card().unwrap_or(Device::Cpu);
    for (low_res, settings) in &cases {
        let run = |dtype| {
            let mut upscaler = Upscaler::new(Options {
                device: device.clone(),
                dtype,
                ..Options::new(model())
            })
            .unwrap();
            upscaler.set_base(files.clone()).unwrap();
            let mut warnings = Vec::new();
            let mut on_event = |event| {
                if let Event::Warning(text) = event {
                    warnings.push(text);
                }
                Ok(())
            };
            let input = std::slice::from_ref(low_res);
            let upscaled = upscaler.upscale(input, settings, &mut on_event).unwrap();
            (upscaled[0].latents().unwrap(), warnings)
        };
        let (exact, none) = run(DType::F32);
        assert!(none.is_empty(), "{none:?}");
        let (again, warnings) = run(DType::F16);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        let text =
            "the base stage gave values that are not numbers (in F16); doing it again in float32";
        assert_eq!(warnings[0], text);
        assert_eq!(values(&again), values(&exact));
    }
}

#[test]
fn without_a_base_checkpoint_a_prompt_alone_is_refused() {
    let mut upscaler = Upscaler::new(Options::new(model())).unwrap();
    let low_res = LowRes::Prompt {
        width: 64,
        height: 64,
    };
    let error = upscaler
        .upscale(
            std::slice::from_ref(&low_res),
            &Settings::default(),
            &mut |_| Ok(()),
        )
        .unwrap_err();
    assert!(format!("{error:#}").contains("set_base"), "{error:#}");
    upscaler.set_base(base("sd1")).unwrap();
    assert_eq!(upscaler.base_size().unwrap(), (64, 64));
    let odd = LowRes::Prompt {
        width: 60,
        height: 64,
    };
    let error = upscaler
        .upscale(&[odd], &Settings::default(), &mut |_| Ok(()))
        .unwrap_err();
    assert!(format!("{error:#}").contains("multiples of 8"), "{error:#}");
    let too_much = Settings {
        refine: Some(1.5),
        ..Settings::default()
    };
    let error = upscaler
        .upscale(&[low_res], &too_much, &mut |_| Ok(()))
        .unwrap_err();
    assert!(format!("{error:#}").contains("1.5"), "{error:#}");
    // The upscaler's own folder is no base checkpoint.
    let error = upscaler.set_base(model()).unwrap_err();
    assert!(format!("{error:#}").contains("in_channels 8"), "{error:#}");
}
