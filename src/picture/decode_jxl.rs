//! JPEG XL: the codestream's own orientation counts, and the first frame of an animation.

use anyhow::{Result, anyhow, ensure};
use image::metadata::Orientation;
use image::{DynamicImage, ImageBuffer, Luma, LumaA, Pixel, Primitive, Rgb, Rgba};
use jxl_oxide::color::{ColourEncoding, ColourSpace, Primaries, TransferFunction};
use jxl_oxide::image::BitDepth;
use jxl_oxide::{
    AllocTracker, AuxBoxData, FrameBufferSample, InitializeResult, JxlImage, PixelFormat, Render,
};

use super::{Format, Picture, words};
use crate::limits::ReadLimits;
use crate::metadata::Metadata;

/// Bytes that are handed to the decoder at a time.
const PIECE: usize = 1 << 16;

/// Decodes a whole file.
pub(super) fn decode(bytes: &[u8], limits: &ReadLimits) -> Result<Picture> {
    let jxl = read(bytes, limits)?;
    ensure!(jxl.is_loading_done(), words::CUT_SHORT);
    ensure!(
        !jxl.pixel_format().has_black(),
        "its colours are CMYK, which is not supported; convert it to RGB"
    );
    let image = pixels(&jxl, &jxl.render_frame(0).map_err(said)?)?;
    let (metadata, warning) = metadata(&jxl).within(limits);
    let mut warnings = words::dropped_frames(jxl.num_loaded_keyframes());
    warnings.extend(warning);
    // Upright already: what EXIF says besides does not count.
    let upright = Orientation::NoTransforms;
    Ok(Picture::from_decoded(
        image,
        upright,
        Format::Jxl,
        metadata,
        warnings,
    ))
}

/// Whether all of its frames are there.
pub(crate) fn is_whole(bytes: &[u8]) -> bool {
    read(bytes, &ReadLimits::default()).is_ok_and(|jxl| jxl.is_loading_done())
}

/// Width and height, upright, and what is said of the picture.
pub(super) fn header(bytes: &[u8]) -> Result<((u32, u32), Metadata)> {
    let jxl = read(bytes, &ReadLimits::default())?;
    Ok(((jxl.width(), jxl.height()), metadata(&jxl)))
}

/// All of its structure, as far as the file goes; no pixel is decoded.
fn read(mut bytes: &[u8], limits: &ReadLimits) -> Result<JxlImage> {
    let most = usize::try_from(limits.max_bytes()).unwrap_or(usize::MAX);
    let mut opening = JxlImage::builder()
        .alloc_tracker(AllocTracker::with_limit(most))
        // Files that state that 16 bits are enough for what needs 17, as old encoders of 16-bit pictures did, are read as they were meant.
        .force_wide_buffers(true)
        .build_uninit();
    let mut jxl = loop {
        let piece = &bytes[..PIECE.min(bytes.len())];
        let taken = opening.feed_bytes(piece).map_err(said)?;
        // Nothing is taken of what is left of a box that is cut short.
        ensure!(taken > 0, words::CUT_SHORT);
        bytes = &bytes[taken..];
        match opening.try_init().map_err(said)? {
            InitializeResult::NeedMoreData(more) => opening = more,
            InitializeResult::Initialized(jxl) => break jxl,
        }
    };
    limits.check_pixels(u64::from(jxl.width()), u64::from(jxl.height()))?;
    while !bytes.is_empty() {
        let piece = &bytes[..PIECE.min(bytes.len())];
        let taken = jxl.feed_bytes(piece).map_err(said)?;
        if taken == 0 {
            break;
        }
        bytes = &bytes[taken..];
    }
    // Metadata that is cut short is no reason to refuse the pixels.
    let _ = jxl.finalize();
    Ok(jxl)
}

