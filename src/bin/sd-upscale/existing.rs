//! `--skip-existing`: what an earlier run has finished, or another one that works beside this.

use std::path::Path;

use sd_upscale::files;
use sd_upscale::metadata::Metadata;
use sd_upscale::plan::Source;

use crate::item::Size;

/// Whether there is a whole file at `path`, of the picture's size where that is known.
pub fn is_done(path: &Path, expected: Option<Size>) -> bool {
    if !files::is_complete(path) {
        return false;
    }
    match (expected, files::read_header(path)) {
        (Some(expected), Ok(header)) => {
            let found = Size {
                width: header.width,
                height: header.height,
            };
            found == expected || found.turned() == expected
        }
        _ => true,
    }
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
