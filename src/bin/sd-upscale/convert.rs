//! `--convert`: the model as a folder in the diffusers layout.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anyhow::{Result, ensure};
use sd_upscale::model::Hub;
use sd_upscale::plan::UsageError;

use crate::job::{Job, Verbosity};
use crate::{model, signals};

/// Writes the job's model to `folder`.
///
/// # Errors
/// The model cannot be had, or the folder not be written; nothing is left of it then.
pub fn convert(job: &Job, folder: &Path) -> Result<ExitCode> {
    ensure!(
        !job.tf32,
        UsageError("--convert: weights are kept in f32, f16 or bf16, not in tf32".into())
    );
    let files = model::files(job, || Hub::from_env(job.verbosity > Verbosity::Quiet))?;
    let interrupted = signals::flag()?;
    let is_interrupted = || interrupted.load(Ordering::SeqCst);
    let saved = files.save(folder, job.dtype, &mut || {
        ensure!(!is_interrupted(), "interrupted");
        Ok(())
    });
    if saved.is_err() && is_interrupted() {
        return Ok(ExitCode::from(signals::INTERRUPTED));
    }
    saved?;
    if job.verbosity > Verbosity::Quiet {
        // Where no one reads standard error, the folder remains.
        let _ = writeln!(
            std::io::stderr(),
            "wrote {}: {}",
            folder.display(),
            job.model
        );
    }
    Ok(ExitCode::SUCCESS)
}
