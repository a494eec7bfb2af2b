//! `examples/` run, each through the function that its `main` calls.

use std::fs;

use sd_upscale::files;
use sd_upscale::limits::ReadLimits;

use crate::data::data;

#[allow(dead_code, reason = "`main`")]
#[path = "../../examples/folder.rs"]
mod folder;
#[allow(dead_code, reason = "`main`")]
#[path = "../../examples/latents.rs"]
mod latents;
#[allow(dead_code, reason = "`main`")]
#[path = "../../examples/one_image.rs"]
mod one_image;

const INPUT: &str = "inputs/square-64x64.png";

fn size(path: &std::path::Path) -> (usize, usize) {
    let picture = files::read_picture(path, &ReadLimits::default()).unwrap();
    (picture.pixels.width, picture.pixels.height)
}

#[test]
fn one_image_is_doubled() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("doubled.jpg");
    one_image::upscale(&data(INPUT), &output, "a square").unwrap();
    assert_eq!(size(&output), (128, 128));
}

#[test]
fn a_folder_is_doubled_but_for_what_is_no_picture() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in"), folder.path().join("out"));
    fs::create_dir(&input).unwrap();
    for name in ["a.png", "b.png"] {
        fs::copy(data(INPUT), input.join(name)).unwrap();
    }
    fs::write(input.join("c.png"), "no picture").unwrap();
    let mut said = Vec::new();
    let failed = folder::upscale(&input, &output, |line| said.push(line.to_owned())).unwrap();
    assert_eq!(failed, 1, "{said:?}");
    for name in ["a.png", "b.png"] {
        assert_eq!(size(&output.join(name)), (128, 128), "{name}");
    }
    assert!(!output.join("c.png").exists());
    let steps = said.iter().filter(|line| line.contains("step 5 of 5"));
    assert_eq!(steps.count(), 2, "{said:?}");
}

#[test]
fn latents_are_doubled_and_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("latents.safetensors");
    let values = (0..4 * 16 * 24).map(|i| (i as f32 * 0.37).sin()).collect();
    let upscaled = latents::upscale(24, 16, values).unwrap();
    latents::save(&upscaled, &output).unwrap();
    let files::Loaded::Latents(read) = files::read_path(&output, &ReadLimits::default()).unwrap()
    else {
        panic!("an image");
    };
    assert_eq!((read.batch, read.height, read.width), (1, 32, 48));
    assert_eq!(read.data, upscaled.data);
}
