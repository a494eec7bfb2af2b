//! DPM-Solver (Lu et al. 2022, arXiv 2206.00927): exact in the part of a step that is linear in x, of the orders 1 to 3 in the noise that
//! the network sees, over t = -ln(sigma), without a schedule.

use anyhow::{Result, bail, ensure};
use candle_core::Tensor;

use super::step::{AncestralStep, Denoise, Noise, level, moved, noised, slope, time};
use crate::pipeline::schedule::linspace;

/// The largest and the smallest noise level.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ends {
    /// Where a run starts.
    pub max: f32,
    /// Where it ends, above 0.
    pub min: f32,
}

impl Ends {
    /// The same in t, the start first.
    fn times(self) -> Result<(f32, f32)> {
        let (start, end) = (time(self.max), time(self.min));
        ensure!(
            start < end,
            "the model's noise levels reach from {} to {}: dpm-fast and dpm-adaptive need a smallest that is smaller",
            self.max,
            self.min
        );
        Ok((start, end))
    }
}

/// DPM-Solver-fast: as many evaluations as `steps`, of which the third order takes three, equally far apart in t. `x` (b, c, h, w) has the
/// largest noise level.
///
/// # Errors
/// The ends are equal; whatever `denoise` and `noise` return.
pub fn dpm_fast(
    mut x: Tensor,
    ends: Ends,
    steps: usize,
    eta: f32,
    denoise: Denoise,
    noise: Noise,
) -> Result<Tensor> {
    let (start, end) = ends.times()?;
    let orders = orders(steps);
    let times = linspace(start, end, orders.len() + 1);
    for (order, pair) in std::iter::zip(orders, times.windows(2)) {
        let (t, next) = (pair[0], pair[1]);
        let Reach { down, up } = Reach::new(t, next, end, eta);
        let solver = Solver::new(&x, t, down, denoise)?;
        x = match order {
            1 => solver.first_order()?,
            2 => {
                let eps_r1 = solver.eps_at(SECOND_R1, denoise)?;
                solver.second_order(SECOND_R1, &eps_r1)?
            }
            _ => {
                let eps_r1 = solver.eps_at(R1, denoise)?;
                solver.third_order(&eps_r1, denoise)?
            }
        };
        x = noised(x, up, eta, noise)?;
    }
    Ok(x)
}

/// The orders of the steps, whose sum is the number of evaluations.
fn orders(evaluations: usize) -> Vec<usize> {
    let thirds = evaluations / 3;
    let (whole, rest): (usize, &[usize]) = match evaluations % 3 {
        0 => (thirds - 1, &[2, 1]),
        1 => (thirds, &[1]),
        _ => (thirds, &[2]),
    };
    [&vec![3; whole], rest].concat()
}

/// How far the two orders of an adaptive step may be apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Of a value itself.
    relative: f32,
    /// Whatever the value.
    absolute: f32,
}

impl Tolerance {
    /// The notebook's `tol_scale`: 0.05 times it of a value, and that many levels of a half of 255.
    pub fn scaled(by: f64) -> Self {
        Self {
            relative: (0.05 * by) as f32,
            absolute: (by / 127.5) as f32,
        }
    }
}

/// The steps that were tried without coming to the end, after which it is given up: no sensible tolerance needs a hundredth.
const MOST_STEPS: usize = 1000;

/// The estimated error is not a number: what the network gave is none.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the sampler's error is not a number")]
pub struct NotANumber;

/// DPM-Solver of the orders 2 and 3: three evaluations a step, as far as the difference of the two allows; one that went too far is done
/// again, shorter, and nothing is drawn for it. `x` (1, c, h, w): the steps are those of one picture. `come` is told after
/// each step what part of the way in t is behind it.
///
/// # Errors
/// The ends are equal; [`NotANumber`]; a tolerance that is never met; whatever `denoise` and `noise` return.
pub fn dpm_adaptive(
    mut x: Tensor,
    ends: Ends,
    tolerance: Tolerance,
    eta: f32,
    denoise: Denoise,
    noise: Noise,
    come: &mut dyn FnMut(f64),
) -> Result<Tensor> {
    ensure!(
        x.dim(0)? == 1,
        "dpm-adaptive takes steps of its own for each picture: one at a time"
    );
    const ORDER: f64 = 3.0;
    let (start, end) = ends.times()?;
    let mut steps = StepSize::new(if eta > 0.0 { 1.5 } else { ORDER });
    let mut s = start;
    let mut x_before = x.clone();
    for _ in 0..MOST_STEPS {
        if s >= end - 1e-5 {
            return Ok(x);
        }
        let t = end.min(s + steps.h as f32);
        let Reach { down, up } = Reach::new(s, t, end, eta);
        let solver = Solver::new(&x, s, down, denoise)?;
        let eps_r1 = solver.eps_at(R1, denoise)?;
        let x_low = solver.second_order(R1, &eps_r1)?;
        let x_high = solver.third_order(&eps_r1, denoise)?;
        let error = tolerance.error(&x_low, &x_high, &x_before)?;
        ensure!(!error.is_nan(), NotANumber);
        if steps.accepts(error) {
            x = noised(x_high, up, eta, noise)?;
            x_before = x_low;
            s = t;
            come(f64::from((s - start) / (end - start)));
        }
    }
    bail!(
        "dpm-adaptive is {:.0} % of the way after {MOST_STEPS} steps: its tolerance asks for more than the model's precision gives; raise --tolerance",
        100.0 * (s - start) / (end - start)
    )
}

