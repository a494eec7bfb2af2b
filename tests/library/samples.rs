//! The files in `tests/data/files`, which other programs wrote (`tests/data/make_files.py`), read by the library.

use sd_upscale::files::{self, Loaded};
use sd_upscale::latents::Latents;
use sd_upscale::limits::ReadLimits;
use sd_upscale::picture::Picture;

use crate::data::data;

pub fn read(name: &str) -> anyhow::Result<Loaded> {
    files::read_path(&data("files").join(name), &ReadLimits::default())
}

pub fn picture(name: &str) -> Picture {
    match read(name).unwrap_or_else(|e| panic!("{name}: {e:#}")) {
        Loaded::Picture(picture) => picture,
        Loaded::Latents(_) => panic!("{name} was read as latents"),
    }
}

pub fn latents(name: &str) -> Latents {
    match read(name).unwrap_or_else(|e| panic!("{name}: {e:#}")) {
        Loaded::Latents(latents) => latents,
        Loaded::Picture(_) => panic!("{name} was read as an image"),
    }
}

pub fn refusal(name: &str) -> String {
    match read(name) {
        Ok(_) => panic!("{name} was accepted"),
        Err(e) => format!("{e:#}"),
    }
}
