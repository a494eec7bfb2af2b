//! TIFF: the first page of a file, in whatever layout, depth, compression and colour it is stored. `tiff`, which reads
//! for the `image` crate, refuses or misreads many that people have: palettes, fax, planes in tiles, reversed bits,
//! chroma at half size, 10 to 14 bits, premultiplied alpha.

mod color;
mod compression;
mod directory;
mod samples;

use anyhow::{Context, Result, bail, ensure};
use image::DynamicImage;

use self::color::{Alpha, Meaning, YCbCr};
use self::compression::{Compression, Rows};
pub(crate) use self::directory::Directory;
use self::samples::{Kind, Level, Place, add_left, indices, join_planes, spread};
use crate::limits::ReadLimits;

/// Fields (TIFF 6.0).
const WIDTH: u16 = 256;
const HEIGHT: u16 = 257;
const BITS: u16 = 258;
const COMPRESSION: u16 = 259;
const PHOTOMETRIC: u16 = 262;
const FILL_ORDER: u16 = 266;
const STRIP_OFFSETS: u16 = 273;
pub(crate) const ORIENTATION: u16 = 274;
const SAMPLES: u16 = 277;
const ROWS_PER_STRIP: u16 = 278;
const STRIP_BYTES: u16 = 279;
const PLANAR: u16 = 284;
const T4_OPTIONS: u16 = 292;
const PREDICTOR: u16 = 317;
const COLOR_MAP: u16 = 320;
const TILE_WIDTH: u16 = 322;
const TILE_HEIGHT: u16 = 323;
const TILE_OFFSETS: u16 = 324;
const TILE_BYTES: u16 = 325;
const INK_SET: u16 = 332;
const EXTRA_SAMPLES: u16 = 338;
const SAMPLE_FORMAT: u16 = 339;
const JPEG_TABLES: u16 = 347;
const OLD_JPEG: u16 = 513;
const OLD_JPEG_BYTES: u16 = 514;
const YCBCR_COEFFICIENTS: u16 = 529;
const YCBCR_SUBSAMPLING: u16 = 530;
const REFERENCE_BLACK_WHITE: u16 = 532;

/// A page's pixels as stored (orientation not applied), and what their reader should be told.
pub(crate) struct Page {
    pub image: DynamicImage,
    pub warnings: Vec<String>,
}

/// Width and height as stored, in pixels.
pub(crate) fn dimensions(directory: &Directory) -> Result<(u32, u32)> {
    let side = |tag| {
        let stated = directory.number(tag)?;
        stated
            .and_then(|side| u32::try_from(side).ok())
            .context("it does not say how large it is: it is damaged")
    };
    Ok((side(WIDTH)?, side(HEIGHT)?))
}

/// Decodes the first page.
pub(crate) fn decode(bytes: &[u8], directory: &Directory, limits: &ReadLimits) -> Result<Page> {
    let layout = Layout::new(bytes, directory, limits)?;
    let mut warnings = Vec::new();
    let image = match (layout.meaning, layout.kind) {
        (Meaning::Palette, _) => palette(&layout, directory)?,
        (_, Kind { floating: true, .. }) => {
            let samples = layout.read::<f32>(spread)?;
            let above = samples.iter().filter(|&&v| v > 1.0).count();
            ensure!(
                above <= samples.len() / 2,
                "most of its floating-point samples are above 1, which is white; scale them to 0..1 first"
            );
            if above > 0 {
                warnings.push("it has floating-point samples above 1: they are white".into());
            }
            layout.image(samples)?
        }
        (_, Kind { bits: ..=8, .. }) => layout.image(layout.read::<u8>(spread)?)?,
        _ => layout.image(layout.read::<u16>(spread)?)?,
    };
    Ok(Page { image, warnings })
}

/// Where the samples lie and what they are.
struct Layout<'a> {
    bytes: &'a [u8],
    width: usize,
    height: usize,
    /// Of a pixel.
    samples: usize,
    kind: Kind,
    meaning: Meaning,
    alpha: Option<Alpha>,
    /// Each channel is stored on its own.
    planar: bool,
    /// Strips have the picture's width.
    chunk_width: usize,
    chunk_height: usize,
    tiled: bool,
    /// Each chunk's place in the file, plane by plane, row by row.
    chunks: Vec<(u64, Option<u64>)>,
    compression: Compression,
    predictor: u64,
    reversed_bits: bool,
    jpeg_tables: Option<&'a [u8]>,
    /// Luma samples a chroma sample, across and down.
    subsampling: (usize, usize),
    most_bytes: usize,
}

