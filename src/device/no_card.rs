//! Stands for CUDA cards in a build without CUDA: there are none.

use std::convert::Infallible;
use std::error::Error as StdError;

use anyhow::{Result, bail};
use candle_core::Device;

const NONE: &str = "this build runs on the CPU alone: build it with `cargo build --release --features cuda,cudnn`, or use --device cpu";

pub fn count() -> Result<usize> {
    bail!(NONE)
}

pub fn open(_: usize) -> Result<Device> {
    bail!(NONE)
}

pub fn is_out_of_memory(_: &(dyn StdError + 'static)) -> bool {
    false
}

pub fn computes(_: &Device) -> Result<bool> {
    Ok(false)
}

pub fn has_bfloat16(_: &Device) -> Result<bool> {
    Ok(false)
}

pub fn name(_: &Device) -> Option<String> {
    None
}

pub fn description(_: &Device) -> Result<Vec<String>> {
    Ok(Vec::new())
}

pub fn free_memory(_: &Device) -> Option<u64> {
    None
}

pub fn total_memory(_: &Device) -> Option<u64> {
    None
}

/// Never made.
pub struct StepClock(Infallible);

impl StepClock {
    pub fn start(_: &Device) -> Result<Self> {
        bail!("there is no card in this build")
    }

    pub fn mark(&mut self) -> Result<()> {
        match self.0 {}
    }

    pub fn finished(&mut self, _: usize) -> Result<Vec<f64>> {
        match self.0 {}
    }
}
