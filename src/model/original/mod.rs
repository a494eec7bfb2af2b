//! The original checkpoint: what k-diffusion trained and `torch.save` wrote, in its own names, as the UNet of a model in the
//! diffusers layout.

mod file;
mod names;
mod pickle;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use memmap2::Mmap;

use self::file::Saved;
use self::pickle::{Id, Tensor, extent};
use super::config::shortened;
use super::weights::{Entry, Weights};
use crate::device::Placement;

/// The key of the root dict under which the weights are: those averaged over the training.
const KEY: &str = "model_ema";

/// The original checkpoint, mapped into memory.
pub struct Checkpoint {
    /// For messages.
    name: String,
    /// What its `unet/config.json` would be, which is told by the shapes.
    config: Vec<u8>,
    /// In diffusers' names.
    weights: Weights,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Checkpoint").field(&self.name).finish()
    }
}

impl Checkpoint {
    /// Maps a file that `torch.save` wrote into memory, which must stay as it is as long as that is in use (see [`Weights::open`]).
    /// Of what its pickle names nothing is run: what plain tensors are not made of is refused.
    ///
    /// # Errors
    /// It cannot be read, is no file of PyTorch's, holds other things than tensors, or is not the latent upscaler's.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let file = File::open(path).with_context(|| format!("cannot open {name}"))?;
        // SAFETY: the map is only read, and what is said of it in `Weights::open` holds here: offsets are held to its length, and
        // texts are checked where they are read and used only before another could write to the file in good faith.
        let map = unsafe { Mmap::map(&file) }.with_context(|| format!("cannot map {name}"))?;
        Self::of_map(name.clone(), map).with_context(|| format!("the checkpoint {name}"))
    }

    fn of_map(name: String, map: Mmap) -> Result<Self> {
        let network = names::to_diffusers(tensors(&map)?)?;
        Ok(Self {
            weights: Weights::mapped(name.clone(), Arc::new(map), network.tensors),
            config: network.config.to_string().into_bytes(),
            name,
        })
    }

    /// For messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The content of its `unet/config.json`.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// The weights of its `unet/`.
    pub fn weights(&self, placement: &Placement) -> Weights {
        self.weights.at(placement)
    }
}

/// The tensors of a file's `model_ema`, by their own names.
fn tensors(bytes: &[u8]) -> Result<HashMap<String, Entry>> {
    let saved = Saved::read(bytes)?;
    let objects = &saved.objects;
    let entries = objects.value(saved.root, KEY);
    let entries = entries
        .and_then(|id| objects.entries(id))
        .with_context(|| {
            format!("it has no dict `{KEY}`, under which the original checkpoint has its weights")
        })?;
    let mut found = HashMap::with_capacity(entries.len());
    for (key, value) in entries {
        let key = objects.text(*key).context("a key that is no text")?;
        let shown = || format!("`{}`", shortened(key));
        let tensor = objects.tensor(*value);
        let tensor = tensor.with_context(|| format!("{} is no tensor", shown()))?;
        let before = found.insert(key.to_owned(), entry(&saved, tensor).with_context(shown)?);
        ensure!(before.is_none(), "{} is there twice", shown());
    }
    Ok(found)
}

/// Where a tensor lies in the file.
fn entry(saved: &Saved, tensor: &Tensor) -> Result<Entry> {
    let place = saved.place(&tensor.storage)?;
    let range = extent(tensor, &place)?;
    let (shape, strides) = (tensor.shape.clone(), tensor.strides.clone());
    Ok(Entry::of_strides(tensor.dtype, shape, strides, range))
}

/// What a checkpoint of a training holds.
#[derive(Debug)]
pub(super) struct Trained {
    /// Of its `state_dict`, by their own names; what else stands there is left out.
    pub tensors: HashMap<String, Entry>,
    /// Steps of the training, where it says so.
    pub global_step: Option<i64>,
}

/// Reads what PyTorch Lightning saved, or a `state_dict` alone. Of what the pickle names nothing is run.
///
/// # Errors
/// It is no file of PyTorch's, is damaged, names what neither plain tensors nor such a training are made of, or is k-diffusion's.
pub(super) fn trained(bytes: &[u8]) -> Result<Trained> {
    let saved = Saved::read(bytes)?;
    let objects = &saved.objects;
    let dict =
        |key: &str| -> Option<&[(Id, Id)]> { objects.entries(objects.value(saved.root, key)?) };
    ensure!(
        dict(KEY).is_none(),
        "it has a dict `{KEY}`, as the latent upscaler's own checkpoint has, which is none to make pictures from words: give that to --model"
    );
    let entries = dict("state_dict").or_else(|| objects.entries(saved.root));
    let entries = entries.context("it holds no dict of tensors; expected a checkpoint")?;
    let mut tensors = HashMap::with_capacity(entries.len());
    for (key, value) in entries {
        let (Some(key), Some(tensor)) = (objects.text(*key), objects.tensor(*value)) else {
            continue;
        };
        let shown = || format!("`{}`", shortened(key));
        let before = tensors.insert(key.to_owned(), entry(&saved, tensor).with_context(shown)?);
        ensure!(before.is_none(), "{} is there twice", shown());
    }
    let global_step = objects.value(saved.root, "global_step");
    Ok(Trained {
        tensors,
        global_step: global_step.and_then(|id| objects.int(id)),
    })
}
