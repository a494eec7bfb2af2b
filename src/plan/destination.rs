//! `-o`, `--name` and `--format` -> where the outputs of this run go.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::naming::{
    Naming, WRITTEN, Written, is_latents, is_readable, split_name, split_written_name,
};
use super::template::Template;
use super::walk::Found;
use super::{Output, Request, Several, Source, Target, UsageError, Variant};

#[derive(Debug)]
pub(super) enum Destination {
    Beside,
    Folder(PathBuf),
    File {
        folder: PathBuf,
        stem: OsString,
        /// None: the name has no extension that says the kind, and stays without.
        extension: Option<String>,
        kind: Written,
    },
    Stdout,
}

fn usage<T>(text: String) -> Result<T, UsageError> {
    Err(UsageError(text))
}

impl Destination {
    pub(super) fn of(request: &Request) -> Result<Self, UsageError> {
        let one_file = match request.inputs.as_slice() {
            [Source::Stdin | Source::Prompt(_)] => true,
            [Source::Path(path)] => !path.is_dir(),
            _ => false,
        };
        if let Some(format) = &request.format {
            Written::from_flag(format)?;
        }
        if let Some(stated) = request.template.as_ref().and_then(Template::extension) {
            agree("--name", stated, request.format.as_deref())?;
        }
        match &request.output {
            None => beside(request),
            Some(Output::Stdout) if !one_file => usage(
                "-o - writes one result: give one input that is a file or -, or a folder with -o"
                    .into(),
            ),
            Some(Output::Stdout) if request.variants.len() > 1 => usage(
                "-o - writes one result: give one seed and one guidance, or a file or folder with -o"
                    .into(),
            ),
            Some(Output::Stdout) if request.template.is_some() => {
                usage("--name names files, but -o - writes to standard output".into())
            }
            Some(Output::Stdout) => Ok(Destination::Stdout),
            Some(Output::Path(path)) => to_path(path, one_file, request),
        }
    }

    /// The folder that outputs go to, where that is one.
    pub(super) fn folder(&self) -> Option<&Path> {
        match self {
            Destination::Folder(folder) => Some(folder),
            _ => None,
        }
    }

    pub(super) fn target(
        &self,
        found: &Found,
        template: &Arc<Template>,
        request: &Request,
    ) -> Target {
        let path = match &found.source {
            Source::Path(path) => path,
            Source::Stdin | Source::Prompt(_) => &found.relative,
        };
        let (stem, own) = match &found.source {
            Source::Prompt(_) => split_written_name(path),
            Source::Path(_) | Source::Stdin => split_name(path),
        };
        let in_extension = own.clone().unwrap_or_default();
        let stated = template.extension().or(request.format.as_deref());
        let own = own.filter(|e| !is_latents(e) && !e.eq_ignore_ascii_case("apng"));
        let written = stated
            .map(str::to_owned)
            .or(own)
            .and_then(|e| Written::from_extension(&e).map(|kind| (e, kind)));
        let (written, own_kind) =
            written.unwrap_or(("png".into(), Written::Image(crate::picture::Format::Png)));
        let (folder, stem, extension, kind) = match self {
            Destination::Stdout => return Target::Stdout(own_kind),
            Destination::File {
                folder,
                stem,
                extension,
                kind,
            } => (folder.clone(), stem.clone(), extension.clone(), *kind),
            Destination::Folder(folder) => {
                let above = found.relative.parent().unwrap_or(Path::new(""));
                (folder.join(above), stem, Some(written), own_kind)
            }
            Destination::Beside => {
                let folder = path.parent().unwrap_or(Path::new(""));
                (folder.to_owned(), stem, Some(written), own_kind)
            }
        };
        Target::File(Naming {
            folder,
            template: template.clone(),
            stem,
            dotted: extension.is_some(),
            extension: extension.unwrap_or_default(),
            in_extension,
            kind,
            variant: Variant::default(),
        })
    }

