//! `--prompt-file`: prompts by the names of files, or by their order.

use std::collections::HashMap;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, ensure};
use sd_upscale::plan::{Plan, Prompt, Source, Task, UsageError};

/// Bytes of the largest file that is read: some hundred thousand prompts.
const MOST: u64 = 64 << 20;

/// The prompts of a file.
pub struct Prompts {
    /// As messages call it.
    file: String,
    lines: Vec<Line>,
    by_name: HashMap<String, usize>,
}

struct Line {
    /// From 1.
    number: usize,
    /// Before a tab.
    name: Option<String>,
    prompt: String,
}

impl Prompts {
    /// Reads a file, or standard input where it is called `-`. Lines that are blank are passed over.
    ///
    /// # Errors
    /// It cannot be read, is no text, holds no prompt, or has names before some of its prompts alone.
    pub fn read(path: &Path) -> Result<Self, UsageError> {
        let file = match path.to_str() {
            Some("-") => "standard input".into(),
            _ => path.display().to_string(),
        };
        let wrong = |what: String| UsageError(format!("--prompt-file {file}: {what}"));
        let text = text_of(path).map_err(|error| wrong(format!("{error:#}")))?;
        let lines: Vec<Line> = text
            .lines()
            .zip(1..)
            .filter(|(text, _)| !text.trim().is_empty())
            .map(|(text, number)| Line::of(text, number))
            .collect();
        let Some(first) = lines.first() else {
            return Err(wrong("it holds no prompt; expected one a line".into()));
        };
        let named = first.name.is_some();
        if let Some(other) = lines.iter().find(|line| line.name.is_some() != named) {
            let (has, lacks) = if named {
                (first.number, other.number)
            } else {
                (other.number, first.number)
            };
            return Err(wrong(format!(
                "line {has} has a FILE NAME and a tab before its prompt, line {lacks} has not: name all or none"
            )));
        }
        let mut by_name = HashMap::new();
        for (index, line) in lines.iter().enumerate() {
            let Some(name) = &line.name else { continue };
            if let Some(first) = by_name.insert(name.clone(), index) {
                let first = lines[first].number;
                return Err(wrong(format!(
                    "lines {first} and {} both are for {name}",
                    line.number
                )));
            }
        }
        Ok(Self {
            file,
            lines,
            by_name,
        })
    }

    /// What stands for the inputs of pictures that are made of the prompts alone.
    ///
    /// # Errors
    /// A name leaves the output folder.
    pub fn sources(&self) -> Result<Vec<Source>, UsageError> {
        self.lines
            .iter()
            .map(|line| {
                let relative = match &line.name {
                    Some(name) => self.inside(line, name)?,
                    None => format!("{:04}", line.number).into(),
                };
                Ok(Source::Prompt(Prompt {
                    name: format!("{}:{}", self.file, line.number),
                    relative,
                    text: line.prompt.clone(),
                }))
            })
            .collect()
    }

    fn inside(&self, line: &Line, name: &str) -> Result<PathBuf, UsageError> {
        let path = PathBuf::from(name);
        let inside = |part: Component| matches!(part, Component::Normal(_) | Component::CurDir);
        if path.file_name().is_none() || !path.components().all(inside) {
            return Err(UsageError(format!(
                "--prompt-file {}: line {}: {name} names no file in the output folder; choose the folder with -o",
                self.file, line.number
            )));
        }
        Ok(path)
    }

