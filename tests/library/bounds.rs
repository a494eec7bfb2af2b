//! Small files that ask for much, and large ones that are nothing we read: what is left out or refused, and that it is
//! found out without reading or unpacking it.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use png::text_metadata::{ITXtChunk, ZTXtChunk};
use sd_upscale::files::{self, Loaded};
use sd_upscale::limits::ReadLimits;
use sd_upscale::metadata::{Metadata, Parameters};
use sd_upscale::picture::{Format, Picture, encode};

use crate::config::largest_allocation;
use crate::data::data;

fn picture(bytes: &[u8], limits: &ReadLimits) -> Picture {
    match files::read_bytes(bytes, "the file", limits).unwrap() {
        Loaded::Picture(picture) => picture,
        Loaded::Latents(_) => panic!("latents"),
    }
}

/// A file that begins with `head` and has a terabyte, of which nothing lies on the disk.
fn huge(path: &Path, head: &[u8]) {
    let mut file = File::create(path).unwrap();
    file.write_all(head).unwrap();
    file.set_len(1 << 40).unwrap();
}

#[test]
fn text_of_a_png_counts_in_all_and_what_does_not_fit_is_named_while_the_pixels_are_read() {
    let large = "a".repeat(31 << 20);
    let mut bytes = Vec::new();
    let mut writer = png::Encoder::new(&mut bytes, 1, 1).write_header().unwrap();
    for i in 0..4 {
        let text = ZTXtChunk::new(format!("large{i}"), large.clone());
        writer.write_text_chunk(&text).unwrap();
    }
    let mut text = ITXtChunk::new("international", large);
    text.compressed = true;
    writer.write_text_chunk(&text).unwrap();
    let text = ZTXtChunk::new("parameters", "a cat");
    writer.write_text_chunk(&text).unwrap();
    writer.write_image_data(&[128]).unwrap();
    writer.finish().unwrap();
    assert!(bytes.len() < 1 << 20, "{}", bytes.len());

    let read = picture(&bytes, &ReadLimits::default());
    assert_eq!(read.pixels.width, 1);
    let warning = read.warnings.join("\n");
    for part in ["large1", "large2", "and 1 more", "--max-pixels"] {
        assert!(warning.contains(part), "{part}: {warning}");
    }
    assert_eq!(read.warnings.len(), 1, "{warning}");
    assert_eq!(read.metadata.text("parameters"), Some("a cat"));
    assert_eq!(read.metadata.text("large0").map(str::len), Some(31 << 20));

    let trusted = ReadLimits {
        max_pixels: 1 << 40,
    };
    let all = picture(&bytes, &trusted);
    assert!(all.warnings.is_empty() && all.metadata.text.len() == 6);
    assert!(largest_allocation() < 1 << 30);
}

#[test]
fn a_profile_that_unpacks_to_more_than_metadata_may_take_is_left_out() {
    let mut info = png::Info::with_size(1, 1);
    info.icc_profile = Some(vec![0; 200 << 20].into());
    let mut bytes = Vec::new();
    let encoder = png::Encoder::with_info(&mut bytes, info).unwrap();
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(&[128]).unwrap();
    writer.finish().unwrap();
    let read = picture(&bytes, &ReadLimits::default());
    assert!(read.metadata.icc.is_none());
}

#[test]
fn a_checkpoint_a_pickle_or_a_huge_file_is_refused_by_its_beginning() {
    let folder = tempfile::tempdir().unwrap();
    let tensors: Vec<String> = (0..500u64)
        .map(|i| {
            let (start, end) = (i << 31, (i + 1) << 31);
            format!(
                r#""down.{i}.weight": {{"dtype": "F16", "shape": [1024, 1048576], "data_offsets": [{start}, {end}]}}"#
            )
        })
        .collect();
    let header = format!("{{{}}}", tensors.join(", "));
    let checkpoint = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    let entry = |name: &str| {
        let length = (name.len() as u16).to_le_bytes();
        [
            &b"PK\x03\x04"[..],
            &[0; 22],
            &length,
            &[0; 2],
            name.as_bytes(),
        ]
        .concat()
    };
    for (name, head, reason) in [
        (
            "checkpoint.safetensors",
            &checkpoint[..],
            "looks like a model's weights",
        ),
        ("model.ckpt", &entry("archive/data.pkl"), "PyTorch"),
        ("huge.npz", &entry("latents.npy"), "--max-pixels"),
        ("huge.png", b"\x89PNG\r\n\x1a\n", "--max-pixels"),
        ("huge.tif", b"II*\0\x08\0\0\0", "--max-pixels"),
        (
            "header.safetensors",
            b"\0\0\0\x10\0\0\0\0{\"latents\"",
            "--max-pixels",
        ),
    ] {
        let path = folder.path().join(name);
        huge(&path, head);
        let error = files::read_path(&path, &ReadLimits::default()).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains(reason) && error.contains(name), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    assert!(largest_allocation() < 1 << 30);
}

#[test]
fn compressed_latents_are_unpacked_as_far_as_their_header_says_and_no_further() {
    let npz = |header: &str, data: usize| {
        let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        let options = zip::write::SimpleFileOptions::default();
        zip.start_file("latents.npy", options).unwrap();
        let length = (header.len() as u16).to_le_bytes();
        zip.write_all(&[b"\x93NUMPY\x01\0", &length[..], header.as_bytes()].concat())
            .unwrap();
        let zeros = vec![0; 1 << 20];
        for _ in 0..data >> 20 {
            zip.write_all(&zeros).unwrap();
        }
        zip.finish().unwrap().into_inner()
    };
    let header =
        |shape: &str| format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}");
    for (shape, data, reason) in [
        // 2 GB in 2 MB: the header asks for 4 KB.
        ("(4, 16, 16)", 64 << 20, "but has more"),
        // The header asks for 1 GB.
        ("(1000000, 4, 8, 8)", 0, "--max-pixels"),
        ("(4, 100000, 100000)", 0, "--max-pixels"),
        ("(4, 8, 8)", 0, "but has 0"),
    ] {
        let bytes = npz(&header(shape), data);
        let error = files::read_bytes(&bytes, "the file", &ReadLimits::default()).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains(reason), "{shape}: {error}");
    }
    assert!(largest_allocation() < 1 << 30);
}

