//! Matrix products by cuBLASLt, with bias and residual in the call.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::ptr::from_ref;
use std::sync::Mutex;

use candle_core::cuda_backend::cudarc::cublaslt::result::{self, CublasError};
use candle_core::cuda_backend::cudarc::cublaslt::sys;
use candle_core::{DType, Error, Tensor};

use super::arrays::{Array, Output, pointer};
use super::calls::{Float32, Multiply, Places};
use super::card::{Card, PerCard, locked, of_device};
use super::own;

type Result<T, E = Error> = std::result::Result<T, E>;

/// `CUBLAS_OP_T`, which cuBLASLt's header takes from cuBLAS's.
const TRANSPOSED: u32 = 1;
/// Memory that a product may use: NVIDIA's advice for the largest cards.
const WORKSPACE: usize = 32 << 20;

/// A product's kind, for which one plan serves.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Kind {
    product: Multiply,
    result: DType,
    float32: Float32,
    bias: bool,
    residual: bool,
    /// Of the pointers of weight, input, residual and output, in bytes.
    alignments: [u32; 4],
}

/// cuBLASLt's handle and what it was asked before.
struct Products {
    handle: sys::cublasLtHandle_t,
    plans: HashMap<Kind, Option<Plan>>,
}

// SAFETY: cuBLASLt's handles may be used from any thread; this one from one at a time, behind a lock.
unsafe impl Send for Products {}

static PRODUCTS: PerCard<Mutex<Products>> = PerCard::new();

impl Products {
    /// # Errors
    /// cuBLASLt does not start.
    fn new() -> Result<Self> {
        Ok(Self {
            handle: result::create_handle().map_err(failed)?,
            plans: HashMap::new(),
        })
    }

    fn plan(&mut self, kind: Kind) -> Result<Option<&Plan>> {
        let plan = match self.plans.entry(kind) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(place) => place.insert(Plan::new(self.handle, &kind).map_err(failed)?),
        };
        Ok(plan.as_ref())
    }
}

fn failed(error: CublasError) -> Error {
    Error::Cuda(Box::new(error))
}

/// Descriptors and algorithm of one kind of product.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    input: sys::cublasLtMatrixLayout_t,
    output: sys::cublasLtMatrixLayout_t,
    chosen: sys::cublasLtMatmulHeuristicResult_t,
}

fn data_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::F16 => sys::cudaDataType::CUDA_R_16F,
        DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
        _ => sys::cudaDataType::CUDA_R_32F,
    }
}

fn compute_type(kind: &Kind) -> sys::cublasComputeType_t {
    match (kind.product.dtype, kind.float32) {
        (DType::F32, Float32::Tf32) => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
    }
}

