//! What an upscale takes of memory, planned before it is begun: of each stage its weights, and how its maps are kept so that
//! all of it fits. The peak of a plan is not a formula but the stage itself, run on maps without values.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::Device;

use super::denoise::Passes;
use super::padding::padded_side;
use super::{LowRes, Settings, Stage, Upscaler};
use crate::device::{self, Placement};
use crate::networks::unet::UNet;
use crate::networks::vae::{Decoder, Encoder};
use crate::networks::{Counted, Limits, Room, counted};

/// What the process takes before any network is loaded: the program, its threads, tokenizer and picture (measured: 60 MB).
const PROCESS: u64 = 60_000_000;
/// What the CPU kernels keep for their own use between calls (`kernels::cpu`'s pool), and what a call takes beside it.
const SCRATCH: u64 = 120_000_000;
/// Bytes a pixel of the input: as read, as a tensor, and extended to what the networks take.
const INPUT_PIXEL: u64 = 36;
/// Of the memory that is free, what a plan takes when nothing else is said: the rest is the system's, and for estimates that are off.
const SHARE: f64 = 0.9;
/// Bytes of a band, from what costs no time to the least. Larger ones gain nothing on the CPU, whose caches are far smaller.
const BANDS: [u64; 3] = [64 << 20, 16 << 20, 4 << 20];
/// The largest maps between two convolutions whose recomputation is considered.
const RECOMPUTED: usize = 4;

/// Times that a plan's kept maps are made fewer until it fits.
const ATTEMPTS: usize = 5;

/// What work costs, to choose between plans: multiplications and additions of convolutions and of matrix products a second, and
/// bytes that go out of memory and back.
struct Rates {
    convolutions: f64,
    products: f64,
    spilled: f64,
}

/// Four cores of a laptop with its disk.
const OF_CPU: Rates = Rates {
    convolutions: 4e11,
    products: 3e11,
    spilled: 3e8,
};
/// A card in the middle of the field, on PCI Express 4.
const OF_CARD: Rates = Rates {
    convolutions: 2e13,
    products: 4e13,
    spilled: 1e10,
};

/// How a stage keeps its maps, and what it takes.
#[derive(Clone, Debug, PartialEq)]
pub struct StagePlan {
    /// Which one.
    pub stage: Stage,
    /// Bytes in all, at the stage's peak.
    pub peak: u64,
    /// Of those, weights.
    pub weights: u64,
    /// Bytes that go out of memory, altogether.
    pub spilled: u64,
    pub(super) limits: Limits,
    /// Height and width of the window that positions of the VAE's attention see, where it is not all of the map.
    window: Option<(usize, usize)>,
    /// Whether it is planned for a card.
    on_card: bool,
}

impl fmt::Display for StagePlan {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        let megabytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        write!(
            f,
            "{}: about {:.2} GB, {:.2} of them weights",
            self.stage.name(),
            gigabytes(self.peak),
            gigabytes(self.weights)
        )?;
        let Limits {
            band, recomputed, ..
        } = self.limits;
        if band == u64::MAX {
            write!(f, "; maps kept whole")?;
        } else {
            write!(f, "; maps above {:.0} MiB kept in bands", megabytes(band))?;
        }
        if recomputed != u64::MAX {
            write!(
                f,
                "; those between two convolutions recomputed from {:.2} GB on",
                gigabytes(recomputed)
            )?;
        }
        if self.spilled > 0 {
            let place = match (&self.limits.folder, self.on_card) {
                (_, true) => "this machine's memory".into(),
                (Some(folder), _) => format!("a file in {}", folder.display()),
                (None, _) => "a file".into(),
            };
            write!(f, "; {:.1} GB spilled to {place}", gigabytes(self.spilled))?;
        }
        if let Some((high, wide)) = self.window {
            write!(
                f,
                "; the VAE's attention within windows of {wide}x{high} positions, not over all"
            )?;
        }
        Ok(())
    }
}

/// What a plan has to keep to.
struct Bounds {
    /// Bytes for everything.
    most: u64,
    /// Bytes of it that are not this stage's.
    others: u64,
    /// Where maps may go that do not fit; None where that gains nothing.
    folder: Option<Folder>,
}

