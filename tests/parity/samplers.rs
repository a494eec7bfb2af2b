//! The samplers against k-diffusion's: on a denoiser in closed form, and on the small model.

use std::cell::Cell;

use candle_core::{DType, Device, Tensor};
use sd_upscale::pipeline::noise::Generator;
use sd_upscale::pipeline::sampler::dpm::{self, Ends, Tolerance};
use sd_upscale::pipeline::sampler::step::{Denoise, Noise};
use sd_upscale::pipeline::sampler::{Sampler, dpmpp, euler};
use sd_upscale::pipeline::schedule::{self, Schedule, SchedulerConfig, SigmaRange};
use sd_upscale::pipeline::{InputKind, PlanFor};
use sd_upscale::{Enlargement, Event, LowRes, ModelFiles, NotFinite, Settings, Upscaler};

use crate::common::*;
use crate::whole::{low_res, upscaler};

/// What tests/data/samplers.py allows, and shows wrong samplers to be far past: five steps of a random network amplify the difference of
/// an evaluation, 1e-6, by a hundred at most.
const MODEL: f64 = 2e-4;
/// The adaptive one's steps depend on its errors, whose differences they pass on.
const ADAPTIVE: f64 = 1e-3;
/// A denoiser in double precision: what differs is the rounding of x, and of ln, exp and expm1 of noise levels.
const CLOSED: f64 = 2e-5;

const SEED: u64 = 33;

/// A case of samplers.json.
#[derive(serde::Deserialize)]
struct Case {
    name: String,
    sampler: String,
    schedule: Option<String>,
    steps: Option<usize>,
    eta: Option<f64>,
    tolerance: Option<f64>,
    #[serde(default)]
    guidance: f64,
    #[serde(default)]
    input: String,
    evaluations: usize,
    draws: usize,
}

#[derive(serde::Deserialize)]
struct Cases {
    closed: Vec<Case>,
    model: Vec<Case>,
}

impl Cases {
    fn read() -> Self {
        let text = std::fs::read(data("reference/samplers.json")).unwrap();
        serde_json::from_slice(&text).unwrap()
    }
}

impl Case {
    fn sampler(&self) -> Sampler {
        self.sampler.parse().unwrap()
    }

    fn schedule(&self) -> Schedule {
        match self.schedule.as_deref() {
            None | Some("karras") => Schedule::Karras,
            Some("log-linear") => Schedule::LogLinear,
            Some(other) => panic!("schedule {other}"),
        }
    }

    /// Of the small model.
    fn settings(&self) -> Settings {
        Settings {
            prompt: "a photo of a cat".into(),
            negative_prompt: "blurry, low quality".into(),
            // Of no account where the sampler takes none.
            steps: self.steps.unwrap_or(1),
            guidance: self.guidance,
            seed: SEED,
            schedule: self.schedule(),
            sampler: self.sampler(),
            eta: self.eta.unwrap_or(1.0),
            tolerance: self.tolerance.unwrap_or(0.25),
            ..Settings::default()
        }
    }

    fn bound(&self) -> f64 {
        match self.sampler() {
            Sampler::DpmAdaptive => ADAPTIVE,
            _ => MODEL,
        }
    }
}

fn range() -> SigmaRange {
    let config: SchedulerConfig = model().json("scheduler/scheduler_config.json").unwrap();
    config.sigma_range().unwrap()
}

/// As `mixture` of tests/data/samplers.py: the mean of what a value was, where it was one of three numbers, more or less.
fn mixture(x: f32, sigma: f32) -> f32 {
    const OWN: f64 = 1.5 * 1.5;
    let (x, noise) = (f64::from(x), f64::from(sigma).powi(2));
    let parts = [(0.3f64, -6.0), (0.45, 1.2), (0.25, 6.6)];
    let logarithms =
        parts.map(|(weight, mean)| weight.ln() - (x - mean).powi(2) / (2.0 * (OWN + noise)));
    let largest = logarithms.into_iter().fold(f64::NEG_INFINITY, f64::max);
    let (mut sum, mut whole) = (0.0, 0.0);
    for (logarithm, (_, mean)) in logarithms.into_iter().zip(parts) {
        let share = (logarithm - largest).exp();
        sum += share * (mean * noise + x * OWN) / (OWN + noise);
        whole += share;
    }
    (sum / whole) as f32
}

