//! Linear layers whose weights stay where they are.

use rayon::prelude::*;

use super::act::Act;
use super::conv::linear;
use super::input::Input;
use super::packed::{Elsewhere, PackedConv};

/// One or several linear layers over the same rows, whose outputs follow each other, with weights (outputs, inputs) that are not
/// copied: the product is done the other way around, the rows packed and the weights read line by line. That pays where rows are few,
/// or for a layer that is used once. Results are the bits that [`PackedConv`] gives.
pub struct LinearInPlace {
    parts: Vec<Part>,
    /// (outputs), zeros where there is none.
    bias: Vec<f32>,
    inputs: usize,
}

struct Part {
    /// (outputs, inputs)
    weight: Elsewhere,
    outputs: usize,
}

impl LinearInPlace {
    /// Of weights (outputs of each, `inputs`) and the bias of all.
    ///
    /// # Panics
    /// A length does not fit, or a size is 0.
    pub fn new(weights: Vec<Elsewhere>, bias: Option<&[f32]>, inputs: usize) -> Self {
        assert!(inputs > 0, "no size is 0");
        let part = |weight: Elsewhere| {
            let outputs = weight.len() / inputs;
            assert_eq!(weight.len(), outputs * inputs, "whole rows of weights");
            assert!(outputs > 0, "no size is 0");
            Part { weight, outputs }
        };
        let parts: Vec<Part> = weights.into_iter().map(part).collect();
        let outputs = parts.iter().map(|part| part.outputs).sum();
        let bias = bias.map_or_else(|| vec![0.0; outputs], <[f32]>::to_vec);
        assert_eq!(bias.len(), outputs, "a bias an output");
        Self {
            parts,
            bias,
            inputs,
        }
    }

    /// `rows * weight^T + bias + residual`: rows (n, inputs), the result and the residual (n, outputs).
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn forward(&self, rows: &[f32], residual: Option<&[f32]>) -> Vec<f32> {
        let n = rows.len() / self.inputs;
        let outputs = self.bias.len();
        assert_eq!(rows.len(), n * self.inputs, "whole rows of inputs");
        if n == 0 {
            return Vec::new();
        }
        let packed = PackedConv::linear(rows, None, self.inputs, n);
        let products: Vec<Vec<f32>> = self
            .parts
            .iter()
            .map(|part| {
                let weight: &[f32] = &part.weight;
                let weight = Input::new(weight, 1, 1, part.outputs, self.inputs);
                linear(&weight, &packed, None, Act::None)
            })
            .collect();
        let mut all = vec![0.0; n * outputs];
        all.par_chunks_mut(outputs)
            .enumerate()
            .for_each(|(i, row)| {
                // (outputs, n), this row's values a column.
                let column = products.iter().flat_map(|part| part[i..].iter().step_by(n));
                for ((to, product), bias) in row.iter_mut().zip(column).zip(&self.bias) {
                    *to = product + bias;
                }
            });
        if let Some(residual) = residual {
            assert_eq!(
                residual.len(),
                all.len(),
                "the residual has the shape of the output"
            );
            all.iter_mut()
                .zip(residual)
                .for_each(|(to, residual)| *to += residual);
        }
        all
    }
}
