//! Which files of a repository a run needs, and which of them a folder lacks.

use std::path::{Component, Path};

/// A part of a diffusers pipeline, or a repository that is nothing but a VAE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// `scheduler/`: the noise levels that the UNet was trained with.
    Scheduler,
    /// `tokenizer/`: the vocabulary of prompts.
    Tokenizer,
    /// `text_encoder/`: what makes a prompt numbers.
    TextEncoder,
    /// `unet/`: what takes the noise out of latents.
    Unet,
    /// The VAE in the folder `vae/` of a pipeline.
    Vae,
    /// A VAE at the top level of its repository, such as `stabilityai/sd-vae-ft-mse`.
    BareVae,
}

impl Part {
    /// The five parts of a pipeline.
    pub const PIPELINE: [Part; 5] = [
        Part::Scheduler,
        Part::Tokenizer,
        Part::TextEncoder,
        Part::Unet,
        Part::Vae,
    ];
}

/// What a file is to the model, which decides what its absence means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Required,
    /// Some repositories lack it, and the model loads without it.
    Optional,
    /// `NAME.safetensors`, or what [`weight_file`] finds in its place.
    Weights,
}

/// The files that `parts` consist of, small ones first, with `/` between folder and name.
pub(crate) fn wanted(parts: &[Part]) -> Vec<(&'static str, Kind)> {
    use Kind::{Optional, Required, Weights};
    let mut files = Vec::new();
    if parts.contains(&Part::Unet) {
        // Not read by this program, but other programs want it of a cached pipeline.
        files.push(("model_index.json", Optional));
    }
    for part in parts {
        files.extend_from_slice(match part {
            Part::Scheduler => &[("scheduler/scheduler_config.json", Required)],
            Part::Tokenizer => &[
                ("tokenizer/vocab.json", Required),
                ("tokenizer/merges.txt", Required),
                ("tokenizer/special_tokens_map.json", Optional),
                ("tokenizer/tokenizer_config.json", Optional),
            ],
            Part::TextEncoder => &[
                ("text_encoder/config.json", Required),
                ("text_encoder/model.safetensors", Weights),
            ],
            Part::Unet => &[
                ("unet/config.json", Required),
                ("unet/diffusion_pytorch_model.safetensors", Weights),
            ],
            Part::Vae => &[
                ("vae/config.json", Required),
                ("vae/diffusion_pytorch_model.safetensors", Weights),
            ],
            Part::BareVae => &[
                ("config.json", Required),
                ("diffusion_pytorch_model.safetensors", Weights),
            ],
        });
    }
    files.sort_by_key(|(_, kind)| *kind == Weights);
    files
}

/// The first file without which the model in `dir` cannot be loaded.
pub(crate) fn first_missing(dir: &Path, parts: &[Part]) -> Option<String> {
    wanted(parts)
        .into_iter()
        .find_map(|(path, kind)| match kind {
            Kind::Optional => None,
            Kind::Required => (!dir.join(path).is_file()).then(|| path.to_string()),
            Kind::Weights => missing_weights(dir, path),
        })
}

fn missing_weights(dir: &Path, weights: &str) -> Option<String> {
    let is_here = |name: &str| dir.join(name).is_file();
    let found = match weight_file(weights, is_here) {
        Some(found) if is_index(&found) => found,
        Some(_) => return None,
        None => return Some(weights.to_string()),
    };
    match shards(dir, &found) {
        Ok(shards) => shards.into_iter().find(|shard| !is_here(shard)),
        Err(_) => Some(weights.to_string()),
    }
}

/// The file to read in place of `weights` (`NAME.safetensors`), out of those that exist: the weights themselves, or
/// the index of their shards; in float32 rather than in float16. The names are those of diffusers'
/// `variant_compatible_siblings`, which knows two for the index of a variant.
pub(crate) fn weight_file(weights: &str, exists: impl Fn(&str) -> bool) -> Option<String> {
    let stem = weights.strip_suffix(".safetensors").unwrap_or(weights);
    [
        weights.to_string(),
        format!("{weights}.index.json"),
        format!("{stem}.fp16.safetensors"),
        format!("{weights}.index.fp16.json"),
        format!("{weights}.fp16.index.json"),
    ]
    .into_iter()
    .find(|name| exists(name))
}

/// Whether a [`weight_file`] is no weights itself but names the shards.
pub(crate) fn is_index(weight_file: &str) -> bool {
    weight_file.ends_with(".json")
}

/// Whether a [`weight_file`] is in float16, or names shards that are.
pub(crate) fn is_fp16(weight_file: &str) -> bool {
    weight_file.contains(".fp16.")
}

