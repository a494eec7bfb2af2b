//! No output over an input, no two to one file: found before any work starts.

use std::collections::HashMap;
use std::path::PathBuf;

use super::claims::{Claims, Conflict, same_file};
use super::walk::{Found, PassedOver};
use super::{Naming, Request, Source, Target, Task, UsageError};

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
    for (found, target) in work {
        if let Some(path) = target.naming().map(Naming::pattern) {
            let twice = match claims.take(&path, &found.source) {
                Ok(new) => !new,
                Err(Conflict::Output(first)) if is_same(&first, &found.source) => true,
                Err(conflict) => {
                    conflicts.push((found.source.clone(), path.clone(), conflict));
                    false
                }
            };
            if twice {
                if let Source::Path(path) = found.source {
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
        tasks.push(Task {
            source: found.source,
            relative: found.relative,
            target,
        });
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

fn is_same(a: &Source, b: &Source) -> bool {
    match (a, b) {
        (Source::Path(a), Source::Path(b)) => same_file(a, b),
        _ => a == b,
    }
}

/// Names the first few conflicts and the cures that apply.
fn refusal(conflicts: &[(Source, PathBuf, Conflict)], request: &Request) -> UsageError {
    const SHOWN: usize = 3;
    let mut text = String::from("nothing was done, as outputs would be lost:");
    for (source, path, conflict) in conflicts.iter().take(SHOWN) {
        let path = path.display();
        text += &match conflict {
            Conflict::Input(input) => format!(
                "\n  {source} would be written to {path}, over the input {}",
                input.display()
            ),
            Conflict::Output(first) => {
                format!("\n  {first} and {source} would both be written to {path}")
            }
        };
    }
    if conflicts.len() > SHOWN {
        text += &format!("\n  and {} more", conflicts.len() - SHOWN);
    }
    let mut cures = Vec::new();
    let over_input = conflicts.iter().any(|c| matches!(c.2, Conflict::Input(_)));
    let over_output = conflicts.iter().any(|c| matches!(c.2, Conflict::Output(_)));
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