fn mixture_of(x: &Tensor, sigma: f32) -> anyhow::Result<Tensor> {
    let all = values(x).into_iter().map(|x| mixture(x, sigma)).collect();
    Ok(Tensor::from_vec(all, x.dims(), &Device::Cpu)?)
}

/// A row from each generator.
fn draw(generators: &mut [Generator], (_, c, h, w): (usize, usize, usize, usize)) -> Tensor {
    let rows = generators.iter_mut().map(|one| one.randn(c * h * w));
    let all: Vec<f32> = rows.flatten().collect();
    Tensor::from_vec(all, (generators.len(), c, h, w), &Device::Cpu).unwrap()
}

/// A plain function for a case: from noise of its first level's spread.
fn run(case: &Case, start: &Tensor, denoise: Denoise, noise: Noise) -> anyhow::Result<Tensor> {
    let range = range();
    let ends = Ends {
        max: range.max,
        min: range.min,
    };
    let (steps, eta) = (case.steps.unwrap_or(0), case.eta.unwrap_or(0.0) as f32);
    let sigmas = match case.schedule {
        Some(_) => schedule::sigmas(case.schedule(), steps, &range),
        None => vec![range.max],
    };
    let x = (start * f64::from(sigmas[0]))?;
    match case.sampler() {
        Sampler::Euler => euler::euler(x, &sigmas, denoise),
        Sampler::EulerAncestral => euler::euler_ancestral(x, &sigmas, eta, denoise, noise),
        Sampler::Heun => euler::heun(x, &sigmas, denoise),
        Sampler::Dpm2 => euler::dpm2(x, &sigmas, denoise),
        Sampler::Dpm2Ancestral => euler::dpm2_ancestral(x, &sigmas, eta, denoise, noise),
        Sampler::DpmFast => dpm::dpm_fast(x, ends, steps, eta, denoise, noise),
        Sampler::DpmAdaptive => {
            let tolerance = Tolerance::scaled(case.tolerance.unwrap());
            let mut come = 0.0;
            let result = dpm::dpm_adaptive(x, ends, tolerance, eta, denoise, noise, &mut |way| {
                assert!(way > come, "{}: no way forward", case.name);
                come = way;
            });
            assert!(
                (come - 1.0).abs() < 1e-5,
                "{}: {come} of the way",
                case.name
            );
            result
        }
        Sampler::Dpmpp2sAncestral => dpmpp::dpmpp_2s_ancestral(x, &sigmas, eta, denoise, noise),
        Sampler::Dpmpp2m => dpmpp::dpmpp_2m(x, &sigmas, denoise),
    }
}

const SHAPE: (usize, usize, usize, usize) = (1, 4, 3, 5);

#[test]
fn on_a_denoiser_in_closed_form_they_give_k_diffusions_numbers() {
    let reference = Reference::read("samplers");
    let cases = Cases::read().closed;
    let mut worst = 0f64;
    for case in &cases {
        let mut generators = [Generator::new(SEED)];
        let start = draw(&mut generators, SHAPE);
        let (mut evaluations, mut draws) = (0, 0);
        let mut denoise = |x: &Tensor, sigma: f32| {
            evaluations += 1;
            mixture_of(x, sigma)
        };
        let mut noise = || {
            draws += 1;
            Ok(draw(&mut generators, SHAPE))
        };
        let found = run(case, &start, &mut denoise, &mut noise).unwrap();
        let error = relative_error(&found, &reference.get(&case.name));
        worst = worst.max(error);
        let bound = match case.sampler() {
            Sampler::DpmAdaptive => ADAPTIVE,
            _ => CLOSED,
        };
        println!("{}: {error:.1e}", case.name);
        assert!(error <= bound, "{}: {error:.1e}", case.name);
        assert_eq!(evaluations, case.evaluations, "{}", case.name);
        // Without noise nothing is drawn, where the reference draws and multiplies by 0.
        let expected = if case.eta == Some(0.0) { 0 } else { case.draws };
        assert_eq!(draws, expected, "{}", case.name);
    }
    println!("{} cases, the worst off by {worst:.1e}", cases.len());
    for sampler in Sampler::ALL {
        assert!(cases.iter().any(|case| case.sampler() == sampler));
    }
}

