//! A picture's lines -> PNG: what a file says of itself by the `png` crate, the lines by ourselves. That crate's stream writer
//! ends the compressed data in two ways at once, and cuts it into chunks of a size that is fixed before.

use std::io::{self, Seek, SeekFrom, Write};

use anyhow::Result;
use flate2::write::ZlibEncoder;
use flate2::{Compression, Crc};
use png::text_metadata::{ITXtChunk, TEXtChunk};

use super::rows::{NextLines, Outline, Rows};
use super::{Depth, Format, PIECE};
use crate::metadata::{Density, StatedColor, TextGoes, XMP_KEY};

/// Bytes of the chunk that ends a file.
const END: usize = 12;

/// Writes a file of 1 to 4 channels of 8 or 16 bits.
///
/// # Errors
/// Those of `out` and `next`.
pub(super) fn encode(
    outline: &Outline,
    next: NextLines,
    out: &mut (impl Write + Seek),
) -> Result<()> {
    let frame = frame(outline)?;
    let (head, end) = frame.split_at(frame.len() - END);
    out.write_all(head)?;
    let mut data = ZlibEncoder::new(Data::new(out), Compression::default());
    let channels = outline.channels(Format::Png);
    match outline.depth {
        Depth::Eight => {
            let mut rows = Rows::<u8>::new(outline, Format::Png, next)?;
            let mut filter = Filter::new(rows.length(), channels);
            for top in (0..outline.height).step_by(PIECE) {
                let piece = rows.take(PIECE.min(outline.height - top))?;
                filter.write(piece, &mut data)?;
            }
        }
        Depth::Sixteen => {
            let mut rows = Rows::<u16>::new(outline, Format::Png, next)?;
            let mut filter = Filter::new(2 * rows.length(), 2 * channels);
            for top in (0..outline.height).step_by(PIECE) {
                let piece = rows.take(PIECE.min(outline.height - top))?;
                let piece: Vec<u8> = piece.iter().flat_map(|v| v.to_be_bytes()).collect();
                filter.write(&piece, &mut data)?;
            }
        }
    }
    data.finish()?.finish()?;
    out.write_all(end)?;
    Ok(())
}

/// All of a file but its lines: what stands before them, and the chunk that ends it, which the writer adds as it is dropped.
fn frame(outline: &Outline) -> Result<Vec<u8>> {
    let metadata = &outline.metadata;
    let (width, height) = (outline.width, outline.height);
    let mut info = png::Info::with_size(width as u32, height as u32);
    info.icc_profile = metadata.icc_for(outline.gray).map(Into::into);
    info.exif_metadata = metadata
        .exif_for(width, height, TextGoes::Elsewhere)
        .map(Into::into);
    info.pixel_dims = metadata.density.map(Density::to_png);
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::with_info(&mut bytes, info)?;
    encoder.set_color(match outline.channels(Format::Png) {
        1 => png::ColorType::Grayscale,
        2 => png::ColorType::GrayscaleAlpha,
        3 => png::ColorType::Rgb,
        _ => png::ColorType::Rgba,
    });
    encoder.set_depth(match outline.depth {
        Depth::Eight => png::BitDepth::Eight,
        Depth::Sixteen => png::BitDepth::Sixteen,
    });
    let mut writer = encoder.write_header()?;
    for (name, data) in metadata.color.iter().flat_map(StatedColor::chunks) {
        writer.write_chunk(png::chunk::ChunkType(name), &data)?;
    }
    for (key, text) in &metadata.text {
        // Latin-1 where that is enough, which every reader knows; a key that PNG does not allow is left out.
        if text.chars().all(|c| u32::from(c) < 256) {
            writer.write_text_chunk(&TEXtChunk::new(key, text)).ok();
        } else {
            writer.write_text_chunk(&ITXtChunk::new(key, text)).ok();
        }
    }
    if let Some(xmp) = metadata
        .xmp_upright()
        .and_then(|xmp| String::from_utf8(xmp).ok())
    {
        writer.write_text_chunk(&ITXtChunk::new(XMP_KEY, xmp))?;
    }
    drop(writer);
    Ok(bytes)
}

/// The chunk of the compressed lines: its length and its checksum are known when all has been written.
struct Data<'a, W: Write + Seek> {
    out: &'a mut W,
    /// Of what was written.
    length: u32,
    crc: Crc,
}

const NAME: &[u8; 4] = b"IDAT";
/// What a chunk may hold.
const MOST: u32 = i32::MAX as u32;

impl<'a, W: Write + Seek> Data<'a, W> {
    fn new(out: &'a mut W) -> Self {
        Self {
            out,
            length: 0,
            crc: Crc::new(),
        }
    }

    /// Leaves room for the length.
    fn begin(&mut self) -> io::Result<()> {
        self.crc = Crc::new();
        self.crc.update(NAME);
        self.out.write_all(&[0; 4])?;
        self.out.write_all(NAME)
    }

