//! One input to upscale, and where the result goes.

use std::path::PathBuf;

use super::{Naming, Source, Written};

/// One input to upscale.
#[derive(Clone, Debug)]
pub struct Task {
    /// Where it is read from.
    pub source: Source,
    /// The path from the folder given on the command line; for a file given there, its name.
    pub relative: PathBuf,
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

impl Target {
    /// How the output file is named; None on standard output.
    pub fn naming(&self) -> Option<&Naming> {
        match self {
            Target::File(naming) => Some(naming),
            Target::Stdout(_) => None,
        }
    }
}
