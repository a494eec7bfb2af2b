//! One run of the tool: plan, then read, compute and write at the same time, and tell of it.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel, sync_channel};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use candle_core::Device;
use sd_upscale::model::Hub;
use sd_upscale::plan::{self, Plan};
use sd_upscale::{Options, Upscaler, device, files, model};

use crate::compute::compute;
use crate::job::{Job, Verbosity};
use crate::read::read;
use crate::report::{Message, Outcome, Reporter, Status};
use crate::write::write;

/// Groups read ahead of the computing, and results waiting to be written.
const AHEAD: usize = 2;
const INTERRUPTED: u8 = 130;

/// Does the job.
///
/// # Errors
/// The command line cannot be followed, or the model cannot be had. An input that fails is reported and ends in
/// exit status 1.
pub fn run(job: Job) -> Result<ExitCode> {
    let plan = plan::plan(&job.request)?;
    let (devices, note) = device::open(&job.device)?;
    let inputs = plan.tasks.len() + plan.failed.len();
    let mut reporter = Reporter::new(job.verbosity, job.json, inputs, devices.len());
    for text in job.warnings.iter().chain(&plan.warnings).chain(&note) {
        reporter.warning(text);
    }
    for (path, why) in &plan.passed_over {
        reporter.note(&format!("passed over {}: {why}", path.display()));
    }
    if plan.in_other_shards > 0 {
        reporter.note(&format!(
            "{} inputs are in other shards",
            plan.in_other_shards
        ));
    }
    if job.dry_run {
        return crate::dry_run::show(&job, &plan, &devices);
    }
    for (path, error) in &plan.failed {
        let input = path.display().to_string();
        reporter.done(&failed(&job, input, error))?;
    }
    if plan.tasks.is_empty() {
        if inputs == 0 {
            reporter.warning("there is nothing to do: no image or latents file was found");
        }
        reporter.finish(false);
        return Ok(status(&reporter));
    }
    sweep(&plan);
    work(Arc::new(job), plan, devices, reporter)
}

/// An input that failed before it was worked on.
fn failed(job: &Job, input: String, error: &str) -> Outcome {
    Outcome {
        error: Some(error.to_string()),
        ..Outcome::new(job, input, Status::Error)
    }
}

fn status(reporter: &Reporter) -> ExitCode {
    ExitCode::from(u8::from(reporter.failed()))
}

/// Removes what killed runs left in the output folders.
fn sweep(plan: &Plan) {
    let mut folders: Vec<_> = plan
        .tasks
        .iter()
        .filter_map(|task| Some(task.target.naming()?.pattern().parent()?.to_path_buf()))
        .collect();
    folders.sort();
    folders.dedup();
    for folder in folders {
        files::clean_stale(&folder);
    }
}

/// The upscaler on one device. The model's files are found, or fetched, once for all devices.
fn load(job: &Job, device: &Device, keep_loaded: bool, finding: &Mutex<()>) -> Result<Upscaler> {
    let _one_at_a_time = finding.lock();
    let hub = || Hub::from_env(job.verbosity > Verbosity::Quiet);
    let files = model::locate(&job.model, &job.revision, job.vae.is_none(), hub)?;
    let vae = job
        .vae
        .as_deref()
        .map(|name| model::locate_vae(name, &files, hub))
        .transpose()?;
    Upscaler::new(Options {
        model: files,
        vae,
        device: device.clone(),
        dtype: job.dtype.unwrap_or_else(|| device::default_dtype(device)),
        keep_loaded,
    })
    .with_context(|| format!("the model {}", job.model))
}

fn work(job: Arc<Job>, plan: Plan, devices: Vec<Device>, reporter: Reporter) -> Result<ExitCode> {
    let (messages, inbox) = channel();
    let (groups_out, groups_in) = sync_channel(AHEAD);
    let (finished_out, finished_in) = sync_channel(AHEAD);
    let groups_in = Arc::new(Mutex::new(groups_in));
    let writing = Arc::new(Mutex::new(()));
    let finding = Arc::new(Mutex::new(()));
    watch_for_interrupts(messages.clone())?;

    let many = plan.tasks.len() > 1;
    let inputs: Vec<String> = plan.tasks.iter().map(|t| t.source.to_string()).collect();
    {
        let (job, messages) = (job.clone(), messages.clone());
        let (tasks, claims) = (plan.tasks, plan.claims);
        std::thread::spawn(move || read(&job, tasks, claims, groups_out, &messages));
    }
    for (number, device) in devices.into_iter().enumerate() {
        let (job, messages) = (job.clone(), messages.clone());
        let (groups, finished, finding) =
            (groups_in.clone(), finished_out.clone(), finding.clone());
        std::thread::spawn(move || {
            let load = |of_many: bool| load(&job, &device, many || of_many, &finding);
            compute(&job, number, load, &groups, &finished, &messages);
        });
    }
    drop(finished_out);
    {
        let (job, writing) = (job.clone(), writing.clone());
        std::thread::spawn(move || {
            write(&job, finished_in, &writing, &messages);
            // The last of the threads: what it sends ends the run.
            let _ = messages.send(Message::AllWritten);
        });
    }
    talk(reporter, inbox, &writing, |error| {
        let failed = |input| failed(&job, input, &format!("{error:#}"));
        inputs.into_iter().map(failed).collect()
    })
}

/// A first interrupt ends the run in order; a second one at once.
fn watch_for_interrupts(messages: std::sync::mpsc::Sender<Message>) -> Result<()> {
    let interrupted = AtomicBool::new(false);
    ctrlc::set_handler(move || {
        let again = interrupted.swap(true, Ordering::SeqCst);
        if again || messages.send(Message::Interrupt).is_err() {
            std::process::exit(i32::from(INTERRUPTED));
        }
    })
    .context("cannot watch for interrupts")
}

/// `undone` gives what becomes of the inputs where the run cannot go on.
fn talk(
    mut reporter: Reporter,
    inbox: Receiver<Message>,
    writing: &Mutex<()>,
    undone: impl FnOnce(&anyhow::Error) -> Vec<Outcome>,
) -> Result<ExitCode> {
    for message in inbox {
        match message {
            Message::Note(text) => reporter.note(&text),
            Message::Info(text) => reporter.info(&text),
            Message::Warning(text) => reporter.warning(&text),
            Message::Step {
                worker,
                done,
                total,
                seconds,
            } => reporter.step(worker, done, total, seconds),
            Message::Done(outcome) => reporter.done(&outcome)?,
            Message::Fatal(error) => {
                let _no_file_is_half_written = writing.lock();
                reporter.give_up(undone(&error))?;
                return Err(error);
            }
            Message::Interrupt => {
                // Writes are whole or not at all; what is computing is given up with the process.
                let _no_file_is_half_written = writing.lock();
                reporter.finish(true);
                std::process::exit(i32::from(INTERRUPTED));
            }
            Message::AllWritten => break,
        }
    }
    reporter.finish(false);
    Ok(status(&reporter))
}
