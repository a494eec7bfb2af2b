//! Files to items: what is to be made of each input, and where it goes.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, SyncSender};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use sd_upscale::Settings;
use sd_upscale::files::{self, Loaded};
use sd_upscale::latents::{LatentScale, Latents, SDXL_NOTE};
use sd_upscale::plan::{Claims, Source, Target, Task, Written};

use crate::item::{Content, Item, Place};
use crate::job::Job;
use crate::report::{Message, Outcome, Status};

/// Reads the inputs and hands them on in groups of up to `job.batch` that can be computed together.
pub fn read(
    job: &Job,
    tasks: Vec<Task>,
    claims: Claims,
    groups: SyncSender<Vec<Item>>,
    messages: &Sender<Message>,
) {
    let mut reader = Reader {
        job,
        claims,
        messages,
    };
    let mut group: Vec<Item> = Vec::new();
    for task in tasks {
        let start = Instant::now();
        match reader.items(&task, start) {
            Ok(items) => {
                for item in items {
                    let fits = group.len() < job.batch
                        && group
                            .first()
                            .is_none_or(|first| first.shares_a_batch(&item));
                    if !fits && groups.send(std::mem::take(&mut group)).is_err() {
                        return;
                    }
                    group.push(item);
                }
            }
            Err(error) => reader.failed(&task, start, error),
        }
    }
    if !group.is_empty() {
        // The receivers are gone only where the run has ended.
        let _ = groups.send(group);
    }
}

struct Reader<'a> {
    job: &'a Job,
    claims: Claims,
    messages: &'a Sender<Message>,
}

