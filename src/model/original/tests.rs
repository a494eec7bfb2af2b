//! What `torch.save` wrote is read value for value; what was made to harm, is damaged or is another model's is refused.
//! The files are written by tests/data/original.py.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use super::super::published::PUBLISHED_CONFIGURATIONS;
use super::*;

/// Tensors by name, of which the shape alone counts.
type Shapes = HashMap<String, Vec<usize>>;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name)
}

fn read(name: &str) -> Vec<u8> {
    fs::read(data(&format!("torch/{name}"))).unwrap()
}

/// Why a file is refused, in a line.
fn refusal(bytes: &[u8]) -> String {
    let error = tensors(bytes).expect_err("it is refused");
    let text = format!("{error:#}");
    assert!(!text.contains('\n') && text.len() < 600, "{text}");
    text
}

/// Every value of what was read, as the program would use it.
fn weights(bytes: &[u8], found: HashMap<String, Entry>) -> Weights {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    // SAFETY: the file has no name, so that nobody else writes to it.
    let map = unsafe { Mmap::map(&file) }.unwrap();
    Weights::mapped("a file".into(), Arc::new(map), found.into_iter().collect())
}

#[test]
fn tensors_of_every_form_are_read_value_for_value() {
    let expected = read("expected.safetensors");
    let expected = SafeTensors::deserialize(&expected).unwrap();
    for name in ["zip.pth", "zip-protocol-4.pth", "legacy.pth"] {
        let bytes = read(name);
        let found = tensors(&bytes).unwrap_or_else(|error| panic!("{name}: {error:#}"));
        let shapes: BTreeMap<String, Vec<usize>> = found
            .iter()
            .map(|(key, entry)| (key.clone(), entry.shape().to_vec()))
            .collect();
        let weights = weights(&bytes, found);
        let mut floats = 0;
        for (key, tensor) in expected.tensors() {
            if name == "legacy.pth" && key == "uint16" {
                continue; // of which legacy files have no storage
            }
            assert_eq!(shapes[&key], tensor.shape(), "{name}: {key}");
            assert_eq!(weights.raw(&key).unwrap(), tensor.data(), "{name}: {key}");
            if tensor.dtype() == Dtype::F32 {
                let values = weights.f32(tensor.shape(), &key).unwrap();
                let bytes: Vec<u8> = values
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect();
                assert_eq!(bytes, tensor.data(), "{name}: {key}");
                floats += 1;
            }
        }
        assert!(floats >= 10, "{name}: {floats} tensors of float32");
        assert_eq!(
            shapes.len() + usize::from(name == "legacy.pth"),
            expected.len()
        );
    }
}

