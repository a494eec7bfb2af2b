//! `--export-tiny`: the built-in model as a folder in the diffusers layout, which diffusers itself can run.

use std::path::Path;

use anyhow::{Context, Result};
use sd_upscale::files;
use sd_upscale::model::BUILT_IN_FILES;

/// Writes the built-in model's files into `folder`, which is made where it is missing.
///
/// # Errors
/// The folder cannot be written.
pub fn export(folder: &Path) -> Result<()> {
    for (path, bytes) in BUILT_IN_FILES {
        let path = folder.join(path);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)
                .with_context(|| format!("cannot create {}", parent.display()))?;
        }
        files::write(&path, bytes)?;
    }
    Ok(())
}
