//! What an upscale takes of memory, planned before it is begun: of each stage its weights, and how its maps are kept so that
//! all of it fits. The peak of a plan is not a formula but the stage itself, run on maps without values.

mod best;
mod stage_plan;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use candle_core::Device;

use self::best::{Bounds, Folder, Measure, Subject};
pub use self::stage_plan::{StagePlan, TooLittle};
use super::base::BaseModel;
use super::denoise::Passes;
use super::padding::padded_side;
use super::{LowRes, Sampler, Settings, Stage, Upscaler, preview};
use crate::device::{self, Placement};
use crate::networks::unet::UNet;
use crate::networks::vae::{Decoder, Encoder};
use crate::networks::{Room, counted};

/// What the process takes before any network is loaded: the program, its threads, tokenizer and picture (measured: 60 MB).
const PROCESS: u64 = 60_000_000;
/// Bytes a pixel of the input: as read, as a tensor, and extended to what the networks take.
const INPUT_PIXEL: u64 = 36;
/// Of the memory that is free, what a plan takes when nothing else is said: the rest is the system's, and for estimates that are off.
const SHARE: f64 = 0.9;

/// Of the memory that `--max-memory` allows, what a plan takes: estimates are off by a few hundredths.
const KEPT_TO: f64 = 0.96;

/// What an upscale begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputKind {
    /// An image, which is encoded first.
    Image,
    /// Latents.
    Latents,
    /// A prompt alone, of which the base checkpoint makes latents.
    Prompt,
}

/// An upscale that a plan is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanFor {
    /// Of the input, or of what its latents stand for, in pixels.
    pub width: usize,
    /// The same.
    pub height: usize,
    /// What it is made of.
    pub input: InputKind,
    /// Whether the result is decoded to a picture.
    pub to_picture: bool,
}

/// What the stages of an upscaler are in shapes, and what was found of them.
#[derive(Default)]
pub struct Planner {
    /// Bytes of the weights.
    weights: HashMap<Stage, u64>,
    /// Plans that fit without any cost, by what they are for.
    easy: HashMap<(Stage, Sides), StagePlan>,
    /// What runs by.
    sampler: Sampler,
}

impl Planner {
    /// Plans from here on are for this sampler.
    pub(super) fn plan_for(&mut self, sampler: Sampler) {
        self.sampler = sampler;
    }
}

/// Rows, height and width of what a stage is given.
type Sides = (usize, usize, usize);

impl Upscaler {
    /// What an upscale would take and how, a stage after the other: the encoder where an image is to be encoded, the base checkpoint's UNet
    /// where a prompt alone is given, the UNet's last pass, the base checkpoint's again where the result is refined, the decoder where a
    /// picture is to be made.
    ///
    /// # Errors
    /// [`TooLittle`], in the error's chain: one of the stages cannot be made to fit.
    pub fn plan(&mut self, work: PlanFor, settings: &Settings) -> Result<Vec<StagePlan>> {
        let PlanFor {
            width,
            height,
            input,
            to_picture,
        } = work;
        let factor = self.vae_config.factor();
        let (multiple, minimum) = self.low_res_sides();
        let padded = |n: usize| padded_side(n, multiple, minimum);
        self.planner.plan_for(settings.sampler);
        let mut plans = Vec::new();
        let base_rows = if settings.base().is_guided() { 2 } else { 1 };
        match input {
            InputKind::Image => {
                let side = |n: usize| factor * padded(n.div_ceil(factor));
                plans.push(self.plan_stage(Stage::Encode, (1, side(height), side(width)))?);
            }
            InputKind::Prompt => {
                let sides = (base_rows, height.div_ceil(factor), width.div_ceil(factor));
                plans.push(self.plan_stage(Stage::Base, sides)?);
            }
            InputKind::Latents => {}
        }
        let before_last = |n: usize| match settings.scale.passes() {
            1 => n.div_ceil(factor),
            passes => (2 * n).div_ceil(factor) << (passes - 2),
        };
        let (h, w) = (
            2 * padded(before_last(height)),
            2 * padded(before_last(width)),
        );
        let rows = if settings.guidance > 1.0 { 2 } else { 1 };
        let together = self.plan_stage(Stage::Denoise, (rows, h, w));
        plans.push(match together {
            Err(_) if rows > 1 => self.plan_stage(Stage::Denoise, (1, h, w))?,
            other => other?,
        });
        if let (Some(preview), Some(steps)) = (self.plan_to_preview((h, w))?, plans.last_mut()) {
            steps.peak = steps.peak.max(preview.peak);
        }
        if settings.refine.is_some() {
            plans.push(self.plan_stage(Stage::Base, (base_rows, h, w))?);
        }
        if to_picture {
            let whose = self.will_be_decoded_by(settings);
            let decode = |upscaler: &mut Self| upscaler.plan_stage(Stage::Decode, (1, h, w));
            plans.push(self.with_vae(whose, decode)?);
        }
        Ok(plans)
    }

