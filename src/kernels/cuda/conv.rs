//! Convolutions over channels-last maps: by cuDNN where the build has it and it takes the shape, else by a kernel of our own;
//! those of one position are products.

use candle_core::{DType, Error, Result, Tensor};

use super::arrays::{Array, Output, pointer, suffix};
use super::card::{Argument, Card, of_device};
#[cfg(feature = "cudnn")]
use super::cudnn;
#[cfg(feature = "cudnn")]
pub use super::cudnn::Convolutions;
use super::gemm::{Float32, Linear, OwnProduct, Places};
use super::int;
#[cfg(feature = "cudnn")]
use super::maps;

const MODULE: &str = "sd_conv";

/// A build without cuDNN keeps nothing for its convolutions.
#[cfg(not(feature = "cudnn"))]
pub struct Convolutions;

#[cfg(not(feature = "cudnn"))]
impl Convolutions {
    /// # Errors
    /// None.
    pub fn new(_: &candle_core::cuda_backend::cudarc::driver::CudaStream) -> Result<Self> {
        Ok(Self)
    }
}

/// What a convolution is, apart from its weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Filter {
    pub inputs: usize,
    pub outputs: usize,
    /// Height and width.
    pub kernel: usize,
    pub stride: usize,
    /// Zeros above and left of the map.
    pub before: usize,
    /// Zeros below and right of it.
    pub after: usize,
}

impl Filter {
    /// Whether it is of one position, and so a product.
    pub fn is_product(&self) -> bool {
        (self.kernel, self.stride, self.before, self.after) == (1, 1, 0, 0)
    }

    fn output(&self, side: usize) -> Result<usize> {
        let padded = side + self.before + self.after;
        let room = padded.checked_sub(self.kernel).ok_or_else(|| {
            Error::Msg(format!(
                "a map of {side} is smaller than a kernel of {}",
                self.kernel
            ))
        })?;
        Ok(room / self.stride + 1)
    }
}

/// How a convolution reads its map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    Plain,
    /// As if every value were there twice in each direction.
    Enlarged,
}

/// A convolution's weights on a card.
pub struct Convolution {
    filter: Filter,
    /// (outputs, kernel, kernel, inputs), or (outputs, inputs) of a product.
    weight: Tensor,
    bias: Option<Tensor>,
    float32: Float32,
}

/// One call of a convolution.
pub struct Call<'a> {
    pub filter: Filter,
    #[cfg(feature = "cudnn")]
    pub float32: Float32,
    /// (b, h, w, inputs) of the map as it is in memory.
    pub map: (usize, usize, usize),
    pub out: (usize, usize),
    pub x: &'a Array<'a>,
    pub weight: u64,
    pub bias: u64,
    pub residual: u64,
    pub y: u64,
}

impl Convolution {
    /// `weight`: (outputs, kernel, kernel, inputs); `bias`: (outputs), of its type, or in float32 for one position: the result is
    /// float32 then.
    ///
    /// # Errors
    /// The weight has another shape.
    pub fn new(
        filter: Filter,
        weight: &Tensor,
        bias: Option<Tensor>,
        float32: Float32,
    ) -> Result<Self> {
        let (outputs, inputs, side) = (filter.outputs, filter.inputs, filter.kernel);
        let weight = if filter.is_product() {
            weight.reshape((outputs, inputs))?
        } else {
            weight.reshape((outputs, side, side, inputs))?
        };
        Ok(Self {
            filter,
            weight,
            bias,
            float32,
        })
    }

    /// x (b, h, w, inputs) -> (b, h', w', outputs), plus `residual` of that shape.
    ///
    /// # Errors
    /// The shapes do not fit, or the device gives up.
    pub fn forward(&self, x: &Tensor, read: Read, residual: Option<&Tensor>) -> Result<Tensor> {
        if self.filter.is_product() && read == Read::Plain {
            return self.product(x, residual);
        }
        let card = of_device(x.device())?;
        let (b, h, w, c) = x.dims4()?;
        let times = match read {
            Read::Plain => 1,
            Read::Enlarged => 2,
        };
        let (high, wide) = (
            self.filter.output(times * h)?,
            self.filter.output(times * w)?,
        );
        let shape = (b, high, wide, self.filter.outputs);
        let (input, weight) = (
            Array::contiguous(x, &card)?,
            Array::contiguous(&self.weight, &card)?,
        );
        let bias = Array::optional(self.bias.as_ref(), &card)?;
        let added = Array::optional(residual, &card)?;
        let other = |array: &Option<Array>| array.as_ref().is_some_and(|a| a.dtype != input.dtype);
        let sized = residual.is_none_or(|residual| residual.dims() == [b, high, wide, shape.3]);
        if c != self.filter.inputs
            || input.dtype != weight.dtype
            || other(&bias)
            || other(&added)
            || !sized
        {
            return Err(Error::Msg(format!(
                "a convolution of {:?} in {:?} was given {:?} in {:?}",
                self.filter,
                weight.dtype,
                x.shape(),
                input.dtype
            )));
        }
        #[cfg(feature = "cudnn")]
        if let Some(y) = self.by_cudnn(&card, x, read, (high, wide), added.as_ref())? {
            return Ok(y);
        }
        let y = Output::new(b * high * wide * shape.3, input.dtype, &card)?;
        let call = Call {
            filter: self.filter,
            #[cfg(feature = "cudnn")]
            float32: self.float32,
            map: (b, h, w),
            out: (high, wide),
            x: &input,
            weight: weight.pointer,
            bias: pointer(bias.as_ref()),
            residual: pointer(added.as_ref()),
            y: y.pointer,
        };
        own(&card, &call, times)?;
        Ok(y.tensor(shape))
    }

