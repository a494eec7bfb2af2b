//! What the user sees while a run goes on and when it ends: progress, warnings, JSON lines, a summary.

use std::collections::HashSet;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use sd_upscale::plan::Variant;
use serde::Serialize;

use crate::job::{Job, Verbosity};
use crate::json_lines;

/// What became of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Ok,
    Skipped,
    Error,
    /// With `--dry-run` alone.
    Planned,
}

#[derive(Clone, Debug)]
pub struct Outcome {
    pub input: String,
    pub output: Option<String>,
    pub status: Status,
    pub error: Option<String>,
    /// Width and height of what was written: pixels, or latent positions.
    pub size: Option<(usize, usize)>,
    /// Its seed and guidance.
    pub variant: Variant,
    /// Those that were asked for; none where the sampler takes no number of steps.
    pub steps: Option<usize>,
    /// Of the UNet, where they were made or are known before.
    pub evaluations: Option<usize>,
    pub seconds: f64,
}

impl Outcome {
    /// Of an input of `job` on which no time was spent: without output, error or size.
    pub fn new(job: &Job, input: String, variant: Variant, status: Status) -> Self {
        Self {
            input,
            output: None,
            status,
            error: None,
            size: None,
            variant,
            steps: job
                .settings
                .sampler
                .takes_steps()
                .then_some(job.settings.steps),
            evaluations: None,
            seconds: 0.0,
        }
    }

    /// The line of `--json`.
    pub fn json(&self) -> String {
        let line = Line {
            input: &self.input,
            output: self.output.as_deref(),
            status: self.status,
            error: self.error.as_deref(),
            width: self.size.map(|(width, _)| width),
            height: self.size.map(|(_, height)| height),
            seed: self.variant.seed,
            guidance: self.variant.guidance,
            steps: self.steps,
            evaluations: self.evaluations,
            seconds: (self.seconds * 1000.0).round() / 1000.0,
        };
        json_lines::line(&line)
    }

    /// Which of the run's outputs it is of.
    pub fn which(&self) -> Which {
        which(&self.input, self.variant)
    }

    /// An error with the name of its input, once.
    pub fn named(&self, error: &str) -> String {
        named(&self.input, error)
    }
}

/// An input, and the bits of the seed and guidance that it is done by.
pub type Which = (String, u64, u64);

pub fn which(input: &str, variant: Variant) -> Which {
    (input.to_owned(), variant.seed, variant.guidance.to_bits())
}

/// From the threads of a run to the one that talks.
pub enum Message {
    /// With -v alone.
    Note(String),
    Info(String),
    Warning(String),
    /// What a worker begins to do.
    Stage {
        worker: usize,
        text: &'static str,
    },
    Step {
        worker: usize,
        step: StepDone,
    },
    /// A call of the base checkpoint's UNet.
    BaseStep {
        worker: usize,
        done: usize,
        total: usize,
        seconds: f64,
    },
    /// The last of a pass was done.
    Denoised {
        worker: usize,
    },
    Done(Outcome),
    /// Inputs that came while others were done.
    Came(Vec<(String, Variant)>),
    /// Every result of one writing thread is written.
    AllWritten,
    /// Nothing more can be done: the model cannot be had.
    Fatal(anyhow::Error),
    Interrupt,
}

/// An evaluation of the UNet, as [`sd_upscale::Event::Step`] tells of it.
#[derive(Clone, Copy, Debug)]
pub struct StepDone {
    pub done: usize,
    pub total: Option<usize>,
    pub way: f64,
    pub seconds: f64,
}

/// How a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Done,
    Interrupted,
}

/// A line of `--json`.
#[derive(Serialize)]
struct Line<'a> {
    input: &'a str,
    output: Option<&'a str>,
    status: Status,
    error: Option<&'a str>,
    width: Option<usize>,
    height: Option<usize>,
    seed: u64,
    guidance: f64,
    steps: Option<usize>,
    evaluations: Option<usize>,
    seconds: f64,
}

/// While a worker loads, encodes or decodes.
const STAGE: &str = "{spinner} {msg}";
/// While it denoises; within 40 columns there is room for all but the bar.
const STEPS: &str = "steps {wide_bar} {pos}/{len} {msg}";
/// The same of the base checkpoint's.
const BASE_STEPS: &str = "base steps {wide_bar} {pos}/{len} {msg}";
/// The same where a step is more than one evaluation.
const EVALUATIONS: &str = "evaluations {wide_bar} {pos}/{len} {msg}";
/// Where it is not known how many there will be.
const WAY: &str = "{wide_bar} {percent} % {msg}";

/// A bar's length where its end is all of the way.
const WHOLE_WAY: u64 = 1000;

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