impl<'a> Layout<'a> {
    fn new(bytes: &'a [u8], directory: &Directory<'a>, limits: &ReadLimits) -> Result<Self> {
        let number =
            |tag, default| Ok::<u64, anyhow::Error>(directory.number(tag)?.unwrap_or(default));
        let (width, height) = (number(WIDTH, 0)?, number(HEIGHT, 0)?);
        limits.check_pixels(width, height)?;
        let compression = Compression::new(number(COMPRESSION, 1)?, number(T4_OPTIONS, 0)?)?;
        let subsampling = subsampling(directory)?;
        let meaning = meaning(directory, compression)?;
        let samples = number(
            SAMPLES,
            if compression == Compression::OldJpeg {
                meaning.colors() as u64
            } else {
                1
            },
        )?;
        let most_bytes = usize::try_from(limits.max_bytes()).unwrap_or(usize::MAX);
        let bits = directory.numbers(BITS)?.unwrap_or_else(|| {
            vec![if compression == Compression::OldJpeg {
                8
            } else {
                1
            }]
        });
        let formats = directory.numbers(SAMPLE_FORMAT)?.unwrap_or_else(|| vec![1]);
        let kind = Kind::new(&bits, &formats, directory.big_endian)?;
        ensure!(
            samples >= meaning.colors() as u64,
            "it has {samples} samples a pixel, but its colours need {}: it is damaged",
            meaning.colors()
        );
        let total = width.saturating_mul(height).saturating_mul(samples);
        ensure!(
            total.saturating_mul(2) <= most_bytes as u64,
            "it has {samples} samples a pixel, which is more than a picture has"
        );
        let tiled = directory.contains(TILE_OFFSETS);
        let (offsets, sizes) = if tiled {
            (TILE_OFFSETS, TILE_BYTES)
        } else {
            (STRIP_OFFSETS, STRIP_BYTES)
        };
        let (chunk_width, chunk_height) = if tiled {
            (number(TILE_WIDTH, 0)?, number(TILE_HEIGHT, 0)?)
        } else {
            (width, number(ROWS_PER_STRIP, height)?.min(height))
        };
        ensure!(
            chunk_width > 0
                && chunk_height > 0
                && chunk_width.saturating_mul(chunk_height) <= limits.max_pixels.max(1 << 20),
            "its pixels lie in parts of {chunk_width}x{chunk_height}: it is damaged"
        );
        let offsets = directory.numbers(offsets)?.unwrap_or_default();
        let sizes = directory.numbers(sizes)?.unwrap_or_default();
        let size = |i: usize| sizes.get(i).copied().filter(|&n| n > 0);
        Self {
            bytes,
            width: width as usize,
            height: height as usize,
            samples: samples as usize,
            kind,
            meaning,
            alpha: alpha(directory, samples as usize, meaning)?,
            planar: number(PLANAR, 1)? == 2 && samples > 1,
            chunk_width: chunk_width as usize,
            chunk_height: chunk_height as usize,
            tiled,
            chunks: offsets
                .iter()
                .enumerate()
                .map(|(i, &offset)| (offset, size(i)))
                .collect(),
            compression,
            predictor: number(PREDICTOR, 1)?,
            reversed_bits: number(FILL_ORDER, 1)? == 2,
            jpeg_tables: directory.raw(JPEG_TABLES),
            subsampling,
            most_bytes,
        }
        .with_old_jpeg(directory)
    }

