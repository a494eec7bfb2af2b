//! The command line tool: parse, run, say what went wrong, exit.

mod args;
mod check_device;
mod comparison;
mod completions;
mod compute;
mod configuration;
mod convert;
mod dry_run;
mod embeds;
mod existing;
mod export_tiny;
mod first_use;
mod grid;
mod item;
mod job;
mod json_lines;
mod list_devices;
mod manual;
mod memory_size;
mod model;
mod notes;
mod open_files;
mod parcel;
mod preview;
mod prompts;
mod read;
mod report;
mod run;
mod signals;
mod size;
mod stated;
mod threads;
mod version;
mod watch;
mod write;

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use sd_upscale::device::Reuse;
use sd_upscale::kernels::cpu::Isa;
use sd_upscale::plan::UsageError;

#[global_allocator]
static ALLOCATOR: Reuse = Reuse;

fn main() -> ExitCode {
    errors_without_backtraces();
    threads::keep_panics();
    signals::outlive_file_limits();
    completions::answer(args::Args::checked_command);
    // Its own messages on a command line that it cannot read end in status 2.
    let args = args::Args::of_process();
    let result = args.and_then(|args| threads::guarded(|| done(args)).flatten());
    result.unwrap_or_else(|error| {
        // Where no one reads standard error, the exit status remains.
        let _ = writeln!(std::io::stderr(), "error: {error:#}");
        ExitCode::from(if error.is::<UsageError>() { 2 } else { 1 })
    })
}

/// RUST_BACKTRACE, which many have set for programs of their own, has candle write a backtrace into its errors, which are a
/// line here. RUST_LIB_BACKTRACE=1 asks for it all the same; panics heed the first as ever.
fn errors_without_backtraces() {
    const LIBRARIES: &str = "RUST_LIB_BACKTRACE";
    if std::env::var_os(LIBRARIES).is_none() {
        // SAFETY: no other thread has been started.
        unsafe { std::env::set_var(LIBRARIES, "0") };
    }
}

fn done(args: args::Args) -> Result<ExitCode> {
    if let Some(folder) = &args.export_tiny {
        export_tiny::export(folder)?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(shell) = args.completions {
        completions::print(shell)?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.man {
        manual::print()?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.list_devices {
        Isa::chosen().map_err(UsageError)?;
        list_devices::print(args.json)?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(choice) = &args.check_device {
        Isa::chosen().map_err(UsageError)?;
        threads::start_pool(args.threads)?;
        return check_device::check(choice, args.json);
    }
    let count = args.threads;
    let folder = args.convert.clone();
    let job = job::Job::try_from(args)?;
    if let Some(folder) = folder {
        return convert::convert(&job, &folder);
    }
    ensure!(
        !(job.writes_to_stdout() && signals::stdout_was_closed()),
        "standard output is closed: give -o a file, or open it"
    );
    Isa::chosen().map_err(UsageError)?;
    threads::start_pool(count)?;
    run::run(job)
}
