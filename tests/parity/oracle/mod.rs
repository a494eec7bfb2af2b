//! A second opinion without Python: candle-transformers' autoencoder and CLIP on random weights beside ours.
//!
//! It shares candle's tensors with our stock operations, but neither a model's structure nor a kernel with us.

mod ddim;
mod peer;
mod text;
mod vae;

use candle_core::Tensor;
use peer::{Tensors, peak_error};

/// The largest difference, in root mean squares of the output. Two float32 programs that sum in another order differ by about
/// 1e-6 in the mean, and the worst of some thousand values by a few times that: 5e-6 is seen, through CLIP's twelve layers.
const BOUND: f64 = 1e-5;

#[track_caller]
fn assert_near(what: &str, actual: &Tensor, expected: &Tensor) {
    let error = peak_error(actual, expected);
    println!("{what}: off by {error:.1e} at most");
    assert!(
        error <= BOUND,
        "{what}: {error:.1e} from candle-transformers, at most {BOUND:.0e} is allowed"
    );
}

/// That the comparison can fail: what `run` makes of `tensors` must be further than `BOUND` from `expected` once the values
/// of any one of `names` are off by up to a fiftieth of themselves.
#[track_caller]
fn assert_every_weight_is_seen<'a>(
    what: &str,
    expected: &Tensor,
    tensors: &Tensors,
    names: impl Iterator<Item = &'a String>,
    run: impl Fn(Tensors) -> Tensor,
) {
    let (mut count, mut least) = (0, f64::INFINITY);
    for name in names {
        let tensor = &tensors[name];
        let shift = (peer::noise("fault", tensor.shape()) * 0.01).unwrap();
        let faulty = (tensor + (tensor * shift).unwrap()).unwrap();
        let mut changed = tensors.clone();
        changed.insert(name.clone(), faulty);
        let error = peak_error(&run(changed), expected);
        assert!(
            error > BOUND,
            "{what}: a fault in {name} leaves {error:.1e}, and would not be noticed"
        );
        count += 1;
        least = least.min(error);
    }
    println!("{what}: a fault in each of {count} tensors leaves {least:.1e} or more");
    assert!(count > 0, "{what}: no tensor was tried");
}
