//! No output over an input, no two to one file: found before any work starts.

use std::collections::HashMap;
use std::path::PathBuf;

use super::claims::{Claims, Conflict, same_file};
use super::walk::{Found, PassedOver};
use super::{Naming, Origin, Request, Source, Target, Task, UsageError};

/// Refuses outputs that fall on inputs or on each other.
pub(super) fn checked(
    work: Vec<(Found, Target)>,
    request: &Request,
    passed_over: &mut Vec<(PathBuf, PassedOver)>,
    warnings: &mut Vec<String>,
) -> Result<(Vec<Task>, Claims), UsageError> {
    let mut claims = Claims::new(work.iter().map(|(found, _)| &found.source));
    let mut tasks = Vec::with_capacity(work.len());
    let mut conflicts = Vec::new();
    let mut lowercase: HashMap<String, PathBuf> = HashMap::new();
    let mut only_case_differs = Vec::new();
    for task in by_variants(work, request) {
        if let Some(path) = task.target.naming().map(Naming::pattern) {
            let origin = task.origin();
            let twice = match claims.take(&path, &origin) {
                Ok(new) => !new,
                Err(Conflict::Output(first)) if is_same(&first, &origin) => true,
                Err(conflict) => {
                    conflicts.push((origin, path.clone(), conflict));
                    false
                }
            };
            if twice {
                if let Source::Path(path) = task.source {
                    passed_over.push((path, PassedOver::NamedTwice));
                }
                continue;
            }
            let lower = path.to_string_lossy().to_lowercase();
            if let Some(other) = lowercase.insert(lower, path.clone())
                && other != path
            {
                only_case_differs.push((other, path));
            }
        }
        tasks.push(task);
    }
    if !conflicts.is_empty() {
        return Err(refusal(&conflicts, request));
    }
    if let Some((a, b)) = only_case_differs.first() {
        warnings.push(format!(
            "{} and {} differ only in case: where the file system ignores case, one replaces the other",
            a.display(),
            b.display()
        ));
    }
    Ok((tasks, claims))
}

/// Every input by each of the run's variants.
pub(super) fn by_variants(work: Vec<(Found, Target)>, request: &Request) -> Vec<Task> {
    let variants = |(found, target): (Found, Target)| {
        let by = |&variant| Task {
            source: found.source.clone(),
            relative: found.relative.clone(),
            place: found.order,
            target: target.by(variant),
            variant,
        };
        request.variants.iter().map(by).collect::<Vec<Task>>()
    };
    work.into_iter().flat_map(variants).collect()
}

fn is_same(a: &Origin, b: &Origin) -> bool {
    a.variant == b.variant
        && match (&a.source, &b.source) {
            (Source::Path(a), Source::Path(b)) => same_file(a, b),
            (a, b) => a == b,
        }
}

/// Names the first few conflicts and the cures that apply.
fn refusal(conflicts: &[(Origin, PathBuf, Conflict)], request: &Request) -> UsageError {
    const SHOWN: usize = 3;
    let mut text = String::from("nothing was done, as outputs would be lost:");
    let by_variants = |(origin, _, conflict): &(Origin, PathBuf, Conflict)| matches!(conflict, Conflict::Output(first) if first.source == origin.source);
    for one in conflicts.iter().take(SHOWN) {
        let (Origin { source, .. }, path, conflict) = one;
        let path = path.display();
        text += &match conflict {
            Conflict::Input(input) => format!(
                "\n  {source} would be written to {path}, over the input {}",
                input.display()
            ),
            Conflict::Output(_) if by_variants(one) => {
                format!(
                    "\n  what every seed and guidance makes of {source} would be written to {path}"
                )
            }
            Conflict::Output(Origin { source: first, .. }) => {
                format!("\n  {first} and {source} would both be written to {path}")
            }
        };
    }
    if conflicts.len() > SHOWN {
        text += &format!("\n  and {} more", conflicts.len() - SHOWN);
    }
    let mut cures = Vec::new();
    let over_input = conflicts.iter().any(|c| matches!(c.2, Conflict::Input(_)));
    let over_output = conflicts
        .iter()
        .any(|c| matches!(c.2, Conflict::Output(_)) && !by_variants(c));
    if conflicts.iter().any(by_variants) {
        cures.push("put {seed} or {guidance}, whichever has several values, into --name");
    }
    if over_input {
        cures.push(match request.output {
            Some(_) => {
                "name another output with -o, or leave it out to write NAME-2x beside the input"
            }
            None => "name a folder with -o",
        });
    }
    if over_input && request.template.is_some() {
        cures.push("give --name some text of its own, such as {stem}-2x.{ext}");
    }
    if over_output && request.template.as_ref().is_some_and(|t| !t.has_stem()) {
        cures.push("put {stem} into --name");
    }
    if over_output && request.format.is_some() {
        cures.push("leave out --format, so that the inputs' extensions keep them apart");
    }
    if over_output {
        cures.push("give --name {stem}-{in_ext}.{ext}, where only the inputs' extensions differ");
        cures.push("give the folder that holds them all with -r, which keeps the tree");
        cures.push("take them in separate runs (--include, --exclude) with an -o each");
    }
    text += "\nTo keep them apart: ";
    text += &cures.join("; or ");
    UsageError(text)
}
