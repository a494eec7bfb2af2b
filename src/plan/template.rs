//! `--name`: the template that output names are made from, checked when it is parsed.

use std::ffi::{OsStr, OsString};
use std::ops::RangeInclusive;
use std::path::{Component, Path};
use std::str::FromStr;

use super::{Several, UsageError, Variant, Written};

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Stem,
    Ext,
    InExt,
    Seed,
    Guidance,
    Width,
    Height,
    /// `2x`, of results twice as large. No template states it; names beside the input have it.
    Times(usize),
}

/// What [`Part::Times`] of any run can have made.
const TIMES: [&str; 3] = ["2x", "4x", "8x"];

const FIELDS: [(&str, Part); 7] = [
    ("{stem}", Part::Stem),
    ("{ext}", Part::Ext),
    ("{in_ext}", Part::InExt),
    ("{seed}", Part::Seed),
    ("{guidance}", Part::Guidance),
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
    pub variant: Variant,
    pub size: Option<(u32, u32)>,
}

impl Template {
    /// The names given beside the input, of results `times` as large: they must differ from it.
    pub(super) fn beside(times: usize, several: Several) -> Self {
        let mut parts = vec![Part::Stem, Part::Text("-".into()), Part::Times(times)];
        parts.extend(values(several));
        let extension = None;
        Self { parts, extension }
    }

    /// The names given in another folder.
    pub(super) fn same(several: Several) -> Self {
        let mut parts = vec![Part::Stem];
        parts.extend(values(several));
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
                (Part::Seed, _) => name.push(fields.variant.seed.to_string()),
                (Part::Guidance, _) => name.push(fields.variant.guidance.to_string()),
                (Part::Width, Some((width, _))) => name.push(width.to_string()),
                (Part::Height, Some((_, height))) => name.push(height.to_string()),
                (Part::Width, None) => name.push("{width}"),
                (Part::Height, None) => name.push("{height}"),
                (Part::Times(times), _) => name.push(format!("{times}x")),
            }
        }
        name
    }

    /// The parts of this template; of the names given beside the input, those of runs with other values as well.
    fn of_any_run(&self) -> Vec<Vec<Part>> {
        let is_times = |part: &Part| matches!(part, Part::Times(_));
        let Some(at) = self.parts.iter().position(is_times) else {
            return vec![self.parts.clone()];
        };
        let all = [(false, false), (true, false), (false, true), (true, true)];
        let with = |(seeds, guidances)| {
            let values = values(Several { seeds, guidances });
            [&self.parts[..=at], &values].concat()
        };
        all.into_iter().map(with).collect()
    }

    /// How many folders the template adds above the name.
    pub(super) fn depth(&self) -> usize {
        let slashes = |part: &Part| match part {
            Part::Text(text) => text.chars().filter(|c| std::path::is_separator(*c)).count(),
            _ => 0,
        };
        self.parts.iter().map(slashes).sum()
    }

    /// The stems that this template could have made `name` from, at any seed, size and scale; `numbered` as one of a batch of
    /// latents. Empty for a template that changes nothing, which makes every name from itself.
    pub(super) fn stems_of<'a>(&self, name: &'a str, numbered: bool) -> Vec<&'a str> {
        let mut stems = Vec::new();
        if self.has_stem() && self.parts != [Part::Stem] {
            let mut unmake = |name: &'a str| {
                for parts in self.of_any_run() {
                    stems.extend(unmake(&parts, name));
                }
            };
            unmake(name);
            let unnumbered = name.trim_end_matches(|c: char| c.is_ascii_digit());
            if let Some(base) = unnumbered.strip_suffix('-')
                && numbered
                && unnumbered.len() < name.len()
            {
                unmake(base);
            }
        }
        stems
    }
}

/// What tells outputs of one input apart where the user names none.
fn values(several: Several) -> Vec<Part> {
    let mut parts = Vec::new();
    if several.seeds {
        parts.extend([Part::Text("-".into()), Part::Seed]);
    }
    if several.guidances {
        parts.extend([Part::Text("-g".into()), Part::Guidance]);
    }
    parts
}

