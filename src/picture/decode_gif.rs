//! GIF: the first frame alone, so that nothing that follows it can spoil it.

use anyhow::{Result, ensure};

use super::{structure, words};

/// A GIF of one frame.
pub(super) struct FirstFrame {
    pub bytes: Vec<u8>,
    pub warnings: Vec<String>,
}

pub(super) fn first_frame(bytes: &[u8]) -> Result<FirstFrame> {
    let map = structure::map_gif(bytes);
    ensure!(
        !map.frames.is_empty(),
        "it ends before its first frame is complete: the file was cut short"
    );
    let mut warnings = words::dropped_frames(map.frames.len());
    if !map.whole {
        warnings.push(words::DAMAGED_LATER.into());
    }
    let mut first = bytes[..map.header].to_vec();
    if let Some(control) = &map.control {
        first.extend_from_slice(&bytes[control.clone()]);
    }
    first.extend_from_slice(&bytes[map.frames[0].clone()]);
    first.push(0x3B);
    Ok(FirstFrame {
        bytes: first,
        warnings,
    })
}