struct Folder {
    path: PathBuf,
    /// Bytes.
    free: u64,
}

/// A stage as plans are made for it.
struct Subject<'a> {
    stage: Stage,
    window: Option<(usize, usize)>,
    on_card: bool,
    /// Runs it without values.
    measure: Box<dyn Fn(&Room) -> Result<()> + 'a>,
}

/// What a stage takes in one way of keeping its maps.
#[derive(Clone)]
struct Measured {
    /// Of maps and what is computed beside them.
    peak: u64,
    /// Of maps that are kept alone.
    held: u64,
    spilled: u64,
    /// Of that at a time.
    elsewhere: u64,
    work: Counted,
    between: Vec<u64>,
}

impl Subject<'_> {
    fn measured(&self, limits: &Limits) -> Result<Measured> {
        let room = Room::new(limits.clone());
        counted();
        (self.measure)(&room)?;
        Ok(Measured {
            peak: room.peak(),
            held: room.held_at_most(),
            spilled: room.spilled(),
            elsewhere: room.elsewhere_at_most(),
            work: counted(),
            between: room.between().into_iter().collect(),
        })
    }

    fn limits(&self, band: u64) -> Limits {
        Limits {
            band,
            ..Limits::none()
        }
    }

    /// The bands in the order in which they are tried. A card takes whole maps where they fit: what is recorded once is then
    /// replayed.
    fn bands(&self) -> Vec<u64> {
        let whole = self.on_card.then_some(u64::MAX);
        whole.into_iter().chain(BANDS).collect()
    }

    fn plan(&self, limits: Limits, measured: &Measured, fixed: u64, weights: u64) -> StagePlan {
        StagePlan {
            stage: self.stage,
            peak: fixed + measured.peak,
            weights,
            spilled: measured.spilled,
            limits,
            window: self.window,
            on_card: self.on_card,
        }
    }

    /// The quickest plan that fits.
    ///
    /// # Errors
    /// [`TooLittle`].
    fn best(&self, weights: u64, bounds: &Bounds) -> Result<StagePlan> {
        let scratch = if self.on_card { 0 } else { SCRATCH };
        let fixed = bounds.others + weights + scratch;
        let (mut least, mut full) = (u64::MAX, None);
        for band in self.bands() {
            let natural = self.measured(&self.limits(band))?;
            if fixed + natural.peak <= bounds.most {
                return Ok(self.plan(self.limits(band), &natural, fixed, weights));
            }
            if band == u64::MAX {
                continue;
            }
            let mut best: Option<(f64, StagePlan)> = None;
            let largest = natural.between.iter().rev().copied();
            let from = largest.filter(|&bytes| bytes > band).take(RECOMPUTED);
            for recomputed in std::iter::once(u64::MAX).chain(from) {
                let limits = Limits {
                    recomputed,
                    ..self.limits(band)
                };
                let (limits, measured) = self.fitted(limits, fixed, bounds)?;
                if fixed + measured.peak > bounds.most {
                    least = least.min(fixed + measured.peak);
                    continue;
                }
                if let Some(folder) = bounds
                    .folder
                    .as_ref()
                    .filter(|f| measured.elsewhere > f.free)
                {
                    full.get_or_insert_with(|| TooLittle::OnDisk {
                        stage: self.stage,
                        folder: folder.path.clone(),
                        needed: measured.elsewhere,
                        free: folder.free,
                    });
                    continue;
                }
                let cost = self.cost(&measured);
                if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                    best = Some((cost, self.plan(limits, &measured, fixed, weights)));
                }
            }
            if let Some((_, plan)) = best {
                return Ok(plan);
            }
        }
        let too_little = TooLittle::InMemory {
            stage: self.stage,
            least,
            most: bounds.most,
        };
        Err(full.unwrap_or(too_little).into())
    }

    /// The same limits with as much kept as there is room for, where not all fits and there is a place for the rest.
    fn fitted(&self, limits: Limits, fixed: u64, bounds: &Bounds) -> Result<(Limits, Measured)> {
        let measured = self.measured(&limits)?;
        let Some(folder) = &bounds.folder else {
            return Ok((limits, measured));
        };
        if fixed + measured.peak <= bounds.most {
            return Ok((limits, measured));
        }
        let mut beside = measured.peak - measured.held;
        let mut best = (limits.clone(), measured);
        // What is read back takes memory of its own, which depends on what is kept.
        for _ in 0..ATTEMPTS {
            let limits = Limits {
                kept: bounds.most.saturating_sub(fixed + beside),
                folder: Some(folder.path.clone()),
                ..limits.clone()
            };
            let measured = self.measured(&limits)?;
            let over = (fixed + measured.peak).saturating_sub(bounds.most);
            let nothing_kept = limits.kept == 0;
            if measured.peak <= best.1.peak {
                best = (limits, measured);
            }
            if over == 0 || nothing_kept {
                break;
            }
            // A little more: what is spilled instead takes memory when it is read.
            beside += over + bounds.most / 256;
        }
        Ok(best)
    }

    /// In seconds of a machine in the middle of the field.
    fn cost(&self, measured: &Measured) -> f64 {
        let rates = if self.on_card { OF_CARD } else { OF_CPU };
        let work = &measured.work;
        // Out, and back for the statistics' sake, the convolution and the residual.
        const WAYS: f64 = 3.0;
        work.convolutions / rates.convolutions
            + work.products / rates.products
            + WAYS * measured.spilled as f64 / rates.spilled
    }
}