impl Tolerance {
    /// The difference of the two orders in terms of what is allowed, the root of its mean square.
    fn error(&self, x_low: &Tensor, x_high: &Tensor, x_before: &Tensor) -> Result<f64> {
        let size = x_low.abs()?.maximum(&x_before.abs()?)?;
        let allowed = (size * f64::from(self.relative))?.maximum(f64::from(self.absolute))?;
        let squares = ((x_low - x_high)? / allowed)?.sqr()?;
        let count = squares.elem_count() as f64;
        // A side after the other: sums of few values lose least in float32.
        let sum = squares.sum(3)?.sum(2)?.sum(1)?.squeeze(0)?;
        Ok((f64::from(sum.to_scalar::<f32>()?) / count).sqrt())
    }
}

/// A step's length in t, by a controller of the error's size and of how it changes (PI).
struct StepSize {
    h: f64,
    /// One over the errors of this step and of the two before it.
    inverse: Option<[f64; 3]>,
    order: f64,
}

impl StepSize {
    const FIRST: f64 = 0.05;
    /// The notebook's.
    const PROPORTIONAL: f64 = 0.2;
    const INTEGRAL: f64 = 0.4;
    /// A step is done again where the next one would be shorter than this part of it.
    const SAFETY: f64 = 0.81;

    fn new(order: f64) -> Self {
        Self {
            h: Self::FIRST,
            inverse: None,
            order,
        }
    }

    /// Whether a step of this error counts. Either way the next one has another length.
    fn accepts(&mut self, error: f64) -> bool {
        let now = 1.0 / (error + 1e-8);
        let inverse = self.inverse.get_or_insert([now; 3]);
        inverse[0] = now;
        let of_now = inverse[0].powf((Self::PROPORTIONAL + Self::INTEGRAL) / self.order);
        let of_before = inverse[1].powf(-Self::PROPORTIONAL / self.order);
        let factor = 1.0 + (of_now * of_before - 1.0).atan();
        let accepted = factor >= Self::SAFETY;
        if accepted {
            inverse[2] = inverse[1];
            inverse[1] = inverse[0];
        }
        self.h *= factor;
        accepted
    }
}

/// An ancestral step in t: to `down`, no further than the end, and noise of the spread `up` from there.
struct Reach {
    down: f32,
    up: f32,
}

impl Reach {
    fn new(t: f32, next: f32, end: f32, eta: f32) -> Self {
        if eta == 0.0 {
            return Self {
                down: next,
                up: 0.0,
            };
        }
        let below = AncestralStep::new(level(t), level(next), eta).down;
        let down = end.min(time(below));
        let square = level(next).powi(2) - level(down).powi(2);
        Self {
            down,
            // Rounding can make it negative.
            up: square.max(0.0).sqrt(),
        }
    }
}

/// Where the third order's evaluations are, of a step.
const R1: f32 = 1.0 / 3.0;
const R2: f32 = 2.0 / 3.0;
/// And the second order's own.
const SECOND_R1: f32 = 0.5;

/// A step of one of the orders.
struct Solver<'a> {
    x: &'a Tensor,
    t: f32,
    next: f32,
    h: f32,
    /// The noise in x, as the network sees it.
    eps: Tensor,
}

impl<'a> Solver<'a> {
    fn new(x: &'a Tensor, t: f32, next: f32, denoise: Denoise) -> Result<Self> {
        Ok(Self {
            x,
            t,
            next,
            h: next - t,
            eps: eps(x, t, denoise)?,
        })
    }

    /// The noise at a part of the step, by the first order.
    fn eps_at(&self, r: f32, denoise: Denoise) -> Result<Tensor> {
        let s = self.t + r * self.h;
        let u = moved(self.x, &self.eps, -level(s) * (r * self.h).exp_m1())?;
        eps(&u, s, denoise)
    }

    fn first_order(&self) -> Result<Tensor> {
        moved(self.x, &self.eps, -level(self.next) * self.h.exp_m1())
    }

    /// With the noise at the part `r1`.
    fn second_order(&self, r1: f32, eps_r1: &Tensor) -> Result<Tensor> {
        let by = level(self.next) / (2.0 * r1) * self.h.exp_m1();
        moved(&self.first_order()?, &(eps_r1 - &self.eps)?, -by)
    }

    /// With the noise at [`R1`], and one evaluation more.
    fn third_order(&self, eps_r1: &Tensor, denoise: Denoise) -> Result<Tensor> {
        let s2 = self.t + R2 * self.h;
        let part = R2 * self.h;
        let u2 = moved(self.x, &self.eps, -level(s2) * part.exp_m1())?;
        let bend = level(s2) * (R2 / R1) * (part.exp_m1() / part - 1.0);
        let u2 = moved(&u2, &(eps_r1 - &self.eps)?, -bend)?;
        let eps_r2 = eps(&u2, s2, denoise)?;
        let bend = level(self.next) / R2 * (self.h.exp_m1() / self.h - 1.0);
        moved(&self.first_order()?, &(eps_r2 - &self.eps)?, -bend)
    }
}

fn eps(x: &Tensor, t: f32, denoise: Denoise) -> Result<Tensor> {
    let sigma = level(t);
    slope(x, &denoise(x, sigma)?, sigma)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_orders_of_dpm_fast_add_up_to_the_evaluations() {
        for steps in 1..=1000 {
            assert_eq!(orders(steps).iter().sum::<usize>(), steps);
        }
        assert_eq!(orders(1), [1]);
        assert_eq!(orders(2), [2]);
        assert_eq!(orders(3), [2, 1]);
        assert_eq!(orders(9), [3, 3, 2, 1]);
        assert_eq!(orders(10), [3, 3, 3, 1]);
    }
}
