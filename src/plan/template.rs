//! `--name`: the template that output names are made from, checked when it is parsed.

use std::ffi::{OsStr, OsString};
use std::path::{Component, Path};
use std::str::FromStr;

use super::{UsageError, Written};

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Stem,
    Ext,
    InExt,
    Seed,
    Width,
    Height,
}

const FIELDS: [(&str, Part); 6] = [
    ("{stem}", Part::Stem),
    ("{ext}", Part::Ext),
    ("{in_ext}", Part::InExt),
    ("{seed}", Part::Seed),
    ("{width}", Part::Width),
    ("{height}", Part::Height),
];

/// An output's name, with `/` for sub-folders, without its extension: `{stem}-{seed}` of `{stem}-{seed}.{ext}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    parts: Vec<Part>,
    /// The extension where the template states one, as in `{stem}.webp`.
    extension: Option<String>,
}

/// What the fields stand for. `size` is the output's width and height in pixels; without it the two fields stay as
/// they are written.
pub(super) struct Fields<'a> {
    pub stem: &'a OsStr,
    pub extension: &'a str,
    /// The input's.
    pub in_extension: &'a str,
    pub seed: u64,
    pub size: Option<(u32, u32)>,
}

impl Template {
    /// The names given beside the input: they must differ from it.
    pub(super) fn beside() -> Self {
        let parts = vec![Part::Stem, Part::Text("-2x".into())];
        let extension = None;
        Self { parts, extension }
    }

    /// The names given in another folder.
    pub(super) fn same() -> Self {
        let parts = vec![Part::Stem];
        let extension = None;
        Self { parts, extension }
    }

    pub(super) fn extension(&self) -> Option<&str> {
        self.extension.as_deref()
    }

    pub(super) fn has_stem(&self) -> bool {
        self.parts.contains(&Part::Stem)
    }

    /// The name without its extension.
    pub(super) fn expand(&self, fields: &Fields) -> OsString {
        let mut name = OsString::new();
        for part in &self.parts {
            match (part, fields.size) {
                (Part::Text(text), _) => name.push(text),
                (Part::Stem, _) => name.push(fields.stem),
                (Part::Ext, _) => name.push(fields.extension),
                (Part::InExt, _) => name.push(fields.in_extension),
                (Part::Seed, _) => name.push(fields.seed.to_string()),
                (Part::Width, Some((width, _))) => name.push(width.to_string()),
                (Part::Height, Some((_, height))) => name.push(height.to_string()),
                (Part::Width, None) => name.push("{width}"),
                (Part::Height, None) => name.push("{height}"),
            }
        }
        name
    }

    /// How many folders the template adds above the name.
    pub(super) fn depth(&self) -> usize {
        let slashes = |part: &Part| match part {
            Part::Text(text) => text.chars().filter(|c| std::path::is_separator(*c)).count(),
            _ => 0,
        };
        self.parts.iter().map(slashes).sum()
    }

    /// The stems that this template could have made `name` from, at any seed and size; `numbered` as one of a batch of
    /// latents. Empty for a template that changes nothing, which makes every name from itself.
    pub(super) fn stems_of<'a>(&self, name: &'a str, numbered: bool) -> Vec<&'a str> {
        let mut stems = Vec::new();
        if self.has_stem() && self.parts != [Part::Stem] {
            unmake(&self.parts, name, None, &mut stems);
            let unnumbered = name.trim_end_matches(|c: char| c.is_ascii_digit());
            if let Some(base) = unnumbered.strip_suffix('-')
                && numbered
                && unnumbered.len() < name.len()
            {
                unmake(&self.parts, base, None, &mut stems);
            }
        }
        stems
    }
}

/// Matches `text` against `parts`, and collects every value that the stem can have taken.
fn unmake<'a>(parts: &[Part], text: &'a str, stem: Option<&'a str>, stems: &mut Vec<&'a str>) {
    let Some((part, rest)) = parts.split_first() else {
        if text.is_empty() {
            stems.extend(stem);
        }
        return;
    };
    match (part, stem) {
        (Part::Text(literal), _) => {
            if let Some(text) = text.strip_prefix(literal.as_str()) {
                unmake(rest, text, stem, stems);
            }
        }
        (Part::Stem, Some(known)) => {
            if let Some(text) = text.strip_prefix(known) {
                unmake(rest, text, stem, stems);
            }
        }
        (Part::Stem, None) => {
            for (end, _) in text.char_indices().skip(1) {
                unmake(rest, &text[end..], Some(&text[..end]), stems);
            }
            if !text.is_empty() {
                unmake(rest, "", Some(text), stems);
            }
        }
        (Part::Ext | Part::InExt | Part::Seed | Part::Width | Part::Height, _) => {
            let lettered = matches!(part, Part::Ext | Part::InExt);
            let fits = |c: char| c.is_ascii_digit() || lettered && c.is_ascii_alphabetic();
            let run = text.find(|c| !fits(c)).unwrap_or(text.len());
            for end in 1..=run {
                unmake(rest, &text[end..], stem, stems);
            }
        }
    }
}

impl FromStr for Template {
    type Err = UsageError;

    fn from_str(text: &str) -> Result<Self, UsageError> {
        let wrong = |what: &str| {
            let fields = FIELDS.map(|(name, _)| name).join(", ");
            Err(UsageError(format!(
                "`{text}`: {what} (a name such as `{{stem}}-{{seed}}.{{ext}}`; fields: {fields})"
            )))
        };
        if text.is_empty() || text.ends_with(std::path::is_separator) {
            return wrong("it ends without a file name");
        }
        let inside = |c: Component| matches!(c, Component::Normal(_) | Component::CurDir);
        if !Path::new(text).components().all(inside) {
            return wrong("it leaves the output folder; choose the folder with -o");
        }
        if text.contains('\0') {
            return wrong("it contains a NUL");
        }
        // The extension apart from the rest. Without one that can be written, `.{ext}` is added.
        let (name, extension) = match text.rsplit_once('.') {
            Some((name, "{ext}")) => (name, None),
            Some((name, ext)) if Written::from_extension(ext).is_some() => (name, Some(ext)),
            _ => (text, None),
        };
        if name.is_empty() || name.ends_with(std::path::is_separator) {
            return wrong("it has no name before the extension");
        }
        let mut parts = Vec::new();
        let mut rest = name;
        while let Some(start) = rest.find('{') {
            if start > 0 {
                parts.push(Part::Text(rest[..start].to_owned()));
            }
            let Some(length) = rest[start..].find('}') else {
                return wrong("a `{` without its `}`");
            };
            let field = &rest[start..=start + length];
            match FIELDS.iter().find(|(name, _)| *name == field) {
                Some((_, part)) => parts.push(part.clone()),
                None => return wrong(&format!("unknown field {field}")),
            }
            rest = &rest[start + length + 1..];
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.to_owned()));
        }
        let extension = extension.map(str::to_owned);
        Ok(Self { parts, extension })
    }
}
