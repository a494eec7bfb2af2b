//! Items to upscaled pictures, one thread a device.

use std::sync::mpsc::{Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use sd_upscale::picture::alpha;
use sd_upscale::plan::Written;
use sd_upscale::{Event, LowRes, Rgb, Upscaler};

use crate::item::{Content, Finished, Item, Made};
use crate::job::Job;
use crate::report::{Message, Outcome, Status};

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
                Written::Image(_) => Made::Picture(upscaler.decode(&upscaled, &mut on_event)?),
                Written::Safetensors | Written::ComfyLatent => {
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
                Message::Note(format!("{name}: {} {seconds:.3} s", stage.name()))
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
