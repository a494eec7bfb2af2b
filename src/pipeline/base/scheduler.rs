//! What `scheduler/scheduler_config.json` of a Stable Diffusion checkpoint says: which sampler, over which times. Numbers are float32
//! where diffusers' are, since `1 - alpha` loses digits there.

use anyhow::{Result, anyhow, bail, ensure};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::model::{ModelFiles, within};
use crate::pipeline::schedule::{SchedulerConfig, karras, sigma};

const FILE: &str = "scheduler/scheduler_config.json";

/// What steps are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    /// Pseudo linear multistep (PLMS), whose first step is done again.
    Pndm,
    Ddim,
    Euler,
    /// DPM-Solver++ in several steps.
    Dpm(Dpm),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dpm {
    pub second_order: bool,
    /// Its second order by the trapezoid, in place of the midpoint.
    pub heun: bool,
    pub lower_order_final: bool,
    pub euler_at_final: bool,
    pub ends_at_zero: bool,
}

/// What the network's output is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Prediction {
    /// The noise.
    Epsilon,
    /// `sqrt(a) noise - sqrt(1 - a) sample`
    V,
    Sample,
}

/// How the times of the training are thinned out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spacing {
    Leading,
    Linspace,
    Trailing,
}

/// The file, as far as it matters here; absent keys take the default of the class.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    #[serde(rename = "_class_name")]
    class_name: String,
    prediction_type: Option<String>,
    timestep_spacing: Option<String>,
    final_sigmas_type: Option<String>,
    set_alpha_to_one: Option<bool>,
    skip_prk_steps: bool,
    use_karras_sigmas: bool,
    algorithm_type: Option<String>,
    solver_order: Option<usize>,
    solver_type: Option<String>,
    lower_order_final: Option<bool>,
    euler_at_final: bool,
    interpolation_type: Option<String>,
    sigma_min: Option<f64>,
    sigma_max: Option<f64>,
}

/// Keys that change the maths in ways that no Stable Diffusion 1 or 2 checkpoint has, where they are neither null nor false.
const REFUSED: [&str; 7] = [
    "trained_betas",
    "thresholding",
    "rescale_betas_zero_snr",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
];

/// A checkpoint's sampler.
#[derive(Clone, Debug)]
pub struct BaseScheduler {
    pub(super) method: Method,
    pub(super) prediction: Prediction,
    spacing: Spacing,
    karras: bool,
    sigma_range: (Option<f64>, Option<f64>),
    /// Of every time of the training.
    pub(super) alphas_cumprod: Vec<f32>,
    /// Where a step leads behind the first time.
    pub(super) final_alpha: f32,
    final_sigma: f32,
}

/// The times of a run and what goes with them, from the noisiest on.
#[derive(Clone, Debug, PartialEq)]
pub struct Times {
    /// What the network is told at each call.
    pub timesteps: Vec<f32>,
    /// Noise levels, one more than calls; empty where the sampler has none.
    pub sigmas: Vec<f32>,
    /// Training times between two steps.
    pub(super) stride: i64,
}

impl BaseScheduler {
    /// Reads `scheduler/scheduler_config.json`, mended as diffusers' Stable Diffusion pipelines do: `steps_offset` is 1, and nothing is
    /// clipped.
    ///
    /// # Errors
    /// The file is missing or damaged, or names a sampler, or a kind of it, that is not known here.
    pub fn load(files: &ModelFiles) -> Result<Self> {
        Self::from_json(files.json(FILE)?)
    }

