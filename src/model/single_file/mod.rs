//! A checkpoint's single file, as Stable Diffusion 1 and 2 were published and are handed around, in the names of their training: as a model in
//! the diffusers layout.

mod config;
mod kind;
mod names;
#[cfg(test)]
mod tests;
mod vae;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use memmap2::Mmap;
use serde_json::{Map, Value};

pub(crate) use self::vae::to_diffusers as vae_name;
use super::config::shortened;
use super::original::{Trained, trained};
use super::weights::{Entry, Weights, safetensors_entries};
use super::{ModelFiles, config as json};
use crate::device::Placement;

/// The special tokens, among them what prompts are padded with.
const SPECIAL_TOKENS: &str = "tokenizer/special_tokens_map.json";

/// The two lines of Stable Diffusion that are told apart by their text encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    /// OpenAI's CLIP ViT-L/14.
    One,
    /// OpenCLIP's ViT-H/14.
    Two,
}

impl Version {
    /// What prompts are padded with (see the repositories' `special_tokens_map.json`).
    fn padding(self) -> &'static str {
        match self {
            Self::One => "<|endoftext|>",
            Self::Two => "!",
        }
    }
}

/// A checkpoint's single file, mapped into memory.
pub struct SingleFile {
    /// For messages.
    name: String,
    version: Version,
    /// By their paths in the layout.
    configs: BTreeMap<&'static str, Vec<u8>>,
    /// By their folders in the layout, in diffusers' names.
    weights: BTreeMap<&'static str, Weights>,
}

impl fmt::Debug for SingleFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SingleFile").field(&self.name).finish()
    }
}

impl SingleFile {
    /// Maps a safetensors file, or one that `torch.save` wrote (`.ckpt`), into memory, which must stay as it is as long as that is in use
    /// (see [`Weights::open`]). Of what a pickle names nothing is run.
    ///
    /// What the shapes of its tensors do not tell is as in diffusers' `from_single_file`, which takes it from the configurations of
    /// `stable-diffusion-v1-5` and `stable-diffusion-2-1`: 8 heads in the UNet of a 1.x, heads of 64 channels in that of a 2.x and in both text
    /// encoders, 32 groups in norms, a VAE's factor of 0.18215, 512 pixels and PNDM for 1.x, 768 pixels and DDIM with v-prediction for 2.x. A
    /// file of the 2.x at 512 pixels, whose network predicts noise (`stable-diffusion-2-base`), cannot be told from the others by its
    /// tensors: it is known by its `global_step` of 875000, where it has one, else it is taken for one of those, as diffusers takes it; give
    /// its folder in place of its file. Averaged weights (`model_ema.`) beside the plain ones are passed over, as are OpenCLIP's last block, of
    /// which 2.x makes no use, and whatever else belongs to none of the three networks.
    ///
    /// # Errors
    /// It cannot be read, is damaged, or is no Stable Diffusion 1's or 2's for text to image; the message says what it is.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let file = File::open(path).with_context(|| format!("cannot open {name}"))?;
        // SAFETY: the map is only read, and what is said of it in `Weights::open` holds here: offsets are held to its length, and
        // texts are checked where they are read and used only before another could write to the file in good faith.
        let map = unsafe { Mmap::map(&file) }.with_context(|| format!("cannot map {name}"))?;
        let read = read(&name, &map)?;
        Self::of_map(name.clone(), map, read).with_context(|| format!("the checkpoint {name}"))
    }

    fn of_map(name: String, map: Mmap, read: Trained) -> Result<Self> {
        let version = kind::check(&read.tensors)?;
        let parts = parts(&read.tensors, version)?;
        let configs = config::all(&read, version)?;
        let map = Arc::new(map);
        let weights = parts.into_iter().map(|(part, tensors)| {
            let tensors = tensors.into_iter().collect();
            (part, Weights::mapped(name.clone(), map.clone(), tensors))
        });
        Ok(Self {
            weights: weights.collect(),
            configs,
            version,
            name,
        })
    }

    /// A file of the layout as it is shown in messages; None of one that is not its own.
    pub(super) fn name(&self, relative: &str) -> Option<String> {
        (!relative.starts_with("tokenizer/")).then(|| format!("{}: {relative}", self.name))
    }

    /// A small file of the layout; `parts` has the vocabulary.
    ///
    /// # Errors
    /// As [`ModelFiles::try_read`].
    pub(super) fn try_read(&self, relative: &str, parts: &ModelFiles) -> Result<Option<Vec<u8>>> {
        if relative == SPECIAL_TOKENS {
            return self.special_tokens(parts).map(Some);
        }
        if relative.starts_with("tokenizer/") {
            return parts.try_read(relative);
        }
        Ok(self.configs.get(relative).cloned())
    }

    /// Those of `parts`, with this version's padding.
    fn special_tokens(&self, parts: &ModelFiles) -> Result<Vec<u8>> {
        let mut tokens: Map<String, Value> = match parts.try_read(SPECIAL_TOKENS)? {
            Some(bytes) => json::from_json(&parts.name(SPECIAL_TOKENS), &bytes)?,
            None => Map::new(),
        };
        tokens.insert("pad_token".into(), self.version.padding().into());
        Ok(Value::Object(tokens).to_string().into_bytes())
    }

    /// The weights of a part.
    ///
    /// # Errors
    /// It has none of this name.
    pub(super) fn weights(&self, part: &str, placement: &Placement) -> Result<Weights> {
        let weights = self.weights.get(part);
        let weights = weights.ok_or_else(|| anyhow!("{} has no part `{part}`", self.name))?;
        Ok(weights.at(placement))
    }
}

