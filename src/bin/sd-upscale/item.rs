//! What travels between the threads of a run: what was read, and what was made of it.

use std::path::PathBuf;
use std::time::Instant;

use sd_upscale::Settings;
use sd_upscale::latents::{Latents, Scale};
use sd_upscale::picture::{Format, Picture};
use sd_upscale::plan::{Source, Variant, Written};

use crate::job::Job;
use crate::preview::Preview;
use crate::report::{Outcome, Status};
pub use crate::size::Size;

/// Of a picture beside an output: in the format of the result; PNG beside latents.
pub fn picture_format(kind: Written) -> Format {
    match kind {
        Written::Image(format) => format,
        Written::Safetensors | Written::ComfyLatent => Format::Png,
    }
}

/// Where a result goes.
#[derive(Clone, Debug)]
pub enum Place {
    File(PathBuf),
    Stdout,
}

impl Place {
    pub fn name(&self) -> String {
        match self {
            Place::File(path) => path.display().to_string(),
            Place::Stdout => "-".into(),
        }
    }
}

/// What an item was read from.
pub enum Content {
    Picture(Picture),
    /// One of a file's latents, as the file holds them.
    Latents(Latents),
    /// No file: words, and the size of the picture that is made of them before it is upscaled.
    Prompt {
        text: String,
        size: Size,
    },
}

/// Where the picture of what an item was upscaled from goes.
#[derive(Clone, Debug)]
pub struct LowResPlace {
    pub picture: PathBuf,
    /// Beside latents: these too.
    pub latents: Option<PathBuf>,
}

/// One picture to make.
pub struct Item {
    pub source: Source,
    pub content: Content,
    pub settings: Settings,
    pub kind: Written,
    pub place: Place,
    /// Where the decoded input goes, where it was asked for.
    pub low_res: Option<LowResPlace>,
    /// Where it is shown beside the result, where that was asked for.
    pub compare: Option<PathBuf>,
    /// What shows the steps so far, where it was asked for.
    pub preview: Option<Preview>,
    /// The result's.
    pub expected: Size,
    /// Whether its file holds others.
    pub of_many: bool,
    /// Of latents: for all of a file alike.
    pub scale: Scale,
    /// Of the UNet, once it was upscaled.
    pub evaluations: Option<usize>,
    pub start: Instant,
}

impl Item {
    /// What a batch must have in common: kind, size and all settings.
    pub fn shares_a_batch(&self, other: &Self) -> bool {
        let kind = |item: &Self| match &item.content {
            Content::Picture(picture) => (0, picture.pixels.width, picture.pixels.height),
            Content::Latents(latents) => (1, latents.width, latents.height),
            Content::Prompt { size, .. } => (2, size.width, size.height),
        };
        kind(self) == kind(other) && self.settings == other.settings
    }

    /// Whether what it was upscaled from is to be decoded: latents.
    pub fn decodes_low_res(&self) -> bool {
        let picture = matches!(self.content, Content::Picture(_));
        self.low_res.is_some() || (self.compare.is_some() && !picture)
    }

    /// Drops the input's colours, which nothing needs once it was upscaled but to fix the result's by them, and to compare.
    pub fn without_colors(&mut self) {
        if let (Content::Picture(picture), None) = (&mut self.content, &self.compare) {
            picture.pixels.values = Vec::new();
        }
    }

    pub fn outcome(&self, job: &Job, status: Status) -> Outcome {
        Outcome {
            output: Some(self.place.name()),
            seconds: self.start.elapsed().as_secs_f64(),
            evaluations: self.evaluations,
            ..Outcome::new(job, self.source.to_string(), self.variant(), status)
        }
    }

    fn variant(&self) -> Variant {
        Variant {
            seed: self.settings.seed,
            guidance: self.settings.guidance,
        }
    }
}

/// What the model's latents are, for those who read them from a file.
#[derive(Clone, Copy, Debug)]
pub struct LatentForm {
    /// Scaled latents are raw ones times this.
    pub scaling_factor: f32,
    /// To a latent position, in each direction.
    pub pixels: usize,
}
