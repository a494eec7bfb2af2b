//! Items to upscaled pictures, one thread a device.

use std::sync::mpsc::{Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Result, bail};
use sd_upscale::latents::Scale;
use sd_upscale::picture::alpha;
use sd_upscale::plan::Written;
use sd_upscale::{Event, LowRes, Pixels, Stage, Upscaler};

use crate::existing;
use crate::item::{Content, Finished, Item, LatentForm, Made, Place, Upscaled};
use crate::job::Job;
use crate::report::{Message, Outcome, Status};
use crate::threads::guarded;

/// Takes groups of items until there are no more, and hands on what became of them. `load` makes the networks
/// when the first group is there; it is told whether more than one picture is to be made with them.
pub fn compute(
    job: &Job,
    number: usize,
    load: impl Fn(bool) -> Result<Upscaler>,
    groups: &Arc<Mutex<Receiver<Vec<Item>>>>,
    finished: &SyncSender<Finished>,
    messages: &Sender<Message>,
) {
    let worker = Worker {
        job,
        number,
        messages,
    };
    let mut loaded = None;
    while let Some(group) = next(groups) {
        let mut group = worker.without_done(group);
        for item in &mut group {
            item.start = Instant::now();
        }
        if group.is_empty() {
            continue;
        }
        let many = group.len() > 1 || group.iter().any(|item| item.of_many);
        let upscaler = loaded
            .take()
            .map_or_else(|| guarded(|| load(many)).flatten(), Ok);
        let upscaler = match upscaler {
            Ok(upscaler) => upscaler,
            Err(error) => {
                let _ = messages.send(Message::Fatal(error));
                return;
            }
        };
        let (upscaler, results) = worker.guarded(upscaler, group);
        loaded = upscaler;
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
}

/// The next group; none where there are no more.
fn next(groups: &Mutex<Receiver<Vec<Item>>>) -> Option<Vec<Item>> {
    groups.lock().ok()?.recv().ok()
}

struct Worker<'a> {
    job: &'a Job,
    number: usize,
    messages: &'a Sender<Message>,
}

type Results = Vec<Result<Finished, Box<Outcome>>>;

