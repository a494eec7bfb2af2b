//! BMP: headers that `image` does not know, rewritten as ones that it does.

use std::borrow::Cow;

use anyhow::{Context, Result, bail, ensure};

use super::structure::le32;
use crate::limits::ReadLimits;

/// Bytes of the file header, of Windows 3's header, and of version 4's, which states four masks.
const FILE_HEADER: usize = 14;
const INFO: usize = 40;
const V4: usize = 108;
/// Values of the field `Compression`.
const BITFIELDS: u32 = 3;
const ALPHA_BITFIELDS: u32 = 6;

/// The file as it is, or with its header rewritten.
pub(super) fn with_known_header<'a>(bytes: &'a [u8], limits: &ReadLimits) -> Result<Cow<'a, [u8]>> {
    const SHORT: &str = "it ends within its header: the file was cut short";
    let header = le32(bytes, FILE_HEADER).context(SHORT)? as usize;
    if header < INFO && header != 16 {
        // OS/2's first, of 12 bytes.
        return Ok(Cow::Borrowed(bytes));
    }
    let field = |at: usize| le32(bytes, FILE_HEADER + at).context(SHORT);
    let (width, height) = (field(4)? as i32, field(8)? as i32);
    ensure!(
        width > 0 && height != 0,
        "its header states a size of {width}x{height} pixels"
    );
    limits.check_pixels(width as u64, u64::from(height.unsigned_abs()))?;
    // Of the fields after the first 16 bytes a short header of OS/2 leaves some out: they are 0.
    let stated = |at: usize| if at + 4 <= header { field(at) } else { Ok(0) };
    let (compression, colors) = (stated(16)?, stated(32)?);
    let bits = field(12)? >> 16;
    let palette = match bits {
        ..=8 if colors == 0 => 4 << bits,
        ..=8 => 4 * u64::from(colors),
        _ => 0,
    };
    let after = (FILE_HEADER + header) as u64;
    let begin = u64::from(le32(bytes, 10).context(SHORT)?);
    ensure!(
        begin >= after,
        "its header says that its pixels begin within its header: it is damaged"
    );
    ensure!(
        begin != after || palette == 0,
        "its header says that its pixels begin where its palette does: it is damaged"
    );
    let os2 = header == 16 || (header > INFO && header <= 64 && ![52, 56].contains(&header));
    if os2 && compression > 2 {
        bail!("its pixels are compressed as OS/2 did (Huffman or RLE24), which is not supported");
    }
    if os2 || (bits <= 8 && colors > 256) {
        return rewritten(bytes, header, colors.min(256));
    }
    if header == INFO && compression == ALPHA_BITFIELDS {
        return masks_inside(bytes);
    }
    Ok(Cow::Borrowed(bytes))
}

/// The same picture behind a header of Windows 3. The palette follows the old header, the pixels lie where the file header
/// says.
fn rewritten<'a>(bytes: &[u8], header: usize, colors: u32) -> Result<Cow<'a, [u8]>> {
    const SHORT: &str = "it ends within its palette: the file was cut short";
    let pixels = le32(bytes, 10).context(SHORT)? as usize;
    let palette = bytes.get(FILE_HEADER + header..pixels).context(SHORT)?;
    let kept = palette.len().min(4 * 256);
    let mut info = bytes
        .get(FILE_HEADER..FILE_HEADER + header.min(INFO))
        .context(SHORT)?
        .to_vec();
    info.resize(INFO, 0);
    info[..4].copy_from_slice(&(INFO as u32).to_le_bytes());
    info[32..36].copy_from_slice(&colors.to_le_bytes());
    Ok(Cow::Owned(joined(
        bytes,
        &info,
        &palette[..kept],
        &bytes[pixels..],
    )))
}

/// Masks that follow a header of Windows 3 (Windows CE's), in one of version 4.
fn masks_inside<'a>(bytes: &[u8]) -> Result<Cow<'a, [u8]>> {
    const SHORT: &str = "it ends within its colour masks: the file was cut short";
    let pixels = le32(bytes, 10).context(SHORT)? as usize;
    let mut info = bytes
        .get(FILE_HEADER..FILE_HEADER + INFO + 16)
        .context(SHORT)?
        .to_vec();
    info.resize(V4, 0);
    info[..4].copy_from_slice(&(V4 as u32).to_le_bytes());
    info[16..20].copy_from_slice(&BITFIELDS.to_le_bytes());
    Ok(Cow::Owned(joined(
        bytes,
        &info,
        &[],
        bytes.get(pixels..).context(SHORT)?,
    )))
}

fn joined(file: &[u8], info: &[u8], palette: &[u8], pixels: &[u8]) -> Vec<u8> {
    let offset = (FILE_HEADER + info.len() + palette.len()) as u32;
    [&file[..10], &offset.to_le_bytes(), info, palette, pixels].concat()
}
