//! A corpus of damaged inputs, made by a seeded generator from the valid files in `tests/data/files`: truncations, bit
//! flips (for PNG also with the checksums put right, which reach deeper), wiped and repeated runs, absurd sizes, wrong
//! types. Shared by the tests of the library and of the program.

use crate::data::data;

/// One damaged input: a file name, whose extension is the original's, and its bytes.
pub struct Damaged {
    pub name: String,
    pub bytes: Vec<u8>,
}

/// The whole corpus, the same at every call.
pub fn corpus() -> Vec<Damaged> {
    let folder = data("files");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    files.sort();
    let mut random = Random(0x5eed);
    let mut corpus = Vec::new();
    for path in files {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if name.starts_with("expected") || name.starts_with("refused") {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        let (stem, extension) = name.rsplit_once('.').unwrap();
        let mut add = |how: String, bytes| {
            corpus.push(Damaged {
                name: format!("{stem}-{how}.{extension}"),
                bytes,
            })
        };
        for percent in [1, 30, 70, 95] {
            add(
                format!("cut-{percent}"),
                bytes[..bytes.len() * percent / 100].to_vec(),
            );
        }
        add("cut-last".into(), bytes[..bytes.len() - 1].to_vec());
        for i in 0..4 {
            let mut flipped = bytes.clone();
            // In the first bytes, where the structure is, and anywhere.
            let reach = if i % 2 == 0 {
                bytes.len().min(96)
            } else {
                bytes.len()
            };
            for _ in 0..=i {
                let at = random.below(reach);
                flipped[at] ^= 1 << random.below(8);
            }
            add(format!("flip-{i}"), flipped.clone());
            if extension == "png" {
                fix_checksums(&mut flipped);
                add(format!("flip-summed-{i}"), flipped);
            }
        }
        let mut wiped = bytes.clone();
        let at = random.below(bytes.len());
        let end = (at + 64).min(bytes.len());
        wiped[at..end].fill(if random.below(2) == 0 { 0 } else { 0xFF });
        add("wiped".into(), wiped);
        let mut doubled = bytes.clone();
        doubled.splice(at..at, bytes[at..end].to_vec());
        add("repeated".into(), doubled);
    }
    corpus.extend(found_by_fuzzing());
    corpus.extend(absurd());
    corpus.extend(wrong_types(&mut random));
    corpus
}

/// What the target `picture` of `fuzz/` found, cut down to what it takes.
fn found_by_fuzzing() -> Vec<Damaged> {
    let mut paths: Vec<_> = std::fs::read_dir(data("fuzz"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|path| path.is_file())
        .collect();
    paths.sort();
    let read = |path: std::path::PathBuf| Damaged {
        name: format!("fuzz-{}", path.file_name().unwrap().to_str().unwrap()),
        bytes: std::fs::read(&path).unwrap(),
    };
    paths.into_iter().map(read).collect()
}

/// Small files that claim to be huge, or whose numbers do not fit together.
fn absurd() -> Vec<Damaged> {
    let folder = data("files");
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
    let mut all = Vec::new();
    let mut add = |name: &str, bytes: Vec<u8>| {
        all.push(Damaged {
            name: format!("absurd-{name}"),
            bytes,
        })
    };
    let put = |bytes: &mut Vec<u8>, at: usize, value: &[u8]| {
        bytes[at..at + value.len()].copy_from_slice(value)
    };
    for (i, side) in [0u32, 0x7FFF_FFFF, 0xFFFF_FFFF, 16384]
        .into_iter()
        .enumerate()
    {
        let mut png = read("rgb.png");
        put(&mut png, 16, &side.to_be_bytes());
        put(&mut png, 20, &side.to_be_bytes());
        fix_checksums(&mut png);
        add(&format!("size-{i}.png"), png);
        let mut bmp = read("rgb.bmp");
        put(&mut bmp, 18, &side.to_le_bytes());
        put(&mut bmp, 22, &side.to_le_bytes());
        add(&format!("size-{i}.bmp"), bmp);
        let mut gif = read("animated.gif");
        put(&mut gif, 6, &(side as u16).to_le_bytes());
        put(&mut gif, 8, &(side as u16).to_le_bytes());
        add(&format!("size-{i}.gif"), gif);
        for name in ["gray.jpg", "progressive-420.jpg"] {
            let mut jpeg = read(name);
            let frame = (0..jpeg.len() - 9)
                .find(|&i| jpeg[i] == 0xFF && matches!(jpeg[i + 1], 0xC0 | 0xC2))
                .unwrap();
            put(&mut jpeg, frame + 5, &(side as u16).to_be_bytes());
            put(&mut jpeg, frame + 7, &(side as u16).to_be_bytes());
            add(&format!("size-{i}-{name}"), jpeg);
        }
        for name in ["rgb16.tif", "palette.tif", "gray16.tif", "float.tif"] {
            let mut tiff = read(name);
            let big_endian = tiff.starts_with(b"MM");
            let word = |b: &[u8]| {
                if big_endian {
                    u16::from_be_bytes([b[0], b[1]])
                } else {
                    u16::from_le_bytes([b[0], b[1]])
                }
            };
            let value = if big_endian {
                side.to_be_bytes()
            } else {
                side.to_le_bytes()
            };
            for at in 8..tiff.len() - 12 {
                // Width and height as one LONG or SHORT.
                if matches!(word(&tiff[at..]), 0x100 | 0x101)
                    && matches!(word(&tiff[at + 2..]), 3 | 4)
                {
                    put(&mut tiff, at + 8, &value);
                }
            }
            add(&format!("size-{i}-{name}"), tiff);
        }
    }
    let mut webp = b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0\xff\xff\xff\xff\xff\xff".to_vec();
    webp.extend_from_slice(b"VP8L\0\0\0\0");
    add("size.webp", webp);

    let safetensors = |header: &str, data: usize| {
        [
            &(header.len() as u64).to_le_bytes()[..],
            header.as_bytes(),
            &vec![0; data],
        ]
        .concat()
    };
    let tensor = |shape: &str, range: &str| {
        format!(r#"{{"latents":{{"dtype":"F32","shape":{shape},"data_offsets":{range}}}}}"#)
    };
    for (i, (shape, range, data)) in [
        ("[1,4,4294967296,4294967296]", "[0,64]", 64),
        ("[18446744073709551615,4,2,2]", "[0,64]", 64),
        ("[1,4,2,2]", "[0,18446744073709551615]", 64),
        ("[1,4,2,2]", "[64,0]", 64),
        ("[1,4,2,2]", "[0,64]", 0),
        ("[1,4,2,2]", "[0,64]", 128),
        ("[1,4,-2,2]", "[0,64]", 64),
        ("[]", "[0,4]", 4),
        ("[0,4,0,0]", "[0,0]", 0),
        ("\"text\"", "[0,64]", 64),
    ]
    .into_iter()
    .enumerate()
    {
        add(
            &format!("tensor-{i}.safetensors"),
            safetensors(&tensor(shape, range), data),
        );
    }
    for (i, length) in [0u64, 1, 99_999_999, u64::MAX, 1 << 63]
        .into_iter()
        .enumerate()
    {
        let bytes = [&length.to_le_bytes()[..], b"{\"latents\":{}}"].concat();
        add(&format!("header-{i}.safetensors"), bytes);
    }
    add(
        "nested.safetensors",
        safetensors(&"{\"a\":".repeat(4000), 0),
    );

    for (i, header) in [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4611686018427387904, 4), }",
        "{'descr': '<f4', 'fortran_order': True, 'shape': (4, 0, 9223372036854775807), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (4, 2, 2), }",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (4, 2, 2), }",
        "{'descr': '<f4', 'shape': (4, 2, 2), }",
        "{'descr': '€f4', 'fortran_order': False, 'shape': (4, 2, 2), }",
        "",
    ]
    .into_iter()
    .enumerate()
    {
        let mut npy = b"\x93NUMPY\x01\0".to_vec();
        npy.extend((header.len() as u16).to_le_bytes());
        npy.extend(header.as_bytes());
        npy.extend([0; 64]);
        add(&format!("array-{i}.npz"), stored_zip("latents.npy", &npy));
    }
    add(
        "array-short.npz",
        stored_zip("latents.npy", b"\x93NUMPY\x01\0\xff\xff"),
    );
    add("array-none.npz", stored_zip("readme.txt", b"nothing"));
    all
}