impl Plan {
    /// In cuBLAS's column-major words, y^T (outputs, rows) = W^T^T (outputs, inputs) x^T (inputs, rows). None where it has no
    /// algorithm.
    fn new(handle: sys::cublasLtHandle_t, kind: &Kind) -> Result<Option<Self>, CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let size = kind.product;
        let (rows, inputs, outputs) = (size.rows as u64, size.inputs as u64, size.outputs as u64);
        let (data, sum) = (data_type(size.dtype), data_type(kind.result));
        let layout = |data, rows: u64, columns| {
            result::create_matrix_layout(data, rows, columns, rows.cast_signed())
        };
        let weight = layout(data, inputs, outputs)?;
        let input = layout(data, inputs, rows)?;
        let output = layout(sum, outputs, rows)?;
        let product =
            result::create_matmul_desc(compute_type(kind), sys::cudaDataType::CUDA_R_32F)?;
        let set = |attribute, value: u32| {
            let value = from_ref(&value).cast::<c_void>();
            // SAFETY: the descriptor is alive; each attribute set here is of 32 bits.
            unsafe {
                result::set_matmul_desc_attribute(product, attribute, value, size_of::<u32>())
            }
        };
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, TRANSPOSED)?;
        if kind.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue)?;
            set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, sum as u32)?;
        }
        let mut plan = Self {
            product,
            weight,
            input,
            output,
            // SAFETY: a struct of numbers, for which zeros are values; it is overwritten before it is used.
            chosen: unsafe { std::mem::zeroed() },
        };
        let preference = preference(kind)?;
        // SAFETY: all descriptors are alive.
        let chosen = unsafe {
            result::get_matmul_algo_heuristic(
                handle, product, weight, input, output, output, preference,
            )
        };
        // SAFETY: it was made above and is not used again.
        unsafe { result::destroy_matmul_pref(preference) }?;
        match chosen {
            Ok(chosen) => {
                plan.chosen = chosen;
                Ok(Some(plan))
            }
            Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Binds the bias's place, which the descriptor holds.
    fn set_bias(&self, bias: u64) -> Result<(), CublasError> {
        use sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
        let value = from_ref(&bias).cast::<c_void>();
        // SAFETY: the descriptor is alive; the attribute is a pointer of the device.
        unsafe {
            result::set_matmul_desc_attribute(
                self.product,
                CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                value,
                size_of::<u64>(),
            )
        }
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and used by nobody any more. What cannot be given back is left.
        unsafe {
            let _ = result::destroy_matmul_desc(self.product);
            for layout in [self.weight, self.input, self.output] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

fn preference(kind: &Kind) -> Result<sys::cublasLtMatmulPreference_t, CublasError> {
    use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
    let preference = result::create_matmul_pref()?;
    let workspace = from_ref(&WORKSPACE).cast::<c_void>();
    let attributes = [
        Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
        Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
        Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
    ];
    // SAFETY: the preference is alive; the attributes are a size_t and numbers of 32 bits.
    unsafe {
        result::set_matmul_pref_attribute(
            preference,
            Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            workspace,
            size_of::<usize>(),
        )?;
        for (attribute, bytes) in attributes.into_iter().zip(&kind.alignments) {
            let bytes = from_ref(bytes).cast::<c_void>();
            result::set_matmul_pref_attribute(preference, attribute, bytes, size_of::<u32>())?;
        }
    }
    Ok(preference)
}

/// The largest power of two, up to 256, that an address is a multiple of.
fn alignment(pointer: u64) -> u32 {
    1 << pointer.trailing_zeros().min(8)
}

/// A linear layer's weights on a card.
pub struct Linear {
    /// (outputs, inputs)
    pub weight: Tensor,
    /// (outputs), of the type of the result.
    pub bias: Option<Tensor>,
    pub float32: Float32,
}

impl Linear {
    /// `x W^T + bias + residual`: x (…, inputs) -> (…, outputs) in `result`, which is x's type or float32.
    ///
    /// # Errors
    /// The shapes do not fit, or the device gives up.
    pub fn forward(&self, x: &Tensor, residual: Option<&Tensor>, result: DType) -> Result<Tensor> {
        let card = of_device(x.device())?;
        let (outputs, inputs) = self.weight.dims2()?;
        let mut shape = x.dims().to_vec();
        if shape.pop() != Some(inputs) {
            return Err(Error::Msg(format!(
                "a linear layer of {inputs} inputs was given {:?}",
                x.shape()
            )));
        }
        shape.push(outputs);
        let rows = x.elem_count() / inputs;
        let (input, weight) = (
            Array::contiguous(x, &card)?,
            Array::contiguous(&self.weight, &card)?,
        );
        let bias = Array::optional(self.bias.as_ref(), &card)?;
        let added = Array::optional(residual, &card)?;
        let result_type = |array: &Option<Array>| array.as_ref().is_none_or(|a| a.dtype == result);
        let sized = residual.is_none_or(|residual| residual.elem_count() == rows * outputs);
        if input.dtype != weight.dtype || !result_type(&bias) || !result_type(&added) || !sized {
            return Err(Error::Msg(format!(
                "a linear layer of {inputs} to {outputs} in {:?} was given {:?} in {:?}",
                weight.dtype,
                x.shape(),
                input.dtype
            )));
        }
        let y = Output::new(rows * outputs, result, &card)?;
        let places = Places {
            weight: weight.pointer,
            input: input.pointer,
            bias: pointer(bias.as_ref()),
            residual: pointer(added.as_ref()),
            output: y.pointer,
        };
        let product = Multiply {
            rows,
            inputs,
            outputs,
            dtype: input.dtype,
        };
        let kind = Kind {
            product,
            result,
            float32: self.float32,
            bias: bias.is_some(),
            residual: added.is_some(),
            alignments: [places.weight, places.input, places.addend(), places.output]
                .map(alignment),
        };
        if !multiply(&card, kind, places)? {
            card.note(format!(
                "cuBLASLt has no product of {outputs} x {inputs} x {rows} from {:?} to {result:?}: our own convolution does it",
                input.dtype
            ));
            if result != input.dtype {
                return self
                    .widened()?
                    .forward(&x.to_dtype(result)?, residual, result);
            }
            own::multiply(&card, product, places)?;
        }
        Ok(y.tensor(shape))
    }
}

impl Linear {
    /// The same with all weights in float32, which every way takes.
    fn widened(&self) -> Result<Self> {
        let bias = self.bias.as_ref().map(|bias| bias.to_dtype(DType::F32));
        Ok(Self {
            weight: self.weight.to_dtype(DType::F32)?,
            bias: bias.transpose()?,
            float32: self.float32,
        })
    }
}

/// Whether cuBLASLt could.
fn multiply(card: &Card, kind: Kind, places: Places) -> Result<bool> {
    let products = PRODUCTS.of(&card.device, || Ok(Mutex::new(Products::new()?)))?;
    let mut products = locked(&products);
    let handle = products.handle;
    let Some(plan) = products.plan(kind)? else {
        return Ok(false);
    };
    if kind.bias {
        plan.set_bias(places.bias).map_err(failed)?;
    }
    let workspace = match plan.chosen.workspaceSize {
        0 => 0,
        bytes => card.scratch(bytes)?,
    };
    let (one, addend) = (1f32, f32::from(u8::from(kind.residual)));
    // SAFETY: handle and descriptors are alive; the matrices have the sizes that the layouts say (`forward`); the workspace has
    // what the algorithm asks for; alpha and beta are float32, as the scale type is.
    let done = unsafe {
        result::matmul(
            handle,
            plan.product,
            from_ref(&one).cast(),
            from_ref(&addend).cast(),
            places.weight as *const c_void,
            plan.weight,
            places.input as *const c_void,
            plan.input,
            places.addend() as *const c_void,
            plan.output,
            places.output as *mut c_void,
            plan.output,
            &raw const plan.chosen.algo,
            workspace as *mut c_void,
            plan.chosen.workspaceSize,
            card.stream.cu_stream().cast(),
        )
    };
    match done {
        Ok(()) => Ok(true),
        Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => {
            products.plans.insert(kind, None);
            Ok(false)
        }
        Err(error) => Err(failed(error)),
    }
}
