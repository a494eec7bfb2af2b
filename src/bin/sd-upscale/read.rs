//! Files to items: what is to be made of each input, and where it goes.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, SyncSender};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use sd_upscale::Settings;
use sd_upscale::files::{self, Loaded};
use sd_upscale::latents::{LatentScale, Latents, SDXL_NOTE, Scale};
use sd_upscale::plan::{Claims, Numbered, Source, Target, Task, Written};

use crate::item::{Content, Item, Place};
use crate::job::Job;
use crate::report::{Message, Outcome, Status};
use crate::threads::guarded;

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
        match guarded(|| reader.items(&task, start)).flatten() {
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

    fn outcome(&self, task: &Task, start: Instant, status: Status) -> Outcome {
        Outcome {
            seconds: start.elapsed().as_secs_f64(),
            ..Outcome::new(self.job, task.source.to_string(), status)
        }
    }

    fn failed(&self, task: &Task, start: Instant, error: anyhow::Error) {
        let naming = task.target.naming();
        self.say(Message::Done(Outcome {
            output: naming.map(|naming| naming.pattern().display().to_string()),
            error: Some(format!("{error:#}")),
            ..self.outcome(task, start, Status::Error)
        }));
    }

    /// Whether `path` was finished by an earlier run; then it is reported.
    fn skips(&self, task: &Task, start: Instant, path: &Path) -> bool {
        let skips = self.job.skip_existing && files::is_complete(path);
        if skips {
            self.say(Message::Done(Outcome {
                output: Some(path.display().to_string()),
                ..self.outcome(task, start, Status::Skipped)
            }));
        }
        skips
    }

    /// The items of one input; none where all are done already.
    fn items(&mut self, task: &Task, start: Instant) -> Result<Vec<Item>> {
        if self.skips_unread(task, start) {
            return Ok(Vec::new());
        }
        let loaded = match &task.source {
            Source::Path(path) => files::read_path(path, &self.job.limits)?,
            Source::Stdin => files::read_stdin(&self.job.limits)?,
        };
        let Contents {
            each,
            scale,
            judgement,
        } = Contents::of(loaded, self.job.latent_scale);
        if let Some(first) = each.first() {
            self.warn_of(task, first);
        }
        let count = each.len();
        let mut items = Vec::with_capacity(count);
        for (index, content) in each.into_iter().enumerate() {
            let number = index + 1;
            let numbered = (count > 1).then_some(Numbered { number, count });
            items.extend(self.item(task, start, content, scale, numbered)?);
        }
        if let Some(text) = judgement.filter(|_| !items.is_empty()) {
            self.say(Message::Info(format!("{}: {text}", task.source)));
        }
        Ok(items)
    }

    /// Where the name does not depend on the content, a finished file is skipped unread. Latents files may hold
    /// several, which their names count.
    fn skips_unread(&self, task: &Task, start: Instant) -> bool {
        task.target.naming().is_some_and(|naming| {
            let pattern = naming.pattern();
            let settled = !pattern.to_string_lossy().contains(['{', '}']);
            settled && self.skips(task, start, &pattern)
        })
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

    /// What is to be made of one content; none where it is done already.
    fn item(
        &mut self,
        task: &Task,
        start: Instant,
        content: Content,
        scale: Scale,
        numbered: Option<Numbered>,
    ) -> Result<Option<Item>> {
        let size = result_size(&content);
        let (kind, place) = kind_and_place(&task.target, size, numbered)?;
        fits(size, kind)?;
        if let Place::File(path) = &place {
            self.claim(task, path)?;
            if self.skips(task, start, path) {
                return Ok(None);
            }
        }
        Ok(Some(Item {
            low_res: self.low_res(task, &content, kind, &place)?,
            settings: self.settings(task, &content),
            source: task.source.clone(),
            content,
            kind,
            place,
            of_many: numbered.is_some(),
            scale,
            start,
        }))
    }

    /// Takes an output's path for this input alone.
    fn claim(&mut self, task: &Task, path: &Path) -> Result<()> {
        self.claims
            .claim(path, &task.source)
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Where the decoded input goes, where it was asked for.
    fn low_res(
        &mut self,
        task: &Task,
        content: &Content,
        kind: Written,
        place: &Place,
    ) -> Result<Option<PathBuf>> {
        match (place, content) {
            (Place::File(path), Content::Latents(_)) if self.job.save_low_res => {
                let path = low_res_path(path, kind);
                self.claim(task, &path)?;
                Ok(Some(path))
            }
            _ => Ok(None),
        }
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

/// Width and height of the upscaled picture, in pixels. Every latent the tool reads stands for 8 x 8 pixels; models
/// with another factor size their own output.
fn result_size(content: &Content) -> (usize, usize) {
    match content {
        Content::Picture(picture) => (2 * picture.pixels.width, 2 * picture.pixels.height),
        Content::Latents(latents) => (16 * latents.width, 16 * latents.height),
    }
}

fn kind_and_place(
    target: &Target,
    (width, height): (usize, usize),
    numbered: Option<Numbered>,
) -> Result<(Written, Place)> {
    match target {
        Target::Stdout(kind) => {
            ensure!(
                numbered.is_none(),
                "it holds {} latents, and standard output takes one result: give -o a folder or a file name, which is then numbered",
                numbered.map_or(0, |numbered| numbered.count)
            );
            Ok((*kind, Place::Stdout))
        }
        Target::File(naming) => {
            let path = naming.path(width as u32, height as u32, numbered);
            Ok((naming.kind(), Place::File(path)))
        }
    }
}

/// Whether a picture of this size can be written as `kind`.
fn fits((width, height): (usize, usize), kind: Written) -> Result<()> {
    if let Written::Image(format) = kind {
        ensure!(
            width.max(height) <= format.max_side(),
            "the result would be {width}x{height}, and {} files end at {} pixels a side: choose png or tif",
            format.name(),
            format.max_side()
        );
    }
    Ok(())
}

/// What a file holds.
struct Contents {
    each: Vec<Content>,
    /// Of latents, for all of them alike.
    scale: Scale,
    /// A sentence on the scale, where it was judged or looks wrong.
    judgement: Option<String>,
}

impl Contents {
    fn of(loaded: Loaded, choice: LatentScale) -> Self {
        match loaded {
            Loaded::Picture(picture) => Self {
                each: vec![Content::Picture(picture)],
                scale: Scale::Scaled,
                judgement: None,
            },
            Loaded::Latents(latents) => {
                let (scale, judgement) = latents.scale(choice);
                Self {
                    each: one_each(latents).map(Content::Latents).collect(),
                    scale,
                    judgement,
                }
            }
        }
    }
}

/// The latents of a batch, each by itself.
fn one_each(batch: Latents) -> impl Iterator<Item = Latents> {
    let size = batch.data.len() / batch.batch;
    (0..batch.batch).map(move |i| Latents {
        data: batch.data[i * size..][..size].to_vec(),
        batch: 1,
        metadata: batch.metadata.clone(),
        warnings: batch.warnings.clone(),
        ..batch
    })
}
