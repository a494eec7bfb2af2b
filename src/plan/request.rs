//! What the command line asks for, as far as files go.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use super::{Shard, Template, Variant};

/// A command line that cannot be followed, for exit status 2. Everything else that goes wrong is an input's failure.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// Where an input comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file; on the command line also a folder.
    Path(PathBuf),
    /// Standard input.
    Stdin,
    /// No file: a picture that is made of words.
    Prompt(Prompt),
}

/// What the files of a request are, which decides what folders are searched for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reads {
    /// Images and latents.
    #[default]
    Pictures,
    /// `.txt`, a prompt each.
    Prompts,
}

/// What stands for an input where a picture is made of words alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// As messages call it.
    pub name: String,
    /// What the output is called: as if an input of this path were read from a folder. It may have an extension of something that is written.
    pub relative: PathBuf,
    /// The words.
    pub text: String,
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
            Source::Prompt(prompt) => f.write_str(&prompt.name),
        }
    }
}

/// `-o`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// A file or a folder: [`plan`](super::plan()) tells which.
    Path(PathBuf),
    /// Standard output.
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
#[derive(Clone, Debug)]
pub struct Request {
    /// As they are given.
    pub inputs: Vec<Source>,
    /// `-o`; absent: beside each input.
    pub output: Option<Output>,
    /// `--name`.
    pub template: Option<Template>,
    /// `--recursive`: folders within folders too.
    pub recursive: bool,
    /// Globs on the relative path, the name, and the folders on the way; case does not matter. They choose among what
    /// folders hold, never among files given by name.
    pub include: Vec<String>,
    /// `--exclude`, as `include`, of what is left out.
    pub exclude: Vec<String>,
    /// `--shard`.
    pub shard: Option<Shard>,
    /// `--format`: an extension of something that is written, without the dot.
    pub format: Option<String>,
    /// What its files are.
    pub reads: Reads,
    /// Whether the inputs are of a list, as those of a folder are: an output that may be a folder is one, be there one alone.
    pub listed: bool,
    /// What every input is done by: one output each. Not empty.
    pub variants: Vec<Variant>,
    /// How many times as large outputs are, which the names of those beside their input tell.
    pub times: usize,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            inputs: Vec::new(),
            output: None,
            template: None,
            recursive: false,
            include: Vec::new(),
            exclude: Vec::new(),
            shard: None,
            format: None,
            reads: Reads::default(),
            listed: false,
            variants: vec![Variant::default()],
            times: 2,
        }
    }
}