    /// JPEG before TIFF's technical note 2: read where the whole picture is one stream.
    fn with_old_jpeg(mut self, directory: &Directory) -> Result<Self> {
        if self.compression != Compression::OldJpeg {
            return Ok(self);
        }
        let stream = match (
            directory.number(OLD_JPEG)?,
            directory.number(OLD_JPEG_BYTES)?,
        ) {
            (Some(at), length) => {
                let end = length
                    .filter(|&n| n > 0)
                    .map_or(self.bytes.len() as u64, |n| at.saturating_add(n));
                Some((at, end.min(self.bytes.len() as u64).saturating_sub(at)))
            }
            _ => None,
        };
        let whole = stream.filter(|&(at, length)| {
            let part = self.bytes.get(at as usize..(at + length) as usize);
            part.and_then(super::structure::map_jpeg)
                .is_some_and(|map| map.end.is_some())
        });
        let (at, length) = whole.context(
            "it holds JPEG data of the kind before 1995, in parts, which is not supported; save it again as TIFF with another program, or as PNG",
        )?;
        self.chunks = vec![(at, Some(length))];
        (self.chunk_width, self.chunk_height, self.tiled) = (self.width, self.height, false);
        self.compression = Compression::Jpeg;
        self.jpeg_tables = None;
        Ok(self)
    }

    /// All samples, pixel by pixel. `put` turns a packed row into samples.
    fn read<T: Level>(&self, put: fn(&[u8], Kind, &mut [T], &Place)) -> Result<Vec<T>> {
        let planes = if self.planar { self.samples } else { 1 };
        let across = self.width.div_ceil(self.chunk_width);
        let down = self.height.div_ceil(self.chunk_height);
        ensure!(
            self.chunks.len() >= planes * across * down,
            "it lists {} parts of its pixels, but its size needs {}: it is damaged",
            self.chunks.len(),
            planes * across * down
        );
        let mut out = vec![T::default(); self.width * self.height * self.samples];
        for (i, &(offset, size)) in self.chunks[..planes * across * down].iter().enumerate() {
            let (plane, part) = (i / (across * down), i % (across * down));
            let (x, y) = (
                part % across * self.chunk_width,
                part / across * self.chunk_height,
            );
            // A tile is stored whole at the edges; a strip ends with the picture.
            let visible = self.chunk_height.min(self.height - y);
            let rows = if self.tiled {
                self.chunk_height
            } else {
                visible
            };
            let data = self.data(offset, size)?;
            let part = self.part(data, rows)?;
            let wide = self.chunk_width.min(self.width - x).min(part.width);
            let in_part = if self.planar { 1 } else { self.samples };
            for (line, row) in part.rows().take(visible).enumerate() {
                let first = ((y + line) * self.width + x) * self.samples + plane;
                let step = if self.planar { self.samples } else { 1 };
                put(
                    row,
                    part.kind,
                    &mut out,
                    &Place {
                        first,
                        step,
                        count: wide * in_part,
                    },
                );
            }
        }
        Ok(out)
    }

