//! Layers that compute nothing: maps have sizes and no values. A network of them, run on a map's size, tells what a run takes:
//! what is kept and read when is not guessed at a second place.

use std::cell::{Cell, RefCell};

use anyhow::Result;
use candle_core::{DType, Device, Shape, Tensor};

use super::ConvShape;
use crate::device::Placement;

/// What layers without values have counted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counted {
    /// Bytes of the weights of all that were made.
    pub weights: u64,
    /// Multiplications and additions of convolutions, counted directly.
    pub convolutions: f64,
    /// The same of matrix products.
    pub products: f64,
    /// Bytes of everything that was computed since [`made`] was asked.
    made: u64,
}

/// What one layer does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// A convolution to (b, h, w, outputs); `upsampled`: of a map that is read enlarged 2x.
    Convolution {
        b: usize,
        h: usize,
        w: usize,
        inputs: usize,
        outputs: usize,
        kernel: usize,
        stride: usize,
        upsampled: bool,
    },
    /// (rows, inner) times (inner, columns).
    Product {
        rows: usize,
        inner: usize,
        columns: usize,
    },
    /// Queries (b, rows, width) over `keys` keys, in heads.
    Attention {
        b: usize,
        rows: usize,
        width: usize,
        keys: usize,
        heads: usize,
    },
}

thread_local! {
    static WORKS: RefCell<Option<Vec<Work>>> = const { RefCell::new(None) };
}

/// What the layers of shapes that `run` runs on this thread do, one by one.
///
/// # Errors
/// Those of `run`.
pub fn works(run: impl FnOnce() -> Result<()>) -> Result<Vec<Work>> {
    WORKS.set(Some(Vec::new()));
    let result = run();
    let works = WORKS.take().unwrap_or_default();
    result.map(|()| works)
}

fn note(work: Work) {
    WORKS.with_borrow_mut(|works| works.as_mut().map(|works| works.push(work)));
}

thread_local! {
    static COUNTED: Cell<Counted> = const {
        Cell::new(Counted { weights: 0, convolutions: 0.0, products: 0.0, made: 0 })
    };
}

/// What this thread's layers have counted since this was asked last.
pub fn counted() -> Counted {
    COUNTED.take()
}

fn count(change: impl FnOnce(&mut Counted)) {
    let mut counted = COUNTED.get();
    change(&mut counted);
    COUNTED.set(counted);
}

/// Bytes of what was computed since this was asked last.
pub fn made() -> u64 {
    let mut made = 0;
    count(|counted| made = std::mem::take(&mut counted.made));
    made
}

/// A tensor of this shape, which takes no memory, as the result of a computation.
pub fn result(shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    let shape = shape.into();
    let bytes = shape.elem_count() * dtype.size_in_bytes();
    count(|counted| counted.made += bytes as u64);
    view(shape, dtype)
}

/// The same as another view of one that is there.
pub fn view(shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    let one = Tensor::zeros((), dtype, &Device::Cpu)?;
    Ok(one.broadcast_as(shape.into())?)
}

/// Memory that a computation takes for a while.
pub fn scratch(bytes: u64) {
    count(|counted| counted.made += bytes);
}

/// Weights of so many values.
pub fn weights(values: usize, placement: &Placement) {
    let bytes = values * placement.dtype.size_in_bytes();
    count(|counted| counted.weights += bytes as u64);
}

/// A convolution whose output is (b, h, w, outputs).
pub fn convolution(shape: &ConvShape, (b, h, w): (usize, usize, usize), upsampled: bool) {
    let weights: usize = shape.weight().iter().product();
    let positions = b * h * w;
    count(|counted| counted.convolutions += 2.0 * weights as f64 * positions as f64);
    note(Work::Convolution {
        b,
        h,
        w,
        inputs: shape.inputs,
        outputs: shape.outputs,
        kernel: shape.kernel,
        stride: shape.stride,
        upsampled,
    });
}

/// (rows, inner) times (inner, columns).
pub fn product(rows: usize, inner: usize, columns: usize) {
    count_product(rows, inner, columns);
    note(Work::Product {
        rows,
        inner,
        columns,
    });
}

/// Queries (b, rows, width) over `keys` keys.
pub fn attention((b, rows, width): (usize, usize, usize), keys: usize, heads: usize) {
    count_product(b * rows, width, 2 * keys);
    note(Work::Attention {
        b,
        rows,
        width,
        keys,
        heads,
    });
}

fn count_product(rows: usize, inner: usize, columns: usize) {
    let work = 2.0 * rows as f64 * inner as f64 * columns as f64;
    count(|counted| counted.products += work);
}
