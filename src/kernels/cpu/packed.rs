//! Weights packed once for the GEMM register tile.

use rayon::prelude::*;

use super::buf::{Aligned, Shared};
use super::micro::NB;

/// A convolution's (or linear layer's) weights and bias, packed in panels of [`NB`] output channels:
/// `(cout / NB, kh * kw, cin, NB)`, zeros filling up the last panel.
pub struct PackedConv {
    panels: Aligned,
    /// (panels * NB), zero where there is none.
    bias: Vec<f32>,
    pub(super) cin: usize,
    pub(super) cout: usize,
    pub(super) kh: usize,
    pub(super) kw: usize,
    pub(super) stride: usize,
    /// Zeros around the input: top, bottom, left, right.
    pub(super) pad: [usize; 4],
}

impl PackedConv {
    /// Packs `weight` (cout, cin, kh, kw) and `bias` (cout) for a convolution with `stride` and `pad` zeros (top, bottom,
    /// left, right) around the input.
    ///
    /// # Panics
    /// If a length does not fit the shape, or a size or the stride is 0.
    pub fn new(
        weight: &[f32],
        bias: Option<&[f32]>,
        (cout, cin): (usize, usize),
        (kh, kw): (usize, usize),
        stride: usize,
        pad: [usize; 4],
    ) -> Self {
        assert!(cout * cin * kh * kw * stride > 0, "no size is 0");
        assert_eq!(
            weight.len(),
            cout * cin * kh * kw,
            "the weight is (cout, cin, kh, kw) = ({cout}, {cin}, {kh}, {kw})"
        );
        let (n, taps) = (cout.div_ceil(NB), kh * kw);
        let mut padded_bias = vec![0.0; n * NB];
        if let Some(bias) = bias {
            padded_bias[..cout].copy_from_slice(bias);
        }
        // SAFETY: the tasks below write every panel, the last one's unused columns as zeros.
        let mut panels = unsafe { Aligned::unwritten(n * taps * cin * NB) };
        let to = Shared(panels.as_mut_ptr());
        (0..n).into_par_iter().for_each(|nb| {
            // SAFETY: each task fills its own panels.
            let panel = unsafe {
                std::slice::from_raw_parts_mut(to.get().add(nb * taps * cin * NB), taps * cin * NB)
            };
            if cout - nb * NB < NB {
                panel.fill(0.0);
            }
            // In blocks of channels, so that what is written stays in the cache.
            for c0 in (0..cin).step_by(16) {
                for j in 0..NB.min(cout - nb * NB) {
                    for c in c0..cin.min(c0 + 16) {
                        let from = &weight[((nb * NB + j) * cin + c) * taps..][..taps];
                        for (tap, &x) in from.iter().enumerate() {
                            panel[(tap * cin + c) * NB + j] = x;
                        }
                    }
                }
            }
        });
        Self {
            panels,
            bias: padded_bias,
            cin,
            cout,
            kh,
            kw,
            stride,
            pad,
        }
    }

    /// A linear layer: `weight` (cout, cin), `bias` (cout).
    ///
    /// # Panics
    /// As [`PackedConv::new`].
    pub fn linear(weight: &[f32], bias: Option<&[f32]>, (cout, cin): (usize, usize)) -> Self {
        Self::new(weight, bias, (cout, cin), (1, 1), 1, [0; 4])
    }

    /// Output channels.
    pub fn cout(&self) -> usize {
        self.cout
    }

    /// Input channels.
    pub fn cin(&self) -> usize {
        self.cin
    }

    /// Values held, the zeros that fill up the last panel included (the bias apart).
    pub fn packed_len(&self) -> usize {
        self.panels.len()
    }

    /// (h, w) of the output for an input of (h, w); zeros where the kernel does not fit.
    pub fn output_size(&self, h: usize, w: usize) -> (usize, usize) {
        let [top, bottom, left, right] = self.pad;
        let out = |n: usize, k: usize| if n < k { 0 } else { (n - k) / self.stride + 1 };
        (
            out(h + top + bottom, self.kh),
            out(w + left + right, self.kw),
        )
    }

    pub(super) fn panel_count(&self) -> usize {
        self.cout.div_ceil(NB)
    }

    /// Columns in use in panel `nb`.
    pub(super) fn panel_cols(&self, nb: usize) -> usize {
        NB.min(self.cout - nb * NB)
    }

    /// (cin, NB) of panel `nb` for a tap.
    pub(super) fn panel(&self, nb: usize, tap: usize) -> &[f32] {
        let n = self.cin * NB;
        &self.panels[(nb * self.kh * self.kw + tap) * n..][..n]
    }

    /// (NB) of panel `nb`.
    pub(super) fn bias(&self, nb: usize) -> &[f32] {
        &self.bias[nb * NB..][..NB]
    }
}
