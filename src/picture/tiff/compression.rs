//! One strip or tile of a TIFF file, as its samples lie when nothing is compressed.

use std::io::Read;

use anyhow::{Context, Result, bail, ensure};
use flate2::read::ZlibDecoder;
use hayro_ccitt::{DecodeSettings, DecoderContext, EncodingMode};
use weezl::decode::Configuration;
use weezl::{BitOrder, LzwStatus};
use zune_core::bytestream::ZCursor;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

const SHORT: &str =
    "it holds fewer pixels than its size says: the file was cut short or is damaged";

/// How the pixels are stored (the field `Compression`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    /// CCITT's run lengths, each row on a byte boundary.
    Runs,
    /// CCITT group 3; `two_dimensional` where a row may refer to the one before.
    Group3 {
        two_dimensional: bool,
    },
    Group4,
    Lzw,
    OldJpeg,
    Jpeg,
    Deflate,
    PackBits,
}

impl Compression {
    /// From the fields `Compression` and `T4Options`. Errors name a kind that is not read.
    pub fn new(number: u64, t4_options: u64) -> Result<Self> {
        Ok(match number {
            1 => Self::None,
            2 => Self::Runs,
            3 => Self::Group3 {
                two_dimensional: t4_options & 1 != 0,
            },
            4 => Self::Group4,
            5 => Self::Lzw,
            6 => Self::OldJpeg,
            7 => Self::Jpeg,
            8 | 32946 => Self::Deflate,
            32773 => Self::PackBits,
            other => {
                let name = match other {
                    32809 => "ThunderScan",
                    34676 | 34677 => "SGI's LogLuv",
                    34712 => "JPEG 2000",
                    34887 => "LERC",
                    34892 => "lossy JPEG of a raw photo",
                    34925 => "LZMA",
                    50000 => "Zstandard",
                    50001 => "WebP",
                    50002 | 52546 => "JPEG XL",
                    _ => bail!(
                        "its compression has the unknown number {other}; save it again as TIFF with LZW or Deflate, or as PNG"
                    ),
                };
                bail!(
                    "its pixels are compressed with {name}, which is not supported; save it again as TIFF with LZW or Deflate, or as PNG"
                )
            }
        })
    }
}

/// Rows of equal length, packed.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    /// In pixels; a row of CCITT's kinds has as many bits.
    pub width: usize,
    pub height: usize,
    pub row_bytes: usize,
}

/// Unpacks to exactly `rows.height * rows.row_bytes` bytes; JPEG has [`jpeg`].
pub(super) fn unpack(kind: Compression, data: &[u8], rows: Rows) -> Result<Vec<u8>> {
    let length = rows.height * rows.row_bytes;
    let unpacked = match kind {
        Compression::None => data.get(..length).context(SHORT)?.to_vec(),
        Compression::Lzw => lzw(data, length)?,
        Compression::Deflate => {
            let mut out = Vec::new();
            let read = ZlibDecoder::new(data)
                .take(length as u64)
                .read_to_end(&mut out);
            read.ok()
                .filter(|_| out.len() == length)
                .context("its Deflate data is damaged")?;
            out
        }
        Compression::PackBits => pack_bits(data, length)?,
        Compression::Runs => ccitt(data, rows, EncodingMode::Group3_1D, true)?,
        Compression::Group3 { two_dimensional } => {
            let mode = if two_dimensional {
                EncodingMode::Group3_2D { k: 4 }
            } else {
                EncodingMode::Group3_1D
            };
            // Where ends of lines are on byte boundaries, zeros before them are skipped in any case.
            ccitt(data, rows, mode, false)?
        }
        Compression::Group4 => ccitt(data, rows, EncodingMode::Group4, false)?,
        Compression::Jpeg | Compression::OldJpeg => {
            bail!("its JPEG data is not where it should be")
        }
    };
    ensure!(unpacked.len() == length, SHORT);
    Ok(unpacked)
}

fn lzw(data: &[u8], length: usize) -> Result<Vec<u8>> {
    // Programs before TIFF 6.0 wrote the bits of a code from the low end on; libtiff tells them by their first code too.
    let old = data.len() > 1 && data[0] == 0 && data[1] & 1 == 1;
    let configuration = if old {
        Configuration::new(BitOrder::Lsb, 8)
    } else {
        Configuration::with_tiff_size_switch(BitOrder::Msb, 8)
    };
    let mut decoder = configuration.with_yield_on_full_buffer(true).build();
    let mut out = vec![0; length];
    let (mut read, mut written) = (0, 0);
    while written < length {
        let step = decoder.decode_bytes(&data[read..], &mut out[written..]);
        read += step.consumed_in;
        written += step.consumed_out;
        match step.status {
            Ok(LzwStatus::Ok) if step.consumed_in + step.consumed_out > 0 => {}
            _ => break,
        }
    }
    ensure!(
        written == length,
        "its LZW data is damaged or was cut short"
    );
    Ok(out)
}