    /// Whether every input has a prompt and every prompt an input; what is said of prompts that have none.
    ///
    /// # Errors
    /// An input has none.
    pub fn check(&self, plan: &Plan) -> Result<Option<String>, UsageError> {
        let file = &self.file;
        if self.by_name.is_empty() {
            let (prompts, inputs) = (self.lines.len(), plan.inputs);
            if prompts != inputs {
                return Err(UsageError(format!(
                    "--prompt-file {file} holds {prompts} prompts, and there are {inputs} inputs: give as many, or name the files (FILE NAME<tab>PROMPT)"
                )));
            }
            return Ok(None);
        }
        let missing = plan.tasks.iter().filter(|task| self.of(task).is_none());
        let mut missing: Vec<String> = missing.map(|task| task.source.to_string()).collect();
        missing.dedup();
        if let Some(first) = missing.first() {
            let more = match missing.len() - 1 {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            return Err(UsageError(format!(
                "--prompt-file {file} has no prompt for {first}{more}: add FILE NAME<tab>PROMPT for each"
            )));
        }
        // Those of other shares of the work have theirs.
        if plan.in_other_shards > 0 {
            return Ok(None);
        }
        let used: Vec<usize> = plan
            .tasks
            .iter()
            .filter_map(|task| self.line_of(task))
            .collect();
        let mut unused = (0..self.lines.len()).filter(|index| !used.contains(index));
        Ok(unused.next().map(|first| {
            let count = 1 + unused.count();
            let name = self.lines[first].name.as_deref().unwrap_or_default();
            format!("--prompt-file {file}: {count} of its names are of no input, such as {name}")
        }))
    }

    /// The prompt of an input.
    pub fn of(&self, task: &Task) -> Option<&str> {
        let line = self.line_of(task)?;
        Some(&self.lines.get(line)?.prompt)
    }

    /// By the path from the folder that was given, else by the file's name alone.
    fn line_of(&self, task: &Task) -> Option<usize> {
        if self.by_name.is_empty() {
            return Some(task.place);
        }
        let parts: Vec<_> = task
            .relative
            .iter()
            .map(|part| part.to_string_lossy())
            .collect();
        let of = |name: &str| self.by_name.get(name).copied();
        of(&parts.join("/")).or_else(|| of(parts.last()?))
    }
}

impl Line {
    fn of(text: &str, number: usize) -> Self {
        let (name, prompt) = match text.split_once('\t') {
            Some((name, prompt)) => (Some(name.trim().to_owned()), prompt),
            None => (None, text),
        };
        Self {
            number,
            name,
            prompt: prompt.trim().to_owned(),
        }
    }
}

/// The prompt that a file of one holds: all of its lines, joined by spaces.
///
/// # Errors
/// It cannot be read, or is no text.
pub fn prompt_in(path: &Path) -> Result<String> {
    let text = text_of(path).with_context(|| format!("cannot read {}", path.display()))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    Ok(lines.collect::<Vec<_>>().join(" "))
}

/// A file's text, without the mark that some editors put before it; that of standard input for `-`.
fn text_of(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    let reader: Box<dyn Read> = match path.to_str() {
        Some("-") => Box::new(io::stdin()),
        _ => Box::new(std::fs::File::open(path)?),
    };
    reader.take(MOST + 1).read_to_end(&mut bytes)?;
    ensure!(
        bytes.len() as u64 <= MOST,
        "it has more than {} MB; expected prompts, a line each",
        MOST >> 20
    );
    let text = String::from_utf8(bytes)
        .ok()
        .context("it is no text in UTF-8")?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    ensure!(!text.contains('\0'), "it is no text: it holds zero bytes");
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompts(text: &str) -> Result<Prompts, UsageError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.txt");
        std::fs::write(&path, text).unwrap();
        Prompts::read(&path)
    }

    fn error(text: &str) -> String {
        prompts(text).err().unwrap().to_string()
    }

    #[test]
    fn lines_are_named_or_in_order() {
        let read = prompts("\u{feff}a cat\r\n\r\n a dog \r\n").unwrap();
        let sources = read.sources().unwrap();
        let of = |source: &Source| match source {
            Source::Prompt(prompt) => (prompt.relative.display().to_string(), prompt.text.clone()),
            _ => panic!("no prompt"),
        };
        let sources: Vec<(String, String)> = sources.iter().map(of).collect();
        let expected = [("0001", "a cat"), ("0003", "a dog")];
        assert_eq!(sources, expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
        let read = prompts("sub/a.png\ta cat\tand more\nb\t\n").unwrap();
        assert_eq!(read.lines[0].prompt, "a cat\tand more");
        assert_eq!(read.lines[1].prompt, "");
        assert!(read.sources().is_ok());
    }

    #[test]
    fn a_file_that_cannot_be_followed_is_refused() {
        for (text, what) in [
            ("", "no prompt"),
            ("\n \n", "no prompt"),
            ("a\tb\nc", "line 1 has a FILE NAME"),
            ("c\na\tb", "line 2 has a FILE NAME"),
            ("a\tb\na\tc", "lines 1 and 2 both are for a"),
            ("a\0b", "zero bytes"),
        ] {
            let error = error(text);
            assert!(error.contains(what), "{text:?}: {error}");
        }
        for name in ["../a", "/a", "", ".."] {
            let read = prompts(&format!("{name}\tb")).unwrap();
            assert!(read.sources().is_err(), "{name}");
        }
    }
}
