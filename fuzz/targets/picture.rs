//! Any input file: it is refused, or read, written in every format and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sd_upscale::files;
use sd_upscale_fuzz::{LIMITS, check};

fuzz_target!(|data: &[u8]| check(files::read_bytes(data, "fuzz", &LIMITS)));
