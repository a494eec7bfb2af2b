//! What the models run on: the CPU, or one or several CUDA cards.

#[cfg(feature = "cuda")]
mod card;
#[cfg(not(feature = "cuda"))]
#[path = "no_card.rs"]
mod card;
mod memory;

use std::str::FromStr;
use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Device, DeviceLocation, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

/// Where a model runs and in which precision its weights and activations are kept.
#[derive(Clone, Debug)]
pub struct Placement {
    /// Where tensors are.
    pub device: Device,
    /// Of weights and activations: F32, F16 or BF16.
    pub dtype: DType,
    /// What computes the layers.
    pub backend: Backend,
    /// Whether products of float32 values may be rounded to TF32 (11 bits) on a card, which its tensor cores multiply.
    pub tf32: bool,
    /// Whether float32 weights may stay in their files, mapped into memory, where the CPU kernels can read them there: a network is
    /// ready sooner, takes no memory of its own, and runs a few percent slower.
    pub weights_in_place: bool,
}

/// Steps told to a card before the last of them is done: enough that it never waits for the program, and few enough that
/// an interrupt ends the run soon.
pub const STEPS_AHEAD: usize = 2;

/// What computes the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// This program's CPU kernels, on channels-last maps.
    CpuKernels,
    /// This program's CUDA kernels and the CUDA libraries, on channels-last maps.
    CardKernels,
    /// candle's stock operations, on channels-first maps, on any device.
    Stock,
    /// Nothing: maps have sizes and no values, for planning what the kernels of the CPU, or of a card, would take.
    Shapes {
        /// Whether it is a card that is planned for.
        card: bool,
    },
}

impl Placement {
    /// `device` in `dtype`, with our kernels where they exist: on the CPU and on CUDA cards.
    pub fn new(device: &Device, dtype: DType) -> Self {
        let backend = match device {
            Device::Cpu => Backend::CpuKernels,
            Device::Cuda(_) => Backend::CardKernels,
            Device::Metal(_) => Backend::Stock,
        };
        Self {
            device: device.clone(),
            dtype,
            backend,
            tf32: false,
            weights_in_place: false,
        }
    }

    /// Whether weights stay in their files where that is possible.
    pub fn reads_in_place(&self) -> bool {
        self.weights_in_place && self.backend == Backend::CpuKernels && self.dtype == DType::F32
    }

    /// Whether this program's own kernels compute the layers, on the CPU or a card.
    pub fn has_own_kernels(&self) -> bool {
        matches!(self.backend, Backend::CpuKernels | Backend::CardKernels)
    }

    /// The same on candle's stock operations.
    pub fn stock(device: &Device, dtype: DType) -> Self {
        Self {
            backend: Backend::Stock,
            ..Self::new(device, dtype)
        }
    }

    /// The same without values, for planning; nothing is on the device.
    pub fn shapes(&self) -> Self {
        Self {
            device: Device::Cpu,
            backend: Backend::Shapes {
                card: !self.device.is_cpu(),
            },
            ..self.clone()
        }
    }

    /// Whether it is for planning alone.
    pub fn is_of_shapes(&self) -> bool {
        matches!(self.backend, Backend::Shapes { .. })
    }

    /// `values`, in C order, as a tensor on the device in the dtype: converted here by all threads, and sent once.
    ///
    /// # Errors
    /// They are not as many as the shape says, or the device has no memory for them.
    pub fn upload(&self, values: &[f32], shape: &[usize]) -> Result<Tensor> {
        let host = &Device::Cpu;
        let tensor = match self.dtype {
            DType::F16 => {
                let all = converted(values, <[f16]>::convert_from_f32_slice);
                Tensor::from_vec(all, shape, host)?
            }
            DType::BF16 => {
                let all = converted(values, <[bf16]>::convert_from_f32_slice);
                Tensor::from_vec(all, shape, host)?
            }
            _ => Tensor::from_slice(values, shape, host)?,
        };
        Ok(tensor.to_device(&self.device)?)
    }
}

fn converted<T: Copy + Default + Send>(
    values: &[f32],
    convert: impl Fn(&mut [T], &[f32]) + Sync,
) -> Vec<T> {
    /// Values that one thread converts at a time.
    const PIECE: usize = 1 << 16;
    let mut all = vec![T::default(); values.len()];
    all.par_chunks_mut(PIECE)
        .zip(values.par_chunks(PIECE))
        .for_each(|(to, from)| convert(to, from));
    all
}

