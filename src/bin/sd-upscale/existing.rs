//! `--skip-existing`: what an earlier run has finished, or another one that works beside this.

use std::path::Path;

use sd_upscale::files::{self, Loaded};
use sd_upscale::latents::Latents;
use sd_upscale::metadata::Metadata;
use sd_upscale::plan::Source;

use crate::item::Size;
use crate::job::Job;

/// Whether there is a whole file at `path`, of the picture's size where that is known.
pub fn is_done(job: &Job, path: &Path, expected: Option<Size>) -> bool {
    if !files::is_complete(path) {
        return false;
    }
    let Some(expected) = expected else {
        return true;
    };
    if let Ok(header) = files::read_header(path) {
        let found = Size {
            width: header.width,
            height: header.height,
        };
        return found == expected || found.turned() == expected;
    }
    match files::read_path(path, &job.limits) {
        Ok(Loaded::Latents(latents)) => {
            let times = job.settings.scale.times();
            covers(&latents, expected, times) || covers(&latents, expected.turned(), times)
        }
        _ => true,
    }
}

/// Whether latents are as many as a run writes for a picture of `size`, which is `times` as large as the input: what covers it
/// after the first pass, doubled in each of the others.
fn covers(latents: &Latents, size: Size, times: usize) -> bool {
    let pixels = latents.pixels_per_position();
    let positions = |side: usize| (2 * side / times).div_ceil(pixels) * (times / 2);
    latents.batch == 1
        && latents.width == positions(size.width)
        && latents.height == positions(size.height)
}

/// What changed since the file at `output` was made, in words: the input, or the settings that it says it was made
/// with. `made_now` is what it would say of itself today.
pub fn change(source: &Source, output: &Path, made_now: &Metadata) -> Option<String> {
    let written = |path: &Path| path.metadata().and_then(|m| m.modified()).ok();
    if let Source::Path(input) = source
        && written(input)? > written(output)?
    {
        return Some("the input was changed after it".into());
    }
    let before = files::read_header(output).ok()?.metadata.parameters()?;
    let now = made_now.parameters()?;
    (without_version(&before) != without_version(&now))
        .then(|| "it was made with other settings".into())
}

/// The program's version is no setting.
fn without_version(parameters: &str) -> String {
    let fields = parameters.split(", ");
    let kept = fields.filter(|field| !field.to_lowercase().contains("version: sd-upscale"));
    kept.collect::<Vec<_>>().join(", ")
}
