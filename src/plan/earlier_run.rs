//! Which inputs are what an earlier run of the same command wrote: `a-2x.png` beside `a.png`. Without this a second
//! run over a folder would upscale the upscaled.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::claims::Folders;
use super::naming::{Naming, is_latents, split_name};
use super::walk::{Found, PassedOver};
use super::{Source, Target};

/// Passes over the inputs that are what an earlier run wrote for others of them.
pub(super) fn leave_out(
    work: Vec<(Found, Target)>,
    passed_over: &mut Vec<(PathBuf, PassedOver)>,
    warnings: &mut Vec<String>,
) -> Vec<(Found, Target)> {
    let inputs: Vec<_> = work.iter().map(|(f, t)| (&f.source, t.naming())).collect();
    let origins: Vec<Option<PathBuf>> = outputs_of(&inputs)
        .into_iter()
        .map(|origin| match inputs[origin?].0 {
            Source::Path(path) => Some(path.clone()),
            other => Some(other.to_string().into()),
        })
        .collect();
    let count = origins.iter().flatten().count();
    let example = work
        .iter()
        .zip(&origins)
        .find(|(_, origin)| origin.is_some());
    if let Some(((found, _), Some(origin))) = example {
        let (example, origin) = (&found.source, origin.display());
        warnings.push(format!(
            "{count} passed over as what an earlier run wrote, such as {example} for {origin}; \
             to upscale one again, give it alone"
        ));
    }
    let mut left = Vec::with_capacity(work.len() - count);
    for ((found, target), origin) in work.into_iter().zip(origins) {
        match (&found.source, origin) {
            (Source::Path(path), Some(origin)) => {
                passed_over.push((path.clone(), PassedOver::OutputOf(origin)));
            }
            _ => left.push((found, target)),
        }
    }
    left
}

/// What the names of pictures that are written beside a result end in.
const BESIDE: [&str; 2] = ["-low-res", "-compare"];

/// For each of the inputs, given with where its output goes, the index of the input whose output it is by its name.
/// The extension, seed, size and scale may differ from this run's.
fn outputs_of(inputs: &[(&Source, Option<&Naming>)]) -> Vec<Option<usize>> {
    let mut folders = Folders::default();
    let mut by_stem: HashMap<(PathBuf, OsString), Vec<usize>> = HashMap::new();
    for (index, (_, naming)) in inputs.iter().enumerate() {
        if let Some(naming) = naming {
            let key = (folders.canonical(&naming.folder), naming.stem.clone());
            by_stem.entry(key).or_default().push(index);
        }
    }
    let mut origin = |index: usize| {
        let (Source::Path(path), Some(naming)) = inputs[index] else {
            return None;
        };
        let (base, name) = placed(&mut folders, path, naming.template.depth())?;
        let mut beside = BESIDE.iter();
        let whole = beside.find_map(|what| name.strip_suffix(what));
        let whole = whole.unwrap_or(&name);
        for (numbered, stem) in [false, true].into_iter().flat_map(|numbered| {
            let stems = naming.template.stems_of(whole, numbered);
            stems.into_iter().map(move |stem| (numbered, stem))
        }) {
            let sources = by_stem.get(&(base.clone(), stem.into()));
            let source = sources.into_iter().flatten().find(|source| {
                **source != index && (!numbered || may_be_a_batch(inputs[**source].0))
            });
            if let Some(source) = source {
                return Some(*source);
            }
        }
        None
    };
    (0..inputs.len()).map(&mut origin).collect()
}

/// The file as a template with `depth` sub-folders sees it: the folder that these lie in, and the rest without the
/// extension.
fn placed(folders: &mut Folders, path: &Path, depth: usize) -> Option<(PathBuf, String)> {
    let mut base = folders.canonical(path.parent()?);
    let mut name = split_name(path).0.into_string().ok()?;
    for _ in 0..depth {
        name = format!("{}/{name}", base.file_name()?.to_str()?);
        base.pop();
    }
    Some((base, name))
}

/// Only latents hold several items, which are numbered.
fn may_be_a_batch(source: &Source) -> bool {
    match source {
        Source::Path(path) => split_name(path).1.is_some_and(|e| is_latents(&e)),
        Source::Stdin => true,
        Source::Prompt(_) => false,
    }
}
