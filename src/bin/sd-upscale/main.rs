//! The command line tool: parse, run, say what went wrong, exit.

mod args;
mod compute;
mod dry_run;
mod export_tiny;
mod item;
mod job;
mod read;
mod report;
mod run;
mod write;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use sd_upscale::plan::UsageError;

fn main() -> ExitCode {
    let args = args::Args::parse();
    let result = match &args.export_tiny {
        Some(folder) => export_tiny::export(folder).map(|()| ExitCode::SUCCESS),
        None => job::Job::try_from(args)
            .map_err(anyhow::Error::from)
            .and_then(run::run),
    };
    result.unwrap_or_else(|error| {
        // Where no one reads standard error, the exit status remains.
        let _ = writeln!(std::io::stderr(), "error: {error:#}");
        ExitCode::from(if error.is::<UsageError>() { 2 } else { 1 })
    })
}