/// No plan fits.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TooLittle {
    /// Not in the memory that there is.
    #[error(
        "the {} stage needs at least {:.2} GB of memory, and {:.2} GB can be had: free some, raise --max-memory, or give a smaller picture",
        stage.name(),
        *least as f64 / 1e9,
        *most as f64 / 1e9
    )]
    InMemory {
        /// The first that does not fit.
        stage: Stage,
        /// Bytes that would be enough.
        least: u64,
        /// Bytes that there are.
        most: u64,
    },
    /// What does not fit in memory does not fit in the folder for it either.
    #[error(
        "the {} stage would keep {:.1} GB of maps in a file in {}, where {:.1} GB are free: --temp-dir names another folder, --max-memory allows more memory",
        stage.name(),
        *needed as f64 / 1e9,
        folder.display(),
        *free as f64 / 1e9
    )]
    OnDisk {
        /// The first that does not fit.
        stage: Stage,
        /// Where maps would go.
        folder: PathBuf,
        /// Bytes of them at a time.
        needed: u64,
        /// Bytes that there are.
        free: u64,
    },
}

/// What the stages of an upscaler are in shapes, and what was found of them.
#[derive(Default)]
pub struct Planner {
    /// Bytes of the weights.
    weights: HashMap<StageKey, u64>,
    /// Plans that fit without any cost, by what they are for.
    easy: HashMap<(StageKey, Sides), StagePlan>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum StageKey {
    Encode,
    Denoise,
    Decode,
}

/// Rows, height and width of what a stage is given.
type Sides = (usize, usize, usize);

impl Upscaler {
    /// What upscaling an input that stands for `width` x `height` pixels would take and how, a stage after the other: the encoder
    /// where it is an `image`, the UNet's last pass, the decoder where the result is to be `decoded`.
    ///
    /// # Errors
    /// [`TooLittle`], in the error's chain: one of the stages cannot be made to fit.
    pub fn plan(
        &mut self,
        (width, height): (usize, usize),
        settings: &Settings,
        image: bool,
        decoded: bool,
    ) -> Result<Vec<StagePlan>> {
        let factor = self.vae_config.factor();
        let (multiple, minimum) = self.low_res_sides();
        let padded = |n: usize| padded_side(n, multiple, minimum);
        let mut plans = Vec::new();
        if image {
            let side = |n: usize| factor * padded(n.div_ceil(factor));
            plans.push(self.plan_stage(StageKey::Encode, (1, side(height), side(width)))?);
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
        let together = self.plan_stage(StageKey::Denoise, (rows, h, w));
        plans.push(match together {
            Err(_) if rows > 1 => self.plan_stage(StageKey::Denoise, (1, h, w))?,
            other => other?,
        });
        if decoded {
            plans.push(self.plan_stage(StageKey::Decode, (1, h, w))?);
        }
        Ok(plans)
    }

    /// The room for the maps of encoding a padded image (1, 3, h, w).
    pub(super) fn room_to_encode(&mut self, h: usize, w: usize) -> Result<Room> {
        self.room(StageKey::Encode, (1, h, w))
    }

    /// The room for the maps of decoding latents (1, c, h, w).
    pub(super) fn room_to_decode(&mut self, h: usize, w: usize) -> Result<Room> {
        self.room(StageKey::Decode, (1, h, w))
    }

    /// The room for the maps of a step of `pictures` latents (h, w) for so many prompts each; apart where both do not fit together.
    pub(super) fn room_to_denoise(
        &mut self,
        pictures: usize,
        prompts: usize,
        (h, w): (usize, usize),
    ) -> Result<Room> {
        if self.passes == Passes::Together {
            let room = self.room(StageKey::Denoise, (pictures * prompts, h, w));
            if room.is_ok() || prompts == 1 {
                return room;
            }
            self.passes = Passes::Apart;
        }
        self.room(StageKey::Denoise, (pictures, h, w))
    }

    fn room(&mut self, key: StageKey, sides: Sides) -> Result<Room> {
        // Weights of other stages stay where everything fits beside them.
        let others = self.weights_loaded_beside(key)?;
        if others > 0 {
            let easy = self.plan_easily(key, sides, others)?;
            if let Some(plan) = easy {
                return Ok(Room::new(plan.limits));
            }
            self.forget_others(key);
        }
        let plan = self.plan_stage(key, sides)?;
        Ok(Room::new(plan.limits))
    }

    /// Bytes of the networks that are loaded for other stages.
    fn weights_loaded_beside(&mut self, key: StageKey) -> Result<u64> {
        let loaded = [
            (StageKey::Encode, self.encoder.is_some()),
            (StageKey::Denoise, self.unet.is_some()),
            (StageKey::Decode, self.decoder.is_some()),
        ];
        let mut bytes = 0;
        for (other, is_loaded) in loaded {
            if is_loaded && other != key {
                bytes += self.weights_of(other)?;
            }
        }
        Ok(bytes)
    }

    fn forget_others(&mut self, key: StageKey) {
        if key != StageKey::Encode {
            self.encoder = None;
        }
        if key != StageKey::Denoise {
            self.unet = None;
        }
        if key != StageKey::Decode {
            self.decoder = None;
        }
    }

    /// The plan that costs nothing, where it fits beside `others` bytes of other networks.
    fn plan_easily(
        &mut self,
        key: StageKey,
        sides: Sides,
        others: u64,
    ) -> Result<Option<StagePlan>> {
        let bounds = self.bounds(key, sides, others)?;
        let on_card = !self.options.device.is_cpu();
        let weights = self.weights_of(key)?;
        let scratch = if on_card { 0 } else { SCRATCH };
        let fixed = bounds.others + weights + scratch;
        if !self.planner.easy.contains_key(&(key, sides)) {
            let subject = self.subject(key, sides)?;
            let Some(&band) = subject.bands().first() else {
                return Ok(None);
            };
            let limits = subject.limits(band);
            let measured = subject.measured(&limits)?;
            let plan = subject.plan(limits, &measured, 0, weights);
            self.planner.easy.insert((key, sides), plan);
        }
        let plan = &self.planner.easy[&(key, sides)];
        let peak = fixed + plan.peak;
        Ok((peak <= bounds.most).then(|| StagePlan {
            peak,
            ..plan.clone()
        }))
    }

    fn plan_stage(&mut self, key: StageKey, sides: Sides) -> Result<StagePlan> {
        if let Some(plan) = self.plan_easily(key, sides, 0)? {
            return Ok(plan);
        }
        let weights = self.weights_of(key)?;
        let bounds = self.bounds(key, sides, 0)?;
        self.subject(key, sides)?.best(weights, &bounds)
    }

    fn weights_of(&mut self, key: StageKey) -> Result<u64> {
        if let Some(&bytes) = self.planner.weights.get(&key) {
            return Ok(bytes);
        }
        counted();
        self.subject(key, (1, 8, 8))?;
        let bytes = counted().weights;
        self.planner.weights.insert(key, bytes);
        Ok(bytes)
    }

    /// A stage for which plans are made.
    fn subject(&self, key: StageKey, (b, h, w): Sides) -> Result<Subject<'static>> {
        let on_card = !self.options.device.is_cpu();
        let factor = self.vae_config.factor();
        let window = |h: usize, w: usize| {
            let window = Room::unlimited().keys_window(h, w);
            (window != (h, w) && self.vae_config.mid_block_add_attention).then_some(window)
        };
        let zeros = |channels: usize, placement: &Placement| {
            crate::networks::zeros_without_memory((b, channels, h, w), placement.dtype)
        };
        Ok(match key {
            StageKey::Encode => {
                let placement = &self.encoder_placement;
                let encoder = Encoder::of_shapes(self.vae_config.clone(), placement)?;
                let image = zeros(self.vae_config.in_channels, placement)?;
                Subject {
                    stage: Stage::Encode,
                    window: window(h / factor, w / factor),
                    on_card,
                    measure: Box::new(move |room| {
                        encoder.encode_within(&image, room)?;
                        room.passing();
                        Ok(())
                    }),
                }
            }
            StageKey::Denoise => {
                let unet = UNet::of_shapes(self.unet_config.clone(), &self.placement)?;
                Subject {
                    stage: Stage::Denoise,
                    window: None,
                    on_card,
                    measure: Box::new(move |room| unet.measure((b, h, w), room)),
                }
            }
            StageKey::Decode => {
                let placement = &self.vae_placement;
                let decoder = Decoder::of_shapes(self.vae_config.clone(), placement)?;
                let latents = zeros(self.vae_config.latent_channels, placement)?;
                Subject {
                    stage: Stage::Decode,
                    window: window(h, w),
                    on_card,
                    measure: Box::new(move |room| {
                        decoder.decode_within(&latents, room, |_| Ok(()))?;
                        room.passing();
                        Ok(())
                    }),
                }
            }
        })
    }

