//! Where a model's files are: a folder, the Hub, or inside this binary.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};

use super::hub::{DEFAULT_BASE, DEFAULT_REPO, Hub, Part};
use super::{ModelFiles, PartFiles};

/// The name of the built-in model.
pub const TINY: &str = "tiny";

/// Whether `--model` names this machine's own files rather than a repository.
fn is_path(name: &str) -> bool {
    Path::new(name).exists()
        || name.starts_with(['.', '/', '~'])
        || name.contains('\\')
        || name.matches('/').count() != 1
}

/// Whether `--model` names the original checkpoint: any file, but for one called as the built-in model is.
pub fn is_checkpoint(name: &str) -> bool {
    name != TINY && Path::new(name).is_file()
}

/// The model that `option` calls `name`: `tiny`, a folder in the diffusers layout, or a repository at `revision`, of which `parts` are wanted. Of a
/// file, the original checkpoint, these are what [`ModelFiles::original`] takes besides.
///
/// # Errors
/// The folder lacks its parts, or the repository cannot be had.
pub fn locate(
    option: &'static str,
    name: &str,
    revision: &str,
    parts: &[Part],
    hub: impl FnOnce() -> Result<Hub>,
) -> Result<ModelFiles> {
    if name == TINY {
        return Ok(ModelFiles::built_in());
    }
    if is_path(name) {
        let folder = PathBuf::from(name);
        ensure!(
            folder.is_dir(),
            "{option} {name}: there is no such folder; expected {TINY}, a folder in the diffusers layout, the original checkpoint (FILE.pth), or a repository such as {}",
            DEFAULT_REPO
        );
        return Ok(ModelFiles::Folder(folder));
    }
    let hub = hub()?.named_by(option);
    Ok(ModelFiles::Folder(hub.snapshot(name, revision, parts)?))
}

/// The base checkpoint called `name`: a folder in the diffusers layout, or a repository at `revision`, of which `parts` are wanted; or its single
/// file, which has no tokenizer and takes that of `model`.
///
/// # Errors
/// As [`locate`].
pub fn locate_base(
    name: &str,
    revision: &str,
    parts: &[Part],
    model: &ModelFiles,
    hub: impl FnOnce() -> Result<Hub>,
) -> Result<ModelFiles> {
    let path = Path::new(name);
    if path.is_file() {
        return ModelFiles::single_file(path, model.clone());
    }
    if is_path(name) {
        ensure!(
            path.is_dir(),
            "--base {name}: there is no such folder or file; expected a folder in the diffusers layout, a checkpoint's single file, or a repository such as {DEFAULT_BASE}"
        );
        return Ok(ModelFiles::Folder(path.to_owned()));
    }
    let hub = hub()?.named_by("--base");
    Ok(ModelFiles::Folder(hub.snapshot(name, revision, parts)?))
}

/// The VAE called `name`: a folder (a VAE's own or a pipeline's), a safetensors file that goes with `model`'s VAE
/// configuration, or a repository.
///
/// # Errors
/// As [`locate`].
pub fn locate_vae(
    name: &str,
    model: &ModelFiles,
    hub: impl FnOnce() -> Result<Hub>,
) -> Result<PartFiles> {
    let path = PathBuf::from(name);
    if path.is_file() {
        return Ok(PartFiles {
            files: model.clone(),
            part: "vae",
            weights: Some(path),
        });
    }
    let folder = if is_path(name) {
        path
    } else {
        hub()?.vae(name, "main")?
    };
    for part in ["", "vae"] {
        if folder.join(part).join("config.json").is_file() {
            return Ok(PartFiles {
                files: ModelFiles::Folder(folder),
                part,
                weights: None,
            });
        }
    }
    bail!(
        "--vae {name}: neither {} nor vae/config.json in it exists; expected a VAE's folder, a .safetensors file, or a repository such as stabilityai/sd-vae-ft-mse",
        folder.join("config.json").display()
    )
}
