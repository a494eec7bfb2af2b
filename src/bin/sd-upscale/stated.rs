//! What files say of how they were made.

use std::collections::BTreeMap;

use sd_upscale::latents::PIXELS_KEY;
use sd_upscale::metadata::Parameters;
use sd_upscale::{Enlargement, Schedule, Settings};

use crate::item::{Content, Item, LatentForm, Size};
use crate::job::Job;

/// The settings in the words that viewers of A1111's pictures know.
pub fn written_settings(job: &Job, settings: &Settings, size: Size) -> Parameters {
    let sampler = settings.sampler;
    let fields = [
        ("Steps", stated_steps(settings)),
        ("Sampler", Some(sampler.title().into())),
        ("Schedule type", stated_schedule(settings, Schedule::title)),
        ("CFG scale", Some(settings.guidance.to_string())),
        ("Seed", Some(settings.seed.to_string())),
        ("Eta", stated_eta(settings)),
        ("Tolerance", stated_tolerance(settings)),
        ("Noise level", stated_noise_level(settings)),
        ("Noise type", stated_noise_type(settings)),
        ("Padding", stated_mask(settings)),
        ("Prompt embeds", stated_embeds(settings)),
        ("Size", Some(format!("{}x{}", size.width, size.height))),
        ("Scale", written_scale(settings)),
        ("Model", Some(job.model_name())),
        ("Base model", job.uses_base().then(|| job.base_name())),
        ("Base steps", stated_base_steps(job)),
        ("Base CFG scale", stated_base_guidance(job)),
        ("Refine", stated_refine(settings)),
        ("Version", Some(VERSION.into())),
    ];
    parameters(settings, job.is_guided(settings), fields)
}

/// The same of the picture that the base checkpoint made.
pub fn base_settings(job: &Job, settings: &Settings, size: Size) -> Parameters {
    let fields = [
        ("Steps", stated_base_steps(job)),
        ("CFG scale", stated_base_guidance(job)),
        ("Seed", Some(settings.seed.to_string())),
        ("Size", Some(format!("{}x{}", size.width, size.height))),
        ("Model", Some(job.base_name())),
        ("Version", Some(VERSION.into())),
    ];
    parameters(settings, job.is_base_guided(), fields)
}

const VERSION: &str = concat!("sd-upscale ", env!("CARGO_PKG_VERSION"));

fn parameters<const N: usize>(
    settings: &Settings,
    guided: bool,
    fields: [(&str, Option<String>); N],
) -> Parameters {
    let stated = |(key, value): (&str, Option<String>)| Some((key.to_string(), value?));
    Parameters {
        prompt: settings.prompt.clone(),
        negative_prompt: if guided {
            settings.negative_prompt.clone()
        } else {
            String::new()
        },
        fields: fields.into_iter().filter_map(stated).collect(),
    }
}

/// Of the base checkpoint, where it has something to do.
fn stated_base_steps(job: &Job) -> Option<String> {
    job.uses_base().then(|| job.settings.base_steps.to_string())
}

fn stated_base_guidance(job: &Job) -> Option<String> {
    job.uses_base()
        .then(|| job.settings.base_guidance.to_string())
}

fn stated_refine(settings: &Settings) -> Option<String> {
    settings.refine.map(|strength| strength.to_string())
}

/// Of the settings that not every sampler takes, those that this one does.
fn stated_steps(settings: &Settings) -> Option<String> {
    let takes = settings.sampler.takes_steps();
    takes.then(|| settings.steps.to_string())
}

fn stated_schedule(settings: &Settings, name: fn(Schedule) -> &'static str) -> Option<String> {
    let takes = settings.sampler.takes_a_schedule();
    takes.then(|| name(settings.schedule).into())
}

fn stated_eta(settings: &Settings) -> Option<String> {
    let takes = settings.sampler.takes_eta();
    takes.then(|| settings.eta.to_string())
}

fn stated_tolerance(settings: &Settings) -> Option<String> {
    let takes = settings.sampler.takes_a_tolerance();
    takes.then(|| settings.tolerance.to_string())
}

/// Of the settings of the original implementation those that are in use.
fn stated_noise_level(settings: &Settings) -> Option<String> {
    let level = settings.noise_level;
    (level > 0.0).then(|| level.to_string())
}

fn stated_noise_type(settings: &Settings) -> Option<String> {
    let name = settings.noise_type.name();
    (settings.noise_level > 0.0).then(|| name.into())
}

fn stated_mask(settings: &Settings) -> Option<String> {
    settings.mask_padding.then(|| "masked".into())
}

/// What the prompt's numbers are known by, where they count.
fn stated_embeds(settings: &Settings) -> Option<String> {
    let embeds = settings.prompt_embeds.as_ref();
    let embeds = embeds.filter(|_| settings.guidance > 0.0)?;
    Some(embeds.digest().to_owned())
}

/// The scale where it is another than the model's own.
fn written_scale(settings: &Settings) -> Option<String> {
    let scale = settings.scale;
    (scale != Enlargement::default()).then(|| scale.to_string())
}

/// What latents say of themselves. `size` is in latent positions.
pub fn latents_metadata(
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
    let settings = &item.settings;
    for (key, value) in [
        ("seed", Some(settings.seed.to_string())),
        ("steps", stated_steps(settings)),
        ("guidance", Some(settings.guidance.to_string())),
        ("schedule", stated_schedule(settings, Schedule::name)),
        ("sampler", Some(settings.sampler.to_string())),
        ("eta", stated_eta(settings)),
        ("tolerance", stated_tolerance(settings)),
        ("noise_level", stated_noise_level(settings)),
        ("noise_type", stated_noise_type(settings)),
        ("padding", stated_mask(settings)),
        ("prompt_embeds", stated_embeds(settings)),
        ("scale", written_scale(settings)),
        ("model", Some(job.model_name())),
        ("base", job.uses_base().then(|| job.base_name())),
        ("base_steps", stated_base_steps(job)),
        ("base_guidance", stated_base_guidance(job)),
        ("refine", stated_refine(settings)),
    ] {
        let key = format!("sd_upscale.{key}");
        // Those that were read may say it of the run that made them.
        metadata.remove(&key);
        metadata.extend(value.map(|value| (key, value)));
    }
    metadata.insert(PIXELS_KEY.into(), form.pixels.to_string());
    metadata
}

/// What latents of the low-res picture say of themselves: those that were read what they said, those that were made from a prompt how.
pub fn low_res_metadata(
    job: &Job,
    item: &Item,
    size: Size,
    form: LatentForm,
) -> BTreeMap<String, String> {
    let mut metadata = BTreeMap::new();
    if !job.strip {
        if let Content::Latents(latents) = &item.content {
            metadata.extend(latents.metadata.clone());
        }
        if job.generate {
            let pixels = Size {
                width: form.pixels * size.width,
                height: form.pixels * size.height,
            };
            let written = base_settings(job, &item.settings, pixels);
            metadata.insert("parameters".into(), written.to_parameters());
        }
    }
    metadata.insert(PIXELS_KEY.into(), form.pixels.to_string());
    metadata
}
