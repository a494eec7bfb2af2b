//! The inputs of the command line -> the files they stand for, and why the others were passed over.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use super::naming::{is_readable, split_name};
use super::{Reads, Request, Source, Task, UsageError, natural_order};

/// A file to upscale.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub source: Source,
    /// To the folder given on the command line; for a file given there, its name.
    pub relative: PathBuf,
    /// Among all inputs, those that cannot be read among them.
    pub order: usize,
}

/// An input that cannot be read.
#[derive(Clone, Debug)]
pub(super) struct Failed {
    pub path: PathBuf,
    /// For sharding.
    pub relative: PathBuf,
    /// As [`Found::order`].
    pub order: usize,
    pub error: String,
}

/// Why a file or folder is not upscaled. Nothing is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PassedOver {
    /// Its name begins with a dot.
    Hidden,
    /// A temporary file of a run that was killed.
    Partial,
    /// Its extension is no image's or latents'.
    NotAnImage,
    /// A pipe, device or socket inside a folder.
    NotAFile,
    /// A folder inside a folder, without `--recursive`.
    SubFolder,
    /// It is the folder that the outputs go to.
    OutputFolder,
    /// No `--include` matches it.
    NotIncluded,
    /// An `--exclude` matches it.
    Excluded,
    /// A symbolic link to a folder that holds it.
    Loop,
    /// The file that upscaling another input of this run writes: an earlier run's output.
    OutputOf(PathBuf),
    /// The same file, to the same output, was given before.
    NamedTwice,
}

impl fmt::Display for PassedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PassedOver::Hidden => "hidden",
            PassedOver::Partial => "left by a run that was killed",
            PassedOver::NotAnImage => "neither an image nor latents, by its extension",
            PassedOver::NotAFile => "neither a file nor a folder",
            PassedOver::SubFolder => "a sub-folder; read with --recursive",
            PassedOver::OutputFolder => "the output folder",
            PassedOver::NotIncluded => "not matched by --include",
            PassedOver::Excluded => "matched by --exclude",
            PassedOver::Loop => "a link to a folder that holds it",
            PassedOver::OutputOf(input) => {
                return write!(f, "what upscaling {} writes", input.display());
            }
            PassedOver::NamedTwice => "given twice",
        })
    }
}

#[derive(Default)]
pub(super) struct Listing {
    pub found: Vec<Found>,
    pub passed_over: Vec<(PathBuf, PassedOver)>,
    pub failed: Vec<Failed>,
    pub warnings: Vec<String>,
}

impl Listing {
    /// The order of what comes next.
    fn next(&self) -> usize {
        self.found.len() + self.failed.len()
    }
}

/// Makes places among what is left of the order of all inputs, and says how many they are.
pub(super) fn number(tasks: &mut [Task], failed: &[Failed]) -> usize {
    let of_tasks = tasks.iter().map(|task| task.place);
    let orders: BTreeSet<usize> = of_tasks
        .chain(failed.iter().map(|failed| failed.order))
        .collect();
    let places: HashMap<usize, usize> = orders.iter().copied().zip(0..).collect();
    for task in tasks {
        task.place = places[&task.place];
    }
    places.len()
}

/// Lists the files of all inputs: inputs in the order given, folders in natural order. `output`, where outputs go, is
/// not read when it lies inside a folder that is.
pub(super) fn list(request: &Request, output: Option<&Path>) -> Result<Listing, UsageError> {
    let mut walk = Walk {
        reads: request.reads,
        recursive: request.recursive,
        include: globs("--include", &request.include)?,
        exclude: globs("--exclude", &request.exclude)?,
        output: output.and_then(|path| path.canonicalize().ok()),
        listing: Listing::default(),
    };
    for source in &request.inputs {
        walk.input(source);
    }
    Ok(walk.listing)
}

/// None where there are no patterns.
fn globs(flag: &str, patterns: &[String]) -> Result<Option<GlobSet>, UsageError> {
    let wrong = |e: globset::Error| UsageError(format!("{flag}: {e}"));
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        // Cameras write IMG.JPG: `*.jpg` must find it. A trailing separator names a folder, as in .gitignore.
        let glob = GlobBuilder::new(pattern.trim_end_matches('/'))
            .literal_separator(true)
            .case_insensitive(true)
            .build();
        set.add(glob.map_err(wrong)?);
    }
    let set = set.build().map_err(wrong)?;
    Ok((!set.is_empty()).then_some(set))
}

/// Whether the path, its name, or a folder on the way to it matches.
fn matches(set: &GlobSet, relative: &Path) -> bool {
    relative
        .ancestors()
        .filter_map(|path| Some((path, path.file_name()?)))
        .any(|(path, name)| set.is_match(path) || set.is_match(name))
}

struct Walk {
    reads: Reads,
    recursive: bool,
    include: Option<GlobSet>,
    exclude: Option<GlobSet>,
    output: Option<PathBuf>,
    listing: Listing,
}

/// A folder being read.
struct Folder<'a> {
    path: &'a Path,
    relative: &'a Path,
    /// The canonical paths of this folder and of those above it, as far as they were read.
    chain: &'a [PathBuf],
}

