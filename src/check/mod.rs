//! Whether a device computes what the CPU does: every layer at the published model's shapes, and the built-in model from
//! picture to picture.

mod layer;

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};

use self::layer::{Layer, Made, Ready, published, small};
use crate::device::{self, Placement};
use crate::model::ModelFiles;
use crate::pipeline::{Event, LowRes, Options, Settings, Upscaler};
use crate::pixels::Pixels;

/// What was found of one layer, or of the whole, in one precision.
#[derive(Clone, Debug)]
pub struct Finding {
    /// What was computed, and in which shape.
    pub what: String,
    /// Of weights and activations.
    pub dtype: DType,
    /// |a - b| / |b| in the Euclidean norm, b being the CPU's result in float32 from the same rounded inputs; infinite
    /// where a number is missing. Or why there is none.
    pub error: Result<f64, String>,
    /// Whether the reason is memory that the device does not have.
    pub lacked_memory: bool,
    /// What the error may be.
    pub allowed: f64,
    /// Of one pass, the best of several; 0 where it was not timed.
    pub seconds: f64,
    /// Multiplications and additions of one pass; 0 where memory decides.
    pub operations: f64,
    /// Bytes read and written by one pass, each once.
    pub bytes: f64,
}

impl Finding {
    /// What came of a run: its error and its seconds, or why there are none.
    fn of(what: String, dtype: DType, run: Result<(f64, f64)>, allowed: f64) -> Self {
        let lacked_memory = run.as_ref().is_err_and(device::is_out_of_memory);
        let (error, seconds) = match run {
            Ok((error, seconds)) => (Ok(error), seconds),
            Err(_) if lacked_memory => (Err("the device has too little memory for it".into()), 0.0),
            Err(error) => (Err(in_one_line(&error)), 0.0),
        };
        Self {
            what,
            dtype,
            error,
            lacked_memory,
            allowed,
            seconds,
            operations: 0.0,
            bytes: 0.0,
        }
    }

    /// Whether the device computes it wrongly, or not at all for another reason than a lack of memory.
    pub fn wrong(&self) -> bool {
        !self.passed() && !self.lacked_memory
    }

    /// Whether the device may be used for it.
    pub fn passed(&self) -> bool {
        self.error
            .as_ref()
            .is_ok_and(|error| *error <= self.allowed)
    }
}

/// Time that repetitions of one layer take at most, beside the first.
const REPEATING: Duration = Duration::from_millis(100);
const MOST_REPETITIONS: usize = 20;

/// Of one layer: rounding of the result and of what lies between, with sums in float32. Another order of sums is 1e-6 in
/// float32; products in TF32, which float32 must not mean, are 3e-4.
fn allowed_of_a_layer(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2e-3,
        DType::BF16 => 1.6e-2,
        _ => 2e-5,
    }
}

/// Of the built-in model's latents: what four steps make of the layers' errors, which is about ten times as much in
/// float32. In the others it is what pictures may lose without showing it.
fn allowed_of_the_whole(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 5e-3,
        DType::BF16 => 4e-2,
        _ => 1e-4,
    }
}

/// Checks every layer and the built-in model from end to end in every precision that the device has, and tells of each as
/// it comes.
///
/// # Errors
/// The CPU's own results cannot be had, or an error from `tell`. What fails on the device is a finding.
pub fn whole_device(device: &Device, tell: &mut dyn FnMut(&Finding) -> Result<()>) -> Result<()> {
    for &dtype in precisions(device)? {
        for layer in published() {
            tell(&checked(&layer, &Placement::new(device, dtype), timed)?)?;
        }
    }
    for &dtype in precisions(device)? {
        tell(&whole(device, dtype)?)?;
    }
    Ok(())
}

/// The same in small, in a moment: each kind of layer at odd sizes, where `place` says.
///
/// # Errors
/// The CPU's own results cannot be had.
pub fn short(device: &Device, place: impl Fn(&Device, DType) -> Placement) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for &dtype in precisions(device)? {
        for layer in small() {
            findings.push(checked(&layer, &place(device, dtype), |_, _| Ok(0.0))?);
        }
    }
    Ok(findings)
}

fn precisions(device: &Device) -> Result<&'static [DType]> {
    let all = &[DType::F32, DType::F16, DType::BF16];
    Ok(if device::has_bfloat16(device)? {
        all
    } else {
        &all[..2]
    })
}

/// Runs a layer where `tried` says and on the CPU; `time` gives its seconds.
fn checked(
    layer: &Layer,
    tried: &Placement,
    time: impl Fn(&Ready, &Device) -> Result<f64>,
) -> Result<Finding> {
    let made = Made::new(layer, tried.dtype)?;
    let expected = made.ready(layer, &reference(tried))?()?.values()?;
    let run = || {
        let ready = made.ready(layer, tried)?;
        let error = relative_error(&ready()?.values()?, &expected)?;
        Ok((error, time(&ready, &tried.device)?))
    };
    Ok(Finding {
        operations: layer.operations,
        bytes: (layer.values * tried.dtype.size_in_bytes()) as f64,
        ..Finding::of(
            layer.what.clone(),
            tried.dtype,
            run(),
            allowed_of_a_layer(tried.dtype),
        )
    })
}

