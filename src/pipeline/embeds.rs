//! A prompt as a text encoder's numbers in a file, in place of words.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use candle_core::{DType, Device, Tensor};
use sha2::{Digest, Sha256};

use crate::device::Placement;
use crate::model::Weights;
use crate::networks::text::Conditioning;

/// The most tokens of a prompt: fifty times CLIP's 77.
const MOST_TOKENS: usize = 1 << 12;

/// What diffusers' pipeline takes in place of a prompt, and of a negative one where the file has both.
#[derive(Clone)]
pub struct PromptEmbeds(Arc<Row>);

struct Row {
    prompt: Conditioning,
    negative: Option<Conditioning>,
    digest: String,
}

impl PromptEmbeds {
    /// The prompts of a safetensors file, one a row of its tensors: `prompt_embeds` (b, tokens, width), the text encoder's last hidden states
    /// before the final norm, and `pooled_prompt_embeds` (b, width), after it, as the upscaler's pipeline in diffusers takes them; for prompts
    /// to steer away from `negative_prompt_embeds` and `negative_pooled_prompt_embeds` of the same shapes. Of float32, float16, bfloat16
    /// or float64; other tensors are passed over.
    ///
    /// # Errors
    /// The file cannot be read or is damaged, a tensor is missing, or has not such a shape, or a value in it is not a number.
    pub fn read(path: &Path) -> Result<Vec<Self>> {
        let placement = Placement::new(&Device::Cpu, DType::F32);
        let file = Weights::open(&[path.to_path_buf()], &placement)?;
        let shape = shape_of(&file, "prompt_embeds", "(b, 77, 768)")?;
        let &[rows, tokens, width] = &*shape else {
            return Err(misshapen("prompt_embeds", &shape, "(b, 77, 768)"));
        };
        ensure!(
            rows > 0 && width > 0 && (1..=MOST_TOKENS).contains(&tokens),
            misshapen("prompt_embeds", &shape, "(b, 77, 768)")
        );
        let prompts = pair(&file, "", &shape)?;
        let negatives = match ["negative_prompt_embeds", "negative_pooled_prompt_embeds"]
            .map(|name| file.contains(name))
        {
            [false, false] => None,
            [true, true] => Some(pair(&file, "negative_", &shape)?),
            _ => bail!(
                "it has one of negative_prompt_embeds and negative_pooled_prompt_embeds; expected both or none"
            ),
        };
        (0..rows)
            .map(|index| {
                let prompt = row(&prompts, index)?;
                let negative = negatives.as_ref().map(|all| row(all, index)).transpose()?;
                let digest = digest(prompt_and(&prompt, negative.as_ref()))?;
                Ok(Self(Arc::new(Row {
                    prompt,
                    negative,
                    digest,
                })))
            })
            .collect()
    }

    /// Whether the file has what to steer away from.
    pub fn has_negative(&self) -> bool {
        self.0.negative.is_some()
    }

    /// The beginning of the SHA-256 of its numbers in float32, by which files say what they were made with: 10 hexadecimal digits.
    pub fn digest(&self) -> &str {
        &self.0.digest
    }

    pub(super) fn prompt(&self) -> &Conditioning {
        &self.0.prompt
    }

    pub(super) fn negative(&self) -> Option<&Conditioning> {
        self.0.negative.as_ref()
    }

    /// Whether a network of these widths takes them: that of a token, and that of the pooled prompt.
    ///
    /// # Errors
    /// It does not.
    pub(super) fn check(&self, width: usize, pooled: usize) -> Result<()> {
        let found = (self.0.prompt.context.dim(2)?, self.0.prompt.pooled.dim(1)?);
        ensure!(
            found == (width, pooled),
            "prompt_embeds are {} wide and pooled_prompt_embeds {}, and the model's text encoder gives {width} and {pooled}: they were made by another one",
            found.0,
            found.1
        );
        Ok(())
    }
}

impl PartialEq for PromptEmbeds {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for PromptEmbeds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PromptEmbeds({})", self.0.digest)
    }
}

fn shape_of(file: &Weights, name: &str, expected: &str) -> Result<Vec<usize>> {
    let shape = file.shape(name).map(<[usize]>::to_vec);
    shape.with_context(|| {
        format!("it has no tensor {name}; expected {name} {expected}, as diffusers' pipeline of the upscaler takes it")
    })
}

fn misshapen(name: &str, found: &[usize], expected: &str) -> Error {
    anyhow!("its tensor {name} is of shape {found:?}; expected {expected}")
}

/// `prompt_embeds` of this shape and `pooled_prompt_embeds`, with these letters before their names.
fn pair(file: &Weights, before: &str, shape: &[usize]) -> Result<Conditioning> {
    let (context, pooled) = (
        format!("{before}prompt_embeds"),
        format!("{before}pooled_prompt_embeds"),
    );
    let expected = "(b, 768)";
    let found = shape_of(file, &pooled, expected)?;
    ensure!(
        found.len() == 2 && found[0] == shape[0] && found[1] > 0,
        misshapen(&pooled, &found, expected)
    );
    let tensor = |shape: &[usize], name: &str| -> Result<Tensor> {
        let tensor = file.tensor(shape, name)?;
        let finite = floats(&tensor)?.iter().all(|value| value.is_finite());
        ensure!(
            finite,
            "its tensor {name} holds values that are not numbers"
        );
        Ok(tensor)
    };
    Ok(Conditioning {
        context: tensor(shape, &context)?,
        pooled: tensor(&found, &pooled)?,
    })
}

fn row(all: &Conditioning, index: usize) -> Result<Conditioning> {
    Ok(Conditioning {
        context: all.context.narrow(0, index, 1)?.contiguous()?,
        pooled: all.pooled.narrow(0, index, 1)?.contiguous()?,
    })
}

fn prompt_and<'a>(
    prompt: &'a Conditioning,
    negative: Option<&'a Conditioning>,
) -> impl Iterator<Item = &'a Tensor> {
    let both = [prompt].into_iter().chain(negative);
    both.flat_map(|one| [&one.context, &one.pooled])
}

/// Of a tensor in float32.
fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

fn digest<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Result<String> {
    let mut hash = Sha256::new();
    for tensor in tensors {
        for value in floats(tensor)? {
            hash.update(value.to_le_bytes());
        }
    }
    let bytes = hash.finalize();
    Ok(bytes[..5]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}