fn pack_bits(mut data: &[u8], length: usize) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(length);
    while out.len() < length {
        let (&head, rest) = data.split_first().context(SHORT)?;
        match head {
            0..=127 => {
                let run = rest.get(..usize::from(head) + 1).context(SHORT)?;
                out.extend_from_slice(run);
                data = &rest[run.len()..];
            }
            128 => data = rest,
            129.. => {
                let (&value, rest) = rest.split_first().context(SHORT)?;
                out.resize(out.len() + 257 - usize::from(head), value);
                data = rest;
            }
        }
    }
    out.truncate(length);
    Ok(out)
}

fn ccitt(
    data: &[u8],
    rows: Rows,
    encoding: EncodingMode,
    rows_are_byte_aligned: bool,
) -> Result<Vec<u8>> {
    let settings = DecodeSettings {
        columns: u32::try_from(rows.width)?,
        rows: u32::try_from(rows.height)?,
        end_of_block: true,
        end_of_line: false,
        rows_are_byte_aligned,
        encoding,
        invert_black: false,
    };
    let mut bits = Bits {
        out: Vec::with_capacity(rows.height * rows.row_bytes),
        row_bytes: rows.row_bytes,
        line: Vec::new(),
        last: 0,
        filled: 0,
    };
    let done = hayro_ccitt::decode(data, &mut bits, &mut DecoderContext::new(settings));
    let whole = rows.height * rows.row_bytes;
    if done.is_err() && bits.out.len() < whole {
        // Each of two decoders of group 4 reads files that the other does not.
        let other = (encoding == EncodingMode::Group4)
            .then(|| group4(data, rows))
            .flatten();
        return other.context("its fax (CCITT) data is damaged");
    }
    // White rows at the end may be left out.
    bits.out.resize(rows.height * rows.row_bytes, 0);
    Ok(bits.out)
}

fn group4(data: &[u8], rows: Rows) -> Option<Vec<u8>> {
    let (width, height) = (
        u16::try_from(rows.width).ok()?,
        u16::try_from(rows.height).ok()?,
    );
    let mut out = Vec::with_capacity(rows.height * rows.row_bytes);
    fax::decoder::decode_g4(data.iter().copied(), width, Some(height), |line| {
        let mut row = vec![0; rows.row_bytes];
        for (x, _) in fax::decoder::pels(line, width)
            .enumerate()
            .filter(|(_, color)| *color == fax::Color::Black)
        {
            row[x / 8] |= 0x80 >> (x % 8);
        }
        out.append(&mut row);
    })?;
    Some(out)
}

/// Collects bits, black as 1, from the high end on; rows begin on bytes.
struct Bits {
    out: Vec<u8>,
    row_bytes: usize,
    line: Vec<u8>,
    last: u8,
    filled: u8,
}

impl hayro_ccitt::Decoder for Bits {
    fn push_pixel(&mut self, white: bool) {
        self.last = self.last << 1 | u8::from(!white);
        self.filled += 1;
        if self.filled == 8 {
            self.line.push(self.last);
            (self.last, self.filled) = (0, 0);
        }
    }

    fn push_pixel_chunk(&mut self, white: bool, chunk_count: u32) {
        let value = if white { 0 } else { 0xFF };
        let most = self.row_bytes.saturating_sub(self.line.len());
        self.line
            .resize(self.line.len() + most.min(chunk_count as usize), value);
    }

    fn next_line(&mut self) {
        if self.filled > 0 {
            self.line.push(self.last << (8 - self.filled));
            (self.last, self.filled) = (0, 0);
        }
        self.line.resize(self.row_bytes, 0);
        self.out.append(&mut self.line);
    }
}

/// A JPEG inside the TIFF, its components as they are stored: (height, width, components).
pub(super) struct JpegPart {
    pub width: usize,
    pub height: usize,
    pub components: usize,
    pub samples: Vec<u8>,
}

/// Decodes a JPEG stream; `tables` is what it shares with the others of the file (the field `JPEGTables`).
pub(super) fn jpeg(tables: Option<&[u8]>, data: &[u8], most_bytes: usize) -> Result<JpegPart> {
    let joined;
    let stream = match tables {
        Some(tables) if tables.len() > 4 && data.len() > 2 => {
            let end = if tables.ends_with(&[0xFF, 0xD9]) {
                tables.len() - 2
            } else {
                tables.len()
            };
            joined = [&tables[..end], &data[2..]].concat();
            &joined[..]
        }
        _ => data,
    };
    let words = |error: zune_jpeg::errors::DecodeErrors| {
        anyhow::anyhow!("its JPEG data: {}", crate::picture::words::of_jpeg(&error))
    };
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(usize::MAX)
        .set_max_height(usize::MAX);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(stream), options);
    decoder.decode_headers().map_err(words)?;
    let stored = decoder
        .input_colorspace()
        .context("its JPEG data has no colours")?;
    decoder.set_options(options.jpeg_set_out_colorspace(stored));
    let (width, height) = decoder.dimensions().context("its JPEG data has no size")?;
    let components = stored.num_components();
    ensure!(
        width.saturating_mul(height).saturating_mul(components) <= most_bytes,
        "its JPEG data is larger than the picture"
    );
    let samples = decoder.decode().map_err(words)?;
    ensure!(samples.len() == width * height * components, SHORT);
    Ok(JpegPart {
        width,
        height,
        components,
        samples,
    })
}