#[test]
fn dpm_fast_evaluates_exactly_as_often_as_it_is_told() {
    for steps in 1..=40 {
        let case = Case {
            name: format!("dpm-fast {steps}"),
            sampler: "dpm-fast".into(),
            schedule: None,
            steps: Some(steps),
            eta: Some(1.0),
            tolerance: None,
            guidance: 1.0,
            input: String::new(),
            evaluations: steps,
            draws: 0,
        };
        let mut generators = [Generator::new(1)];
        let start = draw(&mut generators, SHAPE);
        let mut evaluations = 0;
        let mut denoise = |x: &Tensor, sigma: f32| {
            evaluations += 1;
            mixture_of(x, sigma)
        };
        let found = run(&case, &start, &mut denoise, &mut || {
            Ok(draw(&mut generators, SHAPE))
        });
        assert!(values(&found.unwrap()).iter().all(|v| v.is_finite()));
        assert_eq!(evaluations, steps);
    }
}

#[test]
fn a_row_of_a_batch_is_what_it_is_alone() {
    let cases = Cases::read().closed;
    let batched = |case: &&Case| case.steps == Some(5) && case.eta != Some(0.0);
    let mut done = 0;
    for case in cases.iter().filter(batched) {
        let seeds = [5, 6, 7];
        let result = |seeds: &[u64]| {
            let mut generators: Vec<Generator> = seeds.iter().map(|s| Generator::new(*s)).collect();
            let start = draw(&mut generators, SHAPE);
            let mut noise = || Ok(draw(&mut generators, SHAPE));
            run(case, &start, &mut mixture_of, &mut noise).unwrap()
        };
        let together = result(&seeds);
        for (row, seed) in seeds.into_iter().enumerate() {
            let row = together.narrow(0, row, 1).unwrap();
            assert_eq!(values(&row), values(&result(&[seed])), "{}", case.name);
        }
        done += 1;
    }
    assert!(done >= 16, "only {done} cases");
}

#[test]
fn an_adaptive_step_that_never_fits_ends_in_words_and_one_that_is_no_number_at_once() {
    let ends = Ends {
        max: 14.6,
        min: 0.03,
    };
    let start = draw(&mut [Generator::new(1)], SHAPE);
    let tried = |denoise: Denoise| {
        let noise = &mut || Ok(start.clone());
        let tolerance = Tolerance::scaled(0.25);
        let x = (&start * 14.6).unwrap();
        dpm::dpm_adaptive(x, ends, tolerance, 1.0, denoise, noise, &mut |_| {}).unwrap_err()
    };
    // A denoiser that gives something else each time it is asked.
    let (mut generator, mut evaluations) = ([Generator::new(2)], 0);
    let error = tried(&mut |_, _| {
        evaluations += 1;
        Ok((draw(&mut generator, SHAPE) * 1e4)?)
    });
    assert!(error.to_string().contains("raise --tolerance"), "{error}");
    assert_eq!(evaluations, 3000);
    let mut evaluations = 0;
    let error = tried(&mut |x, _| {
        evaluations += 1;
        Ok((x * f64::NAN)?)
    });
    assert!(error.is::<dpm::NotANumber>(), "{error}");
    assert_eq!(evaluations, 3);
    // Of a batch the steps would be one picture's for all.
    let two = Tensor::cat(&[&start, &start], 0).unwrap();
    let error = dpm::dpm_adaptive(
        two.clone(),
        ends,
        Tolerance::scaled(1.0),
        0.0,
        &mut mixture_of,
        &mut || Ok(two.clone()),
        &mut |_| {},
    );
    assert!(error.unwrap_err().to_string().contains("one at a time"));
}

