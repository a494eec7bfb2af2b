//! Pictures that came with other programs (`tests/data/fetch_corpus.sh`), read by the library and held to what Pillow
//! reads from them (`tests/data/corpus_reference.py`): the same picture, or one clear line. Runs where
//! `SD_UPSCALE_CORPUS` names the folder.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::SafeTensors;
use sd_upscale::files::{self, Loaded};
use sd_upscale::limits::ReadLimits;
use sd_upscale::picture::Picture;

/// Levels of 255 that a picture may differ from Pillow's, after halving, on average and in the worst of 1,000 samples:
/// decoders of JPEG enlarge chroma in different ways and round the inverse DCT differently. A wrong colour, turn or
/// place is off by tens.
const MEAN: f32 = 1.0;
const NEARLY_WORST: f32 = 12.0;
/// No side of a reference picture is above this.
const MOST: usize = 256;

/// Files, by the end of their path, that two programs may read in two ways, and why.
const BOTH_MAY_BE: [(&str, &str); 14] = [
    ("dispose-restore-background.gif", OUTSIDE_OF_THE_FRAME),
    ("high-color.gif", OUTSIDE_OF_THE_FRAME),
    ("image-inside-bg.gif", OUTSIDE_OF_THE_FRAME),
    ("images-combine.gif", OUTSIDE_OF_THE_FRAME),
    ("missing-pixels.gif", OUTSIDE_OF_THE_FRAME),
    ("image-outside-bg.gif", LARGER_FRAME),
    ("image-overlap-bg.gif", LARGER_FRAME),
    ("bat2.gif", LARGER_FRAME),
    ("invalid-colors.gif", "damaged: an index beyond the palette"),
    (
        "unitialized_memory_read.gif",
        "damaged: an index beyond the palette",
    ),
    ("pal4rletrns.bmp", SKIPPED),
    ("pal8rletrns.bmp", SKIPPED),
    (
        "app13.jpg",
        "4x4 pixels: libjpeg does not smooth chroma of two pixels' width",
    ),
    (
        "bug_double_free.jpg",
        "damaged after the first rows: Pillow has grey there, we garbage",
    ),
];
const OUTSIDE_OF_THE_FRAME: &str = "transparent outside of the frame, as browsers show it";
const LARGER_FRAME: &str = "a frame larger than the picture: the header counts";
const SKIPPED: &str = "pixels that the run lengths skip have no defined colour";

/// What became of a file.
enum Verdict {
    /// Read, as Pillow reads it.
    Right,
    /// Read, and Pillow does not read it.
    Alone,
    /// Read otherwise than Pillow reads it.
    Wrong(String),
    /// Refused in a clear line, and Pillow does not read it either.
    Refused,
    /// Refused in a clear line, though Pillow reads it.
    RefusedAlone(String),
    /// Refused in words that help no one.
    BadWords(String),
    /// The decoder panicked.
    Panic,
}

#[test]
fn pictures_of_other_programs_are_read_as_pillow_reads_them_or_refused_in_a_line() {
    let Some(folder) = std::env::var_os("SD_UPSCALE_CORPUS").map(PathBuf::from) else {
        eprintln!(
            "skipped: SD_UPSCALE_CORPUS names no folder (CONTRIBUTING.md says how to fetch one)"
        );
        return;
    };
    let bytes = std::fs::read(folder.join("reference.safetensors"))
        .expect("tests/data/corpus_reference.py writes reference.safetensors");
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let reference = SafeTensors::deserialize(&bytes).unwrap();
    let stated = header.metadata().as_ref().unwrap();
    let names: Vec<&str> = stated
        .keys()
        .filter_map(|key| key.split_once(':'))
        .map(|(_, name)| name)
        .collect();

    let verdicts: Vec<(&str, Verdict)> = names
        .par_iter()
        .map(|&name| {
            let pillow = stated
                .get(&format!("size:{name}"))
                .map(|size| (size.as_str(), reference.tensor(name).unwrap()));
            let read = || files::read_path(&folder.join(name), &ReadLimits::default());
            let verdict = match catch_unwind(AssertUnwindSafe(read)) {
                Err(_) => Verdict::Panic,
                Ok(Ok(Loaded::Picture(picture))) => match pillow {
                    None => Verdict::Alone,
                    Some((size, view)) => compare(&picture, size, view.shape(), view.data()),
                },
                Ok(Ok(Loaded::Latents(_))) => Verdict::Wrong("read as latents".into()),
                Ok(Err(error)) => refusal(&format!("{error:#}"), &folder, pillow.is_some()),
            };
            (name, verdict)
        })
        .collect();
    report(verdicts);
}

