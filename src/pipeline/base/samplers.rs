//! The samplers of Stable Diffusion's checkpoints: plain functions over their times and a `predict` closure, which is told what the
//! network is given, (b, 4, h, w), float32, and its time, and gives what it predicts. Names are the papers'.

use anyhow::{Result, ensure};
use candle_core::Tensor;

use super::scheduler::{BaseScheduler, Dpm, Method, Prediction, Times};
use crate::pipeline::sampler::step::{mixed, moved, slope};

/// `alpha` and `sigma` of DPM-Solver++ for a noise level: the shares of sample and noise where their squares sum to 1.
fn alpha_sigma(sigma: f32) -> (f32, f32) {
    let alpha = 1.0 / (sigma * sigma + 1.0).sqrt();
    (alpha, sigma * alpha)
}

/// Half the logarithm of the ratio of signal to noise.
fn lambda(sigma: f32) -> f32 {
    let (alpha, sigma) = alpha_sigma(sigma);
    alpha.ln() - sigma.ln()
}

impl BaseScheduler {
    /// Runs the sampler from `x` (b, 4, h, w), float32, at `times.timesteps[start]` to the end.
    ///
    /// # Errors
    /// Those of `predict`; `start` is beyond the times.
    pub fn run(
        &self,
        x: Tensor,
        times: &Times,
        start: usize,
        predict: impl FnMut(&Tensor, f32) -> Result<Tensor>,
    ) -> Result<Tensor> {
        ensure!(start < times.timesteps.len(), "no step is left to run");
        match self.method {
            Method::Pndm => self.pndm(x, times, start, predict),
            Method::Ddim => self.ddim(x, times, start, predict),
            Method::Euler => self.euler(x, times, start, predict),
            Method::Dpm(kind) => self.dpm_solver(kind, x, times, start, predict),
        }
    }

    /// A sample (b, 4, h, w) with as much noise as the run has at `times.timesteps[start]`.
    ///
    /// # Errors
    /// candle's own only.
    pub fn noised(
        &self,
        x: &Tensor,
        noise: &Tensor,
        times: &Times,
        start: usize,
    ) -> Result<Tensor> {
        let (signal, spread) = match self.method {
            Method::Pndm | Method::Ddim => {
                let alpha = self.alpha(times.timesteps[start] as i64);
                (alpha.sqrt(), (1.0 - alpha).sqrt())
            }
            Method::Euler => (1.0, times.sigmas[start]),
            Method::Dpm(_) => alpha_sigma(times.sigmas[start]),
        };
        mixed(signal, x, spread, noise)
    }

    /// The cumulative product at a time; before the first one the final one.
    fn alpha(&self, time: i64) -> f32 {
        let found = usize::try_from(time)
            .ok()
            .and_then(|time| self.alphas_cumprod.get(time));
        found.copied().unwrap_or(self.final_alpha)
    }

    /// Liu et al. (2022) without Runge-Kutta steps: linear multistep, of the fourth order from the fourth step on. The first step is done
    /// again, with the mean of the outputs at both its ends.
    fn pndm(
        &self,
        mut x: Tensor,
        times: &Times,
        start: usize,
        mut predict: impl FnMut(&Tensor, f32) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut outputs: Vec<Tensor> = Vec::new();
        let mut first = None;
        for (counter, &time) in times.timesteps[start..].iter().enumerate() {
            let output = predict(&x, time)?;
            let time = time as i64;
            if counter == 1 {
                let last = outputs.last().unwrap_or(&output);
                let mean = mixed(0.5, &output, 0.5, last)?;
                let from = first.take().unwrap_or(x);
                x = self.transfer(&from, &mean, time + times.stride, time)?;
                continue;
            }
            outputs.push(output);
            if outputs.len() > 4 {
                outputs.remove(0);
            }
            let weights: &[f32] = match outputs.len() {
                1 => &[1.0],
                2 => &[-1.0 / 2.0, 3.0 / 2.0],
                3 => &[5.0 / 12.0, -16.0 / 12.0, 23.0 / 12.0],
                _ => &[-9.0 / 24.0, 37.0 / 24.0, -59.0 / 24.0, 55.0 / 24.0],
            };
            let mut sum = (&outputs[0] * f64::from(weights[0]))?;
            for (output, &weight) in outputs.iter().zip(weights).skip(1) {
                sum = (sum + (output * f64::from(weight))?)?;
            }
            let next = self.transfer(&x, &sum, time, time - times.stride)?;
            if counter == 0 {
                first = Some(x);
            }
            x = next;
        }
        Ok(x)
    }

