//! The first use of a card: our layers are tried on it in small, once for each card, driver, library and version of this
//! program, so that nobody gets a wrong picture from kernels that never met his card.

use std::path::PathBuf;

use anyhow::Result;
use candle_core::Device;
use sd_upscale::check::{self, Finding};
use sd_upscale::device::{self, Placement};
use sd_upscale::{Upscaler, files};

/// Tries our layers on the device, unless an earlier run found them right, and has `upscaler` do without them where they
/// are wrong. What is to be said of it is the result.
///
/// # Errors
/// The CPU's own results cannot be had.
pub fn try_layers(upscaler: &mut Upscaler, device: &Device) -> Result<Option<String>> {
    if device.is_cpu() {
        return Ok(None);
    }
    let known = Known::of(device);
    if known.is_right() {
        return Ok(None);
    }
    if !device::computes(device)? {
        return Ok(Some(format!(
            "{} says that 0 + 1 is not 1: what comes of it is no picture; use --device cpu",
            device::name(device)
        )));
    }
    let findings = check::short(device, Placement::new)?;
    let wrong: Vec<&Finding> = findings.iter().filter(|finding| finding.wrong()).collect();
    if wrong.is_empty() {
        // A layer that there was no memory for is tried at the next run.
        if findings.iter().all(Finding::passed) {
            known.keep();
        }
        return Ok(None);
    }
    let stock = check::short(device, Placement::stock)?;
    let mended = |wrong: &&Finding| {
        let mut same = stock.iter().filter(|stock| named(stock) == named(wrong));
        same.all(Finding::passed)
    };
    let (name, ask) = (
        device::name(device),
        "please report what --check-device shows",
    );
    let found = format!(
        "{name} does not compute what the CPU does in {}",
        first(&wrong)
    );
    Ok(Some(if wrong.iter().all(mended) {
        upscaler.use_stock_operations();
        format!("{found}: candle's own operations are used, which are slower; {ask}")
    } else {
        format!(
            "{found}, nor with candle's own operations: pictures may be wrong; use --device cpu, and {ask}"
        )
    }))
}

fn named(finding: &Finding) -> String {
    format!("{} in {}", finding.what, finding.dtype.as_str())
}

/// The first of them, and how many more there are.
fn first(wrong: &[&Finding]) -> String {
    const MOST: usize = 3;
    let names: Vec<String> = wrong
        .iter()
        .take(MOST)
        .map(|finding| named(finding))
        .collect();
    match wrong.len().saturating_sub(MOST) {
        0 => names.join("; "),
        more => format!("{}; and {more} more", names.join("; ")),
    }
}

/// A file in the user's cache folder whose name says what was found right.
struct Known(Option<PathBuf>);

impl Known {
    /// None where the system has no such folder or the driver does not tell its version: it is tried each time then.
    fn of(device: &Device) -> Self {
        let file = || {
            let mut parts = vec![env!("CARGO_PKG_VERSION").to_owned(), device::name(device)];
            parts.extend(device::description(device).ok()?);
            let name: String = parts
                .join(" ")
                .chars()
                .map(|c| {
                    if c.is_ascii_alphanumeric() || c == '.' {
                        c
                    } else {
                        '-'
                    }
                })
                .collect();
            Some(
                dirs::cache_dir()?
                    .join("sd-upscale")
                    .join("checked")
                    .join(name),
            )
        };
        Self(file())
    }

    fn is_right(&self) -> bool {
        self.0.as_ref().is_some_and(|path| path.is_file())
    }

    /// Where it cannot be written, the card is tried again at the next run.
    fn keep(&self) {
        if let Some(path) = &self.0
            && let Some(folder) = path.parent()
            && std::fs::create_dir_all(folder).is_ok()
        {
            let _ = files::write(path, b"");
        }
    }
}
