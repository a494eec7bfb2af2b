//! One run of the tool: plan, then read, compute and write at the same time, and tell of it.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex};

use anyhow::{Result, anyhow, ensure};
use candle_core::{DType, Device};
use sd_upscale::picture::Format;
use sd_upscale::plan::{self, PassedOver, Plan, Reads, Task, UsageError, Variant};
use sd_upscale::{device, files};

use crate::compute::compute;
use crate::grid::Grid;
use crate::job::Job;
use crate::model::Model;
use crate::open_files::OpenFiles;
use crate::parcel::outbox;
use crate::read::read;
use crate::report::{End, Message, Outcome, Reporter, Status, which};
use crate::write::write;
use crate::{first_use, signals, threads};

/// Groups read ahead of the computing.
const AHEAD: usize = 2;

/// Does the job.
///
/// # Errors
/// The command line cannot be followed, or the model cannot be had. An input that fails is reported and ends in
/// exit status 1.
pub fn run(mut job: Job) -> Result<ExitCode> {
    let mut plan = plan::plan(&job.request)?;
    let grid = Grid::planned(&job, &mut plan)?;
    if let Some(embeds) = &mut job.embeds {
        embeds.spread(&plan, job.watch)?;
    }
    let (devices, note) = device::open(&job.device)?;
    ensure!(
        !(job.tf32 && devices.iter().any(Device::is_cpu)),
        UsageError(crate::job::TF32_ON_THE_CPU.into())
    );
    if job.dtype == Some(DType::BF16) {
        refuse_without_bfloat16(&devices)?;
    }
    let of_prompts = match &job.prompts {
        Some(prompts) => prompts.check(&plan)?,
        None => None,
    };
    // Of a folder that is watched each is told of as it comes.
    let planned = if job.watch { 0 } else { plan.tasks.len() };
    let inputs = planned + plan.failed.len() * job.request.variants.len();
    let mut reporter = Reporter::new(&job, inputs, devices.len());
    let warnings = job.warnings.iter().chain(&plan.warnings);
    for text in warnings.chain(&of_prompts).chain(&note) {
        reporter.warning(text);
    }
    if let Some(text) = &job.configuration {
        reporter.note(&format!("configuration: {text}"));
    }
    for (path, why) in &plan.passed_over {
        reporter.note(&format!("passed over {}: {why}", path.display()));
    }
    if let Some(text) = passed_over(&plan) {
        reporter.info(&text);
    }
    if plan.in_other_shards > 0 {
        reporter.note(&format!(
            "{} inputs are in other shards",
            plan.in_other_shards
        ));
    }
    if job.dry_run {
        return crate::dry_run::show(Arc::new(job), &plan, &devices);
    }
    let (messages, inbox) = channel();
    let files = Arc::new(OpenFiles::default());
    // Before anything is said that someone may not read.
    signals::watch(messages.clone(), files.clone())?;
    for (path, error) in &plan.failed {
        for &variant in &job.request.variants {
            let input = path.display().to_string();
            reporter.done(&failed(&job, input, variant, error))?;
        }
    }
    if plan.tasks.is_empty() && !job.watch {
        if inputs == 0 {
            reporter.warning(match job.request.reads {
                Reads::Pictures => "there is nothing to do: no image or latents file was found",
                Reads::Prompts => "there is nothing to do: no prompt (.txt) was found",
            });
        }
        reporter.finish(End::Done);
        return Ok(status(&reporter));
    }
    if let Some(grid) = &grid {
        grid.try_place()?;
    }
    sweep(&plan);
    let wires = Wires {
        messages,
        inbox,
        files,
    };
    work(Arc::new(job), plan, devices, reporter, wires, grid)
}

/// # Errors
/// A card is too old for bfloat16.
fn refuse_without_bfloat16(devices: &[Device]) -> Result<()> {
    for card in devices.iter().filter(|device| !device.is_cpu()) {
        ensure!(
            device::has_bfloat16(card)?,
            UsageError(format!(
                "--dtype bf16 needs a card of compute capability 8.0 or newer, which {} is not: use --dtype f16 or f32",
                device::name(card)
            ))
        );
    }
    Ok(())
}