    /// The same from the file's content.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_json(content: Map<String, Value>) -> Result<Self> {
        let config = Config::deserialize(&content).map_err(|why| anyhow!("{FILE}: {why}"))?;
        let table =
            SchedulerConfig::deserialize(&content).map_err(|why| anyhow!("{FILE}: {why}"))?;
        Self::new(&config, &table, &content)
    }

    fn new(config: &Config, table: &SchedulerConfig, all: &Map<String, Value>) -> Result<Self> {
        for key in REFUSED {
            let set = all
                .get(key)
                .is_some_and(|value| !matches!(value, Value::Null | Value::Bool(false)));
            ensure!(
                !set,
                "{FILE}: {key} is set, which no Stable Diffusion 1 or 2 checkpoint has; it is not supported"
            );
        }
        let alphas_cumprod = table.checked_alphas_cumprod()?;
        let Some(&first) = alphas_cumprod.first() else {
            bail!("{FILE}: num_train_timesteps is 0");
        };
        let zero = match config.final_sigmas_type.as_deref() {
            None | Some("zero") => true,
            Some("sigma_min") => false,
            Some(other) => {
                bail!("{FILE}: final_sigmas_type `{other}` is not known (zero, sigma_min)")
            }
        };
        let method = method(config, zero)?;
        let prediction = match config.prediction_type.as_deref() {
            None | Some("epsilon") => Prediction::Epsilon,
            Some("v_prediction") => Prediction::V,
            Some("sample" | "original_sample") if method != Method::Pndm => Prediction::Sample,
            Some(other) => bail!(
                "{FILE}: prediction_type `{other}` is not known for {}",
                config.class_name
            ),
        };
        let spacing = match (config.timestep_spacing.as_deref(), method) {
            (Some("leading"), _) | (None, Method::Pndm | Method::Ddim) => Spacing::Leading,
            (Some("linspace"), _) | (None, _) => Spacing::Linspace,
            (Some("trailing"), _) => Spacing::Trailing,
            (Some(other), _) => bail!(
                "{FILE}: timestep_spacing `{other}` is not known (leading, linspace, trailing)"
            ),
        };
        let to_one = config.set_alpha_to_one.unwrap_or(method == Method::Ddim);
        let has_sigmas = matches!(method, Method::Euler | Method::Dpm(_));
        for (key, sigma) in [
            ("sigma_min", config.sigma_min),
            ("sigma_max", config.sigma_max),
        ] {
            sigma.map_or(Ok(()), |sigma| {
                within(&format!("{FILE}: {key}"), sigma, 1e-5..=1e5)
            })?;
        }
        Ok(Self {
            method,
            prediction,
            spacing,
            karras: has_sigmas && config.use_karras_sigmas,
            // Euler alone heeds them.
            sigma_range: if method == Method::Euler {
                (config.sigma_min, config.sigma_max)
            } else {
                (None, None)
            },
            final_alpha: if to_one { 1.0 } else { first },
            final_sigma: if zero { 0.0 } else { sigma(first) },
            alphas_cumprod,
        })
    }

    /// The times of a run of so many steps, of which there is one at least.
    pub fn times(&self, steps: usize) -> Times {
        let steps = steps.max(1);
        let timesteps = match self.method {
            Method::Pndm => twice_the_second(self.whole_times(steps)),
            Method::Ddim | Method::Dpm(_) => self.whole_times(steps),
            Method::Euler => self.times_of_euler(steps),
        };
        let stride = (self.trained() / steps) as i64;
        if matches!(self.method, Method::Pndm | Method::Ddim) {
            let timesteps = timesteps.iter().map(|&time| time as f32).collect();
            return Times {
                timesteps,
                sigmas: Vec::new(),
                stride,
            };
        }
        let table: Vec<f32> = self
            .alphas_cumprod
            .iter()
            .map(|&alpha| sigma(alpha))
            .collect();
        let (mut sigmas, timesteps): (Vec<f32>, _) = if self.karras {
            self.by_karras(&table, &timesteps, steps)
        } else {
            let sigmas = timesteps
                .iter()
                .map(|&time| interpolated(&table, time) as f32)
                .collect();
            (sigmas, timesteps.iter().map(|&time| time as f32).collect())
        };
        sigmas.push(self.final_sigma);
        Times {
            timesteps,
            sigmas,
            stride,
        }
    }

    fn last_time(&self) -> f64 {
        (self.trained() - 1) as f64
    }

    fn trained(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// Times that are whole numbers of the training's.
    fn whole_times(&self, steps: usize) -> Vec<f64> {
        const OFFSET: usize = 1; // what `steps_offset` is mended to
        let trained = self.trained();
        let dpm = matches!(self.method, Method::Dpm(_));
        // DPM-Solver++ takes one more and drops the last.
        let extra = usize::from(dpm);
        match self.spacing {
            Spacing::Leading => {
                let ratio = trained / (steps + extra);
                (extra..steps + extra)
                    .rev()
                    .map(|k| (k * ratio + OFFSET) as f64)
                    .collect()
            }
            Spacing::Linspace => linspace(self.last_time(), steps + extra)
                .skip(extra)
                .map(f64::round_ties_even)
                .rev()
                .collect(),
            Spacing::Trailing => trailing(trained, steps),
        }
    }

    fn times_of_euler(&self, steps: usize) -> Vec<f64> {
        match self.spacing {
            // float32 there
            Spacing::Linspace => linspace(self.last_time(), steps)
                .map(|time| f64::from(time as f32))
                .rev()
                .collect(),
            Spacing::Leading | Spacing::Trailing => self.whole_times(steps),
        }
    }

    /// Noise levels by Karras et al., and the times that have them.
    fn by_karras(&self, table: &[f32], timesteps: &[f64], steps: usize) -> (Vec<f32>, Vec<f32>) {
        let ends = match self.method {
            Method::Dpm(_) => (f64::from(table[0]), f64::from(table[table.len() - 1])),
            _ => {
                let at = |time: Option<&f64>| time.map_or(0.0, |&time| interpolated(table, time));
                (at(timesteps.last()), at(timesteps.first()))
            }
        };
        let (min, max) = self.sigma_range;
        let range = (min.unwrap_or(ends.0), max.unwrap_or(ends.1));
        let sigmas: Vec<f64> = karras(range, steps).collect();
        let logs: Vec<f64> = table.iter().map(|&sigma| f64::from(sigma.ln())).collect();
        let times = sigmas.iter().map(|&sigma| {
            let time = time_of(sigma, &logs);
            let rounds = matches!(self.method, Method::Dpm(_));
            (if rounds { time.round_ties_even() } else { time }) as f32
        });
        (
            sigmas.iter().map(|&sigma| sigma as f32).collect(),
            times.collect(),
        )
    }

    /// What the first noise is multiplied by.
    pub fn initial_spread(&self, times: &Times) -> f32 {
        if self.method != Method::Euler {
            return 1.0;
        }
        let most = times.sigmas.iter().copied().fold(0.0, f32::max);
        match self.spacing {
            Spacing::Leading => (most * most + 1.0).sqrt(),
            Spacing::Linspace | Spacing::Trailing => most,
        }
    }
}

