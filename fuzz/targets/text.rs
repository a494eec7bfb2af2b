//! Texts that state a prompt: A1111's parameters, ComfyUI's graphs, other PNG text; read, added to, written as PNG and
//! read again. The first byte says what the rest is.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sd_upscale::Pixels;
use sd_upscale::metadata::Metadata;
use sd_upscale::picture::{Format, Picture};
use sd_upscale_fuzz::{add_settings, rewritten};

fuzz_target!(|data: &[u8]| {
    let Some((&choice, text)) = data.split_first() else {
        return;
    };
    let text = String::from_utf8_lossy(text).into_owned();
    let text = match choice % 4 {
        0 => vec![("parameters".into(), text)],
        1 => vec![("prompt".into(), text)],
        // Two texts of one file, then any key.
        2 => {
            let (parameters, graph) = text.split_once('\u{1}').unwrap_or((&text, ""));
            vec![
                ("parameters".into(), parameters.into()),
                ("prompt".into(), graph.into()),
            ]
        }
        _ => {
            let (key, value) = text.split_once('\u{1}').unwrap_or((&text, ""));
            vec![(key.into(), value.into())]
        }
    };
    let mut metadata = Metadata {
        text,
        ..Metadata::default()
    };
    if choice & 4 != 0 {
        add_settings(&mut metadata);
    }
    let mut picture = Picture::from_pixels(Pixels::new(1, 1, vec![0.5; 3]).unwrap());
    picture.metadata = metadata;
    let again = rewritten(&picture, Format::Png, 1.0);
    assert_eq!(
        again.metadata.prompt(),
        picture.metadata.prompt(),
        "the prompt survives a PNG"
    );
});
