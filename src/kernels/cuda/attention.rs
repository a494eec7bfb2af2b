//! Attention that never has all its scores in memory.

use candle_core::{DType, Error, Result, Tensor};

use super::arrays::{Array, Output, suffix};
use super::card::{Argument, of_device};
use super::int;

const MODULE: &str = "sd_attention";
/// The widest head that a kernel's registers hold.
const WIDEST: usize = 512;
/// Widths of heads that there are kernels on tensor cores for: a head narrower by less than the next is filled up with zeros. 40, 80 and 160
/// are Stable Diffusion 1's.
const TILES: [usize; 4] = [48, 64, 80, 160];

#[repr(C)]
#[derive(Clone, Copy)]
struct Shape {
    queries: i32,
    keys: i32,
    size: i32,
    heads: i32,
    q_row: i32,
    k_row: i32,
    v_row: i32,
    q_batch: i64,
    k_batch: i64,
    v_batch: i64,
    scale: f32,
    causal: i32,
}

// SAFETY: plain numbers in C's layout, the same as AttentionShape of sd_attention.cu.
unsafe impl Argument for Shape {}

/// A kernel's name, and the queries and threads of a block.
struct Kernel {
    name: String,
    queries: usize,
    threads: u32,
}

/// The kernel for heads of `size`: on tensor cores where these take the type, and rows and heads are aligned for 16 bytes.
fn kernel(dtype: DType, size: usize, aligned: bool) -> Result<Kernel> {
    let end = suffix(dtype)?;
    let tiles = dtype != DType::F32 && aligned && size.is_multiple_of(8);
    let narrow = TILES.into_iter().find(|&width| size <= width);
    Ok(match (tiles, narrow) {
        (true, Some(width)) => Kernel {
            name: format!("sd_attention_tiles_{end}_{width}"),
            queries: 64,
            threads: 128,
        },
        (true, None) if size == WIDEST => Kernel {
            name: format!("sd_attention_tiles_{end}_512"),
            queries: 32,
            threads: 256,
        },
        _ => {
            let widths = [64, 128, 256, WIDEST];
            let width = widths.into_iter().find(|&width| size <= width);
            let width = width.ok_or_else(|| {
                Error::Msg(format!(
                    "attention with heads of {size}; the CUDA kernels take up to {WIDEST}"
                ))
            })?;
            Kernel {
                name: format!("sd_attention_plain_{end}_{width}"),
                queries: 32,
                threads: 256,
            }
        }
    })
}

/// Whether there is a kernel for heads of `size`.
pub fn takes_heads(size: usize) -> bool {
    size <= WIDEST
}

/// q (b, n, heads * d), k and v (b, m, heads * d) -> (b, n, heads * d). Their rows may lie apart (parts of a wider tensor), the
/// values of a row one after the other. `causal`: a position sees itself and those before it.
///
/// # Errors
/// The shapes do not fit, heads of more than 512, or the device gives up.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    let card = of_device(q.device())?;
    let (b, queries, width) = q.dims3()?;
    let keys = k.dim(1)?;
    let arrays = [q, k, v].map(|tensor| Array::strided(tensor, &card));
    let [query, key, value] = arrays;
    let (query, key, value) = (query?, key?, value?);
    let parts = [&query, &key, &value];
    let whole_rows = parts.iter().all(|part| part.stride[2] == 1 || width == 1);
    let one_type = parts.iter().all(|part| part.dtype == query.dtype);
    let fits = k.dims() == [b, keys, width] && v.dims() == k.dims() && width.is_multiple_of(heads);
    if !fits || !whole_rows || !one_type || keys == 0 {
        return Err(Error::Msg(format!(
            "attention of {heads} heads was given {:?}, {:?} and {:?}",
            q.shape(),
            k.shape(),
            v.shape()
        )));
    }
    let size = width / heads;
    let aligned = parts.iter().all(|part| {
        part.pointer.is_multiple_of(16) && part.stride[..2].iter().all(|s| s.is_multiple_of(8))
    });
    let kernel = kernel(query.dtype, size, aligned)?;
    let row = |part: &Array| int(part.stride[1]);
    let batch = |part: &Array| part.stride[0] as i64;
    let shape = Shape {
        queries: int(queries)?,
        keys: int(keys)?,
        size: int(size)?,
        heads: int(heads)?,
        q_row: row(&query)?,
        k_row: row(&key)?,
        v_row: row(&value)?,
        q_batch: batch(&query),
        k_batch: batch(&key),
        v_batch: batch(&value),
        scale: 1.0 / (size as f32).sqrt(),
        causal: i32::from(causal),
    };
    let y = Output::new(b * queries * width, query.dtype, &card)?;
    let grid = (
        queries.div_ceil(kernel.queries) as u32,
        heads as u32,
        b as u32,
    );
    // SAFETY: the arguments are those of the attention kernels, which read rows of heads * d values at the strides given and write
    // b * queries of them.
    unsafe {
        card.launch(
            (MODULE, &kernel.name),
            grid,
            kernel.threads,
            &[
                &query.pointer,
                &key.pointer,
                &value.pointer,
                &y.pointer,
                &shape,
            ],
        )?;
    }
    Ok(y.tensor((b, queries, width)))
}
