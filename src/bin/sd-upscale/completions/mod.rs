//! `--completions`: what a shell reads once, and the answers that it then asks this program for at each Tab.
//!
//! Asked anew each time, they know the models in the cache, the cards and this version's options.

pub mod values;

use std::io::{Error, Write};

use anyhow::{Context, Result};
use clap::{Command, ValueEnum};
use clap_complete::CompleteEnv;
use clap_complete::env::Shells;

const PROGRAM: &str = "sd-upscale";

/// In the environment of a call that asks for answers: the shell's name.
const ASKING: &str = "SD_UPSCALE_COMPLETE";

/// Bash's own splits words at `=` and `:`, which stand in `--device=cuda:0`, and takes names as they are, spaces and all.
const BASH: &str = include_str!("bash.sh");

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    Bash,
    Zsh,
    Fish,
    Powershell,
    Elvish,
}

impl Shell {
    fn name(self) -> &'static str {
        match self {
            Self::Bash => "bash",
            Self::Zsh => "zsh",
            Self::Fish => "fish",
            Self::Powershell => "powershell",
            Self::Elvish => "elvish",
        }
    }
}

/// Answers a shell that asks what can be said to `command`, and ends the process, where one asks.
pub fn answer(command: fn() -> Command) {
    CompleteEnv::with_factory(command)
        .bin(PROGRAM)
        .var(ASKING)
        .complete();
}

/// Writes what `shell` reads to standard output.
///
/// # Errors
/// Standard output is closed.
pub fn print(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    match shell {
        Shell::Bash => script.extend(BASH.bytes()),
        other => {
            let shells = Shells::builtins();
            let known = shells.completer(other.name());
            let known = known.ok_or_else(|| Error::other("the shell is not known"))?;
            known.write_registration(ASKING, PROGRAM, PROGRAM, PROGRAM, &mut script)?;
        }
    }
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(&script).and_then(|()| stdout.flush());
    written.context("cannot write the completions")
}
