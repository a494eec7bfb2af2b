//! `--dry-run`: what would be done, without doing it.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use candle_core::Device;
use sd_upscale::files::{self, Loaded};
use sd_upscale::plan::{Plan, Source, Target};
use sd_upscale::{device, model};

use crate::job::Job;

/// Weights of the published model in float32: text encoder, UNet, VAE (bytes).
const PUBLISHED_WEIGHTS: u64 = 492_000_000 + 1_490_000_000 + 335_000_000;

/// Prints each input with its output and sizes, and what the run needs: on standard error where standard output is
/// for JSON. Nothing is downloaded. An input that cannot be read is shown with its error.
///
/// # Errors
/// The output is closed.
pub fn show(job: &Job, plan: &Plan, devices: &[Device]) -> Result<ExitCode> {
    let mut lines = Vec::new();
    let mut unreadable = plan.failed.len();
    for (path, error) in &plan.failed {
        lines.push(format!("{}: {error}", path.display()));
    }
    let mut largest = 0;
    for task in &plan.tasks {
        let size = match &task.source {
            Source::Stdin => None,
            Source::Path(path) => match files::read_path(path, &job.limits) {
                Ok(Loaded::Picture(picture)) => Some((picture.pixels.width, picture.pixels.height)),
                Ok(Loaded::Latents(latents)) => Some((8 * latents.width, 8 * latents.height)),
                Err(error) => {
                    lines.push(format!("{error:#}"));
                    unreadable += 1;
                    continue;
                }
            },
        };
        let place = match (&task.target, size) {
            (Target::Stdout(_), _) => "-".to_string(),
            (Target::File(naming), Some((w, h))) => {
                let path = naming.path(2 * w as u32, 2 * h as u32, None);
                path.display().to_string()
            }
            (Target::File(naming), None) => naming.pattern().display().to_string(),
        };
        match size {
            Some((w, h)) => {
                lines.push(format!(
                    "{} {w}x{h} -> {place} {}x{}",
                    task.source,
                    2 * w,
                    2 * h
                ));
                largest = largest.max((4 * w * h) as u64);
            }
            None => lines.push(format!("{} -> {place}", task.source)),
        }
    }
    let names: Vec<String> = devices.iter().map(device::name).collect();
    lines.push(format!("device: {}", names.join(", ")));
    lines.push(format!("model: {}", weights(job)));
    if job.model != model::TINY {
        // The decoder's widest maps: two of 256 channels and one of 128 at the output's size, in float32.
        let gigabytes = (largest * 2600) as f64 / 1e9;
        lines.push(format!(
            "memory: about {:.1} GB ({gigabytes:.1} GB for the largest picture)",
            gigabytes + 1.7
        ));
    }
    let text = lines.join("\n");
    if job.json {
        writeln!(std::io::stderr(), "{text}")
    } else {
        writeln!(std::io::stdout(), "{text}")
    }
    .context("cannot write what would be done")?;
    Ok(ExitCode::from(u8::from(unreadable > 0)))
}

fn weights(job: &Job) -> String {
    match &*job.model {
        model::TINY => "tiny (built in)".into(),
        name if std::path::Path::new(name).is_dir() => format!("{name} (folder)"),
        name => format!(
            "{name} at {} (repository; the published model's weights are {:.1} GB)",
            job.revision,
            PUBLISHED_WEIGHTS as f64 / 1e9
        ),
    }
}