#[test]
fn what_would_run_something_is_named_wherever_it_stands() {
    let evil = fs::read_dir(data("torch"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    let evil: Vec<String> = evil
        .filter_map(|name| name.into_string().ok())
        .filter(|name| name.starts_with("evil-"))
        .collect();
    assert!(evil.len() >= 9, "{evil:?}");
    for name in evil {
        let refusal = refusal(&read(&name));
        for part in ["`posix system`", "nothing in the file was run"] {
            assert!(refusal.contains(part), "{name}: {refusal}");
        }
    }
}

/// Files of other programs' tests: tests/data/torch/others/README.md.
#[test]
fn files_that_others_wrote_are_read_or_refused_in_a_line() {
    let (mut read, mut refused) = (Vec::new(), 0);
    for entry in fs::read_dir(data("torch/others")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if name.starts_with("LICENSE") || name.starts_with("README") {
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        match Saved::read(&bytes) {
            Ok(saved) => {
                for tensor in saved.objects.tensors() {
                    let place = saved.place(&tensor.storage).unwrap();
                    assert!(extent(tensor, &place).unwrap().end <= bytes.len(), "{name}");
                }
                read.push((name, saved.objects.tensors().count()));
            }
            Err(error) => {
                let text = format!("{error:#}");
                assert!(!text.contains('\n') && text.len() < 400, "{name}: {text}");
                refused += 1;
            }
        }
    }
    read.sort();
    let sound = [
        "fortran_tensor_3d.pth",
        "new_pytorch_model.bin",
        "test.pt",
        "test_with_key.pt",
    ];
    let names: Vec<&str> = read.iter().map(|(name, _)| &**name).collect();
    assert_eq!(names, sound);
    assert!(
        read.iter().filter(|(_, tensors)| *tensors > 0).count() >= 3,
        "{read:?}"
    );
    assert_eq!(refused, 14);
}

/// A pickle of protocol 2 as it would be of a zip.
fn zipped(pickle: &[u8], others: &[(&str, &[u8])], method: CompressionMethod) -> Vec<u8> {
    let mut zip = ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(method);
    for (name, content) in [("a/data.pkl", pickle)].iter().chain(others) {
        zip.start_file(*name, options).unwrap();
        zip.write_all(content).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn stored(pickle: &[u8]) -> Vec<u8> {
    let storage = [0; 64];
    zipped(pickle, &[("a/data/0", &storage)], CompressionMethod::Stored)
}

/// `{"model_ema": {"w": VALUE}}`
fn checkpoint(value: &[u8]) -> Vec<u8> {
    let around: [&[u8]; 3] = [b"\x80\x02}X\x09\0\0\0model_ema}X\x01\0\0\0w", value, b"ss."];
    around.concat()
}

/// A tensor of a storage of `count` float32 values.
fn tensor(count: &[u8], offset: &[u8], shape: &[u8], strides: &[u8]) -> Vec<u8> {
    let storage: [&[u8]; 3] = [
        b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu",
        count,
        b"tQ",
    ];
    let parts: [&[u8]; 6] = [
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        &storage.concat(),
        offset,
        shape,
        strides,
        b"\x89ccollections\nOrderedDict\n)RtR",
    ];
    checkpoint(&parts.concat())
}

#[test]
fn a_tensor_is_read_only_where_it_lies_within_its_storage() {
    let sixteen = b"K\x10";
    let found = tensors(&stored(&tensor(
        sixteen,
        b"K\x00",
        b"K\x04K\x04\x86",
        b"K\x04K\x01\x86",
    )));
    assert_eq!(found.unwrap()["w"].shape(), [4, 4]);
    let none = tensors(&stored(&tensor(
        sixteen,
        b"K\x00",
        b"K\x00\x85",
        b"K\x01\x85",
    )));
    assert_eq!(none.unwrap()["w"].shape(), [0]);

    let large = b"\x8a\x07\0\0\0\0\0\0\x10";
    let none = [b"K\x00", &large[..], large, b"\x87"].concat();
    let none = tensors(&stored(&tensor(sixteen, b"K\x00", &none, &none)));
    assert_eq!(none.unwrap()["w"].bytes(), 0);

    let huge = b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f";
    let twice_huge = [&huge[..], huge, b"\x86"].concat();
    let negative = b"J\xff\xff\xff\xff";
    for (what, pickle, words) in [
        (
            "offset",
            tensor(sixteen, b"K\x01", b"K\x10\x85", b"K\x01\x85"),
            "beyond its storage",
        ),
        (
            "stride",
            tensor(sixteen, b"K\x00", b"K\x04\x85", b"K\x06\x85"),
            "beyond its storage",
        ),
        (
            "a stride of 0",
            tensor(sixteen, b"K\x00", b"M\xff\xff\x85", b"K\x00\x85"),
            "beyond its storage",
        ),
        (
            "shape",
            tensor(sixteen, b"K\x00", &twice_huge, b"K\x01K\x01\x86"),
            "beyond its storage",
        ),
        (
            "strides",
            tensor(sixteen, b"K\x00", b"K\x02K\x02\x86", &twice_huge),
            "beyond its storage",
        ),
        (
            "storage",
            tensor(b"K\x11", b"K\x00", b"K\x04\x85", b"K\x01\x85"),
            "64 bytes, where 17 values",
        ),
        (
            "a huge storage",
            tensor(huge, b"K\x00", b"K\x04\x85", b"K\x01\x85"),
            "cut short",
        ),
        (
            "a size of nine bytes",
            tensor(
                sixteen,
                b"K\x00",
                b"\x8a\x09\x04\0\0\0\0\0\0\0\x01\x85",
                b"K\x01\x85",
            ),
            "put together",
        ),
        (
            "a negative offset",
            tensor(sixteen, negative, b"K\x04\x85", b"K\x01\x85"),
            "put together",
        ),
        (
            "a negative size",
            tensor(
                sixteen,
                b"K\x00",
                &[&negative[..], b"\x85"].concat(),
                b"K\x01\x85",
            ),
            "put together",
        ),
        (
            "a stride too many",
            tensor(sixteen, b"K\x00", b"K\x04\x85", b"K\x01K\x01\x86"),
            "put together",
        ),
        (
            "nine dimensions",
            tensor(
                sixteen,
                b"K\x00",
                b"(K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01t",
                b"(K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01t",
            ),
            "put together",
        ),
        ("no tensor", checkpoint(b"K\x07"), "`w` is no tensor"),
        (
            "a tensor twice",
            checkpoint(b"K\x07sX\x01\0\0\0wK\x07"),
            "`w` is no tensor",
        ),
        (
            "another root",
            b"\x80\x02}.".to_vec(),
            "no dict `model_ema`",
        ),
    ] {
        let refusal = refusal(&stored(&pickle));
        assert!(refusal.contains(words), "{what}: {refusal}");
    }
}

#[test]
fn pickles_that_are_made_to_take_memory_or_the_stack_are_refused_or_small() {
    // Each list holds the one before ten times: read as what they stand for, 10^30 objects.
    let mut doubling = b"\x80\x02]q\0".to_vec();
    for level in 0..30 {
        doubling.extend(
            [
                b"](".to_vec(),
                [b'h', level].repeat(10),
                vec![b'e', b'q', level + 1],
            ]
            .concat(),
        );
    }
    doubling.push(b'.');
    assert!(refusal(&stored(&doubling)).contains("model_ema"));
    let nested = [
        b"\x80\x02)".to_vec(),
        b"\x85".repeat(900_000),
        b".".to_vec(),
    ]
    .concat();
    assert!(refusal(&stored(&nested)).contains("model_ema"));
    let many = [b"\x80\x02(".to_vec(), b"N".repeat(1 << 21), b"t.".to_vec()].concat();
    assert!(refusal(&stored(&many)).contains("objects"));
    let marks = [b"\x80\x02".to_vec(), b"(".repeat(1 << 20), b".".to_vec()].concat();
    assert!(refusal(&stored(&marks)).contains("damaged"));
    let within_itself = b"\x80\x02]q\0h\0a.";
    assert!(refusal(&stored(within_itself)).contains("model_ema"));
    for (what, pickle) in [
        (
            "a text",
            &b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\x7f"[..],
        ),
        ("bytes", b"\x80\x02B\xff\xff\xff\xffx."),
        ("a name", b"\x80\x02cos"),
        ("an empty stack", b"\x80\x02R."),
        ("the stack below a mark", b"\x80\x02K\x01(a."),
        ("an extension", b"\x80\x02\x82\x01."),
        ("an instance", b"\x80\x02(iposix\nsystem\n."),
        ("what is not remembered", b"\x80\x02h\x07."),
        ("a call of a number", b"\x80\x02K\x01)R."),
        ("a storage of nothing", b"\x80\x02)Q."),
        ("the state of a number", b"\x80\x02K\x01}b."),
        ("no end", b"\x80\x02}"),
    ] {
        let refusal = refusal(&stored(pickle));
        assert!(refusal.contains("pickle"), "{what}: {refusal}");
    }
}

/// A file's entries, which `change` may, as a zip of its own.
fn rewritten(
    name: &str,
    method: CompressionMethod,
    change: impl Fn(&str, &mut Vec<u8>),
) -> Vec<u8> {
    let mut zip = ZipArchive::new(std::io::Cursor::new(read(name))).unwrap();
    let mut entries = Vec::new();
    for number in 0..zip.len() {
        let mut entry = zip.by_index(number).unwrap();
        let name = entry.name().unwrap().into_owned();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        change(&name, &mut content);
        entries.push((name, content));
    }
    let mut write = ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, content) in entries {
        let options = SimpleFileOptions::default().compression_method(method);
        write.start_file(name, options).unwrap();
        write.write_all(&content).unwrap();
    }
    write.finish().unwrap().into_inner()
}

#[test]
fn zips_that_torch_save_does_not_write_are_refused() {
    let plain = rewritten("zip.pth", CompressionMethod::Stored, |_, _| ());
    assert!(tensors(&plain).is_ok());
    let big = |name: &str, content: &mut Vec<u8>| {
        if name.ends_with("/byteorder") {
            *content = b"big".to_vec();
        }
    };
    let big = rewritten("zip.pth", CompressionMethod::Stored, big);
    assert!(refusal(&big).contains("big-endian"));
    let packed = rewritten("zip.pth", CompressionMethod::Deflated, |_, _| ());
    assert!(refusal(&packed).contains("packed or encrypted"));
    let short = |name: &str, content: &mut Vec<u8>| {
        if name.contains("/data/") {
            content.pop();
        }
    };
    let short = rewritten("zip.pth", CompressionMethod::Stored, short);
    assert!(refusal(&short).contains("cut short"));
    let program = zipped(
        b"\x80\x02}.",
        &[("a/constants.pkl", b"")],
        CompressionMethod::Stored,
    );
    assert!(refusal(&program).contains("TorchScript"));
    let two = zipped(
        b"\x80\x02}.",
        &[("b/data.pkl", b"")],
        CompressionMethod::Stored,
    );
    assert!(refusal(&two).contains("more than one data.pkl"));
    let none = zipped(
        &tensor(b"K\x10", b"K\x00", b"K\x04\x85", b"K\x01\x85"),
        &[],
        CompressionMethod::Stored,
    );
    assert!(refusal(&none).contains("`0` is missing"));
    assert!(refusal(b"\x93NUMPY").contains("no file of PyTorch's"));
    assert!(refusal(b"").contains("no file of PyTorch's"));
}

#[test]
fn a_legacy_file_of_another_machine_or_version_is_refused() {
    let legacy = read("legacy.pth");
    let with = |from: &[u8], to: &[u8]| {
        let at = legacy
            .windows(from.len())
            .position(|window| window == from)
            .unwrap();
        let mut changed = legacy.clone();
        changed[at..at + to.len()].copy_from_slice(to);
        changed
    };
    let order = b"little_endianq\x02\x88";
    assert!(refusal(&with(order, b"little_endianq\x02\x89")).contains("big-endian"));
    assert!(refusal(&with(b"M\xe9\x03", b"M\xea\x03")).contains("version"));
    assert!(refusal(&with(b"\x8a\x0a\x6c", b"\x8a\x0a\x6d")).contains("not PyTorch's"));
    assert!(refusal(&legacy[..legacy.len() - 1]).contains("cut short"));
    assert!(refusal(&[&legacy[..], b"x"].concat()).contains("behind its end"));
}

/// Damage everywhere: an error, or tensors all of whose values are there. A pseudo-random walk of fixed seed.
#[test]
fn a_damaged_file_is_refused_or_sound() {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let (mut sound, mut refused) = (0, 0);
    for name in [
        "zip.pth",
        "zip-protocol-4.pth",
        "legacy.pth",
        "evil-late.pth",
    ] {
        let whole = read(name);
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            match at % 4 {
                0 => damaged.truncate(at),
                1 => damaged[at] ^= 1 << random(8),
                2 => damaged[at] = [0, 0x7f, 0x80, 0xff, b'.', b'R', b'h'][random(7)],
                _ => {
                    let from = random(whole.len());
                    let length = random(32).min(whole.len() - from);
                    damaged.splice(at..at, whole[from..from + length].to_vec());
                }
            }
            let Ok(found) = tensors(&damaged) else {
                refused += 1;
                continue;
            };
            assert_ne!(name, "evil-late.pth", "byte {at} makes it harmless");
            sound += 1;
            for (key, entry) in &found {
                let range = entry.range();
                assert!(range.end <= damaged.len(), "{name}, byte {at}: {key}");
                let values = entry.in_order(&damaged[range]);
                assert_eq!(values.len(), entry.bytes(), "{name}, byte {at}: {key}");
                assert!(values.len() <= damaged.len());
            }
        }
    }
    assert!(
        sound > 1000 && refused > 5000,
        "{sound} sound, {refused} refused"
    );
}

// ---- the latent upscaler --------------------------------------------------------------------------------------------

/// The published network's tensors by name, each alone in a storage of its own.
fn published(side: &str) -> Shapes {
    let text = fs::read(data("original/published.json")).unwrap();
    let mut both: Value = serde_json::from_slice(&text).unwrap();
    serde_json::from_value(both[side].take()).unwrap()
}

fn entries(shapes: Shapes) -> HashMap<String, Entry> {
    let entry = |(key, shape): (String, Vec<usize>)| {
        let count: usize = shape.iter().product();
        let mut strides = vec![1; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i] * shape[i];
        }
        (
            key,
            Entry::of_strides(Dtype::F32, shape, strides, 0..4 * count),
        )
    };
    shapes.into_iter().map(entry).collect()
}

#[test]
fn the_published_sizes_give_the_published_configuration_and_its_names() {
    let network = names::to_diffusers(entries(published("original"))).unwrap();
    let (_, text) = PUBLISHED_CONFIGURATIONS[0];
    let expected: BTreeMap<String, Value> = serde_json::from_slice(text).unwrap();
    for (key, value) in expected {
        assert_eq!(network.config[&key], value, "{key}");
    }
    let names = network.tensors.iter();
    let mut found: HashMap<String, Vec<usize>> = names
        .map(|(name, entry)| (name.clone(), entry.shape().to_vec()))
        .collect();
    assert_eq!(found.len(), network.tensors.len(), "each name once");
    assert_eq!(
        found.remove("low_res_noise_embed.weight"),
        Some(vec![64, 1])
    );
    assert_eq!(found, published("diffusers"));
}

#[test]
fn a_checkpoint_of_another_model_is_refused_by_its_tensor() {
    let changed = |change: &dyn Fn(&mut Shapes)| {
        let mut shapes = published("original");
        change(&mut shapes);
        let error = names::to_diffusers(entries(shapes))
            .map(|_| ())
            .unwrap_err();
        format!("{error:#}")
    };
    let with = |key: &'static str, shape: &'static [usize]| {
        changed(&move |shapes| {
            shapes.insert(key.into(), shape.into());
        })
    };
    for key in [
        "inner_model.mapping.4.weight",
        "other.weight",
        "inner_model.u_net.d_blocks.1.2.fc.weight",
    ] {
        let refusal = with(key, &[1]);
        assert!(
            refusal.contains(key) && refusal.contains("another model"),
            "{refusal}"
        );
    }
    assert!(
        with(
            "inner_model.u_net.d_blocks.3.2.qkv_proj.weight",
            &[7, 768, 1, 1]
        )
        .contains("3 parts")
    );
    assert!(
        with(
            "inner_model.u_net.d_blocks.3.2.qkv_proj.weight",
            &[2304, 768, 3, 3]
        )
        .contains("expected 2 dimensions")
    );
    assert!(
        with("inner_model.u_net.d_blocks.1.9.qkv_proj.weight", &[1]).contains("self-attention")
    );
    assert!(
        with("inner_model.u_net.d_blocks.0.9.main.2.weight", &[1])
            .contains("level 0 has other layers")
    );
    assert!(with("inner_model.u_net.d_blocks.7.1.main.2.weight", &[1]).contains("in one row"));
    assert!(with("inner_model.mapping.0.weight", &[512, 512]).contains("has them alike"));
    assert!(
        changed(&|shapes| shapes.retain(|key, _| !key.contains("proj_in")))
            .contains("proj_in.weight` is missing")
    );
    assert!(changed(&HashMap::clear).contains("no blocks"));
}

#[test]
fn the_small_checkpoint_is_opened() {
    let checkpoint = Checkpoint::open(&data("original/upscaler.pth")).unwrap();
    let config: Value = serde_json::from_slice(checkpoint.config()).unwrap();
    assert_eq!(
        config["block_out_channels"],
        serde_json::json!([64, 128, 128])
    );
    assert_eq!(config["layers_per_block"], serde_json::json!([1, 2, 1]));
    let weights = checkpoint.weights(&Placement::new(&Device::Cpu, DType::F32));
    assert!(weights.contains("low_res_noise_embed.weight"));
    assert_eq!(weights.shape("time_proj.weight"), Some(&[64][..]));
    let missing = Checkpoint::open(Path::new("no such file.pth")).unwrap_err();
    assert!(missing.to_string().contains("cannot open no such file.pth"));
}
