//! Tensors as kernels see them: a pointer and what it points to.

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::CudaStorageSlice as Slice;
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Error, Result, Shape, Storage, StorageRef, Tensor};
use half::{bf16, f16};

use super::card::Card;

/// A tensor on a card, alive and unchanged as long as this is.
pub struct Array<'a> {
    _storage: StorageRef<'a>,
    /// Of its first value.
    pub pointer: u64,
    pub dtype: DType,
    /// From a value to the next, a dimension each.
    pub stride: &'a [usize],
}

impl<'a> Array<'a> {
    /// A tensor whose values lie one after the other.
    ///
    /// # Errors
    /// They do not, or it is not on `card`.
    pub fn contiguous(tensor: &'a Tensor, card: &Card) -> Result<Self> {
        if !tensor.is_contiguous() {
            return Err(Error::Msg(format!(
                "a CUDA kernel was given a tensor of shape {:?} and strides {:?}, expected one that is contiguous",
                tensor.dims(),
                tensor.stride()
            )));
        }
        Self::strided(tensor, card)
    }

    /// A tensor of any strides.
    ///
    /// # Errors
    /// It is not on `card`, or of a type that no kernel takes.
    pub fn strided(tensor: &'a Tensor, card: &Card) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(cuda) = &*storage else {
            return Err(Error::Msg(
                "a CUDA kernel was given a tensor that is not on a card".into(),
            ));
        };
        if !cuda.device.same_device(&card.device) {
            return Err(Error::Msg(
                "a CUDA kernel was given tensors of several cards".into(),
            ));
        }
        let start = match &cuda.slice {
            Slice::F32(slice) => card.pointer(slice),
            Slice::F16(slice) => card.pointer(slice),
            Slice::BF16(slice) => card.pointer(slice),
            _ => return Err(not_taken(tensor.dtype())),
        };
        let dtype = tensor.dtype();
        card.takes(dtype)?;
        let offset = layout.start_offset() * dtype.size_in_bytes();
        Ok(Self {
            pointer: start + offset as u64,
            dtype,
            stride: layout.stride(),
            _storage: storage,
        })
    }

    /// The same where there is one.
    ///
    /// # Errors
    /// As [`contiguous`](Self::contiguous).
    pub fn optional(tensor: Option<&'a Tensor>, card: &Card) -> Result<Option<Self>> {
        tensor
            .map(|tensor| Self::contiguous(tensor, card))
            .transpose()
    }
}

/// The pointer of an array, null where there is none.
pub fn pointer(array: Option<&Array>) -> u64 {
    array.map_or(0, |array| array.pointer)
}

/// # Errors
/// Always: what a kernel was given.
fn not_taken(dtype: DType) -> Error {
    Error::Msg(format!(
        "the CUDA kernels take float32, float16 and bfloat16, not {dtype:?}"
    ))
}

/// The end of a kernel's name.
pub fn suffix(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::F16 => Ok("f16"),
        DType::BF16 => Ok("bf16"),
        other => Err(not_taken(other)),
    }
}

/// Memory that a kernel is about to fill.
pub struct Output {
    storage: CudaStorage,
    pub pointer: u64,
}

impl Output {
    /// Room for `count` values.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(count: usize, dtype: DType, card: &Card) -> Result<Self> {
        card.takes(dtype)?;
        // SAFETY: it becomes a tensor when a kernel that writes all of it is in the stream (`tensor`).
        let (slice, pointer) = unsafe {
            match dtype {
                DType::F32 => {
                    let slice = card.device.alloc::<f32>(count)?;
                    let pointer = card.pointer(&slice);
                    (Slice::F32(slice), pointer)
                }
                DType::F16 => {
                    let slice = card.device.alloc::<f16>(count)?;
                    let pointer = card.pointer(&slice);
                    (Slice::F16(slice), pointer)
                }
                DType::BF16 => {
                    let slice = card.device.alloc::<bf16>(count)?;
                    let pointer = card.pointer(&slice);
                    (Slice::BF16(slice), pointer)
                }
                other => return Err(not_taken(other)),
            }
        };
        let device = card.device.clone();
        Ok(Self {
            storage: CudaStorage { slice, device },
            pointer,
        })
    }

    /// What was written, once the kernel that writes it is in the stream.
    pub fn tensor(self, shape: impl Into<Shape>) -> Tensor {
        Tensor::from_storage(
            Storage::Cuda(self.storage),
            shape,
            BackpropOp::none(),
            false,
        )
    }
}

/// Values that a kernel reads at once: the most that 16 bytes hold and `channels` is a multiple of.
///
/// The pointers are of whole tensors or start at a multiple of `channels`, so that the vectors are aligned.
pub fn vector(channels: usize, dtype: DType) -> usize {
    let most = 16 / dtype.size_in_bytes();
    [8, 4, 2]
        .into_iter()
        .find(|&n| n <= most && channels.is_multiple_of(n))
        .unwrap_or(1)
}
