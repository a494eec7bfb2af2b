//! Any size in: inputs are extended to what the networks take, results cropped back.

use anyhow::Result;
use candle_core::Tensor;

/// A size, in pixels or in latent positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub width: usize,
    pub height: usize,
}

/// The least multiple of `multiple` that is no smaller than `n` and `minimum`.
pub fn padded_side(n: usize, multiple: usize, minimum: usize) -> usize {
    n.next_multiple_of(multiple).max(minimum)
}

impl Extent {
    /// What the model makes of it.
    pub fn doubled(self) -> Self {
        Self {
            width: 2 * self.width,
            height: 2 * self.height,
        }
    }
}

/// `x` (b, c, h, w) extended below and on the right until both sides are multiples of `multiple` and no smaller
/// than `minimum`; unchanged where they are already.
///
/// # Errors
/// candle's own only.
pub fn extend(x: &Tensor, multiple: usize, minimum: usize) -> Result<Tensor> {
    let mut x = x.clone();
    for dim in [2, 3] {
        let n = x.dim(dim)?;
        let target = padded_side(n, multiple, minimum);
        if target > n {
            let indices: Vec<u32> = (0..target).map(|i| source(i, n) as u32).collect();
            let indices = Tensor::new(indices, x.device())?;
            x = x.index_select(&indices, dim)?;
        }
    }
    Ok(x.contiguous()?)
}

/// Where position `i` of an extended side comes from. Beyond the edge the side is mirrored about its last
/// position, back and forth; of a side of one position there is only that one.
fn source(i: usize, n: usize) -> usize {
    if n == 1 {
        return 0;
    }
    let period = 2 * (n - 1);
    let i = i % period;
    i.min(period - i)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn row(n: usize, multiple: usize, minimum: usize) -> Vec<f32> {
        let x = Tensor::arange(0f32, n as f32, &Device::Cpu).unwrap();
        let x = x.reshape((1, 1, 1, n)).unwrap();
        let y = extend(&x, multiple, minimum).unwrap();
        y.narrow(2, 0, 1)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap()
    }

    #[test]
    fn a_side_is_mirrored_about_its_last_position() {
        assert_eq!(row(5, 8, 8), [0., 1., 2., 3., 4., 3., 2., 1.]);
    }

    #[test]
    fn a_side_shorter_than_its_extension_is_mirrored_back_and_forth() {
        assert_eq!(row(3, 8, 8), [0., 1., 2., 1., 0., 1., 2., 1.]);
        assert_eq!(row(1, 4, 4), [0.; 4]);
    }

    #[test]
    fn a_side_that_fits_is_left_alone() {
        assert_eq!(row(8, 4, 8), [0., 1., 2., 3., 4., 5., 6., 7.]);
    }
}
