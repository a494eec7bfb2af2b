//! CUDA cards: opening one, what it is, and what its errors mean.

use std::collections::VecDeque;
use std::error::Error as StdError;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use candle_core::cuda_backend::CudaError;
use candle_core::cuda_backend::cudarc::driver::sys::{CUevent_flags, CUresult};
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, CudaStream, DriverError, result, sys,
};
use candle_core::cuda_backend::cudarc::{cublas, cublaslt};
use candle_core::{DType, Device, Error, Tensor};

/// What candle opens on a CUDA device: what it is, its file where the CUDA libraries are opened at the first call (a
/// build with `.ci/cuda`, which knows CUDA 13), and its files where they are linked and so loaded already.
#[cfg(target_os = "linux")]
const LIBRARIES: [(&str, &str, &[&str]); 5] = [
    ("the NVIDIA driver", "libcuda.so.1", &[]),
    ("cuBLASLt", "libcublasLt.so.13", &["libcublasLt.so.12"]),
    ("cuBLAS", "libcublas.so.13", &["libcublas.so.12"]),
    ("cuRAND", "libcurand.so.10", &[]),
    ("cuDNN", "libcudnn.so.9", &["libcudnn.so.8"]),
];

/// Looks for the libraries by name, so that every missing one is told of at once and by its name: what CUDA itself
/// says without them is "not initialised".
#[cfg(target_os = "linux")]
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

#[cfg(not(target_os = "linux"))]
fn find_libraries() -> Result<()> {
    Ok(())
}

/// How many cards the driver shows; `CUDA_VISIBLE_DEVICES` hides the others.
pub fn count() -> Result<usize> {
    find_libraries()?;
    let count = CudaContext::device_count().context("the NVIDIA driver cannot be used")?;
    Ok(usize::try_from(count)?)
}

pub fn open(number: usize) -> Result<Device> {
    let count = count()?;
    ensure!(
        number < count,
        "there is no CUDA device {number}: the NVIDIA driver shows {count}, counted from 0"
    );
    let device =
        Device::new_cuda(number).with_context(|| format!("CUDA device {number} cannot be used"))?;
    keep_memory(device.as_cuda_device()?);
    try_kernel(&device).with_context(|| format!("CUDA device {number} cannot be used"))?;
    Ok(device)
}

/// The oldest cards that the kernels are for: Turing, the first whose tensor cores every kernel of ours may use.
const LEAST_CAPABILITY: (i32, i32) = (7, 5);

/// What the smallest of candle's kernels makes of 0, which is 1.
fn one(device: &Device) -> Result<f32> {
    let zero = Tensor::zeros(1, DType::F32, device)?;
    Ok(zero.affine(1.0, 1.0)?.squeeze(0)?.to_scalar()?)
}

pub fn computes(device: &Device) -> Result<bool> {
    Ok(one(device)? == 1.0)
}

/// Loads and runs the smallest of kernels, so that a card or a driver too old for this build is found before the work: no
/// other call tells.
fn try_kernel(device: &Device) -> Result<()> {
    use CUresult::{
        CUDA_ERROR_INVALID_PTX, CUDA_ERROR_NO_BINARY_FOR_GPU, CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
    };
    let context = device.as_cuda_device()?.cuda_stream().context().clone();
    let (major, minor) = context.compute_capability()?;
    ensure!(
        (major, minor) >= LEAST_CAPABILITY,
        "its compute capability is {major}.{minor}, and {}.{} or newer is needed: use --device cpu",
        LEAST_CAPABILITY.0,
        LEAST_CAPABILITY.1
    );
    one(device).map(drop).map_err(|error| match driver_status(&error) {
        Some(CUDA_ERROR_UNSUPPORTED_PTX_VERSION) => error.context(format!(
            "its driver ({}) is older than the CUDA toolkit of this build: update the driver, or use --device cpu",
            software_versions().unwrap_or_default()
        )),
        Some(CUDA_ERROR_NO_BINARY_FOR_GPU | CUDA_ERROR_INVALID_PTX) => error.context(format!(
            "its compute capability, {major}.{minor}, is older than the one that this build is for: build with \
             CUDA_COMPUTE_CAP={major}{minor}, or use --device cpu"
        )),
        _ => error,
    })
}

/// What the driver answered, where it is the driver's error.
fn driver_status(error: &anyhow::Error) -> Option<CUresult> {
    fn of(error: &Error) -> Option<&CudaError> {
        match error {
            Error::Context { inner, .. }
            | Error::WithPath { inner, .. }
            | Error::WithBacktrace { inner, .. } => of(inner),
            Error::Cuda(error) => error.downcast_ref(),
            _ => None,
        }
    }
    match of(error.downcast_ref()?)? {
        CudaError::Cuda(error) | CudaError::Load { cuda: error, .. } => Some(error.0),
        _ => None,
    }
}

