//! What one precision or device cannot do, another can: numbers that overflow are done again in a safer precision, pictures
//! that a card has no memory for on the CPU.

use anyhow::{Context, Result};
use candle_core::{DType, Device};

use super::memory::is_too_little;
use super::{Event, LowRes, NotFinite, OnEvent, Options, Stage, Upscaler};
use crate::device;

/// Stands in for a card whose memory is too small.
#[derive(Default)]
pub struct OnCpu {
    upscaler: Option<Box<Upscaler>>,
    /// Of the smallest picture that did not fit, in pixels of the result: larger ones are not tried.
    too_large: Option<usize>,
}

impl Upscaler {
    /// Does `work` for a result of so many pixels, again in a safer precision where its numbers overflow, and where the card
    /// has no memory left: again without the other stages' weights, then on the CPU. `pixels` is None for a batch, which its
    /// caller can make smaller.
    pub(super) fn recovering<T>(
        &mut self,
        pixels: Option<usize>,
        on_event: OnEvent,
        mut work: impl FnMut(&mut Self, OnEvent) -> Result<T>,
    ) -> Result<T> {
        if let Some(pixels) = pixels
            && self.on_cpu.too_large.is_some_and(|least| pixels >= least)
        {
            return work(self.cpu()?, on_event);
        }
        let mut result = work(self, on_event);
        while let Some(overflow) = overflow(&result) {
            self.take_a_safer_precision(overflow, on_event)?;
            result = work(self, on_event);
        }
        if self.lacks_memory(&result) && self.forget_networks() {
            result = work(self, on_event);
        }
        if self.ran_out(&result) && self.plan_smaller() {
            on_event(Event::Warning(format!(
                "{} ran out of memory: doing it again with fewer maps kept at a time",
                device::name(&self.options.device)
            )))?;
            result = work(self, on_event);
        }
        match pixels {
            Some(pixels) if self.lacks_memory(&result) => {
                self.forget_networks();
                self.on_cpu.too_large = Some(pixels);
                on_event(Event::Warning(format!(
                    "{} has too little memory for it: doing it on the CPU, as all pictures of this size or larger from here on",
                    device::name(&self.options.device)
                )))?;
                work(self.cpu()?, on_event)
            }
            _ => result,
        }
    }

    fn lacks_memory<T>(&self, result: &Result<T>) -> bool {
        !self.options.device.is_cpu() && result.as_ref().is_err_and(lacks_memory)
    }

    /// Whether the card ran out although the plan said that it would not.
    fn ran_out<T>(&self, result: &Result<T>) -> bool {
        !self.options.device.is_cpu() && result.as_ref().is_err_and(device::is_out_of_memory)
    }

    /// Plans for half of what is free from here on; false where it is no more than that already.
    fn plan_smaller(&mut self) -> bool {
        self.forget_networks();
        let Some(free) = device::free_memory(&self.options.device) else {
            return false;
        };
        let smaller = free / 2;
        let is_less = self.smaller.is_none_or(|now| smaller < now);
        self.smaller = self
            .smaller
            .map_or(Some(smaller), |now| Some(now.min(smaller)));
        is_less
    }

    /// The decoder goes to the range of float32 in 16 bits first, where the device has that; all else, and what is not finite
    /// even there, to float32.
    fn take_a_safer_precision(&mut self, overflow: NotFinite, on_event: OnEvent) -> Result<()> {
        let decoding = overflow.stage == Stage::Decode && overflow.dtype == DType::F16;
        let name = if decoding && device::has_bfloat16(&self.options.device)? {
            self.vae_placement.dtype = DType::BF16;
            self.forget_decoders();
            "bfloat16"
        } else {
            for placement in self.placements() {
                placement.dtype = DType::F32;
            }
            self.forget();
            "float32"
        };
        on_event(Event::Warning(format!(
            "{overflow}; doing it again in {name}"
        )))
    }

    /// Drops the networks that are loaded; false where there are none.
    fn forget_networks(&mut self) -> bool {
        let loaded = self.encoder.is_some()
            || self.unet.is_some()
            || self.decoder.is_some()
            || self.has_other_decoder()
            || self.base.is_some();
        (self.encoder, self.unet, self.base) = (None, None, None);
        self.forget_decoders();
        loaded
    }

    fn cpu(&mut self) -> Result<&mut Self> {
        if self.on_cpu.upscaler.is_none() {
            let upscaler = Self::new(Options {
                device: Device::Cpu,
                dtype: DType::F32,
                ..self.options.clone()
            });
            let upscaler = upscaler.context("the CPU in place of the card")?;
            self.on_cpu.upscaler = Some(Box::new(Self {
                previews: self.previews,
                base_files: self.base_files.clone(),
                ..upscaler
            }));
        }
        self.on_cpu
            .upscaler
            .as_deref_mut()
            .context("the CPU in place of the card")
    }

    /// Pixels of the result of a pass over one input; None for several.
    pub(super) fn pixels(&self, inputs: &[LowRes]) -> Result<Option<usize>> {
        let [input] = inputs else { return Ok(None) };
        let (width, height) = self.result_size(input, 2)?;
        Ok(Some(width * height))
    }
}

/// Whether an error is a lack of memory: the device gave up, or no plan fits it.
pub fn lacks_memory(error: &anyhow::Error) -> bool {
    device::is_out_of_memory(error) || is_too_little(error)
}

/// Numbers that overflowed, in a precision that has a safer one.
fn overflow<T>(result: &Result<T>) -> Option<NotFinite> {
    let overflow = result.as_ref().err()?.downcast_ref::<NotFinite>()?;
    (overflow.dtype != DType::F32).then_some(*overflow)
}
