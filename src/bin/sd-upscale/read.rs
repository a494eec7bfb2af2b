//! Files to items: what is to be made of each input, and where it goes.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, SyncSender};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use sd_upscale::Settings;
use sd_upscale::files::{self, Loaded};
use sd_upscale::latents::{LatentScale, Latents, SDXL_NOTE, Scale};
use sd_upscale::metadata::{FoundPrompt, Metadata};
use sd_upscale::picture::Format;
use sd_upscale::plan::{Claims, Numbered, Source, Target, Task, Written};

use crate::args::{ColorFix, PromptFrom};
use crate::existing;
use crate::item::{Content, Item, LowResPlace, Place, Size, picture_format};
use crate::job::Job;
use crate::model::{Facts, Model, NoModel};
use crate::open_files::OpenFiles;
use crate::preview::{self, Preview};
use crate::prompts::prompt_in;
use crate::report::{Message, Outcome, Status};
use crate::stated::written_settings;
use crate::threads::guarded;
use crate::watch::Watch;

/// Reads the inputs and hands them on in groups of up to `job.batch` that can be computed together.
pub fn read(
    job: &Job,
    model: &Model,
    tasks: Vec<Task>,
    claims: Claims,
    groups: SyncSender<Vec<Item>>,
    files: &Arc<OpenFiles>,
    messages: &Sender<Message>,
) {
    let mut reader = Reader {
        job,
        model,
        open_files: files,
        facts: None,
        claims,
        said: HashSet::new(),
        tried: HashSet::new(),
        messages,
    };
    let mut groups = Groups {
        most: job.batch,
        group: Vec::new(),
        sender: groups,
    };
    // Where no one is there to take them, or no model is there, the run has ended.
    let _ = if job.watch {
        reader.watch(tasks, &mut groups)
    } else {
        reader.all(&tasks, &mut groups)
    };
}

/// Items that go through the networks together, as they are read.
struct Groups {
    most: usize,
    group: Vec<Item>,
    sender: SyncSender<Vec<Item>>,
}

/// Nothing more need be read.
struct Ended;

impl Groups {
    fn push(&mut self, item: Item) -> Result<(), Ended> {
        let first = self.group.first();
        if first.is_some_and(|first| !first.shares_a_batch(&item)) {
            self.flush()?;
        }
        self.group.push(item);
        // A full group does not wait for the next file, which may be a pipe.
        if self.group.len() >= self.most {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Ended> {
        let group = std::mem::take(&mut self.group);
        if group.is_empty() {
            return Ok(());
        }
        self.sender.send(group).map_err(|_| Ended)
    }
}

struct Reader<'a> {
    job: &'a Job,
    model: &'a Model,
    /// Those of the run.
    open_files: &'a Arc<OpenFiles>,
    /// Of the model, once they were asked for: what was planned for one input is known for the next of its size.
    facts: Option<Facts>,
    claims: Claims,
    /// What was said once and is not said again.
    said: HashSet<&'static str>,
    /// Output folders that can be written to.
    tried: HashSet<PathBuf>,
    messages: &'a Sender<Message>,
}

impl Reader<'_> {
    /// Reads the inputs, and hands on the last of them.
    fn all(&mut self, tasks: &[Task], groups: &mut Groups) -> Result<(), Ended> {
        for task in tasks {
            let start = Instant::now();
            match guarded(|| self.items(task, start)).flatten() {
                Ok(items) => items.into_iter().try_for_each(|item| groups.push(item))?,
                Err(error) if error.is::<NoModel>() => {
                    self.say(Message::Fatal(error));
                    return Err(Ended);
                }
                Err(error) => self.failed(task, start, error),
            }
        }
        groups.flush()
    }

