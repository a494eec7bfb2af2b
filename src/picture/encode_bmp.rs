//! A picture's lines -> BMP: uncompressed, from the bottom line up.

use std::io::{Seek, SeekFrom, Write};

use anyhow::{Context, Result};

use super::rows::{NextLines, Outline, Rows};
use super::{Format, PIECE};

/// Bytes of the two headers.
const FILE_HEADER: u32 = 14;
const INFO_HEADER: u32 = 40;
/// Bytes of a colour of the palette.
const COLOR: u32 = 4;

/// Writes a file of 8-bit grey (with a palette of 256 greys) or RGB.
///
/// # Errors
/// It is too large for the format, or those of `out` and `next`.
pub(super) fn encode(
    outline: &Outline,
    next: NextLines,
    out: &mut (impl Write + Seek),
) -> Result<()> {
    let channels = outline.channels(Format::Bmp);
    let layout = Layout::of(outline, channels)
        .context("it is larger than the 4 GB that a BMP file can hold")?;
    let mut head = layout.head(outline);
    if let Some(density) = outline.metadata.density {
        density.into_bmp(&mut head);
    }
    if channels == 1 {
        head.extend((0..=255).flat_map(|gray: u8| [gray, gray, gray, 0]));
    }
    out.write_all(&head)?;
    let mut rows = Rows::<u8>::new(outline, Format::Bmp, next)?;
    let length = rows.length();
    let mut left = outline.height;
    while left > 0 {
        let lines = PIECE.min(left);
        left -= lines;
        // The last of them lies first.
        let mut block = Vec::with_capacity(lines * layout.line as usize);
        for line in rows.take(lines)?.chunks_exact(length).rev() {
            block.extend_from_slice(line);
            if channels == 3 {
                let at = block.len() - length;
                block[at..].chunks_exact_mut(3).for_each(<[u8]>::reverse);
            }
            block.resize(block.len().next_multiple_of(4), 0);
        }
        let at = u64::from(layout.pixels) + left as u64 * u64::from(layout.line);
        out.seek(SeekFrom::Start(at))?;
        out.write_all(&block)?;
    }
    Ok(())
}

/// Where things lie in the file, in bytes.
struct Layout {
    colors: u32,
    /// A line, padded.
    line: u32,
    /// Where the lines begin.
    pixels: u32,
    /// All of the lines.
    image: u32,
    file: u32,
}

impl Layout {
    /// None where a number does not fit.
    fn of(outline: &Outline, channels: usize) -> Option<Self> {
        let colors = if channels == 1 { 256 } else { 0 };
        let pixels = FILE_HEADER + INFO_HEADER + COLOR * colors;
        let line = outline.width.checked_mul(channels)?;
        let line = u32::try_from(line.checked_next_multiple_of(4)?).ok()?;
        let image = line.checked_mul(u32::try_from(outline.height).ok()?)?;
        Some(Self {
            colors,
            line,
            pixels,
            image,
            file: pixels.checked_add(image)?,
        })
    }

    /// Both headers. The density is left open.
    fn head(&self, outline: &Outline) -> Vec<u8> {
        let bits: u16 = if self.colors > 0 { 8 } else { 24 };
        let mut head = b"BM".to_vec();
        let mut put = |number: u32| head.extend(number.to_le_bytes());
        put(self.file);
        put(0); // reserved
        put(self.pixels);
        put(INFO_HEADER);
        put(outline.width as u32);
        put(outline.height as u32);
        put(1 | u32::from(bits) << 16); // planes, and bits of a pixel
        put(0); // not compressed
        put(self.image);
        put(0); // pixels a metre, across and down
        put(0);
        put(self.colors);
        put(0); // all colours matter
        head
    }
}
