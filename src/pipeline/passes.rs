//! More than twice as large: what a pass made goes through the networks again, as latents.

use anyhow::Result;

use super::recover::lacks_memory;
use super::{Event, LowRes, OnEvent, Settings, UpscaledLatents, Upscaler};

/// One of the passes of an upscale, each of which doubles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass {
    /// From 0.
    pub number: usize,
    /// How many there are.
    pub count: usize,
    /// Evaluations of the UNet in those before it.
    pub evaluations: usize,
}

impl Pass {
    /// Whether the UNet has no more to do after it.
    pub fn is_last(self) -> bool {
        self.number + 1 == self.count
    }
}

impl Upscaler {
    /// All passes. What one made is the next one's input as if it had been written to a file and read again: without its
    /// extension, and with noise of the seed's own.
    pub(super) fn all_passes(
        &mut self,
        inputs: &[LowRes],
        settings: &Settings,
        on_event: OnEvent,
    ) -> Result<Vec<UpscaledLatents>> {
        if inputs.len() > 1 && !settings.sampler.takes_steps() {
            // The steps of each are its own.
            return one_by_one(inputs, on_event, |input, on_event| {
                self.all_passes(input, settings, on_event)
            });
        }
        let mut pass = Pass {
            number: 0,
            count: settings.scale.passes(),
            evaluations: 0,
        };
        let mut upscaled = self.pass(inputs, settings, pass, on_event)?;
        while !pass.is_last() {
            pass.number += 1;
            pass.evaluations = upscaled.first().map_or(0, |one| one.evaluations);
            let again = upscaled.iter().map(UpscaledLatents::again);
            let again = again.collect::<Result<Vec<LowRes>>>()?;
            let doubled = self.pass(&again, settings, pass, on_event)?;
            // Their latents cover more than the picture where its sides are no multiples of theirs.
            upscaled = std::iter::zip(doubled, upscaled)
                .map(|(doubled, before)| UpscaledLatents {
                    width: 2 * before.width,
                    height: 2 * before.height,
                    evaluations: before.evaluations + doubled.evaluations,
                    base: before.base,
                    ..doubled
                })
                .collect();
        }
        Ok(upscaled)
    }

    /// One pass, in a safer precision or on another device where it must be.
    fn pass(
        &mut self,
        inputs: &[LowRes],
        settings: &Settings,
        pass: Pass,
        on_event: OnEvent,
    ) -> Result<Vec<UpscaledLatents>> {
        let pixels = self.pixels(inputs)?;
        let upscaled = self.recovering(pixels, on_event, |upscaler, on_event| {
            upscaler.upscale_once(inputs, settings, pass, on_event)
        });
        match upscaled {
            // A batch that a card has no memory for is done one by one, each of which may go to the CPU.
            Err(error) if inputs.len() > 1 && lacks_memory(&error) => {
                one_by_one(inputs, on_event, |input, on_event| {
                    self.pass(input, settings, pass, on_event)
                })
            }
            other => other,
        }
    }
}

/// A batch whose inputs are done one after the other.
fn one_by_one(
    inputs: &[LowRes],
    on_event: OnEvent,
    mut work: impl FnMut(&[LowRes], OnEvent) -> Result<Vec<UpscaledLatents>>,
) -> Result<Vec<UpscaledLatents>> {
    let mut upscaled = Vec::with_capacity(inputs.len());
    for (number, input) in inputs.iter().enumerate() {
        let mut of_batch = |event| on_event(of_batch(event, number));
        upscaled.extend(work(std::slice::from_ref(input), &mut of_batch)?);
    }
    Ok(upscaled)
}

/// What is told of one input alone, told of a batch in which it has this number.
fn of_batch(event: Event, number: usize) -> Event {
    match event {
        Event::Preview { index, picture } => Event::Preview {
            index: index + number,
            picture,
        },
        other => other,
    }
}

impl UpscaledLatents {
    /// As the input of another pass.
    fn again(&self) -> Result<LowRes> {
        Ok(LowRes::Latents(self.where_they_are()?))
    }
}
