//! Weights packed once for the GEMM register tile.

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use super::buf::{Aligned, Shared};
use super::micro::{NB, SLAB};
use super::simd::Isa;
use super::values::{AnyMut, AnyPtr, Precision, Value, Values, narrow};

/// What a convolution is, apart from its weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Channels it reads.
    pub inputs: usize,
    /// Channels it writes.
    pub outputs: usize,
    pub height: usize,
    pub width: usize,
    /// Pixels from one place of the filter to the next, in both directions.
    pub stride: usize,
    pub padding: Padding,
}

impl Filter {
    /// A linear layer: one pixel to one pixel.
    pub fn linear(inputs: usize, outputs: usize) -> Self {
        Self {
            inputs,
            outputs,
            height: 1,
            width: 1,
            stride: 1,
            padding: Padding::all(0),
        }
    }

    /// Whether it is done by Winograd's algorithm.
    pub(super) fn is_transformed(&self) -> bool {
        self.height == 3 && self.width == 3 && self.stride == 1
    }

    pub(super) fn taps(&self) -> usize {
        self.height * self.width
    }

    /// The lines of an input of `h` that lines of the output are made of.
    pub(super) fn reach(&self, lines: &Range<usize>, h: usize) -> Range<usize> {
        if lines.is_empty() {
            return 0..0;
        }
        let start = (lines.start * self.stride).saturating_sub(self.padding.top);
        let end = (lines.end - 1) * self.stride + self.height;
        start.min(h)..end.saturating_sub(self.padding.top).min(h)
    }

    /// (h, w) of the output for an input of (h, w); zeros where the filter does not fit.
    pub fn output_size(&self, h: usize, w: usize) -> (usize, usize) {
        let pad = self.padding;
        let out = |n: usize, k: usize| if n < k { 0 } else { (n - k) / self.stride + 1 };
        (
            out(h + pad.top + pad.bottom, self.height),
            out(w + pad.left + pad.right, self.width),
        )
    }
}

/// Lines and columns of zeros around a convolution's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Padding {
    pub top: usize,
    pub bottom: usize,
    pub left: usize,
    pub right: usize,
}

impl Padding {
    /// `n` on each side.
    pub fn all(n: usize) -> Self {
        Self {
            top: n,
            bottom: n,
            left: n,
            right: n,
        }
    }
}

/// A convolution's (or linear layer's) weights and bias, packed in panels of `NB` output channels:
/// `(outputs / NB, height * width, inputs, NB)`, zeros filling up the last panel. In bfloat16, where no transform comes first, two
/// inputs lie side by side, `(…, inputs / 2, NB, 2)`, as instructions for pairs take them.
pub struct PackedConv {
    panels: Panels,
    /// (panels * NB), zero where there is none.
    bias: Vec<f32>,
    pub(super) filter: Filter,
    in_pairs: bool,
}

/// Packed weights as they are kept.
enum Panels {
    F32(Aligned<f32>),
    Bf16(Aligned<bf16>),
    F16(Aligned<f16>),
}

impl Panels {
    /// `len` values that `pack` writes.
    ///
    /// # Safety
    /// `pack` must write every value.
    unsafe fn filled(precision: Precision, len: usize, pack: impl FnOnce(AnyMut)) -> Self {
        // SAFETY: as the caller promises, whichever type it is.
        unsafe {
            match precision {
                Precision::F32 => Self::F32(buffer(len, pack)),
                Precision::Bf16 => Self::Bf16(buffer(len, pack)),
                Precision::F16 => Self::F16(buffer(len, pack)),
            }
        }
    }

    fn values(&self) -> Values<'_> {
        match self {
            Self::F32(values) => Values::F32(values),
            Self::Bf16(values) => Values::Bf16(values),
            Self::F16(values) => Values::F16(values),
        }
    }
}

/// # Safety
/// `pack` must write every value.
unsafe fn buffer<V: Value>(len: usize, pack: impl FnOnce(AnyMut)) -> Aligned<V> {
    // SAFETY: as the caller promises.
    unsafe { Aligned::filled(len, |to: Shared<V>| pack(AnyMut::new(to.get()))) }
}

impl PackedConv {
    /// Packs `weight` (outputs, inputs, height, width) and `bias` (outputs) for the convolution `filter`.
    ///
    /// # Panics
    /// If a length does not fit the filter, or a size or the stride is 0.
    pub fn new(weight: &[f32], bias: Option<&[f32]>, filter: Filter) -> Self {
        Self::kept_as(Precision::F32, weight, bias, filter)
    }

