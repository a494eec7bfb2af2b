//! Convolutions and linear layers: the choice of the algorithm, and its entry points.

use std::ops::Range;

use super::act::Act;
use super::buf::{Shared, filled};
use super::elementwise::activate;
use super::gemm::{Epilogue, Rows, product};
use super::input::{Gather, Input, stage_rows};
use super::micro::SLAB;
use super::packed::{Filter, PackedConv};
use super::simd::Isa;
use super::values::{AnyMut, Value, Values};
use super::winograd;

impl PackedConv {
    /// Multiplications and additions that the algorithm does which is used for an input (h, w), those of transforms aside.
    pub fn work(&self, h: usize, w: usize) -> f64 {
        let (oh, ow) = self.output_size(h, w);
        let weights = (self.filter.inputs * self.filter.outputs) as f64;
        let products = if winograd::applies(self) {
            let scheme = winograd::scheme(self, h, w);
            let side = scheme.out();
            scheme.points() * oh.div_ceil(side) * ow.div_ceil(side)
        } else {
            self.filter.taps() * oh * ow
        };
        2.0 * weights * products as f64
    }

    /// The lines of an input (h, w) that lines of the output are computed from: those that the filter covers there, and what its
    /// tiles reach over besides.
    pub fn reach(&self, lines: &Range<usize>, h: usize, w: usize) -> Range<usize> {
        let whole = self.filter.output_size(h, self.filter.width).0;
        let end = if winograd::applies(self) {
            let side = winograd::scheme(self, h, w).out();
            (lines.start + lines.len().next_multiple_of(side)).min(whole)
        } else {
            lines.end
        };
        self.filter.reach(&(lines.start..end), h)
    }
}

/// What the first of some lines must be a multiple of, so that tiles lie as in the whole: of either algorithm's.
pub const CONV_LINES: usize = 12;

/// `act(conv(input) + bias + residual)`.
///
/// The input is what [`Input`] describes (its channels the filter's inputs), zeros around it after its prologue; the result
/// and `residual`, kept in one type, are (b, h, w, outputs) with (h, w) = `conv.output_size` of the input's.
///
/// # Panics
/// If a shape or type does not fit.
pub fn conv2d<V: Value>(
    input: &Input,
    conv: &PackedConv,
    residual: Option<&[V]>,
    act: Act,
) -> Vec<V> {
    let (_, h, w) = input.shape();
    let lines = 0..conv.output_size(h, w).0;
    run(input, conv, residual, act, lines)
}

/// The same for some lines of the output: the result and `residual` are (b, lines, w, outputs). The values are those that
/// [`conv2d`] gives there, to the bit, where the first line is a multiple of [`CONV_LINES`].
///
/// # Panics
/// If a shape does not fit, or the input lacks lines that these are made of.
pub fn conv2d_lines<V: Value>(
    input: &Input,
    conv: &PackedConv,
    residual: Option<&[V]>,
    act: Act,
    lines: Range<usize>,
) -> Vec<V> {
    let (_, h, w) = input.shape();
    assert!(
        lines.end <= conv.output_size(h, w).0,
        "lines {lines:?} of the output"
    );
    run(input, conv, residual, act, lines)
}

/// `act(input * weight^T + bias + residual)` for `input` (b, 1, n, inputs) or any other map: the rows are its pixels. The
/// result and `residual` are (rows, outputs).
///
/// # Panics
/// If a shape does not fit or `weight` was not packed by [`PackedConv::linear`].
pub fn linear<V: Value>(
    input: &Input,
    weight: &PackedConv,
    residual: Option<&[V]>,
    act: Act,
) -> Vec<V> {
    let filter = weight.filter;
    assert_eq!(
        filter,
        Filter::linear(filter.inputs, filter.outputs),
        "a linear layer"
    );
    let (_, h, _) = input.shape();
    run(input, weight, residual, act, 0..h)
}

fn run<V: Value>(
    input: &Input,
    conv: &PackedConv,
    residual: Option<&[V]>,
    act: Act,
    lines: Range<usize>,
) -> Vec<V> {
    if winograd::applies(conv) && !matches!(act, Act::None | Act::Relu) {
        // Its output pass knows no other: values of 16 bits are rounded before it too.
        return activate(&run(input, conv, residual, Act::None, lines), act);
    }
    let len = output_len(input, conv, &lines);
    if let Some(residual) = residual {
        assert_eq!(
            residual.len(),
            len,
            "the residual has the shape of the output"
        );
    }
    // SAFETY: there is room for `len` values, all lines, and either algorithm writes every one; the residual has as
    // many, and the input the convolution's channels and the lines that it reads, as `output_len` saw.
    unsafe {
        filled(len, |out: Shared<V>| {
            let (out, residual) = (AnyMut::new(out.get()), residual.map(V::values));
            run_to(input, conv, residual, act, lines, out);
        })
    }
}

/// Values of some lines of the output.
fn output_len(input: &Input, conv: &PackedConv, lines: &Range<usize>) -> usize {
    let (b, h, w) = input.shape();
    assert_eq!(
        input.channels(),
        conv.filter.inputs,
        "the input has the convolution's channels"
    );
    assert!(
        input.has(conv.reach(lines, h, w)),
        "the input has the lines that {lines:?} are made of"
    );
    let (_, w) = conv.output_size(h, w);
    b * lines.len() * w * conv.filter.outputs
}

/// # Safety
/// `out` has room for the lines of the output, the residual its length and type, `input` the convolution's channels and all lines that
/// are read.
unsafe fn run_to(
    input: &Input,
    conv: &PackedConv,
    residual: Option<Values>,
    act: Act,
    lines: Range<usize>,
    out: AnyMut,
) {
    let isa = Isa::current();
    let (b, h, w) = input.shape();
    let (_, ow) = conv.output_size(h, w);
    let oh = lines.len();
    if b * oh * ow == 0 {
        return;
    }
    if winograd::applies(conv) {
        // What is raised to minus infinity stays as it is.
        let floor = if act == Act::Relu {
            0.0
        } else {
            f32::NEG_INFINITY
        };
        // SAFETY: the caller's promise is the same.
        return unsafe { winograd::winograd(isa, input, conv, lines, out, residual, floor) };
    }
    let filter = conv.filter;
    let stage = |rows: &Rows| {
        let gather = Gather {
            first: lines.start,
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
