//! Group and layer normalisation.

use candle_core::{DType, Error, Result, Tensor};

use super::arrays::{Array, Output, suffix, vector};
use super::card::{Argument, Card, of_device};
use super::{blocks, int, number};
use crate::kernels::Activation;

const MODULE: &str = "sd_norm";
const THREADS: usize = 256;
/// Blocks that sum up a batch of maps, about: some for every multiprocessor of a large card.
const BLOCKS: usize = 512;
/// Positions that a thread sums up, at least: fewer are not worth a block.
const POSITIONS_A_THREAD: usize = 8;

/// A group norm's numbers.
#[derive(Clone, Copy, Debug)]
pub struct GroupNorm {
    pub groups: usize,
    pub eps: f32,
    pub activation: Activation,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Shape {
    positions: i32,
    channels: i32,
    groups: i32,
    groups_a_block: i32,
    chunk: i32,
    scale_stride: i32,
    eps: f32,
}

// SAFETY: plain numbers in C's layout, the same as GroupNormShape of sd_norm.cu.
unsafe impl Argument for Shape {}

/// How the work is cut.
struct Cut {
    groups_a_block: usize,
    group_blocks: usize,
    chunk: usize,
    chunks: usize,
}

fn cut(batch: usize, positions: usize, groups: usize, vectors_a_group: usize) -> Cut {
    let groups_a_block = (THREADS / vectors_a_group).clamp(1, groups);
    let group_blocks = groups.div_ceil(groups_a_block);
    let columns = (groups_a_block * vectors_a_group).min(THREADS);
    let least = POSITIONS_A_THREAD * (THREADS / columns);
    let wanted = (BLOCKS / (batch * group_blocks)).max(1);
    let chunk = positions.div_ceil(wanted).max(least).min(positions);
    Cut {
        groups_a_block,
        group_blocks,
        chunk,
        chunks: positions.div_ceil(chunk),
    }
}

/// `act(norm(x) * scale + shift)` of a map (b, h, w, c). `scale`, `shift` (1, c) or (b, c), float32, the values of a row one
/// after the other.
///
/// # Errors
/// The shapes do not fit, or the device gives up.
pub fn group_norm(x: &Tensor, scale: &Tensor, shift: &Tensor, norm: GroupNorm) -> Result<Tensor> {
    let card = of_device(x.device())?;
    let y = Output::new(x.elem_count(), x.dtype(), &card)?;
    normalise(&card, x, scale, shift, norm, y.pointer)?;
    Ok(y.tensor(x.shape()))
}

/// The same in the map's own memory, which nobody else may be reading: what shares it is overwritten.
///
/// # Errors
/// As [`group_norm`].
pub fn group_norm_over(
    x: Tensor,
    scale: &Tensor,
    shift: &Tensor,
    norm: GroupNorm,
) -> Result<Tensor> {
    let card = of_device(x.device())?;
    let place = Array::contiguous(&x, &card)?.pointer;
    normalise(&card, &x, scale, shift, norm, place)?;
    Ok(x)
}

/// The normalised map at `to`, which has room for it.
fn normalise(
    card: &Card,
    x: &Tensor,
    scale: &Tensor,
    shift: &Tensor,
    norm: GroupNorm,
    to: u64,
) -> Result<()> {
    let (b, h, w, c) = x.dims4()?;
    let map = Array::contiguous(x, card)?;
    let affine = statistics_at(card, &map, (b, h * w, c), scale, shift, norm, None)?;
    apply(card, &map, (b, h * w, c), affine, norm.activation, to)
}

/// `act(x * affine[0] + affine[1])` at `to`, `affine` (b, 2, c).
fn apply(
    card: &Card,
    map: &Array,
    (b, positions, c): (usize, usize, usize),
    affine: u64,
    activation: Activation,
    to: u64,
) -> Result<()> {
    let together = vector(c, map.dtype);
    let name = format!("sd_group_norm_apply_{}_{together}", suffix(map.dtype)?);
    let grid = (blocks(positions * c / together), b as u32, 1);
    // SAFETY: the arguments are sd_group_norm_apply's; the map and `to` have b * positions * c values, the affine map 2 * b * c.
    unsafe {
        card.launch(
            (MODULE, &name),
            grid,
            THREADS as u32,
            &[
                &map.pointer,
                &affine,
                &to,
                &int(positions)?,
                &int(c)?,
                &number(activation),
            ],
        )
    }
}

/// `act(x * scale + shift)` of a map (b, h, w, c), `scale` and `shift` (b, c), float32.
///
/// # Errors
/// The shapes do not fit, or the device gives up.
pub fn affine(
    x: &Tensor,
    scale: &Tensor,
    shift: &Tensor,
    activation: Activation,
) -> Result<Tensor> {
    let card = of_device(x.device())?;
    let (b, h, w, c) = x.dims4()?;
    if scale.dims() != [b, c] || shift.dims() != [b, c] || scale.dtype() != DType::F32 {
        return Err(Error::Msg(format!(
            "a scale of {:?} and a shift of {:?}, expected ({b}, {c}), float32",
            scale.dims(),
            shift.dims()
        )));
    }
    let both = Tensor::stack(&[scale, shift], 1)?.contiguous()?;
    let (map, both) = (
        Array::contiguous(x, &card)?,
        Array::contiguous(&both, &card)?,
    );
    let y = Output::new(x.elem_count(), x.dtype(), &card)?;
    apply(
        &card,
        &map,
        (b, h * w, c),
        both.pointer,
        activation,
        y.pointer,
    )?;
    Ok(y.tensor(x.shape()))
}

/// Mean and variance of each group of each row of a map (b, h, w, c), in the order of the rows.
///
/// # Errors
/// The groups do not divide the channels, or the device gives up.
pub fn moments(x: &Tensor, groups: usize) -> Result<Vec<(f64, f64)>> {
    /// Beside the variance: what is recovered from the two is as exact as their sum.
    const EPS: f64 = 1e-6;
    let card = of_device(x.device())?;
    let (b, h, w, c) = x.dims4()?;
    let map = Array::contiguous(x, &card)?;
    let one = Tensor::ones((1, c), DType::F32, x.device())?;
    let zero = one.zeros_like()?;
    let found = Output::new(b * 2 * c, DType::F32, &card)?;
    let norm = GroupNorm {
        groups,
        eps: EPS as f32,
        activation: Activation::None,
    };
    statistics_at(
        &card,
        &map,
        (b, h * w, c),
        &one,
        &zero,
        norm,
        Some(found.pointer),
    )?;
    let found: Vec<f32> = found.tensor((b, 2, c)).flatten_all()?.to_vec1()?;
    let of_group = |row: usize, group: usize| {
        let at = row * 2 * c + group * (c / groups);
        let (factor, addend) = (f64::from(found[at]), f64::from(found[at + c]));
        (-addend / factor, (1.0 / (factor * factor) - EPS).max(0.0))
    };
    let pairs = (0..b).flat_map(|row| (0..groups).map(move |group| (row, group)));
    Ok(pairs.map(|(row, group)| of_group(row, group)).collect())
}

/// Where the factor and the addend of every row and channel lie: at `to`, which has room for (b, 2, c), or in scratch memory.
fn statistics_at(
    card: &Card,
    map: &Array,
    (b, positions, c): (usize, usize, usize),
    scale: &Tensor,
    shift: &Tensor,
    norm: GroupNorm,
    to: Option<u64>,
) -> Result<u64> {
    let (scale, scale_stride) = weights(scale, b, c, card)?;
    let (shift, shift_stride) = weights(shift, b, c, card)?;
    if scale_stride != shift_stride || !c.is_multiple_of(norm.groups) {
        return Err(Error::Msg(format!(
            "a group norm of {} groups and rows of {scale_stride} and {shift_stride} does not fit {c} channels",
            norm.groups
        )));
    }
    let size = c / norm.groups;
    let together = vector(size, map.dtype);
    let cut = cut(b, positions, norm.groups, size / together);
    let parts = b * cut.chunks * norm.groups * 2 * size_of::<f32>();
    let parts = parts.next_multiple_of(256);
    let scratch = card.scratch(parts + b * 2 * c * size_of::<f32>())?;
    let affine = to.unwrap_or(scratch + parts as u64);
    let shape = Shape {
        positions: int(positions)?,
        channels: int(c)?,
        groups: int(norm.groups)?,
        groups_a_block: int(cut.groups_a_block)?,
        chunk: int(cut.chunk)?,
        scale_stride: int(scale_stride)?,
        eps: norm.eps,
    };
    let name = format!("sd_group_norm_statistics_{}_{together}", suffix(map.dtype)?);
    let grid = (cut.chunks as u32, cut.group_blocks as u32, b as u32);
    let tickets = card.tickets(b)?;
    // SAFETY: the arguments are sd_group_norm_statistics's. The map is whole; scale and shift have a row of c at every stride
    // (`weights`); scratch has room for all parts and the affine map; there is a ticket a row.
    unsafe {
        card.launch(
            (MODULE, &name),
            grid,
            THREADS as u32,
            &[
                &map.pointer,
                &scale.pointer,
                &shift.pointer,
                &scratch,
                &tickets,
                &affine,
                &shape,
            ],
        )?;
    }
    Ok(affine)
}

/// Scale or shift, and how far its rows lie apart: 0 for one row.
fn weights<'a>(tensor: &'a Tensor, b: usize, c: usize, card: &Card) -> Result<(Array<'a>, usize)> {
    let (rows, columns) = tensor.dims2()?;
    let array = Array::strided(tensor, card)?;
    let fits = columns == c && (rows == 1 || rows == b) && array.dtype == DType::F32;
    if !fits || (array.stride[1] != 1 && c > 1) {
        return Err(Error::Msg(format!(
            "weights of a norm of shape {:?} and type {:?}, expected ({b} or 1, {c}), float32",
            tensor.dims(),
            array.dtype
        )));
    }
    let stride = if rows == 1 { 0 } else { array.stride[0] };
    Ok((array, stride))
}

