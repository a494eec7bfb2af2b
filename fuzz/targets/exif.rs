//! EXIF editing: a block of any bytes goes into a picture with settings; each format that holds EXIF is written and
//! read again, and must say the new settings and stand upright.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sd_upscale::Pixels;
use sd_upscale::metadata::Metadata;
use sd_upscale::picture::{Format, Picture};
use sd_upscale_fuzz::{rewritten, settings};

fuzz_target!(|data: &[u8]| {
    let Some((&choice, block)) = data.split_first() else {
        return;
    };
    let format = [Format::Jpeg, Format::WebP, Format::Tiff, Format::Png][usize::from(choice % 4)];
    let mut picture = Picture::from_pixels(Pixels::new(2, 3, vec![0.5; 18]).unwrap());
    picture.metadata = Metadata {
        exif: Some(block.to_vec()),
        ..Metadata::default()
    };
    let before = picture.metadata.prompt();
    if choice & 4 != 0 {
        picture.metadata.text = vec![("prompt".into(), r#"{"1": {}}"#.into())];
    }
    picture.metadata.add_settings(&settings());
    let prompt = picture.metadata.prompt().expect("it was just set");
    let again = rewritten(&picture, format, 1.0);
    // What an earlier program wrote is kept, and is the prompt still.
    if let Some(before) = before {
        assert_eq!(prompt.prompt, before.prompt);
    }
    let found = again.metadata.prompt().expect("the settings were written");
    assert_eq!(found.prompt, prompt.prompt);
    assert_eq!(found.negative, prompt.negative);
});
