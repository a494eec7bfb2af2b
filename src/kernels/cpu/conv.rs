//! Convolutions and linear layers: the choice of the algorithm, and its entry points.

use super::act::Act;
use super::buf::{Shared, filled};
use super::gemm::{Epilogue, Rows, product};
use super::input::{Gather, Input, stage_rows};
use super::micro::SLAB;
use super::packed::{Filter, PackedConv};
use super::simd::Isa;
use super::winograd;

/// `conv(input) + bias + residual`.
///
/// The input is what [`Input`] describes (its channels the filter's inputs), zeros around it after its prologue; the result
/// and `residual` are (b, h, w, outputs) with (h, w) = `conv.output_size` of the input's.
///
/// # Panics
/// If a shape does not fit.
pub fn conv2d(input: &Input, conv: &PackedConv, residual: Option<&[f32]>) -> Vec<f32> {
    run(input, conv, residual, Act::None)
}

/// `act(input * weight^T + bias + residual)` for `input` (b, 1, n, inputs) or any other map: the rows are its pixels. The
/// result and `residual` are (rows, outputs).
///
/// # Panics
/// If a shape does not fit or `weight` was not packed by [`PackedConv::linear`].
pub fn linear(input: &Input, weight: &PackedConv, residual: Option<&[f32]>, act: Act) -> Vec<f32> {
    let filter = weight.filter;
    assert_eq!(
        filter,
        Filter::linear(filter.inputs, filter.outputs),
        "a linear layer"
    );
    run(input, weight, residual, act)
}

fn run(input: &Input, conv: &PackedConv, residual: Option<&[f32]>, act: Act) -> Vec<f32> {
    let len = output_len(input, conv);
    if let Some(residual) = residual {
        assert_eq!(
            residual.len(),
            len,
            "the residual has the shape of the output"
        );
    }
    // SAFETY: there is room for `len` values, the whole output, and either algorithm writes every one; the residual has as
    // many, and the input the convolution's channels, as `output_len` saw.
    unsafe { filled(len, |out| run_to(input, conv, residual, act, out)) }
}

/// Values of the output.
fn output_len(input: &Input, conv: &PackedConv) -> usize {
    let (b, h, w) = input.shape();
    assert_eq!(
        input.channels(),
        conv.filter.inputs,
        "the input has the convolution's channels"
    );
    let (h, w) = conv.output_size(h, w);
    b * h * w * conv.filter.outputs
}

/// # Safety
/// `out` has room for the output, the residual its length, `input` the convolution's channels.
unsafe fn run_to(
    input: &Input,
    conv: &PackedConv,
    residual: Option<&[f32]>,
    act: Act,
    out: Shared,
) {
    let isa = Isa::current();
    let (b, h, w) = input.shape();
    let (oh, ow) = conv.output_size(h, w);
    if b * oh * ow == 0 {
        return;
    }
    if act == Act::None && winograd::applies(conv) {
        // SAFETY: the caller's promise is the same.
        return unsafe { winograd::winograd(isa, input, conv, out, residual) };
    }
    let filter = conv.filter;
    let stage = |rows: &Rows| {
        let gather = Gather {
            oh,
            ow,
            stride: filter.stride,
            dy: (rows.tap / filter.width) as isize - filter.padding.top as isize,
            dx: (rows.tap % filter.width) as isize - filter.padding.left as isize,
        };
        rows.panels(|first, n, dst| {
            // SAFETY: the rows are output pixels, as there are b * oh * ow of them, and `dst` has room for their panel;
            // chunks of channels begin at multiples of 16.
            unsafe {
                stage_rows(
                    isa,
                    input,
                    gather,
                    rows.c0,
                    rows.c1,
                    first,
                    n,
                    dst,
                    rows.per_panel * SLAB,
                )
            }
        });
    };
    let epilogue = Epilogue { residual, act };
    // SAFETY: `out` has room for an output of b * oh * ow rows; `stage` writes to the panels of `Rows::dst`.
    unsafe { product(isa, b * oh * ow, conv, epilogue, out, stage) }
}
