//! CLIP's text encoder: a prompt becomes what the UNet attends to, and one vector that steers its norms.

mod tokenizer;

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use serde::Deserialize;

pub use self::tokenizer::{Cut, Tokenizer, Tokens};
use crate::device::Placement;
use crate::layers::{Activation, LayerNorm, Linear, Mask, attention, part};
use crate::model::{EPS, MOST_CHANNELS, MOST_LAYERS, ModelFiles, Weights, within};

/// The largest vocabulary that a configuration may state; CLIP's has 49,408 words.
const MOST_WORDS: usize = 1 << 24;
/// The most positions that a configuration may state; CLIP has 77, of which attention makes a square.
const MOST_POSITIONS: usize = 1 << 12;

/// What prompts look like to the UNet. Batch b: one row a prompt.
#[derive(Clone)]
pub struct Conditioning {
    /// Output of the last layer *before* the final LayerNorm, (b, tokens, width).
    pub context: Tensor,
    /// Output *after* the final LayerNorm at the first end token, (b, width).
    pub pooled: Tensor,
}

impl Conditioning {
    /// The rows of all, one after the other, which have as many tokens each.
    ///
    /// # Errors
    /// They have not, or there are none.
    pub fn cat(all: &[&Self]) -> Result<Self> {
        let joined = |part: fn(&Self) -> &Tensor| {
            let parts: Vec<&Tensor> = all.iter().map(|one| part(one)).collect();
            Tensor::cat(&parts, 0)
        };
        Ok(Self {
            context: joined(|one| &one.context)?,
            pooled: joined(|one| &one.pooled)?,
        })
    }

    /// The same on a placement's device, in its dtype.
    ///
    /// # Errors
    /// candle's own only.
    pub fn to(&self, placement: &Placement) -> Result<Self> {
        let moved = |part: &Tensor| part.to_device(&placement.device)?.to_dtype(placement.dtype);
        Ok(Self {
            context: moved(&self.context)?,
            pooled: moved(&self.pooled)?,
        })
    }

    /// Tokens that the picture attends to.
    ///
    /// # Errors
    /// It is none.
    pub fn tokens(&self) -> Result<usize> {
        Ok(self.context.dim(1)?)
    }

    /// The same with the first `visible` tokens alone. The original adds -10000 to the scores of the others, padding at the end, whose
    /// weights exp(-10000) are then 0 in float32: to leave them out is the same, without a mask in any kernel.
    ///
    /// # Errors
    /// There are fewer.
    pub fn masked(&self, visible: usize) -> Result<Self> {
        Ok(Self {
            context: self.context.narrow(1, 0, visible)?.contiguous()?,
            pooled: self.pooled.clone(),
        })
    }
}

/// `text_encoder/config.json`; absent keys take transformers' CLIPTextConfig defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct TextConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub max_position_embeddings: usize,
    pub hidden_act: String,
    pub layer_norm_eps: f64,
    pub eos_token_id: Option<u32>,
}

impl Default for TextConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: "quick_gelu".into(),
            layer_norm_eps: 1e-5,
            eos_token_id: Some(49407),
        }
    }
}

impl TextConfig {
    fn check_numbers(&self) -> Result<()> {
        for (key, value, range) in [
            ("vocab_size", self.vocab_size, 1..=MOST_WORDS),
            ("hidden_size", self.hidden_size, 1..=MOST_CHANNELS),
            (
                "intermediate_size",
                self.intermediate_size,
                1..=MOST_CHANNELS,
            ),
            ("num_hidden_layers", self.num_hidden_layers, 1..=MOST_LAYERS),
            // The start token, a word and the end token at least.
            (
                "max_position_embeddings",
                self.max_position_embeddings,
                3..=MOST_POSITIONS,
            ),
        ] {
            within(&format!("text_encoder/config.json: {key}"), value, range)?;
        }
        within(
            "text_encoder/config.json: layer_norm_eps",
            self.layer_norm_eps,
            EPS,
        )?;
        ensure!(
            self.eos_token_id
                .is_none_or(|id| (id as usize) < self.vocab_size || id == 2),
            "text_encoder/config.json: eos_token_id is beyond the vocab_size of {}",
            self.vocab_size
        );
        Ok(())
    }

    /// Holds the numbers to the weights.
    fn check_weights(&self, w: &Weights) -> Result<()> {
        let of = |key: &str| format!("text_encoder/config.json: {key}");
        for (key, value, name, dimension) in [
            (
                "vocab_size",
                self.vocab_size,
                "embeddings.token_embedding.weight",
                0,
            ),
            (
                "hidden_size",
                self.hidden_size,
                "embeddings.token_embedding.weight",
                1,
            ),
            (
                "max_position_embeddings",
                self.max_position_embeddings,
                "embeddings.position_embedding.weight",
                0,
            ),
            (
                "intermediate_size",
                self.intermediate_size,
                "encoder.layers.0.mlp.fc1.weight",
                0,
            ),
        ] {
            w.agrees(&of(key), value, name, dimension)?;
        }
        w.agrees_in_number(
            &of("num_hidden_layers"),
            self.num_hidden_layers,
            "encoder.layers",
        )
    }
}

struct Layer {
    layer_norm1: LayerNorm,
    /// Query, key and value side by side.
    qkv: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

/// CLIP ViT-L/14's text half, or any of its kin.
pub struct TextEncoder {
    config: TextConfig,
    activation: Activation,
    /// Two tables of which a prompt reads 77 rows: they stay in the file.
    embeddings: Weights,
    layers: Vec<Layer>,
    final_layer_norm: LayerNorm,
    placement: Placement,
}

impl TextEncoder {
    /// Reads `text_encoder/`.
    ///
    /// # Errors
    /// A file is missing or damaged, or a tensor does not have the shape that config.json asks for.
    pub fn load(files: &ModelFiles, placement: &Placement) -> Result<Self> {
        let config: TextConfig = files.json("text_encoder/config.json")?;
        config.check_numbers()?;
        Self::new(config, &files.weights("text_encoder", "model", placement)?)
    }