    /// PNDM's eq. 9: from one time to another by an output.
    fn transfer(&self, x: &Tensor, output: &Tensor, from: i64, to: i64) -> Result<Tensor> {
        let (a, p) = (self.alpha(from), self.alpha(to));
        let (beta_a, beta_p) = (1.0 - a, 1.0 - p);
        let noise = match self.prediction {
            Prediction::V => &mixed(a.sqrt(), output, beta_a.sqrt(), x)?,
            Prediction::Epsilon | Prediction::Sample => output,
        };
        let divisor = a * beta_p.sqrt() + (a * beta_a * p).sqrt();
        mixed((p / a).sqrt(), x, -(p - a) / divisor, noise)
    }

    /// Song et al. (2021), eq. 12 with eta 0.
    fn ddim(
        &self,
        mut x: Tensor,
        times: &Times,
        start: usize,
        mut predict: impl FnMut(&Tensor, f32) -> Result<Tensor>,
    ) -> Result<Tensor> {
        for &time in &times.timesteps[start..] {
            let output = predict(&x, time)?;
            let time = time as i64;
            let (a, p) = (self.alpha(time), self.alpha(time - times.stride));
            let (signal, spread) = (a.sqrt(), (1.0 - a).sqrt());
            let (denoised, noise) = match self.prediction {
                Prediction::Epsilon => {
                    let denoised = (moved(&x, &output, -spread)? / f64::from(signal))?;
                    (denoised, output)
                }
                Prediction::V => (
                    mixed(signal, &x, -spread, &output)?,
                    mixed(signal, &output, spread, &x)?,
                ),
                Prediction::Sample => {
                    let noise = (moved(&x, &output, -signal)? / f64::from(spread))?;
                    (output, noise)
                }
            };
            x = mixed(p.sqrt(), &denoised, (1.0 - p).sqrt(), &noise)?;
        }
        Ok(x)
    }

    /// Euler's method over noise levels, in the scale of Karras et al.
    fn euler(
        &self,
        mut x: Tensor,
        times: &Times,
        start: usize,
        mut predict: impl FnMut(&Tensor, f32) -> Result<Tensor>,
    ) -> Result<Tensor> {
        for (&time, pair) in times
            .timesteps
            .iter()
            .zip(times.sigmas.windows(2))
            .skip(start)
        {
            let (sigma, next) = (pair[0], pair[1]);
            let variance = sigma * sigma + 1.0;
            let output = predict(&(&x / f64::from(variance.sqrt()))?, time)?;
            let denoised = match self.prediction {
                Prediction::Epsilon => moved(&x, &output, -sigma)?,
                Prediction::V => mixed(1.0 / variance, &x, -sigma / variance.sqrt(), &output)?,
                Prediction::Sample => output,
            };
            x = moved(&x, &slope(&x, &denoised, sigma)?, next - sigma)?;
        }
        Ok(x)
    }

    /// DPM-Solver++ (Lu et al., 2022), 2M: data prediction, first and second order.
    fn dpm_solver(
        &self,
        kind: Dpm,
        mut x: Tensor,
        times: &Times,
        start: usize,
        mut predict: impl FnMut(&Tensor, f32) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let count = times.timesteps.len();
        let mut before: Option<Tensor> = None;
        for index in start..count {
            let output = predict(&x, times.timesteps[index])?;
            let (sigma, next) = (times.sigmas[index], times.sigmas[index + 1]);
            let (alpha, spread) = alpha_sigma(sigma);
            let denoised = match self.prediction {
                Prediction::Epsilon => (moved(&x, &output, -spread)? / f64::from(alpha))?,
                Prediction::V => mixed(alpha, &x, -spread, &output)?,
                Prediction::Sample => output,
            };
            let last = index + 1 == count
                && (kind.euler_at_final
                    || kind.ends_at_zero
                    || (kind.lower_order_final && count < 15));
            let (next_alpha, next_spread) = alpha_sigma(next);
            let h = lambda(next) - lambda(sigma);
            let step = -next_alpha * ((-h).exp() - 1.0);
            x = mixed(next_spread / spread, &x, step, &denoised)?;
            if let Some(before) = before.filter(|_| kind.second_order && !last) {
                let ratio = (lambda(sigma) - lambda(times.sigmas[index - 1])) / h;
                let slope = ((&denoised - before)? / f64::from(ratio))?;
                let weight = if kind.heun {
                    next_alpha * (((-h).exp() - 1.0) / h + 1.0)
                } else {
                    0.5 * step
                };
                x = moved(&x, &slope, weight)?;
            }
            before = Some(denoised);
        }
        Ok(x)
    }
}