    /// The room for the maps of encoding a padded image (1, 3, h, w).
    pub(super) fn room_to_encode(&mut self, h: usize, w: usize) -> Result<Room> {
        self.room(Stage::Encode, (1, h, w))
    }

    /// The room for the maps of decoding latents (1, c, h, w).
    pub(super) fn room_to_decode(&mut self, h: usize, w: usize) -> Result<Room> {
        self.room(Stage::Decode, (1, h, w))
    }

    /// The plan of a step of `pictures` latents (h, w) for so many prompts each; apart where both do not fit together.
    pub(super) fn plan_to_denoise(
        &mut self,
        pictures: usize,
        prompts: usize,
        (h, w): (usize, usize),
    ) -> Result<StagePlan> {
        if self.passes == Passes::Together {
            let plan = self.plan_to_run(Stage::Denoise, (pictures * prompts, h, w));
            if plan.is_ok() || prompts == 1 {
                return plan;
            }
            self.passes = Passes::Apart;
        }
        self.plan_to_run(Stage::Denoise, (pictures, h, w))
    }

    /// How what a step shows is decoded, latents (h, w), beside the UNet's weights: between two steps their maps are free. None where it is
    /// not decoded, or would take more than there is: no preview is worth a file.
    pub(super) fn plan_to_preview(&mut self, (h, w): (usize, usize)) -> Result<Option<StagePlan>> {
        if !self.previews || !preview::decodes(&self.vae_config) {
            return Ok(None);
        }
        let mut others = self.weights_of(Stage::Denoise)?;
        if self.encoder.is_some() {
            others += self.weights_of(Stage::Encode)?;
        }
        let sides = (1, h, w);
        let bounds = Bounds {
            folder: None,
            ..self.bounds(Stage::Decode, sides, others)?
        };
        Ok(self.subject(Stage::Decode, sides)?.best(&bounds).ok())
    }

    pub(super) fn room(&mut self, stage: Stage, sides: Sides) -> Result<Room> {
        Ok(Room::new(self.plan_to_run(stage, sides)?.limits))
    }

    /// The plan of a stage that is run now: what is not in its way stays.
    fn plan_to_run(&mut self, stage: Stage, sides: Sides) -> Result<StagePlan> {
        // Weights of other stages stay where everything fits beside them.
        let others = self.weights_loaded_beside(stage)?;
        if others > 0 {
            let easy = self.plan_easily(stage, sides, others)?;
            if let Some(plan) = easy {
                return Ok(plan);
            }
            self.forget_others(stage);
        }
        let plan = self.plan_stage(stage, sides)?;
        if plan.peak >= self.short_from(stage, sides)? {
            device::give_memory_back();
        }
        Ok(plan)
    }

    /// From which peak on a plan leaves little: then nothing is to be held that is not in use.
    fn short_from(&self, stage: Stage, sides: Sides) -> Result<u64> {
        const LEFT: u64 = 4;
        let most = self.bounds(stage, sides, 0)?.most;
        Ok(most - most / LEFT)
    }

    /// Bytes of the networks that are loaded for other stages.
    fn weights_loaded_beside(&mut self, stage: Stage) -> Result<u64> {
        let mut bytes = 0;
        for (other, is_loaded) in self.loaded() {
            if is_loaded && other != stage {
                bytes += self.weights_of(other)?;
            }
        }
        if self.has_other_decoder() {
            bytes += self.weights_of(Stage::Decode)?;
        }
        Ok(bytes)
    }

    /// Which stages' networks are loaded.
    fn loaded(&self) -> [(Stage, bool); 4] {
        [
            (
                Stage::Base,
                self.base.as_ref().is_some_and(BaseModel::is_loaded),
            ),
            (Stage::Encode, self.encoder.is_some()),
            (Stage::Denoise, self.unet.is_some()),
            (Stage::Decode, self.decoder.is_some()),
        ]
    }

