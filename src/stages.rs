//! The three stages of a run, each in threads of its own so that reading, computing and writing overlap:
//! files to items, items to upscaled pictures, pictures to files.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use sd_upscale::input::{self, Loaded};
use sd_upscale::latents::{LatentScale, Latents, SDXL_NOTE};
use sd_upscale::metadata::Metadata;
use sd_upscale::picture::Picture;
use sd_upscale::plan::{Claims, Kind, Source, Target, Task};
use sd_upscale::{Event, LowRes, Rgb, Settings, Upscaler};
use sd_upscale::{alpha, color, encode, output, resize, settings};

use crate::cli::{ColorFix, Job};
use crate::report::{Message, Outcome, Status};

/// Where a result goes.
#[derive(Clone, Debug)]
pub enum Place {
    File(PathBuf),
    Stdout,
}

impl Place {
    fn name(&self) -> String {
        match self {
            Place::File(path) => path.display().to_string(),
            Place::Stdout => "-".into(),
        }
    }
}

/// What an item was read from.
pub enum Content {
    Picture(Picture),
    /// One of a file's latents, as the file holds them.
    Latents(Latents),
}

/// One picture to make.
pub struct Item {
    pub source: Source,
    pub content: Content,
    pub settings: Settings,
    pub kind: Kind,
    pub place: Place,
    /// Where the decoded input goes, where it was asked for.
    pub low_res: Option<PathBuf>,
    /// Whether its file holds others.
    pub of_many: bool,
    /// Of latents: decided, and for all of a file alike.
    latent_scale: LatentScale,
    pub start: Instant,
}

impl Item {
    /// What a batch must have in common: kind, size and all settings.
    fn shares_a_batch(&self, other: &Self) -> bool {
        let size = |item: &Self| match &item.content {
            Content::Picture(picture) => (true, picture.width, picture.height),
            Content::Latents(latents) => (false, latents.width, latents.height),
        };
        size(self) == size(other) && self.settings == other.settings
    }

