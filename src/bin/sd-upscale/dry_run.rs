//! `--dry-run`: what would be done, without doing it.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::{DType, Device};
use sd_upscale::files::{self, Loaded};
use sd_upscale::model::TINY;
use sd_upscale::plan::{Plan, Source, Target, Task, Written};
use sd_upscale::{Enlargement, device};

use crate::item::{Content, Size};
use crate::job::Job;
use crate::model::{Facts, Model};
use crate::read::fits;
use crate::report::{Outcome, Status};

/// Weights of the published model in float32: text encoder, UNet, VAE (bytes).
const PUBLISHED_WEIGHTS: u64 = 492_000_000 + 1_490_000_000 + 335_000_000;
/// Bytes a pixel of the result that the published configuration takes at its peak, where the model's own is not at hand.
const PUBLISHED_BYTES: u64 = 2600;
/// What a process of the published configuration takes beside that: the largest part's weights and the program.
const PUBLISHED_BASE: u64 = 1_700_000_000;
/// The same of the built-in model.
const TINY_BASE: u64 = 100_000_000;

/// Prints each input with its output and sizes, and what the run needs: with `--json` a line of JSON an input on
/// standard output, and the rest on standard error. Nothing is downloaded. An input that cannot be done is shown with
/// its error.
///
/// # Errors
/// The output is closed.
pub fn show(job: Arc<Job>, plan: &Plan, devices: &[Device]) -> Result<ExitCode> {
    let first = devices.first().unwrap_or(&Device::Cpu);
    let facts = Model::new(job.clone(), first.clone()).facts_at_hand();
    let (outcomes, peak) = outcomes(&job, plan, facts.as_ref());
    let failed = outcomes.iter().any(|o| o.status == Status::Error);
    let names: Vec<String> = devices.iter().map(device::name).collect();
    let mut about = vec![
        format!("device: {}", names.join(", ")),
        format!("model: {}", weights(&job)),
    ];
    if let Some(peak) = peak {
        about.extend(devices.iter().map(|device| memory(&job, device, peak)));
    }
    let mut stdout = std::io::stdout().lock();
    let mut print = || -> std::io::Result<()> {
        for outcome in &outcomes {
            if job.json {
                writeln!(stdout, "{}", outcome.json())?;
            } else {
                writeln!(stdout, "{}", in_words(outcome, job.settings.scale))?;
            }
        }
        for line in &about {
            if job.json {
                writeln!(std::io::stderr(), "{line}")?;
            } else {
                writeln!(stdout, "{line}")?;
            }
        }
        stdout.flush()
    };
    print().context("cannot write what would be done")?;
    Ok(ExitCode::from(u8::from(failed)))
}

/// What would become of each input, and the largest peak of memory in bytes.
fn outcomes(job: &Job, plan: &Plan, facts: Option<&Facts>) -> (Vec<Outcome>, Option<u64>) {
    let mut peak = None;
    let failed = plan.failed.iter().map(|(path, error)| Outcome {
        error: Some(error.clone()),
        ..Outcome::new(job, path.display().to_string(), Status::Error)
    });
    let mut outcomes: Vec<Outcome> = failed.collect();
    for task in &plan.tasks {
        let outcome = Outcome::new(job, task.source.to_string(), Status::Planned);
        outcomes.push(match sized(job, task, facts) {
            Ok(size) => {
                if let Some(size) = size {
                    peak = peak.max(Some(bytes_needed(size, facts)));
                }
                Outcome {
                    output: Some(place(task, size)),
                    size: size.map(|size| (size.width, size.height)),
                    ..outcome
                }
            }
            Err(error) => Outcome {
                status: Status::Error,
                error: Some(format!("{error:#}")),
                ..outcome
            },
        });
    }
    (outcomes, peak)
}

/// The result's size, with the checks of a real run; None for standard input, which is not read.
fn sized(job: &Job, task: &Task, facts: Option<&Facts>) -> Result<Option<Size>> {
    let Source::Path(path) = &task.source else {
        return Ok(None);
    };
    let content = match files::read_path(path, &job.limits)? {
        Loaded::Picture(picture) => Content::Picture(picture),
        Loaded::Latents(latents) => Content::Latents(latents),
    };
    let size = match facts {
        Some(facts) => facts.result_size(&content)?,
        None => published_size(&content).enlarged(job.settings.scale),
    };
    fits(size, kind(task))?;
    Ok(Some(size))
}

/// An input's size in pixels to a model that is not at hand: as for every Stable Diffusion VAE.
fn published_size(content: &Content) -> Size {
    match content {
        Content::Picture(picture) => Size {
            width: picture.pixels.width,
            height: picture.pixels.height,
        },
        Content::Latents(latents) => Size {
            width: 8 * latents.width,
            height: 8 * latents.height,
        },
    }
}

fn kind(task: &Task) -> Written {
    match &task.target {
        Target::Stdout(kind) => *kind,
        Target::File(naming) => naming.kind(),
    }
}

fn place(task: &Task, size: Option<Size>) -> String {
    let path = match (&task.target, size) {
        (Target::Stdout(_), _) => return "-".into(),
        (Target::File(naming), Some(size)) => {
            naming.path(size.width as u32, size.height as u32, None)
        }
        (Target::File(naming), None) => naming.pattern(),
    };
    path.display().to_string()
}

fn in_words(outcome: &Outcome, scale: Enlargement) -> String {
    let place = outcome.output.as_deref().unwrap_or("-");
    match (&outcome.error, outcome.size) {
        (Some(error), _) => outcome.named(error),
        (None, Some((w, h))) => {
            let (input, times) = (&outcome.input, scale.times());
            format!("{input} {}x{} -> {place} {w}x{h}", w / times, h / times)
        }
        (None, None) => format!("{} -> {place}", outcome.input),
    }
}

fn bytes_needed(size: Size, facts: Option<&Facts>) -> u64 {
    match facts {
        Some(facts) => facts.bytes_needed(size),
        None => size.width as u64 * size.height as u64 * PUBLISHED_BYTES,
    }
}

/// What the run takes of a device's memory beside what is free of it.
fn memory(job: &Job, device: &Device, peak: u64) -> String {
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    let base = match &*job.model {
        TINY => TINY_BASE,
        _ => PUBLISHED_BASE,
    };
    // A card keeps weights in the run's precision, the CPU in float32 whatever they come in.
    let dtype = job.dtype.unwrap_or_else(|| device::default_dtype(device));
    let base = match device {
        Device::Cpu => base,
        _ => base * dtype.size_in_bytes() as u64 / DType::F32.size_in_bytes() as u64,
    };
    let whose = match device {
        Device::Cpu => String::new(),
        card => format!(" of {}", device::name(card)),
    };
    let free = match device::free_memory(device) {
        Some(free) if free < base + peak => {
            format!("; only {:.1} GB are free: it may not fit", gigabytes(free))
        }
        Some(free) => format!("; {:.1} GB are free", gigabytes(free)),
        None => String::new(),
    };
    format!(
        "memory{whose}: about {:.1} GB ({:.1} GB for the largest picture){free}",
        gigabytes(base + peak),
        gigabytes(peak)
    )
}

fn weights(job: &Job) -> String {
    match &*job.model {
        TINY => "tiny (built in)".into(),
        name if std::path::Path::new(name).is_dir() => format!("{name} (folder)"),
        name => format!(
            "{name} at {} (repository; the published model's weights are {:.1} GB)",
            job.revision,
            PUBLISHED_WEIGHTS as f64 / 1e9
        ),
    }
}
