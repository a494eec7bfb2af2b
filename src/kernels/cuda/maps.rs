//! Activations, layouts, padding, resampling, the sampler's ends.

use candle_core::{DType, Error, Result, Tensor};

use super::arrays::{Array, Output, pointer, suffix, vector};
use super::card::{Card, of_device};
use super::{blocks, int, number};
use crate::kernels::Activation;

const MODULE: &str = "sd_maps";
const THREADS: u32 = 256;

/// `act(x)`, any shape.
///
/// # Errors
/// The device gives up.
pub fn activation(x: &Tensor, activation: Activation) -> Result<Tensor> {
    let card = of_device(x.device())?;
    let values = Array::contiguous(x, &card)?;
    let count = x.elem_count();
    let together = vector(count, values.dtype);
    let y = Output::new(count, values.dtype, &card)?;
    let name = format!("sd_activation_{}_{together}", suffix(values.dtype)?);
    // SAFETY: the arguments are sd_activation's; x and y have count values.
    unsafe {
        card.launch(
            (MODULE, &name),
            (blocks(count / together), 1, 1),
            THREADS,
            &[&values.pointer, &y.pointer, &count, &number(activation)],
        )?;
    }
    Ok(y.tensor(x.shape()))
}

/// `value * act(gate)` of tokens (b, n, 2 * width), whose channels are the values, then their gates: (b, n, width).
///
/// # Errors
/// An odd number of channels, or the device gives up.
pub fn gate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    let card = of_device(x.device())?;
    let (b, n, channels) = x.dims3()?;
    let width = channels / 2;
    if width == 0 || channels != 2 * width {
        return Err(Error::Msg(format!(
            "{channels} channels were given as values and their gates"
        )));
    }
    let joined = Array::contiguous(x, &card)?;
    let rows = b * n;
    let together = vector(width, joined.dtype);
    let y = Output::new(rows * width, joined.dtype, &card)?;
    let name = format!("sd_gate_{}_{together}", suffix(joined.dtype)?);
    // SAFETY: the arguments are sd_gate's; x has rows of twice the width, y as many of the width.
    unsafe {
        card.launch(
            (MODULE, &name),
            (blocks(rows * width / together), 1, 1),
            THREADS,
            &[
                &joined.pointer,
                &y.pointer,
                &rows,
                &int(width)?,
                &number(activation),
            ],
        )?;
    }
    Ok(y.tensor((b, n, width)))
}

/// The channels of `a` (b, h, w, c), then those of `b` (b, h, w, d).
///
/// # Errors
/// The shapes do not fit, or the device gives up.
pub fn concatenate(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let card = of_device(a.device())?;
    let (n, h, w, first) = a.dims4()?;
    let second = b.dim(3)?;
    let (left, right) = (Array::contiguous(a, &card)?, Array::contiguous(b, &card)?);
    if b.dims4()? != (n, h, w, second) || left.dtype != right.dtype {
        return Err(Error::Msg(format!(
            "maps of {:?} and {:?} cannot be joined",
            a.shape(),
            b.shape()
        )));
    }
    let places = n * h * w;
    let together = vector(first, left.dtype).min(vector(second, left.dtype));
    let y = Output::new(places * (first + second), left.dtype, &card)?;
    let name = format!("sd_concatenate_{}_{together}", suffix(left.dtype)?);
    // SAFETY: the arguments are sd_concatenate's, each map of so many places.
    unsafe {
        card.launch(
            (MODULE, &name),
            (blocks(places * (first + second) / together), 1, 1),
            THREADS,
            &[
                &left.pointer,
                &right.pointer,
                &y.pointer,
                &places,
                &int(first)?,
                &int(second)?,
            ],
        )?;
    }
    Ok(y.tensor((n, h, w, first + second)))
}

