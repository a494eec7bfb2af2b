//! `--compare`: what an item was upscaled from, enlarged in the ordinary way, beside the result.

use anyhow::{Context, Result};
use image::imageops::{self, FilterType};
use image::{ImageBuffer, Rgb};
use sd_upscale::Pixels;

/// The two side by side, `low` enlarged by Lanczos to the size of `result`.
///
/// # Errors
/// A picture has not as many values as its size says.
pub fn beside(low: Pixels, result: &Pixels) -> Result<Pixels> {
    let (width, height) = (result.width, result.height);
    let enlarged = enlarged(low, width, height)?;
    let row = 3 * width;
    let mut values = Vec::with_capacity(2 * result.values.len());
    for (left, right) in enlarged.chunks(row).zip(result.values.chunks(row)) {
        values.extend(left.iter().map(|v| v.clamp(0.0, 1.0)));
        values.extend_from_slice(right);
    }
    Pixels::new(2 * width, height, values)
}

fn enlarged(low: Pixels, width: usize, height: usize) -> Result<Vec<f32>> {
    let low: ImageBuffer<Rgb<f32>, Vec<f32>> =
        ImageBuffer::from_raw(low.width as u32, low.height as u32, low.values)
            .context("a picture to compare with has fewer values than its size says")?;
    let (width, height) = (width as u32, height as u32);
    Ok(imageops::resize(&low, width, height, FilterType::Lanczos3).into_raw())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_was_stands_left_and_the_result_right() {
        let low = Pixels::new(2, 1, vec![0.25; 6]).unwrap();
        let result = Pixels::new(4, 2, (0..24).map(|i| i as f32 / 24.0).collect()).unwrap();
        let both = beside(low, &result).unwrap();
        assert_eq!((both.width, both.height), (8, 2));
        for row in 0..2 {
            let line = &both.values[24 * row..][..24];
            assert!(line[..12].iter().all(|v| (v - 0.25).abs() < 1e-6));
            assert_eq!(line[12..], result.values[12 * row..][..12]);
        }
    }
}
