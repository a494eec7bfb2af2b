//! Weights packed once for the GEMM register tile, or left where they are.

use std::ops::{Deref, Range};
use std::sync::Arc;

use half::{bf16, f16};
use rayon::prelude::*;

use super::buf::{Aligned, Shared};
use super::micro::{NB, SLAB};
use super::simd::Isa;
use super::transform::Taps;
use super::values::{AnyMut, AnyPtr, Precision, Value, Values, narrow};

/// Numbers that are kept elsewhere, such as in a file that is mapped into memory.
pub type Elsewhere = Box<dyn Deref<Target = [f32]> + Send + Sync>;

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

    /// Whether its weights can be used where they are, unpacked.
    pub fn can_be_in_place(&self) -> bool {
        self.is_transformed()
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
/// inputs lie side by side, `(…, inputs / 2, NB, 2)`, as instructions for pairs take them. Weights that are transformed anyhow can
/// stay where they are ([`in_place`](Self::in_place)).
#[derive(Clone)]
pub struct PackedConv {
    panels: Arc<Panels>,
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
    /// As checkpoints have them, (outputs, inputs, height, width).
    Elsewhere(Elsewhere),
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
            Self::Elsewhere(values) => Values::F32(values),
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
            panels: Arc::new(unsafe { Panels::filled(precision, panels * panel_len, pack) }),
            bias: padded_bias(bias, outputs),
            filter,
            in_pairs,
        }
    }

    /// The same without a copy: of a convolution that [can be read in place](Filter::can_be_in_place), whose `weight` (outputs, inputs, 3, 3)
    /// stays where it is. Results are the same bits, and a call takes a few percent longer.
    ///
    /// # Panics
    /// If a length does not fit the filter, a size is 0, or the filter is another.
    pub fn in_place(weight: Elsewhere, bias: Option<&[f32]>, filter: Filter) -> Self {
        assert!(filter.can_be_in_place(), "a filter of 3x3 and stride 1");
        let len = filter.outputs * filter.inputs * filter.taps();
        assert!(len > 0, "no size is 0");
        assert_eq!(
            weight.len(),
            len,
            "the weight is (outputs, inputs, height, width) of {filter:?}"
        );
        Self {
            panels: Arc::new(Panels::Elsewhere(weight)),
            bias: padded_bias(bias, filter.outputs),
            filter,
            in_pairs: false,
        }
    }

    /// A linear layer: `weight` (outputs, inputs), `bias` (outputs).
    ///
    /// # Panics
    /// As [`PackedConv::new`].
    pub fn linear(weight: &[f32], bias: Option<&[f32]>, inputs: usize, outputs: usize) -> Self {
        Self::new(weight, bias, Filter::linear(inputs, outputs))
    }

    /// The same weights, with `shift` (outputs) added to the bias.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn shifted(&self, shift: &[f32]) -> Self {
        assert_eq!(shift.len(), self.filter.outputs, "a shift an output");
        let mut shifted = self.clone();
        shifted
            .bias
            .iter_mut()
            .zip(shift)
            .for_each(|(bias, shift)| *bias += shift);
        shifted
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

    /// The weights of panel `nb` from input channel `c` on, for a convolution that is transformed.
    pub(super) fn taps(&self, nb: usize, c: usize) -> Taps {
        match &*self.panels {
            Panels::Elsewhere(weight) => Taps::ByOutput {
                first: weight[self.place(nb * NB, c)..].as_ptr(),
                ld: self.place(1, 0),
            },
            _ => Taps::Packed {
                first: self.panel(nb, 0, c),
                stride: self.filter.inputs * NB,
            },
        }
    }

    /// Where those taps lie for `channels` channels: addresses and bytes from there on.
    pub(super) fn runs(
        &self,
        nb: usize,
        c: usize,
        channels: usize,
    ) -> impl Iterator<Item = (*const u8, usize)> {
        let taps = self.taps(nb, c);
        let runs = match taps {
            Taps::Packed { .. } => self.filter.taps(),
            Taps::ByOutput { .. } => self.panel_cols(nb),
        };
        let precision = self.precision();
        (0..runs).map(move |run| match taps {
            Taps::Packed { first, stride } => (
                first.at(run * stride).address(),
                channels * NB * precision.bytes(),
            ),
            Taps::ByOutput { first, ld } => (
                first.wrapping_add(run * ld).cast(),
                channels * 9 * precision.bytes(),
            ),
        })
    }

    /// Of weights that stay where they are, the place of the first of an output and an input.
    fn place(&self, output: usize, input: usize) -> usize {
        (output * self.filter.inputs + input) * self.filter.taps()
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

/// A bias (outputs) filled up with zeros to whole panels; zeros where there is none.
fn padded_bias(bias: Option<&[f32]>, outputs: usize) -> Vec<f32> {
    let mut padded = vec![0.0; outputs.next_multiple_of(NB)];
    if let Some(bias) = bias {
        padded[..outputs].copy_from_slice(bias);
    }
    padded
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