/// Frees allocations of what they need not cost: two events for every tensor, and memory that goes back to the driver
/// at every synchronisation.
fn keep_memory(device: &candle_core::CudaDevice) {
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

/// The statuses of the driver, cuBLAS, cuBLASLt and cuDNN, as cudarc gives them and as candle wraps them.
pub fn is_out_of_memory(error: &(dyn StdError + 'static)) -> bool {
    use CUresult::CUDA_ERROR_OUT_OF_MEMORY;
    const CUBLAS: cublas::sys::cublasStatus_t =
        cublas::sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED;
    const CUBLAS_LT: cublaslt::sys::cublasStatus_t =
        cublaslt::sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED;
    match error.downcast_ref::<CudaError>() {
        Some(CudaError::Cuda(error)) => return error.0 == CUDA_ERROR_OUT_OF_MEMORY,
        Some(CudaError::Load { cuda, .. }) => return cuda.0 == CUDA_ERROR_OUT_OF_MEMORY,
        Some(CudaError::Cublas(error)) => return error.0 == CUBLAS,
        _ => {}
    }
    let driver = error.downcast_ref::<DriverError>();
    let blas = error.downcast_ref::<cublas::result::CublasError>();
    let lt = error.downcast_ref::<cublaslt::result::CublasError>();
    driver.is_some_and(|error| error.0 == CUDA_ERROR_OUT_OF_MEMORY)
        || blas.is_some_and(|error| error.0 == CUBLAS)
        || lt.is_some_and(|error| error.0 == CUBLAS_LT)
        || cudnn_is_out_of_memory(error)
}

#[cfg(feature = "cudnn")]
fn cudnn_is_out_of_memory(error: &(dyn StdError + 'static)) -> bool {
    use candle_core::cuda_backend::cudarc::cudnn::CudnnError;
    /// cuDNN 8's ALLOC_FAILED; cuDNN 9's INTERNAL_ERROR_HOST_ and _DEVICE_ALLOCATION_FAILED.
    const STATUSES: [u32; 3] = [2, 4003, 4004];
    error
        .downcast_ref::<CudnnError>()
        .is_some_and(|error| STATUSES.contains(&(error.0 as u32)))
}

#[cfg(not(feature = "cudnn"))]
fn cudnn_is_out_of_memory(_: &(dyn StdError + 'static)) -> bool {
    false
}

pub fn has_bfloat16(device: &Device) -> Result<bool> {
    let context = device.as_cuda_device()?.cuda_stream().context().clone();
    let (major, _) = context.compute_capability()?;
    Ok(major >= 8)
}

pub fn name(device: &Device) -> Option<String> {
    let device = device.as_cuda_device().ok()?;
    let name = device.cuda_stream().context().name().ok()?;
    Some(name.trim().to_owned())
}

pub fn description(device: &Device) -> Result<Vec<String>> {
    let context = device.as_cuda_device()?.cuda_stream().context().clone();
    let (major, minor) = context.compute_capability()?;
    let card = format!(
        "compute capability {major}.{minor}, {:.1} GB",
        context.total_mem()? as f64 / 1e9
    );
    Ok(vec![card, software_versions()?])
}

/// "CUDA driver 13.0, cuBLAS 13.1.0, cuDNN 9.12.0"
fn software_versions() -> Result<String> {
    let mut version = 0;
    // SAFETY: the function writes one int, where it is told to.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
    // SAFETY: it takes nothing and returns a number. The library is there: `find_libraries` looked for it.
    let blas = unsafe { cublaslt::sys::cublasLtGetVersion() };
    let dnn = match cudnn_version() {
        Some(version) => format!(
            ", cuDNN {}.{}.{}",
            version / 10_000,
            version / 100 % 100,
            version % 100
        ),
        None => String::new(),
    };
    Ok(format!(
        "CUDA driver {}.{}, cuBLAS {}.{}.{}{dnn}",
        version / 1000,
        version / 10 % 100,
        blas / 10_000,
        blas / 100 % 100,
        blas % 100,
    ))
}

/// Of cuDNN 9: 10000 major + 100 minor + patch.
#[cfg(feature = "cudnn")]
fn cudnn_version() -> Option<usize> {
    Some(candle_core::cuda_backend::cudarc::cudnn::result::get_version())
}

#[cfg(not(feature = "cudnn"))]
fn cudnn_version() -> Option<usize> {
    None
}

pub fn free_memory(device: &Device) -> Option<u64> {
    let device = device.as_cuda_device().ok()?;
    let (free, _) = device.cuda_stream().context().mem_get_info().ok()?;
    Some(free as u64)
}

pub fn total_memory(device: &Device) -> Option<u64> {
    let device = device.as_cuda_device().ok()?;
    let (_, total) = device.cuda_stream().context().mem_get_info().ok()?;
    Some(total as u64)
}

/// Tells from the card's own events how long the steps of its work took.
pub struct StepClock {
    stream: std::sync::Arc<CudaStream>,
    /// The end of the last step that was told of, and the ends of those that were not.
    last: CudaEvent,
    open: VecDeque<CudaEvent>,
}

/// Seconds between two events that the card has passed.
fn elapsed(start: &CudaEvent, end: &CudaEvent) -> Result<f64> {
    // SAFETY: both events are alive, of one context, and recorded with their times. cudarc's own function awaits them
    // first, which they need no more.
    let milliseconds = unsafe { result::event::elapsed(start.cu_event(), end.cu_event()) }?;
    Ok(f64::from(milliseconds) / 1e3)
}

/// Between two looks at an event. A step takes milliseconds at least.
const LOOK: Duration = Duration::from_micros(200);

impl StepClock {
    pub fn start(device: &Device) -> Result<Self> {
        let stream = device.as_cuda_device()?.cuda_stream();
        let last = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        Ok(Self {
            stream,
            last,
            open: VecDeque::new(),
        })
    }

    pub fn mark(&mut self) -> Result<()> {
        let event = self
            .stream
            .record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        self.open.push_back(event);
        Ok(())
    }

    pub fn finished(&mut self, ahead: usize) -> Result<Vec<f64>> {
        let mut seconds = Vec::new();
        while let Some(event) = self.open.front() {
            if event.try_is_complete()? {
                seconds.push(elapsed(&self.last, event)?);
                if let Some(event) = self.open.pop_front() {
                    self.last = event;
                }
            } else if self.open.len() > ahead {
                // Looked at, not waited for: a wait keeps a core of the machine busy.
                std::thread::sleep(LOOK);
            } else {
                break;
            }
        }
        Ok(seconds)
    }
}