    fn new(config: TextConfig, w: &Weights) -> Result<Self> {
        // Both spellings are in use: with and without the prefix.
        let w = if w.contains("text_model.final_layer_norm.weight") {
            w.pp("text_model")
        } else {
            w.clone()
        };
        config.check_weights(&w)?;
        let (width, eps) = (config.hidden_size, config.layer_norm_eps);
        ensure!(
            config.num_attention_heads > 0 && width.is_multiple_of(config.num_attention_heads),
            "text_encoder/config.json: hidden_size {width} is not a multiple of num_attention_heads {}",
            config.num_attention_heads
        );
        let embeddings = w.pp("embeddings");
        let layer = |index: usize| -> Result<Layer> {
            let w = w.pp("encoder.layers").pp(index);
            let attention = w.pp("self_attn");
            let qkv = ["q_proj", "k_proj", "v_proj"].map(|name| attention.pp(name));
            Ok(Layer {
                layer_norm1: LayerNorm::new(width, eps, &w.pp("layer_norm1"))?,
                qkv: Linear::joined_of_few_rows(width, &[width; 3], &qkv)?,
                out_proj: Linear::of_few_rows(width, width, &attention.pp("out_proj"))?,
                layer_norm2: LayerNorm::new(width, eps, &w.pp("layer_norm2"))?,
                fc1: Linear::of_few_rows(width, config.intermediate_size, &w.pp("mlp.fc1"))?,
                fc2: Linear::of_few_rows(config.intermediate_size, width, &w.pp("mlp.fc2"))?,
            })
        };
        Ok(Self {
            activation: Activation::from_name(&config.hidden_act)
                .context("text_encoder/config.json: hidden_act")?,
            embeddings,
            layers: (0..config.num_hidden_layers)
                .map(layer)
                .collect::<Result<_>>()?,
            final_layer_norm: LayerNorm::new(width, eps, &w.pp("final_layer_norm"))?,
            placement: w.placement().clone(),
            config,
        })
    }

    /// The number of positions, at most so many tokens fit.
    pub fn positions(&self) -> usize {
        self.config.max_position_embeddings
    }

    /// One prompt as the upscaler takes it: context (1, tokens, width) and pooled (1, width), in the placement's dtype.
    ///
    /// # Errors
    /// A token id that the vocabulary does not have.
    pub fn encode(&self, tokens: &Tokens) -> Result<Conditioning> {
        let x = self.hidden(tokens)?;
        let end = self.end_position(&tokens.ids);
        let last = x.narrow(1, end, 1)?.contiguous()?;
        let pooled = self.final_layer_norm.forward(&last)?.squeeze(1)?;
        Ok(Conditioning { context: x, pooled })
    }

    /// One prompt as Stable Diffusion takes it: the output after the final LayerNorm, (1, tokens, width), in the placement's dtype.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_normed(&self, tokens: &Tokens) -> Result<Tensor> {
        self.final_layer_norm.forward(&self.hidden(tokens)?)
    }

    /// The output of the last layer.
    fn hidden(&self, tokens: &Tokens) -> Result<Tensor> {
        let width = self.config.hidden_size;
        let count = tokens.ids.len();
        let config = &self.config;
        let (words, places) = (
            self.embeddings.pp("token_embedding"),
            self.embeddings.pp("position_embedding"),
        );
        let words = words.table(&[config.vocab_size, width], "weight")?;
        let places = places.table(&[config.max_position_embeddings, width], "weight")?;
        let mut embedded = Vec::with_capacity(count * width);
        for (position, &id) in tokens.ids.iter().enumerate() {
            let id = id as usize;
            ensure!(
                id < self.config.vocab_size,
                "token {id} is beyond the text encoder's vocabulary of {}; tokenizer/ and text_encoder/ do not belong together",
                self.config.vocab_size
            );
            let token = &words[id * width..][..width];
            let position = &places[position * width..][..width];
            embedded.extend(token.iter().zip(position).map(|(t, p)| t + p));
        }
        let placement = &self.placement;
        let mut x = Tensor::from_vec(embedded, (1, count, width), &candle_core::Device::Cpu)?
            .to_dtype(placement.dtype)?
            .to_device(&placement.device)?;
        for layer in &self.layers {
            let qkv = layer.qkv.forward(&layer.layer_norm1.forward(&x)?)?;
            let part = |index| part(&qkv, width, index, placement);
            let attended = attention(
                &part(0)?,
                &part(1)?,
                &part(2)?,
                self.config.num_attention_heads,
                Mask::Causal,
                placement,
            )?;
            x = layer.out_proj.forward_add(&attended, Some(&x))?;
            let hidden = layer.fc1.forward(&layer.layer_norm2.forward(&x)?)?;
            let hidden = self.activation.apply(&hidden, placement)?;
            x = layer.fc2.forward_add(&hidden, Some(&x))?;
        }
        Ok(x)
    }

    /// The first end token. Configurations that still say `eos_token_id: 2` are older than CLIP's real
    /// number; there transformers takes the largest id, which is the end token's.
    fn end_position(&self, ids: &[u32]) -> usize {
        let end = match self.config.eos_token_id {
            Some(2) | None => ids.iter().copied().max().unwrap_or(0),
            Some(id) => id,
        };
        ids.iter().position(|&id| id == end).unwrap_or(0)
    }
}