impl Walk {
    fn input(&mut self, source: &Source) {
        let order = self.listing.next();
        let named = |relative: PathBuf| Found {
            source: source.clone(),
            relative,
            order,
        };
        let path = match source {
            Source::Path(path) => path,
            Source::Stdin => return self.listing.found.push(named("stdin".into())),
            Source::Prompt(prompt) => {
                return self.listing.found.push(named(prompt.relative.clone()));
            }
        };
        let name = PathBuf::from(path.file_name().unwrap_or(path.as_os_str()));
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => self.root(path),
            Ok(_) => self.listing.found.push(named(name)),
            Err(error) => {
                self.listing.failed.push(Failed {
                    path: path.clone(),
                    relative: name,
                    order,
                    error: explain(path, &error),
                });
            }
        }
    }

    fn root(&mut self, path: &Path) {
        let before = self.listing.passed_over.len();
        let counts = |l: &Listing| (l.found.len(), l.failed.len());
        let were = counts(&self.listing);
        let chain: Vec<PathBuf> = path.canonicalize().into_iter().collect();
        self.read(&Folder {
            path,
            relative: Path::new(""),
            chain: &chain,
        });
        if counts(&self.listing) == were {
            let passed_over = &self.listing.passed_over[before..];
            let has = |reason| passed_over.iter().any(|(_, r)| *r == reason);
            let cure = if has(PassedOver::NotIncluded) || has(PassedOver::Excluded) {
                " that --include and --exclude let through"
            } else if has(PassedOver::SubFolder) {
                "; -r reads its sub-folders"
            } else {
                ""
            };
            self.listing.warnings.push(format!(
                "{} holds no {}{cure}",
                path.display(),
                self.reads.name()
            ));
        }
    }

    fn read(&mut self, folder: &Folder) {
        let names = fs::read_dir(folder.path).and_then(|entries| {
            entries
                .map(|entry| entry.and_then(|e| Ok((e.file_name(), e.file_type()?))))
                .collect::<io::Result<Vec<_>>>()
        });
        let mut names = match names {
            Ok(names) => names,
            Err(error) => {
                return self.fail(folder.path, folder.relative, &error);
            }
        };
        names.sort_by(|(a, _), (b, _)| natural_order::compare(a, b));
        for (name, kind) in names {
            let path = folder.path.join(&name);
            let relative = folder.relative.join(&name);
            if let Some(reason) = self.passes_over(&name, &relative) {
                self.listing.passed_over.push((path, reason));
                continue;
            }
            let kind = if kind.is_symlink() {
                fs::metadata(&path).map(|metadata| metadata.file_type())
            } else {
                Ok(kind)
            };
            match kind {
                Ok(kind) if kind.is_dir() => self.sub_folder(path, &relative, folder.chain),
                Ok(kind) => self.file(path, relative, kind.is_file()),
                // A broken link is lost work only where it is named like an image.
                Err(error) if self.reads.has_name(&path) => self.fail(&path, &relative, &error),
                Err(_) => self.pass_over(path, PassedOver::NotAnImage),
            }
        }
    }

    /// What a name alone tells, of a file or folder.
    fn passes_over(&self, name: &OsStr, relative: &Path) -> Option<PassedOver> {
        let text = name.to_string_lossy();
        if text.starts_with('.') {
            let partial = text.contains(".sd-upscale-") && text.ends_with(".tmp");
            return Some(if partial {
                PassedOver::Partial
            } else {
                PassedOver::Hidden
            });
        }
        let excluded = self.exclude.as_ref().is_some_and(|e| matches(e, relative));
        excluded.then_some(PassedOver::Excluded)
    }

    fn sub_folder(&mut self, path: PathBuf, relative: &Path, chain: &[PathBuf]) {
        if !self.recursive {
            return self.pass_over(path, PassedOver::SubFolder);
        }
        let canonical = match path.canonicalize() {
            Ok(canonical) => canonical,
            Err(error) => return self.fail(&path, relative, &error),
        };
        if self.output.as_ref() == Some(&canonical) {
            return self.pass_over(path, PassedOver::OutputFolder);
        }
        if chain.contains(&canonical) {
            return self.pass_over(path, PassedOver::Loop);
        }
        let chain = [chain, &[canonical]].concat();
        self.read(&Folder {
            path: &path,
            relative,
            chain: &chain,
        });
    }

    fn file(&mut self, path: PathBuf, relative: PathBuf, is_file: bool) {
        if !self.reads.has_name(&path) {
            return self.pass_over(path, PassedOver::NotAnImage);
        }
        if !is_file {
            return self.pass_over(path, PassedOver::NotAFile);
        }
        let included = self.include.as_ref().is_none_or(|i| matches(i, &relative));
        if !included {
            return self.pass_over(path, PassedOver::NotIncluded);
        }
        self.listing.found.push(Found {
            source: Source::Path(path),
            relative,
            order: self.listing.next(),
        });
    }

    fn pass_over(&mut self, path: PathBuf, reason: PassedOver) {
        self.listing.passed_over.push((path, reason));
    }

    fn fail(&mut self, path: &Path, relative: &Path, error: &io::Error) {
        self.listing.failed.push(Failed {
            path: path.to_owned(),
            relative: relative.to_owned(),
            order: self.listing.next(),
            error: explain(path, error),
        });
    }
}

impl Reads {
    /// Whether a file is named like one of these.
    fn has_name(self, path: &Path) -> bool {
        split_name(path).1.is_some_and(|extension| match self {
            Reads::Pictures => is_readable(&extension),
            Reads::Prompts => extension.eq_ignore_ascii_case("txt"),
        })
    }

    fn name(self) -> &'static str {
        match self {
            Reads::Pictures => "image or latents",
            Reads::Prompts => "prompt (.txt)",
        }
    }
}

/// An input that cannot be looked at, in words that say what to do.
fn explain(path: &Path, error: &io::Error) -> String {
    let missing = error.kind() == io::ErrorKind::NotFound;
    if missing && path.is_symlink() {
        return "a link to a file that does not exist".into();
    }
    let is_pattern = path.to_string_lossy().contains(['*', '?']);
    match (missing, is_pattern) {
        (true, true) => "no such file or folder; the shell found nothing for this pattern \
             (give the folder and --include PATTERN instead)"
            .into(),
        (true, false) => "no such file or folder".into(),
        (false, _) => format!("cannot be read: {error}"),
    }
}
