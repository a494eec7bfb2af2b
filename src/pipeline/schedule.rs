//! Noise levels: the range that a model was trained on, and how the steps of a run are spaced in it.

use std::ops::RangeInclusive;

use anyhow::{Result, bail, ensure};
use serde::Deserialize;

use crate::model::within;

/// The longest table of training steps that a configuration may state; models have 1000.
const MOST_TRAIN_STEPS: usize = 1_000_000;

/// How much of a picture becomes noise in one training step: more than float32 can lose, and never all of it.
const BETAS: RangeInclusive<f64> = 1e-7..=0.9999;
/// Noise levels: models have 0.03 to 150, those of zero terminal SNR 4096.
const SIGMAS: RangeInclusive<f64> = 1e-5..=1e5;

/// How the noise levels between the largest and the smallest are spaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// Karras et al. (2022), eq. 5 with rho 7; ends at zero noise.
    Karras,
    /// Evenly spaced in the logarithm, what the published pipeline runs; ends at the smallest sigma.
    LogLinear,
}

impl Schedule {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Schedule::Karras => "karras",
            Schedule::LogLinear => "log-linear",
        }
    }

    /// The name in the metadata of pictures.
    pub fn title(self) -> &'static str {
        match self {
            Schedule::Karras => "Karras",
            Schedule::LogLinear => "Log-linear",
        }
    }
}

/// `scheduler/scheduler_config.json`; absent keys take the defaults of diffusers' EulerDiscreteScheduler.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct SchedulerConfig {
    pub num_train_timesteps: usize,
    pub beta_start: f64,
    pub beta_end: f64,
    pub beta_schedule: String,
    pub trained_betas: Option<Vec<f32>>,
    pub prediction_type: String,
    pub rescale_betas_zero_snr: bool,
    pub sigma_min: Option<f64>,
    pub sigma_max: Option<f64>,
    pub final_sigmas_type: String,
    pub timestep_spacing: String,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            beta_start: 0.0001,
            beta_end: 0.02,
            beta_schedule: "linear".into(),
            trained_betas: None,
            prediction_type: "epsilon".into(),
            rescale_betas_zero_snr: false,
            sigma_min: None,
            sigma_max: None,
            final_sigmas_type: "zero".into(),
            timestep_spacing: "linspace".into(),
        }
    }
}

/// The standard deviations of the noise the model was trained on: what a schedule spans.
#[derive(Clone, Copy, Debug)]
pub struct SigmaRange {
    pub min: f32,
    pub max: f32,
    /// Bounds that the configuration sets for the Karras schedule alone.
    karras: (f64, f64),
    /// What follows the last sigma of the Karras schedule: 0, or the smallest of the training table.
    last: f32,
    /// `timestep_spacing: leading`, which starts from noise of a spread of sqrt(sigma^2 + 1).
    leading: bool,
}

impl SigmaRange {
    /// The spread of the noise that a run starts from (`init_noise_sigma`), given its first sigma.
    pub fn initial_spread(&self, sigma: f32) -> f32 {
        if self.leading {
            (sigma * sigma + 1.0).sqrt()
        } else {
            sigma
        }
    }
}

impl SchedulerConfig {
    /// The range of the training table.
    ///
    /// # Errors
    /// A beta schedule or prediction type that the upscaler's pipeline does not have.
    pub fn sigma_range(&self) -> Result<SigmaRange> {
        self.check_numbers()?;
        if !matches!(&*self.prediction_type, "original_sample" | "sample") {
            bail!(
                "scheduler_config.json: prediction_type `{}` is not supported; the latent upscaler predicts `original_sample`",
                self.prediction_type
            );
        }
        let alphas_cumprod = self.alphas_cumprod()?;
        let (Some(&first), Some(&last)) = (alphas_cumprod.first(), alphas_cumprod.last()) else {
            bail!("scheduler_config.json: num_train_timesteps is 0");
        };
        // The table's ends pass through ln, linspace and exp in float32 (`interpolation_type: log_linear`).
        let (min, max) = (sigma(first).ln().exp(), sigma(last).ln().exp());
        let karras = (
            self.sigma_min.unwrap_or(f64::from(min)),
            self.sigma_max.unwrap_or(f64::from(max)),
        );
        for (low, high) in [(f64::from(min), f64::from(max)), karras] {
            ensure!(
                0.0 < low && low <= high && high.is_finite(),
                "scheduler_config.json: its noise levels (of beta_start, beta_end and num_train_timesteps or trained_betas, or sigma_min and sigma_max) reach from {low} to {high}; expected finite numbers above 0, the larger one last"
            );
        }
        Ok(SigmaRange {
            min,
            max,
            karras,
            leading: self.timestep_spacing == "leading",
            last: match &*self.final_sigmas_type {
                "zero" => 0.0,
                "sigma_min" => sigma(first),
                other => bail!(
                    "scheduler_config.json: final_sigmas_type `{other}` is not known (zero, sigma_min)"
                ),
            },
        })
    }

