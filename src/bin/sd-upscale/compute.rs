//! Items to upscaled pictures, one thread a device.

use std::collections::VecDeque;
use std::slice;
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use candle_core::Tensor;
use sd_upscale::latents::Scale;
use sd_upscale::picture::alpha;
use sd_upscale::plan::Written;
use sd_upscale::{Event, LowRes, Pixels, Stage, UpscaledLatents, Upscaler};

use crate::args::ColorFix;
use crate::existing;
use crate::item::{Content, Item, LatentForm, Place, Size};
use crate::job::Job;
use crate::parcel::Outbox;
use crate::report::{Message, Outcome, Status, StepDone};
use crate::threads::guarded;

/// Takes groups of items until there are no more, and hands on what is made of them as it is made. `load` makes the networks
/// when the first group is there; it is told whether more than one picture is to be made with them.
pub fn compute(
    job: &Job,
    number: usize,
    load: impl Fn(bool) -> Result<Upscaler>,
    groups: &Arc<Mutex<Receiver<Vec<Item>>>>,
    outbox: Outbox,
    messages: &Sender<Message>,
) {
    let mut worker = Worker {
        job,
        number,
        messages,
        outbox,
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
        loaded = worker.guarded(upscaler, group.into());
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
    outbox: Outbox,
}

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

    /// [`Self::run`], where a panic fails what is left of the group and costs the networks, which are loaded again for the
    /// next.
    fn guarded(&mut self, mut upscaler: Upscaler, mut left: VecDeque<Item>) -> Option<Upscaler> {
        let done = guarded(|| {
            self.run(&mut upscaler, &mut left);
            upscaler
        });
        done.map_err(|error| {
            let error = format!("{error:#}");
            if self.outbox.is_open() {
                // Where no one is there to take it, the run has ended.
                let _ = self.outbox.close(Err(anyhow!(error.clone())));
            }
            for item in left {
                self.fail(item, error.clone());
            }
        })
        .ok()
    }

    /// Does the items that are `left`, and takes each away as it is handed on or has failed. A batch that fails as a whole is
    /// done again one by one, so that one bad input fails alone.
    fn run(&mut self, upscaler: &mut Upscaler, left: &mut VecDeque<Item>) {
        for item in &mut *left {
            scale(upscaler, item);
        }
        let Some(first) = left.front() else { return };
        let name = first.source.to_string();
        let (batch, alone) = (left.len(), left.len() == 1);
        let group = &*left.make_contiguous();
        match self.upscale(upscaler, &name, group) {
            Ok(latents) => self.hand_on(upscaler, &name, left, &latents),
            Err(error) if alone => self.fail_first(left, &error),
            Err(_) => {
                for _ in 0..batch {
                    let Some(item) = left.front() else { return };
                    let name = item.source.to_string();
                    match self.upscale(upscaler, &name, slice::from_ref(item)) {
                        Ok(latents) => self.hand_on(upscaler, &name, left, &latents),
                        Err(error) => self.fail_first(left, &error),
                    }
                }
            }
        }
    }

    fn fail_first(&self, left: &mut VecDeque<Item>, error: &anyhow::Error) {
        if let Some(item) = left.pop_front() {
            self.fail(item, format!("{error:#}"));
        }
    }

    fn fail(&self, mut item: Item, error: String) {
        // It goes before anything is said.
        item.preview = None;
        // The receiver is gone only where the run has ended.
        let _ = self.messages.send(Message::Done(Outcome {
            error: Some(error),
            ..item.outcome(self.job, Status::Error)
        }));
    }

    /// One result an item, in their order.
    fn upscale(
        &self,
        upscaler: &mut Upscaler,
        name: &str,
        group: &[Item],
    ) -> Result<Vec<UpscaledLatents>> {
        let Some(first) = group.first() else {
            return Ok(Vec::new());
        };
        let inputs: Vec<LowRes> = group
            .iter()
            .map(|item| low_res(&item.content))
            .collect::<Result<_>>()?;
        let mut on_event = |event| match event {
            Event::Preview { index, picture } => self.show(&group[index], &picture),
            event => on_event(self.number, self.messages, name, event),
        };
        upscaler.upscale(&inputs, &first.settings, &mut on_event)
    }

    /// Shows a step. One that cannot be shown is no reason to end the work.
    fn show(&self, item: &Item, picture: &Pixels) -> Result<()> {
        let shown = item.preview.as_ref().map(|preview| preview.show(picture));
        match shown {
            Some(Err(error)) => {
                let text = format!("{}: {error:#}", item.source);
                let sent = self.messages.send(Message::Warning(text));
                sent.map_err(|_| anyhow!("the run has ended"))
            }
            _ => Ok(()),
        }
    }

    /// Hands on as many of the items that are left as there are results, one after the other, each with what is made of its
    /// own.
    fn hand_on(
        &mut self,
        upscaler: &mut Upscaler,
        name: &str,
        left: &mut VecDeque<Item>,
        latents: &[UpscaledLatents],
    ) {
        if self.job.color_fix == ColorFix::None {
            left.iter_mut()
                .take(latents.len())
                .for_each(Item::without_colors);
        }
        for latents in latents {
            let Some(item) = left.pop_front() else { return };
            // Where no one is there to take it, the run has ended.
            let _ = self.send(upscaler, name, item, latents);
        }
        for note in upscaler.notes() {
            let _ = self.messages.send(Message::Note(note));
        }
    }

    /// # Errors
    /// No one is there to take it. What fails otherwise is sent.
    fn send(
        &mut self,
        upscaler: &mut Upscaler,
        name: &str,
        mut item: Item,
        latents: &UpscaledLatents,
    ) -> Result<()> {
        item.evaluations = Some(latents.evaluations);
        let form = LatentForm {
            scaling_factor: upscaler.scaling_factor(),
            pixels: upscaler.pixels_per_latent(),
        };
        let kind = item.kind;
        // Before it goes.
        let places = item.low_res.as_ref();
        let before = item.decodes_low_res().then(|| Before {
            low_res: low_res(&item.content),
            with_latents: places.is_some_and(|place| place.latents.is_some()),
        });
        self.outbox.item(item, form)?;
        let made = self.make(upscaler, name, kind, latents, before);
        self.outbox.close(made)
    }

    /// Sends the result, and the decoded input where it was asked for.
    fn make(
        &mut self,
        upscaler: &mut Upscaler,
        name: &str,
        kind: Written,
        latents: &UpscaledLatents,
        before: Option<Before>,
    ) -> Result<()> {
        let mut on_event = |event| on_event(self.number, self.messages, name, event);
        let outbox = &mut self.outbox;
        match kind {
            Written::Image(_) => {
                upscaler.decode_to(latents, outbox, &mut on_event)?;
                outbox.end_picture()?;
            }
            Written::Safetensors | Written::ComfyLatent => {
                send_latents(outbox, &latents.latents()?)?;
            }
        }
        let Some(before) = before else { return Ok(()) };
        let tensor = match before.low_res? {
            LowRes::Prompt { .. } => {
                upscaler.decode_base_to(latents, outbox, &mut on_event)?;
                latents.base_latents()?
            }
            low_res => {
                upscaler.decode_low_res_to(&low_res, outbox, &mut on_event)?;
                match low_res {
                    LowRes::Latents(tensor) => Some(tensor),
                    _ => None,
                }
            }
        };
        outbox.end_picture()?;
        if let Some(tensor) = tensor.filter(|_| before.with_latents) {
            send_latents(outbox, &tensor)?;
        }
        Ok(())
    }
}