/// Layer normalisation of `x` (…, size) over its last dimension; `weight`, `bias` (size), of its type.
///
/// # Errors
/// The shapes do not fit, or the device gives up.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
    let card = of_device(x.device())?;
    let size = weight.elem_count();
    let values = Array::contiguous(x, &card)?;
    let (weight, bias) = (
        Array::contiguous(weight, &card)?,
        Array::contiguous(bias, &card)?,
    );
    if x.dims().last() != Some(&size) || weight.dtype != values.dtype || bias.dtype != values.dtype
    {
        return Err(Error::Msg(format!(
            "a layer norm of {size} was given {:?}",
            x.shape()
        )));
    }
    let rows = x.elem_count() / size;
    let y = Output::new(x.elem_count(), values.dtype, &card)?;
    let name = format!("sd_layer_norm_{}", suffix(values.dtype)?);
    let grid = (rows.div_ceil(THREADS / 32) as u32, 1, 1);
    // SAFETY: the arguments are sd_layer_norm's; x and y have rows * size values, weight and bias size.
    unsafe {
        card.launch(
            (MODULE, &name),
            grid,
            THREADS as u32,
            &[
                &values.pointer,
                &weight.pointer,
                &bias.pointer,
                &y.pointer,
                &int(rows)?,
                &int(size)?,
                &eps,
            ],
        )?;
    }
    Ok(y.tensor(x.shape()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_covers_every_position_and_group_once() {
        for (batch, positions, groups, vectors) in [
            (1, 4096, 12, 4),
            (2, 1, 1, 1),
            (1, 1 << 22, 32, 1),
            (3, 77, 5, 300),
            (600, 9, 2, 16),
        ] {
            let cut = cut(batch, positions, groups, vectors);
            assert!(cut.chunks * cut.chunk >= positions);
            assert!((cut.chunks - 1) * cut.chunk < positions);
            assert!(cut.group_blocks * cut.groups_a_block >= groups);
            assert!(cut.groups_a_block == 1 || cut.groups_a_block * vectors <= THREADS);
        }
    }
}
