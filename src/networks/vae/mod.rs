//! The autoencoder: images to latents and back. Which of the two kinds it is, its configuration says: Stable Diffusion's own
//! (`kl`), or one distilled from it (`tiny`), about a twentieth of the work, whose latents are the same.

mod kl;
mod tiny;

use std::ops::Range;

use anyhow::{Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

pub use self::kl::KlConfig;
pub use self::tiny::TinyConfig;
use crate::device::Placement;
use crate::layers::bands::{Room, Source};
use crate::model::{PartFiles, Weights};

/// What Stable Diffusion's raw latents, those of its KL autoencoder, are multiplied by: the scale of all UNets of its family.
/// (`scaling_factor` of `stabilityai/sd-x2-latent-upscaler` and of Stable Diffusion 1 and 2.)
const STABLE_DIFFUSION: f64 = 0.18215;

/// `vae/config.json`.
#[derive(Clone, Debug)]
pub enum VaeConfig {
    /// An AutoencoderKL's.
    Kl(KlConfig),
    /// An AutoencoderTiny's.
    Tiny(TinyConfig),
}

/// What every autoencoder's configuration says of its kind.
#[derive(Deserialize)]
#[serde(default)]
struct Class {
    #[serde(rename = "_class_name")]
    name: String,
}

impl Default for Class {
    fn default() -> Self {
        Self {
            name: KL.to_string(),
        }
    }
}

/// The classes of diffusers that are known here.
const KL: &str = "AutoencoderKL";
const TINY: &str = "AutoencoderTiny";

impl VaeConfig {
    /// Reads a VAE's `config.json`. A single file of weights goes with the model's own; one of an AutoencoderTiny needs none.
    ///
    /// # Errors
    /// It is missing, or is not an AutoencoderKL's or AutoencoderTiny's.
    pub fn load(files: &PartFiles) -> Result<Self> {
        if names_of_file(files)?.is_some_and(|names| names == Names::Tiny) {
            return Self::of_tiny_file(files);
        }
        let class: Class = files.json("config.json")?;
        match &*class.name {
            KL => {
                let config: KlConfig = files.json("config.json")?;
                config.check_numbers()?;
                Ok(Self::Kl(config))
            }
            TINY => {
                let config: TinyConfig = files.json("config.json")?;
                config.check()?;
                Ok(Self::Tiny(config))
            }
            other => bail!(
                "vae/config.json: _class_name is {other:?}; expected {KL} (such as stabilityai/sd-vae-ft-mse) or {TINY} (such as madebyollin/taesd)"
            ),
        }
    }

    /// The model's own configuration where that is of the kind, else the published one, which is diffusers' default.
    fn of_tiny_file(files: &PartFiles) -> Result<Self> {
        let own = PartFiles {
            weights: None,
            ..files.clone()
        };
        Ok(match Self::load(&own) {
            Ok(own @ Self::Tiny(_)) => own,
            _ => Self::Tiny(TinyConfig::default()),
        })
    }

    /// Of a latent position.
    pub fn latent_channels(&self) -> usize {
        match self {
            Self::Kl(config) => config.latent_channels,
            Self::Tiny(config) => config.latent_channels,
        }
    }

    /// Of an image.
    pub fn image_channels(&self) -> usize {
        match self {
            Self::Kl(config) => config.in_channels,
            Self::Tiny(config) => config.in_channels,
        }
    }

    /// Pixels to a latent position, in each direction.
    pub fn factor(&self) -> usize {
        match self {
            Self::Kl(config) => config.factor(),
            Self::Tiny(config) => config.factor(),
        }
    }

    /// What the encoder gives, times this, are latents in the UNet's scale.
    pub fn scaling_factor(&self) -> f64 {
        match self {
            Self::Kl(config) => config.scaling_factor,
            Self::Tiny(config) => config.scaling_factor,
        }
    }

    /// Raw latents, as other programs keep them in files, times this are those in the UNet's scale. Raw is what a KL autoencoder
    /// gives, whichever is at work here: files stay the same.
    pub fn raw_factor(&self) -> f64 {
        match self {
            Self::Kl(config) => config.scaling_factor,
            Self::Tiny(_) => STABLE_DIFFUSION,
        }
    }

    /// Whether positions of its smallest map attend to each other.
    pub fn has_attention(&self) -> bool {
        match self {
            Self::Kl(config) => config.mid_block_add_attention,
            Self::Tiny(_) => false,
        }
    }

    /// Whether it is an AutoencoderTiny's.
    pub fn is_tiny(&self) -> bool {
        matches!(self, Self::Tiny(_))
    }

    /// The tensors of both halves under diffusers' names.
    fn weights(&self, files: &PartFiles, placement: &Placement) -> Result<Weights> {
        let weights = files.weights("diffusion_pytorch_model", placement)?;
        match self {
            Self::Kl(config) => kl::checked(config, weights),
            Self::Tiny(config) => {
                config.check_weights(&weights)?;
                Ok(weights)
            }
        }
    }
}

/// How the tensors of a single file are called.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Names {
    /// As an AutoencoderTiny's in diffusers.
    Tiny,
    Other,
}