/// A kernel that makes a map of another height and width, a block for each of its lines.
fn resample(x: &Tensor, name: &str, (high, wide): (usize, usize), more: &[i32]) -> Result<Tensor> {
    let card = of_device(x.device())?;
    let (b, h, w, c) = x.dims4()?;
    let map = Array::contiguous(x, &card)?;
    let together = vector(c, map.dtype);
    let y = Output::new(b * high * wide * c, map.dtype, &card)?;
    let name = format!("sd_{name}_{}_{together}", suffix(map.dtype)?);
    let sizes = [int(h)?, int(w)?, int(c)?];
    let mut arguments: Vec<&dyn super::card::AsArgument> = vec![&map.pointer, &y.pointer];
    for number in sizes.iter().chain(more) {
        arguments.push(number);
    }
    let grid = (blocks(wide * c / together), high as u32, b as u32);
    if high > 65535 || b > 65535 {
        return Err(Error::Msg(format!(
            "a map of {wide}x{high}, {b} of them, is too large for a card"
        )));
    }
    // SAFETY: the arguments are those of the kernel that the callers below name; y has the size that it writes.
    unsafe { card.launch((MODULE, &name), grid, THREADS, &arguments) }?;
    Ok(y.tensor((b, high, wide, c)))
}

/// (b, h, w, c) -> (b, 2h, 2w, c), every value four times.
///
/// # Errors
/// The device gives up.
#[cfg(feature = "cudnn")]
pub fn repeat_2x(x: &Tensor) -> Result<Tensor> {
    let (_, h, w, _) = x.dims4()?;
    resample(x, "repeat_2x", (2 * h, 2 * w), &[])
}

/// (b, h, w, c) with `before` zeros above and left of it and `after` below and right.
///
/// # Errors
/// The device gives up.
#[cfg(feature = "cudnn")]
pub fn pad(x: &Tensor, before: usize, after: usize) -> Result<Tensor> {
    let (_, h, w, _) = x.dims4()?;
    let more = before + after;
    resample(x, "pad", (h + more, w + more), &[int(before)?, int(after)?])
}

/// (b, h, w, c) -> (b, h / 2, w / 2, c) by [1, 3, 3, 1] / 8, mirrored at the edges; sides of at least 2.
///
/// # Errors
/// The device gives up.
pub fn downsample(x: &Tensor) -> Result<Tensor> {
    let (_, h, w, _) = x.dims4()?;
    resample(x, "downsample", (h / 2, w / 2), &[])
}

/// (b, h, w, c) -> (b, 2h, 2w, c) by [1, 3, 3, 1] / 4, mirrored at the edges; sides of at least 2.
///
/// # Errors
/// The device gives up.
pub fn upsample(x: &Tensor) -> Result<Tensor> {
    let (_, h, w, _) = x.dims4()?;
    resample(x, "upsample", (2 * h, 2 * w), &[])
}

/// Planes (b, c, h, w), float32, as they are named in the kernel.
fn planes<'a>(tensor: &'a Tensor, card: &Card) -> Result<Array<'a>> {
    let array = Array::contiguous(tensor, card)?;
    match array.dtype {
        DType::F32 => Ok(array),
        other => Err(Error::Msg(format!("planes of {other:?}, expected float32"))),
    }
}

/// A map (repeats * b, h, w, c1 + c2) in `dtype` of planes: `first` (b, c1, h, w) times `scale`, then `second` (b, c2, h, w), both
/// float32; the batch is repeated as a whole.
///
/// # Errors
/// The shapes do not fit, or the device gives up.
pub fn planes_to_map(
    first: &Tensor,
    scale: f32,
    second: Option<&Tensor>,
    repeats: usize,
    dtype: DType,
) -> Result<Tensor> {
    let card = of_device(first.device())?;
    let (b, c1, h, w) = first.dims4()?;
    let c2 = second.map_or(Ok(0), |second| second.dim(1))?;
    if second.is_some_and(|second| second.dims() != [b, c2, h, w]) {
        return Err(Error::Msg(format!(
            "planes that do not go with {:?}",
            first.shape()
        )));
    }
    let front = planes(first, &card)?;
    let back = second.map(|second| planes(second, &card)).transpose()?;
    let (channels, rows) = (c1 + c2, repeats * b);
    let y = Output::new(rows * channels * h * w, dtype, &card)?;
    let name = format!("sd_planes_to_map_{}", suffix(dtype)?);
    // SAFETY: the arguments are sd_planes_to_map's; second is null where c2 is 0; y has rows of all channels.
    unsafe {
        card.launch(
            (MODULE, &name),
            (blocks(channels * h * w), rows as u32, 1),
            THREADS,
            &[
                &front.pointer,
                &pointer(back.as_ref()),
                &y.pointer,
                &scale,
                &int(b)?,
                &int(c1)?,
                &int(c2)?,
                &int(h * w)?,
            ],
        )?;
    }
    Ok(y.tensor((rows, h, w, channels)))
}

