//! A model's files in the diffusers layout: configurations, and the safetensors that hold a part's weights; or the original checkpoint
//! in the place of one part; or a checkpoint's single file.

mod built_in;
mod config;
mod convert;
pub mod hub;
mod layout;
mod locate;
mod original;
mod published;
mod single_file;
mod weights;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};

pub use self::built_in::BUILT_IN_FILES;
pub(crate) use self::config::{EPS, MOST_CHANNELS, MOST_LAYERS, MOST_LEVELS, within};
pub use self::hub::{DEFAULT_REPO, DEFAULT_REVISION, Hub};
pub use self::locate::{TINY, is_checkpoint, locate, locate_base, locate_vae};
pub use self::original::Checkpoint;
use self::published::{PUBLISHED_BASE_CONFIGURATIONS, PUBLISHED_CONFIGURATIONS};
pub use self::single_file::SingleFile;
pub(crate) use self::single_file::vae_name;
pub use self::weights::Weights;
use crate::device::Placement;

/// Where the files of a model in the diffusers layout come from.
#[derive(Clone, Debug)]
pub enum ModelFiles {
    /// A folder: the user's own, or a snapshot in the Hub cache.
    Folder(PathBuf),
    /// Built into the binary: (relative path, content).
    BuiltIn(&'static [(&'static str, &'static [u8])]),
    /// The UNet of the original checkpoint.
    Original {
        /// In the place of `unet/`.
        unet: Arc<Checkpoint>,
        /// Where everything else is.
        parts: Box<ModelFiles>,
    },
    /// A checkpoint's single file.
    SingleFile {
        /// Everything but the vocabulary.
        checkpoint: Arc<SingleFile>,
        /// Where that is.
        parts: Box<ModelFiles>,
    },
}

impl ModelFiles {
    /// The UNet of the original checkpoint, a file that `torch.save` wrote, with everything else from `parts`. Nothing that its pickle
    /// names is run.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn original(path: &Path, parts: ModelFiles) -> Result<Self> {
        Ok(Self::of_checkpoint(Checkpoint::open(path)?, parts))
    }

    /// The same of a checkpoint that is open.
    pub fn of_checkpoint(unet: Checkpoint, parts: ModelFiles) -> Self {
        ModelFiles::Original {
            unet: Arc::new(unet),
            parts: Box::new(parts),
        }
    }

    /// A Stable Diffusion 1.x or 2.x in a single file, in the names of its training: safetensors, or what `torch.save` wrote, of which nothing is
    /// run. It answers as a folder in the diffusers layout does, with the configurations that [`SingleFile::open`] tells of; it has no
    /// vocabulary, which is CLIP's own in all of them and is taken from `parts`, padded as the checkpoint's version does.
    ///
    /// # Errors
    /// As [`SingleFile::open`].
    pub fn single_file(path: &Path, parts: ModelFiles) -> Result<Self> {
        Ok(ModelFiles::SingleFile {
            checkpoint: Arc::new(SingleFile::open(path)?),
            parts: Box::new(parts),
        })
    }

    /// The small model that is built into the binary.
    pub fn built_in() -> Self {
        ModelFiles::BuiltIn(BUILT_IN_FILES)
    }

    /// The published model's configurations, without weights, tokenizer and text encoder: enough to plan with.
    pub fn published_configurations() -> Self {
        ModelFiles::BuiltIn(PUBLISHED_CONFIGURATIONS)
    }

    /// The same of the base checkpoint that is taken where none is named, Stable Diffusion 1.4.
    pub fn published_base_configurations() -> Self {
        ModelFiles::BuiltIn(PUBLISHED_BASE_CONFIGURATIONS)
    }

    /// The content of a small file, e.g. `unet/config.json`.
    ///
    /// # Errors
    /// The file is missing or unreadable.
    pub fn read(&self, relative: &str) -> Result<Vec<u8>> {
        self.try_read(relative)?.ok_or_else(|| {
            anyhow!(
                "{} is missing; a model folder in the diffusers layout holds model_index.json, unet/, vae/, text_encoder/, tokenizer/ and scheduler/",
                self.name(relative)
            )
        })
    }

    /// The same, with `None` where there is no such file.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub fn try_read(&self, relative: &str) -> Result<Option<Vec<u8>>> {
        match self {
            ModelFiles::Folder(folder) => {
                let path = folder.join(relative);
                match read_small(&path) {
                    Ok(bytes) => {
                        ensure!(
                            bytes.len() as u64 <= MOST_SMALL,
                            "{} has more than {MOST_SMALL} bytes, which no configuration and no vocabulary needs",
                            path.display()
                        );
                        Ok(Some(bytes))
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                    Err(error) => {
                        Err(error).with_context(|| format!("cannot read {}", path.display()))
                    }
                }
            }
            ModelFiles::BuiltIn(files) => Ok(files
                .iter()
                .find(|(name, _)| *name == relative)
                .map(|(_, bytes)| bytes.to_vec())),
            ModelFiles::Original { unet, .. } if relative == "unet/config.json" => {
                Ok(Some(unet.config().to_vec()))
            }
            ModelFiles::Original { parts, .. } => parts.try_read(relative),
            ModelFiles::SingleFile { checkpoint, parts } => checkpoint.try_read(relative, parts),
        }
    }

