//! The command line's inputs -> a checked list of work, before anything is computed: which files, where each output
//! goes, and that no output falls on an input or on another output.

mod check;
mod claims;
mod destination;
mod earlier_run;
mod naming;
mod natural_order;
mod request;
mod shard;
mod task;
mod template;
#[cfg(test)]
mod tests;
mod variant;
mod walk;

use std::path::PathBuf;

pub use self::claims::{Claims, Conflict, Origin};
use self::destination::Destination;
pub use self::naming::{Naming, Numbered, Written};
pub use self::request::{Output, Prompt, Reads, Request, Source, UsageError};
pub use self::shard::Shard;
pub use self::task::{Target, Task};
pub use self::template::Template;
use self::variant::Several;
pub use self::variant::Variant;
use self::walk::Found;
pub use self::walk::PassedOver;

/// What is to be done, and what is not.
#[derive(Debug)]
pub struct Plan {
    /// In the order in which they are to be done.
    pub tasks: Vec<Task>,
    /// Files and folders left out on purpose.
    pub passed_over: Vec<(PathBuf, PassedOver)>,
    /// Inputs that cannot be read, with the error. The others are done all the same.
    pub failed: Vec<(PathBuf, String)>,
    /// What the user should be told before the work.
    pub warnings: Vec<String>,
    /// How many inputs there are, those that cannot be read and those of other shards among them.
    pub inputs: usize,
    /// How many inputs belong to other shares of `--shard`.
    pub in_other_shards: usize,
    /// To check the paths that are known only once an input was read.
    pub claims: Claims,
}

/// Plans the work. Looks at folders and at the state of files, and opens none. The checks are made on all inputs, and
/// the share of `--shard` taken last, so that every share comes to the same verdict.
///
/// # Errors
/// The command line cannot be followed.
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
    let work = earlier_run::leave_out(work, &mut passed_over, &mut warnings);
    let (mut tasks, claims) = check::checked(work, request, &mut passed_over, &mut warnings)?;
    let inputs = walk::number(&mut tasks, &failed);

    let all = tasks.len() + failed.len();
    if let Some(shard) = request.shard {
        tasks.retain(|task| shard.holds(&task.relative));
        failed.retain(|failed| shard.holds(&failed.relative));
    }
    Ok(Plan {
        in_other_shards: all - tasks.len() - failed.len(),
        tasks,
        passed_over,
        failed: failed
            .into_iter()
            .map(|one| (one.path, one.error))
            .collect(),
        inputs,
        warnings,
        claims,
    })
}