    /// The template of this run: the one given, or the one that fits.
    pub(super) fn template(&self, request: &Request) -> Arc<Template> {
        let several = Several::of(&request.variants);
        Arc::new(match (&request.template, self) {
            (Some(template), _) => template.clone(),
            (None, Destination::Beside) => Template::beside(request.times, several),
            (None, _) => Template::same(several),
        })
    }
}

/// Without `-o` every input must be a file that lies somewhere.
fn beside(request: &Request) -> Result<Destination, UsageError> {
    for source in &request.inputs {
        let nowhere = match source {
            Source::Stdin | Source::Prompt(_) => true,
            Source::Path(path) => fs::metadata(path).is_ok_and(|m| !m.is_dir() && !m.is_file()),
        };
        if nowhere {
            return usage(format!(
                "{source} is no file to write beside: say where the output goes with -o FILE, or -o - for standard output"
            ));
        }
    }
    Ok(Destination::Beside)
}

fn to_path(path: &Path, one_file: bool, request: &Request) -> Result<Destination, UsageError> {
    let shown = path.display();
    let found = fs::metadata(path).ok();
    let is_folder = found.as_ref().is_some_and(fs::Metadata::is_dir);
    let is_file = found.as_ref().is_some_and(fs::Metadata::is_file);
    if path.as_os_str().is_empty() {
        return usage("-o is empty: give a file, a folder, or - for standard output".into());
    }
    if found.is_some() && !is_folder && !is_file {
        return usage(format!(
            "-o {shown} is neither a file nor a folder, and outputs replace what they are written to; \
             use -o - to write to standard output"
        ));
    }
    let slashed = path.to_string_lossy().ends_with(std::path::is_separator);
    // Without the trailing separator, with which a file would not be found.
    let bare = path.components().as_path();
    let mut must_be_folders = bare.ancestors().skip(usize::from(!slashed));
    if let Some(file) = must_be_folders.find(|folder| folder.is_file()) {
        return usage(format!(
            "-o {shown}: {} is a file, not a folder",
            file.display()
        ));
    }
    let folder = || Ok(Destination::Folder(path.to_owned()));
    if is_folder || slashed {
        return folder();
    }
    let (stem, extension) = split_name(path);
    let known = extension.as_deref().is_some_and(is_readable);
    if !is_file && !known && (!one_file || request.listed || request.template.is_some()) {
        return folder();
    }
    if !one_file {
        return usage(format!(
            "-o {shown} is one file, but the inputs are several, or a folder: name a folder, such as -o {}/",
            path.with_extension("").display()
        ));
    }
    if request.template.is_some() {
        return usage(format!(
            "--name and -o {shown} both name the output: give one of them, or a folder to -o"
        ));
    }
    let folder = path.parent().unwrap_or(Path::new("")).to_owned();
    let written = extension.filter(|e| Written::from_extension(e).is_some());
    match (written, &request.format) {
        (Some(extension), format) => {
            agree("-o", &extension, format.as_deref())?;
            let kind = Written::from_flag(&extension)?;
            Ok(Destination::File {
                folder,
                stem,
                extension: Some(extension),
                kind,
            })
        }
        (None, Some(format)) => Ok(Destination::File {
            folder,
            stem: path.file_name().unwrap_or_default().to_owned(),
            extension: None,
            kind: Written::from_flag(format)?,
        }),
        (None, None) if known => usage(format!(
            "-o {shown}: this format is read but not written; choose {WRITTEN}"
        )),
        (None, None) => usage(format!(
            "-o {shown} has no extension that says the format ({WRITTEN}): \
             use -o {shown}.png, or -o {shown}/ for a folder, or add --format"
        )),
    }
}

/// An extension that contradicts `--format` is an error rather than a guess at which was meant.
fn agree(flag: &str, extension: &str, format: Option<&str>) -> Result<(), UsageError> {
    match format {
        Some(format) if Written::from_extension(format) != Written::from_extension(extension) => {
            usage(format!(
                "{flag} says .{extension}, but --format says {format}: leave one of them out"
            ))
        }
        _ => Ok(()),
    }
}