/// `--device`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// CUDA where the build and the machine have it, else the CPU.
    Auto,
    /// Every CUDA card of the machine.
    AllCuda,
    /// By name; the inputs of a run are spread over them.
    List(Vec<One>),
}

/// One device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum One {
    /// The CPU.
    Cpu,
    /// A card by its number.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let one = |name: &str| match name {
            "cpu" => Some(One::Cpu),
            "cuda" => Some(One::Cuda(0)),
            _ => name.strip_prefix("cuda:")?.parse().ok().map(One::Cuda),
        };
        match text {
            "auto" => Ok(Self::Auto),
            "cuda:all" => Ok(Self::AllCuda),
            _ => text
                .split(',')
                .map(|name| one(name.trim()))
                .collect::<Option<Vec<One>>>()
                .map(Self::List)
                .ok_or_else(|| {
                    "expected auto, cpu, cuda, cuda:N, a list such as cuda:0,cuda:1, or cuda:all"
                        .into()
                }),
        }
    }
}

/// The devices of a choice, at least one, and a line to show where `auto` had to settle for the CPU.
///
/// # Errors
/// CUDA was asked for by name and is not to be had; the message says what is missing.
pub fn open(choice: &DeviceChoice) -> Result<(Vec<Device>, Option<String>)> {
    match choice {
        DeviceChoice::List(names) => {
            let open = |one: &One| match *one {
                One::Cpu => Ok(Device::Cpu),
                One::Cuda(number) => card::open(number),
            };
            Ok((names.iter().map(open).collect::<Result<_>>()?, None))
        }
        DeviceChoice::AllCuda => {
            let devices = (0..card::count()?.max(1)).map(card::open);
            Ok((devices.collect::<Result<_>>()?, None))
        }
        DeviceChoice::Auto if !cfg!(feature = "cuda") => Ok((vec![Device::Cpu], None)),
        DeviceChoice::Auto => match card::open(0) {
            Ok(device) => Ok((vec![device], None)),
            Err(error) => Ok((
                vec![Device::Cpu],
                Some(format!("running on the CPU: {error:#}")),
            )),
        },
    }
}

/// How many CUDA cards the driver shows.
///
/// # Errors
/// CUDA is not to be had; the message says why.
pub fn cards() -> Result<usize> {
    card::count()
}

/// Every device by the name that `--device` takes, the CPU first, then each card; what cannot be had with the reason.
pub fn all() -> Vec<(String, Result<Device>)> {
    let mut found = vec![("cpu".into(), Ok(Device::Cpu))];
    match cards() {
        Err(error) => found.push(("cuda".into(), Err(error))),
        // Opening one says that there is none.
        Ok(0) => found.push(("cuda".into(), card::open(0))),
        Ok(count) => {
            found.extend((0..count).map(|number| (format!("cuda:{number}"), card::open(number))));
        }
    }
    found
}

/// What its maker calls a device, of the CPU the processor; None where the system does not tell.
pub fn hardware_name(device: &Device) -> Option<String> {
    match device {
        Device::Cpu => processor_name(),
        other => card::name(other),
    }
}

fn processor_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("model name"))?;
    Some(line.trim_start_matches([' ', '\t', ':']).trim().to_owned())
}

/// Whether a device computes at all: 0 + 1 is 1 on it.
///
/// # Errors
/// The driver refuses.
pub fn computes(device: &Device) -> Result<bool> {
    match device {
        Device::Cpu => Ok(true),
        other => card::computes(other),
    }
}

/// Whether bfloat16 is to be had: on cards from compute capability 8.0 on, on the CPU always, which computes in float32.
///
/// # Errors
/// The driver does not tell.
pub fn has_bfloat16(device: &Device) -> Result<bool> {
    match device {
        Device::Cpu => Ok(true),
        other => card::has_bfloat16(other),
    }
}

/// The device, or this machine, has no memory left for what was asked of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("out of memory")]
pub struct OutOfMemory;

/// Bytes of a device's memory that are free; None where the system does not tell. Of the machine's own: what is available, within the
/// limits of the process's control groups and of its addresses (`ulimit -v`).
pub fn free_memory(device: &Device) -> Option<u64> {
    match device {
        Device::Cpu => memory::free(),
        other => card::free_memory(other),
    }
}

/// Bytes of memory that a device has, of the CPU the machine's; None where the system does not tell.
pub fn total_memory(device: &Device) -> Option<u64> {
    match device {
        Device::Cpu => memory::total(),
        other => card::total_memory(other),
    }
}

