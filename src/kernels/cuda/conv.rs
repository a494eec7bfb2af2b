//! Convolutions over channels-last maps: by cuDNN where the build has it and it takes the shape, else by a kernel of our own;
//! those of one position are products.

use candle_core::{DType, Error, Result, Tensor};

use super::arrays::{Array, Output, pointer};
use super::calls::{Convolve, Filter, Float32, Places, Read};
#[cfg(feature = "cudnn")]
use super::card::Card;
use super::card::of_device;
#[cfg(feature = "cudnn")]
use super::cudnn;
use super::gemm::Linear;
use super::{maps, own};
use crate::kernels::Activation;

/// A convolution's weights on a card.
pub struct Convolution {
    filter: Filter,
    /// (outputs, kernel, kernel, inputs), or (outputs, inputs) of a product.
    weight: Tensor,
    bias: Option<Tensor>,
    float32: Float32,
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

    /// The same weights once for each row of `shifts` (n, outputs), float32, which is added to the bias. All biases are made here, at once:
    /// none of the convolutions has more to do than this one.
    ///
    /// # Errors
    /// It has no bias, or another number of outputs.
    pub fn shifted_by_each(&self, shifts: &Tensor) -> Result<Vec<Self>> {
        let Some(bias) = &self.bias else {
            return Err(Error::Msg(
                "a convolution without a bias cannot be shifted".into(),
            ));
        };
        let all = shifts.broadcast_add(&bias.to_dtype(DType::F32)?)?;
        let all = all.to_dtype(bias.dtype())?;
        let one = |row: usize| -> Result<Self> {
            Ok(Self {
                filter: self.filter,
                weight: self.weight.clone(),
                bias: Some(all.get(row)?),
                float32: self.float32,
            })
        };
        (0..shifts.dim(0)?).map(one).collect()
    }

    /// x (b, h, w, inputs) -> (b, h', w', outputs), plus `residual` of that shape, through `activation`.
    ///
    /// # Errors
    /// The shapes do not fit, or the device gives up.
    pub fn forward(
        &self,
        x: &Tensor,
        read: Read,
        residual: Option<&Tensor>,
        activation: Activation,
    ) -> Result<Tensor> {
        if self.filter.is_product() && read == Read::Plain {
            return activated(self.product(x, residual)?, activation);
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
        if let Some(y) = self.by_cudnn(&card, x, read, (high, wide), added.as_ref(), activation)? {
            return Ok(y);
        }
        let y = Output::new(b * high * wide * shape.3, input.dtype, &card)?;
        let call = Convolve {
            filter: self.filter,
            map: (b, h, w),
            out: (high, wide),
            dtype: input.dtype,
            activation,
        };
        let places = Places {
            weight: weight.pointer,
            input: input.pointer,
            bias: pointer(bias.as_ref()),
            residual: pointer(added.as_ref()),
            output: y.pointer,
        };
        own::convolve(&card, &call, times, places)?;
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
        activation: Activation,
    ) -> Result<Option<Tensor>> {
        let mut filter = self.filter;
        // It takes none without a bias, which only products are here.
        if self.bias.is_none() || cudnn::refuses(card, &filter, x.dtype(), self.float32)? {
            return Ok(None);
        }
        // It knows no other activation in the call.
        let (its_own, after) = match activation {
            Activation::None | Activation::Relu => (activation, Activation::None),
            other => (Activation::None, other),
        };
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
        let call = Convolve {
            filter,
            map: (b, h, w),
            out,
            dtype: input.dtype,
            activation: its_own,
        };
        let places = Places {
            weight: weight.pointer,
            input: input.pointer,
            bias: pointer(bias.as_ref()),
            residual: pointer(residual),
            output: y.pointer,
        };
        let done = cudnn::forward(card, call, self.float32, places)?;
        if !done {
            cudnn::refused(card, &self.filter, x.dtype(), self.float32)?;
            return Ok(None);
        }
        let y = y.tensor((b, out.0, out.1, filter.outputs));
        Ok(Some(activated(y, after)?))
    }
}

fn activated(x: Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::None => Ok(x),
        other => maps::activation(&x, other),
    }
}
