//! EXIF editing: a block of any bytes goes into a picture with settings; each format that holds EXIF is written and
//! read again, and must say the new settings and stand upright.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sd_upscale::Pixels;
use sd_upscale::metadata::Metadata;
use sd_upscale::picture::{Format, Picture};
use sd_upscale_fuzz::{add_settings, rewritten};

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
    if choice & 4 != 0 {
        picture.metadata.text = vec![("prompt".into(), r#"{"1": {}}"#.into())];
    }
    add_settings(&mut picture.metadata);
    let again = rewritten(&picture, format, 1.0);
    // Ours stand elsewhere where another program's JSON is left alone, and EXIF has no such place.
    if picture.metadata.text("parameters").is_some() {
        assert_eq!(again.metadata.prompt(), picture.metadata.prompt());
    }
});
