//! Results to files: what the input had besides colour is put back, and every write is whole or not at all.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender};

use anyhow::{Context, Result, bail};
use sd_upscale::latents::Latents;
use sd_upscale::metadata::{Metadata, Parameters};
use sd_upscale::picture::{self, Picture, alpha, color_fix};
use sd_upscale::plan::Written;
use sd_upscale::{Rgb, Settings, files};

use crate::args::ColorFix;
use crate::item::{Content, Finished, Item, Made, Place};
use crate::job::Job;
use crate::report::{Message, Outcome, Status};

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
            let Written::Image(format) = item.kind else {
                bail!("a picture cannot be written as latents");
            };
            let size = (rgb.width, rgb.height);
            let picture = picture(job, item, rgb)?;
            let encoded = picture::encode(&picture, format, job.quality)
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
                Written::ComfyLatent => latents.to_comfy(finished.scaling_factor, &metadata)?,
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
                    Written::Image(format) => format,
                    _ => sd_upscale::picture::Format::Png,
                };
                write_file(path, &picture::encode(&picture, format, job.quality)?.bytes)?;
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
    files::write(path, bytes)
}

/// The upscaled picture with what the input had besides colour: alpha, depth, greyness, metadata.
fn picture(job: &Job, item: &mut Item, rgb: &mut Rgb) -> Result<Picture> {
    let (width, height) = (rgb.width, rgb.height);
    let mut made = Picture::from_rgb(width, height, std::mem::take(&mut rgb.values));
    match &mut item.content {
        Content::Picture(low) => {
            if job.color_fix != ColorFix::None {
                let reference = picture::double(&low.rgb, low.width, low.height, 3);
                match job.color_fix {
                    ColorFix::Adain => color_fix::adain(&mut made.rgb, &reference),
                    _ => color_fix::wavelet(&mut made.rgb, &reference, width, height),
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
fn written_settings(job: &Job, settings: &Settings, (width, height): (usize, usize)) -> Parameters {
    let schedule = match settings.schedule {
        sd_upscale::pipeline::sampler::Schedule::Karras => "Karras",
        sd_upscale::pipeline::sampler::Schedule::LogLinear => "Log-linear",
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
    Parameters {
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
