//! Samplers: the way from noise to a picture, plain functions over noise levels, a `denoise` closure and a source of noise, a
//! file a family. They are k-diffusion's (0.1.1, `sample_*`), to the order of its draws and of its sums in float32. Nothing here
//! knows a network.

pub mod dpm;
pub mod dpmpp;
pub mod euler;
pub mod step;

use std::fmt;
use std::str::FromStr;

/// How a run gets from noise to a picture. Most evaluate the network once or twice a step of the schedule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Sampler {
    /// Euler's method: one evaluation a step. What the published pipeline runs.
    #[default]
    Euler,
    /// Euler's method to below the next noise level, and noise up to it.
    EulerAncestral,
    /// Heun's method (Karras et al. 2022, algorithm 2, without churn): two evaluations a step.
    Heun,
    /// A midpoint method of the second order: two evaluations a step.
    Dpm2,
    /// The same to below the next noise level, and noise up to it.
    Dpm2Ancestral,
    /// DPM-Solver (Lu et al. 2022) of the third order over the whole range, no schedule: as many evaluations as steps.
    DpmFast,
    /// DPM-Solver of the orders 2 and 3, whose difference says how far the next step goes: neither schedule nor steps.
    DpmAdaptive,
    /// DPM-Solver++ (2S) to below the next noise level, and noise up to it: two evaluations a step.
    Dpmpp2sAncestral,
    /// DPM-Solver++ (2M), which makes use of the step before: one evaluation a step.
    Dpmpp2m,
}

impl Sampler {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Euler,
        Self::EulerAncestral,
        Self::Heun,
        Self::Dpm2,
        Self::Dpm2Ancestral,
        Self::DpmFast,
        Self::DpmAdaptive,
        Self::Dpmpp2sAncestral,
        Self::Dpmpp2m,
    ];

    /// The name on the command line, k-diffusion's with hyphens.
    pub fn name(self) -> &'static str {
        match self {
            Self::Euler => "euler",
            Self::EulerAncestral => "euler-ancestral",
            Self::Heun => "heun",
            Self::Dpm2 => "dpm2",
            Self::Dpm2Ancestral => "dpm2-ancestral",
            Self::DpmFast => "dpm-fast",
            Self::DpmAdaptive => "dpm-adaptive",
            Self::Dpmpp2sAncestral => "dpmpp-2s-ancestral",
            Self::Dpmpp2m => "dpmpp-2m",
        }
    }

    /// The name in the metadata of pictures, A1111's.
    pub fn title(self) -> &'static str {
        match self {
            Self::Euler => "Euler",
            Self::EulerAncestral => "Euler a",
            Self::Heun => "Heun",
            Self::Dpm2 => "DPM2",
            Self::Dpm2Ancestral => "DPM2 a",
            Self::DpmFast => "DPM fast",
            Self::DpmAdaptive => "DPM adaptive",
            Self::Dpmpp2sAncestral => "DPM++ 2S a",
            Self::Dpmpp2m => "DPM++ 2M",
        }
    }

    /// Whether it goes through a schedule's noise levels; the others take the ends of the range alone.
    pub fn takes_a_schedule(self) -> bool {
        !matches!(self, Self::DpmFast | Self::DpmAdaptive)
    }

    /// Whether the number of steps is given; else it finds them itself, for each picture its own.
    pub fn takes_steps(self) -> bool {
        self != Self::DpmAdaptive
    }

    /// Whether a step is one evaluation of the network; else most are two, or as many as it finds.
    pub fn evaluates_once_a_step(self) -> bool {
        matches!(
            self,
            Self::Euler | Self::EulerAncestral | Self::DpmFast | Self::Dpmpp2m
        )
    }

    /// Whether it adds noise as it goes, as much as eta says.
    pub fn takes_eta(self) -> bool {
        matches!(
            self,
            Self::EulerAncestral
                | Self::Dpm2Ancestral
                | Self::DpmFast
                | Self::DpmAdaptive
                | Self::Dpmpp2sAncestral
        )
    }

    /// Whether it measures its error, against a tolerance.
    pub fn takes_a_tolerance(self) -> bool {
        self == Self::DpmAdaptive
    }

    /// How many latents it keeps, beside those that it gives the network, while that is evaluated.
    pub(super) fn latents_kept(self) -> usize {
        match self {
            Self::Euler | Self::EulerAncestral => 0,
            Self::Dpmpp2m => 1,
            Self::Heun | Self::Dpm2 | Self::Dpm2Ancestral | Self::Dpmpp2sAncestral => 2,
            // x and two slopes.
            Self::DpmFast => 3,
            // The step's lower order and the one before it too.
            Self::DpmAdaptive => 5,
        }
    }
}

impl fmt::Display for Sampler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Sampler {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|one| one.name() == text);
        let names = || Self::ALL.map(Self::name).join(", ");
        found.ok_or_else(|| format!("expected one of {}", names()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_are_all_different() {
        for sampler in Sampler::ALL {
            assert_eq!(sampler.to_string().parse(), Ok(sampler));
            let same = |other: &Sampler| {
                other.name() == sampler.name() || other.title() == sampler.title()
            };
            assert_eq!(Sampler::ALL.iter().filter(|other| same(other)).count(), 1);
        }
        let error = "dpm++".parse::<Sampler>().unwrap_err();
        assert!(error.contains("dpm-fast, dpm-adaptive"), "{error}");
    }
}
