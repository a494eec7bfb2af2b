//! The values of options that a shell cannot know: models in the cache, devices, formats.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use clap_complete::engine::{
    ArgValueCompleter, CompletionCandidate, PathCompleter, ValueCompleter,
};
use sd_upscale::device;
use sd_upscale::model::TINY;
use sd_upscale::model::hub::{Environment, Hub};
use sd_upscale::picture::Format;

/// Completes an option by a function from what was typed to what it may become.
pub fn values_of(values: fn(&OsStr) -> Vec<CompletionCandidate>) -> ArgValueCompleter {
    ArgValueCompleter::new(values)
}

/// `tiny`, upscalers in the cache, files and folders.
pub fn models(typed: &OsStr) -> Vec<CompletionCandidate> {
    let cached = cached(|snapshot| is_pipeline(snapshot, |class| class.contains("Upscale")));
    named_or_path(typed, [TINY.to_owned()].into_iter().chain(cached))
}

/// Other pipelines in the cache, files and folders.
pub fn bases(typed: &OsStr) -> Vec<CompletionCandidate> {
    let is_base = |class: &str| !class.contains("Upscale");
    let cached = cached(|snapshot| is_pipeline(snapshot, is_base));
    named_or_path(typed, cached.into_iter())
}

/// VAEs in the cache, alone or within a pipeline, files and folders.
pub fn vaes(typed: &OsStr) -> Vec<CompletionCandidate> {
    let cached = cached(|snapshot| {
        snapshot.join("vae/config.json").exists()
            || class_in(snapshot.join("config.json"))
                .is_some_and(|class| class.starts_with("Autoencoder"))
    });
    named_or_path(typed, cached.into_iter())
}

/// What can be had here; of a list, its last name.
pub fn devices(typed: &OsStr) -> Vec<CompletionCandidate> {
    let cards = device::cards().unwrap_or(0);
    let mut names = vec!["auto".to_owned(), "cpu".into()];
    if cards > 0 {
        names.push("cuda".into());
        names.extend((0..cards).map(|number| format!("cuda:{number}")));
        names.push("cuda:all".into());
    }
    let typed = typed.to_string_lossy();
    let list = typed.rsplit_once(',');
    let named = list.map_or(&*typed, |(_, last)| last);
    let before = list.map_or(String::new(), |(before, _)| format!("{before},"));
    let is_new = |name: &String| !before.split(',').any(|other| other == name);
    beginning_with(named, names.into_iter())
        .filter(is_new)
        .map(|name| format!("{before}{name}").into())
        .collect()
}

/// What is written.
pub fn formats(typed: &OsStr) -> Vec<CompletionCandidate> {
    let pictures = Format::WRITABLE.map(Format::extension);
    let names = pictures.into_iter().chain(["safetensors", "latent"]);
    let typed = typed.to_string_lossy();
    beginning_with(&typed, names.map(str::to_owned))
        .map(CompletionCandidate::from)
        .collect()
}

fn beginning_with(
    typed: &str,
    names: impl Iterator<Item = String>,
) -> impl Iterator<Item = String> {
    names.filter(move |name| name.starts_with(typed))
}

fn named_or_path(typed: &OsStr, names: impl Iterator<Item = String>) -> Vec<CompletionCandidate> {
    let text = typed.to_string_lossy();
    let named = beginning_with(&text, names).map(CompletionCandidate::from);
    named.chain(PathCompleter::any().complete(typed)).collect()
}

/// Repositories of which a snapshot is `wanted`. Where the cache cannot be told of, none: there is no one to tell why.
fn cached(wanted: impl Fn(&Path) -> bool) -> Vec<String> {
    let Ok(environment) = Environment::from_env(false) else {
        return Vec::new();
    };
    let repositories = Hub::new(environment).repositories().into_iter();
    let wanted =
        repositories.filter(|(_, snapshots)| snapshots.iter().any(|snapshot| wanted(snapshot)));
    wanted.map(|(name, _)| name).collect()
}

/// Whether a snapshot is a pipeline with a UNet whose class is `right`; of one that does not tell its class, that is not known.
fn is_pipeline(snapshot: &Path, right: impl Fn(&str) -> bool) -> bool {
    let class = class_in(snapshot.join("model_index.json"));
    snapshot.join("unet/config.json").exists() && class.is_none_or(|class| right(&class))
}

fn class_in(file: PathBuf) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let values: serde_json::Value = serde_json::from_str(&text).ok()?;
    Some(values.get("_class_name")?.as_str()?.to_owned())
}