fn method(config: &Config, ends_at_zero: bool) -> Result<Method> {
    Ok(match &*config.class_name {
        "PNDMScheduler" => {
            ensure!(
                config.skip_prk_steps,
                "{FILE}: PNDMScheduler with skip_prk_steps false is not supported; Stable Diffusion's checkpoints have it true"
            );
            Method::Pndm
        }
        "DDIMScheduler" => Method::Ddim,
        "EulerDiscreteScheduler" => {
            let interpolation = config.interpolation_type.as_deref().unwrap_or("linear");
            ensure!(
                interpolation == "linear",
                "{FILE}: interpolation_type `{interpolation}` is not supported for a base checkpoint (linear)"
            );
            Method::Euler
        }
        "DPMSolverMultistepScheduler" => Method::Dpm(dpm(config, ends_at_zero)?),
        "" => bail!("{FILE}: _class_name is missing, which says what the sampler is"),
        other => bail!(
            "{FILE}: the sampler {other} is not supported; expected PNDMScheduler, DDIMScheduler, EulerDiscreteScheduler or DPMSolverMultistepScheduler"
        ),
    })
}

fn dpm(config: &Config, ends_at_zero: bool) -> Result<Dpm> {
    let algorithm = config.algorithm_type.as_deref().unwrap_or("dpmsolver++");
    ensure!(
        algorithm == "dpmsolver++",
        "{FILE}: algorithm_type `{algorithm}` is not supported (dpmsolver++)"
    );
    let order = config.solver_order.unwrap_or(2);
    ensure!(
        (1..=2).contains(&order),
        "{FILE}: solver_order {order} is not supported (1 and 2)"
    );
    let heun = match config.solver_type.as_deref() {
        None | Some("midpoint" | "logrho" | "bh1" | "bh2") => false,
        Some("heun") => true,
        Some(other) => bail!("{FILE}: solver_type `{other}` is not known (midpoint, heun)"),
    };
    Ok(Dpm {
        second_order: order == 2,
        heun,
        lower_order_final: config.lower_order_final.unwrap_or(true),
        euler_at_final: config.euler_at_final,
        ends_at_zero,
    })
}

/// PNDM's list: the second entry twice, since the first step is done again.
fn twice_the_second(mut times: Vec<f64>) -> Vec<f64> {
    if let Some(&second) = times.get(1) {
        times.insert(1, second);
    }
    times
}

/// `numpy.round(numpy.arange(trained, 0, -trained / steps)) - 1`
fn trailing(trained: usize, steps: usize) -> Vec<f64> {
    let ratio = trained as f64 / steps as f64;
    let count = (trained as f64 / ratio).ceil() as usize;
    (0..count)
        .map(|k| (trained as f64 - k as f64 * ratio).round_ties_even() - 1.0)
        .collect()
}

/// `numpy.linspace(0, last, count)`
fn linspace(last: f64, count: usize) -> impl DoubleEndedIterator<Item = f64> + ExactSizeIterator {
    let step = last / (count.max(2) - 1) as f64;
    (0..count).map(move |i| {
        if i > 0 && i + 1 == count {
            last
        } else {
            i as f64 * step
        }
    })
}

/// `numpy.interp` in a table of values at 0, 1, 2 and so on.
fn interpolated(table: &[f32], time: f64) -> f64 {
    let last = table.len() - 1;
    let time = time.clamp(0.0, last as f64);
    let low = (time.floor() as usize).min(last);
    let high = (low + 1).min(last);
    let (a, b) = (f64::from(table[low]), f64::from(table[high]));
    (b - a) * (time - low as f64) + a
}

/// The time in the training that has a noise level, between two where it lies between.
fn time_of(sigma: f64, logs: &[f64]) -> f64 {
    let log = sigma.max(1e-10).ln();
    let below = logs.partition_point(|&value| value <= log);
    let low = below.saturating_sub(1).min(logs.len().saturating_sub(2));
    let high = (low + 1).min(logs.len() - 1);
    if low == high {
        return low as f64;
    }
    let weight = ((logs[low] - log) / (logs[low] - logs[high])).clamp(0.0, 1.0);
    (1.0 - weight) * low as f64 + weight * high as f64
}