#[test]
fn blocks_whose_directories_lie_in_their_header_or_in_each_other_are_written_over_in_every_format()
{
    let small = data("files/rgb.png");
    let bytes = std::fs::read(small).unwrap();
    let mut broken = Vec::new();
    for (head, main) in [
        (b"II*\0", 0u32),
        (b"II*\0", 2),
        (b"II*\0", 4),
        (b"II*\0", 6),
    ] {
        // As many fields as the header's own bytes count, of the type that most is.
        let mut block = [&head[..], &main.to_le_bytes()].concat();
        let field = [0x69, 0x87, 4, 0, 1, 0, 0, 0, main as u8, 0, 0, 0];
        while block.len() < 300_000 {
            block.extend(field);
        }
        broken.push(block);
    }
    // 500 fields that share a value of 1.5 MB.
    let mut shared = b"II*\0\x08\0\0\0\xf4\x01".to_vec();
    for i in 0..500u16 {
        shared.extend(
            [
                &(0x9C00 + i).to_le_bytes()[..],
                &[2, 0],
                &1_500_000u32.to_le_bytes(),
                &6100u32.to_le_bytes(),
            ]
            .concat(),
        );
    }
    shared.resize(6100 + 1_500_000, 65);
    broken.push(shared);
    for block in broken {
        let mut read = picture(&bytes, &ReadLimits::default());
        let length = block.len();
        read.metadata.exif = Some(block);
        for format in [Format::Png, Format::Jpeg, Format::WebP, Format::Tiff] {
            let written = encode(&read, format, None).unwrap();
            let lost = written.warnings.join("; ");
            assert!(lost.contains("damaged"), "{}: {lost}", format.name());
            let most = 3 * length + (1 << 20);
            assert!(written.bytes.len() < most, "{} bytes", written.bytes.len());
        }
    }
    assert!(largest_allocation() < 1 << 30);
}

#[test]
fn blocks_that_the_fuzzer_found_are_written_in_every_format_with_our_settings_in_them() {
    let bytes = std::fs::read(data("files/rgb.png")).unwrap();
    let settings = Parameters {
        prompt: "a lighthouse".into(),
        negative_prompt: String::new(),
        fields: [("Steps", "20"), ("Seed", "7"), ("Upscaler", "sd-upscale")]
            .map(|(key, value)| (key.into(), value.into()))
            .into(),
    };
    let mut tried = 0;
    for file in std::fs::read_dir(data("fuzz/exif")).unwrap() {
        let file = file.unwrap().path();
        // The first byte is the fuzzer's choice of a format.
        let block = std::fs::read(&file).unwrap()[1..].to_vec();
        let mut read = picture(&bytes, &ReadLimits::default());
        let before = Metadata {
            exif: Some(block.clone()),
            ..Metadata::default()
        };
        let theirs = before.prompt();
        read.metadata = before;
        read.metadata.add_settings(&settings);
        for format in [Format::Png, Format::Jpeg, Format::WebP, Format::Tiff] {
            let written = encode(&read, format, None).unwrap();
            let again = picture(&written.bytes, &ReadLimits::default());
            let size = (again.pixels.width, again.pixels.height);
            assert_eq!(size, (read.pixels.width, read.pixels.height), "{file:?}");
            let prompt = again.metadata.prompt().map(|found| found.prompt);
            let want = theirs
                .as_ref()
                .map_or("a lighthouse", |found| &found.prompt);
            assert_eq!(
                prompt.as_deref(),
                Some(want),
                "{file:?} as {}",
                format.name()
            );
        }
        tried += 1;
    }
    assert_eq!(tried, 11);
}