/// What an item was upscaled from, to be shown beside it.
struct Before {
    low_res: Result<LowRes>,
    /// Whether the latents themselves are wanted too.
    with_latents: bool,
}

/// Latents (1, 4, h, w).
fn send_latents(outbox: &Outbox, latents: &Tensor) -> Result<()> {
    let (_, _, height, width) = latents.dims4()?;
    outbox.latents(latents.flatten_all()?.to_vec1()?, Size { width, height })
}

/// Tells of what a worker does.
fn on_event(worker: usize, messages: &Sender<Message>, name: &str, event: Event) -> Result<()> {
    let say = |message| {
        if messages.send(message).is_err() {
            bail!("the run has ended");
        }
        Ok(())
    };
    match event {
        Event::Started(stage) => say(Message::Stage {
            worker,
            text: doing(stage),
        }),
        Event::Loading(stage) => {
            say(Message::Stage {
                worker,
                text: loading(stage),
            })?;
            let stage = stage.name();
            say(Message::Note(format!(
                "{name}: reading the {stage} weights"
            )))
        }
        Event::Step {
            done,
            total,
            way,
            seconds,
        } => say(Message::Step {
            worker,
            step: StepDone {
                done,
                total,
                way,
                seconds,
            },
        }),
        Event::Finished { stage, seconds } => {
            if stage == Stage::Denoise {
                say(Message::Denoised { worker })?;
            }
            let stage = stage.name();
            say(Message::Note(format!("{name}: {stage} {seconds:.3} s")))
        }
        Event::BaseStep {
            done,
            total,
            seconds,
        } => say(Message::BaseStep {
            worker,
            done,
            total,
            seconds,
        }),
        // Shown beside the output of one item, where there is a place for it.
        Event::Preview { .. } => Ok(()),
        Event::Warning(text) => say(Message::Warning(format!("{name}: {text}"))),
    }
}

/// What is shown while a stage goes on.
fn doing(stage: Stage) -> &'static str {
    match stage {
        Stage::Base => "base checkpoint",
        Stage::Text => "reading the prompt",
        Stage::Encode => "encoding",
        Stage::Denoise => "first step",
        Stage::Decode => "decoding",
    }
}

fn loading(stage: Stage) -> &'static str {
    match stage {
        Stage::Base => "loading the base checkpoint",
        Stage::Text => "loading the text encoder",
        Stage::Encode => "loading the encoder",
        Stage::Denoise => "loading the UNet",
        Stage::Decode => "loading the decoder",
    }
}

/// Latents in the UNet's scale, whatever the file's.
fn scale(upscaler: &Upscaler, item: &mut Item) {
    if let Content::Latents(latents) = &mut item.content {
        *latents = latents
            .clone()
            .into_scaled(item.scale, upscaler.scaling_factor());
        // What they are now: a batch that is done again is not scaled again.
        item.scale = Scale::Scaled;
    }
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
        &Content::Prompt {
            size: Size { width, height },
            ..
        } => Ok(LowRes::Prompt { width, height }),
    }
}
