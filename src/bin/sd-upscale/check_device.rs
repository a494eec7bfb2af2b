//! `--check-device`: what a device computes beside the CPU, as a table with a verdict.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use candle_core::{DType, Device};
use sd_upscale::check::{self, Finding};
use sd_upscale::device::{self, DeviceChoice};
use sd_upscale::kernels::cpu::Isa;
use serde_json::json;

use crate::json_lines;

/// Checks each device of the choice and prints what was found: a table, or with `json` a line of JSON a finding.
///
/// # Errors
/// A device cannot be had, or the output is closed.
pub fn check(choice: &DeviceChoice, json: bool) -> Result<ExitCode> {
    let (devices, note) = device::open(choice)?;
    if let Some(note) = note {
        writeln!(std::io::stderr(), "warning: {note}")?;
    }
    let mut wrong = 0;
    for device in &devices {
        wrong += check_one(device, json)?;
    }
    Ok(ExitCode::from(u8::from(wrong > 0)))
}

/// How many findings are wrong or could not be had.
fn check_one(device: &Device, json: bool) -> Result<usize> {
    let name = device::name(device);
    let print = |line: &str| -> Result<()> {
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "{line}").context("cannot write what was found")?;
        stdout.flush().context("cannot write what was found")
    };
    if !json {
        print(&format!("{name}, sd-upscale {}", env!("CARGO_PKG_VERSION")))?;
        for line in about(device)? {
            print(&line)?;
        }
        print(&format!(
            "     {:<58} {:>8} {:>8} {:>10}",
            "", "error", "allowed", "time"
        ))?;
    }
    let (mut checked, mut untried, mut wrong) = (0, 0, Vec::new());
    check::whole_device(device, &mut |finding| {
        checked += 1;
        untried += usize::from(finding.lacked_memory);
        if finding.wrong() {
            wrong.push(format!("{} {}", precision(finding.dtype), finding.what));
        }
        print(&if json {
            in_json(&name, finding)
        } else {
            in_words(finding)
        })
    })?;
    if !json {
        print(&match (wrong.len(), untried) {
            (0, 0) => format!("{name} is right: all {checked} results are those of the CPU"),
            (0, untried) => format!(
                "{name} is right as far as its memory goes: {untried} of {checked} were not tried; free some"
            ),
            (count, _) => format!(
                "{name} is wrong in {count} of {checked}: {}; use --device cpu, and please report this table",
                wrong.join("; ")
            ),
        })?;
    }
    Ok(wrong.len() + untried)
}

fn about(device: &Device) -> Result<Vec<String>> {
    match device {
        Device::Cpu => {
            let kernels = Isa::current();
            Ok(vec![format!(
                "{kernels:?} kernels, beside candle's operations"
            )])
        }
        card => device::description(card),
    }
}

fn precision(dtype: DType) -> &'static str {
    dtype.as_str()
}

fn in_words(finding: &Finding) -> String {
    let verdict = match finding {
        finding if finding.passed() => "ok",
        finding if finding.wrong() => "WRONG",
        _ => "not tried",
    };
    let start = format!("{:<4} {:<58}", precision(finding.dtype), finding.what);
    let error = match &finding.error {
        Err(error) => return format!("{start} {verdict}: {error}"),
        Ok(error) => error,
    };
    let milliseconds = finding.seconds * 1e3;
    format!(
        "{start} {error:>8.1e} {:>8.1e} {milliseconds:>7.3} ms {:>12}  {verdict}",
        finding.allowed,
        rate(finding)
    )
}

/// Operations or bytes a second, whichever the layer is bound by.
fn rate(finding: &Finding) -> String {
    let per_second = |amount: f64| amount / finding.seconds;
    if finding.operations > 0.0 {
        format!("{:.2} TFLOP/s", per_second(finding.operations) / 1e12)
    } else if finding.bytes > 0.0 {
        format!("{:.0} GB/s", per_second(finding.bytes) / 1e9)
    } else {
        String::new()
    }
}

fn in_json(device: &str, finding: &Finding) -> String {
    json_lines::line(&json!({
        "device": device,
        "layer": finding.what,
        "dtype": precision(finding.dtype),
        // Infinite where a number is missing, which JSON has no word for.
        "error": finding.error.as_ref().ok().filter(|error| error.is_finite()),
        "failure": finding.error.as_ref().err(),
        "allowed": finding.allowed,
        "seconds": finding.seconds,
        "operations": finding.operations,
        "bytes": finding.bytes,
        "ok": finding.passed(),
    }))
}
