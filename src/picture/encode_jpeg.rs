//! A picture's lines -> JPEG, with EXIF, XMP, IPTC and a comment as segments behind the first.

use std::cell::{Cell, RefCell};
use std::io::{self, Write};

use anyhow::Result;
use image::codecs::jpeg::{JpegEncoder, PixelDensity, PixelDensityUnit};
use image::{GenericImageView, ImageEncoder, Luma, Pixel, Rgb};

use super::Format;
use super::rows::{NextLines, Outline, Rows};
use crate::metadata::jpeg::COMMENT;
use crate::metadata::{Density, TextGoes, iptc};

/// Lines of the blocks that a JPEG is made of: no more are in memory.
const BLOCK: usize = 8;
/// Bytes that the encoder writes first: the marker that begins a file, and the JFIF segment.
const HEAD: usize = 20;

/// Writes a file of 8-bit grey or RGB, `quality` 1..=100. Gives a warning for each block of metadata that is too large.
///
/// # Errors
/// Those of `out` and `next`.
pub(super) fn encode(
    outline: &Outline,
    quality: u8,
    next: NextLines,
    out: &mut impl Write,
) -> Result<Vec<String>> {
    let (segments, warnings) = segments(outline);
    let given_up = Cell::new(false);
    let out = Inserting {
        out,
        head: Vec::new(),
        segments,
        given_up: &given_up,
    };
    let mut encoder = JpegEncoder::new_with_quality(out, quality);
    if let Some(icc) = outline.metadata.profile_for(outline.gray) {
        encoder.set_icc_profile(icc.into_owned())?;
    }
    if let Some((unit, x, y)) = outline.metadata.density.and_then(Density::to_jfif) {
        let unit = match unit {
            0 => PixelDensityUnit::PixelAspectRatio,
            1 => PixelDensityUnit::Inches,
            _ => PixelDensityUnit::Centimeters,
        };
        encoder.set_pixel_density(PixelDensity {
            density: (x, y),
            unit,
        });
    }
    let window = Window {
        rows: RefCell::new(Rows::new(outline, Format::Jpeg, next)?),
        width: outline.width,
        height: outline.height,
        lines: RefCell::default(),
        top: Cell::new(0),
        end: Cell::new(0),
        given_up: &given_up,
        error: RefCell::default(),
    };
    let encoded = match outline.channels(Format::Jpeg) {
        1 => encoder.encode_image(&Gray(&window)),
        _ => encoder.encode_image(&Color(&window)),
    };
    if let Some(error) = window.error.into_inner() {
        return Err(error);
    }
    encoded?;
    Ok(warnings)
}

/// The segments of EXIF, XMP, IPTC and the comment, each led by its name, of at most 65533 bytes; and a warning for each that
/// is larger.
fn segments(outline: &Outline) -> (Vec<u8>, Vec<String>) {
    const APP1: u8 = 0xE1;
    const APP13: u8 = 0xED;
    const COM: u8 = 0xFE;
    let metadata = &outline.metadata;
    let exif = metadata.exif_for(outline.width, outline.height, TextGoes::IntoExif);
    let xmp = metadata.xmp_upright();
    let resources = metadata.iptc.as_deref().map(iptc::to_resources);
    let comment = metadata.text(COMMENT).map(|text| text.as_bytes().to_vec());
    let blocks = [
        ("EXIF", APP1, &b"Exif\0\0"[..], exif),
        ("XMP", APP1, b"http://ns.adobe.com/xap/1.0/\0", xmp),
        ("IPTC", APP13, iptc::PHOTOSHOP, resources),
        ("the comment", COM, b"", comment),
    ];
    let (mut segments, mut warnings) = (Vec::new(), Vec::new());
    for (what, marker, head, block) in blocks {
        let Some(block) = block else { continue };
        match u16::try_from(2 + head.len() + block.len()) {
            Ok(length) => {
                segments.extend([&[0xFF, marker], &length.to_be_bytes()[..], head, &block].concat())
            }
            Err(_) => warnings.push(format!(
                "{what} of {} bytes is too large for a JPEG: dropped",
                block.len()
            )),
        }
    }
    (segments, warnings)
}