    /// A chunk's bytes in the file; without a size, all that follow.
    fn data(&self, offset: u64, size: Option<u64>) -> Result<&'a [u8]> {
        let start = usize::try_from(offset)
            .ok()
            .filter(|&at| at < self.bytes.len());
        let rest = &self.bytes[start.context(directory::BEYOND)?..];
        Ok(match size {
            Some(size) => {
                let size = usize::try_from(size).unwrap_or(usize::MAX);
                // A last strip without compression may state more than it needs.
                &rest[..size.min(rest.len())]
            }
            None => rest,
        })
    }

    /// One strip or tile, unpacked, `height` rows of it.
    fn part(&self, data: &[u8], height: usize) -> Result<Part> {
        let in_part = if self.planar { 1 } else { self.samples };
        if self.compression == Compression::Jpeg {
            return self.jpeg_part(data, height, in_part);
        }
        let reversed;
        let data = if self.reversed_bits {
            reversed = data.iter().map(|b| b.reverse_bits()).collect::<Vec<u8>>();
            &reversed
        } else {
            data
        };
        let width = self.chunk_width;
        if matches!(self.meaning, Meaning::YCbCr(_)) && self.subsampling != (1, 1) {
            return self.subsampled_part(data, height);
        }
        let row_bytes = self.kind.row_bytes(width * in_part);
        ensure!(
            row_bytes.saturating_mul(height) <= self.most_bytes,
            "its parts are larger than the picture: it is damaged"
        );
        let mut bytes = compression::unpack(
            self.compression,
            data,
            Rows {
                width,
                height,
                row_bytes,
            },
        )?;
        match (self.predictor, self.compression) {
            // The predictor belongs to these two; others that state one ignore it.
            (2, Compression::Lzw | Compression::Deflate) => {
                ensure!(
                    [8, 16, 32, 64].contains(&self.kind.bits),
                    "its predictor does not fit samples of {} bits: it is damaged",
                    self.kind.bits
                );
                bytes
                    .chunks_exact_mut(row_bytes)
                    .for_each(|row| add_left(row, self.kind, in_part));
            }
            (3, Compression::Lzw | Compression::Deflate) => {
                ensure!(
                    self.kind.floating,
                    "its predictor is for floating-point samples, which it has not: it is damaged"
                );
                bytes
                    .chunks_exact_mut(row_bytes)
                    .for_each(|row| join_planes(row, self.kind, in_part));
            }
            (0..=3, _) => {}
            (other, _) => bail!("its predictor has the unknown number {other}: it is damaged"),
        }
        Ok(Part {
            width,
            row_bytes,
            bytes,
            kind: self.kind,
        })
    }

    fn jpeg_part(&self, data: &[u8], height: usize, in_part: usize) -> Result<Part> {
        ensure!(
            self.kind.bits == 8,
            "its JPEG data has samples of {} bits; only 8 are supported; save it again with Deflate",
            self.kind.bits
        );
        let part = compression::jpeg(self.jpeg_tables, data, self.most_bytes)?;
        ensure!(
            part.components == in_part
                && part.height >= height.min(self.height)
                && part.width >= self.chunk_width.min(self.width),
            "its JPEG data is {}x{} with {} channels, but its directory says {}x{height} with {in_part}: it is damaged",
            part.width,
            part.height,
            part.components,
            self.chunk_width
        );
        Ok(Part {
            width: part.width,
            row_bytes: part.width * part.components,
            bytes: part.samples,
            kind: self.kind,
        })
    }

    /// YCbCr with fewer chroma than luma samples: blocks of luma, then one Cb and one Cr, each spread over its block.
    fn subsampled_part(&self, data: &[u8], height: usize) -> Result<Part> {
        ensure!(
            !self.planar && self.kind.bits == 8 && self.samples == 3 && self.predictor <= 1,
            "its kind of reduced chroma is not supported; save it again as RGB"
        );
        let (h, v) = self.subsampling;
        let (across, down) = (self.chunk_width.div_ceil(h), height.div_ceil(v));
        let block = h * v + 2;
        let blocks = Rows {
            width: across,
            height: down,
            row_bytes: across * block,
        };
        let packed = compression::unpack(self.compression, data, blocks)?;
        let row_bytes = across * h * 3;
        let mut bytes = vec![0; row_bytes * down * v];
        for (i, block) in packed.chunks_exact(block).enumerate() {
            let (x, y) = (i % across * h, i / across * v);
            for (j, &luma) in block[..h * v].iter().enumerate() {
                let at = (y + j / h) * row_bytes + 3 * (x + j % h);
                bytes[at..at + 3].copy_from_slice(&[luma, block[h * v], block[h * v + 1]]);
            }
        }
        Ok(Part {
            width: self.chunk_width,
            row_bytes,
            bytes,
            kind: self.kind,
        })
    }

    fn image<T: Level>(&self, samples: Vec<T>) -> Result<DynamicImage> {
        let (samples, channels) = color::convert(samples, self.samples, self.meaning, self.alpha);
        T::image(self.width as u32, self.height as u32, channels, samples)
            .context("it holds fewer pixels than its size says")
    }
}

/// One strip or tile in rows of packed samples.
struct Part {
    width: usize,
    row_bytes: usize,
    bytes: Vec<u8>,
    kind: Kind,
}

impl Part {
    fn rows(&self) -> impl Iterator<Item = &[u8]> {
        self.bytes.chunks_exact(self.row_bytes)
    }
}

fn subsampling(directory: &Directory) -> Result<(usize, usize)> {
    let stated = directory.numbers(YCBCR_SUBSAMPLING)?.unwrap_or_default();
    match stated[..] {
        [] => Ok((2, 2)),
        [h, v, ..] if [1, 2, 4].contains(&h) && [1, 2, 4].contains(&v) => {
            Ok((h as usize, v as usize))
        }
        _ => bail!("its chroma is reduced by {stated:?}, which no picture is: it is damaged"),
    }
}