/// Every value that the stem can have taken where `parts`, of which one is the stem, made `text`. Fields may touch, so
/// that a run of digits is parted in many ways: it is told place by place, not way by way, what fits.
fn unmake<'a>(parts: &[Part], text: &'a str) -> Vec<&'a str> {
    let Some(at) = parts.iter().position(|part| *part == Part::Stem) else {
        return Vec::new();
    };
    let (before, after) = (&parts[..at], &parts[at + 1..]);
    let starts = ends(before, text);
    // Where the stem stands once, what follows it does not depend on it.
    let once = (!after.contains(&Part::Stem)).then(|| fits(after, text, ""));
    let places = || (0..=text.len()).filter(|&at| text.is_char_boundary(at));
    let mut stems = Vec::new();
    for start in places().filter(|&start| starts[start]) {
        for end in places().filter(|&end| end > start) {
            let stem = &text[start..end];
            let follows = match &once {
                Some(fits) => fits[end],
                None => fits(after, text, stem)[end],
            };
            if follows {
                stems.push(stem);
            }
        }
    }
    stems
}

/// For each place of `text`, whether `parts` can have made what stands before it.
fn ends(parts: &[Part], text: &str) -> Vec<bool> {
    let mut reached = vec![false; text.len() + 1];
    reached[0] = true;
    for part in parts {
        let mut next = vec![false; text.len() + 1];
        for start in (0..=text.len()).filter(|&at| reached[at]) {
            part.ends(text, start, "").for_each(|end| next[end] = true);
        }
        reached = next;
    }
    reached
}

/// For each place of `text`, whether `parts` can have made what stands behind it.
fn fits(parts: &[Part], text: &str, stem: &str) -> Vec<bool> {
    let mut fits = vec![false; text.len() + 1];
    fits[text.len()] = true;
    for part in parts.iter().rev() {
        let fit =
            |at| text.is_char_boundary(at) && part.ends(text, at, stem).any(|end: usize| fits[end]);
        fits = (0..=text.len()).map(fit).collect();
    }
    fits
}

impl Part {
    /// Where what this part makes can end, if it starts at `start` of `text`.
    fn ends(&self, text: &str, start: usize, stem: &str) -> RangeInclusive<usize> {
        let rest = &text[start..];
        let (least, most) = match self {
            Part::Text(literal) if rest.starts_with(literal.as_str()) => {
                (literal.len(), literal.len())
            }
            Part::Stem if rest.starts_with(stem) => (stem.len(), stem.len()),
            Part::Times(_) => match TIMES.iter().find(|times| rest.starts_with(**times)) {
                Some(times) => (times.len(), times.len()),
                None => (1, 0),
            },
            Part::Text(_) | Part::Stem => (1, 0),
            Part::Ext | Part::InExt | Part::Seed | Part::Guidance | Part::Width | Part::Height => {
                let lettered = matches!(self, Part::Ext | Part::InExt);
                let other = |c: char| match self {
                    Part::Guidance => c == '.',
                    _ => lettered && c.is_ascii_alphabetic(),
                };
                let run = rest.find(|c: char| !c.is_ascii_digit() && !other(c));
                (1, run.unwrap_or(rest.len()))
            }
        };
        start + least..=start + most
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_gives_every_stem_back_that_it_can_be_of_however_many_fields_touch() {
        let stems = |template: &str, name| {
            template
                .parse::<Template>()
                .unwrap()
                .stems_of(name, false)
                .join(" ")
        };
        assert_eq!(stems("{stem}-{seed}", "a-1-2"), "a-1");
        assert_eq!(stems("{seed}{stem}", "12a"), "2a a");
        assert_eq!(stems("{stem}_{stem}", "é_é"), "é");
        assert_eq!(stems("{stem}{width}x{height}", "img10x20"), "img img1");
        assert_eq!(stems("x-{stem}", "y-a"), "");
        let digits = "1".repeat(200);
        let touching = format!("{}{{stem}}{}", "{seed}".repeat(20), "{seed}".repeat(20));
        let template: Template = touching.parse().unwrap();
        // 160 digits are left for a stem of 1 to 160, in 160 down to 1 places.
        assert_eq!(template.stems_of(&digits, false).len(), 160 * 161 / 2);
    }
}
