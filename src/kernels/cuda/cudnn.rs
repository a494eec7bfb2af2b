//! cuDNN's convolutions, bias and residual in the call, channels last.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{c_int, c_void};
use std::ptr::from_ref;
use std::sync::{Arc, Mutex};

use candle_core::cuda_backend::cudarc::cudnn::result::{self, CudnnError};
use candle_core::cuda_backend::cudarc::cudnn::sys;
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::{DType, Error};
use sys::cudnnActivationMode_t as Mode;
use sys::cudnnConvolutionFwdAlgo_t::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM as ALGORITHM;

use super::calls::{Convolve, Filter, Float32, Places};
use super::card::{Card, PerCard, locked};
use crate::kernels::Activation;

type Result<T, E = Error> = std::result::Result<T, E>;

/// A convolution's kind, for which one plan serves.
type Kind = (Convolve, Float32);

/// cuDNN's handle and what it was asked before.
struct Convolutions {
    handle: sys::cudnnHandle_t,
    /// What the output goes through, residual and all, one or the other.
    identity: sys::cudnnActivationDescriptor_t,
    relu: sys::cudnnActivationDescriptor_t,
    /// None for what cuDNN has refused.
    plans: HashMap<Kind, Option<Plan>>,
    /// Kinds as the caller has them (before padding and enlarging) that were refused.
    refused: Vec<(Filter, DType, Float32)>,
}

// SAFETY: cuDNN's handles may be used from any thread; this one from one at a time, behind a lock.
unsafe impl Send for Convolutions {}

fn failed(error: CudnnError) -> Error {
    Error::Cuda(Box::new(error))
}

/// Whether cuDNN says that it has nothing for what was asked, in whichever of its words: versions differ in where they call a
/// layout or a type that they lack a bad parameter.
fn not_supported(error: CudnnError) -> bool {
    let status = format!("{:?}", error.0);
    ["NOT_SUPPORTED", "BAD_PARAM", "ARCH_MISMATCH"]
        .iter()
        .any(|word| status.starts_with(&format!("CUDNN_STATUS_{word}")))
}

static CONVOLUTIONS: PerCard<Mutex<Convolutions>> = PerCard::new();

fn convolutions(card: &Card) -> Result<Arc<Mutex<Convolutions>>> {
    CONVOLUTIONS.of(&card.device, || {
        Ok(Mutex::new(Convolutions::new(&card.stream)?))
    })
}

impl Convolutions {
    /// # Errors
    /// cuDNN does not start.
    fn new(stream: &CudaStream) -> Result<Self> {
        let handle = result::create_handle().map_err(failed)?;
        // SAFETY: the handle was just made; the stream is the device's, alive as long as that.
        unsafe { result::set_stream(handle, stream.cu_stream().cast()) }.map_err(failed)?;
        Ok(Self {
            handle,
            identity: activation(Mode::CUDNN_ACTIVATION_IDENTITY).map_err(failed)?,
            relu: activation(Mode::CUDNN_ACTIVATION_RELU).map_err(failed)?,
            plans: HashMap::new(),
            refused: Vec::new(),
        })
    }
}

fn activation(mode: Mode) -> Result<sys::cudnnActivationDescriptor_t, CudnnError> {
    let descriptor = result::create_activation_descriptor()?;
    let nan = sys::cudnnNanPropagation_t::CUDNN_PROPAGATE_NAN;
    // SAFETY: it was just made.
    unsafe { result::set_activation_descriptor(descriptor, mode, nan, 0.0) }?;
    Ok(descriptor)
}

/// Descriptors and workspace of one kind of convolution.
struct Plan {
    x: sys::cudnnTensorDescriptor_t,
    y: sys::cudnnTensorDescriptor_t,
    bias: sys::cudnnTensorDescriptor_t,
    filter: sys::cudnnFilterDescriptor_t,
    convolution: sys::cudnnConvolutionDescriptor_t,
    workspace: usize,
}

fn data_type(dtype: DType) -> sys::cudnnDataType_t {
    match dtype {
        DType::F16 => sys::cudnnDataType_t::CUDNN_DATA_HALF,
        DType::BF16 => sys::cudnnDataType_t::CUDNN_DATA_BFLOAT16,
        _ => sys::cudnnDataType_t::CUDNN_DATA_FLOAT,
    }
}

/// float32 is multiplied as float32 unless TF32 was asked for: cuDNN's own default is TF32 from capability 8.0 on.
fn math(dtype: DType, float32: Float32) -> sys::cudnnMathType_t {
    match (dtype, float32) {
        (DType::F32, Float32::Exact) => sys::cudnnMathType_t::CUDNN_FMA_MATH,
        (DType::F32, Float32::Tf32) => sys::cudnnMathType_t::CUDNN_DEFAULT_MATH,
        _ => sys::cudnnMathType_t::CUDNN_TENSOR_OP_MATH,
    }
}

const CHANNELS_LAST: sys::cudnnTensorFormat_t = sys::cudnnTensorFormat_t::CUDNN_TENSOR_NHWC;