    fn outcome(&self, seed: u64, status: Status, error: Option<String>) -> Outcome {
        Outcome {
            input: self.source.to_string(),
            output: Some(self.place.name()),
            status,
            error,
            size: None,
            seed,
            steps: self.settings.steps,
            seconds: self.start.elapsed().as_secs_f64(),
        }
    }
}

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
        let skips = self.job.skip_existing && output::is_complete(path);
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
            Source::Path(path) => input::read_path(path, &self.job.limits)?,
            Source::Stdin => input::read_stdin(&self.job.limits)?,
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
            if let Some(item) = self.item(task, start, content, number)? {
                items.push(Item {
                    latent_scale,
                    ..item
                });
            }
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
        if let Kind::Image(format) = kind {
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
            latent_scale: self.job.latent_scale,
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
fn low_res_path(output: &Path, kind: Kind) -> PathBuf {
    let stem = output.file_stem().unwrap_or_default().to_string_lossy();
    let extension = match kind {
        Kind::Image(format) => format.extension(),
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

/// A result on its way to its file.
pub struct Finished {
    item: Item,
    result: Made,
    low_res: Option<Rgb>,
    /// The VAE's, to write raw latents.
    scaling_factor: f32,
}

enum Made {
    Picture(Rgb),
    /// (4, h, w), scaled.
    Latents {
        values: Vec<f32>,
        height: usize,
        width: usize,
    },
}

/// Takes groups of items until there are no more, and hands on what became of them. `load` makes the networks
/// when the first group is there.
pub fn compute(
    job: &Job,
    number: usize,
    load: impl Fn(bool) -> Result<Upscaler>,
    groups: &Arc<Mutex<Receiver<Vec<Item>>>>,
    finished: &SyncSender<Finished>,
    messages: &Sender<Message>,
) {
    let mut upscaler = None;
    loop {
        let next = groups.lock().map(|groups| groups.recv());
        let Ok(Ok(mut group)) = next else {
            return;
        };
        for item in &mut group {
            item.start = Instant::now();
        }
        let mut loaded = match upscaler.take() {
            Some(upscaler) => upscaler,
            None => match load(group.len() > 1 || group.iter().any(|item| item.of_many)) {
                Ok(upscaler) => upscaler,
                Err(error) => {
                    let _ = messages.send(Message::Fatal(error));
                    return;
                }
            },
        };
        let work = std::panic::AssertUnwindSafe(|| {
            let worker = Worker {
                job,
                number,
                messages,
            };
            let results = worker.run(&mut loaded, group);
            (loaded, results)
        });
        match std::panic::catch_unwind(work) {
            Ok((loaded, results)) => {
                upscaler = Some(loaded);
                for result in results {
                    let sent = match result {
                        Ok(result) => finished.send(result).is_ok(),
                        Err(outcome) => messages.send(Message::Done(*outcome)).is_ok(),
                    };
                    if !sent {
                        return;
                    }
                }
            }
            Err(_) => {
                let error =
                    anyhow!("the program has a fault (see the message above); please report it");
                let _ = messages.send(Message::Fatal(error));
                return;
            }
        }
    }
}

struct Worker<'a> {
    job: &'a Job,
    number: usize,
    messages: &'a Sender<Message>,
}

type Results = Vec<Result<Finished, Box<Outcome>>>;

impl Worker<'_> {
    /// A batch that fails as a whole is done again one by one, so that one bad input fails alone.
    fn run(&self, upscaler: &mut Upscaler, group: Vec<Item>) -> Results {
        let group: Vec<Item> = group
            .into_iter()
            .map(|item| Self::scaled(upscaler, item))
            .collect();
        let made = self.make(upscaler, &group.iter().collect::<Vec<_>>());
        match made {
            Ok(made) => group
                .into_iter()
                .zip(made)
                .map(|(item, (result, low_res))| Ok(self.finished(upscaler, item, result, low_res)))
                .collect(),
            Err(error) if group.len() == 1 => group
                .into_iter()
                .map(|item| Err(self.failure(&item, &error)))
                .collect(),
            Err(_) => group
                .into_iter()
                .map(|item| match self.make(upscaler, &[&item]) {
                    Ok(mut made) => {
                        let (result, low_res) = made.remove(0);
                        Ok(self.finished(upscaler, item, result, low_res))
                    }
                    Err(error) => Err(self.failure(&item, &error)),
                })
                .collect(),
        }
    }

    fn failure(&self, item: &Item, error: &anyhow::Error) -> Box<Outcome> {
        let seed = self.job.settings.seed;
        Box::new(item.outcome(seed, Status::Error, Some(format!("{error:#}"))))
    }

    fn finished(
        &self,
        upscaler: &Upscaler,
        item: Item,
        result: Made,
        low_res: Option<Rgb>,
    ) -> Finished {
        Finished {
            item,
            result,
            low_res,
            scaling_factor: upscaler.vae_config().scaling_factor as f32,
        }
    }

    /// Latents in the UNet's scale, whatever the file's.
    fn scaled(upscaler: &Upscaler, mut item: Item) -> Item {
        if let Content::Latents(latents) = item.content {
            let factor = upscaler.vae_config().scaling_factor as f32;
            let (latents, _) = latents.into_scaled(item.latent_scale, factor);
            item.content = Content::Latents(latents);
        }
        item
    }

    fn make(&self, upscaler: &mut Upscaler, group: &[&Item]) -> Result<Vec<(Made, Option<Rgb>)>> {
        let Some(first) = group.first() else {
            return Ok(Vec::new());
        };
        let inputs: Vec<LowRes> = group
            .iter()
            .map(|item| low_res(&item.content))
            .collect::<Result<_>>()?;
        let name = first.source.to_string();
        let mut on_event = |event| self.on_event(&name, event);
        let upscaled = upscaler.upscale(&inputs, &first.settings, &mut on_event)?;
        let mut results = Vec::with_capacity(group.len());
        for ((item, upscaled), input) in group.iter().zip(upscaled).zip(&inputs) {
            let result = match item.kind {
                Kind::Image(_) => Made::Picture(upscaler.decode(&upscaled, &mut on_event)?),
                Kind::Safetensors | Kind::ComfyLatent => {
                    let latents = upscaled.latents()?;
                    let (_, _, height, width) = latents.dims4()?;
                    Made::Latents {
                        values: latents.flatten_all()?.to_vec1()?,
                        height,
                        width,
                    }
                }
            };
            let low_res = match item.low_res {
                Some(_) => Some(upscaler.decode_low_res(input, &mut on_event)?),
                None => None,
            };
            results.push((result, low_res));
        }
        Ok(results)
    }

    fn on_event(&self, name: &str, event: Event) -> Result<()> {
        let worker = self.number;
        let message = match event {
            Event::Loading(stage) => {
                Message::Note(format!("{name}: reading the {} weights", stage.name()))
            }
            Event::Step {
                done,
                total,
                seconds,
            } => Message::Step {
                worker,
                done,
                total,
                seconds,
            },
            Event::Finished { stage, seconds } => {
                Message::Note(format!("{name}: {} {seconds:.2} s", stage.name()))
            }
            Event::Warning(text) => Message::Warning(format!("{name}: {text}")),
        };
        if self.messages.send(message).is_err() {
            bail!("the run has ended");
        }
        Ok(())
    }
}

/// What the pipeline takes. Under transparent pixels lies whatever the program that saved the picture left there:
/// it is replaced by the colours of the edges, or it would bleed into them.
fn low_res(content: &Content) -> Result<LowRes> {
    match content {
        Content::Picture(picture) => {
            let (width, height) = (picture.width, picture.height);
            match &picture.alpha {
                None => LowRes::image(width, height, &picture.rgb),
                Some(alpha) => {
                    let mut rgb = picture.rgb.clone();
                    alpha::bleed(&mut rgb, alpha, width, height);
                    LowRes::image(width, height, &rgb)
                }
            }
        }
        Content::Latents(latents) => {
            LowRes::latents(latents.width, latents.height, latents.data.clone())
        }
    }
}

/// Encodes and writes until there is nothing more. `writing` is held while a file is written.
pub fn write(
    job: &Job,
    finished: Receiver<Finished>,
    writing: &Mutex<()>,
    messages: &Sender<Message>,
) {
    for mut result in finished {
        let written = write_one(job, &mut result, writing, messages);
        let (status, error) = match &written {
            Ok(_) => (Status::Ok, None),
            Err(error) => (Status::Error, Some(format!("{error:#}"))),
        };
        let seed = job.settings.seed;
        let outcome = Outcome {
            size: written.ok(),
            ..result.item.outcome(seed, status, error)
        };
        if messages.send(Message::Done(outcome)).is_err() {
            return;
        }
    }
}

/// The size of what was written: pixels, or latent positions.
fn write_one(
    job: &Job,
    finished: &mut Finished,
    writing: &Mutex<()>,
    messages: &Sender<Message>,
) -> Result<(usize, usize)> {
    let low_res = finished.low_res.take();
    let item = &mut finished.item;
    let (size, bytes) = match &mut finished.result {
        Made::Picture(rgb) => {
            let Kind::Image(format) = item.kind else {
                bail!("a picture cannot be written as latents");
            };
            let size = (rgb.width, rgb.height);
            let picture = picture(job, item, rgb)?;
            let encoded = encode::encode(&picture, format, job.quality)
                .with_context(|| item.source.to_string())?;
            for warning in encoded.warnings {
                let _ = messages.send(Message::Warning(format!("{}: {warning}", item.source)));
            }
            (size, encoded.bytes)
        }
        Made::Latents {
            values,
            height,
            width,
        } => {
            let latents = Latents::from_scaled(std::mem::take(values), 1, *height, *width);
            let metadata = latents_metadata(job, item, (*width, *height));
            let bytes = match item.kind {
                Kind::ComfyLatent => latents.to_comfy(finished.scaling_factor, &metadata)?,
                _ => latents.to_safetensors(&metadata)?,
            };
            ((*width, *height), bytes)
        }
    };
    let _writing = writing.lock();
    match &item.place {
        Place::File(path) => {
            write_file(path, &bytes)?;
            if let (Some(path), Some(rgb)) = (&item.low_res, low_res) {
                let picture = Picture::from_rgb(rgb.width, rgb.height, rgb.values);
                let format = match item.kind {
                    Kind::Image(format) => format,
                    _ => sd_upscale::picture::Format::Png,
                };
                write_file(path, &encode::encode(&picture, format, job.quality)?.bytes)?;
            }
        }
        Place::Stdout => {
            let mut stdout = std::io::stdout().lock();
            stdout
                .write_all(&bytes)
                .and_then(|()| stdout.flush())
                .context("cannot write to standard output")?;
        }
    }
    Ok(size)
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(folder) = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
    {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot create the folder {}", folder.display()))?;
    }
    output::write(path, bytes)
}

/// The upscaled picture with what the input had besides colour: alpha, depth, greyness, metadata.
fn picture(job: &Job, item: &mut Item, rgb: &mut Rgb) -> Result<Picture> {
    let (width, height) = (rgb.width, rgb.height);
    let mut made = Picture::from_rgb(width, height, std::mem::take(&mut rgb.values));
    match &mut item.content {
        Content::Picture(low) => {
            if job.color_fix != ColorFix::None {
                let reference = resize::double(&low.rgb, low.width, low.height, 3);
                match job.color_fix {
                    ColorFix::Adain => color::adain(&mut made.rgb, &reference),
                    _ => color::wavelet(&mut made.rgb, &reference, width, height),
                }
            }
            made.alpha = low
                .alpha
                .as_ref()
                .map(|alpha| alpha::double(alpha, low.width, low.height));
            made.gray = low.gray;
            made.depth = low.depth;
            made.metadata = std::mem::take(&mut low.metadata);
        }
        Content::Latents(latents) => made.metadata = latents.image_metadata(),
    }
    match job.strip {
        true => made.metadata = Metadata::default(),
        false => {
            let settings = written_settings(job, &item.settings, (width, height));
            made.metadata.add_settings(&settings);
        }
    }
    Ok(made)
}

/// The settings in the words that viewers of A1111's pictures know.
fn written_settings(
    job: &Job,
    settings: &Settings,
    (width, height): (usize, usize),
) -> settings::Settings {
    let schedule = match settings.schedule {
        sd_upscale::sampler::Schedule::Karras => "Karras",
        sd_upscale::sampler::Schedule::LogLinear => "Log-linear",
    };
    let model = Path::new(&job.model).file_name().unwrap_or_default();
    let fields = [
        ("Steps", settings.steps.to_string()),
        ("Sampler", "Euler".into()),
        ("Schedule type", schedule.into()),
        ("CFG scale", settings.guidance.to_string()),
        ("Seed", settings.seed.to_string()),
        ("Size", format!("{width}x{height}")),
        ("Model", model.to_string_lossy().into_owned()),
        (
            "Version",
            concat!("sd-upscale ", env!("CARGO_PKG_VERSION")).into(),
        ),
    ];
    settings::Settings {
        prompt: settings.prompt.clone(),
        negative_prompt: if settings.guidance > 1.0 {
            settings.negative_prompt.clone()
        } else {
            String::new()
        },
        fields: fields.map(|(key, value)| (key.to_string(), value)).into(),
    }
}

fn latents_metadata(
    job: &Job,
    item: &Item,
    (width, height): (usize, usize),
) -> BTreeMap<String, String> {
    let mut metadata = BTreeMap::new();
    if job.strip {
        return metadata;
    }
    if let Content::Latents(latents) = &item.content {
        metadata.extend(latents.metadata.clone());
    }
    let written = written_settings(job, &item.settings, (width, height));
    metadata.insert("parameters".into(), written.to_parameters());
    for (key, value) in [
        ("seed", item.settings.seed.to_string()),
        ("steps", item.settings.steps.to_string()),
        ("guidance", item.settings.guidance.to_string()),
        ("schedule", item.settings.schedule.name().to_string()),
        ("model", job.model.clone()),
    ] {
        metadata.insert(format!("sd_upscale.{key}"), value);
    }
    metadata
}
