//! Stable Diffusion latents from files, and the scale of their values. *Scaled* means VAE output x the VAE's scaling factor (0.18215); *raw* is without it.

mod npz;
mod safetensors;

use std::collections::BTreeMap;

use anyhow::{Result, bail, ensure};

pub(crate) use self::npz::check_head as check_npz_head;
pub(crate) use self::safetensors::{check_header, header_length};
use crate::limits::ReadLimits;
use crate::metadata::{FoundPrompt, Metadata, a1111, comfy};

/// Image pixels per latent position, in each direction, of every Stable Diffusion VAE.
const PIXELS_PER_LATENT: u64 = 8;
/// The metadata key under which files of ours state what [`Latents::pixels_per_position`] gives.
pub const PIXELS_KEY: &str = "sd_upscale.pixels_per_latent";
/// Stable Diffusion 1, 2 and XL latents have 4 channels.
const CHANNELS: usize = 4;
/// What no check can find out, to be said when latents are read.
pub const SDXL_NOTE: &str = "latents of Stable Diffusion XL have the same shape as those of 1 and 2 and cannot be told \
     apart; this upscaler gives wrong colours for them";
/// Between the spread of scaled latents (near 1) and of raw ones (near 1 / 0.18215 = 5.5), nearer to the middle of
/// the two on a logarithmic scale (2.34) and a little above, as scaled is the convention where nothing is stated.
const SPREAD_BETWEEN: f32 = 2.5;

/// Which convention a file follows, and so what scale its values have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LatentKind {
    /// A tensor saved by hand, as from diffusers' `output_type="latent"`: the file does not state its scale.
    Unstated,
    /// A safetensors file of ours: scaled, and says so.
    Ours,
    /// ComfyUI with `latent_format_version_0`: raw.
    ComfyRaw,
    /// ComfyUI without that key: scaled.
    ComfyScaled,
    /// A cache of kohya's sd-scripts: raw.
    SdScripts,
}

/// `--latent-scale`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LatentScale {
    /// By the file's kind, else by the spread of the values.
    #[default]
    Auto,
    /// As UNets read them, whatever the file says.
    Scaled,
    /// As VAEs give them, whatever the file says.
    Raw,
}

/// What the values of latents are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// VAE output times the VAE's scaling factor, with a spread near 1: what UNets read.
    Scaled,
    /// VAE output.
    Raw,
}

impl Scale {
    /// The value of `--latent-scale` that means it.
    pub fn name(self) -> &'static str {
        match self {
            Scale::Scaled => "scaled",
            Scale::Raw => "raw",
        }
    }
}

/// A batch of latents as a file holds them.
#[derive(Clone, Debug)]
pub struct Latents {
    /// (batch, 4, height, width), finite.
    pub data: Vec<f32>,
    /// How many there are, at least 1.
    pub batch: usize,
    /// In latent positions, of 8 pixels each.
    pub height: usize,
    /// In latent positions, of 8 pixels each.
    pub width: usize,
    /// The convention that the file follows.
    pub kind: LatentKind,
    /// The file's string metadata, e.g. ComfyUI's `prompt` and `workflow`.
    pub metadata: BTreeMap<String, String>,
    /// What the reader of the file should be told.
    pub warnings: Vec<String>,
}

impl Latents {
    /// Scaled latents from memory; `data` is (batch, 4, height, width).
    ///
    /// # Panics
    /// `data` has another length.
    pub fn from_scaled(data: Vec<f32>, batch: usize, height: usize, width: usize) -> Self {
        assert_eq!(
            data.len(),
            batch * CHANNELS * height * width,
            "data is (batch, 4, height, width)"
        );
        Self {
            data,
            batch,
            height,
            width,
            kind: LatentKind::Ours,
            metadata: BTreeMap::new(),
            warnings: Vec::new(),
        }
    }

    /// Checks an array's shape, then its values, which `values` gives in C order.
    pub(crate) fn from_array(
        name: &str,
        shape: &[usize],
        kind: LatentKind,
        limits: &ReadLimits,
        values: impl FnOnce() -> Result<Vec<f32>>,
    ) -> Result<Self> {
        let (batch, height, width) = check_size(name, shape, limits)?;
        let data = values()?;
        let bad = data.iter().filter(|v| !v.is_finite()).count();
        if let Some(first) = data.iter().position(|v| !v.is_finite()) {
            bail!(
                "tensor `{name}` holds NaN or infinity: {bad} of {} values, the first at index {first}; \
                 it was written by a run that failed (often f16 overflow), make it again in f32 or bf16",
                data.len()
            );
        }
        Ok(Self {
            data,
            batch,
            height,
            width,
            kind,
            metadata: BTreeMap::new(),
            warnings: Vec::new(),
        })
    }

    /// Image pixels that a position stands for, in each direction: 8, as for every Stable Diffusion VAE, unless the file
    /// states another number ([`PIXELS_KEY`]).
    pub fn pixels_per_position(&self) -> usize {
        let stated = self.metadata.get(PIXELS_KEY);
        stated
            .and_then(|text| text.parse().ok())
            .filter(|pixels| (1..=64).contains(pixels))
            .unwrap_or(PIXELS_PER_LATENT as usize)
    }

    /// The prompt in the file's metadata: ComfyUI's graph, A1111's text, or a plain `prompt`, as our own files have.
    pub fn prompt(&self) -> Option<FoundPrompt> {
        let a1111 = || a1111::from_parameters(self.metadata.get("parameters")?);
        self.stated_prompt().or_else(a1111)
    }

