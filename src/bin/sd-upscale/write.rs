//! Results to files: what the input had besides colour is put back, and every write is whole or not at all.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender};

use anyhow::{Context, Result, bail};
use sd_upscale::latents::{Latents, PIXELS_KEY};
use sd_upscale::metadata::Parameters;
use sd_upscale::picture::{self, Format, Picture, alpha, color_fix};
use sd_upscale::pipeline::sampler::Schedule;
use sd_upscale::plan::Written;
use sd_upscale::{Enlargement, Pixels, Settings, files};

use crate::args::ColorFix;
use crate::item::{Content, Finished, Item, LatentForm, Made, Place, Size, Upscaled};
use crate::job::Job;
use crate::report::{Message, Outcome, Status};
use crate::threads::guarded;

/// Encodes and writes until there is nothing more. `writing` is held from before a file is begun until it is said
/// that it is there, so that whoever holds it knows of all that are.
pub fn write(
    job: &Job,
    finished: Receiver<Finished>,
    writing: &Mutex<()>,
    messages: &Sender<Message>,
) {
    for Finished {
        mut item,
        upscaled,
        latents,
    } in finished
    {
        let Upscaled { result, low_res } = upscaled;
        let encoded = guarded(|| encode(job, &mut item, result, latents)).flatten();
        // A pipe may be full for as long as it likes.
        let _writing = match item.place {
            Place::File(_) => Some(writing.lock()),
            Place::Stdout => None,
        };
        let written = encoded.and_then(|encoded| {
            for warning in &encoded.warnings {
                let _ = messages.send(Message::Warning(format!("{}: {warning}", item.source)));
            }
            put(job, &item, &encoded.bytes, low_res)?;
            Ok(encoded.size)
        });
        let outcome = match written {
            Ok(size) => Outcome {
                size: Some(size),
                ..item.outcome(job, Status::Ok)
            },
            Err(error) => Outcome {
                error: Some(format!("{error:#}")),
                ..item.outcome(job, Status::Error)
            },
        };
        if messages.send(Message::Done(outcome)).is_err() {
            return;
        }
    }
}

/// A result as the bytes of a file.
struct Encoded {
    /// Width and height: pixels, or latent positions.
    size: (usize, usize),
    bytes: Vec<u8>,
    warnings: Vec<String>,
}

fn encode(job: &Job, item: &mut Item, result: Made, form: LatentForm) -> Result<Encoded> {
    match result {
        Made::Picture(pixels) => {
            let Written::Image(format) = item.kind else {
                bail!("a picture cannot be written as latents");
            };
            let size = (pixels.width, pixels.height);
            let picture = picture(job, item, pixels);
            let encoded = picture::encode(&picture, format, job.quality)
                .with_context(|| item.source.to_string())?;
            Ok(Encoded {
                size,
                bytes: encoded.bytes,
                warnings: encoded.warnings,
            })
        }
        Made::Latents {
            values,
            height,
            width,
        } => {
            let latents = Latents::from_scaled(values, 1, height, width);
            let metadata = latents_metadata(job, item, Size { width, height }, form);
            let bytes = match item.kind {
                Written::ComfyLatent => latents.to_comfy(form.scaling_factor, &metadata)?,
                _ => latents.to_safetensors(&metadata)?,
            };
            Ok(Encoded {
                size: (width, height),
                bytes,
                warnings: Vec::new(),
            })
        }
    }
}

/// Puts a file, and the decoded input where it was asked for, in its place.
fn put(job: &Job, item: &Item, bytes: &[u8], low_res: Option<Pixels>) -> Result<()> {
    match &item.place {
        Place::File(path) => {
            write_file(path, bytes)?;
            if let (Some(path), Some(pixels)) = (&item.low_res, low_res) {
                write_low_res(job, path, item.kind, pixels)?;
            }
            Ok(())
        }
        Place::Stdout => {
            let mut stdout = std::io::stdout().lock();
            stdout
                .write_all(bytes)
                .and_then(|()| stdout.flush())
                .context("cannot write to standard output")
        }
    }
}