    /// The result has the bias's type where there is one.
    fn product(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        let linear = Linear {
            weight: self.weight.clone(),
            bias: self.bias.clone(),
            float32: self.float32,
        };
        let result = self.bias.as_ref().map_or(x.dtype(), Tensor::dtype);
        linear.forward(x, residual, result)
    }

    /// None where cuDNN does not take the shape. It knows no enlarging and no unequal padding: that map is written.
    #[cfg(feature = "cudnn")]
    fn by_cudnn(
        &self,
        card: &Card,
        x: &Tensor,
        read: Read,
        out: (usize, usize),
        residual: Option<&Array>,
    ) -> Result<Option<Tensor>> {
        let mut filter = self.filter;
        // It takes none without a bias, which only products are here.
        if self.bias.is_none() || cudnn::refuses(card, &filter, x.dtype(), self.float32) {
            return Ok(None);
        }
        let mut x = x.clone();
        if read == Read::Enlarged {
            x = maps::repeat_2x(&x)?;
        }
        if filter.before != filter.after {
            x = maps::pad(&x, filter.before, filter.after)?;
            (filter.before, filter.after) = (0, 0);
        }
        let (b, h, w, _) = x.dims4()?;
        let input = Array::contiguous(&x, card)?;
        let weight = Array::contiguous(&self.weight, card)?;
        let bias = Array::optional(self.bias.as_ref(), card)?;
        let y = Output::new(b * out.0 * out.1 * filter.outputs, input.dtype, card)?;
        let call = Call {
            filter,
            float32: self.float32,
            map: (b, h, w),
            out,
            x: &input,
            weight: weight.pointer,
            bias: pointer(bias.as_ref()),
            residual: pointer(residual),
            y: y.pointer,
        };
        let done = cudnn::forward(card, &call)?;
        if !done {
            cudnn::refused(card, &self.filter, x.dtype(), self.float32);
        }
        Ok(done.then(|| y.tensor((b, out.0, out.1, filter.outputs))))
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Shape {
    h: i32,
    w: i32,
    inputs: i32,
    out_h: i32,
    out_w: i32,
    outputs: i32,
    kernel_h: i32,
    kernel_w: i32,
    stride: i32,
    before: i32,
    enlarge: i32,
    rows: i32,
    wide: i32,
}

// SAFETY: plain numbers in C's layout, the same as ConvShape of sd_conv.cu.
unsafe impl Argument for Shape {}

/// By our own kernel.
fn own(card: &Card, call: &Call, enlarge: usize) -> Result<()> {
    let (b, h, w) = call.map;
    let filter = &call.filter;
    let shape = Shape {
        h: int(h)?,
        w: int(w)?,
        inputs: int(filter.inputs)?,
        out_h: int(call.out.0)?,
        out_w: int(call.out.1)?,
        outputs: int(filter.outputs)?,
        kernel_h: int(filter.kernel)?,
        kernel_w: int(filter.kernel)?,
        stride: int(filter.stride)?,
        before: int(filter.before)?,
        enlarge: int(enlarge)?,
        rows: int(b * call.out.0 * call.out.1)?,
        wide: i32::from(filter.inputs.is_multiple_of(8)),
    };
    let places = Places {
        weight: call.weight,
        input: call.x.pointer,
        bias: call.bias,
        residual: call.residual,
        output: call.y,
    };
    // SAFETY: the map, the filter, bias, residual and output are of the shapes that `Convolution::forward` has checked.
    unsafe { launch(card, shape, call.x.dtype, places) }
}

/// A product by our own kernel: a convolution of one position over one line.
///
/// # Errors
/// The device gives up.
pub fn own_product(card: &Card, product: OwnProduct, places: Places) -> Result<()> {
    let shape = Shape {
        h: 1,
        w: int(product.rows)?,
        inputs: int(product.inputs)?,
        out_h: 1,
        out_w: int(product.rows)?,
        outputs: int(product.outputs)?,
        kernel_h: 1,
        kernel_w: 1,
        stride: 1,
        before: 0,
        enlarge: 1,
        rows: int(product.rows)?,
        wide: i32::from(product.inputs.is_multiple_of(8)),
    };
    // SAFETY: the matrices are of the shapes that `Linear::forward` has checked.
    unsafe { launch(card, shape, product.dtype, places) }
}

/// # Safety
/// The places hold what the shape says.
unsafe fn launch(card: &Card, shape: Shape, dtype: DType, places: Places) -> Result<()> {
    let end = suffix(dtype)?;
    let (name, rows) = match dtype {
        DType::F32 => (format!("sd_conv2d_{end}"), 64),
        _ => (format!("sd_conv2d_tiles_{end}"), 128),
    };
    let grid = (
        shape.rows.unsigned_abs().div_ceil(rows),
        shape.outputs.unsigned_abs().div_ceil(64),
        1,
    );
    // SAFETY: the arguments are those of the convolution kernels; the rest is the caller's promise.
    unsafe {
        card.launch(
            (MODULE, &name),
            grid,
            256,
            &[
                &places.input,
                &places.weight,
                &places.bias,
                &places.residual,
                &places.output,
                &shape,
            ],
        )
    }
}
