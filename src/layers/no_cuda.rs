//! In place of cuda.rs in a build without CUDA: nothing is ever placed on a card there, so that none of this is reached.

use anyhow::{Result, bail};
use candle_core::{DType, Tensor};

use super::bands::Moments;
use super::{
    Activation, ConvShape, FeatureMap, Mask, Modulated, NormAct, Reading, Sampling, ScaleShift,
};
use crate::device::Placement;

/// A layer that cannot be made.
pub enum Linear {}
/// A layer that cannot be made.
pub enum Modulations {}
/// A layer that cannot be made.
pub enum Conv2d {}

fn none<T>() -> Result<T> {
    bail!(
        "this build has no CUDA kernels: build it with `cargo build --release --features cuda,cudnn`, or use --device cpu"
    )
}

pub fn notes(_: &Placement) -> Vec<String> {
    Vec::new()
}

impl Linear {
    pub fn new(_: &[f32], _: Option<&[f32]>, _: (usize, usize), _: &Placement) -> Result<Self> {
        none()
    }

    pub fn forward(&self, _: &Tensor, _: Option<&Tensor>) -> Result<Tensor> {
        match *self {}
    }
}

impl Modulations {
    pub fn new(_: Vec<usize>, _: &[f32], _: Vec<f32>, _: &Placement) -> Result<Self> {
        none()
    }

    pub fn forward(&self, _: &Tensor) -> Result<Modulated> {
        match *self {}
    }
}

impl Conv2d {
    pub fn new(_: &[f32], _: Option<&[f32]>, _: &ConvShape, _: &Placement) -> Result<Self> {
        none()
    }

    pub fn shifted_by_each(&self, _: &Tensor) -> Result<Vec<Self>> {
        match *self {}
    }

    pub fn forward(
        &self,
        _: &FeatureMap,
        _: Reading,
        _: Option<&FeatureMap>,
        _: Activation,
    ) -> Result<FeatureMap> {
        match *self {}
    }

    pub fn forward_normed_over(
        &self,
        _: FeatureMap,
        _: &NormAct,
        _: Option<&FeatureMap>,
    ) -> Result<FeatureMap> {
        match *self {}
    }
}

pub fn norm_act(_: &FeatureMap, _: &NormAct) -> Result<FeatureMap> {
    none()
}

pub fn activation(_: &Tensor, _: Activation) -> Result<Tensor> {
    none()
}

pub fn gate(_: &Tensor, _: Activation) -> Result<Tensor> {
    none()
}

pub fn layer_norm(_: &Tensor, _: &Tensor, _: &Tensor, _: f64) -> Result<Tensor> {
    none()
}

pub fn attention(_: &Tensor, _: &Tensor, _: &Tensor, _: usize, _: Mask) -> Result<Tensor> {
    none()
}

pub fn cat_channels(_: &Tensor, _: &Tensor) -> Result<Tensor> {
    none()
}

pub fn downsample(_: &FeatureMap) -> Result<FeatureMap> {
    none()
}

pub fn upsample(_: &FeatureMap) -> Result<FeatureMap> {
    none()
}

pub fn map_of_planes(_: &Tensor, _: f64, _: Option<&Tensor>, _: usize, _: DType) -> Result<Tensor> {
    none()
}

pub fn planes(_: &Tensor) -> Result<Tensor> {
    none()
}

pub fn denoised(_: &Tensor, _: &Tensor, _: &Sampling) -> Result<Tensor> {
    none()
}

pub fn time_features(_: &Tensor, _: &Tensor, _: f64, _: bool) -> Result<Tensor> {
    none()
}

/// Nothing is recorded.
#[derive(Default)]
pub struct Replay;

impl Replay {
    pub fn run(
        &mut self,
        _: &FeatureMap,
        _: &Tensor,
        _: &[ScaleShift],
        _: impl Fn(&FeatureMap, &[ScaleShift]) -> Result<FeatureMap>,
    ) -> Result<FeatureMap> {
        none()
    }
}

pub fn affine(_: &Tensor, _: &Tensor, _: &Tensor, _: Activation) -> Result<Tensor> {
    none()
}

pub fn moments(_: &Tensor, _: usize) -> Result<Vec<Moments>> {
    none()
}