    fn stated_prompt(&self) -> Option<FoundPrompt> {
        let text = self
            .metadata
            .get("prompt")
            .filter(|text| !text.trim().is_empty())?;
        if text.trim_start().starts_with('{') {
            return comfy::from_graph(text);
        }
        let negative = self
            .metadata
            .get("negative_prompt")
            .cloned()
            .unwrap_or_default();
        Some(FoundPrompt {
            prompt: text.clone(),
            negative,
            origin: "the latents' metadata",
        })
    }

    /// ComfyUI's graph and workflow, for an image that is made of these latents.
    pub fn image_metadata(&self) -> Metadata {
        let graphs = self.metadata.iter().filter(|(key, text)| {
            matches!(key.as_str(), "prompt" | "workflow") && text.trim_start().starts_with('{')
        });
        let text = graphs
            .map(|(key, text)| (key.clone(), text.clone()))
            .collect();
        Metadata {
            text,
            ..Metadata::default()
        }
    }

    /// The standard deviation of all values.
    pub fn spread(&self) -> f32 {
        let n = self.data.len() as f64;
        let mean = self.data.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let square = |&v: &f32| (f64::from(v) - mean).powi(2);
        (self.data.iter().map(square).sum::<f64>() / n).sqrt() as f32
    }

    /// The scale of the values under `choice`, and a sentence where that was judged or looks wrong.
    pub fn scale(&self, choice: LatentScale) -> (Scale, Option<String>) {
        let looks = if self.spread() >= SPREAD_BETWEEN {
            Scale::Raw
        } else {
            Scale::Scaled
        };
        let spread = format!(
            "their spread is {:.2} (scaled ones are near 1, raw ones near 5.5)",
            self.spread()
        );
        let (scale, what) = match (choice, self.kind) {
            (LatentScale::Scaled, _) => return (Scale::Scaled, None),
            (LatentScale::Raw, _) => return (Scale::Raw, None),
            (_, LatentKind::Ours) => return (Scale::Scaled, None),
            (_, LatentKind::Unstated) => {
                let message = format!(
                    "the file does not state the scale of its latents; {spread}, so they are taken as {} \
                     (--latent-scale decides otherwise)",
                    looks.name()
                );
                return (looks, Some(message));
            }
            (_, LatentKind::ComfyRaw) => (Scale::Raw, "a ComfyUI latent with its version mark"),
            (_, LatentKind::ComfyScaled) => {
                (Scale::Scaled, "a ComfyUI latent without a version mark")
            }
            (_, LatentKind::SdScripts) => (Scale::Raw, "an sd-scripts cache"),
        };
        let message = (scale != looks).then(|| {
            format!(
                "the latents are taken as {}, as in {what}, but {spread}; \
                 if the result looks wrong, give --latent-scale {}",
                scale.name(),
                looks.name()
            )
        });
        (scale, message)
    }

    /// The values in the upscaler's scale: those of `scale` raw times `scaling_factor`, the VAE's.
    pub fn into_scaled(mut self, scale: Scale, scaling_factor: f32) -> Self {
        if scale == Scale::Raw {
            self.data.iter_mut().for_each(|v| *v *= scaling_factor);
        }
        self.kind = LatentKind::Ours;
        self
    }

    fn shape(&self) -> Vec<usize> {
        vec![self.batch, CHANNELS, self.height, self.width]
    }
}

/// A name out of a file for a message: one line, and not much of a long one.
fn shortened(name: &str) -> String {
    let printable = name.chars().map(|c| if c.is_control() { ' ' } else { c });
    match name.chars().count() {
        ..=80 => printable.collect(),
        _ => printable.take(77).chain("...".chars()).collect(),
    }
}

/// [`check_shape`], and that the picture is within `limits`.
fn check_size(name: &str, shape: &[usize], limits: &ReadLimits) -> Result<(usize, usize, usize)> {
    let (batch, height, width) = check_shape(name, shape)?;
    let side = |n: usize| (n as u64).saturating_mul(PIXELS_PER_LATENT);
    limits.check_pixels(side(width), side(height))?;
    Ok((batch, height, width))
}

/// (batch, height, width) of an array of 4-channel latents; other models' latents are refused by name.
fn check_shape(name: &str, shape: &[usize]) -> Result<(usize, usize, usize)> {
    let name = shortened(name);
    let found = match shape.len() {
        ..=8 => format!("tensor `{name}` has shape {shape:?}"),
        many => format!("tensor `{name}` has {many} dimensions"),
    };
    const WANT: &str =
        "expected (4, h, w) or (batch, 4, h, w), the latents of Stable Diffusion 1 or 2";
    let (batch, channels, height, width) = match *shape {
        [c, h, w] => (1, c, h, w),
        [b, c, h, w] => (b, c, h, w),
        [_, c, _, _, _] => {
            bail!("{found}: these are latents of a video model with {c} channels; {WANT}")
        }
        _ => bail!("{found}; {WANT}"),
    };
    ensure!(!shape.contains(&0), "{found}: it is empty; {WANT}");
    if channels == CHANNELS {
        return Ok((batch, height, width));
    }
    let owner = match channels {
        16 => {
            ": 16 channels are those of Stable Diffusion 3, Flux and others, which this upscaler does not know"
        }
        32 | 128 => {
            ": these are latents of another model (Flux 2, Sana or LTX), which this upscaler does not know"
        }
        _ if width == 64 => {
            ": this looks like the packed latents of Flux, which this upscaler does not know"
        }
        _ if width == CHANNELS => ": the channels are last; move them to the front",
        3 => ": 3 channels are an image, not latents; save it as PNG",
        _ => "",
    };
    bail!("{found}{owner}; {WANT}")
}