/// How many files of folders are passed over for what they are, by extension: a folder of HEIC would else end in silence.
fn passed_over(plan: &Plan) -> Option<String> {
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for (path, why) in &plan.passed_over {
        if *why == PassedOver::NotAnImage {
            let extension = path.extension().unwrap_or_default().to_string_lossy();
            *kinds.entry(extension.to_lowercase()).or_default() += 1;
        }
    }
    let count: usize = kinds.values().sum();
    let mut kinds: Vec<(String, usize)> = kinds.into_iter().collect();
    kinds.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let shown: Vec<String> = kinds
        .iter()
        .take(4)
        .map(|(extension, count)| match &**extension {
            "" => format!("{count} without an extension"),
            extension => format!("{count} .{extension}"),
        })
        .collect();
    let more = if kinds.len() > shown.len() {
        ", …"
    } else {
        ""
    };
    let files = if count == 1 { "file" } else { "files" };
    let heif =
        |(extension, _): &(String, usize)| Format::from_extension(extension) == Some(Format::Heif);
    let cure = if kinds.iter().any(heif) {
        "; HEIC and AVIF are read where libheif is installed"
    } else {
        ""
    };
    (count > 0).then(|| {
        format!(
            "passed over {count} {files} of kinds that are not read ({}{more}){cure}; -v names them",
            shown.join(", ")
        )
    })
}