    /// The same, the weights rounded to a type; the bias stays in float32.
    ///
    /// # Panics
    /// As [`PackedConv::new`].
    pub fn kept_as(
        precision: Precision,
        weight: &[f32],
        bias: Option<&[f32]>,
        filter: Filter,
    ) -> Self {
        let (inputs, outputs, taps) = (filter.inputs, filter.outputs, filter.taps());
        assert!(outputs * inputs * taps * filter.stride > 0, "no size is 0");
        assert_eq!(
            weight.len(),
            outputs * inputs * taps,
            "the weight is (outputs, inputs, height, width) of {filter:?}"
        );
        let panels = outputs.div_ceil(NB);
        let mut padded_bias = vec![0.0; panels * NB];
        if let Some(bias) = bias {
            padded_bias[..outputs].copy_from_slice(bias);
        }
        let in_pairs = precision == Precision::Bf16 && !filter.is_transformed();
        let rows = rows_of(filter, in_pairs);
        let panel_len = taps * rows * NB;
        let pack = |to: AnyMut| {
            (0..panels).into_par_iter().for_each(|nb| {
                // SAFETY: each task writes its own panel, of which there is room for `panels`.
                unsafe { pack_panel(weight, filter, in_pairs, nb, to.at(nb * panel_len)) }
            });
        };
        Self {
            // SAFETY: `pack` writes every panel in full.
            panels: unsafe { Panels::filled(precision, panels * panel_len, pack) },
            bias: padded_bias,
            filter,
            in_pairs,
        }
    }

    /// A linear layer: `weight` (outputs, inputs), `bias` (outputs).
    ///
    /// # Panics
    /// As [`PackedConv::new`].
    pub fn linear(weight: &[f32], bias: Option<&[f32]>, inputs: usize, outputs: usize) -> Self {
        Self::new(weight, bias, Filter::linear(inputs, outputs))
    }

    /// Channels that it writes.
    pub fn outputs(&self) -> usize {
        self.filter.outputs
    }

    /// [`Filter::output_size`].
    pub fn output_size(&self, h: usize, w: usize) -> (usize, usize) {
        self.filter.output_size(h, w)
    }

    pub(super) fn panel_count(&self) -> usize {
        self.filter.outputs.div_ceil(NB)
    }

    /// Columns in use in panel `nb`.
    pub(super) fn panel_cols(&self, nb: usize) -> usize {
        NB.min(self.filter.outputs - nb * NB)
    }

    /// (inputs, NB) of panel `nb` for a tap, from channel `c` on.
    pub(super) fn panel(&self, nb: usize, tap: usize, c: usize) -> AnyPtr {
        let rows = rows_of(self.filter, self.in_pairs);
        let row = (nb * self.filter.taps() + tap) * rows + c;
        self.panels.values().from(row * NB)
    }

    /// Whether two inputs lie side by side.
    pub(super) fn in_pairs(&self) -> bool {
        self.in_pairs
    }

    /// What the weights are kept as.
    pub fn precision(&self) -> Precision {
        self.panels.values().precision()
    }

    /// Bytes of the weights.
    pub fn bytes(&self) -> usize {
        self.panels.values().len() * self.precision().bytes()
    }

    /// (NB) of panel `nb`.
    pub(super) fn bias(&self, nb: usize) -> &[f32] {
        &self.bias[nb * NB..][..NB]
    }
}

/// Rows of NB values of a tap in a panel.
fn rows_of(filter: Filter, in_pairs: bool) -> usize {
    filter.inputs.next_multiple_of(if in_pairs { 2 } else { 1 })
}

/// Packs panel `nb` of `weight`: (taps, inputs, NB) at `to`.
///
/// # Safety
/// There is room for a panel at `to`.
unsafe fn pack_panel(weight: &[f32], filter: Filter, in_pairs: bool, nb: usize, to: AnyMut) {
    let isa = Isa::current();
    let (inputs, taps) = (filter.inputs, filter.taps());
    let columns = NB.min(filter.outputs - nb * NB);
    // In blocks of channels, so that what is written stays in the cache.
    let rows = rows_of(filter, in_pairs);
    let mut block = vec![0f32; taps * SLAB * NB];
    let place = |c: usize, j: usize| {
        if in_pairs {
            c / 2 * 2 * NB + 2 * j + c % 2
        } else {
            c * NB + j
        }
    };
    for c0 in (0..inputs).step_by(SLAB) {
        let c1 = inputs.min(c0 + SLAB);
        let last = rows.min(c0 + SLAB);
        if last > c1 {
            block.fill(0.0);
        }
        for j in 0..columns {
            let channels = &weight[((nb * NB + j) * inputs + c0) * taps..][..(c1 - c0) * taps];
            if taps == 1 {
                // Without a loop over the taps: 768 -> 768 in 0.12 ms, with it 0.6.
                for (c, &x) in channels.iter().enumerate() {
                    block[place(c, j)] = x;
                }
                continue;
            }
            for (c, taps) in channels.chunks_exact(taps).enumerate() {
                for (tap, &x) in taps.iter().enumerate() {
                    block[tap * SLAB * NB + place(c, j)] = x;
                }
            }
        }
        for tap in 0..taps {
            let values = &block[tap * SLAB * NB..][..(last - c0) * NB];
            let to = to.at((tap * rows + c0) * NB);
            // SAFETY: these channels' rows of a tap follow each other in the panel, as in the block.
            unsafe { narrow(isa, values.as_ptr(), values.len(), to) };
        }
    }
}
