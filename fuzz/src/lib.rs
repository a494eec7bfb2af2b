//! What the fuzz targets share: bounds on memory and size, a place for files, and what must hold of everything read.

mod memory;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use sd_upscale::files::{self, Loaded};
use sd_upscale::latents::{LatentScale, Latents};
use sd_upscale::limits::ReadLimits;
use sd_upscale::metadata::{Metadata, Parameters};
use sd_upscale::picture::{Depth, Format, Picture, encode};

#[global_allocator]
static ALLOCATOR: memory::Bounded = memory::Bounded;

/// Small pictures only: 256 x 256, for which a decoder may take 65 MiB (see [`ReadLimits`]).
pub const LIMITS: ReadLimits = ReadLimits {
    max_pixels: 1 << 16,
};

/// The repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// A folder of this process's own for files that must lie on a disk; `fuzz/run` puts `TMPDIR` in memory and removes it.
pub fn scratch() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("sd-upscale-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        folder
    })
}

/// Adds settings as the program does, which takes the prompt that it finds; and checks that it is found again.
pub fn add_settings(metadata: &mut Metadata) {
    let found = metadata.prompt();
    let fields = [
        ("Steps", "20"),
        ("Sampler", "Euler"),
        ("Seed", "0"),
        ("Upscaler", "sd-upscale"),
    ];
    let mut settings = Parameters {
        prompt: "a cat".into(),
        negative_prompt: "blurry".into(),
        fields: fields.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec(),
    };
    if let Some(found) = &found {
        settings.prompt = found.prompt.clone();
        settings.negative_prompt = found.negative.clone();
    }
    metadata.add_settings(&settings);
    // A1111's text has no quotes: what means something in it cannot be part of a prompt.
    let plain = |text: &str| !text.contains("Negative prompt:") && !text.contains('<');
    if let Some(found) = found
        && plain(&found.prompt)
        && plain(&found.negative)
    {
        let again = metadata.prompt().expect("the prompt stays");
        assert_eq!(again.prompt, found.prompt);
        assert_eq!(again.negative, found.negative);
    }
}

/// Checks whatever [`files::read_bytes`] gave, and uses it as the program does.
pub fn check(read: anyhow::Result<Loaded>) {
    match read {
        Err(error) => assert!(format!("{error:#}").starts_with("cannot read fuzz: ")),
        Ok(Loaded::Latents(latents)) => check_latents(latents),
        Ok(Loaded::Picture(picture)) => check_picture(picture),
    }
}

/// A picture is sound, and every format that can be written holds it: of the same size, and of the same pixels where
/// the format loses none.
fn check_picture(mut picture: Picture) {
    let pixels = picture.pixels.width * picture.pixels.height;
    assert!(pixels > 0 && pixels as u64 <= LIMITS.max_pixels);
    assert_eq!(picture.pixels.values.len(), 3 * pixels);
    assert!(picture.alpha.as_ref().is_none_or(|a| a.len() == pixels));
    assert!(
        picture
            .pixels
            .values
            .iter()
            .all(|v| (0.0..=1.0).contains(v))
    );
    let _ = picture.metadata.prompt();
    add_settings(&mut picture.metadata);
    // A size that a flipped bit made large tells nothing new about the encoders.
    if pixels <= 1 << 12 {
        for format in Format::WRITABLE {
            let again = rewritten(&picture, format, 1.0 / 255.0);
            assert_eq!(again.format, format);
        }
    }
}

/// The picture after a way through a file of `format`, which must be whole and hold what went in.
pub fn rewritten(picture: &Picture, format: Format, tolerance: f32) -> Picture {
    let encoded = encode(picture, format, None).expect("what was read can be written");
    let read = files::read_bytes(&encoded.bytes, "fuzz", &LIMITS);
    let read = match read.unwrap_or_else(|e| panic!("our own {}: {e:#}", format.name())) {
        Loaded::Picture(read) => read,
        Loaded::Latents(_) => panic!("our own {} is read as latents", format.name()),
    };
    let size = |p: &Picture| (p.pixels.width, p.pixels.height);
    assert_eq!(size(&read), size(picture), "{}", format.name());
    let path = scratch().join("written");
    std::fs::write(&path, &encoded.bytes).unwrap();
    assert!(files::is_complete(&path), "{}", format.name());

    let flattened = picture.alpha.is_some() && !format.keeps_alpha();
    if format != Format::Jpeg && !flattened {
        let step = match picture.depth {
            Depth::Sixteen if format.keeps_sixteen_bits(picture.alpha.is_some()) => tolerance / 257.0,
            _ => tolerance,
        };
        let far = |(a, b): (&f32, &f32)| (a - b).abs() > 0.51 * step;
        let differ = picture
            .pixels
            .values
            .iter()
            .zip(&read.pixels.values)
            .any(far);
        assert!(!differ, "{} changed the pixels", format.name());
    }
    read
}

/// Latents are sound, and both files that are written give them back bit by bit.
fn check_latents(latents: Latents) {
    let count = latents.batch * 4 * latents.height * latents.width;
    assert!(count > 0 && latents.data.len() == count);
    assert!(latents.data.iter().all(|v| v.is_finite()));
    let _ = latents.prompt();
    let _ = latents.image_metadata().prompt();
    let into_scaled = |latents: Latents| {
        let (scale, _) = latents.scale(LatentScale::Auto);
        latents.into_scaled(scale, 0.5)
    };
    let scaled = into_scaled(latents);
    let again = |bytes: Vec<u8>| match files::read_bytes(&bytes, "fuzz", &LIMITS) {
        Ok(Loaded::Latents(read)) => assert_eq!(into_scaled(read).data, scaled.data),
        Ok(Loaded::Picture(_)) => panic!("our own latents are read as a picture"),
        // What is within a power of two of overflow may be infinite in the raw scale.
        Err(e) => assert!(
            scaled.data.iter().any(|v| v.abs() > f32::MAX / 4.0),
            "{e:#}"
        ),
    };
    again(scaled.to_safetensors(&scaled.metadata).unwrap());
    again(scaled.to_comfy(0.5, &scaled.metadata).unwrap());
}
