//! The command line's inputs -> a checked list of work, before anything is computed: which files, where each output
//! goes, and that no output falls on an input or on another output.

mod check;
mod claims;
mod destination;
mod naming;
mod natural;
mod own;
mod shard;
mod template;
#[cfg(test)]
mod tests;
mod walk;

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

pub use claims::{Claims, Conflict};
use destination::Destination;
pub use naming::{Kind, Naming};
pub use shard::Shard;
pub use template::Template;
use walk::Found;
pub use walk::PassedOver;

/// A command line that cannot be followed, for exit status 2. Everything else that goes wrong is an input's failure.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// Where an input comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file; on the command line also a folder.
    Path(PathBuf),
    Stdin,
}

impl From<OsString> for Source {
    /// `-` is standard input.
    fn from(text: OsString) -> Self {
        if text == "-" {
            Source::Stdin
        } else {
            Source::Path(text.into())
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Path(path) => path.display().fmt(f),
            Source::Stdin => f.write_str("standard input"),
        }
    }
}

/// `-o`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// A file or a folder: [`plan`] tells which.
    Path(PathBuf),
    Stdout,
}

impl From<OsString> for Output {
    /// `-` is standard output.
    fn from(text: OsString) -> Self {
        if text == "-" {
            Output::Stdout
        } else {
            Output::Path(text.into())
        }
    }
}

/// What the command line asks for, as far as files go.
#[derive(Clone, Debug, Default)]
pub struct Request {
    pub inputs: Vec<Source>,
    pub output: Option<Output>,
    /// `--name`.
    pub template: Option<Template>,
    pub recursive: bool,
    /// Globs on the relative path, the name, and the folders on the way; case does not matter. They choose among what
    /// folders hold, never among files given by name.
    pub include: Vec<String>,
    pub exclude: Vec<String>,
    pub shard: Option<Shard>,
    /// `--format`: an extension of something that is written, without the dot.
    pub format: Option<String>,
    pub seed: u64,
}

/// One input to upscale.
#[derive(Clone, Debug)]
pub struct Task {
    pub source: Source,
    /// The path from the folder given on the command line; for a file given there, its name.
    pub relative: PathBuf,
    pub target: Target,
}

#[derive(Clone, Debug)]
pub enum Target {
    /// A file; its folder may not exist yet.
    File(Naming),
    Stdout(Kind),
}

/// What is to be done, and what is not.
#[derive(Debug)]
pub struct Plan {
    pub tasks: Vec<Task>,
    /// Files and folders left out on purpose.
    pub passed_over: Vec<(PathBuf, PassedOver)>,
    /// Inputs that cannot be read, with the error. The others are done all the same.
    pub failed: Vec<(PathBuf, String)>,
    pub warnings: Vec<String>,
    /// How many inputs belong to other shares of `--shard`.
    pub in_other_shards: usize,
    /// To check the paths that are known only once an input was read.
    pub claims: Claims,
}

/// Plans the work. Looks at folders and at the state of files, and opens none. The checks are made on all inputs, and
/// the share of `--shard` taken last, so that every share comes to the same verdict.
pub fn plan(request: &Request) -> Result<Plan, UsageError> {
    let stdins = request.inputs.iter().filter(|s| **s == Source::Stdin);
    if stdins.count() > 1 {
        let text = "standard input (-) can be read only once: give - once";
        return Err(UsageError(text.into()));
    }
    let destination = Destination::of(request)?;
    let template = destination.template(request);
    let walk::Listing {
        found,
        mut passed_over,
        mut failed,
        mut warnings,
    } = walk::list(request, destination.folder())?;

    let with_target = |found: Found| {
        let target = destination.target(&found, &template, request);
        (found, target)
    };
    let work: Vec<(Found, Target)> = found.into_iter().map(with_target).collect();
    let work = own::leave_out(work, &mut passed_over, &mut warnings);
    let (mut tasks, claims) = check::checked(work, request, &mut passed_over, &mut warnings)?;

    let all = tasks.len() + failed.len();
    if let Some(shard) = request.shard {
        tasks.retain(|task| shard.holds(&task.relative));
        failed.retain(|(_, relative, _)| shard.holds(relative));
    }
    Ok(Plan {
        in_other_shards: all - tasks.len() - failed.len(),
        tasks,
        passed_over,
        failed: failed.into_iter().map(|(path, _, e)| (path, e)).collect(),
        warnings,
        claims,
    })
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