    /// What there is for a stage, beside `others` bytes of other networks.
    fn bounds(&self, key: StageKey, (_, h, w): Sides, others: u64) -> Result<Bounds> {
        let factor = self.vae_config.factor();
        let pixels = match key {
            StageKey::Encode => h * w,
            // Of the input, at half the size.
            StageKey::Denoise | StageKey::Decode => h * w * factor * factor / 4,
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
        let most = memory.most.or(free).unwrap_or(u64::MAX);
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
        Ok(Bounds {
            most,
            others: match on_cpu {
                true => others + PROCESS + pixels * INPUT_PIXEL,
                false => others,
            },
            folder,
        })
    }

    /// Bytes of the networks that are on the card.
    fn weights_on_card(&self) -> u64 {
        let loaded = [
            (StageKey::Encode, self.encoder.is_some()),
            (StageKey::Denoise, self.unet.is_some()),
            (StageKey::Decode, self.decoder.is_some()),
        ];
        let bytes = |key| self.planner.weights.get(key).copied().unwrap_or(0);
        loaded
            .iter()
            .filter(|(_, is_loaded)| *is_loaded)
            .map(|(key, _)| bytes(key))
            .sum()
    }

    /// Width and height of the picture `times` as large as the input, in pixels.
    pub(super) fn result_size(&self, input: &LowRes, times: usize) -> Result<(usize, usize)> {
        let (tensor, factor) = match input {
            LowRes::Image(image) => (image, 1),
            LowRes::Latents(latents) => (latents, self.vae_config.factor()),
        };
        let (_, _, height, width) = tensor.dims4()?;
        Ok((times * factor * width, times * factor * height))
    }
}

/// Whether an error is that no plan fits.
pub(super) fn is_too_little(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<TooLittle>())
}

/// The folder for maps that do not fit: the one that was named, else the system's for temporary files where that is on a disk, else
/// `/var/tmp`; none where all of these are in memory themselves.
fn spill_folder(named: Option<&Path>) -> Option<Folder> {
    let of = |path: &Path| {
        let free = device::free_on_disk(path)?;
        Some(Folder {
            path: path.to_path_buf(),
            free,
        })
    };
    match named {
        Some(path) => of(path),
        None => of(&std::env::temp_dir()).or_else(|| of(Path::new("/var/tmp"))),
    }
}
