//! `--list-devices`: what there is to compute on, with its memory, and why there is no CUDA where there is none.

use std::io::Write;
use std::thread::available_parallelism;

use anyhow::{Context, Result};
use candle_core::Device;
use sd_upscale::device;
use sd_upscale::kernels::cpu::Isa;
use serde_json::json;

use crate::json_lines;
use crate::version;

/// Prints the devices, the CPU first: two columns, or with `json` a line of JSON each.
///
/// # Errors
/// Standard output is closed.
pub fn print(json: bool) -> Result<()> {
    let devices = device::all();
    // As `auto` does: the first card, if it can be had.
    let chosen = usize::from(devices.get(1).is_some_and(|(_, card)| card.is_ok()));
    let mut stdout = std::io::stdout().lock();
    for (number, (name, device)) in devices.iter().enumerate() {
        let auto = number == chosen;
        let line = if json {
            in_json(name, device, auto)
        } else {
            in_words(name, device, auto)
        };
        writeln!(stdout, "{line}").context("cannot write the list of devices")?;
    }
    stdout.flush().context("cannot write the list of devices")
}

fn in_words(name: &str, device: &Result<Device>, auto: bool) -> String {
    let what = match device {
        Ok(device) => {
            let about = [Some(hardware(device)), memory(device)];
            about.into_iter().flatten().collect::<Vec<_>>().join("; ")
        }
        Err(error) => format!("not to be had: {error:#}"),
    };
    let auto = if auto { " (what auto takes)" } else { "" };
    format!("{name:<8} {what}{auto}")
}

/// "Some Processor, 2 threads, avx2 kernels", or a card's name and what drives it.
fn hardware(device: &Device) -> String {
    let facts = match device {
        Device::Cpu => {
            let threads = available_parallelism().map_or(1, usize::from);
            let kernels = version::name(Isa::current());
            vec![format!("{threads} threads, {kernels} kernels")]
        }
        // A card that does not tell is listed all the same.
        card => device::description(card).unwrap_or_default(),
    };
    let all: Vec<String> = device::hardware_name(device)
        .into_iter()
        .chain(facts)
        .collect();
    all.join(", ")
}

fn memory(device: &Device) -> Option<String> {
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    let total = device::total_memory(device)?;
    let free = device::free_memory(device)?;
    Some(format!(
        "{:.1} GB, {:.1} GB free",
        gigabytes(total),
        gigabytes(free)
    ))
}

fn in_json(name: &str, device: &Result<Device>, auto: bool) -> String {
    let found = device.as_ref().ok();
    json_lines::line(&json!({
        "device": name,
        "name": found.and_then(device::hardware_name),
        "total_memory": found.and_then(device::total_memory),
        "free_memory": found.and_then(device::free_memory),
        "auto": auto,
        "error": device.as_ref().err().map(|error| format!("{error:#}")),
    }))
}
