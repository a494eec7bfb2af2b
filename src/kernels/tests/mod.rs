//! The kernels against plain f64 loops, on every instruction set of the machine.

mod conv;

use super::Isa;

/// Values in -1..1 from a linear congruential generator (Knuth's MMIX constants).
pub fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(2) + 1;
    let mut next = || {
        s = s
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (s >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    for _ in 0..4 {
        next();
    }
    (0..n).map(|_| next()).collect()
}

/// The largest difference relative to the largest magnitude.
pub fn relative_error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1e-30, |m: f64, x| m.max(x.abs()));
    got.iter().zip(want).fold(0.0, |m: f64, (g, w)| {
        let d = (*g as f64 - w).abs();
        if d.is_nan() { f64::INFINITY } else { m.max(d) }
    }) / scale
}

/// Runs a check on each instruction set.
pub fn on_each_isa(f: impl Fn(Isa)) {
    for isa in Isa::available() {
        isa.force(|| f(isa));
    }
}
