//! What a run of the settings goes through: the sampler's noise levels, and how often the network is evaluated.

use anyhow::Result;
use candle_core::Tensor;

use super::sampler::dpm::{self, Ends, Tolerance};
use super::sampler::step::{AncestralStep, Denoise, Noise};
use super::sampler::{Sampler, dpmpp, euler};
use super::schedule::{self, SigmaRange};
use super::types::Settings;

/// A sampler with all that it takes.
pub struct Course {
    sampler: Sampler,
    /// Of the schedule, where the sampler goes through one; else the range's ends.
    sigmas: Vec<f32>,
    ends: Ends,
    steps: usize,
    eta: f32,
    tolerance: Tolerance,
}

impl Course {
    /// What `settings` mean for a model of this range of noise levels.
    pub fn new(settings: &Settings, range: &SigmaRange) -> Self {
        let sampler = settings.sampler;
        let ends = Ends {
            max: range.max,
            min: range.min,
        };
        Self {
            sampler,
            sigmas: if sampler.takes_a_schedule() {
                schedule::sigmas(settings.schedule, settings.steps, range)
            } else {
                vec![ends.max, ends.min]
            },
            ends,
            steps: settings.steps,
            eta: settings.eta as f32,
            tolerance: Tolerance::scaled(settings.tolerance),
        }
    }

    /// The noise level that it starts from.
    pub fn first(&self) -> f32 {
        self.sigmas[0]
    }

    /// How often the network is evaluated; None where the sampler finds that out.
    pub fn evaluations(&self) -> Option<usize> {
        if !self.sampler.takes_steps() {
            return None;
        }
        if self.sampler.evaluates_once_a_step() {
            return Some(self.steps);
        }
        let eta = if self.sampler.takes_eta() {
            self.eta
        } else {
            0.0
        };
        // A second one but for steps to a noise level of 0.
        let steps = self.sigmas.windows(2);
        let of_step = |pair: &[f32]| {
            let AncestralStep { down, .. } = AncestralStep::new(pair[0], pair[1], eta);
            1 + usize::from(down > 0.0)
        };
        Some(steps.map(of_step).sum())
    }

    /// From `x` (b, c, h, w), noise of the first level's spread, to latents. `come` is told what part of the way is behind it where that
    /// does not follow from the number of evaluations.
    ///
    /// # Errors
    /// Those of the sampler.
    pub fn run(
        &self,
        x: Tensor,
        denoise: Denoise,
        noise: Noise,
        come: &mut dyn FnMut(f64),
    ) -> Result<Tensor> {
        let (sigmas, eta) = (&*self.sigmas, self.eta);
        match self.sampler {
            Sampler::Euler => euler::euler(x, sigmas, denoise),
            Sampler::EulerAncestral => euler::euler_ancestral(x, sigmas, eta, denoise, noise),
            Sampler::Heun => euler::heun(x, sigmas, denoise),
            Sampler::Dpm2 => euler::dpm2(x, sigmas, denoise),
            Sampler::Dpm2Ancestral => euler::dpm2_ancestral(x, sigmas, eta, denoise, noise),
            Sampler::DpmFast => dpm::dpm_fast(x, self.ends, self.steps, eta, denoise, noise),
            Sampler::DpmAdaptive => {
                dpm::dpm_adaptive(x, self.ends, self.tolerance, eta, denoise, noise, come)
            }
            Sampler::Dpmpp2sAncestral => dpmpp::dpmpp_2s_ancestral(x, sigmas, eta, denoise, noise),
            Sampler::Dpmpp2m => dpmpp::dpmpp_2m(x, sigmas, denoise),
        }
    }
}