    fn forget_others(&mut self, stage: Stage) {
        if stage != Stage::Base {
            self.base = None;
        }
        if stage != Stage::Encode {
            self.encoder = None;
        }
        if stage != Stage::Denoise {
            self.unet = None;
        }
        if stage != Stage::Decode {
            self.decoder = None;
        }
        self.forget_other_decoder();
    }

    /// The plan that costs nothing, where it fits beside `others` bytes of other networks.
    fn plan_easily(
        &mut self,
        stage: Stage,
        sides: Sides,
        others: u64,
    ) -> Result<Option<StagePlan>> {
        let bounds = self.bounds(stage, sides, others)?;
        let mut plan = match self.planner.easy.get(&(stage, sides)) {
            Some(plan) => plan.clone(),
            None => {
                let subject = self.subject(stage, sides)?;
                self.planner.weights.insert(stage, subject.weights);
                let plan = subject.easy()?;
                self.planner.easy.insert((stage, sides), plan.clone());
                plan
            }
        };
        plan.peak += bounds.others;
        Ok((plan.peak <= bounds.most).then_some(plan))
    }

    fn plan_stage(&mut self, stage: Stage, sides: Sides) -> Result<StagePlan> {
        if let Some(plan) = self.plan_easily(stage, sides, 0)? {
            return Ok(plan);
        }
        let bounds = self.bounds(stage, sides, 0)?;
        let best = self.subject(stage, sides)?.best(&bounds);
        best.map_err(|error| self.in_terms_of_what_was_allowed(error))
    }

    /// With what `--max-memory` would have to say, where it said too little.
    fn in_terms_of_what_was_allowed(&self, error: anyhow::Error) -> anyhow::Error {
        match (error.downcast_ref(), self.options.memory.most) {
            (Some(&TooLittle::InMemory { stage, least, .. }), Some(most)) => {
                let least = (least as f64 / KEPT_TO) as u64;
                TooLittle::InMemory { stage, least, most }.into()
            }
            _ => error,
        }
    }

    fn weights_of(&mut self, stage: Stage) -> Result<u64> {
        if let Some(&bytes) = self.planner.weights.get(&stage) {
            return Ok(bytes);
        }
        let bytes = self.subject(stage, (1, 8, 8))?.weights;
        self.planner.weights.insert(stage, bytes);
        Ok(bytes)
    }

