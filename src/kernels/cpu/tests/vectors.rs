//! The vector operations against plain arithmetic, lane by lane.

use super::{on_each_isa, random};
use crate::kernels::cpu::simd::{Set, Simd, isa_fn};

type Lanes = [f32; 16];

/// The vector's length, then add, sub, mul, div, max, min and mul_add of the first lanes.
///
/// # Safety
/// The machine has `S`.
#[inline(always)]
unsafe fn arithmetic_body<S: Simd>(x: &Lanes, y: &Lanes, z: &Lanes) -> (usize, [Lanes; 7]) {
    // SAFETY: no vector has more than 16 lanes.
    unsafe {
        let (x, y, z) = (
            S::load(x.as_ptr()),
            S::load(y.as_ptr()),
            S::load(z.as_ptr()),
        );
        let results = [
            x.add(y).to_array(),
            x.sub(y).to_array(),
            x.mul(y).to_array(),
            x.div(y).to_array(),
            x.max(y).to_array(),
            x.min(y).to_array(),
            x.mul_add(y, z).to_array(),
        ];
        (S::LANES, results)
    }
}

/// The vector's length, then 2^n by way of `exp2_of_biased`.
///
/// # Safety
/// The machine has `S`.
#[inline(always)]
unsafe fn power_body<S: Simd>(n: f32) -> (usize, Lanes) {
    // SAFETY: as the caller promises.
    let n = unsafe { S::splat(n) };
    let biased = n.add(n.like(12_582_912.0));
    (S::LANES, biased.exp2_of_biased().to_array())
}

/// The vector's length; what `load_first` makes of the first `n` values, in full; `to` after `store_first` of `n` lanes.
///
/// # Safety
/// The machine has `S`.
#[inline(always)]
unsafe fn part_body<S: Simd>(from: &Lanes, n: usize, mut to: Lanes) -> (usize, Lanes, Lanes) {
    let n = n.min(S::LANES - 1);
    // SAFETY: no vector has more than 16 lanes, and `n` is less than it has.
    unsafe {
        let part = S::load_first(from.as_ptr(), n).to_array();
        S::load(from.as_ptr()).store_first(to.as_mut_ptr(), n);
        (S::LANES, part, to)
    }
}

isa_fn! {
    /// # Safety
    /// Nothing is asked.
    fn arithmetic = arithmetic_body(x: &Lanes, y: &Lanes, z: &Lanes) -> (usize, [Lanes; 7])
}
isa_fn! {
    /// # Safety
    /// Nothing is asked.
    fn power = power_body(n: f32) -> (usize, Lanes)
}
isa_fn! {
    /// # Safety
    /// Nothing is asked.
    fn part = part_body(from: &Lanes, n: usize, to: Lanes) -> (usize, Lanes, Lanes)
}

fn lanes(seed: u64) -> Lanes {
    random(16, seed).try_into().expect("16 values")
}

#[test]
fn each_lane_of_a_vector_is_computed_as_a_number_alone() {
    on_each_isa(|isa| {
        for seed in 0..50 {
            let (x, y, z) = (lanes(3 * seed), lanes(3 * seed + 1), lanes(3 * seed + 2));
            // SAFETY: nothing is asked but the instructions, which `isa` proves.
            let (n, [add, sub, mul, div, max, min, mul_add]) =
                unsafe { arithmetic(isa, &x, &y, &z) };
            assert!(n >= 4);
            for i in 0..n {
                let (x, y, z) = (x[i], y[i], z[i]);
                // Equal to the bit: each is rounded once.
                assert_eq!(add[i], x + y, "{isa:?}");
                assert_eq!(sub[i], x - y, "{isa:?}");
                assert_eq!(mul[i], x * y, "{isa:?}");
                assert_eq!(div[i], x / y, "{isa:?}");
                assert_eq!(max[i], x.max(y), "{isa:?}");
                assert_eq!(min[i], x.min(y), "{isa:?}");
                let fused = match isa.set() {
                    #[cfg(target_arch = "x86_64")]
                    Set::Avx512Bf16 | Set::Avx512 | Set::Avx2 => true,
                    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
                    Set::Base => cfg!(target_arch = "aarch64"),
                    Set::Portable => false,
                };
                let want = if fused { x.mul_add(y, z) } else { x * y + z };
                assert_eq!(mul_add[i], want, "{isa:?}");
            }
        }
    });
}

#[test]
fn a_nan_in_the_second_operand_of_max_and_min_stays() {
    on_each_isa(|isa| {
        // SAFETY: as above.
        let (n, [.., max, min, _]) =
            unsafe { arithmetic(isa, &lanes(1), &[f32::NAN; 16], &lanes(2)) };
        assert!(max[..n].iter().all(|x| x.is_nan()), "{isa:?}");
        assert!(min[..n].iter().all(|x| x.is_nan()), "{isa:?}");
    });
}

#[test]
fn powers_of_two_are_exact_over_the_range_of_normal_numbers() {
    on_each_isa(|isa| {
        for e in -126..=127 {
            // SAFETY: as above.
            let (n, got) = unsafe { power(isa, e as f32) };
            assert_eq!(got[..n], [2f32.powi(e); 16][..n], "{isa:?}, 2^{e}");
        }
    });
}

#[test]
fn a_part_of_a_vector_is_read_with_zeros_behind_and_written_with_nothing_behind() {
    on_each_isa(|isa| {
        for first in 0..16 {
            let from = lanes(5);
            // SAFETY: as above.
            let (n, read, written) = unsafe { part(isa, &from, first, [9.0; 16]) };
            let first = first.min(n - 1);
            for i in 0..16 {
                let inside = i < first;
                assert_eq!(read[i], if inside { from[i] } else { 0.0 }, "{isa:?}");
                assert_eq!(written[i], if inside { from[i] } else { 9.0 }, "{isa:?}");
            }
        }
    });
}