/// The tensors of a file of either format.
fn read(name: &str, bytes: &[u8]) -> Result<Trained> {
    match bytes {
        [b'P', b'K', ..] | [0x80, ..] if bytes.get(8) != Some(&b'{') => {
            trained(bytes).with_context(|| format!("the checkpoint {name}"))
        }
        [_, _, _, _, _, _, _, _, b'{', ..] => {
            let tensors = safetensors_entries(name, bytes)?;
            let global_step = tensors.get("global_step");
            Ok(Trained {
                global_step: global_step.and_then(|entry| entry.whole_number(bytes)),
                tensors,
            })
        }
        _ => bail!(
            "{name} is neither a safetensors file nor what torch.save wrote (.ckpt); {}",
            kind::EXPECTED
        ),
    }
}

/// A part of the layout and its tensors in diffusers' names.
type Part = (&'static str, BTreeMap<String, Entry>);

/// The parts of a file.
///
/// # Errors
/// A tensor is none of Stable Diffusion's, or not of its shape; the message names it.
fn parts(tensors: &HashMap<String, Entry>, version: Version) -> Result<[Part; 3]> {
    let blocks = names::Blocks::of(tensors);
    let levels = config::Shapes(tensors).vae_levels();
    // In one order, so that a file is refused for one reason.
    let tensors: BTreeMap<&String, &Entry> = tensors.iter().collect();
    let part = |name, prefix, renamed: &Renamed| -> Result<Part> {
        let mut part = BTreeMap::new();
        for (key, entry) in &tensors {
            let Some(rest) = key.strip_prefix(prefix) else {
                continue;
            };
            let shown = || format!("`{}`", shortened(key));
            for (name, entry) in renamed(rest, entry).with_context(shown)? {
                let before = part.insert(name, entry);
                ensure!(
                    before.is_none(),
                    "{} is there in two spellings: the file is damaged, save it again",
                    shown()
                );
            }
        }
        Ok((name, part))
    };
    Ok([
        part("unet", names::UNET, &|key, entry| {
            let name = names::unet(key, &blocks);
            let name = name.context(
                "Stable Diffusion's UNet has no such tensor: the file is of another model",
            )?;
            Ok(vec![(name, entry.clone())])
        })?,
        part("vae", names::VAE, &|key, entry| of_vae(key, entry, levels))?,
        part("text_encoder", names::text(version), &|key, entry| {
            of_text(key, entry, version)
        })?,
    ])
}

/// What a tensor becomes: nothing, one, or its parts.
type Renamed<'a> = dyn Fn(&str, &Entry) -> Result<Vec<(String, Entry)>> + 'a;

/// What is none of the network's, such as what judged it in its training, is left out.
fn of_vae(key: &str, entry: &Entry, levels: usize) -> Result<Vec<(String, Entry)>> {
    let Some(name) = vae_name(key, levels) else {
        return Ok(Vec::new());
    };
    // Attention's convolutions of 1x1 are linear layers in diffusers.
    let linear = name.contains(".attentions.0.to_") && name.ends_with(".weight");
    let entry = entry.clone();
    Ok(vec![(
        name,
        if linear { entry.squeezed(2)? } else { entry },
    )])
}

fn of_text(key: &str, entry: &Entry, version: Version) -> Result<Vec<(String, Entry)>> {
    let names = names::of_text(key, version);
    let count = names.len();
    let parts = names.into_iter().enumerate().map(|(number, name)| {
        let part = if count > 1 {
            entry.part(number, count)?
        } else {
            entry.clone()
        };
        Ok((name, part))
    });
    parts.collect()
}