    /// A JSON file, read into a type.
    ///
    /// # Errors
    /// The file is missing, is not JSON, or lacks what `T` needs; the message names file and field.
    pub fn json<T: serde::de::DeserializeOwned>(&self, relative: &str) -> Result<T> {
        config::from_json(&self.name(relative), &self.read(relative)?)
    }

    /// A relative path as it is shown in messages.
    pub fn name(&self, relative: &str) -> String {
        match self {
            ModelFiles::Folder(folder) => folder.join(relative).display().to_string(),
            ModelFiles::BuiltIn(_) => format!("built-in model: {relative}"),
            ModelFiles::Original { unet, .. } if relative.starts_with("unet/") => {
                format!("{}: {relative}", unet.name())
            }
            ModelFiles::Original { parts, .. } => parts.name(relative),
            ModelFiles::SingleFile { checkpoint, parts } => checkpoint
                .name(relative)
                .unwrap_or_else(|| parts.name(relative)),
        }
    }

    /// The weights of a part: `part/stem.safetensors`, its shards, or its fp16 variant.
    ///
    /// `part` is a sub-folder, or "" for weights at the top (a bare VAE repository).
    ///
    /// # Errors
    /// None of these files exists (the message lists what was looked for), or one cannot be read.
    pub fn weights(&self, part: &str, stem: &str, placement: &Placement) -> Result<Weights> {
        let weights = match part {
            "" => format!("{stem}.safetensors"),
            part => format!("{part}/{stem}.safetensors"),
        };
        match self {
            ModelFiles::BuiltIn(files) => {
                let (_, bytes) = files
                    .iter()
                    .find(|(file, _)| *file == weights)
                    .ok_or_else(|| anyhow!("{} is missing", self.name(&weights)))?;
                Weights::built_in(&self.name(&weights), bytes, placement)
            }
            ModelFiles::Folder(folder) => {
                Weights::open(&weight_files(folder, &weights)?, placement)
            }
            ModelFiles::Original { unet, .. } if part == "unet" => Ok(unet.weights(placement)),
            ModelFiles::Original { parts, .. } => parts.weights(part, stem, placement),
            ModelFiles::SingleFile { checkpoint, .. } => checkpoint.weights(part, placement),
        }
    }
}

/// Bytes of the largest file that is read whole: a vocabulary takes 1 MB.
const MOST_SMALL: u64 = 32 << 20;

/// A file's bytes, of one that is too large a byte more than [`MOST_SMALL`].
fn read_small(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path)?;
    file.take(MOST_SMALL + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Where the files of one part are, which need not be the model's own: another model's, a repository of its own, or a
/// single file of weights.
#[derive(Clone, Debug)]
pub struct PartFiles {
    /// What the part belongs to.
    pub files: ModelFiles,
    /// The sub-folder, or "" for a part that lies at the top.
    pub part: &'static str,
    /// A safetensors file to read in place of the folder's weights.
    pub weights: Option<PathBuf>,
}

impl PartFiles {
    /// One of the part's JSON files, read into a type.
    ///
    /// # Errors
    /// As [`ModelFiles::json`].
    pub fn json<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T> {
        self.files.json(&match self.part {
            "" => name.to_string(),
            part => format!("{part}/{name}"),
        })
    }

    /// The part's weights: its own file, else `stem` as [`ModelFiles::weights`] finds it.
    ///
    /// # Errors
    /// As [`ModelFiles::weights`].
    pub fn weights(&self, stem: &str, placement: &Placement) -> Result<Weights> {
        match &self.weights {
            Some(path) => Weights::open(std::slice::from_ref(path), placement),
            None => self.files.weights(self.part, stem, placement),
        }
    }
}

/// The file or files that hold `weights` (`NAME.safetensors`) in `folder`.
fn weight_files(folder: &Path, weights: &str) -> Result<Vec<PathBuf>> {
    let found = layout::weight_file(weights, |name| folder.join(name).is_file())
        .ok_or_else(|| no_weights(folder, weights))?;
    let path = folder.join(&found);
    if !layout::is_index(&found) {
        return Ok(vec![path]);
    }
    let shards = layout::shards(folder, &found)
        .map_err(|why| anyhow!("{}: not a safetensors index: {why}", path.display()))?;
    let shards: Vec<PathBuf> = shards.iter().map(|shard| folder.join(shard)).collect();
    match shards.iter().find(|shard| !shard.is_file()) {
        None => Ok(shards),
        Some(shard) => bail!(
            "{} is missing; {} names it",
            shard.display(),
            path.display()
        ),
    }
}

fn no_weights(folder: &Path, weights: &str) -> anyhow::Error {
    let path = folder.join(weights);
    let pickled = ["bin", "pt", "ckpt", "pth"]
        .iter()
        .map(|extension| path.with_extension(extension))
        .find(|path| path.is_file());
    let cure = match pickled {
        Some(path) => format!(
            "; {} is pickled, which is read of a whole checkpoint in one file alone: save it as safetensors (diffusers: save_pretrained)",
            path.display()
        ),
        None => String::new(),
    };
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    anyhow!(
        "{} is missing (looked for {stem}.safetensors, {stem}.safetensors.index.json and {stem}.fp16.safetensors){cure}",
        path.display()
    )
}