/// Prints the counts and what is not right, and fails where something is wrong.
fn report(mut verdicts: Vec<(&str, Verdict)>) {
    verdicts.sort_by_key(|(name, _)| *name);
    let mut counts = BTreeMap::new();
    let mut failures = Vec::new();
    for (name, verdict) in verdicts {
        let (kind, words) = match verdict {
            Verdict::Right => ("right", None),
            Verdict::Alone => ("read, and not by Pillow", None),
            Verdict::Refused => ("refused, and by Pillow", None),
            Verdict::RefusedAlone(words) => ("refused, and not by Pillow", Some(words)),
            Verdict::Wrong(words) => ("WRONG", Some(words)),
            Verdict::BadWords(words) => ("BAD WORDS", Some(words)),
            Verdict::Panic => ("PANIC", Some(String::new())),
        };
        let both = BOTH_MAY_BE.iter().find(|(end, _)| name.ends_with(end));
        let (kind, words) = match (kind, both) {
            ("WRONG", Some((_, why))) => ("otherwise, for a reason", Some((*why).to_owned())),
            _ => (kind, words),
        };
        *counts.entry(kind).or_insert(0) += 1;
        if let Some(words) = words {
            println!("{kind}: {name}: {words:?}");
            if kind.chars().all(|c| c.is_uppercase() || c == ' ') {
                failures.push(name.to_owned());
            }
        }
    }
    println!("{counts:?}");
    assert!(
        failures.is_empty(),
        "{} of the files above: {failures:?}",
        failures.len()
    );
}

/// A refusal must be one line in words, without a type's debug form, a doubled text or a bare "Decode Error".
fn refusal(message: &str, folder: &Path, pillow_reads: bool) -> Verdict {
    let text = message.replace(&folder.display().to_string(), "");
    let parts: Vec<&str> = text.split(": ").collect();
    let doubled = parts
        .iter()
        .enumerate()
        .any(|(i, a)| a.len() > 8 && parts[i + 1..].iter().any(|b| b.contains(a)));
    let debug = [
        "{ ", "Some(", "None", "Error", "error:", "\"", "([", "(\"", "::",
    ]
    .iter()
    .any(|mark| text.contains(mark));
    let odd = text.chars().any(char::is_control) || text.len() > 400;
    if doubled || debug || odd {
        return Verdict::BadWords(text);
    }
    if pillow_reads {
        Verdict::RefusedAlone(text)
    } else {
        Verdict::Refused
    }
}

/// Halves our picture as the script halves Pillow's, and measures the distance.
fn compare(picture: &Picture, size: &str, shape: &[usize], want: &[u8]) -> Verdict {
    let (mut width, mut height) = (picture.pixels.width, picture.pixels.height);
    if size != format!("{width}x{height}") {
        return Verdict::Wrong(format!("{width}x{height} pixels; Pillow has {size}"));
    }
    let alpha = |i: usize| picture.alpha.as_ref().map_or(1.0, |alpha| alpha[i]);
    let pixels = picture.pixels.values.as_chunks::<3>().0.iter().enumerate();
    let mut ours: Vec<[f32; 4]> = pixels
        .map(|(i, p)| [p[0] * alpha(i), p[1] * alpha(i), p[2] * alpha(i), alpha(i)])
        .collect();
    loop {
        ours = halve(&ours, width, height);
        (width, height) = (width.div_ceil(2), height.div_ceil(2));
        if width.max(height) <= MOST {
            break;
        }
    }
    assert_eq!(shape, [height, width, 4], "the script halves otherwise");
    let mut differences: Vec<f32> = ours
        .as_flattened()
        .iter()
        .zip(want)
        .map(|(a, &b)| (a * 255.0 - f32::from(b)).abs())
        .collect();
    differences.sort_by(f32::total_cmp);
    let mean = differences.iter().sum::<f32>() / differences.len() as f32;
    let nearly_worst = differences[(differences.len() - 1) * 999 / 1000];
    if mean <= MEAN && nearly_worst <= NEARLY_WORST {
        Verdict::Right
    } else {
        Verdict::Wrong(format!(
            "off by {mean:.2} levels on average, by {nearly_worst:.1} in the worst of a thousand samples"
        ))
    }
}

/// Means of 2x2 pixels; an odd last column or row counts twice.
fn halve(pixels: &[[f32; 4]], width: usize, height: usize) -> Vec<[f32; 4]> {
    let (half_width, half_height) = (width.div_ceil(2), height.div_ceil(2));
    let mean = |i: usize| {
        let (x, y) = (2 * (i % half_width), 2 * (i / half_width));
        let at = |dx: usize, dy: usize| {
            pixels[(y + dy).min(height - 1) * width + (x + dx).min(width - 1)]
        };
        let four = [at(0, 0), at(1, 0), at(0, 1), at(1, 1)];
        std::array::from_fn(|c| four.iter().map(|p| p[c]).sum::<f32>() / 4.0)
    };
    (0..half_width * half_height).map(mean).collect()
}
