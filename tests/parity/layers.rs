//! Each layer on a card against this program's CPU kernels, at odd sizes, in every precision.
//!
//! Inputs and weights are numbers of seven bits, which every type holds as they are: what differs is the rounding of what is
//! written (float16 to 5e-4 at most, bfloat16 to 4e-3) and of attention's weights, a few times over. Sums are float32 on both sides,
//! in another order. A wrong index or a lost term shows as 1e-1 and more.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::TensorView;
use sd_upscale::device::Placement;
use sd_upscale::layers::{
    Activation, Conv2d, ConvShape, FeatureMap, GroupNorm, LayerNorm, Linear, Mask, Modulations,
    Padding, Sampling, attention, downsample, gate, part, time_features, upsample,
};
use sd_upscale::model::Weights;

use crate::common::*;

const TOLERANCE: [(DType, f64); 3] = [(DType::F32, 1e-5), (DType::F16, 1e-3), (DType::BF16, 8e-3)];

/// Numbers of seven bits between -2 and 2, the same for the same seed.
fn numbers(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 16) % 127) as f32 / 32.0 - 63.0 / 32.0
    };
    (0..count).map(|_| next()).collect()
}

fn tensor(seed: u32, shape: &[usize]) -> Tensor {
    let values = numbers(seed, shape.iter().product());
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// A checkpoint of such numbers.
fn weights(shapes: &[(&str, &[usize])], placement: &Placement) -> Weights {
    let values: Vec<Vec<u8>> = shapes
        .iter()
        .zip(1000..)
        .map(|((_, shape), seed)| {
            let numbers = numbers(seed, shape.iter().product());
            numbers.iter().flat_map(|v| v.to_le_bytes()).collect()
        })
        .collect();
    let views: HashMap<&str, TensorView> = shapes
        .iter()
        .zip(&values)
        .map(|((name, shape), bytes)| {
            let view = TensorView::new(safetensors::Dtype::F32, shape.to_vec(), bytes).unwrap();
            (*name, view)
        })
        .collect();
    let bytes = safetensors::serialize(views, None).unwrap();
    Weights::made(bytes, placement).unwrap()
}

/// What `layer` gives on the card, in each precision, against what it gives on the CPU in float32.
#[track_caller]
fn same_on_the_card(what: &str, layer: impl Fn(&Placement) -> Tensor) {
    let Some(device) = card_or_word(what) else {
        return;
    };
    let expected = layer(&Placement::new(&Device::Cpu, DType::F32));
    for (dtype, tolerance) in TOLERANCE {
        let actual = layer(&Placement::new(&device, dtype));
        assert_close(&format!("{what} {dtype:?}"), &actual, &expected, tolerance);
    }
}

/// `tensor` where a layer of the placement takes it.
fn placed(tensor: &Tensor, placement: &Placement) -> Tensor {
    let tensor = tensor.to_dtype(placement.dtype).unwrap();
    tensor.to_device(&placement.device).unwrap()
}

fn map(seed: u32, shape: [usize; 4], placement: &Placement) -> FeatureMap {
    FeatureMap::from_nchw(&tensor(seed, &shape), placement).unwrap()
}

#[test]
fn linear_layers() {
    for (rows, inputs, outputs) in [(5, 33, 17), (64, 64, 48), (1, 8, 3), (7, 2100, 5)] {
        let what = format!("linear {rows} x {inputs} to {outputs}");
        let shapes: [(&str, &[usize]); 2] = [("weight", &[outputs, inputs]), ("bias", &[outputs])];
        let x = tensor(1, &[1, rows, inputs]);
        let residual = tensor(2, &[1, rows, outputs]);
        same_on_the_card(&what, |placement| {
            let layer = Linear::new(inputs, outputs, &weights(&shapes, placement)).unwrap();
            let residual = placed(&residual, placement);
            layer
                .forward_add(&placed(&x, placement), Some(&residual))
                .unwrap()
        });
        same_on_the_card(&format!("{what} alone"), |placement| {
            let w = weights(&shapes, placement);
            let layer = Linear::without_bias(inputs, outputs, &w).unwrap();
            layer.forward(&placed(&x, placement)).unwrap()
        });
    }
}

#[test]
fn scales_and_shifts_of_many_norms() {
    let shapes: [(&str, &[usize]); 4] = [
        ("a.weight", &[14, 9]),
        ("a.bias", &[14]),
        ("b.weight", &[22, 9]),
        ("b.bias", &[22]),
    ];
    let x = tensor(3, &[2, 9]);
    for norm in [0, 1] {
        same_on_the_card(&format!("norm {norm}"), |placement| {
            let w = weights(&shapes, placement);
            let norms = [(7, w.pp("a")), (11, w.pp("b"))];
            let all = Modulations::new(9, &norms, placement).unwrap();
            let (scale, shift) = all.forward(&placed(&x, placement)).unwrap().each[norm].clone();
            Tensor::cat(&[scale, shift], 1).unwrap()
        });
    }
}

fn convolution(shape: ConvShape, bias: bool, w: &Weights) -> Conv2d {
    let layer = if bias {
        Conv2d::new(shape, w)
    } else {
        Conv2d::without_bias(shape, w)
    };
    layer.unwrap()
}

/// With a bias by cuDNN where the build has it, and without one by our own kernel.
#[test]
fn convolutions() {
    let below = Padding {
        before: 0,
        after: 1,
    };
    let strided = |inputs, outputs| ConvShape {
        stride: 2,
        padding: below,
        ..ConvShape::same(inputs, outputs, 3)
    };
    // An AutoencoderTiny's.
    let halving = |channels| ConvShape {
        stride: 2,
        ..ConvShape::same(channels, channels, 3)
    };
    for (shape, h, w) in [
        (ConvShape::same(5, 7, 3), 9, 11),
        (ConvShape::same(16, 70, 3), 8, 5),
        (ConvShape::same(24, 9, 3), 13, 12),
        (ConvShape::same(6, 10, 1), 5, 3),
        (strided(8, 12), 10, 8),
        (strided(3, 4), 7, 9),
        (ConvShape::same(5, 7, 3).then(Activation::Relu), 9, 11),
        (ConvShape::same(24, 9, 3).then(Activation::Silu), 13, 12),
        (ConvShape::same(6, 10, 1).then(Activation::Relu), 5, 3),
        (halving(16).then(Activation::Relu), 9, 8),
        (halving(5), 8, 7),
    ] {
        let kernel = shape.kernel;
        let shapes: [(&str, &[usize]); 2] = [
            ("weight", &[shape.outputs, shape.inputs, kernel, kernel]),
            ("bias", &[shape.outputs]),
        ];
        for bias in [true, false] {
            let what = format!("{shape:?}, bias {bias}");
            let layer = |placement: &Placement| {
                let w = weights(&shapes, placement);
                convolution(shape, bias, &w)
            };
            same_on_the_card(&what, |placement| {
                let x = map(4, [2, shape.inputs, h, w], placement);
                layer(placement).forward(&x).unwrap().to_nchw().unwrap()
            });
            if kernel == 1 {
                continue;
            }
            same_on_the_card(&format!("{what}, enlarged"), |placement| {
                let x = map(5, [1, shape.inputs, h, w], placement);
                let y = layer(placement).forward_upsampled(&x).unwrap();
                y.to_nchw().unwrap()
            });
        }
    }
}

/// The residual is what a map of the same shape is after the first convolution.
#[test]
fn a_convolution_of_a_normed_map_with_a_residual() {
    let plain = Activation::None;
    for (channels, bias, activation) in [
        (32, true, plain),
        (32, false, plain),
        (9, true, plain),
        (9, false, plain),
        (32, true, Activation::Relu),
        (9, false, Activation::Relu),
        (32, true, Activation::Gelu),
    ] {
        // Of the sum, residual and all.
        let shape = ConvShape::same(channels, channels, 3).then(activation);
        let shapes: [(&str, &[usize]); 4] = [
            ("weight", &[channels, channels, 3, 3]),
            ("bias", &[channels]),
            ("norm.weight", &[channels]),
            ("norm.bias", &[channels]),
        ];
        let what = format!("normed, {channels}, bias {bias}, {activation:?}");
        same_on_the_card(&what, |placement| {
            let w = weights(&shapes, placement);
            let layer = convolution(shape, bias, &w);
            let norm = GroupNorm::new(1, channels, 1e-6, &w.pp("norm")).unwrap();
            let (x, residual) = (
                map(6, [2, channels, 7, 6], placement),
                map(7, [2, channels, 7, 6], placement),
            );
            let norm = norm.then(Activation::None);
            let beside = layer.forward_normed(&x, &norm, Some(&residual)).unwrap();
            let over = layer
                .forward_normed_over(x, &norm, Some(&residual))
                .unwrap();
            let both = [beside.to_nchw().unwrap(), over.to_nchw().unwrap()];
            Tensor::cat(&both, 0).unwrap()
        });
    }
}

#[test]
fn group_norms() {
    for (groups, channels, h, w) in [
        (3, 15, 7, 9),
        (1, 31, 4, 3),
        (2, 96, 5, 5),
        (32, 128, 9, 7),
        (4, 1200, 2, 3),
        (1, 600, 3, 2),
        (2, 16, 80, 60),
    ] {
        for activation in [Activation::None, Activation::Gelu, Activation::Silu] {
            let what = format!("{groups} groups of {channels} at {w}x{h}, {activation:?}");
            let shapes: [(&str, &[usize]); 2] = [("weight", &[channels]), ("bias", &[channels])];
            same_on_the_card(&what, |placement| {
                let norm = weights(&shapes, placement);
                let norm = GroupNorm::new(groups, channels, 1e-5, &norm).unwrap();
                let x = map(8, [2, channels, h, w], placement);
                let y = norm.then(activation).forward(&x).unwrap();
                y.to_nchw().unwrap()
            });
        }
    }
}

/// A mean a thousand times the spread costs float32 three of its seven digits where it is subtracted before squaring, and all of
/// them where it is not.
#[test]
fn a_norm_of_values_far_from_zero() {
    let Some(device) = card_or_word("a norm of large values") else {
        return;
    };
    let x = (tensor(9, &[1, 64, 6, 7]) + 1000.0).unwrap();
    let shapes: [(&str, &[usize]); 2] = [("weight", &[64]), ("bias", &[64])];
    let normed = |device: &Device| {
        let placement = Placement::new(device, DType::F32);
        let norm = GroupNorm::new(2, 64, 1e-5, &weights(&shapes, &placement)).unwrap();
        let map = FeatureMap::from_nchw(&x, &placement).unwrap();
        let y = norm.then(Activation::None).forward(&map).unwrap();
        y.to_nchw().unwrap()
    };
    assert_close("far", &normed(&device), &normed(&Device::Cpu), 1e-3);
}

#[test]
fn layer_norms() {
    for (rows, size) in [(5, 37), (77, 64), (9, 130)] {
        let shapes: [(&str, &[usize]); 2] = [("weight", &[size]), ("bias", &[size])];
        same_on_the_card(&format!("layer norm of {size}"), |placement| {
            let norm = LayerNorm::new(size, 1e-5, &weights(&shapes, placement)).unwrap();
            let x = tensor(10, &[1, rows, size]);
            norm.forward(&placed(&x, placement)).unwrap()
        });
    }
}

#[test]
fn attention_of_every_width() {
    for (heads, size, queries, keys, mask) in [
        (2, 64, 77, 77, Mask::Causal),
        (3, 64, 70, 77, Mask::None),
        (1, 64, 130, 150, Mask::None),
        (1, 512, 70, 45, Mask::None),
        (1, 512, 40, 40, Mask::Causal),
        (2, 24, 33, 40, Mask::None),
        (2, 40, 70, 77, Mask::None),
        (3, 48, 65, 66, Mask::Causal),
        (2, 80, 130, 77, Mask::None),
        (1, 80, 70, 130, Mask::Causal),
        (2, 160, 66, 77, Mask::None),
        (1, 104, 40, 140, Mask::None),
        (5, 7, 40, 40, Mask::Causal),
        (1, 100, 35, 33, Mask::None),
        (1, 256, 34, 34, Mask::None),
    ] {
        let what = format!("{heads} heads of {size}, {queries} x {keys}, {mask:?}");
        let width = heads * size;
        // A fifth of the numbers, for scores that do not all fall on one key.
        let q = (tensor(11, &[2, queries, width]) * 0.25).unwrap();
        let kv = tensor(12, &[2, keys, 2 * width]);
        same_on_the_card(&what, |placement| {
            let kv = placed(&kv, placement);
            let (k, v) = (
                part(&kv, width, 0, placement).unwrap(),
                part(&kv, width, 1, placement).unwrap(),
            );
            attention(&placed(&q, placement), &k, &v, heads, mask, placement).unwrap()
        });
    }
}

/// Scores of 4 * 2 * 2 * 64 * 30^2 lie beyond what float16 holds: in float32 they are numbers.
#[test]
fn scores_that_float16_cannot_hold() {
    for size in [64, 512, 48] {
        same_on_the_card(&format!("large scores, heads of {size}"), |placement| {
            let large = |seed| (tensor(seed, &[1, 40, size]) * 60.0).unwrap();
            let q = placed(&large(13), placement);
            let v = placed(&tensor(14, &[1, 40, size]), placement);
            attention(&q, &q, &v, 1, Mask::None, placement).unwrap()
        });
    }
}

#[test]
fn activations() {
    use Activation::{Gelu, QuickGelu, Relu, Silu};
    for activation in [Gelu, Silu, QuickGelu, Relu] {
        for count in [7, 64, 1001] {
            same_on_the_card(&format!("{activation:?} of {count}"), |placement| {
                let x = placed(&tensor(15, &[count]), placement);
                activation.apply(&x, placement).unwrap()
            });
        }
    }
}

#[test]
fn values_and_their_gates() {
    for activation in [Activation::Gelu, Activation::Silu] {
        for (rows, width) in [(5, 7), (3, 36), (9, 130), (300, 8)] {
            same_on_the_card(&format!("{activation:?} gates of {width}"), |placement| {
                let x = placed(&tensor(21, &[2, rows, 2 * width]), placement);
                gate(&x, activation, placement).unwrap()
            });
        }
    }
}

#[test]
fn resampling_and_joining() {
    for (channels, h, w) in [(5, 7, 9), (8, 2, 3), (12, 6, 5), (32, 9, 8)] {
        let what = |kind: &str| format!("{kind} of {channels} at {w}x{h}");
        let at = |placement: &Placement| map(16, [2, channels, h, w], placement);
        same_on_the_card(&what("half"), |p| {
            downsample(&at(p)).unwrap().to_nchw().unwrap()
        });
        same_on_the_card(&what("double"), |p| {
            upsample(&at(p)).unwrap().to_nchw().unwrap()
        });
        same_on_the_card(&what("join"), |p| {
            let other = map(17, [2, channels + 3, h, w], p);
            at(p).cat_channels(&other).unwrap().to_nchw().unwrap()
        });
    }
}

#[test]
fn the_samplers_ends_and_the_time() {
    let sampling = Sampling {
        c_in: 0.5,
        c_skip: 0.25,
        c_out: 1.5,
        guidance: 3.0,
    };
    let (x, condition) = (tensor(18, &[2, 4, 5, 3]), tensor(19, &[2, 3, 5, 3]));
    for prompts in [1, 2] {
        same_on_the_card(&format!("input for {prompts} prompts"), |p| {
            let (x, condition) = (
                x.to_device(&p.device).unwrap(),
                condition.to_device(&p.device).unwrap(),
            );
            let input = sampling.input(&x, Some(&condition), prompts, p).unwrap();
            input.to_nchw().unwrap()
        });
        same_on_the_card(&format!("denoised of {prompts} prompts"), |p| {
            let output = map(20, [2 * prompts, 5, 5, 3], p);
            let x = x.to_device(&p.device).unwrap();
            sampling.denoised(&x, &output).unwrap()
        });
    }
    for cosine_first in [true, false] {
        same_on_the_card("time", |p| {
            let frequencies = tensor(21, &[9]).to_device(&p.device).unwrap();
            let condition = placed(&tensor(22, &[2, 18]), p);
            time_features(&condition, &frequencies, 1.25, cosine_first, p).unwrap()
        });
    }
}