/// The decoded input, in the format of the result; PNG beside latents.
fn write_low_res(job: &Job, path: &Path, kind: Written, pixels: Pixels) -> Result<()> {
    let format = match kind {
        Written::Image(format) => format,
        _ => Format::Png,
    };
    let picture = Picture::from_pixels(pixels);
    write_file(path, &picture::encode(&picture, format, job.quality)?.bytes)
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
fn picture(job: &Job, item: &mut Item, pixels: Pixels) -> Picture {
    let size = Size {
        width: pixels.width,
        height: pixels.height,
    };
    let mut made = Picture::from_pixels(pixels);
    match &mut item.content {
        Content::Picture(low) => {
            let times = item.settings.scale.times();
            fix_color(job.color_fix, &mut made.pixels, &low.pixels, times);
            made.alpha = low
                .alpha
                .as_ref()
                .map(|alpha| alpha::enlarge(alpha, low.pixels.width, low.pixels.height, times));
            made.gray = low.gray;
            made.depth = low.depth;
            made.metadata = std::mem::take(&mut low.metadata);
        }
        Content::Latents(latents) => made.metadata = latents.image_metadata(),
    }
    if job.strip {
        made.metadata = std::mem::take(&mut made.metadata).color_only();
    } else {
        let settings = written_settings(job, &item.settings, size);
        made.metadata.add_settings(&settings);
    }
    made
}

/// Brings the colours of `made`, which is `times` as large as the input, back to the input's, in the way asked for.
fn fix_color(fix: ColorFix, made: &mut Pixels, low: &Pixels, times: usize) {
    let reference = || picture::enlarge(&low.values, low.width, low.height, 3, times);
    match fix {
        ColorFix::None => {}
        ColorFix::Adain => color_fix::adain(&mut made.values, &reference()),
        ColorFix::Wavelet => {
            color_fix::wavelet(&mut made.values, &reference(), made.width, made.height);
        }
    }
}

/// The settings in the words that viewers of A1111's pictures know.
pub fn written_settings(job: &Job, settings: &Settings, size: Size) -> Parameters {
    let schedule = match settings.schedule {
        Schedule::Karras => "Karras",
        Schedule::LogLinear => "Log-linear",
    };
    let version = concat!("sd-upscale ", env!("CARGO_PKG_VERSION"));
    let fields = [
        ("Steps", Some(settings.steps.to_string())),
        ("Sampler", Some("Euler".into())),
        ("Schedule type", Some(schedule.into())),
        ("CFG scale", Some(settings.guidance.to_string())),
        ("Seed", Some(settings.seed.to_string())),
        ("Size", Some(format!("{}x{}", size.width, size.height))),
        ("Scale", written_scale(settings)),
        ("Model", Some(job.model_name())),
        ("Version", Some(version.into())),
    ];
    let stated = |(key, value): (&str, Option<String>)| Some((key.to_string(), value?));
    Parameters {
        prompt: settings.prompt.clone(),
        negative_prompt: if settings.guidance > 1.0 {
            settings.negative_prompt.clone()
        } else {
            String::new()
        },
        fields: fields.into_iter().filter_map(stated).collect(),
    }
}

/// The scale where it is another than the model's own.
fn written_scale(settings: &Settings) -> Option<String> {
    let scale = settings.scale;
    (scale != Enlargement::default()).then(|| scale.to_string())
}

/// Where latents say the scale that they were made at, if it is not 2.
const SCALE_KEY: &str = "sd_upscale.scale";

/// What latents say of themselves. `size` is in latent positions.
fn latents_metadata(
    job: &Job,
    item: &Item,
    size: Size,
    form: LatentForm,
) -> BTreeMap<String, String> {
    let mut metadata = BTreeMap::new();
    if job.strip {
        // Not how they were made but what they are.
        metadata.insert(PIXELS_KEY.into(), form.pixels.to_string());
        return metadata;
    }
    if let Content::Latents(latents) = &item.content {
        metadata.extend(latents.metadata.clone());
    }
    let pixels = Size {
        width: form.pixels * size.width,
        height: form.pixels * size.height,
    };
    let written = written_settings(job, &item.settings, pixels);
    metadata.insert("parameters".into(), written.to_parameters());
    for (key, value) in [
        ("seed", item.settings.seed.to_string()),
        ("steps", item.settings.steps.to_string()),
        ("guidance", item.settings.guidance.to_string()),
        ("schedule", item.settings.schedule.name().to_string()),
        ("model", job.model_name()),
    ] {
        metadata.insert(format!("sd_upscale.{key}"), value);
    }
    // Those that were read may say it of the run that made them.
    metadata.remove(SCALE_KEY);
    metadata.extend(written_scale(&item.settings).map(|scale| (SCALE_KEY.into(), scale)));
    metadata.insert(PIXELS_KEY.into(), form.pixels.to_string());
    metadata
}
