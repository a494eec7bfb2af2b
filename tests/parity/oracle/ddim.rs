//! DDIM against candle-transformers' own, the one of its samplers that is one of ours. It agrees where times are `leading` and the last step ends at
//! the first alpha; its `linspace` cuts fractions off where diffusers rounds, and it has no final alpha of 1. Its UniPC is no sampler of ours.

use candle_core::{Device, Tensor};
use candle_transformers::models::stable_diffusion::ddim::DDIMSchedulerConfig;
use candle_transformers::models::stable_diffusion::schedulers::{PredictionType, SchedulerConfig};
use sd_upscale::pipeline::base::BaseScheduler;
use serde_json::json;

use crate::common::values;

#[test]
fn ddim_is_candle_transformers() {
    for (name, prediction_type) in [
        ("epsilon", PredictionType::Epsilon),
        ("v_prediction", PredictionType::VPrediction),
    ] {
        let config = json!({
            "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000, "set_alpha_to_one": false, "prediction_type": name,
        });
        let ours = BaseScheduler::from_json(config.as_object().unwrap().clone()).unwrap();
        for steps in [1, 2, 5, 16, 50] {
            let config = DDIMSchedulerConfig {
                prediction_type,
                ..DDIMSchedulerConfig::default()
            };
            let mut theirs = config.build(steps).unwrap();
            let x = Tensor::new(&[0.7f32, -1.1], &Device::Cpu).unwrap();
            let predicted = |x: &Tensor| (x * 0.6).unwrap();
            let mut expected = x.clone();
            for time in theirs.timesteps().to_vec() {
                let output = predicted(&expected);
                expected = theirs.step(&output, time, &expected).unwrap();
            }
            let times = ours.times(steps);
            let found = ours.run(x, &times, 0, |x, _| Ok(predicted(x))).unwrap();
            for (found, expected) in values(&found).into_iter().zip(values(&expected)) {
                // Its alphas are float64, ours float32 as diffusers'.
                let error = (found - expected).abs() / (1.0 + expected.abs());
                assert!(error < 1e-5, "{name} {steps}: {found}, {expected}");
            }
        }
    }
}
