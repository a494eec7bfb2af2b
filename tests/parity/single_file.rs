//! Checkpoints in a single file, whose tensors the tests write as tests/data/single_file.py does, against what diffusers' `from_single_file` made of
//! them, and against the same in a folder.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use half::f16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use sd_upscale::device::Placement;
use sd_upscale::model::{PartFiles, locate_base};
use sd_upscale::networks::Room;
use sd_upscale::networks::text::Tokenizer;
use sd_upscale::networks::vae::{Decoder, Encoder};
use sd_upscale::pipeline::base::{BaseModel, BaseSettings};
use sd_upscale::pipeline::noise::Generator;
use sd_upscale::{ModelFiles, Options, Upscaler};
use serde_json::Value;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::STAGE;
use crate::common::*;

/// Of four steps with guidance of 3: 3e-6 is seen, and two names exchanged move it by 8e-3 at least (`single_file.py --check`).
const LATENTS: f64 = 1e-4;

const VERSIONS: [&str; 2] = ["1", "2"];

/// A tensor of the file.
struct Row {
    /// In diffusers, as `part/name`: none of what is passed over, three of what is cut.
    names: Vec<String>,
    shape: Vec<usize>,
    mean: f32,
    spread: f32,
}

/// What the script says of the small checkpoint of a version.
struct Small {
    all: Value,
    version: &'static str,
    rows: BTreeMap<String, Row>,
}

impl Small {
    fn of(version: &'static str) -> Self {
        let text = std::fs::read(data("base/single_file.json")).unwrap();
        let all: Value = serde_json::from_slice(&text).unwrap();
        let mut rows = BTreeMap::new();
        gather(&all["small"][version]["tensors"], "", &mut rows);
        assert!(rows.len() > 500);
        Self { all, version, rows }
    }

    fn case(&self, key: &str) -> &Value {
        &self.all["small"][self.version][key]
    }

    fn settings(&self) -> BaseSettings {
        let text = |key: &str| self.all[key].as_str().unwrap().to_owned();
        BaseSettings {
            prompt: text("prompt"),
            negative_prompt: text("negative_prompt"),
            steps: self.case("steps").as_u64().unwrap() as usize,
            guidance: self.case("guidance").as_f64().unwrap(),
        }
    }

    fn dtype(&self) -> Dtype {
        match self.case("dtype").as_str().unwrap() {
            "F16" => Dtype::F16,
            _ => Dtype::F32,
        }
    }

    /// The tensors of the file under what `rename` makes of their keys; None leaves one out.
    fn tensors(&self, rename: impl Fn(&str) -> Option<String>) -> Vec<(String, &Row, Vec<u8>)> {
        let rows = self.rows.iter();
        rows.filter_map(|(key, row)| Some((rename(key)?, row, row.bytes(key, self.dtype()))))
            .collect()
    }

    fn write(&self, path: &Path, rename: impl Fn(&str) -> Option<String>) {
        let tensors = self.tensors(rename);
        let views = tensors.iter().map(|(key, row, bytes)| {
            let view = TensorView::new(self.dtype(), row.shape.clone(), bytes).unwrap();
            (key.clone(), view)
        });
        safetensors::serialize_to_file(views, None, path).unwrap();
    }

    /// The same as `torch.save` writes it, all tensors in one storage, in the `state_dict` of a training.
    fn write_pickled(&self, path: &Path) {
        let (kind, width) = match self.dtype() {
            Dtype::F16 => ("Half", 2),
            _ => ("Float", 4),
        };
        let tensors = self.tensors(|key| Some(key.to_owned()));
        let values: Vec<u8> = tensors
            .iter()
            .flat_map(|(_, _, bytes)| bytes.clone())
            .collect();
        let text = |text: &str| {
            [
                b"X",
                &(text.len() as u32).to_le_bytes()[..],
                text.as_bytes(),
            ]
            .concat()
        };
        let number = |number: usize| [b"J", &(number as u32).to_le_bytes()[..]].concat();
        let tuple = |numbers: &[usize]| {
            let numbers: Vec<u8> = numbers.iter().flat_map(|&size| number(size)).collect();
            [b"(", &numbers[..], b"t"].concat()
        };
        let mut pickle = b"\x80\x02}(".to_vec();
        pickle.extend(
            [
                text("global_step"),
                number(470_000),
                text("state_dict"),
                b"}(".to_vec(),
            ]
            .concat(),
        );
        let mut offset = 0;
        for (key, row, bytes) in &tensors {
            let sizes = row.shape.iter();
            let strides: Vec<usize> = (0..row.shape.len())
                .map(|i| sizes.clone().skip(i + 1).product())
                .collect();
            let storage = format!("ctorch\n{kind}Storage\n");
            pickle.extend(text(key));
            pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
            pickle.extend(
                [
                    text("storage"),
                    storage.into_bytes(),
                    text("0"),
                    text("cpu"),
                    number(values.len() / width),
                    b"tQ".to_vec(),
                ]
                .concat(),
            );
            pickle.extend([number(offset), tuple(&row.shape), tuple(&strides)].concat());
            pickle.extend(b"\x89ccollections\nOrderedDict\n)RtR");
            offset += bytes.len() / width;
        }
        pickle.extend(b"uu.");
        let mut zip = ZipWriter::new(std::fs::File::create(path).unwrap());
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        for (name, content) in [("archive/data.pkl", pickle), ("archive/data/0", values)] {
            zip.start_file(name, options).unwrap();
            zip.write_all(&content).unwrap();
        }
        zip.finish().unwrap();
    }