impl Reader<'_> {
    fn say(&self, message: Message) {
        let _ = self.messages.send(message);
    }

    fn outcome(&self, task: &Task, start: Instant, place: Option<String>) -> Outcome {
        Outcome {
            input: task.source.to_string(),
            output: place,
            status: Status::Skipped,
            error: None,
            size: None,
            seed: self.job.settings.seed,
            steps: self.job.settings.steps,
            seconds: start.elapsed().as_secs_f64(),
        }
    }

    fn failed(&self, task: &Task, start: Instant, error: anyhow::Error) {
        let naming = task.target.naming();
        let place = naming.map(|naming| naming.pattern().display().to_string());
        self.say(Message::Done(Outcome {
            status: Status::Error,
            error: Some(format!("{error:#}")),
            ..self.outcome(task, start, place)
        }));
    }

    /// Whether `path` was finished by an earlier run; then it is reported.
    fn skips(&self, task: &Task, start: Instant, path: &Path) -> bool {
        let skips = self.job.skip_existing && files::is_complete(path);
        if skips {
            let place = Some(path.display().to_string());
            self.say(Message::Done(self.outcome(task, start, place)));
        }
        skips
    }

    /// The items of one input; none where all are done already.
    fn items(&mut self, task: &Task, start: Instant) -> Result<Vec<Item>> {
        // Where the name does not depend on the content, a finished file is skipped unread. Latents files may
        // hold several, which their names count.
        let naming = task.target.naming();
        if let Some(naming) = naming {
            let pattern = naming.pattern();
            let settled = !pattern.to_string_lossy().contains(['{', '}']);
            if settled && self.skips(task, start, &pattern) {
                return Ok(Vec::new());
            }
        }
        let loaded = match &task.source {
            Source::Path(path) => files::read_path(path, &self.job.limits)?,
            Source::Stdin => files::read_stdin(&self.job.limits)?,
        };
        let mut latent_scale = self.job.latent_scale;
        let mut judgement = None;
        if let Loaded::Latents(latents) = &loaded {
            let (raw, message) = latents.is_raw(latent_scale);
            latent_scale = match raw {
                true => LatentScale::Raw,
                false => LatentScale::Scaled,
            };
            judgement = message;
        }
        let contents = match loaded {
            Loaded::Picture(picture) => vec![Content::Picture(picture)],
            Loaded::Latents(latents) => one_each(latents)
                .into_iter()
                .map(Content::Latents)
                .collect(),
        };
        let count = contents.len();
        let mut items = Vec::with_capacity(count);
        for (index, content) in contents.into_iter().enumerate() {
            let number = (count > 1).then_some((index + 1, count));
            if index == 0 {
                self.warn_of(task, &content);
            }
            items.extend(self.item(task, start, content, number, latent_scale)?);
        }
        if let Some(text) = judgement.filter(|_| !items.is_empty()) {
            self.say(Message::Info(format!("{}: {text}", task.source)));
        }
        Ok(items)
    }

    fn warn_of(&self, task: &Task, content: &Content) {
        let warnings = match content {
            Content::Picture(picture) => &picture.warnings,
            Content::Latents(latents) => {
                self.say(Message::Note(format!("{}: {SDXL_NOTE}", task.source)));
                &latents.warnings
            }
        };
        for warning in warnings {
            self.say(Message::Warning(format!("{}: {warning}", task.source)));
        }
    }

    fn item(
        &mut self,
        task: &Task,
        start: Instant,
        content: Content,
        number: Option<(usize, usize)>,
        latent_scale: LatentScale,
    ) -> Result<Option<Item>> {
        // Every latent the tool reads stands for 8 x 8 pixels; models with another factor size their own output.
        let (width, height) = match &content {
            Content::Picture(picture) => (2 * picture.width, 2 * picture.height),
            Content::Latents(latents) => (16 * latents.width, 16 * latents.height),
        };
        let (kind, place) = match &task.target {
            Target::Stdout(kind) => {
                ensure!(
                    number.is_none(),
                    "it holds {} latents, and standard output takes one result: give -o a folder or a file name, which is then numbered",
                    number.map_or(0, |(_, count)| count)
                );
                (*kind, Place::Stdout)
            }
            Target::File(naming) => {
                let path = naming.path(width as u32, height as u32, number);
                (naming.kind(), Place::File(path))
            }
        };
        if let Written::Image(format) = kind {
            let side = width.max(height);
            ensure!(
                side <= format.max_side(),
                "the result would be {width}x{height}, and {} files end at {} pixels a side: choose png or tif",
                format.name(),
                format.max_side()
            );
        }
        let mut low_res = None;
        if let Place::File(path) = &place {
            self.claims
                .claim(path, &task.source)
                .with_context(|| format!("cannot write {}", path.display()))?;
            if self.skips(task, start, path) {
                return Ok(None);
            }
            if self.job.save_low_res && matches!(content, Content::Latents(_)) {
                let path = low_res_path(path, kind);
                self.claims
                    .claim(&path, &task.source)
                    .with_context(|| format!("cannot write {}", path.display()))?;
                low_res = Some(path);
            }
        }
        Ok(Some(Item {
            settings: self.settings(task, &content),
            source: task.source.clone(),
            content,
            kind,
            place,
            low_res,
            of_many: number.is_some(),
            latent_scale,
            start,
        }))
    }

    /// The run's settings with this input's own prompt where none was given.
    fn settings(&self, task: &Task, content: &Content) -> Settings {
        let mut settings = self.job.settings.clone();
        if let Some(prompt) = &self.job.prompt {
            settings.prompt = prompt.clone();
            return settings;
        }
        let found = match content {
            Content::Picture(picture) => picture.metadata.prompt(),
            Content::Latents(latents) => latents.prompt(),
        };
        if let Some(found) = found.filter(|_| settings.guidance > 0.0) {
            self.say(Message::Info(format!(
                "{}: using the prompt of its metadata ({}): \"{}\"",
                task.source, found.origin, found.prompt
            )));
            settings.prompt = found.prompt;
            if settings.negative_prompt.is_empty() && settings.guidance > 1.0 {
                settings.negative_prompt = found.negative;
            }
        }
        settings
    }
}

/// `NAME-low-res.EXT` beside an output; PNG beside latents.
fn low_res_path(output: &Path, kind: Written) -> PathBuf {
    let stem = output.file_stem().unwrap_or_default().to_string_lossy();
    let extension = match kind {
        Written::Image(format) => format.extension(),
        _ => "png",
    };
    output.with_file_name(format!("{stem}-low-res.{extension}"))
}

/// The latents of a batch, each by itself.
fn one_each(latents: Latents) -> Vec<Latents> {
    if latents.batch == 1 {
        return vec![latents];
    }
    let size = latents.data.len() / latents.batch;
    (0..latents.batch)
        .map(|i| Latents {
            data: latents.data[i * size..][..size].to_vec(),
            batch: 1,
            metadata: latents.metadata.clone(),
            warnings: latents.warnings.clone(),
            ..latents
        })
        .collect()
}