/// A map (b, h, w, c) as planes (b, c, h, w), float32.
///
/// # Errors
/// The device gives up.
pub fn map_to_planes(x: &Tensor) -> Result<Tensor> {
    let card = of_device(x.device())?;
    let (b, h, w, c) = x.dims4()?;
    let map = Array::contiguous(x, &card)?;
    let y = Output::new(b * c * h * w, DType::F32, &card)?;
    let name = format!("sd_map_to_planes_{}", suffix(map.dtype)?);
    // SAFETY: the arguments are sd_map_to_planes's; x and y have b * c * h * w values.
    unsafe {
        card.launch(
            (MODULE, &name),
            (blocks(c * h * w), b as u32, 1),
            THREADS,
            &[&map.pointer, &y.pointer, &int(c)?, &int(h * w)?],
        )?;
    }
    Ok(y.tensor((b, c, h, w)))
}

/// How a network's output is read: `skip * x + factor * output`; of two prompts, by classifier-free guidance.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    pub skip: f32,
    pub factor: f32,
    pub guidance: f32,
}

/// Noisy latents `x` (b, c, h, w), float32, and what the network says of them, a map (prompts * b, h, w, at least c channels), as
/// latents without noise, (b, c, h, w), float32. Of two prompts the negative one comes first.
///
/// # Errors
/// The shapes do not fit, or the device gives up.
pub fn denoised(x: &Tensor, output: &Tensor, reading: Reading) -> Result<Tensor> {
    let card = of_device(x.device())?;
    let (b, c, h, w) = x.dims4()?;
    let (rows, high, wide, channels) = output.dims4()?;
    let prompts = rows / b;
    let fits = (high, wide) == (h, w) && channels >= c && rows == prompts * b;
    if !fits || !(1..=2).contains(&prompts) {
        return Err(Error::Msg(format!(
            "a network's output of {:?} does not go with latents of {:?}",
            output.shape(),
            x.shape()
        )));
    }
    let latents = planes(x, &card)?;
    let map = Array::contiguous(output, &card)?;
    let y = Output::new(x.elem_count(), DType::F32, &card)?;
    let name = format!("sd_denoised_{}", suffix(map.dtype)?);
    // SAFETY: the arguments are sd_denoised's, of the shapes just held against each other.
    unsafe {
        card.launch(
            (MODULE, &name),
            (blocks(c * h * w), b as u32, 1),
            THREADS,
            &[
                &latents.pointer,
                &map.pointer,
                &y.pointer,
                &reading.skip,
                &reading.factor,
                &reading.guidance,
                &int(prompts)?,
                &int(c)?,
                &int(channels)?,
                &int(h * w)?,
            ],
        )?;
    }
    Ok(y.tensor(x.shape()))
}

/// `condition` (b, 2n) plus the Fourier features of `angle`: cosines and sines of `frequencies` (n), float32, times it.
///
/// # Errors
/// The shapes do not fit, or the device gives up.
pub fn time_features(
    condition: &Tensor,
    frequencies: &Tensor,
    angle: f32,
    cosine_first: bool,
) -> Result<Tensor> {
    let card = of_device(condition.device())?;
    let (b, width) = condition.dims2()?;
    let count = frequencies.elem_count();
    let values = Array::contiguous(condition, &card)?;
    let waves = planes(frequencies, &card)?;
    if width != 2 * count {
        return Err(Error::Msg(format!(
            "{count} frequencies for a condition of {width}"
        )));
    }
    let y = Output::new(b * width, values.dtype, &card)?;
    let name = format!("sd_time_features_{}", suffix(values.dtype)?);
    // SAFETY: the arguments are sd_time_features's, of the shapes just held against each other.
    unsafe {
        card.launch(
            (MODULE, &name),
            (blocks(width), b as u32, 1),
            THREADS,
            &[
                &values.pointer,
                &waves.pointer,
                &y.pointer,
                &angle,
                &int(count)?,
                &i32::from(cosine_first),
            ],
        )?;
    }
    Ok(y.tensor((b, width)))
}
