//! Transparency: the network sees RGB only, so colour is bled under transparent pixels before it runs (whatever lies
//! there would otherwise shine through at the edges), and alpha is doubled on its own.

use std::ops::Range;

use rayon::prelude::*;

use super::double::{double_lines as catmull_rom_lines, doublings_after_the_first};

/// Alpha below this is too little to trust the colour beneath, which editors round or drop.
const TRUSTED: f32 = 1.0 / 16.0;

/// Replaces the colour of transparent pixels by that of the nearest visible ones, fading with distance (push-pull over
/// an image pyramid; time is linear in the pixels). `rgb` is (height, width, 3), `alpha` (height, width), both 0..=1.
/// A picture without one visible pixel is left as it is.
///
/// # Panics
/// A length is not that of `width` x `height`.
pub fn bleed(rgb: &mut [f32], alpha: &[f32], width: usize, height: usize) {
    assert_eq!(alpha.len(), width * height, "alpha is (height, width)");
    assert_eq!(rgb.len(), 3 * alpha.len(), "rgb is (height, width, 3)");
    if alpha.iter().all(|&a| a <= 0.0) {
        return;
    }
    let trust = |a: f32| (a / TRUSTED).min(1.0);
    let weigh =
        |(p, &a): (&[f32], &f32)| [p[0] * trust(a), p[1] * trust(a), p[2] * trust(a), trust(a)];
    let pixels: Vec<[f32; 4]> = rgb.par_chunks_exact(3).zip(alpha).map(weigh).collect();
    let filled = fill(Level {
        pixels,
        width,
        height,
    });
    rgb.par_chunks_exact_mut(3)
        .zip(filled.pixels.par_iter().zip(alpha))
        .for_each(|(p, (fill, &a))| {
            if a < TRUSTED {
                p.copy_from_slice(&fill[..3]);
            }
        });
}

/// Doubles alpha, (height, width) to (2 height, 2 width): Catmull-Rom, clamped to 0..=1.
pub fn double(alpha: &[f32], width: usize, height: usize) -> Vec<f32> {
    double_lines(alpha, width, height, 0..2 * height)
}

/// Some lines of what [`double`] gives, the same to the bit.
pub fn double_lines(alpha: &[f32], width: usize, height: usize, lines: Range<usize>) -> Vec<f32> {
    let mut out = catmull_rom_lines(alpha, width, height, 1, lines);
    out.par_iter_mut().for_each(|a| *a = a.clamp(0.0, 1.0));
    out
}

/// The same, doubled until it is `times` as large: a power of two.
pub fn enlarge(alpha: &[f32], width: usize, height: usize, times: usize) -> Vec<f32> {
    let mut large = double(alpha, width, height);
    for done in doublings_after_the_first(times) {
        large = double(&large, done * width, done * height);
    }
    large
}

/// One level of the pyramid: colour times weight, and weight (0..=1).
struct Level {
    pixels: Vec<[f32; 4]>,
    width: usize,
    height: usize,
}

/// Pull: halve until all is known. Push: each level's unknown part is taken from the level above, interpolated.
fn fill(mut level: Level) -> Level {
    if level.pixels.iter().all(|p| p[3] >= 1.0) || level.width.max(level.height) == 1 {
        // The last level has some weight, as some pixel is visible.
        level
            .pixels
            .iter_mut()
            .for_each(|p| *p = p.map(|v| v / p[3].max(f32::MIN_POSITIVE)));
        return level;
    }
    let above = fill(halve(&level));
    let width = level.width;
    level.pixels.par_iter_mut().enumerate().for_each(|(i, p)| {
        let missing = 1.0 - p[3];
        if missing > 0.0 {
            let from = above.sample(i % width, i / width);
            *p = std::array::from_fn(|c| p[c] + missing * from[c]);
        }
    });
    level
}

/// Half the size, rounded up. Weights add up (to at most 1), so that one known pixel of four is enough.
fn halve(level: &Level) -> Level {
    let (width, height) = (level.width.div_ceil(2), level.height.div_ceil(2));
    let average = |i: usize| {
        let (x, y) = (2 * (i % width), 2 * (i / width));
        let mut sum = [0f32; 4];
        for (dx, dy) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
            if x + dx < level.width && y + dy < level.height {
                let p = level.pixels[(y + dy) * level.width + x + dx];
                sum.iter_mut().zip(p).for_each(|(s, v)| *s += v);
            }
        }
        let excess = sum[3].max(1.0);
        sum.map(|v| v / excess)
    };
    Level {
        pixels: (0..width * height).into_par_iter().map(average).collect(),
        width,
        height,
    }
}

