//! What the models run on: the CPU, or one or several CUDA cards.

use std::str::FromStr;

#[cfg(feature = "cuda")]
use anyhow::Context;
#[cfg(feature = "cuda")]
use anyhow::ensure;
use anyhow::{Result, bail};
use candle_core::{DType, Device};

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
}

/// What computes the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// This program's CPU kernels, on channels-last maps.
    CpuKernels,
    /// This program's CUDA kernels and the CUDA libraries, on channels-last maps.
    CardKernels,
    /// candle's stock operations, on channels-first maps, on any device.
    Stock,
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
        }
    }
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
                One::Cuda(number) => cuda(number),
            };
            Ok((names.iter().map(open).collect::<Result<_>>()?, None))
        }
        DeviceChoice::AllCuda => {
            let devices = (0..count_cards()?.max(1)).map(cuda);
            Ok((devices.collect::<Result<_>>()?, None))
        }
        DeviceChoice::Auto if !cfg!(feature = "cuda") => Ok((vec![Device::Cpu], None)),
        DeviceChoice::Auto => match cuda(0) {
            Ok(device) => Ok((vec![device], None)),
            Err(error) => Ok((
                vec![Device::Cpu],
                Some(format!("running on the CPU: {error:#}")),
            )),
        },
    }
}

/// What candle opens on a CUDA device: what it is, its file where the CUDA libraries are opened at the first call (a
/// build with `.ci/cuda`, which knows CUDA 13), and its files where they are linked and so loaded already.
#[cfg(all(feature = "cuda", target_os = "linux"))]
const LIBRARIES: [(&str, &str, &[&str]); 5] = [
    ("the NVIDIA driver", "libcuda.so.1", &[]),
    ("cuBLASLt", "libcublasLt.so.13", &["libcublasLt.so.12"]),
    ("cuBLAS", "libcublas.so.13", &["libcublas.so.12"]),
    ("cuRAND", "libcurand.so.10", &[]),
    ("cuDNN", "libcudnn.so.9", &["libcudnn.so.8"]),
];

/// Looks for the libraries by name, so that every missing one is told of at once and by its name: what CUDA itself
/// says without them is "not initialised".
#[cfg(all(feature = "cuda", target_os = "linux"))]
fn find_libraries() -> Result<()> {
    let opens = |file: &str, flags| {
        std::ffi::CString::new(file).is_ok_and(|file| {
            // SAFETY: `file` ends in a zero byte. The libraries are NVIDIA's, whose loading has no conditions, and
            // they stay open.
            !unsafe { libc::dlopen(file.as_ptr(), flags) }.is_null()
        })
    };
    let missing: Vec<String> = LIBRARIES
        .into_iter()
        .filter(|(what, ..)| cfg!(feature = "cudnn") || *what != "cuDNN")
        .filter(|(_, file, linked)| {
            !opens(file, libc::RTLD_NOW | libc::RTLD_GLOBAL)
                && !linked
                    .iter()
                    .any(|file| opens(file, libc::RTLD_NOW | libc::RTLD_NOLOAD))
        })
        .map(|(what, file, _)| format!("{what} ({file})"))
        .collect();
    if !missing.is_empty() {
        bail!(
            "CUDA needs {}, not found on this machine: install what is missing, or add its folder to LD_LIBRARY_PATH",
            missing.join(", ")
        );
    }
    Ok(())
}

#[cfg(all(feature = "cuda", not(target_os = "linux")))]
fn find_libraries() -> Result<()> {
    Ok(())
}

/// How many cards the driver shows; `CUDA_VISIBLE_DEVICES` hides the others.
#[cfg(feature = "cuda")]
fn count_cards() -> Result<usize> {
    use candle_core::cuda_backend::cudarc::driver::CudaContext;
    find_libraries()?;
    let count = CudaContext::device_count().context("the NVIDIA driver cannot be used")?;
    Ok(usize::try_from(count)?)
}

#[cfg(feature = "cuda")]
fn cuda(number: usize) -> Result<Device> {
    let count = count_cards()?;
    ensure!(
        number < count,
        "there is no CUDA device {number}: the NVIDIA driver shows {count}, counted from 0"
    );
    let device =
        Device::new_cuda(number).with_context(|| format!("CUDA device {number} cannot be used"))?;
    keep_memory(device.as_cuda_device()?);
    Ok(device)
}