pub struct Reporter {
    verbosity: Verbosity,
    json: bool,
    bars: MultiProgress,
    files: ProgressBar,
    /// One a worker: the stage it is in, or its steps.
    workers: Vec<ProgressBar>,
    failures: Vec<(String, String)>,
    ok: usize,
    skipped: usize,
    inputs: usize,
    /// Whether there may be more.
    watches: bool,
    start: Instant,
    first_step: bool,
    /// Of each picture.
    passes: usize,
    /// Whether a step is one evaluation.
    once_a_step: bool,
    /// Seconds of the steps of the pass so far, by worker.
    step_times: Vec<Vec<f64>>,
    /// Those of which it was said what became of them.
    told: HashSet<Which>,
}

impl Reporter {
    /// `inputs`: how many there are to do.
    pub fn new(job: &Job, inputs: usize, workers: usize) -> Self {
        let verbosity = job.verbosity;
        let bars = MultiProgress::new();
        if verbosity == Verbosity::Quiet {
            bars.set_draw_target(ProgressDrawTarget::hidden());
        }
        let files = match inputs {
            0 | 1 => ProgressBar::hidden(),
            _ if job.watch => ProgressBar::hidden(),
            _ => bars.add(ProgressBar::new(inputs as u64)),
        };
        files.set_style(style("files {wide_bar} {pos}/{len} {elapsed} {eta} left"));
        let worker = |_| {
            let bar = bars.add(ProgressBar::new_spinner());
            bar.set_style(style(STAGE));
            bar
        };
        Self {
            verbosity,
            json: job.json,
            files,
            workers: (0..workers).map(worker).collect(),
            bars,
            failures: Vec::new(),
            ok: 0,
            skipped: 0,
            inputs,
            watches: job.watch,
            start: Instant::now(),
            first_step: true,
            passes: job.settings.scale.passes(),
            once_a_step: job.settings.sampler.evaluates_once_a_step(),
            step_times: vec![Vec::new(); workers],
            told: HashSet::new(),
        }
    }

    fn are_several(&self) -> bool {
        self.watches || self.inputs > 1
    }

    /// There are more to do.
    pub fn more(&mut self, inputs: usize) {
        self.inputs += inputs;
    }

    /// What a worker begins to do.
    pub fn stage(&self, worker: usize, text: &'static str) {
        if let Some(bar) = self.workers.get(worker) {
            bar.set_style(style(STAGE));
            bar.set_message(text);
            bar.enable_steady_tick(Duration::from_millis(200));
        }
    }

    fn line(&self, text: &str) {
        // A batch goes on where no one reads any more (`2>&1 | head`, a connection that is gone).
        self.bars.suspend(|| {
            let _ = writeln!(std::io::stderr(), "{text}");
        });
    }

    pub fn note(&self, text: &str) {
        if self.verbosity == Verbosity::Verbose {
            self.line(text);
        }
    }

    pub fn info(&self, text: &str) {
        if self.verbosity > Verbosity::Quiet {
            self.line(text);
        }
    }

    pub fn warning(&self, text: &str) {
        if self.verbosity > Verbosity::Quiet {
            self.line(&format!("warning: {text}"));
        }
    }

    pub fn step(&mut self, worker: usize, step: StepDone) {
        let StepDone {
            done,
            total,
            way,
            seconds,
        } = step;
        if self.first_step {
            self.first_step = false;
            let before = self.start.elapsed().as_secs_f64() - seconds;
            self.note(&format!("first step after {before:.2} s"));
        }
        if let Some(times) = self.step_times.get_mut(worker) {
            times.push(seconds);
        }
        let Some(bar) = self.workers.get(worker) else {
            return;
        };
        match total {
            Some(total) => {
                bar.set_style(style(if self.once_a_step { STEPS } else { EVALUATIONS }));
                bar.set_length(total as u64);
                bar.set_position(done as u64);
                let left = seconds_left(seconds, done, total, self.passes);
                let each = if self.once_a_step { "a step" } else { "each" };
                bar.set_message(format!("{seconds:.2} s {each}, {left:.0} s left"));
            }
            None => {
                bar.set_style(style(WAY));
                bar.set_length(WHOLE_WAY);
                bar.set_position((way * WHOLE_WAY as f64) as u64);
                bar.set_message(format!("{done} evaluations, {seconds:.2} s each"));
            }
        }
    }

    pub fn base_step(&self, worker: usize, done: usize, total: usize, seconds: f64) {
        if let Some(bar) = self.workers.get(worker) {
            bar.set_style(style(BASE_STEPS));
            bar.set_length(total as u64);
            bar.set_position(done as u64);
            let left = (total - done) as f64 * seconds;
            bar.set_message(format!("{seconds:.2} s a step, {left:.0} s left"));
        }
    }