    fn check_numbers(&self) -> Result<()> {
        let of = |key: &str| format!("scheduler_config.json: {key}");
        within(
            &of("num_train_timesteps"),
            self.num_train_timesteps,
            1..=MOST_TRAIN_STEPS,
        )?;
        within(&of("beta_start"), self.beta_start, BETAS)?;
        within(&of("beta_end"), self.beta_end, BETAS)?;
        if let Some(betas) = &self.trained_betas {
            let number = of("the number of trained_betas");
            within(&number, betas.len(), 1..=MOST_TRAIN_STEPS)?;
            for &beta in betas {
                within(&of("trained_betas"), f64::from(beta), BETAS)?;
            }
        }
        for (key, sigma) in [("sigma_min", self.sigma_min), ("sigma_max", self.sigma_max)] {
            sigma.map_or(Ok(()), |sigma| within(&of(key), sigma, SIGMAS))?;
        }
        let spacing = &*self.timestep_spacing;
        ensure!(
            matches!(spacing, "linspace" | "leading" | "trailing"),
            "scheduler_config.json: timestep_spacing `{spacing}` is not known (linspace, leading, trailing)"
        );
        Ok(())
    }

    /// Of every time of the training, the share of a picture's variance that is not noise.
    ///
    /// # Errors
    /// A number of the file is none that a model can have.
    pub(super) fn checked_alphas_cumprod(&self) -> Result<Vec<f32>> {
        self.check_numbers()?;
        self.alphas_cumprod()
    }

    fn alphas_cumprod(&self) -> Result<Vec<f32>> {
        let steps = self.num_train_timesteps;
        let (start, end) = (self.beta_start, self.beta_end);
        let betas = match (&self.trained_betas, &*self.beta_schedule) {
            (Some(betas), _) => betas.clone(),
            (None, "linear") => linspace(start as f32, end as f32, steps),
            (None, "scaled_linear") => linspace(start.sqrt() as f32, end.sqrt() as f32, steps)
                .into_iter()
                .map(|beta| beta * beta)
                .collect(),
            (None, "squaredcos_cap_v2") => squared_cosine_betas(steps),
            (None, other) => bail!(
                "scheduler_config.json: beta_schedule `{other}` is not known (linear, scaled_linear, squaredcos_cap_v2)"
            ),
        };
        // torch.cumprod of float32 on the CPU accumulates in double precision.
        let mut product = 1.0f64;
        let mut cumprod: Vec<f32> = betas
            .iter()
            .map(|beta| {
                product *= f64::from(1.0 - beta);
                product as f32
            })
            .collect();
        if self.rescale_betas_zero_snr {
            rescale_to_zero_snr(&mut cumprod);
        }
        Ok(cumprod)
    }
}

/// The cosine schedule of Nichol and Dhariwal (2021) with betas capped at 0.999.
fn squared_cosine_betas(steps: usize) -> Vec<f32> {
    let bar = |t: f64| {
        ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2)
            .cos()
            .powi(2)
    };
    let n = steps as f64;
    (0..steps)
        .map(|i| (1.0 - bar((i + 1) as f64 / n) / bar(i as f64 / n)).min(0.999) as f32)
        .collect()
}

/// Algorithm 1 of Lin et al. (2023): the last step carries no signal. diffusers then sets that step to
/// 2^-24, so that sigma stays finite.
fn rescale_to_zero_snr(cumprod: &mut [f32]) {
    let (Some(&first), Some(&last)) = (cumprod.first(), cumprod.last()) else {
        return;
    };
    let (first, last) = (first.sqrt(), last.sqrt());
    for value in cumprod.iter_mut() {
        let root = (value.sqrt() - last) * first / (first - last);
        *value = root * root;
    }
    if let Some(value) = cumprod.last_mut() {
        *value = 2.0f32.powi(-24);
    }
}

/// `torch.linspace` in float32: it counts from both ends towards the middle.
pub(super) fn linspace(start: f32, end: f32, count: usize) -> Vec<f32> {
    if count < 2 {
        return vec![start; count];
    }
    let step = (end - start) / (count - 1) as f32;
    (0..count)
        .map(|i| {
            if i < count / 2 {
                start + step * i as f32
            } else {
                end - step * (count - 1 - i) as f32
            }
        })
        .collect()
}

/// The noise levels of `steps` denoising steps: `steps + 1` sigmas, from the largest down.
pub fn sigmas(schedule: Schedule, steps: usize, range: &SigmaRange) -> Vec<f32> {
    match schedule {
        Schedule::LogLinear => linspace(range.max.ln(), range.min.ln(), steps + 1)
            .into_iter()
            .map(f32::exp)
            .collect(),
        Schedule::Karras => {
            let mut sigmas: Vec<f32> = karras(range.karras, steps)
                .map(|sigma| sigma as f32)
                .collect();
            sigmas.push(range.last);
            sigmas
        }
    }
}

/// Karras et al. (2022), eq. 5: so many noise levels of a range, smallest and largest, from the largest down.
pub(super) fn karras((min, max): (f64, f64), steps: usize) -> impl Iterator<Item = f64> {
    const RHO: f64 = 7.0; // the paper's value, and diffusers'
    let (min, max) = (min.powf(1.0 / RHO), max.powf(1.0 / RHO));
    let ramp = move |i: usize| match steps {
        1 => 0.0,
        _ => i as f64 / (steps - 1) as f64,
    };
    (0..steps).map(move |i| (max + ramp(i) * (min - max)).powf(RHO))
}

/// The noise level of a cumulative product of alphas, in float32 as torch computes it.
pub(super) fn sigma(alpha: f32) -> f32 {
    ((1.0 - alpha) / alpha).sqrt()
}
