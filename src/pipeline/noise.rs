//! Normal noise that is the same, value for value, as PyTorch's CPU generator gives for a seed.
//!
//! Noise is always drawn here, on the CPU, whatever device runs the model: a seed means one picture.

use std::f64::consts::TAU;

const N: usize = 624;
const M: usize = 397;

/// The Mersenne Twister (MT19937, Matsumoto and Nishimura 1998) as `torch.Generator("cpu")` runs it.
///
/// One generator serves a whole picture; the order of the draws is part of the result.
#[derive(Clone)]
pub struct Generator {
    state: [u32; N],
    next: usize,
    /// The second value of a Box-Muller pair that the double-precision path has not handed out yet;
    /// PyTorch keeps it in the generator, across calls.
    kept: Option<f64>,
}

impl Generator {
    /// The generator that `torch.Generator("cpu").manual_seed(seed)` gives. Only the low 32 bits of
    /// `seed` reach the engine, as in PyTorch.
    pub fn new(seed: u64) -> Self {
        let mut state = [0u32; N];
        state[0] = seed as u32;
        for i in 1..N {
            let previous = state[i - 1];
            state[i] = 1_812_433_253u32
                .wrapping_mul(previous ^ (previous >> 30))
                .wrapping_add(i as u32);
        }
        Self {
            state,
            next: N,
            kept: None,
        }
    }

    fn refill(&mut self) {
        for i in 0..N {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
            let twist = if y & 1 == 0 { 0 } else { 0x9908_b0df };
            self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ twist;
        }
        self.next = 0;
    }

    fn u32(&mut self) -> u32 {
        if self.next == N {
            self.refill();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// Uniform in [0, 1) with 24 random bits, as PyTorch fills float32 tensors.
    fn uniform_f32(&mut self) -> f32 {
        (self.u32() & 0x00ff_ffff) as f32 / (1u32 << 24) as f32
    }

    /// Uniform in [0, 1) with 53 random bits of a u64 whose high word is drawn first.
    fn uniform_f64(&mut self) -> f64 {
        let high = u64::from(self.u32());
        let low = u64::from(self.u32());
        (((high << 32) | low) & ((1 << 53) - 1)) as f64 / (1u64 << 53) as f64
    }

    /// `torch.randn(count)` in float32: mean 0, standard deviation 1.
    ///
    /// PyTorch has two paths (aten/src/ATen/native/cpu/DistributionTemplates.h, `normal_fill`): 16 values or
    /// more are filled with uniforms and turned in blocks of 16, with the last 16 drawn again where the count
    /// is not a multiple; fewer go one at a time in double precision.
    pub fn randn(&mut self, count: usize) -> Vec<f32> {
        if count < 16 {
            return self.randn_small(count);
        }
        let mut values: Vec<f32> = (0..count).map(|_| self.uniform_f32()).collect();
        for block in values.chunks_exact_mut(16) {
            box_muller_16(block);
        }
        if !count.is_multiple_of(16) {
            let tail = &mut values[count - 16..];
            tail.fill_with(|| self.uniform_f32());
            box_muller_16(tail);
        }
        values
    }

    fn randn_small(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.normal_f64() as f32).collect()
    }

    /// One standard normal value, in double precision (at::normal_distribution<double>).
    fn normal_f64(&mut self) -> f64 {
        if let Some(value) = self.kept.take() {
            return value;
        }
        let u1 = self.uniform_f64();
        let u2 = self.uniform_f64();
        let radius = (-2.0 * (-u2).ln_1p()).sqrt();
        let theta = TAU * u1;
        self.kept = Some(radius * theta.sin());
        radius * theta.cos()
    }
}

/// Box-Muller over 16 uniforms: the first eight are radii, the last eight angles.
fn box_muller_16(block: &mut [f32]) {
    for j in 0..8 {
        let u1 = 1.0 - block[j];
        let radius = (-2.0 * u1.ln()).sqrt();
        let theta = std::f32::consts::TAU * block[j + 8];
        block[j] = radius * theta.cos();
        block[j + 8] = radius * theta.sin();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_draw_keeps_its_odd_value_for_the_next_call() {
        // torch.Generator("cpu").manual_seed(0); randn(3), then randn(3)
        let mut generator = Generator::new(0);
        let mut values = generator.randn(3);
        values.extend(generator.randn(3));
        let expected = [1.5410, -0.2934, -2.1788, 0.5684, -1.0845, -1.3986];
        for (value, expected) in values.iter().zip(expected) {
            // the reference was printed with four decimals
            assert!((value - expected).abs() < 1e-4, "{values:?}");
        }
    }
}