/// A run of the small model, and what was told of its evaluations.
fn upscale(upscaler: &mut Upscaler, settings: &Settings, input: &LowRes) -> (Tensor, usize) {
    let told = Cell::new((0, None, 0.0));
    let mut watch = |event| {
        if let Event::Step {
            done, total, way, ..
        } = event
        {
            let (before, _, way_before) = told.get();
            assert_eq!(done, before + 1);
            assert!((way_before..=1.0).contains(&way), "{way_before} {way}");
            told.set((done, total, way));
        }
        Ok(())
    };
    let inputs = std::slice::from_ref(input);
    let upscaled = upscaler.upscale(inputs, settings, &mut watch).unwrap();
    let (done, total, way) = told.get();
    let evaluations = upscaled[0].evaluations;
    assert_eq!(done, evaluations);
    // Which is known before for all but one.
    let expected = upscaler.evaluations(settings);
    assert_eq!(total, expected);
    match expected {
        Some(expected) => assert_eq!((evaluations, way), (expected, 1.0)),
        None => assert_eq!(settings.sampler, Sampler::DpmAdaptive),
    }
    (upscaled[0].latents().unwrap(), evaluations)
}

/// Runs the cases of the small model that `of` picks, and says how many there are.
pub fn assert_latents_are_k_diffusions(
    upscaler: &mut Upscaler,
    of: impl Fn(&Settings, &LowRes) -> bool,
) -> usize {
    let reference = Reference::read("samplers");
    let (mut done, mut worst) = (0, 0f64);
    for case in &Cases::read().model {
        let (settings, input) = (case.settings(), low_res(&case.input));
        if !of(&settings, &input) {
            continue;
        }
        let (found, evaluations) = upscale(upscaler, &settings, &input);
        let error = relative_error(&found, &reference.get(&case.name));
        worst = worst.max(error / case.bound());
        let what = format!("{}: {error:.1e}", case.name);
        println!("{what}, {evaluations} evaluations");
        assert!(error <= case.bound(), "{what}");
        assert_eq!(evaluations, case.evaluations, "{what}");
        done += 1;
    }
    println!("{done} cases, the worst {worst:.1e} of what is allowed");
    done
}

#[test]
fn on_the_small_model_latents_are_k_diffusions() {
    let mut upscaler = upscaler(model(), DType::F32);
    for sampler in Sampler::ALL.into_iter().skip(1) {
        let of = |settings: &Settings, _: &LowRes| settings.sampler == sampler;
        let done = assert_latents_are_k_diffusions(&mut upscaler, of);
        assert!(done >= 8, "{sampler}: only {done} cases");
    }
}

/// Settings of a sampler for a few quick evaluations.
fn quick(sampler: Sampler) -> Settings {
    Settings {
        prompt: "cat".into(),
        negative_prompt: "dog".into(),
        steps: 3,
        guidance: 3.0,
        seed: 5,
        sampler,
        tolerance: 5.0,
        ..Settings::default()
    }
}

#[test]
fn a_batch_gives_each_input_the_very_bits_it_gets_alone_with_every_sampler() {
    let LowRes::Latents(first) = low_res("latents-8x12.safetensors") else {
        panic!("latents");
    };
    let second = LowRes::Latents((&first * -0.5).unwrap());
    let inputs = [LowRes::Latents(first), second];
    let mut upscaler = upscaler(model(), DType::F32);
    upscaler.send_previews();
    for sampler in Sampler::ALL {
        let mut settings = quick(sampler);
        settings.scale = Enlargement::Four;
        let mut shown = [0, 0];
        let mut watch = |event| {
            if let Event::Preview { index, .. } = event {
                shown[index] += 1;
            }
            Ok(())
        };
        let together = upscaler.upscale(&inputs, &settings, &mut watch).unwrap();
        for (index, (input, together)) in std::iter::zip(&inputs, together).enumerate() {
            let (alone, evaluations) = upscale(&mut upscaler, &settings, input);
            assert_eq!(
                values(&alone),
                values(&together.latents().unwrap()),
                "{sampler}"
            );
            assert_eq!(evaluations, together.evaluations, "{sampler}");
            assert_eq!(shown[index], evaluations, "{sampler}: previews");
        }
    }
}

