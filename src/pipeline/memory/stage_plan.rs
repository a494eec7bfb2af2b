//! The plan of a stage, in words too, and what is said where there is none.

use std::fmt;
use std::path::PathBuf;

use crate::networks::Limits;
use crate::pipeline::Stage;

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
    /// Of those, what is out of it at a time.
    pub elsewhere: u64,
    pub(in crate::pipeline) limits: Limits,
    /// Height and width of the window that positions of the VAE's attention see, where it is not all of the map.
    pub(super) window: Option<(usize, usize)>,
    /// Whether it is planned for a card.
    pub(super) on_card: bool,
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
            write!(
                f,
                "; {:.1} GB spilled to {place}, {:.1} at a time",
                gigabytes(self.spilled),
                gigabytes(self.elsewhere)
            )?;
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

/// No plan fits.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TooLittle {
    /// Not in the memory that there is.
    #[error(
        "the {} stage needs at least {:.2} GB of memory, and {:.2} GB can be had: free some, raise --max-memory, or give a smaller picture",
        stage.name(),
        // Rounded up: what is said to be enough is.
        (*least as f64 / 1e7).ceil() / 100.0,
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