    fn latents(&self, files: &ModelFiles, placement: &Placement) -> Tensor {
        let side = |i: usize| self.case("size")[i].as_u64().unwrap() as usize / 8;
        let mut base = BaseModel::new(files.clone(), placement).unwrap();
        let mut generator = Generator::new(self.case("seed").as_u64().unwrap());
        let (sides, room) = ((side(1), side(0)), Room::unlimited());
        base.generate(sides, &self.settings(), &mut generator, &room, &mut |_| {
            Ok(())
        })
        .unwrap()
    }
}

fn gather(tree: &Value, prefix: &str, rows: &mut BTreeMap<String, Row>) {
    for (key, value) in tree.as_object().unwrap() {
        let key = format!("{prefix}{key}");
        let Some(row) = value.as_array() else {
            gather(value, &format!("{key}."), rows);
            continue;
        };
        let each = |i: usize| row[i].as_array().unwrap().iter();
        let row = Row {
            names: each(0)
                .map(|name| name.as_str().unwrap().to_owned())
                .collect(),
            shape: each(1)
                .map(|size| size.as_u64().unwrap() as usize)
                .collect(),
            mean: row[2].as_f64().unwrap() as f32,
            spread: row[3].as_f64().unwrap() as f32,
        };
        rows.insert(key, row);
    }
}

impl Row {
    /// The script's `value`.
    fn bytes(&self, key: &str, dtype: Dtype) -> Vec<u8> {
        let fnv = |seed: u64, byte: u8| (seed ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        let seed = key.bytes().fold(0xcbf2_9ce4_8422_2325, fnv);
        let mut bytes = Vec::new();
        for number in 1..=self.shape.iter().product::<usize>() as u64 {
            let z = seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let uniform = ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0;
            let value = self.mean + self.spread * uniform;
            match dtype {
                Dtype::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
                _ => bytes.extend(value.to_le_bytes()),
            }
        }
        bytes
    }
}

/// The small checkpoint of a version in a file of its own, opened with the upscaler's own vocabulary.
fn opened(small: &Small) -> (tempfile::TempDir, ModelFiles) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file.safetensors");
    small.write(&path, |key| Some(key.to_owned()));
    // As --base finds it.
    let name = path.display().to_string();
    let no_hub = || anyhow::bail!("nothing is fetched");
    let files = locate_base(&name, "main", &[], &model(), no_hub).unwrap();
    (folder, files)
}

fn vae(files: &ModelFiles) -> PartFiles {
    PartFiles {
        files: files.clone(),
        part: "vae",
        weights: None,
    }
}

#[test]
fn a_single_file_gives_the_latents_and_pictures_that_diffusers_makes_of_it() {
    let reference = Reference::read("single_file");
    for version in VERSIONS {
        let small = Small::of(version);
        let (_folder, files) = opened(&small);
        let get = |key: &str| reference.get(&format!("{version}.{key}"));
        for (name, placement) in placements(DType::F32) {
            let what = format!("{name} {version}.x");
            assert_close(
                &what,
                &small.latents(&files, &placement),
                &get("latents"),
                LATENTS,
            );
            let decoder = Decoder::load(&vae(&files), &placement).unwrap();
            let picture = decoder.decode(&get("decode.latents")).unwrap();
            assert_close(
                &format!("{what} decoded"),
                &picture,
                &get("decode.picture"),
                STAGE,
            );
            let encoder = Encoder::load(&vae(&files), &placement).unwrap();
            let clamped = get("decode.picture").clamp(-1f32, 1f32).unwrap();
            let posterior = encoder.encode(&clamped).unwrap();
            assert_close(
                &format!("{what} encoded"),
                &posterior.mean,
                &get("encode.mean"),
                STAGE,
            );
        }
    }
}

/// Names and values of a part's weights.
fn tensors(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let bytes = std::fs::read(path).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    all.iter()
        .map(|(name, tensor)| (name.to_owned(), tensor.data().to_vec()))
        .collect()
}