/// Of half precision each evaluation is off by 1e-3 and 1e-2 (precision.rs), which the second and third orders amplify by ten at most: far
/// from what a wrong sampler gives, which is no nearer than another's result, 0.2 and more.
#[test]
fn half_precision_stays_near_float32_with_every_sampler() {
    let input = low_res("latents-8x12.safetensors");
    // The adaptive one's steps are others where the errors are.
    let fixed = || Sampler::ALL.into_iter().filter(|one| one.takes_steps());
    let all = |dtype| -> Vec<Tensor> {
        let mut upscaler = upscaler(model(), dtype);
        let one = |sampler| upscale(&mut upscaler, &quick(sampler), &input).0;
        fixed().map(one).collect()
    };
    let exact = all(DType::F32);
    for (dtype, bound) in [(DType::F16, 1e-2), (DType::BF16, 1e-1)] {
        for ((sampler, half), exact) in fixed().zip(all(dtype)).zip(&exact) {
            assert_close(&format!("{sampler} in {dtype:?}"), &half, exact, bound);
        }
        let mut upscaler = upscaler(ModelFiles::built_in(), dtype);
        let adaptive = quick(Sampler::DpmAdaptive);
        let image = low_res("square-64x64.png");
        let (latents, evaluations) = upscale(&mut upscaler, &adaptive, &image);
        println!("dpm-adaptive in {dtype:?}: {evaluations} evaluations");
        assert!(values(&latents).iter().all(|v| v.is_finite()));
    }
}

#[test]
fn numbers_that_overflow_are_caught_and_done_again_with_every_sampler() {
    for sampler in Sampler::ALL {
        let mut exact = upscaler(model(), DType::F32);
        let infinite = LowRes::latents(8, 8, vec![f32::INFINITY; 4 * 8 * 8]).unwrap();
        let settings = quick(sampler);
        let error = exact.upscale(&[infinite], &settings, &mut |_| Ok(()));
        let error = error.unwrap_err();
        assert!(error.is::<NotFinite>(), "{sampler}: {error:#}");
        // Values that float16 cannot hold, which float32 can.
        let values = (0..4 * 64).map(|i| if i % 7 == 0 { 9e4 } else { -9e4 });
        let large = LowRes::latents(8, 8, values.collect()).unwrap();
        let mut upscaler = upscaler(model(), DType::F16);
        let mut warnings = Vec::new();
        let mut watch = |event| {
            if let Event::Warning(text) = event {
                warnings.push(text);
            }
            Ok(())
        };
        let again = upscaler.upscale(std::slice::from_ref(&large), &settings, &mut watch);
        let again = again.unwrap()[0].latents().unwrap();
        assert!(warnings[0].contains("float32"), "{sampler}: {warnings:?}");
        let expected = exact.upscale(&[large], &settings, &mut |_| Ok(()));
        let expected = expected.unwrap()[0].latents().unwrap();
        assert_eq!(
            crate::common::values(&again),
            crate::common::values(&expected),
            "{sampler}"
        );
    }
}

#[test]
fn what_a_sampler_keeps_is_planned_for() {
    let mut upscaler = upscaler(model(), DType::F32);
    let work = PlanFor {
        width: 256,
        height: 128,
        input: InputKind::Latents,
        to_picture: false,
    };
    let mut peak = |sampler| {
        let settings = Settings {
            guidance: 1.0,
            ..quick(sampler)
        };
        upscaler.plan(work, &settings).unwrap()[0].peak
    };
    // Of 64x32 positions, 4 channels in float32: x, two slopes, and two results.
    let more = peak(Sampler::DpmAdaptive) - peak(Sampler::Euler);
    assert_eq!(more, 5 * 4 * 4 * 64 * 32);
    let more = peak(Sampler::Dpmpp2m) - peak(Sampler::EulerAncestral);
    assert_eq!(more, 4 * 4 * 64 * 32);
}

#[test]
fn numbers_out_of_their_range_are_refused() {
    let mut upscaler = upscaler(model(), DType::F32);
    let plain = quick(Sampler::EulerAncestral);
    for (settings, said) in [
        (
            Settings {
                eta: 1.5,
                ..plain.clone()
            },
            "an eta of 1.5",
        ),
        (
            Settings {
                eta: f64::NAN,
                ..plain.clone()
            },
            "an eta of NaN",
        ),
        (
            Settings {
                tolerance: 0.0,
                ..plain.clone()
            },
            "a tolerance of 0",
        ),
        (
            Settings {
                tolerance: f64::INFINITY,
                ..plain.clone()
            },
            "a tolerance of inf",
        ),
        (
            Settings {
                steps: 0,
                ..plain.clone()
            },
            "at least one step",
        ),
    ] {
        let input = low_res("latents-8x12.safetensors");
        let error = upscaler.upscale(&[input], &settings, &mut |_| Ok(()));
        let error = error.unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}
