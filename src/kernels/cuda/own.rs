//! Convolutions and products by the kernel of our own, which takes every shape.

use candle_core::{DType, Result};

use super::arrays::suffix;
use super::calls::{Convolve, Multiply, Places};
use super::card::{Argument, Card};
use super::{int, number};
use crate::kernels::Activation;

const MODULE: &str = "sd_conv";

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
    activation: i32,
    wide: i32,
}

// SAFETY: plain numbers in C's layout, the same as ConvShape of sd_conv.cu.
unsafe impl Argument for Shape {}

/// A convolution whose map is read as if every value were there `enlarge` times in each direction.
///
/// # Errors
/// The device gives up.
pub fn convolve(card: &Card, call: &Convolve, enlarge: usize, places: Places) -> Result<()> {
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
        activation: number(call.activation),
        wide: i32::from(filter.inputs.is_multiple_of(8)),
    };
    // SAFETY: the map, the filter, bias, residual and output are of the shapes that `Convolution::forward` has checked.
    unsafe { launch(card, shape, call.dtype, places) }
}

/// A product: a convolution of one position over one line.
///
/// # Errors
/// The device gives up.
pub fn multiply(card: &Card, product: Multiply, places: Places) -> Result<()> {
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
        activation: number(Activation::None),
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