/// The shards that the file `index` in `dir` names, as paths within `dir`, each once.
///
/// # Errors
/// One sentence, when the file is no index, names nothing, or names anything but plain files beside it.
pub(crate) fn shards(dir: &Path, index: &str) -> Result<Vec<String>, String> {
    let text = std::fs::read(dir.join(index)).map_err(|e| format!("it cannot be read: {e}"))?;
    let json: serde_json::Value =
        serde_json::from_slice(&text).map_err(|e| format!("it is not JSON: {e}"))?;
    let map = json
        .get("weight_map")
        .and_then(|map| map.as_object())
        .filter(|map| !map.is_empty())
        .ok_or("it has no \"weight_map\" from tensor names to files")?;
    let mut found = Vec::new();
    for (tensor, file) in map {
        let name = file.as_str().unwrap_or_default();
        if !is_beside(name) || !name.ends_with(".safetensors") {
            return Err(format!(
                "it puts the tensor {tensor:?} into {file}, where the name of a .safetensors file beside it was expected"
            ));
        }
        found.push(match index.rsplit_once('/') {
            None => name.to_string(),
            Some((folder, _)) => format!("{folder}/{name}"),
        });
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// Whether `name` stays in its folder: a path that leaves it is an attack or a mistake. `\` and `:` are for Windows.
fn is_beside(name: &str) -> bool {
    Path::new(name).file_name().is_some_and(|file| file == name) && !name.contains(['\\', ':'])
}

/// Whether `name` is one path component of harmless characters: letters, digits, `.`, `_`, `-`.
pub(crate) fn is_plain(name: &str) -> bool {
    let chars = name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    let mut components = Path::new(name).components();
    chars
        && matches!(
            (components.next(), components.next()),
            (Some(Component::Normal(_)), None)
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shards_of(json: &str) -> Result<Vec<String>, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("unet")).unwrap();
        std::fs::write(dir.path().join("unet/i.json"), json).unwrap();
        shards(dir.path(), "unet/i.json")
    }

    #[test]
    fn an_index_names_each_shard_once_and_in_its_folder() {
        let json =
            r#"{"weight_map":{"b":"m-2.safetensors","a":"m-1.safetensors","c":"m-2.safetensors"}}"#;
        assert_eq!(
            shards_of(json).unwrap(),
            ["unet/m-1.safetensors", "unet/m-2.safetensors"]
        );
    }

    #[test]
    fn an_index_cannot_name_files_outside_its_folder() {
        for name in [
            "../m.safetensors",
            "/etc/m.safetensors",
            "a/m.safetensors",
            "..",
            "",
            "m.bin",
            "a\\m.safetensors",
        ] {
            let json = serde_json::json!({"weight_map": {"a": name}}).to_string();
            assert!(
                shards_of(&json).unwrap_err().contains("beside it"),
                "{name}"
            );
        }
        assert!(shards_of("{}").unwrap_err().contains("weight_map"));
        assert!(shards_of(r#"{"weight_map":{}}"#).is_err());
        assert!(shards_of("{").unwrap_err().contains("not JSON"));
    }

    #[test]
    fn a_folder_is_complete_with_one_file_or_with_all_shards() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        let missing = || first_missing(dir.path(), &[Part::BareVae]);
        assert_eq!(missing().as_deref(), Some("config.json"));
        put("config.json", "{}");
        assert_eq!(
            missing().as_deref(),
            Some("diffusion_pytorch_model.safetensors")
        );
        put(
            "diffusion_pytorch_model.safetensors.index.json",
            r#"{"weight_map":{"a":"s-1.safetensors","b":"s-2.safetensors"}}"#,
        );
        put("s-1.safetensors", "");
        assert_eq!(missing().as_deref(), Some("s-2.safetensors"));
        put("s-2.safetensors", "");
        assert_eq!(missing(), None);
    }

    #[test]
    fn float32_is_taken_before_float16_and_one_file_before_shards() {
        let mut names = [
            "unet/m.safetensors",
            "unet/m.safetensors.index.json",
            "unet/m.fp16.safetensors",
            "unet/m.safetensors.index.fp16.json",
            "unet/m.safetensors.fp16.index.json",
        ]
        .to_vec();
        while !names.is_empty() {
            let found = weight_file("unet/m.safetensors", |name| names.contains(&name));
            assert_eq!(found.as_deref(), Some(names.remove(0)));
        }
        assert_eq!(weight_file("unet/m.safetensors", |_| false), None);
    }
}