/// Those of a single file of weights; None where the weights lie in a folder.
///
/// # Errors
/// The file cannot be read, or is one of the halves in which TAESD was first published.
fn names_of_file(files: &PartFiles) -> Result<Option<Names>> {
    let Some(path) = &files.weights else {
        return Ok(None);
    };
    let nowhere = Placement::new(&Device::Cpu, DType::F32);
    let weights = files.weights("", &nowhere)?;
    // Their lists begin at the halves themselves: `1.weight` is the decoder's first convolution, `0.weight` the encoder's.
    let half = match (weights.contains("0.weight"), weights.contains("1.weight")) {
        (true, _) if weights.contains("1.conv.0.weight") => Some("encoder"),
        (_, true) if weights.contains("3.conv.0.weight") => Some("decoder"),
        _ => None,
    };
    if let Some(half) = half {
        bail!(
            "{} holds the {half} of TAESD alone, in its first layout; give both halves in diffusers' layout: --vae madebyollin/taesd, or that repository's diffusion_pytorch_model.safetensors",
            path.display()
        );
    }
    let tiny = weights.contains("decoder.layers.0.weight");
    Ok(Some(if tiny { Names::Tiny } else { Names::Other }))
}

/// What an image is encoded to, before scaling: a distribution, or a point. Each (b, latent channels, h, w), float32.
pub struct Posterior {
    pub mean: Tensor,
    /// None where there is no spread: an AutoencoderTiny's.
    pub logvar: Option<Tensor>,
}

impl Posterior {
    /// `mean + std * noise`, so many values of which `draw` is asked for; of a point the mean, and nothing is drawn, as in diffusers'
    /// `retrieve_latents`. The logarithm is clamped to -30..20 as in diffusers' DiagonalGaussianDistribution.
    ///
    /// # Errors
    /// `draw` gave another number of values.
    pub fn sample(&self, draw: impl FnOnce(usize) -> Vec<f32>) -> Result<Tensor> {
        let Some(logvar) = &self.logvar else {
            return Ok(self.mean.clone());
        };
        let count = self.mean.elem_count();
        let drawn = draw(count);
        ensure!(
            drawn.len() == count,
            "{} values of noise for {count}",
            drawn.len()
        );
        let noise = Tensor::from_vec(drawn, self.mean.shape(), self.mean.device())?;
        let std = (logvar.clamp(-30f32, 20f32)? * 0.5)?.exp()?;
        Ok((&self.mean + (std * noise)?)?)
    }

    /// The same on this device.
    ///
    /// # Errors
    /// The device gives up.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let logvar = self.logvar.as_ref();
        Ok(Self {
            mean: self.mean.to_device(device)?,
            logvar: logvar.map(|logvar| logvar.to_device(device)).transpose()?,
        })
    }
}

/// Image to latents.
pub struct Encoder(EncoderKind);

enum EncoderKind {
    Kl(Box<kl::Encoder>),
    Tiny(Box<tiny::Encoder>),
}

impl Encoder {
    /// Reads the encoder's half of a VAE.
    ///
    /// # Errors
    /// A file is missing or damaged, or a tensor does not fit config.json.
    pub fn load(files: &PartFiles, placement: &Placement) -> Result<Self> {
        let config = VaeConfig::load(files)?;
        let all = config.weights(files, placement)?;
        Self::new(&config, &all)
    }