pub use self::memory::{Reuse, Space, give_memory_back, resident_memory, space_in};

/// Whether an error is a lack of memory, by its type: [`OutOfMemory`], or what CUDA's libraries call it.
pub fn is_out_of_memory(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.is::<OutOfMemory>()
            || card::is_out_of_memory(cause)
            || cause
                .downcast_ref::<candle_core::Error>()
                .is_some_and(candle_is_out_of_memory)
    })
}

fn candle_is_out_of_memory(error: &candle_core::Error) -> bool {
    use candle_core::Error;
    match error {
        Error::Context { inner, .. }
        | Error::WithPath { inner, .. }
        | Error::WithBacktrace { inner, .. } => candle_is_out_of_memory(inner),
        Error::Cuda(error) => card::is_out_of_memory(error.as_ref()),
        _ => false,
    }
}

/// The precision of a run on `device` where none is asked for: float16 on CUDA, float32 on the CPU.
pub fn default_dtype(device: &Device) -> DType {
    match device {
        Device::Cpu => DType::F32,
        _ => DType::F16,
    }
}

/// A name for messages: `cpu`, or a card's number and what it is, `cuda:0 (NVIDIA GeForce RTX 4070)`.
pub fn name(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cpu => "cpu".into(),
        DeviceLocation::Cuda { gpu_id } => match card::name(device) {
            Some(name) => format!("cuda:{gpu_id} ({name})"),
            None => format!("cuda:{gpu_id}"),
        },
        DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

/// What a card is and which software drives it, a line each, the same at every call; empty for the CPU.
///
/// # Errors
/// The driver does not answer.
pub fn description(device: &Device) -> Result<Vec<String>> {
    match device {
        Device::Cpu => Ok(Vec::new()),
        other => card::description(other),
    }
}

/// Tells how long the steps of a device's work took. A card works while the program goes on: its own clock says when a
/// step was done.
pub enum StepClock {
    /// The CPU: a step is done when its call returns.
    Host {
        /// The end of the last step.
        last: Instant,
        /// Seconds of the steps that were not told of.
        open: Vec<f64>,
    },
    /// A card.
    #[doc(hidden)]
    Card(card::StepClock),
}

impl StepClock {
    /// Begins the first step.
    ///
    /// # Errors
    /// The driver refuses, as for the other calls.
    pub fn start(device: &Device) -> Result<Self> {
        Ok(match device {
            Device::Cpu => Self::Host {
                last: Instant::now(),
                open: Vec::new(),
            },
            other => Self::Card(card::StepClock::start(other)?),
        })
    }

    /// All work of a step has been told to the device: the next one begins.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn mark(&mut self) -> Result<()> {
        match self {
            Self::Host { last, open } => {
                open.push(last.elapsed().as_secs_f64());
                *last = Instant::now();
                Ok(())
            }
            Self::Card(clock) => clock.mark(),
        }
    }

    /// Seconds of each step that was done since the last call; waits while more than `ahead` steps are not.
    ///
    /// # Errors
    /// The driver refuses, or a step failed.
    pub fn finished(&mut self, ahead: usize) -> Result<Vec<f64>> {
        match self {
            Self::Host { open, .. } => Ok(std::mem::take(open)),
            Self::Card(clock) => clock.finished(ahead),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        let list = |devices: &[One]| Ok(DeviceChoice::List(devices.to_vec()));
        assert_eq!("cpu".parse(), list(&[One::Cpu]));
        assert_eq!("cuda".parse(), list(&[One::Cuda(0)]));
        assert_eq!("cuda:0,cuda:3".parse(), list(&[One::Cuda(0), One::Cuda(3)]));
        assert_eq!("cuda:all".parse(), Ok(DeviceChoice::AllCuda));
        assert!("gpu".parse::<DeviceChoice>().is_err());
        assert!("cuda:x".parse::<DeviceChoice>().is_err());
    }

    #[test]
    fn a_lack_of_memory_is_known_by_its_type_and_not_by_its_words() {
        let typed = anyhow::Error::from(OutOfMemory).context("the UNet");
        assert!(is_out_of_memory(&typed));
        let worded = anyhow::anyhow!("the file is called out of memory.png");
        assert!(!is_out_of_memory(&worded));
        let wrapped = candle_core::Error::Msg("out of memory".into()).context("step 1");
        assert!(!is_out_of_memory(&wrapped.into()));
    }
}
