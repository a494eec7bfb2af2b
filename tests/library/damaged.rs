//! Damaged inputs (see `tests/common/damage.rs`) through the library: no panic, no hang, and either an error or a sound result,
//! whose metadata can be rewritten into every format.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use sd_upscale::files::{self, Loaded};
use sd_upscale::latents::LatentScale;
use sd_upscale::limits::ReadLimits;
use sd_upscale::metadata::Parameters;
use sd_upscale::picture::{Format, encode};

use crate::damage;
use crate::data::data;

/// Longer than any input may hold up a batch.
const HANG: Duration = Duration::from_secs(10);

/// Reads an input and, if that succeeds, checks what was read and uses it. `true` if it was refused.
fn refused(name: &str, bytes: &[u8]) -> bool {
    match files::read_bytes(bytes, name, &ReadLimits::default()) {
        Err(error) => {
            let message = format!("{error:#}");
            assert!(
                message.contains(name),
                "the message names the input: {message}"
            );
            return true;
        }
        Ok(Loaded::Latents(latents)) => {
            let count = latents.batch * 4 * latents.height * latents.width;
            assert!(count > 0 && latents.data.len() == count);
            assert!(latents.data.iter().all(|v| v.is_finite()));
            let _ = latents.prompt();
            let (scale, _) = latents.scale(LatentScale::Auto);
            let scaled = latents.into_scaled(scale, 0.18215);
            assert!(scaled.to_safetensors(&scaled.metadata).is_ok());
        }
        Ok(Loaded::Picture(mut picture)) => {
            let pixels = picture.pixels.width * picture.pixels.height;
            assert!(pixels > 0 && picture.pixels.values.len() == 3 * pixels);
            assert!(picture.alpha.as_ref().is_none_or(|a| a.len() == pixels));
            assert!(
                picture
                    .pixels
                    .values
                    .iter()
                    .all(|v| (0.0..=1.0).contains(v))
            );
            let _ = picture.metadata.prompt();
            picture.metadata.add_settings(&Parameters {
                prompt: "a cat".into(),
                ..Parameters::default()
            });
            // A size that a flipped bit made large tells nothing new about the encoders.
            if pixels < 1_000_000 {
                for format in Format::WRITABLE {
                    let encoded =
                        encode(&picture, format, None).expect("what was read can be written");
                    let read = files::read_bytes(&encoded.bytes, "ours", &ReadLimits::default());
                    assert!(
                        read.is_ok(),
                        "our {} cannot be read: {:#}",
                        format.name(),
                        read.unwrap_err()
                    );
                }
            }
        }
    }
    false
}

#[test]
fn every_damaged_input_ends_in_an_error_or_a_sound_result_and_in_time() {
    let corpus = damage::corpus();
    assert!(corpus.len() >= 300, "{} inputs", corpus.len());
    let mut failures = Vec::new();
    let (mut refusals, mut slowest) = (0, (Duration::ZERO, ""));
    for input in &corpus {
        let start = Instant::now();
        match catch_unwind(AssertUnwindSafe(|| refused(&input.name, &input.bytes))) {
            Ok(refused) => refusals += usize::from(refused),
            Err(_) => failures.push(input.name.as_str()),
        }
        slowest = slowest.max((start.elapsed(), &input.name));
    }
    eprintln!(
        "{} inputs, {refusals} refused, slowest {slowest:?}",
        corpus.len()
    );
    assert!(failures.is_empty(), "panicked on {failures:?}");
    assert!(slowest.0 < HANG, "{slowest:?}");
}

#[test]
fn a_truncated_file_is_refused_unless_every_pixel_is_there() {
    let folder = data("files");
    let mut accepted = Vec::new();
    for input in damage::corpus().iter().filter(|i| i.name.contains("-cut-")) {
        let Ok(loaded) = files::read_bytes(&input.bytes, &input.name, &ReadLimits::default())
        else {
            continue;
        };
        // The first frame of an animation may be whole, or a mere checksum missing; nothing else may pass.
        accepted.push(input.name.clone());
        let (stem, _) = input.name.split_once("-cut-").unwrap();
        let extension = Path::new(&input.name).extension().unwrap();
        let whole = files::read_path(
            &folder.join(stem).with_extension(extension),
            &ReadLimits::default(),
        );
        match (loaded, whole.unwrap()) {
            (Loaded::Picture(cut), Loaded::Picture(whole)) => {
                assert_eq!(cut.pixels.values, whole.pixels.values, "{}", input.name)
            }
            _ => panic!("{} is accepted", input.name),
        }
    }
    let tolerant = |name: &String| name.ends_with(".gif") || name.ends_with(".tif");
    assert!(accepted.iter().all(tolerant), "{accepted:?}");
}

#[test]
fn absurd_sizes_and_wrong_types_are_refused() {
    for input in damage::corpus()
        .iter()
        .filter(|i| i.name.starts_with("absurd-") || i.name.starts_with("wrong-"))
    {
        let result = files::read_bytes(&input.bytes, &input.name, &ReadLimits::default());
        assert!(result.is_err(), "{} is accepted", input.name);
    }
}
