//! NumPy's `.npz` (a zip of `.npy` arrays) as far as cached latents need it: kohya's sd-scripts keep one
//! `latents` or `latents_HxW` of [4, h, w] among sizes and crops.

use std::io::{Cursor, Read};

use anyhow::{Context, Result, bail, ensure};
use half::f16;
use zip::ZipArchive;

use super::{LatentKind, Latents};
use crate::limits::ReadLimits;

impl Latents {
    /// Reads the latents of an `.npz`: `latents`, else the largest `latents_HxW`, else the only array.
    ///
    /// # Errors
    /// It is damaged, holds no latents, or is beyond `limits`.
    pub fn from_npz(bytes: &[u8], limits: &ReadLimits) -> Result<Self> {
        let mut zip = ZipArchive::new(Cursor::new(bytes))
            .context("its zip directory cannot be read: it was cut short, or is no .npz")?;
        let entries = zip.file_names().map(|n| Ok(n?.into_owned()));
        let entries: Vec<String> = entries
            .collect::<Result<_>>()
            .context("its zip directory is damaged")?;
        if entries.iter().any(|n| n.ends_with("data.pkl")) {
            bail!("it is a PyTorch file, which is not supported; save the latents as safetensors");
        }
        let mut arrays: Vec<&str> = entries
            .iter()
            .filter_map(|n| n.strip_suffix(".npy"))
            .collect();
        arrays.sort_unstable();
        let sized = arrays.iter().filter_map(|n| Some((area_of(n)?, *n)));
        let (name, kind) = if arrays.contains(&"latents") {
            ("latents", LatentKind::SdScripts)
        } else if let Some((_, name)) = sized.max() {
            (name, LatentKind::SdScripts)
        } else if let [only] = arrays[..] {
            (only, LatentKind::Unstated)
        } else {
            bail!(
                "its arrays ({}) hold no latents; expected `latents` or `latents_HxW`",
                if arrays.is_empty() {
                    "none".into()
                } else {
                    arrays.join(", ")
                }
            )
        };
        let others = arrays
            .iter()
            .filter(|n| area_of(n).is_some() && **n != name)
            .count();

        // 8 bytes a value, 4 values for 64 pixels, and a batch as large as memory may take.
        let most = limits.max_bytes();
        let entry = zip
            .by_name(&format!("{name}.npy"))
            .with_context(|| format!("its array `{name}` cannot be unpacked"))?;
        let mut npy = Vec::new();
        entry
            .take(most.saturating_add(1))
            .read_to_end(&mut npy)
            .with_context(|| format!("its array `{name}` cannot be unpacked"))?;
        ensure!(
            npy.len() as u64 <= most,
            "its array `{name}` unpacks to more than {most} bytes (--max-pixels raises the limit)"
        );
        let array = Npy::parse(&npy).with_context(|| format!("its array `{name}` is damaged"))?;
        let mut latents =
            Latents::from_array(name, &array.shape, kind, limits, || array.values(name))?;
        if others > 0 {
            let warning = format!(
                "it holds latents of {} sizes; the largest, `{name}`, is used",
                others + 1
            );
            latents.warnings.push(warning);
        }
        Ok(latents)
    }
}

/// h x w of `latents_HxW`.
fn area_of(name: &str) -> Option<u64> {
    let (h, w) = name.strip_prefix("latents_")?.split_once('x')?;
    h.parse::<u32>()
        .ok()
        .zip(w.parse::<u32>().ok())
        .map(|(h, w)| u64::from(h) * u64::from(w))
}

/// One array, as NumPy's format 1.0, 2.0 or 3.0 holds it.
struct Npy<'a> {
    /// Such as `<f4`: byte order, kind, bytes of a value.
    descr: String,
    fortran: bool,
    shape: Vec<usize>,
    data: &'a [u8],
}

impl<'a> Npy<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self> {
        ensure!(bytes.starts_with(b"\x93NUMPY"), "it has no .npy header");
        let length = |range: std::ops::Range<usize>| {
            let le = bytes.get(range).context("its header was cut short")?;
            Ok::<usize, anyhow::Error>(le.iter().rev().fold(0, |n, &b| n << 8 | usize::from(b)))
        };
        let start = match length(6..7)? {
            1 => 10,
            2 | 3 => 12,
            other => bail!("its .npy version {other} is not known"),
        };
        let end = start + length(8..start)?;
        let header = bytes.get(start..end).context("its header was cut short")?;
        let header = std::str::from_utf8(header).context("its header is no text")?;
        // A Python dict: {'descr': '<f4', 'fortran_order': False, 'shape': (4, 64, 64), }
        let after = |key: &str| {
            let found = header
                .split_once(key)
                .and_then(|(_, rest)| rest.split_once(':'));
            found
                .map(|(_, value)| value.trim_start())
                .with_context(|| format!("its header lacks {key}"))
        };
        let descr = after("'descr'")?
            .strip_prefix('\'')
            .and_then(|d| d.split_once('\''));
        let (descr, _) = descr.context("it is no plain array")?;
        let shape = after("'shape'")?
            .strip_prefix('(')
            .and_then(|s| s.split_once(')'));
        let (shape, _) = shape.context("its header has no shape")?;
        let sides = shape.split(',').map(str::trim).filter(|s| !s.is_empty());
        Ok(Self {
            descr: descr.to_owned(),
            fortran: after("'fortran_order'")?.starts_with("True"),
            shape: sides
                .map(str::parse)
                .collect::<Result<_, _>>()
                .context("its shape is no list of numbers")?,
            data: &bytes[end..],
        })
    }

    /// The values in C order.
    fn values(&self, name: &str) -> Result<Vec<f32>> {
        let (order, width) = (self.descr.get(..1), self.descr.get(1..));
        let size = match (order, width) {
            (Some("<" | ">"), Some("f2")) => 2,
            (Some("<" | ">"), Some("f4")) => 4,
            (Some("<" | ">"), Some("f8")) => 8,
            _ => bail!(
                "array `{name}` holds `{}` values; expected f2, f4 or f8",
                self.descr
            ),
        };
        let count = self
            .shape
            .iter()
            .try_fold(1usize, |n, &side| n.checked_mul(side));
        let bytes = count
            .and_then(|n| n.checked_mul(size))
            .context("its shape overflows")?;
        ensure!(
            self.data.len() == bytes,
            "array `{name}` of shape {:?} should have {bytes} bytes, but has {}",
            self.shape,
            self.data.len()
        );
        let swap = order == Some(">");
        let value = |chunk: &[u8]| {
            let mut le = [0; 8];
            le[..size].copy_from_slice(chunk);
            if swap {
                le[..size].reverse();
            }
            match size {
                2 => f16::from_le_bytes([le[0], le[1]]).to_f32(),
                4 => f32::from_le_bytes([le[0], le[1], le[2], le[3]]),
                _ => f64::from_le_bytes(le) as f32,
            }
        };
        let values: Vec<f32> = self.data.chunks_exact(size).map(value).collect();
        Ok(if self.fortran {
            to_c_order(&values, &self.shape)
        } else {
            values
        })
    }
}

/// Column-major to row-major.
fn to_c_order(values: &[f32], shape: &[usize]) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for mut index in 0..values.len() {
        // The C index's digits, last axis first, weighed with the Fortran strides.
        let mut stride = values.len();
        let mut at = 0;
        for &side in shape.iter().rev() {
            stride /= side;
            at += index % side * stride;
            index /= side;
        }
        out.push(values[at]);
    }
    out
}
