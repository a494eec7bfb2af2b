//! `--dry-run`: what would be done, without doing it.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::Device;
use sd_upscale::files::{self, Loaded};
use sd_upscale::model::{self, TINY};
use sd_upscale::pipeline::StagePlan;
use sd_upscale::plan::{Plan, Source, Target, Task, Written};
use sd_upscale::{Enlargement, Settings, device};

use crate::item::{Content, Size};
use crate::job::Job;
use crate::model::{Facts, Model};
use crate::read::{fits, prompt_of};
use crate::report::{Outcome, Status};

/// Weights of the published model in float32: text encoder, UNet, VAE (bytes).
const PUBLISHED_WEIGHTS: u64 = 492_000_000 + 1_490_000_000 + 335_000_000;
/// Prints each input with its output and sizes, and what the run needs: with `--json` a line of JSON an input on
/// standard output, and the rest on standard error. Nothing is downloaded. An input that cannot be done is shown with
/// its error.
///
/// # Errors
/// The output is closed.
pub fn show(job: Arc<Job>, plan: &Plan, devices: &[Device]) -> Result<ExitCode> {
    let first = devices.first().unwrap_or(&Device::Cpu);
    let model = Model::new(job.clone(), first.clone());
    let mut facts = model.facts_at_hand()?;
    let (outcomes, largest) = outcomes(&job, plan, &mut facts);
    let failed = outcomes.iter().any(|o| o.status == Status::Error);
    let names: Vec<String> = devices.iter().map(device::name).collect();
    let mut about = vec![
        format!("device: {}", names.join(", ")),
        format!("model: {}", weights(&job)),
        format!("sampler: {}", course(&job.settings, &facts)),
    ];
    about.extend(original_settings(&job.settings));
    about.extend(base(&job));
    let configuration = job.configuration.as_ref();
    about.extend(configuration.map(|text| format!("configuration: {text}")));
    let grid = job.grid.as_ref();
    about.extend(grid.map(|file| format!("grid: {}", file.display())));
    about.extend(memory(first, &largest));
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

/// What would become of each input, and the plan for the one that takes the most memory.
fn outcomes(job: &Job, plan: &Plan, facts: &mut Facts) -> (Vec<Outcome>, Vec<StagePlan>) {
    let mut largest = Vec::new();
    let failed = plan.failed.iter().flat_map(|(path, error)| {
        job.request.variants.iter().map(|&variant| Outcome {
            error: Some(error.clone()),
            ..Outcome::new(job, path.display().to_string(), variant, Status::Error)
        })
    });
    let mut outcomes: Vec<Outcome> = failed.collect();
    for task in &plan.tasks {
        let outcome = Outcome::new(job, task.source.to_string(), task.variant, Status::Planned);
        outcomes.push(match planned(job, task, facts) {
            Ok(found) => {
                let size = found.as_ref().map(|(size, _)| *size);
                if let Some((_, plans)) = found
                    && peak(&plans) > peak(&largest)
                {
                    largest = plans;
                }
                Outcome {
                    output: Some(place(task, size)),
                    size: size.map(|size| (size.width, size.height)),
                    evaluations: facts.evaluations(&job.settings),
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
    (outcomes, largest)
}

/// Bytes, of the stage that takes the most.
fn peak(plans: &[StagePlan]) -> u64 {
    plans.iter().map(|plan| plan.peak).max().unwrap_or(0)
}

/// The result's size and what its stages take, with the checks of a real run; None for standard input, which is not read.
fn planned(job: &Job, task: &Task, facts: &mut Facts) -> Result<Option<(Size, Vec<StagePlan>)>> {
    let content = match (&task.source, prompt_of(job, &task.source)?) {
        (_, Some(text)) => {
            let size = job.base_size.map_or_else(|| facts.base_size(), Ok)?;
            Content::Prompt { text, size }
        }
        (Source::Path(path), None) => match files::read_path(path, &job.limits)? {
            Loaded::Picture(picture) => Content::Picture(picture),
            Loaded::Latents(latents) => Content::Latents(latents),
        },
        _ => return Ok(None),
    };
    let size = facts.result_size(&content)?;
    let kind = kind(task);
    fits(size, kind)?;
    let settings = job.settings_by(task.variant);
    let plans = facts.plan(&content, &settings, kind)?;
    Ok(Some((size, plans)))
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

/// What the run takes of a device's memory beside what is free of it, and how each stage of the largest picture keeps to that.
fn memory(device: &Device, plans: &[StagePlan]) -> Vec<String> {
    if plans.is_empty() {
        return Vec::new();
    }
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    let whose = match device {
        Device::Cpu => String::new(),
        card => format!(" of {}", device::name(card)),
    };
    let free = match device::free_memory(device) {
        Some(free) => format!("; {:.1} GB are free", gigabytes(free)),
        None => String::new(),
    };
    let first = format!(
        "memory{whose}: about {:.1} GB{free}",
        gigabytes(peak(plans))
    );
    std::iter::once(first)
        .chain(plans.iter().map(|plan| format!("  {plan}")))
        .collect()
}

/// How the result will be sampled, as far as the sampler takes what the settings say.
fn course(settings: &Settings, facts: &Facts) -> String {
    let sampler = settings.sampler;
    let mut parts = vec![sampler.to_string()];
    let mut part = |takes: bool, text: String| parts.extend(takes.then_some(text));
    let schedule = settings.schedule.name();
    part(sampler.takes_a_schedule(), schedule.into());
    part(sampler.takes_eta(), format!("eta {}", settings.eta));
    let tolerance = settings.tolerance;
    part(
        sampler.takes_a_tolerance(),
        format!("tolerance {tolerance}"),
    );
    part(sampler.takes_steps(), format!("{} steps", settings.steps));
    let evaluations = match facts.evaluations(settings) {
        Some(count) => format!("{count} evaluations of the UNet a picture"),
        None => "as many evaluations of the UNet as that takes".into(),
    };
    format!("{}; {evaluations}", parts.join(", "))
}

/// What the original implementation can do besides, where it is asked for.
fn original_settings(settings: &Settings) -> Vec<String> {
    let (level, kind) = (settings.noise_level, settings.noise_type.name());
    let noise = (level > 0.0).then(|| format!("noise level: {level} ({kind})"));
    let mask = settings
        .mask_padding
        .then(|| "padding of prompts: masked".into());
    noise.into_iter().chain(mask).collect()
}

/// What the base checkpoint has to do.
fn base(job: &Job) -> Option<String> {
    let Settings {
        base_steps,
        base_guidance,
        refine,
        ..
    } = &job.settings;
    let does = match (job.generate, refine) {
        (true, None) => "makes the picture".into(),
        (true, Some(strength)) => format!("makes the picture, and refines at {strength}"),
        (false, Some(strength)) => format!("refines at {strength}"),
        (false, None) => return None,
    };
    Some(format!(
        "base: {} {does}; {base_steps} steps, guidance {base_guidance}",
        job.base
    ))
}

fn weights(job: &Job) -> String {
    match &*job.model {
        TINY => "tiny (built in)".into(),
        name if Path::new(name).is_dir() => format!("{name} (folder)"),
        name if model::is_checkpoint(name) => {
            let parts = &job.model_parts;
            format!("{name} (original checkpoint; everything but the UNet from {parts})")
        }
        name => format!(
            "{name} at {} (repository; the published model's weights are {:.1} GB)",
            job.revision,
            PUBLISHED_WEIGHTS as f64 / 1e9
        ),
    }
}