    /// A worker's pass is done: what its evaluations took.
    pub fn denoised(&mut self, worker: usize) {
        let times = self.step_times.get_mut(worker).map(std::mem::take);
        let mut times = times.unwrap_or_default();
        times.sort_by(f64::total_cmp);
        let count = times.len();
        let Some(median) = times.get(count / 2) else {
            return;
        };
        self.note(&if self.once_a_step {
            format!("step {median:.3} s (median of {count})")
        } else {
            format!("{count} evaluations, {median:.3} s each (median)")
        });
    }

    /// # Errors
    /// Standard output is closed.
    pub fn done(&mut self, outcome: &Outcome) -> Result<()> {
        self.files.inc(1);
        let output = outcome.output.as_deref().unwrap_or("-");
        match outcome.status {
            Status::Ok => {
                self.ok += 1;
                // A single result is no news to a script, but a person wants to know where it is.
                let person = !self.json && std::io::stderr().is_terminal();
                if self.are_several() || person || self.verbosity == Verbosity::Verbose {
                    self.info(&format!(
                        "{} -> {output} ({:.1} s)",
                        outcome.input, outcome.seconds
                    ));
                }
            }
            Status::Planned => {}
            Status::Skipped => {
                self.skipped += 1;
                self.note(&format!("{}: {output} is there already", outcome.input));
            }
            Status::Error => {
                let error = outcome.error.as_deref().unwrap_or("unknown");
                self.line(&format!("error: {}", named(&outcome.input, error)));
                self.failures.push((outcome.input.clone(), error.into()));
            }
        }
        self.json_line(outcome)
    }

    /// Whether it was said what became of one.
    pub fn told_of(&self, which: &Which) -> bool {
        self.told.contains(which)
    }

    /// # Errors
    /// Standard output is closed.
    pub fn json_line(&mut self, outcome: &Outcome) -> Result<()> {
        self.told.insert(outcome.which());
        if self.json {
            let text = outcome.json();
            let mut stdout = std::io::stdout().lock();
            writeln!(stdout, "{text}")
                .and_then(|()| stdout.flush())
                .context("cannot write to standard output")?;
        }
        Ok(())
    }

    /// Ends the bars and, for a run of several inputs, sums it up.
    pub fn finish(&self, end: End) {
        for bar in self.workers.iter().chain([&self.files]) {
            bar.finish_and_clear();
        }
        if self.verbosity == Verbosity::Verbose
            && let Some(peak) = peak_memory()
        {
            self.note(&format!("peak memory {:.2} GB", peak as f64 / 1e9));
        }
        if self.are_several() || end == End::Interrupted {
            let left = self
                .inputs
                .saturating_sub(self.ok + self.skipped + self.failures.len());
            let mut text = format!(
                "{} done, {} skipped, {} failed",
                self.ok,
                self.skipped,
                self.failures.len()
            );
            if left > 0 {
                text = format!("{text}, {left} not done");
            }
            if end == End::Interrupted {
                text = format!("interrupted: {text}");
            }
            self.info(&text);
            for (input, error) in &self.failures {
                self.info(&format!("  failed: {}", named(input, error)));
            }
        }
    }

    pub fn failed(&self) -> bool {
        !self.failures.is_empty()
    }
}

/// What the steps after `done` will take, where the last one took `seconds`. A step of the next pass has four times as many positions.
fn seconds_left(seconds: f64, done: usize, total: usize, passes: usize) -> f64 {
    let steps = total / passes;
    let now = (done - 1) / steps;
    let of_pass = |pass: usize| {
        let first = done.max(pass * steps);
        let left = (pass + 1) * steps - first;
        left as f64 * seconds * 4f64.powi((pass - now) as i32)
    };
    (now..passes).map(of_pass).sum()
}

/// An error with the name of its input, once.
fn named(input: &str, error: &str) -> String {
    let error_names_it = ["", "cannot read "]
        .iter()
        .filter_map(|opening| error.strip_prefix(opening))
        .any(|rest| rest.starts_with(input));
    if error_names_it {
        error.to_string()
    } else {
        format!("{input}: {error}")
    }
}

/// The largest resident set of this process so far, in bytes, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_drawn_as_they_are_described() {
        for template in [STAGE, STEPS, BASE_STEPS, EVALUATIONS, WAY] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }

    #[test]
    fn the_steps_of_later_passes_take_four_times_as_long() {
        assert_eq!(seconds_left(2.0, 1, 5, 1), 8.0);
        assert_eq!(seconds_left(2.0, 5, 5, 1), 0.0);
        // One step of this pass is left, and three of each of the two others.
        assert_eq!(seconds_left(1.0, 2, 9, 3), 1.0 + 3.0 * 4.0 + 3.0 * 16.0);
        assert_eq!(seconds_left(1.0, 3, 9, 3), 3.0 * 4.0 + 3.0 * 16.0);
        assert_eq!(seconds_left(4.0, 4, 9, 3), 2.0 * 4.0 + 3.0 * 16.0);
        assert_eq!(seconds_left(16.0, 9, 9, 3), 0.0);
    }
}