/// An input that failed before it was worked on.
fn failed(job: &Job, input: String, variant: Variant, error: &str) -> Outcome {
    Outcome {
        error: Some(error.to_string()),
        ..Outcome::new(job, input, variant, Status::Error)
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

/// What the threads of a run share.
struct Wires {
    messages: Sender<Message>,
    inbox: Receiver<Message>,
    files: Arc<OpenFiles>,
}

fn work(
    job: Arc<Job>,
    plan: Plan,
    devices: Vec<Device>,
    reporter: Reporter,
    wires: Wires,
    grid: Option<Grid>,
) -> Result<ExitCode> {
    let Wires {
        messages,
        inbox,
        files,
    } = wires;
    let (groups_out, groups_in) = sync_channel(AHEAD);
    let groups_in = Arc::new(Mutex::new(groups_in));
    let first = devices.first().cloned().unwrap_or(Device::Cpu);
    let model = Arc::new(Model::new(job.clone(), first));

    let many = plan.tasks.len() > 1 || job.watch;
    let named = |task: &Task| (task.source.to_string(), task.variant);
    let inputs: Vec<(String, Variant)> = if job.watch {
        Vec::new()
    } else {
        plan.tasks.iter().map(named).collect()
    };
    {
        let (job, model, to_say) = (job.clone(), model.clone(), messages.clone());
        let (tasks, claims) = (plan.tasks, plan.claims);
        let files = files.clone();
        let work = move || read(&job, &model, tasks, claims, groups_out, &files, &to_say);
        threads::start("reading", &messages, work)?;
    }
    let writers = devices.len();
    for (number, device) in devices.into_iter().enumerate() {
        // Each has a writer of its own: a slow picture of one device keeps no other waiting.
        let (outbox, inbox) = outbox();
        {
            let (job, files, to_say) = (job.clone(), files.clone(), messages.clone());
            let work = move || {
                write(&job, &inbox, &files, &to_say);
                // What the last of the threads sends ends the run.
                let _ = to_say.send(Message::AllWritten);
            };
            threads::start("writing", &messages, work)?;
        }
        let (job, to_say) = (job.clone(), messages.clone());
        let (groups, model) = (groups_in.clone(), model.clone());
        let work = move || {
            let load = |of_many: bool| {
                let mut upscaler = model.load(&device, many || of_many)?;
                if let Some(warning) = first_use::try_layers(&mut upscaler, &device)? {
                    // The receiver is gone only where the run has ended.
                    let _ = to_say.send(Message::Warning(warning));
                }
                Ok(upscaler)
            };
            compute(&job, number, load, &groups, outbox, &to_say);
        };
        threads::start("computing", &messages, work)?;
    }
    drop(messages);
    let mut talk = Talk {
        reporter,
        inputs,
        job: &job,
        files: &files,
        writers,
        grid,
    };
    let status = talk.listen(&inbox);
    if status.is_err() {
        // The process ends now: what is half written goes, and until then no file may be begun.
        std::mem::forget(files.give_up());
    }
    status
}

/// What the run's main thread does: it tells of the others.
struct Talk<'a> {
    reporter: Reporter,
    /// All that are to be done, as they are called in messages.
    inputs: Vec<(String, Variant)>,
    job: &'a Job,
    files: &'a Arc<OpenFiles>,
    /// Writing threads that have not ended.
    writers: usize,
    /// What the outputs are shown in.
    grid: Option<Grid>,
}

impl Talk<'_> {
    fn listen(&mut self, inbox: &Receiver<Message>) -> Result<ExitCode> {
        for message in inbox {
            match message {
                Message::Note(text) => self.reporter.note(&text),
                Message::Info(text) => self.reporter.info(&text),
                Message::Warning(text) => self.reporter.warning(&text),
                Message::Stage { worker, text } => self.reporter.stage(worker, text),
                Message::Step { worker, step } => self.reporter.step(worker, step),
                Message::BaseStep {
                    worker,
                    done,
                    total,
                    seconds,
                } => self.reporter.base_step(worker, done, total, seconds),
                Message::Denoised { worker } => self.reporter.denoised(worker),
                Message::Done(outcome) => {
                    if let Some(grid) = &mut self.grid {
                        grid.add(&outcome);
                    }
                    self.reporter.done(&outcome)?;
                }
                Message::Came(inputs) => {
                    self.reporter.more(inputs.len());
                    self.inputs.extend(inputs);
                }
                Message::Fatal(error) => {
                    self.give_up(&error)?;
                    return Err(error);
                }
                Message::Interrupt => self.interrupted(inbox)?,
                Message::AllWritten => {
                    self.writers = self.writers.saturating_sub(1);
                    if self.writers == 0 {
                        break;
                    }
                }
            }
        }
        let undone = self.undone();
        if undone > 0 {
            let error = anyhow!(
                "{undone} inputs were not done, and nothing says why: this is a fault in this program; please report it"
            );
            self.give_up(&error)?;
            return Err(error);
        }
        let drawn = self.grid.take().map(|grid| grid.write(self.files));
        self.reporter.finish(End::Done);
        if let Some(file) = drawn.transpose()?.flatten() {
            self.reporter.info(&format!("grid: {}", file.display()));
        }
        Ok(status(&self.reporter))
    }

    /// How many inputs nothing was said of.
    fn undone(&self) -> usize {
        let untold =
            |(input, variant): &&(String, Variant)| !self.reporter.told_of(&which(input, *variant));
        self.inputs.iter().filter(untold).count()
    }

    /// Ends a run that cannot go on: `--json` gets a line for each input that had none.
    fn give_up(&mut self, error: &anyhow::Error) -> Result<()> {
        let error = format!("{error:#}");
        for (input, variant) in &self.inputs {
            if !self.reporter.told_of(&which(input, *variant)) {
                let outcome = failed(self.job, input.clone(), *variant, &error);
                self.reporter.json_line(&outcome)?;
            }
        }
        self.reporter.finish(End::Done);
        Ok(())
    }

    /// Writes are whole or not at all; what is computing is given up with the process.
    fn interrupted(&mut self, inbox: &Receiver<Message>) -> Result<()> {
        let _no_file_is_half_written = self.files.give_up();
        // What was written before that counts.
        for message in inbox.try_iter() {
            if let Message::Done(outcome) = message {
                self.reporter.done(&outcome)?;
            }
        }
        self.reporter.finish(End::Interrupted);
        std::process::exit(i32::from(signals::INTERRUPTED));
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::Args;

    /// What a run of two inputs ends in whose other threads sent `messages` and are gone.
    fn ends_in(messages: Vec<Message>) -> Result<ExitCode> {
        let args = Args::parse_from(["sd-upscale", "a.png", "b.png", "-o", "out", "-q"]);
        let job = Job::try_from(args).unwrap();
        let (sender, inbox) = channel();
        for message in messages {
            sender.send(message).unwrap();
        }
        drop(sender);
        let mut talk = Talk {
            reporter: Reporter::new(&job, 2, 1),
            inputs: vec![
                ("a.png".into(), Variant::default()),
                ("b.png".into(), Variant::default()),
            ],
            job: &job,
            files: &Arc::default(),
            writers: 1,
            grid: None,
        };
        talk.listen(&inbox)
    }

    fn done(job_input: &str) -> Message {
        let args = Args::parse_from(["sd-upscale", "a.png"]);
        let job = Job::try_from(args).unwrap();
        let variant = Variant::default();
        Message::Done(Outcome::new(&job, job_input.into(), variant, Status::Ok))
    }

    #[test]
    fn a_run_in_which_an_input_came_to_nothing_fails() {
        assert!(ends_in(vec![done("a.png"), done("b.png"), Message::AllWritten]).is_ok());
        let error = ends_in(vec![done("a.png"), Message::AllWritten]).unwrap_err();
        assert!(
            error.to_string().contains("1 inputs were not done"),
            "{error}"
        );
        // All threads are gone without a word.
        assert!(ends_in(vec![done("b.png")]).is_err());
        assert!(ends_in(Vec::new()).is_err());
    }

    #[test]
    fn a_dead_threads_error_is_the_runs() {
        let error = ends_in(vec![done("a.png"), Message::Fatal(anyhow!("it died"))]).unwrap_err();
        assert_eq!(error.to_string(), "it died");
    }
}