/// The CPU's kernels are what a card is held to; they themselves are held to candle's operations.
fn reference(tried: &Placement) -> Placement {
    match tried.device {
        Device::Cpu => Placement::stock(&Device::Cpu, DType::F32),
        _ => Placement::new(&Device::Cpu, DType::F32),
    }
}

/// Seconds of one pass, the best of several.
fn timed(ready: &Ready, device: &Device) -> Result<f64> {
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    for _ in 0..MOST_REPETITIONS {
        let start = Instant::now();
        ready()?;
        device.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64());
        if begin.elapsed() > REPEATING {
            break;
        }
    }
    Ok(best)
}

/// |a - b| / |b|; infinite where a number is none.
fn relative_error(actual: &Tensor, expected: &Tensor) -> Result<f64> {
    let list = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    let (actual, expected) = (list(actual)?, list(expected)?);
    anyhow::ensure!(
        actual.len() == expected.len(),
        "{} values came out, expected {}",
        actual.len(),
        expected.len()
    );
    let (mut difference, mut norm) = (0f64, 0f64);
    for (a, b) in actual.into_iter().zip(expected) {
        difference += f64::from(a - b).powi(2);
        norm += f64::from(b).powi(2);
    }
    let error = (difference / norm).sqrt();
    Ok(if error.is_nan() { f64::INFINITY } else { error })
}

/// The built-in model from a picture to latents, in one precision, beside the CPU.
fn whole(device: &Device, dtype: DType) -> Result<Finding> {
    let tried = Placement::new(device, dtype);
    let expected = upscaled(&reference(&tried))?.0;
    let run = || {
        let (latents, seconds) = upscaled(&tried)?;
        Ok((relative_error(&latents, &expected)?, seconds))
    };
    Ok(Finding::of(
        "tiny, 64x64 -> 128x128, 4 steps and decode".into(),
        dtype,
        run(),
        allowed_of_the_whole(dtype),
    ))
}

/// Latents and seconds. A run that had to be done again in another way has failed.
fn upscaled(placement: &Placement) -> Result<(Tensor, f64)> {
    let mut upscaler = Upscaler::new(Options {
        device: placement.device.clone(),
        dtype: placement.dtype,
        ..Options::new(ModelFiles::built_in())
    })?;
    let usual = Placement::new(&placement.device, placement.dtype);
    if usual.backend != placement.backend {
        upscaler.use_stock_operations();
    }
    let mut on_event = |event| match event {
        Event::Warning(text) => anyhow::bail!("{text}"),
        _ => Ok(()),
    };
    let settings = Settings {
        steps: 4,
        ..Settings::default()
    };
    let start = Instant::now();
    let latents = upscaler.upscale(&[LowRes::image(&picture()?)?], &settings, &mut on_event)?;
    let latents = latents.first().context("no latents came out")?;
    upscaler.decode(latents, &mut on_event)?;
    let seconds = start.elapsed().as_secs_f64();
    Ok((latents.latents()?, seconds))
}

/// Shades and an edge.
fn picture() -> Result<Pixels> {
    const SIDE: usize = 64;
    let values = (0..SIDE * SIDE)
        .flat_map(|i| {
            let (x, y) = (
                (i % SIDE) as f32 / SIDE as f32,
                (i / SIDE) as f32 / SIDE as f32,
            );
            let edge = if x + y > 1.0 { 0.8 } else { 0.2 };
            [x, y, edge]
        })
        .collect();
    Pixels::new(SIDE, SIDE, values)
}

fn in_one_line(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten bits of mantissa, as the tensor cores multiply where float32 is not held to mean float32.
    fn tf32(tensor: &Tensor) -> Tensor {
        let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        let rounded = values
            .into_iter()
            .map(|v| f32::from_bits((v.to_bits() + 0x1000) & !0x1fff))
            .collect();
        Tensor::from_vec(rounded, tensor.shape(), &Device::Cpu).unwrap()
    }

    #[test]
    fn the_bounds_see_products_in_tf32_and_missing_numbers() {
        let layer = layer::linear(8, 256, 64);
        let kernels = Placement::new(&Device::Cpu, DType::F32);
        let mut made = Made::new(&layer, DType::F32).unwrap();
        let run = |made: &Made, placement: &Placement| {
            let ready = made.ready(&layer, placement).unwrap();
            ready().unwrap().values().unwrap()
        };
        let expected = run(&made, &reference(&kernels));
        let passes = |values: &Tensor| {
            let run = relative_error(values, &expected).map(|error| (error, 0.0));
            let allowed = allowed_of_a_layer(DType::F32);
            Finding::of(layer.what.clone(), DType::F32, run, allowed).passed()
        };
        assert!(passes(&run(&made, &kernels)));
        made.inputs = made.inputs.iter().map(tf32).collect();
        assert!(!passes(&run(&made, &kernels)));
        assert!(!passes(&(expected.zeros_like().unwrap() / 0.0).unwrap()));
        let finding = Finding::of(String::new(), DType::F32, Err(anyhow::anyhow!("lost")), 1.0);
        assert!(!finding.passed());
    }

    #[test]
    fn the_short_check_passes_on_the_cpu() {
        for finding in short(&Device::Cpu, Placement::new).unwrap() {
            assert!(finding.passed(), "{finding:?}");
        }
    }
}
