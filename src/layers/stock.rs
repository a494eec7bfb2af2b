//! The layers on candle's stock operations, channels first: what they are compared with, and what a card falls back to.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use super::bands::Moments;
use super::{Activation, ConvShape, FeatureMap, Mask, NormAct, Padding};

/// Scores formed at once in attention, at most: 2^26 float32 values are 256 MiB.
const SCORES_AT_ONCE: usize = 1 << 26;

pub fn activation(x: &Tensor, activation: Activation) -> Result<Tensor> {
    Ok(match activation {
        Activation::None => x.clone(),
        Activation::Gelu => x.gelu_erf()?,
        Activation::Silu => x.silu()?,
        Activation::QuickGelu => (x * candle_nn::ops::sigmoid(&(x * 1.702)?)?)?,
        // candle's own gives 0 for what is not a number, which would hide an overflow.
        Activation::Relu => x.lt(0f64)?.where_cond(&x.zeros_like()?, x)?,
    })
}

pub fn linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let mut shape = x.dims().to_vec();
    let inputs = shape.pop().unwrap_or(1);
    let rows: usize = shape.iter().product();
    shape.push(weight.dim(0)?);
    let mut y = x.reshape((rows, inputs))?.matmul(&weight.t()?)?;
    if let Some(bias) = bias {
        y = y.broadcast_add(bias)?;
    }
    let y = y.reshape(shape)?;
    Ok(match residual {
        Some(residual) => (y + residual)?,
        None => y,
    })
}

pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    shape: &ConvShape,
) -> Result<Tensor> {
    let Padding { before, after } = shape.padding;
    let y = if before == after {
        x.conv2d(weight, before, shape.stride, 1, 1)?
    } else {
        x.pad_with_zeros(2, before, after)?
            .pad_with_zeros(3, before, after)?
            .conv2d(weight, 0, shape.stride, 1, 1)?
    };
    Ok(match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    })
}

pub fn repeat_2x(x: &FeatureMap) -> Result<FeatureMap> {
    let (_, _, h, w) = x.dims()?;
    Ok(x.like(x.tensor.upsample_nearest2d(2 * h, 2 * w)?))
}

/// Statistics in float32 whatever the map's dtype: sums over a group overflow float16.
pub fn norm_act(x: &Tensor, norm: &NormAct) -> Result<Tensor> {
    let dtype = x.dtype();
    let (b, c, h, w) = x.dims4()?;
    let grouped = x
        .to_dtype(DType::F32)?
        .reshape((b, norm.groups, c / norm.groups * h * w))?;
    let mean = grouped.mean_keepdim(2)?;
    let centred = grouped.broadcast_sub(&mean)?;
    let variance = centred.sqr()?.mean_keepdim(2)?;
    let normed = centred
        .broadcast_div(&(variance + norm.eps)?.sqrt()?)?
        .reshape((b, c, h, w))?;
    let per_channel = |t: &Tensor| t.unsqueeze(2)?.unsqueeze(3);
    let y = normed
        .broadcast_mul(&per_channel(&norm.scale)?)?
        .broadcast_add(&per_channel(&norm.shift)?)?;
    Ok(activation(&y, norm.activation)?.to_dtype(dtype)?)
}

/// `act(x * scale + shift)`, scale and shift (b, c), float32.
pub fn affine(x: &Tensor, scale: &Tensor, shift: &Tensor, act: Activation) -> Result<Tensor> {
    let per_channel = |t: &Tensor| t.unsqueeze(2)?.unsqueeze(3);
    let y = x
        .to_dtype(DType::F32)?
        .broadcast_mul(&per_channel(scale)?)?
        .broadcast_add(&per_channel(shift)?)?;
    Ok(activation(&y, act)?.to_dtype(x.dtype())?)
}

/// Those of each group of each batch item of a map.
pub fn moments(x: &Tensor, groups: usize) -> Result<Vec<Moments>> {
    let (b, c, h, w) = x.dims4()?;
    let count = c / groups * h * w;
    let grouped = x.to_dtype(DType::F32)?.reshape((b * groups, count))?;
    let mean = grouped.mean_keepdim(1)?;
    let variance = grouped.broadcast_sub(&mean)?.sqr()?.mean_keepdim(1)?;
    let host = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    let pairs = host(&mean)?.into_iter().zip(host(&variance)?);
    let moments = pairs.map(|(mean, variance)| Moments {
        count: count as f64,
        mean: f64::from(mean),
        variance: f64::from(variance),
    });
    Ok(moments.collect())
}

pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    Ok(candle_nn::ops::layer_norm(
        &x.contiguous()?,
        weight,
        bias,
        eps as f32,
    )?)
}

/// Over slices of the queries, so that the scores formed at once stay within a bound; softmax in float32.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: Mask) -> Result<Tensor> {
    let (b, n, width) = q.dims3()?;
    let m = k.dim(1)?;
    let size = width / heads;
    let scale = 1.0 / (size as f64).sqrt();
    let split = |t: &Tensor| -> Result<Tensor> {
        let (b, n, _) = t.dims3()?;
        Ok(t.reshape((b, n, heads, size))?
            .transpose(1, 2)?
            .contiguous()?)
    };
    let (q, k, v) = (
        (split(q)? * scale)?,
        split(k)?.t()?.contiguous()?,
        split(v)?,
    );
    let rows = (SCORES_AT_ONCE / (b * heads * m).max(1)).clamp(1, n);
    let mut parts = Vec::with_capacity(n.div_ceil(rows));
    for start in (0..n).step_by(rows) {
        let count = rows.min(n - start);
        let mut scores = q
            .narrow(2, start, count)?
            .contiguous()?
            .matmul(&k)?
            .to_dtype(DType::F32)?;
        if mask == Mask::Causal {
            scores = scores.broadcast_add(&causal_mask(start, count, m, q.device())?)?;
        }
        let weights = candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(v.dtype())?;
        parts.push(weights.matmul(&v)?);
    }
    Ok(Tensor::cat(&parts, 2)?
        .transpose(1, 2)?
        .reshape((b, n, width))?)
}

/// (count, m): minus infinity where key j lies after query start + i.
fn causal_mask(start: usize, count: usize, m: usize, device: &Device) -> Result<Tensor> {
    let mask: Vec<f32> = (0..count)
        .flat_map(|i| {
            (0..m).map(move |j| {
                if j > start + i {
                    f32::NEG_INFINITY
                } else {
                    0.0
                }
            })
        })
        .collect();
    Ok(Tensor::from_vec(mask, (count, m), device)?)
}

/// One position more on either side of dimension `dim`, mirrored about the edge.
fn reflect(x: &Tensor, dim: usize) -> Result<Tensor> {
    let n = x.dim(dim)?;
    anyhow::ensure!(n >= 2, "a side of {n} is too small to reflect");
    let (before, after) = (x.narrow(dim, 1, 1)?, x.narrow(dim, n - 2, 1)?);
    Ok(Tensor::cat(&[&before, x, &after], dim)?)
}

pub fn downsample(x: &Tensor) -> Result<Tensor> {
    let mut x = x.clone();
    for dim in [2, 3] {
        let padded = reflect(&x, dim)?;
        let pairs = padded.dim(dim)? / 2;
        let mut shape = padded.dims().to_vec();
        shape[dim] = pairs;
        shape.insert(dim + 1, 2);
        let split = padded
            .narrow(dim, 0, 2 * pairs)?
            .contiguous()?
            .reshape(shape)?;
        let every_second = |first: usize| split.narrow(dim + 1, first, 1)?.squeeze(dim + 1);
        let (even, odd) = (every_second(0)?, every_second(1)?);
        let count = pairs - 1;
        let outer = (even.narrow(dim, 0, count)? + odd.narrow(dim, 1, count)?)?;
        let inner = (odd.narrow(dim, 0, count)? + even.narrow(dim, 1, count)?)?;
        x = ((outer * 0.125)? + (inner * 0.375)?)?;
    }
    Ok(x)
}

pub fn upsample(x: &Tensor) -> Result<Tensor> {
    let mut x = x.clone();
    for dim in [2, 3] {
        let n = x.dim(dim)?;
        let padded = reflect(&x, dim)?;
        let near = (&x * 0.75)?;
        let left = (&near + (padded.narrow(dim, 0, n)? * 0.25)?)?;
        let right = (&near + (padded.narrow(dim, 2, n)? * 0.25)?)?;
        let mut shape = x.dims().to_vec();
        shape[dim] = 2 * n;
        x = Tensor::stack(&[left, right], dim + 1)?.reshape(shape)?;
    }
    Ok(x)
}