    /// The same of what is there, and of what comes, for ever.
    fn watch(&mut self, mut tasks: Vec<Task>, groups: &mut Groups) -> Result<(), Ended> {
        let mut watch = Watch::of(self.job);
        self.say(Message::Info(
            "watching for new files until interrupted".into(),
        ));
        loop {
            let ready = watch.ready(tasks);
            if !ready.is_empty() {
                let named = |task: &Task| (task.source.to_string(), task.variant);
                self.say(Message::Came(ready.iter().map(named).collect()));
                self.all(&ready, groups)?;
            }
            let look = watch.look(&mut self.claims);
            for error in look.errors {
                self.say(Message::Warning(format!("--watch: {error}")));
            }
            tasks = look.tasks;
        }
    }

    fn say(&self, message: Message) {
        let _ = self.messages.send(message);
    }

    fn outcome(&self, task: &Task, start: Instant, status: Status) -> Outcome {
        Outcome {
            seconds: start.elapsed().as_secs_f64(),
            ..Outcome::new(self.job, task.source.to_string(), task.variant, status)
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

    /// Whether `path` was finished by an earlier run; then it is reported. `made` is what the file would say of itself if
    /// it were made now.
    fn skips(
        &self,
        task: &Task,
        start: Instant,
        path: &Path,
        expected: Option<Size>,
        made: Option<&Metadata>,
    ) -> bool {
        let skips = self.job.skip_existing && existing::is_done(self.job, path, expected);
        if skips {
            if let Some(change) = made.and_then(|made| existing::change(&task.source, path, made)) {
                self.say(Message::Warning(format!(
                    "{}: {} is kept, but {change}; --overwrite makes it again",
                    task.source,
                    path.display()
                )));
            }
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
        let Contents {
            each,
            scale,
            judgement,
        } = self.contents(&task.source)?;
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

    fn contents(&mut self, source: &Source) -> Result<Contents> {
        let job = self.job;
        if let Some(text) = prompt_of(job, source)? {
            let size = self.base_size()?;
            return Ok(Contents::of_prompt(text, size));
        }
        let loaded = match source {
            Source::Path(path) => files::read_path(path, &job.limits)?,
            _ => files::read_stdin(&job.limits)?,
        };
        Ok(Contents::of(loaded, job.latent_scale))
    }

    /// Of the picture that the base checkpoint makes of a prompt.
    fn base_size(&mut self) -> Result<Size> {
        match self.job.base_size {
            Some(size) => Ok(size),
            None => self.facts()?.base_size(),
        }
    }

    /// Where the name does not depend on the content, a finished file is skipped on its header. Latents files, which may hold
    /// several and are small, are read.
    fn skips_unread(&self, task: &Task, start: Instant) -> bool {
        let (Some(naming), true) = (task.target.naming(), self.job.skip_existing) else {
            return false;
        };
        let path = naming.pattern();
        let settled = !path.to_string_lossy().contains(['{', '}']);
        if !settled || !path.exists() {
            return false;
        }
        if self.job.generate {
            return self.skips_unmade(task, start, &path);
        }
        let Source::Path(input) = &task.source else {
            return self.skips(task, start, &path, None, None);
        };
        let Ok(header) = files::read_header(input) else {
            let read = files::read_path(input, &self.job.limits);
            let latents = matches!(read, Ok(Loaded::Latents(_)));
            return !latents && self.skips(task, start, &path, None, None);
        };
        let expected = Size {
            width: header.width,
            height: header.height,
        }
        .enlarged(self.job.settings.scale);
        // One whose prompt cannot be had is kept without a word of what changed.
        let made = self.made(task, header.metadata, expected).ok().flatten();
        self.skips(task, start, &path, Some(expected), made.as_ref())
    }

    /// The same of a picture that is made of a prompt: of the size that was asked for, or any where none was.
    fn skips_unmade(&self, task: &Task, start: Instant, path: &Path) -> bool {
        let scale = self.job.settings.scale;
        let expected = self.job.base_size.map(|size| size.enlarged(scale));
        let found = || {
            let header = files::read_header(path).ok()?;
            Some(Size {
                width: header.width,
                height: header.height,
            })
        };
        let text = prompt_of(self.job, &task.source).ok().flatten();
        let made = expected.or_else(found).zip(text).and_then(|(size, text)| {
            let settings = Settings {
                prompt: text,
                ..self.job.settings_by(task.variant)
            };
            self.made_by(Metadata::default(), &settings, size)
        });
        self.skips(task, start, path, expected, made.as_ref())
    }

    /// What the result of a picture with `metadata` would say of itself; nothing where metadata is stripped.
    fn made(&self, task: &Task, metadata: Metadata, size: Size) -> Result<Option<Metadata>> {
        let own = self.own_prompt(task, metadata.prompt())?;
        let settings = self.settings(task, own, None)?;
        Ok(self.made_by(metadata, &settings, size))
    }

    fn made_by(&self, mut metadata: Metadata, settings: &Settings, size: Size) -> Option<Metadata> {
        if self.job.strip {
            return None;
        }
        metadata.add_settings(&written_settings(self.job, settings, size));
        Some(metadata)
    }

    fn warn_of(&self, task: &Task, content: &Content) {
        let warnings = match content {
            Content::Prompt { .. } => return,
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
        let size = self.facts()?.result_size(&content)?;
        let (kind, place) = kind_and_place(&task.target, size, numbered)?;
        fits(size, kind)?;
        if let Place::File(path) = &place {
            self.claim(task, path)?;
            if self.skips(task, start, path, Some(size), None) {
                return Ok(None);
            }
            self.try_folder(path)?;
        }
        self.plan_memory(task, &content, kind)?;
        self.warn_of_idle_options(&content, kind);
        Ok(Some(Item {
            low_res: self.low_res(task, &content, kind, &place)?,
            compare: self.compare(task, size, kind, &place)?,
            preview: self.preview(task, kind, &place),
            settings: self.told_settings(task, &content, numbered)?,
            source: task.source.clone(),
            content,
            kind,
            place,
            expected: size,
            of_many: numbered.is_some(),
            evaluations: None,
            scale,
            start,
        }))
    }

    /// Whether the output's folder can be written to, asked once a folder: better now than after the computing.
    fn try_folder(&mut self, path: &Path) -> Result<()> {
        let folder = path.parent().unwrap_or(path).to_path_buf();
        if !self.tried.contains(&folder) {
            files::try_write(path)?;
            self.tried.insert(folder);
        }
        Ok(())
    }

    /// Says of options that this input has no use for, once a run.
    fn warn_of_idle_options(&mut self, content: &Content, kind: Written) {
        let job = self.job;
        let image = matches!(content, Content::Picture(_));
        let latents = matches!(content, Content::Latents(_));
        let lossy = matches!(kind, Written::Image(Format::Jpeg | Format::WebP));
        let fixes = job.color_fix != ColorFix::None;
        for (idle, text) in [
            (
                fixes && latents,
                "--color-fix has no effect on latents: there is no picture to take the colours from",
            ),
            (
                fixes && image && !matches!(kind, Written::Image(_)),
                "--color-fix has no effect where latents are written: they are not decoded",
            ),
            (
                job.compare && !matches!(kind, Written::Image(_)),
                "--compare has no effect where latents are written: they are not decoded",
            ),
            (
                job.save_low_res && image,
                "--save-low-res has no effect on images: the input is the low-res picture",
            ),
            (
                job.latent_scale != LatentScale::Auto && image,
                "--latent-scale has no effect on images",
            ),
            (
                job.quality.is_some() && !lossy,
                "--quality has no effect: it is JPEG's and WebP's alone",
            ),
        ] {
            if idle && self.said.insert(text) {
                self.say(Message::Warning(text.into()));
            }
        }
    }

    /// What is known of the model.
    ///
    /// # Errors
    /// [`NoModel`].
    fn facts(&mut self) -> Result<&mut Facts> {
        match &mut self.facts {
            Some(facts) => Ok(facts),
            none => Ok(none.insert(self.model.facts()?)),
        }
    }

    /// Plans what it takes of memory before the work, and says so. What a card has too little for, the CPU does.
    fn plan_memory(&mut self, task: &Task, content: &Content, kind: Written) -> Result<()> {
        let job = self.job;
        let settings = job.settings_by(task.variant);
        match self.facts()?.plan(content, &settings, kind) {
            Ok(plans) => {
                for plan in plans {
                    self.say(Message::Note(format!("{}: {plan}", task.source)));
                }
                Ok(())
            }
            Err(error) if self.model.device().is_cpu() => Err(error),
            Err(error) => {
                self.say(Message::Note(format!("{}: {error:#}", task.source)));
                Ok(())
            }
        }
    }

    /// Takes an output's path for this input alone.
    fn claim(&mut self, task: &Task, path: &Path) -> Result<()> {
        self.claims
            .claim(path, &task.origin())
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Where the decoded input goes, where it was asked for.
    fn low_res(
        &mut self,
        task: &Task,
        content: &Content,
        kind: Written,
        place: &Place,
    ) -> Result<Option<LowResPlace>> {
        let (true, Place::File(output)) = (self.job.save_low_res, place) else {
            return Ok(None);
        };
        if matches!(content, Content::Picture(_)) {
            return Ok(None);
        }
        let picture = beside(output, "low-res", picture_format(kind).extension());
        let latents = match kind {
            Written::Image(_) => None,
            Written::Safetensors | Written::ComfyLatent => {
                Some(beside(output, "low-res", "safetensors"))
            }
        };
        for path in latents.iter().chain([&picture]) {
            self.claim(task, path)?;
        }
        Ok(Some(LowResPlace { picture, latents }))
    }

    /// Where what it was is shown beside the result, where that was asked for and the result is a picture.
    fn compare(
        &mut self,
        task: &Task,
        size: Size,
        kind: Written,
        place: &Place,
    ) -> Result<Option<PathBuf>> {
        let (true, Place::File(output), Written::Image(format)) = (self.job.compare, place, kind)
        else {
            return Ok(None);
        };
        let both = Size {
            width: 2 * size.width,
            ..size
        };
        fits(both, kind).context("--compare")?;
        let path = beside(output, "compare", format.extension());
        self.claim(task, &path)?;
        Ok(Some(path))
    }

    /// What shows the steps, where it was asked for and there is a place beside the output. A file that is there is left alone.
    fn preview(&mut self, task: &Task, kind: Written, place: &Place) -> Option<Preview> {
        let (true, Place::File(output)) = (self.job.preview, place) else {
            return None;
        };
        let path = beside(output, "preview", picture_format(kind).extension());
        let taken = match self.claims.claim(&path, &task.origin()) {
            Err(conflict) => {
                let path = path.display();
                Some(format!("no preview is written to {path}: {conflict}"))
            }
            Ok(()) => path
                .symlink_metadata()
                .is_ok()
                .then(|| preview::taken(&path)),
        };
        if let Some(text) = taken {
            self.say(Message::Warning(format!("{}: {text}", task.source)));
            return None;
        }
        let format = picture_format(kind);
        Some(Preview::new(path, format, self.open_files))
    }

    /// The run's settings with this input's own prompt where none was given.
    fn settings(
        &self,
        task: &Task,
        found: Option<FoundPrompt>,
        numbered: Option<Numbered>,
    ) -> Result<Settings> {
        let mut settings = self.job.settings_by(task.variant);
        if let Some(embeds) = &self.job.embeds {
            settings.prompt_embeds = Some(embeds.of(task, numbered)?.clone());
            return Ok(settings);
        }
        if let Some(prompt) = self.given_prompt(task) {
            settings.prompt = prompt.to_owned();
        } else if let Some(found) = found.filter(|_| self.uses_a_prompt(&settings)) {
            settings.prompt = found.prompt;
            if settings.negative_prompt.is_empty() && self.job.is_guided(&settings) {
                settings.negative_prompt = found.negative;
            }
        }
        Ok(settings)
    }

    /// The input's own prompt, where `--prompt-from` says; `found` is that of its metadata.
    ///
    /// # Errors
    /// It was to be in a file beside the input, which cannot be read.
    fn own_prompt(&self, task: &Task, found: Option<FoundPrompt>) -> Result<Option<FoundPrompt>> {
        if self.given_prompt(task).is_some() || self.job.embeds.is_some() {
            return Ok(None);
        }
        match self.job.prompt_from {
            PromptFrom::Metadata => Ok(found),
            PromptFrom::None => Ok(None),
            PromptFrom::Sidecar => Ok(Some(FoundPrompt {
                prompt: sidecar(&task.source)?,
                negative: String::new(),
                origin: SIDECAR,
            })),
        }
    }

    /// By `--prompt` or `--prompt-file`.
    fn given_prompt(&self, task: &Task) -> Option<&str> {
        let listed = self.job.prompts.as_ref();
        let listed = listed.and_then(|prompts| prompts.of(task));
        self.job.prompt.as_deref().or(listed)
    }

    fn uses_a_prompt(&self, settings: &Settings) -> bool {
        settings.guidance > 0.0 || self.job.uses_base()
    }

    /// The same, and says where the prompt is the input's.
    fn told_settings(
        &self,
        task: &Task,
        content: &Content,
        numbered: Option<Numbered>,
    ) -> Result<Settings> {
        let found = match content {
            Content::Picture(picture) => picture.metadata.prompt(),
            Content::Latents(latents) => latents.prompt(),
            Content::Prompt { text, .. } => {
                return Ok(Settings {
                    prompt: text.clone(),
                    ..self.job.settings_by(task.variant)
                });
            }
        };
        let found = self.own_prompt(task, found)?;
        let settings = self.job.settings_by(task.variant);
        let used = self.uses_a_prompt(&settings);
        let unasked = |found: &&FoundPrompt| used && found.origin != SIDECAR;
        if let Some(found) = found.as_ref().filter(unasked) {
            self.say(Message::Info(format!(
                "{}: using the prompt of its metadata ({}): \"{}\"",
                task.source,
                found.origin,
                found.in_one_line()
            )));
        }
        let negative = found
            .as_ref()
            .is_some_and(|found| !found.negative.is_empty());
        if negative && used && !self.job.is_guided(&settings) {
            self.say(Message::Info(format!(
                "{}: the negative prompt of its metadata has no effect at guidance {}: give -g a value above 1",
                task.source, settings.guidance
            )));
        }
        self.settings(task, found, numbered)
    }
}

/// What is said of a prompt from a file beside the input, which was asked for.
const SIDECAR: &str = "a file beside it";

/// The prompt in `NAME.txt` beside an input.
///
/// # Errors
/// The input is no file, or there is no such file, or it is no text.
fn sidecar(source: &Source) -> Result<String> {
    let Source::Path(input) = source else {
        bail!("--prompt-from sidecar: there is no file beside {source}; give -p");
    };
    let path = input.with_extension("txt");
    prompt_in(&path).context("--prompt-from sidecar: no prompt for it; write one there, or give -p")
}

/// The words that an input is, where pictures are made of words alone.
///
/// # Errors
/// They cannot be read.
pub fn prompt_of(job: &Job, source: &Source) -> Result<Option<String>> {
    match source {
        Source::Prompt(prompt) => Ok(Some(prompt.text.clone())),
        Source::Path(path) if job.generate => prompt_in(path).map(Some),
        _ => Ok(None),
    }
}

/// `NAME-WHAT.EXT` beside an output.
fn beside(output: &Path, what: &str, extension: &str) -> PathBuf {
    let stem = output.file_stem().unwrap_or_default().to_string_lossy();
    output.with_file_name(format!("{stem}-{what}.{extension}"))
}

fn kind_and_place(
    target: &Target,
    size: Size,
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
            let path = naming.path(size.width as u32, size.height as u32, numbered);
            Ok((naming.kind(), Place::File(path)))
        }
    }
}

/// Whether a picture of this size can be written as `kind`.
pub fn fits(Size { width, height }: Size, kind: Written) -> Result<()> {
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
    fn of_prompt(text: String, size: Size) -> Self {
        Self {
            each: vec![Content::Prompt { text, size }],
            scale: Scale::Scaled,
            judgement: None,
        }
    }

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