    /// Writes the checksum, and the length to its place.
    fn finish(&mut self) -> io::Result<()> {
        self.out.write_all(&self.crc.sum().to_be_bytes())?;
        let (before, after) = (i64::from(self.length) + 12, i64::from(self.length) + 8);
        self.out.seek(SeekFrom::Current(-before))?;
        self.out.write_all(&self.length.to_be_bytes())?;
        self.out.seek(SeekFrom::Current(after))?;
        self.length = 0;
        Ok(())
    }
}

impl<W: Write + Seek> Write for Data<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.length == MOST {
            self.finish()?;
        }
        if self.length == 0 {
            self.begin()?;
        }
        let taken = bytes.len().min((MOST - self.length) as usize);
        self.out.write_all(&bytes[..taken])?;
        self.crc.update(&bytes[..taken]);
        self.length += taken as u32;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// PNG's filters: each line is written as what is left of it beside its neighbours, by the filter that leaves least.
struct Filter {
    /// Bytes of a pixel.
    pixel: usize,
    /// The line before, of zeros before the first.
    above: Vec<u8>,
    /// The line by the filter that is tried, and by the best so far; each led by the filter's number.
    tried: Vec<u8>,
    best: Vec<u8>,
}

/// The filters but 0, which leaves a line as it is, in the order in which they are tried: of equals the last is taken.
const FILTERS: [(u8, Filtered); 4] = [(2, up), (1, sub), (3, average), (4, paeth)];

/// Fills the first with what is left of a line: itself, the line above, bytes of a pixel.
type Filtered = fn(&mut [u8], &[u8], &[u8], usize);

impl Filter {
    /// For lines of `length` bytes.
    fn new(length: usize, pixel: usize) -> Self {
        Self {
            pixel,
            above: vec![0; length],
            tried: vec![0; length + 1],
            best: vec![0; length + 1],
        }
    }

    fn write(&mut self, lines: &[u8], out: &mut impl Write) -> io::Result<()> {
        for line in lines.chunks_exact(self.above.len()) {
            let mut least = u64::MAX;
            for (number, filtered) in FILTERS {
                self.tried[0] = number;
                filtered(&mut self.tried[1..], line, &self.above, self.pixel);
                let cost = cost(&self.tried[1..]);
                if cost <= least {
                    least = cost;
                    std::mem::swap(&mut self.tried, &mut self.best);
                }
                if cost == 0 {
                    break;
                }
            }
            out.write_all(&self.best)?;
            self.above.copy_from_slice(line);
        }
        Ok(())
    }
}

/// How far bytes are from 0, as signed ones, in all: what libpng judges filters by.
fn cost(bytes: &[u8]) -> u64 {
    let sum = |run: &[u8]| -> u32 {
        run.iter()
            .map(|&byte| u32::from(byte.cast_signed().unsigned_abs()))
            .sum()
    };
    // Short runs, whose sums fit into 32 bits and are taken many at a time.
    bytes.chunks(1 << 12).map(|run| u64::from(sum(run))).sum()
}

fn sub(out: &mut [u8], line: &[u8], _: &[u8], pixel: usize) {
    out[..pixel].copy_from_slice(&line[..pixel]);
    let left = &line[..line.len() - pixel];
    for ((out, &x), &a) in out[pixel..].iter_mut().zip(&line[pixel..]).zip(left) {
        *out = x.wrapping_sub(a);
    }
}

fn up(out: &mut [u8], line: &[u8], above: &[u8], _: usize) {
    for ((out, &x), &b) in out.iter_mut().zip(line).zip(above) {
        *out = x.wrapping_sub(b);
    }
}

fn average(out: &mut [u8], line: &[u8], above: &[u8], pixel: usize) {
    let rest = line.len() - pixel;
    for ((out, &x), &b) in out[..pixel].iter_mut().zip(line).zip(above) {
        *out = x.wrapping_sub(b / 2);
    }
    let neighbours = line[..rest].iter().zip(&above[pixel..]);
    for ((out, &x), (&a, &b)) in out[pixel..].iter_mut().zip(&line[pixel..]).zip(neighbours) {
        // (a + b) / 2 within a byte.
        *out = x.wrapping_sub((a & b) + ((a ^ b) >> 1));
    }
}

fn paeth(out: &mut [u8], line: &[u8], above: &[u8], pixel: usize) {
    let rest = line.len() - pixel;
    for ((out, &x), &b) in out[..pixel].iter_mut().zip(line).zip(above) {
        *out = x.wrapping_sub(b);
    }
    let neighbours = line[..rest].iter().zip(&above[pixel..]).zip(&above[..rest]);
    for ((out, &x), ((&a, &b), &c)) in out[pixel..].iter_mut().zip(&line[pixel..]).zip(neighbours) {
        *out = x.wrapping_sub(nearest(a, b, c));
    }
}

/// Of the left, the upper and the upper left neighbour the one that is nearest to a + b - c.
fn nearest(a: u8, b: u8, c: u8) -> u8 {
    let [wide_a, wide_b, wide_c] = [a, b, c].map(i16::from);
    let to_a = (wide_b - wide_c).abs();
    let to_b = (wide_a - wide_c).abs();
    let to_c = (wide_a + wide_b - 2 * wide_c).abs();
    if to_a <= to_b && to_a <= to_c {
        a
    } else if to_b <= to_c {
        b
    } else {
        c
    }
}
