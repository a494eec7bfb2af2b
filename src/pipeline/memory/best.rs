//! The quickest way to keep a stage's maps within what there is: a stage is run on maps without values in every way that could
//! be it.

use std::path::PathBuf;

use anyhow::Result;

use super::stage_plan::{StagePlan, TooLittle};
use crate::networks::{Counted, Limits, Room, counted};
use crate::pipeline::Stage;

/// What the CPU kernels keep for their own use between calls (`kernels::cpu`'s pool, which grows with the threads), and what a call takes
/// beside it.
fn scratch() -> u64 {
    const LEAST: u64 = 120_000_000;
    const OF_A_THREAD: u64 = 15_000_000;
    LEAST.max(OF_A_THREAD * rayon::current_num_threads() as u64)
}

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

/// Four cores of a laptop with its solid-state disk.
const OF_CPU: Rates = Rates {
    convolutions: 4e11,
    products: 3e11,
    spilled: 1e9,
};
/// A card in the middle of the field, on PCI Express 4.
const OF_CARD: Rates = Rates {
    convolutions: 2e13,
    products: 4e13,
    spilled: 1e10,
};

/// What a plan has to keep to.
pub struct Bounds {
    /// Bytes for everything.
    pub most: u64,
    /// Bytes of it that are not this stage's.
    pub others: u64,
    /// Where maps may go that do not fit; None where that gains nothing.
    pub folder: Option<Folder>,
}

pub struct Folder {
    pub path: PathBuf,
    /// Bytes.
    pub free: u64,
}

/// Runs a stage without values, its maps kept as a room says.
pub type Measure<'a> = Box<dyn Fn(&Room) -> Result<()> + 'a>;

/// A stage as plans are made for it.
pub struct Subject<'a> {
    pub stage: Stage,
    /// Bytes of its network's weights.
    pub weights: u64,
    /// Of the VAE's attention, where it does not see all.
    pub window: Option<(usize, usize)>,
    pub on_card: bool,
    /// Runs it without values.
    pub measure: Measure<'a>,
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

    fn plan(&self, limits: Limits, measured: &Measured, fixed: u64) -> StagePlan {
        StagePlan {
            stage: self.stage,
            peak: fixed + measured.peak,
            weights: self.weights,
            spilled: measured.spilled,
            elsewhere: measured.elsewhere,
            limits,
            window: self.window,
            on_card: self.on_card,
        }
    }

    /// What it takes beside its maps, and beside `others` bytes.
    fn fixed(&self, others: u64) -> u64 {
        others + self.weights + if self.on_card { 0 } else { scratch() }
    }

    /// The plan that costs nothing, the first of the bands and everything kept, beside nothing else.
    ///
    /// # Errors
    /// It is no such network.
    pub fn easy(&self) -> Result<StagePlan> {
        let limits = self.limits(self.bands()[0]);
        let measured = self.measured(&limits)?;
        Ok(self.plan(limits, &measured, self.fixed(0)))
    }

    /// The quickest plan that fits.
    ///
    /// # Errors
    /// [`TooLittle`].
    pub fn best(&self, bounds: &Bounds) -> Result<StagePlan> {
        let fixed = self.fixed(bounds.others);
        let (mut least, mut full) = (u64::MAX, None);
        for band in self.bands() {
            let natural = self.measured(&self.limits(band))?;
            if fixed + natural.peak <= bounds.most {
                return Ok(self.plan(self.limits(band), &natural, fixed));
            }
            if band == u64::MAX {
                continue;
            }
            let mut best: Option<(f64, StagePlan)> = None;
            for recomputed in recomputations(&natural, band) {
                let limits = Limits {
                    recomputed,
                    ..self.limits(band)
                };
                let (limits, measured) = self.fitted(limits, fixed, bounds)?;
                let peak = fixed + measured.peak;
                least = least.min(peak);
                if peak > bounds.most {
                    continue;
                }
                if let Some(error) = self.does_not_fit_on_disk(&measured, bounds) {
                    full.get_or_insert(error);
                    continue;
                }
                let cost = self.cost(&measured);
                if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                    best = Some((cost, self.plan(limits, &measured, fixed)));
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

    fn does_not_fit_on_disk(&self, measured: &Measured, bounds: &Bounds) -> Option<TooLittle> {
        let folder = bounds.folder.as_ref()?;
        (measured.elsewhere > folder.free).then(|| TooLittle::OnDisk {
            stage: self.stage,
            folder: folder.path.clone(),
            needed: measured.elsewhere,
            free: folder.free,
        })
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
        let kept = |kept: u64| Limits {
            kept,
            folder: Some(folder.path.clone()),
            ..limits.clone()
        };
        let room = bounds.most.saturating_sub(fixed);
        let mut beside = measured.peak - measured.held;
        let mut best = (limits.clone(), measured.clone());
        // What is read back takes memory of its own, which depends on what is kept.
        for _ in 0..ATTEMPTS {
            let limits = kept(room.saturating_sub(beside));
            let found = self.measured(&limits)?;
            let over = found.peak.saturating_sub(room);
            let nothing_kept = limits.kept == 0;
            if found.peak <= best.1.peak {
                best = (limits, found);
            }
            if over == 0 {
                return Ok(best);
            }
            if nothing_kept {
                break;
            }
            // A little more: what is spilled instead takes memory when it is read.
            beside += over + bounds.most / 256;
        }
        // It does not fit: what would, at the least?
        for part in 1..=ATTEMPTS as u64 {
            let limits = kept(measured.held / (ATTEMPTS as u64 + 1) * part);
            let found = self.measured(&limits)?;
            if found.peak < best.1.peak {
                best = (limits, found);
            }
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

/// From which sizes on maps between two convolutions may be recomputed: none, and the largest.
fn recomputations(natural: &Measured, band: u64) -> impl Iterator<Item = u64> {
    let largest = natural.between.iter().rev().copied();
    let largest = largest.filter(move |&bytes| bytes > band).take(RECOMPUTED);
    std::iter::once(u64::MAX).chain(largest)
}