fn metadata(jxl: &JxlImage) -> Metadata {
    let boxes = jxl.aux_boxes();
    let exif = match boxes.first_exif() {
        Ok(AuxBoxData::Data(exif)) => Some(exif.payload().to_vec()),
        _ => None,
    };
    let xmp = match boxes.first_xml() {
        AuxBoxData::Data(xmp) => Some(xmp.to_vec()),
        _ => None,
    };
    Metadata {
        exif,
        icc: (!is_srgb(jxl)).then(|| jxl.rendered_icc()),
        xmp,
        ..Metadata::default()
    }
    .or_density_in_exif()
}

/// Whether its colours are what a picture without a profile has.
fn is_srgb(jxl: &JxlImage) -> bool {
    let ColourEncoding::Enum(encoding) = &jxl.image_header().metadata.colour_encoding else {
        return false;
    };
    let gray = encoding.colour_space == ColourSpace::Grey;
    (gray || matches!(encoding.primaries, Primaries::Srgb))
        && matches!(encoding.tf, TransferFunction::Srgb)
}

/// In 8 bits, 16 or floating point, as the file has them.
fn pixels(jxl: &JxlImage, render: &Render) -> Result<DynamicImage> {
    use PixelFormat::{Gray, Graya, Rgba};
    let format = jxl.pixel_format();
    let image = match jxl.image_header().metadata.bit_depth {
        BitDepth::IntegerSample {
            bits_per_sample: ..=8,
        } => match format {
            Gray => taken::<Luma<u8>>(render).map(DynamicImage::ImageLuma8),
            Graya => taken::<LumaA<u8>>(render).map(DynamicImage::ImageLumaA8),
            Rgba => taken::<self::Rgba<u8>>(render).map(DynamicImage::ImageRgba8),
            _ => taken::<Rgb<u8>>(render).map(DynamicImage::ImageRgb8),
        },
        // Of floating point there is no grey.
        BitDepth::FloatSample { .. } if !format.is_grayscale() => match format {
            Rgba => taken::<self::Rgba<f32>>(render).map(DynamicImage::ImageRgba32F),
            _ => taken::<Rgb<f32>>(render).map(DynamicImage::ImageRgb32F),
        },
        _ => match format {
            Gray => taken::<Luma<u16>>(render).map(DynamicImage::ImageLuma16),
            Graya => taken::<LumaA<u16>>(render).map(DynamicImage::ImageLumaA16),
            Rgba => taken::<self::Rgba<u16>>(render).map(DynamicImage::ImageRgba16),
            _ => taken::<Rgb<u16>>(render).map(DynamicImage::ImageRgb16),
        },
    };
    image.ok_or_else(|| anyhow!("it has fewer channels than its header states"))
}

/// None where there are too few channels. Of more, as of grey that is coded as colour, the first, and the last for alpha.
fn taken<P: Pixel>(render: &Render) -> Option<ImageBuffer<P, Vec<P::Subpixel>>>
where
    P::Subpixel: FrameBufferSample,
{
    let mut stream = render.stream();
    let (width, height) = (stream.width(), stream.height());
    let (found, wanted) = (stream.channels() as usize, usize::from(P::CHANNEL_COUNT));
    let count = width as usize * height as usize;
    let mut samples = vec![P::Subpixel::DEFAULT_MIN_VALUE; count * found];
    stream.write_to_buffer(&mut samples);
    if found > wanted {
        let has_alpha = wanted.is_multiple_of(2);
        let colors = wanted - usize::from(has_alpha);
        let kept = |pixel: &[P::Subpixel]| {
            let alpha = has_alpha.then(|| pixel[found - 1]);
            let colors = pixel[..colors].iter().copied();
            colors.chain(alpha).collect::<Vec<_>>()
        };
        samples = samples.chunks_exact(found).flat_map(kept).collect();
    }
    (found >= wanted).then(|| ImageBuffer::from_raw(width, height, samples))?
}

/// What the decoder says, in our words.
fn said(error: Box<dyn std::error::Error + Send + Sync>) -> anyhow::Error {
    anyhow!("{}", words::of_jxl(&error.to_string()))
}
