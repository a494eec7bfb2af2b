//! Latents in safetensors: diffusers' and ComfyUI's spellings read, ours and ComfyUI's written.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use candle_core::safetensors::Load;
use candle_core::{DType, Device};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Map, Value, json};

use super::{LatentKind, Latents, check_size, shortened};
use crate::limits::ReadLimits;

/// ComfyUI's mark for raw values (`nodes.py`, `SaveLatent`): an empty tensor of this name.
const COMFY_MARK: &str = "latent_format_version_0";
const COMFY_KEY: &str = "latent_tensor";
/// Our own files state their scale under this metadata key.
const SCALE_KEY: &str = "latent_scale";

impl Latents {
    /// Reads a safetensors blob. The tensor is `latents`, `latent`, `latent_tensor` (ComfyUI) or `samples`, else the
    /// only one; of rank 3 or 4 with 4 channels, F16, BF16, F32 or F64.
    ///
    /// # Errors
    /// It is damaged, holds no latents, or is beyond `limits`.
    pub fn from_safetensors(bytes: &[u8], limits: &ReadLimits) -> Result<Self> {
        check_header(bytes, limits)?;
        let file = SafeTensors::deserialize(bytes)
            .map_err(|e| anyhow::anyhow!("its safetensors header is damaged: {e}"))?;
        let (_, header) = SafeTensors::read_metadata(bytes)
            .map_err(|e| anyhow::anyhow!("its safetensors header is damaged: {e}"))?;
        let metadata: BTreeMap<String, String> = header
            .metadata()
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect();
        let names = file.names();
        let name = choose(names.clone())?;
        let kind = match name {
            COMFY_KEY if names.contains(&COMFY_MARK) => LatentKind::ComfyRaw,
            COMFY_KEY => LatentKind::ComfyScaled,
            _ if metadata.get(SCALE_KEY).is_some_and(|s| s == "scaled") => LatentKind::Ours,
            _ => LatentKind::Unstated,
        };
        let tensor = file.tensor(name)?;
        let mut latents =
            Self::from_array(name, tensor.shape(), kind, limits, || floats(name, &tensor))?;
        latents.metadata = metadata;
        Ok(latents)
    }

    /// A safetensors file: one F32 tensor `latents` (batch, 4, h, w), scaled, and `metadata` as the file's.
    /// `self` must be scaled (see [`Self::into_scaled`]).
    ///
    /// # Errors
    /// The header does not fit the format.
    pub fn to_safetensors(&self, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
        let mut metadata = metadata.clone();
        metadata.insert(SCALE_KEY.into(), "scaled".into());
        let bytes = le_bytes(&self.data);
        serialized(&[("latents", self.shape(), &bytes)], &metadata)
    }

    /// A ComfyUI `.latent`: F32 `latent_tensor`, raw, marked as such. `self` must be scaled; `scaling_factor` is the
    /// VAE's. ComfyUI itself reads `prompt` and `workflow` of `metadata`.
    ///
    /// # Errors
    /// The header does not fit the format.
    pub fn to_comfy(
        &self,
        scaling_factor: f32,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Vec<u8>> {
        let raw: Vec<f32> = self.data.iter().map(|v| v / scaling_factor).collect();
        let bytes = le_bytes(&raw);
        serialized(
            &[
                (COMFY_KEY, self.shape(), &bytes),
                (COMFY_MARK, vec![0], &[]),
            ],
            metadata,
        )
    }
}

/// A safetensors file of F32 tensors (name, shape, little-endian bytes) in their order. Equal runs give equal bytes:
/// the crate's own `serialize` takes the metadata in a hash map, and so writes it in another order each time.
///
/// # Errors
/// The header cannot be written as JSON.
fn serialized(
    tensors: &[(&str, Vec<usize>, &[u8])],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), serde_json::to_value(metadata)?);
    }
    let mut end = 0;
    for (name, shape, bytes) in tensors {
        let start = end;
        end += bytes.len();
        let entry = json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, end] });
        header.insert((*name).into(), entry);
    }
    let mut header = serde_json::to_vec(&header)?;
    // The data begin at a multiple of 8 bytes, as the crate writes them.
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.append(&mut header);
    for (_, _, bytes) in tensors {
        file.extend_from_slice(bytes);
    }
    Ok(file)
}

