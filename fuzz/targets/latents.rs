//! Latents: safetensors and npz. The first byte tells whether the rest is a file, or an array to be put into an
//! `.npz`, whose checksums a mutated file would not pass.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sd_upscale::files;
use sd_upscale_fuzz::{LIMITS, check};

fuzz_target!(|data: &[u8]| {
    let Some((choice, rest)) = data.split_first() else {
        return;
    };
    let name = match choice % 4 {
        0 | 1 => return check(files::read_bytes(rest, "fuzz", &LIMITS)),
        2 => "latents.npy",
        _ => "latents_8x8.npy",
    };
    check(files::read_bytes(&stored_zip(name, rest), "fuzz", &LIMITS));
});

/// A zip of one stored entry.
fn stored_zip(name: &str, data: &[u8]) -> Vec<u8> {
    let word = |n: usize| (n as u32).to_le_bytes();
    let sum = crc32(data).to_le_bytes();
    let name_length = (name.len() as u16).to_le_bytes();
    // Version 2.0, no flags, stored, no time; checksum, both sizes, lengths of name and extra field.
    let entry = [
        &[20, 0, 0, 0, 0, 0, 0, 0, 0, 0][..],
        &sum,
        &word(data.len()),
        &word(data.len()),
        &name_length,
        &[0, 0],
    ]
    .concat();
    let local = [b"PK\x03\x04", &entry[..], name.as_bytes(), data].concat();
    let central = [b"PK\x01\x02\x14\0", &entry[..], &[0; 14], name.as_bytes()].concat();
    let end = [
        &b"PK\x05\x06\0\0\0\0\x01\0\x01\0"[..],
        &word(central.len()),
        &word(local.len()),
        &[0, 0],
    ]
    .concat();
    [local, central, end].concat()
}

/// The checksum of zip.
fn crc32(bytes: &[u8]) -> u32 {
    let bit = |c: u32, _| (c >> 1) ^ (0xEDB8_8320 * (c & 1));
    let step = |sum: u32, &byte: &u8| (0..8).fold(sum ^ u32::from(byte), bit);
    !bytes.iter().fold(!0, step)
}
