//! Any input file: it is refused, or read, written in every format and read again. What its header alone says of its
//! size is its size.
#![no_main]

use std::io::Cursor;

use libfuzzer_sys::fuzz_target;
use sd_upscale::files::{self, FileKind, Loaded};
use sd_upscale::picture::Header;
use sd_upscale_fuzz::{LIMITS, check};

fuzz_target!(|data: &[u8]| {
    let read = files::read_bytes(data, "fuzz", &LIMITS);
    if let Ok(FileKind::Image(format)) = files::sniff(data)
        && let Ok(header) = Header::read(format, Cursor::new(data))
        && let Ok(Loaded::Picture(picture)) = &read
    {
        let size = (picture.pixels.width, picture.pixels.height);
        assert_eq!((header.width, header.height), size);
    }
    check(read);
});