/// Contents that are no image and no latents, under names that promise one.
fn wrong_types(random: &mut Random) -> Vec<Damaged> {
    let noise: Vec<u8> = (0..4096).map(|_| random.below(256) as u8).collect();
    let contents: [(&str, &[u8]); 8] = [
        ("empty", b""),
        ("one-byte", b"\x89"),
        ("text", b"This is not an image.\n"),
        (
            "html",
            b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        ),
        ("noise", &noise),
        ("zeros", &[0; 4096]),
        (
            "pointer",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
        ),
        ("signature", b"\x89PNG\r\n\x1a\n"),
    ];
    let extensions = [
        "png",
        "jpg",
        "webp",
        "tif",
        "bmp",
        "gif",
        "safetensors",
        "latent",
        "npz",
    ];
    let pairs = contents
        .iter()
        .flat_map(|c| extensions.iter().map(move |e| (c, e)));
    pairs
        .map(|((what, bytes), e)| Damaged {
            name: format!("wrong-{what}.{e}"),
            bytes: bytes.to_vec(),
        })
        .collect()
}

/// A zip of one stored entry.
fn stored_zip(name: &str, data: &[u8]) -> Vec<u8> {
    let sizes = [
        (data.len() as u32).to_le_bytes(),
        (data.len() as u32).to_le_bytes(),
    ]
    .concat();
    let lengths = [(name.len() as u16).to_le_bytes(), [0, 0]].concat();
    let common = [
        &[20, 0, 0, 0, 0, 0, 0, 0, 0, 0][..],
        &crc32(data).to_le_bytes(),
        &sizes,
        &lengths,
    ]
    .concat();
    let local = [&b"PK\x03\x04"[..], &common, name.as_bytes(), data].concat();
    let central = [&b"PK\x01\x02\x14\0"[..], &common, &[0; 14], name.as_bytes()].concat();
    let end = [
        (central.len() as u32).to_le_bytes(),
        (local.len() as u32).to_le_bytes(),
    ]
    .concat();
    [
        &local,
        &central,
        &b"PK\x05\x06\0\0\0\0\x01\0\x01\0"[..],
        &end,
        &[0, 0],
    ]
    .concat()
}

/// Recomputes every chunk's checksum as far as the chunks can be followed.
fn fix_checksums(png: &mut [u8]) {
    let mut at = 8;
    while let Some(length) = png.get(at..at + 4) {
        let length = u32::from_be_bytes(length.try_into().unwrap()) as usize;
        let end = at + 8 + length;
        if end + 4 > png.len() {
            return;
        }
        let sum = crc32(&png[at + 4..end]);
        png[end..end + 4].copy_from_slice(&sum.to_be_bytes());
        at = end + 4;
    }
}

/// The checksum of PNG and zip.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |sum: u32, &byte: &u8| {
        let bit = |c: u32, _| {
            if c & 1 == 1 {
                0xEDB8_8320 ^ (c >> 1)
            } else {
                c >> 1
            }
        };
        (0..8).fold(sum ^ u32::from(byte), bit)
    };
    !bytes.iter().fold(!0, step)
}

/// SplitMix64 (Steele, Lea, Flood 2014): seeded, the same on every machine.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}