/// Whether a card computes in bfloat16: from compute capability 8.0 on.
///
/// # Errors
/// The driver does not tell.
#[cfg(feature = "cuda")]
pub fn has_bfloat16(device: &Device) -> Result<bool> {
    use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
    let Device::Cuda(card) = device else {
        return Ok(false);
    };
    let stream = card.cuda_stream();
    let major = stream
        .context()
        .attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    Ok(major >= 8)
}

/// Whether a card computes in bfloat16; there is none in a build without CUDA.
///
/// # Errors
/// None.
#[cfg(not(feature = "cuda"))]
pub fn has_bfloat16(_: &Device) -> Result<bool> {
    Ok(false)
}

/// Frees allocations of what they need not cost: two events for every tensor, and memory that goes back to the driver
/// at every synchronisation.
#[cfg(feature = "cuda")]
fn keep_memory(device: &candle_core::CudaDevice) {
    use candle_core::cuda_backend::cudarc::driver::{result, sys};
    use sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: events order the work of several streams. A device has one here, for which cudarc makes events that it
    // neither records nor awaits.
    unsafe { device.disable_event_tracking() };
    let mut threshold = u64::MAX;
    // SAFETY: the context is alive, so its device is valid; the attribute is a u64 that the driver copies.
    let set = unsafe {
        result::device::get_default_mem_pool(device.cuda_stream().context().cu_device()).and_then(
            |pool| {
                let value = (&raw mut threshold).cast();
                result::mem_pool::set_attribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, value)
            },
        )
    };
    // Cards without memory pools allocate as they always did.
    let _ = set;
}

#[cfg(not(feature = "cuda"))]
fn count_cards() -> Result<usize> {
    Ok(1)
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize) -> Result<Device> {
    bail!(
        "this build runs on the CPU alone: build it with `cargo build --release --features cuda,cudnn`, or use --device cpu"
    )
}

/// The device, or this machine, has no memory left for what was asked of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("out of memory")]
pub struct OutOfMemory;

/// Whether this process can have so many bytes more, as far as the system tells: it is asked for their addresses, which a
/// limit (`ulimit -v`) may deny. Running out later would end the process.
///
/// # Errors
/// [`OutOfMemory`].
pub fn can_allocate(bytes: u64) -> Result<(), OutOfMemory> {
    let bytes = usize::try_from(bytes).map_err(|_| OutOfMemory)?;
    Vec::<u8>::new()
        .try_reserve_exact(bytes)
        .map_err(|_| OutOfMemory)
}

/// Bytes of this machine's memory that are free, or of what the process's group may have; None where the system does
/// not tell.
pub fn free_memory() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let number = |text: String| text.trim().parse::<u64>().ok();
    let machine = read("/proc/meminfo")?
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|line| number(line.trim_end_matches(" kB").into()))
        .map(|kib| kib * 1024)?;
    let group = read("/sys/fs/cgroup/memory.max")
        .and_then(number)
        .zip(read("/sys/fs/cgroup/memory.current").and_then(number))
        .map_or(u64::MAX, |(most, now)| most.saturating_sub(now));
    Some(machine.min(group))
}

/// Whether an error is a lack of memory, by its type: [`OutOfMemory`], or what CUDA's driver and cuBLAS call it.
pub fn is_out_of_memory(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.is::<OutOfMemory>()
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
        Error::Cuda(error) => cuda_is_out_of_memory(error.as_ref()),
        _ => false,
    }
}

#[cfg(feature = "cuda")]
fn cuda_is_out_of_memory(error: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    use candle_core::cuda_backend::CudaError;
    use candle_core::cuda_backend::cudarc::cublas::result::CublasError;
    use candle_core::cuda_backend::cudarc::cublas::sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED;
    use candle_core::cuda_backend::cudarc::driver::DriverError;
    use candle_core::cuda_backend::cudarc::driver::sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
    matches!(
        error.downcast_ref::<CudaError>(),
        Some(
            CudaError::Cuda(DriverError(CUDA_ERROR_OUT_OF_MEMORY))
                | CudaError::Cublas(CublasError(CUBLAS_STATUS_ALLOC_FAILED))
        )
    )
}

#[cfg(not(feature = "cuda"))]
fn cuda_is_out_of_memory(_: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    false
}

/// The precision of a run on `device` where none is asked for: float16 on CUDA, float32 on the CPU.
pub fn default_dtype(device: &Device) -> DType {
    match device {
        Device::Cpu => DType::F32,
        _ => DType::F16,
    }
}

/// A short name for messages.
pub fn name(device: &Device) -> String {
    match device {
        Device::Cpu => "cpu".into(),
        other => format!("{:?}", other.location()).to_lowercase(),
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