impl Plan {
    fn new(handle: sys::cudnnHandle_t, (call, float32): &Kind) -> Result<Self, CudnnError> {
        let (b, h, w) = call.map;
        let filter = &call.filter;
        let tensor = |b, h, w, c| tensor(call.dtype, [b, c, h, w]);
        let mut plan = Self {
            x: tensor(b, h, w, filter.inputs)?,
            y: tensor(b, call.out.0, call.out.1, filter.outputs)?,
            bias: tensor(1, 1, 1, filter.outputs)?,
            filter: result::create_filter_descriptor()?,
            convolution: result::create_convolution_descriptor()?,
            workspace: 0,
        };
        let side = filter.kernel as c_int;
        let sizes = [filter.outputs as c_int, filter.inputs as c_int, side, side];
        let (pad, stride) = (filter.before as c_int, filter.stride as c_int);
        // SAFETY: the descriptors were made above. Sums are float32 whatever the data.
        unsafe {
            let data = data_type(call.dtype);
            result::set_filter4d_descriptor(plan.filter, data, CHANNELS_LAST, sizes)?;
            result::set_convolution2d_descriptor(
                plan.convolution,
                pad,
                pad,
                stride,
                stride,
                1,
                1,
                sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION,
                sys::cudnnDataType_t::CUDNN_DATA_FLOAT,
            )?;
            result::set_convolution_math_type(plan.convolution, math(call.dtype, *float32))?;
            plan.workspace = result::get_convolution_forward_workspace_size(
                handle,
                plan.x,
                plan.filter,
                plan.convolution,
                plan.y,
                ALGORITHM,
            )?;
        }
        Ok(plan)
    }
}

/// `sizes`: batch, channels, height, width.
fn tensor(dtype: DType, sizes: [usize; 4]) -> Result<sys::cudnnTensorDescriptor_t, CudnnError> {
    let descriptor = result::create_tensor_descriptor()?;
    let sizes = sizes.map(|size| size as c_int);
    // SAFETY: it was just made.
    unsafe { result::set_tensor4d_descriptor(descriptor, CHANNELS_LAST, data_type(dtype), sizes) }?;
    Ok(descriptor)
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and used by nobody any more. What cannot be given back is left.
        unsafe {
            for descriptor in [self.x, self.y, self.bias] {
                let _ = result::destroy_tensor_descriptor(descriptor);
            }
            let _ = result::destroy_filter_descriptor(self.filter);
            let _ = result::destroy_convolution_descriptor(self.convolution);
        }
    }
}

/// Whether cuDNN has refused such a convolution before, so that its map need not be prepared in vain. The channels decide that,
/// not the map's size.
///
/// # Errors
/// cuDNN does not start.
pub fn refuses(card: &Card, filter: &Filter, dtype: DType, float32: Float32) -> Result<bool> {
    let convolutions = convolutions(card)?;
    let refused = &locked(&convolutions).refused;
    Ok(refused.contains(&(*filter, dtype, float32)))
}

/// Notes that cuDNN has refused a convolution.
///
/// # Errors
/// As [`refuses`].
pub fn refused(card: &Card, filter: &Filter, dtype: DType, float32: Float32) -> Result<()> {
    card.note(format!(
        "cuDNN does not take a convolution of {0}x{0}, {1} to {2} channels, stride {3}, in {dtype:?}: our own does it",
        filter.kernel, filter.inputs, filter.outputs, filter.stride
    ));
    let kind = (*filter, dtype, float32);
    locked(&*convolutions(card)?).refused.push(kind);
    Ok(())
}

/// Whether cuDNN took it.
///
/// # Errors
/// The device gives up.
pub fn forward(card: &Card, call: Convolve, float32: Float32, places: Places) -> Result<bool> {
    let kind = (call, float32);
    let convolutions = convolutions(card)?;
    let mut convolutions = locked(&convolutions);
    let handle = convolutions.handle;
    let activation = match call.activation {
        Activation::None => convolutions.identity,
        Activation::Relu => convolutions.relu,
        // The caller applies the others.
        _ => return Ok(false),
    };
    let plan = match convolutions.plans.entry(kind) {
        Entry::Occupied(found) => found.into_mut(),
        Entry::Vacant(place) => place.insert(match Plan::new(handle, &kind) {
            Ok(plan) => Some(plan),
            Err(error) if not_supported(error) => None,
            Err(error) => return Err(failed(error)),
        }),
    };
    let Some(plan) = plan else {
        return Ok(false);
    };
    let workspace = match plan.workspace {
        0 => 0,
        bytes => card.scratch(bytes)?,
    };
    let (one, added) = (1f32, f32::from(u8::from(places.residual != 0)));
    // SAFETY: handle and descriptors are alive and describe the memory (`Convolution::forward`), the workspace has what the
    // algorithm asks for, and alpha1 and alpha2 are float32, as data up to that type have them.
    let done = unsafe {
        result::convolution_bias_activation_forward(
            handle,
            from_ref(&one).cast(),
            plan.x,
            places.input as *const c_void,
            plan.filter,
            places.weight as *const c_void,
            plan.convolution,
            ALGORITHM,
            workspace as *mut c_void,
            plan.workspace,
            from_ref(&added).cast(),
            plan.y,
            places.addend() as *const c_void,
            plan.bias,
            places.bias as *const c_void,
            activation,
            plan.y,
            places.output as *mut c_void,
        )
    };
    match done {
        Ok(()) => Ok(true),
        Err(error) if not_supported(error) => {
            convolutions.plans.insert(kind, None);
            Ok(false)
        }
        Err(error) => Err(failed(error)),
    }
}
