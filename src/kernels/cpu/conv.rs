//! Convolutions and linear layers: the choice of the algorithm, and its entry points.

use super::act::Act;
use super::buf::{Shared, filled};
use super::gemm::{Epilogue, product};
use super::input::{Gather, Input, stage_rows};
use super::micro::SLAB;
use super::packed::PackedConv;
use super::simd::Isa;
use super::winograd;

/// `conv(input) + bias + residual`.
///
/// The input is what [`Input`] describes (its channels `conv.cin()`), zeros around it after its prologue; the result and
/// `residual` are (b, h, w, cout) with (h, w) = `conv.output_size` of the input's.
///
/// # Panics
/// If a shape does not fit.
pub fn conv2d(input: &Input, conv: &PackedConv, residual: Option<&[f32]>) -> Vec<f32> {
    let len = output_len(input, conv);
    let residual = residual.map_or(std::ptr::null(), |r| {
        assert_eq!(r.len(), len, "the residual has the shape of the output");
        r.as_ptr()
    });
    // SAFETY: `run` writes all `len` values; the residual is only read.
    unsafe {
        filled(len, |out| {
            run(input, conv, out, Shared(residual.cast_mut()), Act::None)
        })
    }
}

/// `acc += conv(input) + bias`, for an `acc` of the output's shape.
///
/// # Panics
/// If a shape does not fit.
pub fn conv2d_add(input: &Input, conv: &PackedConv, acc: &mut [f32]) {
    assert_eq!(
        acc.len(),
        output_len(input, conv),
        "the accumulator has the shape of the output"
    );
    let acc = Shared(acc.as_mut_ptr());
    // SAFETY: each value of `acc` is read and then written by one task.
    unsafe { run(input, conv, acc, acc, Act::None) }
}

/// `act(input * weight^T + bias + residual)` for `input` (b, 1, n, cin) or any other map: the rows are its pixels. The
/// result and `residual` are (rows, cout).
///
/// # Panics
/// If a shape does not fit or `weight` was not packed by [`PackedConv::linear`].
pub fn linear(input: &Input, weight: &PackedConv, residual: Option<&[f32]>, act: Act) -> Vec<f32> {
    assert_eq!(
        (weight.kh, weight.kw, weight.stride, weight.pad),
        (1, 1, 1, [0; 4]),
        "a linear layer"
    );
    let len = output_len(input, weight);
    let residual = residual.map_or(std::ptr::null(), |r| {
        assert_eq!(r.len(), len, "the residual has the shape of the output");
        r.as_ptr()
    });
    // SAFETY: as in `conv2d`.
    unsafe {
        filled(len, |out| {
            run(input, weight, out, Shared(residual.cast_mut()), act)
        })
    }
}

fn output_len(input: &Input, conv: &PackedConv) -> usize {
    let (b, h, w) = input.shape();
    assert_eq!(
        input.channels(),
        conv.cin,
        "the input has the convolution's channels"
    );
    let (h, w) = conv.output_size(h, w);
    b * h * w * conv.cout
}

/// # Safety
/// `out` has room for the output; `residual` is null, the output itself or has its length.
unsafe fn run(input: &Input, conv: &PackedConv, out: Shared, residual: Shared, act: Act) {
    let isa = Isa::current();
    let (b, h, w) = input.shape();
    let (oh, ow) = conv.output_size(h, w);
    if b * oh * ow == 0 {
        return;
    }
    if act == Act::None && winograd::applies(conv) {
        return unsafe { winograd::winograd(isa, input, conv, out, residual) };
    }
    let stage = |rows: &super::gemm::Rows| {
        let [top, _, left, _] = conv.pad;
        let gather = Gather {
            oh,
            ow,
            stride: conv.stride,
            dy: (rows.tap / conv.kw) as isize - top as isize,
            dx: (rows.tap % conv.kw) as isize - left as isize,
        };
        rows.panels(|first, n, dst| {
            // SAFETY: the rows exist and `dst` has room for them.
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
    unsafe {
        product(
            isa,
            b * oh * ow,
            conv,
            Epilogue { residual, act },
            out,
            stage,
        )
    }
}
