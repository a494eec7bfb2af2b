//! Schedules and noise: what the sampler starts from and goes through.

use sd_upscale::pipeline::noise::Generator;
use sd_upscale::pipeline::preconditioning::Preconditioning;
use sd_upscale::pipeline::schedule::{self, Schedule, SchedulerConfig};

use crate::common::*;

#[test]
fn schedules() {
    let config: SchedulerConfig = model().json("scheduler/scheduler_config.json").unwrap();
    let range = config.sigma_range().unwrap();
    let reference = Reference::read("schedule");
    let mut cases = 0;
    for schedule in [Schedule::Karras, Schedule::LogLinear] {
        for key in reference.keys() {
            let Some(rest) = key.strip_prefix(schedule.name()) else {
                continue;
            };
            let Some(steps) = rest
                .strip_prefix('.')
                .and_then(|r| r.strip_suffix(".sigmas"))
            else {
                continue;
            };
            let steps: usize = steps.parse().unwrap();
            let sigmas = schedule::sigmas(schedule, steps, &range);
            let expected = values(&reference.get(key));
            assert_eq!(sigmas.len(), expected.len());
            for (sigma, expected) in sigmas.iter().zip(&expected) {
                // the logarithm and the exponential of float32 may differ in their last digits
                assert!(
                    (sigma - expected).abs() <= 2e-6 * expected,
                    "{key}: {sigma} against {expected}"
                );
            }
            let spread = values(&reference.get(&key.replace("sigmas", "init_noise_sigma")))[0];
            let ours = range.initial_spread(sigmas[0]);
            assert!(
                (ours - spread).abs() <= 2e-6 * spread,
                "{key}: starts from {ours}, {spread}"
            );
            let times = reference.get(&key.replace("sigmas", "timesteps"));
            for (sigma, expected) in expected.iter().zip(values(&times)) {
                let time = Preconditioning::new(*sigma).time;
                assert!(
                    (time - expected).abs() <= 1e-6,
                    "{key}: time {time}, {expected}"
                );
            }
            cases += 1;
        }
    }
    assert!(cases >= 12, "only {cases} schedules were compared");
}

#[test]
fn noise_is_that_of_the_reference_generator() {
    let reference = Reference::read("noise");
    // The logarithm, sine and cosine of two libraries differ by a few units in the last place of values up to 5.
    const TOLERANCE: f32 = 2e-6;
    let mut compared = 0;
    for key in reference.keys() {
        let parts: Vec<&str> = key.split('.').collect();
        let ["f32", seed, count, rest @ ..] = &parts[..] else {
            continue;
        };
        let count: usize = count.parse().unwrap();
        let drawn = Generator::new(seed.parse().unwrap()).randn(count);
        let drawn: Vec<f32> = match rest {
            [] => drawn,
            ["first"] => drawn[..64].to_vec(),
            ["last"] => drawn[count - 64..].to_vec(),
            ["every_997th"] => drawn.into_iter().step_by(997).collect(),
            ["sum" | "square_sum"] => continue,
            other => panic!("noise.safetensors: {other:?}"),
        };
        let expected = values(&reference.get(key));
        assert_eq!(drawn.len(), expected.len(), "{key}");
        for (d, e) in drawn.iter().zip(&expected) {
            assert!((d - e).abs() <= TOLERANCE, "{key}: {d} against {e}");
        }
        compared += 1;
    }
    assert!(compared >= 35, "only {compared} draws were compared");
}

#[test]
fn draws_that_follow_each_other_continue_the_generator() {
    let reference = Reference::read("noise");
    for seed in [0u64, 33, (1 << 31) + 9, (1 << 32) + 5, 1 << 63] {
        let mut generator = Generator::new(seed);
        let mut keys: Vec<(usize, usize, String)> = reference
            .keys()
            .into_iter()
            .filter_map(|key| {
                let rest = key.strip_prefix(&format!("sequence.{seed}."))?;
                let (index, count) = rest.split_once('.')?;
                Some((index.parse().ok()?, count.parse().ok()?, key.to_string()))
            })
            .collect();
        keys.sort();
        assert!(keys.len() > 4, "no sequence for seed {seed}");
        for (_, count, key) in keys {
            let drawn = generator.randn(count);
            for (d, e) in drawn.iter().zip(values(&reference.get(&key))) {
                assert!((d - e).abs() <= 2e-6, "{key}: {d} against {e}");
            }
        }
    }
}
