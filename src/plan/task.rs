//! One input to upscale, and where the result goes.

use std::path::PathBuf;

use super::{Naming, Origin, Source, Variant, Written};

/// One input to upscale.
#[derive(Clone, Debug)]
pub struct Task {
    /// Where it is read from.
    pub source: Source,
    /// The path from the folder given on the command line; for a file given there, its name.
    pub relative: PathBuf,
    /// The input's place among all of the run, from 0: those that cannot be read and those of other shards have theirs.
    pub place: usize,
    /// By what it is done.
    pub variant: Variant,
    /// Where the result goes.
    pub target: Target,
}

/// Where a result goes.
#[derive(Clone, Debug)]
pub enum Target {
    /// A file; its folder may not exist yet.
    File(Naming),
    /// Standard output, and what is written there.
    Stdout(Written),
}

impl Task {
    /// What its outputs come of.
    pub fn origin(&self) -> Origin {
        Origin {
            source: self.source.clone(),
            variant: self.variant,
        }
    }
}

impl Target {
    /// The same for another seed and guidance.
    pub(super) fn by(&self, variant: Variant) -> Self {
        match self {
            Target::File(naming) => Target::File(Naming {
                variant,
                ..naming.clone()
            }),
            Target::Stdout(kind) => Target::Stdout(*kind),
        }
    }

    /// How the output file is named; None on standard output.
    pub fn naming(&self) -> Option<&Naming> {
        match self {
            Target::File(naming) => Some(naming),
            Target::Stdout(_) => None,
        }
    }
}
