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
pub use self::walk::PassedOver;
use self::walk::{Failed, Found};

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
    let mut listed = Listed::of(request, |_| true)?;
    let Listed {
        work,
        passed_over,
        warnings,
        ..
    } = &mut listed;
    let work = std::mem::take(work);
    let (tasks, claims) = check::checked(work, request, passed_over, warnings)?;
    Ok(listed.planned(tasks, claims, request))
}

/// The work again, of a run that goes on with files as they appear: those of its inputs that are folders, as they are now, without what
/// the run wrote itself. New files are inputs from now on. Outputs that fall on each other are found as they are claimed.
///
/// # Errors
/// As [`plan`], but for conflicts.
pub fn look_again(request: &Request, claims: &mut Claims) -> Result<Plan, UsageError> {
    let is_input = |found: &Found| match &found.source {
        Source::Path(path) => !claims.is_output(path),
        Source::Stdin | Source::Prompt(_) => false,
    };
    let mut listed = Listed::of(request, is_input)?;
    let work = std::mem::take(&mut listed.work);
    claims.add_inputs(work.iter().map(|(found, _)| &found.source));
    let tasks = check::by_variants(work, request);
    Ok(listed.planned(tasks, Claims::default(), request))
}

/// What the inputs stand for, before the checks.
struct Listed {
    work: Vec<(Found, Target)>,
    passed_over: Vec<(PathBuf, PassedOver)>,
    failed: Vec<Failed>,
    warnings: Vec<String>,
}

impl Listed {
    fn of(request: &Request, mut takes: impl FnMut(&Found) -> bool) -> Result<Self, UsageError> {
        let destination = Destination::of(request)?;
        let template = destination.template(request);
        let walk::Listing {
            found,
            mut passed_over,
            failed,
            mut warnings,
        } = walk::list(request, destination.folder())?;
        let with_target = |found: Found| {
            let target = destination.target(&found, &template, request);
            (found, target)
        };
        let taken = found.into_iter().filter(|found| takes(found));
        let work = taken.map(with_target).collect();
        Ok(Self {
            work: earlier_run::leave_out(work, &mut passed_over, &mut warnings),
            passed_over,
            failed,
            warnings,
        })
    }

    /// The plan of `tasks`, as far as they are this share's.
    fn planned(self, mut tasks: Vec<Task>, claims: Claims, request: &Request) -> Plan {
        let mut failed = self.failed;
        let inputs = walk::number(&mut tasks, &failed);
        let all = tasks.len() + failed.len();
        if let Some(shard) = request.shard {
            tasks.retain(|task| shard.holds(&task.relative));
            failed.retain(|failed| shard.holds(&failed.relative));
        }
        Plan {
            in_other_shards: all - tasks.len() - failed.len(),
            tasks,
            passed_over: self.passed_over,
            failed: failed
                .into_iter()
                .map(|one| (one.path, one.error))
                .collect(),
            inputs,
            warnings: self.warnings,
            claims,
        }
    }
}