#[test]
fn a_single_file_and_the_folder_made_of_it_are_one_model_to_the_bit() {
    for version in VERSIONS {
        let small = Small::of(version);
        let (place, files) = opened(&small);
        let folder = place.path().join("folder");
        files.save(&folder, None, &mut || Ok(())).unwrap();
        // Every tensor is there under diffusers' name, with the values of its part of the file's.
        let mut expected = BTreeMap::new();
        for (key, row) in &small.rows {
            let bytes = row.bytes(key, small.dtype());
            let parts = bytes.chunks(bytes.len() / row.names.len().max(1));
            expected.extend(row.names.iter().cloned().zip(parts.map(<[u8]>::to_vec)));
        }
        let mut found = BTreeMap::new();
        for (part, stem) in [
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
            ("text_encoder", "model"),
        ] {
            let tensors = tensors(&folder.join(part).join(format!("{stem}.safetensors")));
            found.extend(
                tensors
                    .into_iter()
                    .map(|(name, bytes)| (format!("{part}/{name}"), bytes)),
            );
        }
        let spelled = |names: &BTreeMap<String, Vec<u8>>| names.keys().cloned().collect::<Vec<_>>();
        assert_eq!(spelled(&found), spelled(&expected));
        assert!(found == expected, "the values of {version}.x");
        let placement = Placement::new(&Device::Cpu, DType::F32);
        let folder = ModelFiles::Folder(folder);
        assert_eq!(
            values(&small.latents(&files, &placement)),
            values(&small.latents(&folder, &placement))
        );
    }
}

#[test]
fn a_pickled_file_is_the_same_model_to_the_bit() {
    for version in VERSIONS {
        let small = Small::of(version);
        let (place, files) = opened(&small);
        let path = place.path().join("file.ckpt");
        small.write_pickled(&path);
        let pickled = ModelFiles::single_file(&path, model()).unwrap();
        for part in ["unet", "vae", "text_encoder"] {
            let config = format!("{part}/config.json");
            assert_eq!(pickled.read(&config).unwrap(), files.read(&config).unwrap());
        }
        let placement = Placement::new(&Device::Cpu, DType::F32);
        assert_eq!(
            values(&small.latents(&pickled, &placement)),
            values(&small.latents(&files, &placement))
        );
    }
}

#[test]
fn float32_values_are_used_where_the_file_has_them() {
    let (_folder, files) = opened(&Small::of("2"));
    let placement = Placement {
        weights_in_place: true,
        ..Placement::new(&Device::Cpu, DType::F32)
    };
    let in_file = |part: &str, shape: &[usize], name: &str| {
        let weights = files.weights(part, "model", &placement).unwrap();
        let values = weights.in_file(shape, name).unwrap();
        let values = values.unwrap_or_else(|| panic!("{name} is copied"));
        assert_eq!(values[..], weights.f32(shape, name).unwrap()[..], "{name}");
    };
    in_file("unet", &[64, 4, 3, 3], "conv_in.weight");
    in_file(
        "vae",
        &[64, 64],
        "encoder.mid_block.attentions.0.to_q.weight",
    );
    // The second of three parts of one tensor.
    in_file(
        "text_encoder",
        &[64, 64],
        "text_model.encoder.layers.1.self_attn.k_proj.weight",
    );
}

#[test]
fn the_vocabulary_is_the_upscalers_with_the_versions_own_padding() {
    for (version, pad) in [("1", None), ("2", Some(0))] {
        let (_folder, files) = opened(&Small::of(version));
        let tokenizer = Tokenizer::new(&files, 77).unwrap();
        let own = Tokenizer::new(&model(), 77)
            .unwrap()
            .encode("a cat!")
            .unwrap()
            .ids;
        let ids = tokenizer.encode("a cat!").unwrap().ids;
        match pad {
            None => assert_eq!(ids, own),
            Some(pad) => {
                assert_eq!(ids.last(), Some(&pad));
                assert_eq!(ids[..3], own[..3]);
                assert_ne!(ids, own);
            }
        }
        let part = files.weights(
            "tokenizer",
            "model",
            &Placement::new(&Device::Cpu, DType::F32),
        );
        assert!(
            part.err()
                .unwrap()
                .to_string()
                .contains("no part `tokenizer`")
        );
        let name = files.name("unet/config.json");
        assert!(
            name.ends_with("file.safetensors: unet/config.json"),
            "{name}"
        );
        assert!(
            files
                .name("tokenizer/vocab.json")
                .ends_with("model/tokenizer/vocab.json")
        );
    }
}

#[test]
fn the_upscaler_takes_it_for_its_base_at_the_size_of_its_training() {
    for (version, side) in [("1", 512), ("2", 768)] {
        let (_folder, files) = opened(&Small::of(version));
        let mut upscaler = Upscaler::new(Options::new(model())).unwrap();
        upscaler.set_base(files).unwrap();
        assert_eq!(upscaler.base_size().unwrap(), (side, side));
        upscaler.check_base_vae().unwrap();
    }
}

#[test]
fn a_tensor_that_is_missing_is_named_with_its_file() {
    let small = Small::of("1");
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("file.safetensors");
    small.write(&path, |key| {
        (key != "model.diffusion_model.time_embed.2.bias").then(|| key.to_owned())
    });
    let files = ModelFiles::single_file(&path, model()).unwrap();
    let mut base = BaseModel::new(files, &Placement::new(&Device::Cpu, DType::F32)).unwrap();
    let (mut generator, room) = (Generator::new(1), Room::unlimited());
    let error = base
        .generate(
            (8, 8),
            &small.settings(),
            &mut generator,
            &room,
            &mut |_| Ok(()),
        )
        .unwrap_err();
    let text = format!("{error:#}");
    assert!(
        text.contains("file.safetensors") && text.contains("`time_embedding.linear_2.bias`"),
        "{text}"
    );
}