fn meaning(directory: &Directory, compression: Compression) -> Result<Meaning> {
    let default = if compression == Compression::OldJpeg {
        Some(6)
    } else {
        None
    };
    let number = directory.number(PHOTOMETRIC)?.or(default);
    Ok(
        match number.context("it does not say what its samples mean: it is damaged")? {
            0 => Meaning::WhiteIsZero,
            1 => Meaning::BlackIsZero,
            2 => Meaning::Rgb,
            3 => Meaning::Palette,
            5 => {
                ensure!(
                    directory.number(INK_SET)?.unwrap_or(1) == 1,
                    "its inks are not cyan, magenta, yellow and black, which is not supported; save it again as RGB"
                );
                Meaning::Cmyk
            }
            6 => Meaning::YCbCr(ycbcr(directory)),
            8 => Meaning::CieLab,
            9 => Meaning::IccLab,
            other => Meaning::refuse(other)?,
        },
    )
}

/// The stated conversion, or that of Rec. 601 over the full range.
fn ycbcr(directory: &Directory) -> YCbCr {
    let stated = |tag, count: usize| {
        let values = directory.rationals(tag).filter(|v| v.len() == count);
        values.map(|v| v.iter().map(|&v| v as f32).collect::<Vec<f32>>())
    };
    let weights = stated(YCBCR_COEFFICIENTS, 3).and_then(|v| v.try_into().ok());
    let range = stated(REFERENCE_BLACK_WHITE, 6).and_then(|v| <[f32; 6]>::try_from(v).ok());
    let sound = |r: &[f32; 6]| r[0] < r[1] && r[2] < r[3] && r[4] < r[5];
    YCbCr {
        weights: weights
            .filter(|w: &[f32; 3]| w[1] > 0.0)
            .unwrap_or([0.299, 0.587, 0.114]),
        range: range
            .filter(sound)
            .unwrap_or([0.0, 255.0, 128.0, 255.0, 128.0, 255.0]),
    }
}

/// What the sample after the colours is.
fn alpha(directory: &Directory, samples: usize, meaning: Meaning) -> Result<Option<Alpha>> {
    let extra = samples - meaning.colors();
    let stated = directory.numbers(EXTRA_SAMPLES)?.unwrap_or_default();
    Ok(match stated.first() {
        _ if extra == 0 => None,
        Some(1) => Some(Alpha::Associated),
        Some(2) => Some(Alpha::Straight),
        Some(_) => None,
        // Not said: what one more channel mostly is.
        None => (extra == 1 && meaning != Meaning::Cmyk).then_some(Alpha::Straight),
    })
}

/// A palette picture: indices, and where the file has it alpha, looked up.
fn palette(layout: &Layout, directory: &Directory) -> Result<DynamicImage> {
    let bits = layout.kind.bits;
    ensure!(
        bits <= 8 && !layout.kind.floating,
        "its palette has indices of {bits} bits, which is not supported; save it again as RGB"
    );
    let map = directory.numbers(COLOR_MAP)?.unwrap_or_default();
    let size = 1usize << bits;
    ensure!(
        map.len() >= 3 * size,
        "its palette has {} values; expected {}: it is damaged",
        map.len(),
        3 * size
    );
    // Levels are of 16 bits; some programs write 8 (as libtiff finds too).
    let shift = if map.iter().all(|&v| v < 256) { 0 } else { 8 };
    let stored = layout.read::<u8>(indices)?;
    let alpha = layout.alpha;
    let channels = if alpha.is_some() { 4 } else { 3 };
    let mut samples = vec![0; layout.width * layout.height * channels];
    for (out, pixel) in samples
        .chunks_exact_mut(channels)
        .zip(stored.chunks_exact(layout.samples))
    {
        for (c, out) in out[..3].iter_mut().enumerate() {
            *out = (map[c * size + usize::from(pixel[0])] >> shift) as u8;
        }
        if alpha.is_some() {
            // Indices are as they are, and so is what lies beside them.
            out[3] = (u32::from(pixel[1]) * 255 / ((1 << bits) - 1)) as u8;
        }
    }
    // A palette's colours cannot have been multiplied by a pixel's alpha.
    u8::image(layout.width as u32, layout.height as u32, channels, samples)
        .context("it holds fewer pixels than its size says")
}