impl Level {
    /// The value at pixel (x, y) of the level below, bilinear, pixel centres at halves.
    fn sample(&self, x: usize, y: usize) -> [f32; 4] {
        let near = |i: usize, length: usize| {
            let other = if i.is_multiple_of(2) {
                (i / 2).saturating_sub(1)
            } else {
                i / 2 + 1
            };
            (i / 2, other.min(length - 1))
        };
        let ((x0, x1), (y0, y1)) = (near(x, self.width), near(y, self.height));
        let at = |x: usize, y: usize, c: usize| self.pixels[y * self.width + x][c];
        std::array::from_fn(|c| {
            0.75 * (0.75 * at(x0, y0, c) + 0.25 * at(x1, y0, c))
                + 0.25 * (0.75 * at(x0, y1, c) + 0.25 * at(x1, y1, c))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_colour_of_a_disc_spreads_under_the_transparent_black_around_it() {
        let (w, h) = (61, 47);
        let inside = |i: usize| ((i % w) as f32 - 30.0).hypot((i / w) as f32 - 23.0) < 9.0;
        let alpha: Vec<f32> = (0..w * h).map(|i| f32::from(inside(i))).collect();
        let orange = [0.9, 0.5, 0.1];
        let mut rgb: Vec<f32> = (0..w * h)
            .flat_map(|i| if inside(i) { orange } else { [0.0; 3] })
            .collect();
        bleed(&mut rgb, &alpha, w, h);
        for pixel in rgb.chunks_exact(3) {
            for c in 0..3 {
                // The colour is the same everywhere; only rounding differs.
                assert!((pixel[c] - orange[c]).abs() < 1e-4, "{pixel:?}");
            }
        }
    }

    #[test]
    fn visible_pixels_keep_their_colour_to_the_bit_and_hidden_ones_take_the_nearer_side() {
        let (w, h) = (64, 8);
        // Red at the left end, blue at the right one, nothing between.
        let alpha: Vec<f32> = (0..w * h)
            .map(|i| f32::from(i % w < 4 || i % w >= 60))
            .collect();
        let color = |i: usize| match i % w {
            0..4 => [1.0, 0.2, 0.0],
            60.. => [0.0, 0.2, 1.0],
            _ => [0.3; 3],
        };
        let mut rgb: Vec<f32> = (0..w * h).flat_map(color).collect();
        let before = rgb.clone();
        bleed(&mut rgb, &alpha, w, h);
        for i in 0..w * h {
            let pixel = &rgb[3 * i..3 * i + 3];
            match i % w {
                0..4 | 60.. => assert_eq!(pixel, &before[3 * i..3 * i + 3]),
                4..16 => assert!(pixel[0] > 0.7 && pixel[2] < 0.3, "{i}: {pixel:?}"),
                48..60 => assert!(pixel[2] > 0.7 && pixel[0] < 0.3, "{i}: {pixel:?}"),
                _ => assert!((pixel[0] + pixel[2] - 1.0).abs() < 1e-4, "{i}: {pixel:?}"),
            }
        }
    }

    #[test]
    fn a_wholly_transparent_picture_and_a_single_pixel_are_no_trouble() {
        let mut rgb = vec![0.25; 12];
        bleed(&mut rgb, &[0.0; 4], 2, 2);
        assert_eq!(rgb, vec![0.25; 12]);
        let mut one = vec![0.5; 3];
        bleed(&mut one, &[0.01], 1, 1);
        assert_eq!(one, vec![0.5; 3]);
    }

    #[test]
    fn doubled_alpha_stays_in_range_and_keeps_solid_areas_solid() {
        let alpha: Vec<f32> = (0..8 * 8).map(|i| f32::from(i % 8 >= 4)).collect();
        let out = double(&alpha, 8, 8);
        assert!(out.iter().all(|a| (0.0..=1.0).contains(a)));
        assert_eq!(out[16 * 8], 0.0);
        assert_eq!(out[16 * 8 + 15], 1.0);
        assert!(out[16 * 8 + 7] < 0.5 && out[16 * 8 + 8] > 0.5);
        assert_eq!(enlarge(&alpha, 8, 8, 2), out);
        assert_eq!(enlarge(&alpha, 8, 8, 4), double(&out, 16, 16));
    }
}
