//! The steps as they are done.

use anyhow::Result;
use candle_core::Device;

use super::passes::Pass;
use super::{Event, OnEvent};
use crate::device::{STEPS_AHEAD, StepClock};

/// Counts the evaluations of a pass by its device's clock, and tells of each when it is done.
pub struct Progress {
    clock: StepClock,
    pass: Pass,
    /// Of this pass.
    done: usize,
    /// Of this pass, where it is known.
    total: Option<usize>,
    /// What part of the pass is done, where the number does not say so.
    way: f64,
}

impl Progress {
    /// The first step of a pass of so many evaluations begins.
    pub fn start(device: &Device, pass: Pass, total: Option<usize>) -> Result<Self> {
        Ok(Self {
            clock: StepClock::start(device)?,
            pass,
            done: 0,
            total,
            way: 0.0,
        })
    }

    /// What part of the pass is done, as far as its sampler says.
    pub fn come(&mut self, way: f64) {
        self.way = way;
    }

    /// All work of an evaluation has been told to the device.
    pub fn step(&mut self, on_event: OnEvent) -> Result<()> {
        self.clock.mark()?;
        self.tell(STEPS_AHEAD, on_event)
    }

    /// Waits for the last of them, and says how many there were.
    pub fn end(mut self, on_event: OnEvent) -> Result<usize> {
        self.tell(0, on_event)?;
        Ok(self.done)
    }

    fn tell(&mut self, ahead: usize, on_event: OnEvent) -> Result<()> {
        for seconds in self.clock.finished(ahead)? {
            self.done += 1;
            let way = match self.total {
                Some(total) => self.done as f64 / total as f64,
                None => self.way,
            };
            on_event(Event::Step {
                done: self.pass.evaluations + self.done,
                total: self.total.map(|total| total * self.pass.count),
                way: (self.pass.number as f64 + way) / self.pass.count as f64,
                seconds,
            })?;
        }
        Ok(())
    }
}