/// The bytes of the header of a safetensors file of which `head` is the beginning.
///
/// # Errors
/// There are too few bytes to say, or the header is larger than `limits` allow: a few megabytes are a large one.
pub(crate) fn header_length(head: &[u8], limits: &ReadLimits) -> Result<usize> {
    let length = head
        .first_chunk::<8>()
        .map(|b| u64::from_le_bytes(*b))
        .with_context(|| {
            format!(
                "its {} bytes are too few for a safetensors header: it was cut short",
                head.len()
            )
        })?;
    limits.budget().need("safetensors header", length)?;
    usize::try_from(length).context("its safetensors header does not fit in memory")
}

/// Checks what the header alone tells: that there are latents of a size within `limits`. `head` is the file's beginning,
/// header included, so that a checkpoint of gigabytes is refused before it is read.
///
/// # Errors
/// As [`Latents::from_safetensors`].
pub(crate) fn check_header(head: &[u8], limits: &ReadLimits) -> Result<()> {
    let length = header_length(head, limits)?;
    let held = head.len() - 8;
    let header = head[8..].get(..length).with_context(|| {
        format!("its safetensors header should have {length} bytes, but only {held} follow: it was cut short")
    })?;
    let header: Map<String, Value> = serde_json::from_slice(header)
        .map_err(|e| anyhow::anyhow!("its safetensors header is damaged: {e}"))?;
    let names = header.keys().map(String::as_str);
    let name = choose(names.filter(|n| *n != "__metadata__").collect())?;
    let sides = header[name].get("shape").and_then(Value::as_array);
    let shape: Option<Vec<usize>> = sides.and_then(|sides| {
        let side = |side: &Value| usize::try_from(side.as_u64()?).ok();
        sides.iter().map(side).collect()
    });
    let shape = shape.with_context(|| {
        format!("its safetensors header is damaged: tensor `{name}` has no shape")
    })?;
    check_size(name, &shape, limits)?;
    match header[name].get("dtype").and_then(Value::as_str) {
        Some("F16" | "BF16" | "F32" | "F64") => Ok(()),
        other => bail!(
            "tensor `{name}` holds {} values; expected F16, BF16, F32 or F64",
            other.unwrap_or("unknown")
        ),
    }
}

/// The tensor that holds the latents, by its name or by being the only one.
fn choose(mut names: Vec<&str>) -> Result<&str> {
    names.sort_unstable();
    let known = ["latents", "latent", COMFY_KEY, "samples"]
        .into_iter()
        .find(|n| names.contains(n));
    match (known, names.as_slice()) {
        (Some(name), _) => Ok(name),
        (None, [only]) => Ok(only),
        (None, []) => bail!("it holds no tensor"),
        (None, several) => {
            let weights = several.len() > 8 || several.iter().any(|n| n.ends_with(".weight"));
            let what = if weights {
                ": it looks like a model's weights, not latents"
            } else {
                ""
            };
            let first = several.iter().take(3).map(|n| shortened(n));
            bail!(
                "it holds {} tensors ({}{}){what}; expected one named `latents`, `latent` or `{COMFY_KEY}`, \
                 or a single tensor",
                several.len(),
                first.collect::<Vec<_>>().join(", "),
                if several.len() > 3 { ", ..." } else { "" }
            )
        }
    }
}

/// A tensor's values, whatever its float type.
fn floats(name: &str, tensor: &TensorView) -> Result<Vec<f32>> {
    match tensor.dtype() {
        Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64 => Ok(tensor
            .load(&Device::Cpu)?
            .to_dtype(DType::F32)?
            .flatten_all()?
            .to_vec1()?),
        other => bail!("tensor `{name}` holds {other:?} values; expected F16, BF16, F32 or F64"),
    }
}

fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