    /// Of shapes alone, for planning what a run in `placement` takes.
    ///
    /// # Errors
    /// The configuration is of no such network.
    pub fn of_shapes(config: &VaeConfig, placement: &Placement) -> Result<Self> {
        Self::new(config, &Weights::none(placement))
    }

    fn new(config: &VaeConfig, all: &Weights) -> Result<Self> {
        Ok(Self(match config {
            VaeConfig::Kl(config) => EncoderKind::Kl(Box::new(kl::Encoder::new(config, all)?)),
            VaeConfig::Tiny(config) => {
                EncoderKind::Tiny(Box::new(tiny::Encoder::new(config, all)?))
            }
        }))
    }

    /// (b, 3, H, W) in [-1, 1], sides multiples of [`VaeConfig::factor`] -> posterior of (b, 4, H / f, W / f).
    ///
    /// # Errors
    /// The image does not have the channels that config.json says.
    pub fn encode(&self, image: &Tensor) -> Result<Posterior> {
        self.encode_within(image, &Room::unlimited())
    }

    /// The same, its maps kept as `room` says.
    ///
    /// # Errors
    /// Those of [`encode`](Self::encode), or there is no place for a map.
    pub fn encode_within(&self, image: &Tensor, room: &Room) -> Result<Posterior> {
        match &self.0 {
            EncoderKind::Kl(encoder) => encoder.encode_within(image, room),
            EncoderKind::Tiny(encoder) => encoder.encode_within(image, room),
        }
    }
}

/// Latents to image.
pub struct Decoder(DecoderKind);

enum DecoderKind {
    Kl(Box<kl::Decoder>),
    Tiny(Box<tiny::Decoder>),
}

impl Decoder {
    /// Reads the decoder's half of a VAE.
    ///
    /// # Errors
    /// A file is missing or damaged, or a tensor does not fit config.json.
    pub fn load(files: &PartFiles, placement: &Placement) -> Result<Self> {
        let config = VaeConfig::load(files)?;
        let all = config.weights(files, placement)?;
        Self::new(&config, &all)
    }

    /// Of shapes alone, for planning what a run in `placement` takes.
    ///
    /// # Errors
    /// The configuration is of no such network.
    pub fn of_shapes(config: &VaeConfig, placement: &Placement) -> Result<Self> {
        Self::new(config, &Weights::none(placement))
    }

    fn new(config: &VaeConfig, all: &Weights) -> Result<Self> {
        Ok(Self(match config {
            VaeConfig::Kl(config) => DecoderKind::Kl(Box::new(kl::Decoder::new(config, all)?)),
            VaeConfig::Tiny(config) => {
                DecoderKind::Tiny(Box::new(tiny::Decoder::new(config, all)?))
            }
        }))
    }

    /// (b, 4, h, w), *not* scaled (divided by the scaling factor) -> (b, 3, h * f, w * f), about [-1, 1], float32.
    ///
    /// # Errors
    /// The latents do not have the channels that config.json says.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let mut bands = Vec::new();
        self.decode_within(latents, &Room::unlimited(), |band| {
            bands.push(band);
            Ok(())
        })?;
        Ok(Tensor::cat(&bands, 2)?)
    }

    /// The same, its maps kept as `room` says: bands of lines (b, 3, n, w * f), from the top down, to `finished`.
    ///
    /// # Errors
    /// Those of [`decode`](Self::decode), there is no place for a map, or an error of `finished`.
    pub fn decode_within(
        &self,
        latents: &Tensor,
        room: &Room,
        finished: impl FnMut(Tensor) -> Result<()>,
    ) -> Result<()> {
        match &self.0 {
            DecoderKind::Kl(decoder) => decoder.decode_within(latents, room, finished),
            DecoderKind::Tiny(decoder) => decoder.decode_within(latents, room, finished),
        }
    }
}

/// Hands on a picture that is computed as it is read, in these bands.
fn lines_of_picture(
    image: Source,
    bands: Vec<Range<usize>>,
    room: &Room,
    mut finished: impl FnMut(Tensor) -> Result<()>,
) -> Result<()> {
    if let [_] = &bands[..] {
        return finished(image.into_whole()?.0.to_nchw()?);
    }
    for lines in bands {
        let band = image.window(lines.clone())?.exactly(lines.clone())?;
        image.release(lines.end);
        finished(band.to_nchw()?)?;
        room.passing();
    }
    Ok(())
}