/// Puts segments behind the JFIF segment as it passes. Takes no more once the picture's lines were given up.
struct Inserting<'a, W> {
    out: W,
    /// The first bytes, until all [`HEAD`] have come.
    head: Vec<u8>,
    segments: Vec<u8>,
    given_up: &'a Cell<bool>,
}

impl<W: Write> Write for Inserting<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.given_up.get() {
            return Err(io::Error::other("the picture's lines ended early"));
        }
        if self.head.len() == HEAD {
            return self.out.write(bytes);
        }
        let taken = bytes.len().min(HEAD - self.head.len());
        self.head.extend_from_slice(&bytes[..taken]);
        if self.head.len() == HEAD {
            if !self.head.starts_with(b"\xFF\xD8\xFF\xE0\0\x10JFIF\0") {
                return Err(io::Error::other("the encoder began with no JFIF segment"));
            }
            self.out.write_all(&self.head)?;
            self.out.write_all(&self.segments)?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// The lines that the encoder is at. It walks from block to block, row of blocks after row of blocks.
struct Window<'a> {
    rows: RefCell<Rows<'a, u8>>,
    width: usize,
    height: usize,
    /// Samples of the lines from `top` to before `end`.
    lines: RefCell<Vec<u8>>,
    top: Cell<usize>,
    end: Cell<usize>,
    given_up: &'a Cell<bool>,
    /// Why there are no more lines.
    error: RefCell<Option<anyhow::Error>>,
}

impl Window<'_> {
    /// A pixel of `P`'s channels.
    fn pixel<P: Pixel<Subpixel = u8>>(&self, x: u32, y: u32) -> P {
        let (x, y) = (x as usize, y as usize);
        while y >= self.end.get() {
            self.advance();
        }
        let channels = usize::from(P::CHANNEL_COUNT);
        let lines = self.lines.borrow();
        // The encoder is to look at each pixel once, and says so: a line that has gone by is none of the picture.
        let line = y.saturating_sub(self.top.get());
        let at = (line * self.width + x) * channels;
        *P::from_slice(&lines[at..at + channels])
    }

    /// To the next lines; to black ones where there are no more, which nothing is written of.
    fn advance(&self) {
        let top = self.end.get();
        let count = BLOCK.min(self.height - top);
        let mut rows = self.rows.borrow_mut();
        let mut lines = self.lines.borrow_mut();
        lines.clear();
        if self.given_up.get() {
            lines.resize(count * rows.length(), 0);
        } else {
            match rows.take(count) {
                Ok(samples) => lines.extend_from_slice(samples),
                Err(error) => {
                    self.given_up.set(true);
                    self.error.replace(Some(error));
                    lines.resize(count * rows.length(), 0);
                }
            }
        }
        self.top.set(top);
        self.end.set(top + count);
    }
}

/// A window on grey lines.
struct Gray<'a, 'b>(&'a Window<'b>);

/// A window on coloured lines.
struct Color<'a, 'b>(&'a Window<'b>);

impl GenericImageView for Gray<'_, '_> {
    type Pixel = Luma<u8>;

    fn dimensions(&self) -> (u32, u32) {
        (self.0.width as u32, self.0.height as u32)
    }

    fn get_pixel(&self, x: u32, y: u32) -> Self::Pixel {
        self.0.pixel(x, y)
    }
}

impl GenericImageView for Color<'_, '_> {
    type Pixel = Rgb<u8>;

    fn dimensions(&self) -> (u32, u32) {
        (self.0.width as u32, self.0.height as u32)
    }

    fn get_pixel(&self, x: u32, y: u32) -> Self::Pixel {
        self.0.pixel(x, y)
    }
}
