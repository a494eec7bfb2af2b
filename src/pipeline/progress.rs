//! The steps as they are done.

use anyhow::Result;
use candle_core::Device;

use super::passes::Pass;
use super::{Event, OnEvent};
use crate::device::StepClock;

/// Steps told to a card before the last of them is done: enough that it never waits for the program, and few enough that
/// an interrupt ends the run soon.
const AHEAD: usize = 2;

/// Counts the steps of a pass by its device's clock, and tells of each when it is done.
pub struct Progress {
    clock: StepClock,
    done: usize,
    total: usize,
}

impl Progress {
    /// The first step of a pass of `steps` begins.
    pub fn start(device: &Device, pass: Pass, steps: usize) -> Result<Self> {
        Ok(Self {
            clock: StepClock::start(device)?,
            done: steps * pass.number,
            total: steps * pass.count,
        })
    }

    /// All work of a step has been told to the device.
    pub fn step(&mut self, on_event: OnEvent) -> Result<()> {
        self.clock.mark()?;
        self.tell(AHEAD, on_event)
    }

    /// Waits for the last of the steps.
    pub fn end(mut self, on_event: OnEvent) -> Result<()> {
        self.tell(0, on_event)
    }

    fn tell(&mut self, ahead: usize, on_event: OnEvent) -> Result<()> {
        for seconds in self.clock.finished(ahead)? {
            self.done += 1;
            on_event(Event::Step {
                done: self.done,
                total: self.total,
                seconds,
            })?;
        }
        Ok(())
    }
}