    /// A stage for which plans are made.
    fn subject(&mut self, stage: Stage, (b, h, w): Sides) -> Result<Subject<'static>> {
        let on_card = !self.options.device.is_cpu();
        let factor = self.vae_config.factor();
        let window = |h: usize, w: usize| {
            let window = Room::unlimited().keys_window(h, w);
            (window != (h, w) && self.vae_config.has_attention()).then_some(window)
        };
        let zeros = |channels: usize, placement: &Placement| {
            crate::networks::zeros_without_memory((b, channels, h, w), placement.dtype)
        };
        // What is counted from here on are the network's weights.
        counted();
        let (window, measure): (_, Measure) = match stage {
            Stage::Encode => {
                let placement = &self.encoder_placement;
                let encoder = Encoder::of_shapes(&self.vae_config, placement)?;
                let image = zeros(self.vae_config.image_channels(), placement)?;
                let measure = move |room: &Room| {
                    encoder.encode_within(&image, room)?;
                    room.passing();
                    Ok(())
                };
                (window(h / factor, w / factor), Box::new(measure))
            }
            Stage::Text => bail!("the text stage has no maps to plan for"),
            Stage::Base => {
                let unet = self.base()?.of_shapes()?;
                (None, Box::new(move |room| unet.measure((b, h, w), room)))
            }
            Stage::Denoise => {
                let unet = UNet::of_shapes(self.unet_config.clone(), &self.placement)?;
                (None, Box::new(move |room| unet.measure((b, h, w), room)))
            }
            Stage::Decode => {
                let placement = &self.vae_placement;
                let decoder = Decoder::of_shapes(&self.vae_config, placement)?;
                let latents = zeros(self.vae_config.latent_channels(), placement)?;
                let measure = move |room: &Room| {
                    decoder.decode_within(&latents, room, |_| Ok(()))?;
                    room.passing();
                    Ok(())
                };
                (window(h, w), Box::new(measure))
            }
        };
        Ok(Subject {
            stage,
            weights: counted().weights,
            window,
            on_card,
            measure,
        })
    }

    /// What there is for a stage, beside `others` bytes of other networks.
    fn bounds(&self, stage: Stage, (b, h, w): Sides, others: u64) -> Result<Bounds> {
        let factor = self.vae_config.factor();
        let pixels = match stage {
            Stage::Text | Stage::Encode => h * w,
            Stage::Base => h * w * factor * factor,
            // Of the input, at half the size.
            Stage::Denoise | Stage::Decode => h * w * factor * factor / 4,
        } as u64;
        let device = &self.options.device;
        let memory = &self.options.memory;
        let on_cpu = device.is_cpu();
        // What is free now, and what this process has already.
        let own = if on_cpu {
            device::resident_memory()
        } else {
            self.weights_on_card()
        };
        let free = device::free_memory(device).map(|free| own + (free as f64 * SHARE) as u64);
        let asked = memory.most.map(|most| (most as f64 * KEPT_TO) as u64);
        let most = asked.or(free).unwrap_or(u64::MAX);
        let most = most.min(self.smaller.unwrap_or(u64::MAX));
        let folder = if on_cpu {
            spill_folder(memory.temp_dir.as_deref())
        } else {
            // To this machine's memory.
            let free = device::free_memory(&Device::Cpu).unwrap_or(u64::MAX);
            Some(Folder {
                path: PathBuf::new(),
                free: (free as f64 * SHARE) as u64,
            })
        };
        let others = match stage {
            // float32, of each row, which is at least one a picture.
            Stage::Denoise => {
                let one = 4 * b * self.vae_config.latent_channels() * h * w;
                others + (one * self.planner.sampler.latents_kept()) as u64
            }
            _ => others,
        };
        Ok(Bounds {
            most,
            others: if on_cpu {
                others + PROCESS + pixels * INPUT_PIXEL
            } else {
                others
            },
            folder,
        })
    }

    /// Bytes of the networks that are on the card.
    fn weights_on_card(&self) -> u64 {
        let bytes = |stage| self.planner.weights.get(stage).copied().unwrap_or(0);
        self.loaded()
            .iter()
            .filter(|(_, is_loaded)| *is_loaded)
            .map(|(stage, _)| bytes(stage))
            .sum()
    }

    /// Width and height of the picture `times` as large as the input, in pixels.
    pub(super) fn result_size(&self, input: &LowRes, times: usize) -> Result<(usize, usize)> {
        let (tensor, factor) = match input {
            LowRes::Prompt { width, height } => return Ok((times * width, times * height)),
            LowRes::Image(image) => (image, 1),
            LowRes::Latents(latents) => (latents, self.vae_config.factor()),
        };
        let (_, _, height, width) = tensor.dims4()?;
        Ok((times * factor * width, times * factor * height))
    }
}

/// Whether an error is that no plan fits.
pub(super) fn is_too_little(error: &anyhow::Error) -> bool {
    error.chain().any(<dyn std::error::Error>::is::<TooLittle>)
}

/// The folder for maps that do not fit: the one that was named, whatever it is; else the system's for temporary files where that is on a
/// disk, else `/var/tmp`, and none where both are in memory themselves.
fn spill_folder(named: Option<&Path>) -> Option<Folder> {
    let of = |path: &Path, space: device::Space| Folder {
        path: path.to_path_buf(),
        free: space.free,
    };
    let on_disk = |path: &Path| {
        let space = device::space_in(path).filter(|space| !space.in_memory)?;
        Some(of(path, space))
    };
    match named {
        Some(path) => device::space_in(path).map(|space| of(path, space)),
        None => on_disk(&std::env::temp_dir()).or_else(|| on_disk(Path::new("/var/tmp"))),
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_was_named_is_taken_though_it_is_in_memory() {
        for name in ["/dev/shm", "/var/tmp"] {
            let path = Path::new(name);
            if device::space_in(path).is_some() {
                let folder = spill_folder(Some(path)).unwrap();
                assert_eq!(folder.path, path);
            }
        }
        assert!(spill_folder(Some(Path::new("/not/there"))).is_none());
    }
}