impl Worker<'_> {
    /// The group without what another run finished since it was read: two that work into one folder share the work.
    fn without_done(&self, group: Vec<Item>) -> Vec<Item> {
        let done = |item: &Item| match &item.place {
            Place::File(path) => existing::is_done(self.job, path, Some(item.expected)),
            Place::Stdout => false,
        };
        let (done, left): (Vec<Item>, Vec<Item>) = group
            .into_iter()
            .partition(|item| self.job.skip_existing && done(item));
        for item in done {
            let _ = self
                .messages
                .send(Message::Done(item.outcome(self.job, Status::Skipped)));
        }
        left
    }

    /// [`Self::run`], where a panic fails the group and costs the networks, which are loaded again for the next.
    fn guarded(&self, mut upscaler: Upscaler, group: Vec<Item>) -> (Option<Upscaler>, Results) {
        let failures: Vec<Outcome> = group
            .iter()
            .map(|item| item.outcome(self.job, Status::Error))
            .collect();
        let done = guarded(|| {
            let results = self.run(&mut upscaler, group);
            (upscaler, results)
        });
        match done {
            Ok((upscaler, results)) => (Some(upscaler), results),
            Err(error) => {
                let failed = |outcome| {
                    Err(Box::new(Outcome {
                        error: Some(format!("{error:#}")),
                        ..outcome
                    }))
                };
                (None, failures.into_iter().map(failed).collect())
            }
        }
    }

    /// A batch that fails as a whole is done again one by one, so that one bad input fails alone.
    fn run(&self, upscaler: &mut Upscaler, group: Vec<Item>) -> Results {
        let group: Vec<Item> = group
            .into_iter()
            .map(|item| scaled(upscaler, item))
            .collect();
        match self.upscale(upscaler, &group.iter().collect::<Vec<_>>()) {
            Ok(upscaled) => group
                .into_iter()
                .zip(upscaled)
                .map(|(item, upscaled)| Ok(finished(upscaler, item, upscaled)))
                .collect(),
            Err(error) if group.len() == 1 => group
                .into_iter()
                .map(|item| Err(self.failure(&item, &error)))
                .collect(),
            Err(_) => group
                .into_iter()
                .flat_map(|item| self.run(upscaler, vec![item]))
                .collect(),
        }
    }

    fn failure(&self, item: &Item, error: &anyhow::Error) -> Box<Outcome> {
        Box::new(Outcome {
            error: Some(format!("{error:#}")),
            ..item.outcome(self.job, Status::Error)
        })
    }

    /// One result an item, in their order.
    fn upscale(&self, upscaler: &mut Upscaler, group: &[&Item]) -> Result<Vec<Upscaled>> {
        let Some(first) = group.first() else {
            return Ok(Vec::new());
        };
        let inputs: Vec<LowRes> = group
            .iter()
            .map(|item| low_res(&item.content))
            .collect::<Result<_>>()?;
        let name = first.source.to_string();
        let mut on_event = |event| self.on_event(&name, event);
        let latents = upscaler.upscale(&inputs, &first.settings, &mut on_event)?;
        let mut results = Vec::with_capacity(group.len());
        for ((item, latents), input) in group.iter().zip(latents).zip(&inputs) {
            let result = match item.kind {
                Written::Image(_) => Made::Picture(upscaler.decode(&latents, &mut on_event)?),
                Written::Safetensors | Written::ComfyLatent => {
                    let latents = latents.latents()?;
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
            results.push(Upscaled { result, low_res });
        }
        for note in upscaler.notes() {
            self.say(Message::Note(note))?;
        }
        Ok(results)
    }

    fn on_event(&self, name: &str, event: Event) -> Result<()> {
        match event {
            Event::Started(stage) => self.say(Message::Stage {
                worker: self.number,
                text: doing(stage),
            }),
            Event::Loading(stage) => {
                self.say(Message::Stage {
                    worker: self.number,
                    text: loading(stage),
                })?;
                let stage = stage.name();
                self.say(Message::Note(format!(
                    "{name}: reading the {stage} weights"
                )))
            }
            Event::Step {
                done,
                total,
                seconds,
            } => self.say(Message::Step {
                worker: self.number,
                done,
                total,
                seconds,
            }),
            Event::Finished { stage, seconds } => {
                let stage = stage.name();
                self.say(Message::Note(format!("{name}: {stage} {seconds:.3} s")))
            }
            Event::Warning(text) => self.say(Message::Warning(format!("{name}: {text}"))),
        }
    }

    fn say(&self, message: Message) -> Result<()> {
        if self.messages.send(message).is_err() {
            bail!("the run has ended");
        }
        Ok(())
    }
}

/// What is shown while a stage goes on.
fn doing(stage: Stage) -> &'static str {
    match stage {
        Stage::Text => "reading the prompt",
        Stage::Encode => "encoding",
        Stage::Denoise => "first step",
        Stage::Decode => "decoding",
    }
}

fn loading(stage: Stage) -> &'static str {
    match stage {
        Stage::Text => "loading the text encoder",
        Stage::Encode => "loading the encoder",
        Stage::Denoise => "loading the UNet",
        Stage::Decode => "loading the decoder",
    }
}

fn finished(upscaler: &Upscaler, item: Item, upscaled: Upscaled) -> Finished {
    Finished {
        item,
        upscaled,
        latents: LatentForm {
            scaling_factor: upscaler.scaling_factor(),
            pixels: upscaler.pixels_per_latent(),
        },
    }
}

/// Latents in the UNet's scale, whatever the file's.
fn scaled(upscaler: &Upscaler, mut item: Item) -> Item {
    if let Content::Latents(latents) = item.content {
        let latents = latents.into_scaled(item.scale, upscaler.scaling_factor());
        item.content = Content::Latents(latents);
        // What they are now: a batch that is done again is not scaled again.
        item.scale = Scale::Scaled;
    }
    item
}

/// What the pipeline takes. Under transparent pixels lies whatever the program that saved the picture left there:
/// it is replaced by the colours of the edges, or it would bleed into them.
fn low_res(content: &Content) -> Result<LowRes> {
    match content {
        Content::Picture(picture) => match &picture.alpha {
            None => LowRes::image(&picture.pixels),
            Some(alpha) => {
                let mut pixels = picture.pixels.clone();
                let Pixels {
                    width,
                    height,
                    values,
                } = &mut pixels;
                alpha::bleed(values, alpha, *width, *height);
                LowRes::image(&pixels)
            }
        },
        Content::Latents(latents) => {
            LowRes::latents(latents.width, latents.height, latents.data.clone())
        }
    }
}
