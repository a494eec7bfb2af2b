//! The kernels against plain f64 loops, on every instruction set of the machine.

mod attention;
mod conv;
mod point;
mod values;
mod vectors;

use std::ops::Range;

use super::Isa;

/// Values in -1..1 from a linear congruential generator (Knuth's MMIX constants).
pub fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) + 1;
    let mut next = || {
        s = s
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (s >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// The lines of a map (b, h, w, c) `lines`, (b, lines, w, c).
pub fn lines_of(x: &[f32], (b, h): (usize, usize), lines: Range<usize>) -> Vec<f32> {
    let line = x.len() / b / h;
    (0..b)
        .flat_map(|item| &x[(item * h + lines.start) * line..(item * h + lines.end) * line])
        .copied()
        .collect()
}

pub fn to_f64(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// The largest difference relative to the largest magnitude.
pub fn relative_error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1e-30, |m: f64, x| m.max(x.abs()));
    let worst = got.iter().zip(want).fold(0.0, |m: f64, (g, w)| {
        let d = (f64::from(*g) - w).abs();
        if d.is_nan() { f64::INFINITY } else { m.max(d) }
    });
    worst / scale
}

/// Runs a check on each instruction set.
pub fn on_each_isa(f: impl Fn(Isa)) {
    for isa in Isa::available() {
        isa.force(|| f(isa));
    }
}

/// The result of `f` on a pool of `threads` threads.
pub fn with_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .expect("a thread pool");
    pool.install(f)
}

/// erf by its Taylor series, f64; good to 1e-12 for |x| up to 4.
pub fn erf(x: f64) -> f64 {
    if x.abs() > 4.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}
