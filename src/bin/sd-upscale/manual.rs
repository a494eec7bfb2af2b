//! `--man`: the man page, made of the words of `--help`.

use std::io::Write;

use anyhow::{Context, Result};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use crate::args::Args;
use crate::json_lines::{SCHEMA, kinds};
use crate::notes::{ENVIRONMENT, EXAMPLES, EXIT_STATUS, FILES};

/// The title, without a date, so that equal programs have equal pages: clap_mangen's leaves no place for it, and the source stands there.
/// Before it the macro that clap_mangen's apostrophes are: straight ones, also where a page is set in type.
const PREAMBLE: &str = concat!(
    ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n",
    ".TH sd-upscale 1 \"\" \"sd-upscale ",
    env!("CARGO_PKG_VERSION"),
    "\" \"User Commands\"\n"
);

/// Writes the page to standard output.
///
/// # Errors
/// Standard output is closed.
pub fn print() -> Result<()> {
    let page = page().context("cannot make the man page")?;
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(&page).and_then(|()| stdout.flush());
    written.context("cannot write the man page")
}

fn page() -> Result<Vec<u8>> {
    // What is hidden from -h has no words in the page otherwise. The machine's kernels are no matter of a page for all machines.
    let command = Args::checked_command()
        .mut_args(|argument| argument.hide_short_help(false))
        .long_version(None::<&str>);
    let man = Man::new(command);
    let mut page = PREAMBLE.as_bytes().to_vec();
    man.render_name_section(&mut page)?;
    let mut synopsis = Roff::new();
    synopsis.control("SH", ["SYNOPSIS"]);
    synopsis.text([bold("sd-upscale"), roman(" [OPTIONS] [INPUT]...")]);
    synopsis.to_writer(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    section("EXIT STATUS", &EXIT_STATUS).to_writer(&mut page)?;
    json_output()?.to_writer(&mut page)?;
    for (heading, rows) in [
        ("ENVIRONMENT", &ENVIRONMENT[..]),
        ("FILES", &FILES),
        ("EXAMPLES", &EXAMPLES),
    ] {
        section(heading, rows).to_writer(&mut page)?;
    }
    Ok(page)
}

/// The lines of `--json`: what they have in common, then each kind with its fields.
fn json_output() -> Result<Roff> {
    let mut roff = Roff::new();
    roff.control("SH", ["JSON OUTPUT"]);
    roff.text([roman(format!(
        "Each line of standard output is an object whose field schema is the version of what follows, {SCHEMA}. Within a version \
         fields are only added, so take no notice of those you do not know. The same as a JSON Schema is \
         assets/json-schema.json in the program's source."
    ))]);
    for kind in kinds()? {
        roff.control("SS", [&*kind.options]);
        roff.text([roman(kind.what)]);
        for (field, what) in &kind.fields {
            row(&mut roff, field, what);
        }
    }
    Ok(roff)
}

/// A term and what it is, under a heading.
fn section(heading: &str, rows: &[(&str, &str)]) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", [heading]);
    for (term, what) in rows {
        row(&mut roff, term, what);
    }
    roff
}

fn row(roff: &mut Roff, term: &str, what: &str) {
    roff.control("TP", []);
    roff.text([bold(term)]);
    roff.text([roman(what)]);
}
