//! The small model in every form that weights are handed around in gives the same picture.

use candle_core::safetensors::Load;
use candle_core::{DType, Device};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::setup::*;

const TEXT: &str = "text_encoder/model.safetensors";
const VAE: &str = "vae/diffusion_pytorch_model.safetensors";
const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
const UNET_INDEX: &str = "unet/diffusion_pytorch_model.safetensors.index.json";
const SHARDS: [&str; 2] = [
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
];

/// A tensor of a weights file, to change.
#[derive(Clone)]
struct Weight {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Weight {
    fn values(&self) -> Vec<f32> {
        let view = TensorView::new(self.dtype, self.shape.clone(), &self.bytes).unwrap();
        let tensor = view.load(&Device::Cpu).unwrap();
        let tensor = tensor.to_dtype(DType::F32).unwrap();
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The same values, rounded where `dtype` is narrower.
    fn into_dtype(mut self, dtype: Dtype) -> Self {
        let values = self.values().into_iter();
        self.bytes = match dtype {
            Dtype::F16 => values
                .flat_map(|v| f16::from_f32(v).to_le_bytes())
                .collect(),
            Dtype::BF16 => values
                .flat_map(|v| bf16::from_f32(v).to_le_bytes())
                .collect(),
            Dtype::F64 => values.flat_map(|v| f64::from(v).to_le_bytes()).collect(),
            _ => values.flat_map(f32::to_le_bytes).collect(),
        };
        self.dtype = dtype;
        self
    }
}

fn read(path: &Path) -> Vec<Weight> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let weight = |(name, tensor): (String, TensorView)| Weight {
        name,
        dtype: tensor.dtype(),
        shape: tensor.shape().to_vec(),
        bytes: tensor.data().to_vec(),
    };
    file.tensors().into_iter().map(weight).collect()
}

fn write(path: &Path, weights: &[Weight]) {
    let views = weights.iter().map(|w| {
        let view = TensorView::new(w.dtype, w.shape.clone(), &w.bytes).unwrap();
        (&w.name, view)
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// A copy of the small model in which a file's weights are changed.
fn changed(folder: &Path, file: &str, change: impl Fn(Weight) -> Weight) {
    let path = folder.join("model").join(file);
    let weights: Vec<Weight> = read(&path).into_iter().map(change).collect();
    write(&path, &weights);
}

fn input() -> TempDir {
    let folder = folder_of(&[("in.png", 24, 40)]);
    copy_of_model(folder.path());
    folder
}

/// The picture that `--model model` and these arguments make.
#[track_caller]
fn made(folder: &Path, arguments: &str) -> image::RgbImage {
    let arguments = format!("in.png -s 1 -p cat -o made.png --model model {arguments}");
    plain(folder, arguments.trim()).ends_in(0);
    image(folder.join("made.png")).to_rgb8()
}

/// The picture of the model as it is.
fn expected(folder: &Path) -> image::RgbImage {
    run(folder, "in.png -p cat -o expected.png").ends_in(0);
    image(folder.join("expected.png")).to_rgb8()
}

#[track_caller]
fn same_picture(folder: &Path, arguments: &str) {
    assert!(
        made(folder, arguments) == expected(folder),
        "another picture"
    );
}

#[test]
fn a_changed_vae_weight_changes_the_picture() {
    // Or else the other tests here would show nothing.
    let folder = input();
    changed(folder.path(), VAE, |mut weight| {
        if weight.name == "decoder.conv_out.bias" {
            weight.bytes[3] ^= 0x80;
        }
        weight
    });
    assert!(made(folder.path(), "") != expected(folder.path()));
    assert!(made(folder.path(), &vae(&data("model/vae"))) == expected(folder.path()));
}

fn vae(path: &Path) -> String {
    format!("--vae {}", path.display())
}

#[test]
fn a_vae_is_taken_from_a_folder_a_pipeline_or_a_file() {
    let folder = input();
    let elsewhere = folder.path().join("my.vae.safetensors");
    fs::copy(data("model").join(VAE), &elsewhere).unwrap();
    // The model's own is unusable, so the one named must be in use.
    fs::write(folder.path().join("model").join(VAE), "").unwrap();
    same_picture(folder.path(), &vae(&data("model/vae")));
    same_picture(folder.path(), &vae(&data("model")));
    same_picture(folder.path(), &vae(&elsewhere));
}

/// `mid_block.attentions.0.to_q` -> `query`, and so on, as files from before 2023 have it.
fn old_attention(mut weight: Weight) -> Weight {
    for (new, old) in [
        (".to_q.", ".query."),
        (".to_k.", ".key."),
        (".to_v.", ".value."),
        (".to_out.0.", ".proj_attn."),
    ] {
        if weight.name.contains("mid_block.attentions.0") {
            weight.name = weight.name.replace(new, old);
        }
    }
    weight
}

#[test]
fn the_old_spelling_of_the_vae_attention_is_read() {
    let folder = input();
    changed(folder.path(), VAE, old_attention);
    same_picture(folder.path(), "");
}

/// The projections as 1x1 convolutions.
fn as_convolutions(mut weight: Weight) -> Weight {
    let projection = weight.name.contains("mid_block.attentions.0");
    if projection && weight.shape.len() == 2 {
        weight.shape.extend([1, 1]);
    }
    weight
}

#[test]
fn attention_projections_as_convolutions_are_read_under_both_names() {
    for rename in [old_attention, |weight| weight] {
        let folder = input();
        changed(folder.path(), VAE, |w| as_convolutions(rename(w)));
        same_picture(folder.path(), "");
    }
}

/// The diffusers name -> that of the original code, for a VAE of four levels.
fn original(name: &str) -> String {
    let mut name = name
        .replace("conv_shortcut", "nin_shortcut")
        .replace("conv_norm_out", "norm_out")
        .replace("mid_block.resnets.0", "mid.block_1")
        .replace("mid_block.resnets.1", "mid.block_2")
        .replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
        .replace("mid_block.attentions.0.to_q", "mid.attn_1.q")
        .replace("mid_block.attentions.0.to_k", "mid.attn_1.k")
        .replace("mid_block.attentions.0.to_v", "mid.attn_1.v")
        .replace("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out")
        .replace("downsamplers.0", "downsample")
        .replace("upsamplers.0", "upsample")
        .replace("resnets", "block");
    for level in 0..4 {
        name = name
            .replace(&format!("down_blocks.{level}"), &format!("down.{level}"))
            // The decoder's levels count from the bottom.
            .replace(&format!("up_blocks.{level}"), &format!("up.{}", 3 - level));
    }
    name
}

#[test]
fn a_single_vae_file_in_the_original_spelling_is_read() {
    for prefix in ["", "first_stage_model."] {
        let folder = input();
        changed(folder.path(), VAE, |weight| {
            let mut weight = as_convolutions(weight);
            weight.name = format!("{prefix}{}", original(&weight.name));
            weight
        });
        let file = folder.path().join("kl-f8.safetensors");
        fs::rename(folder.path().join("model").join(VAE), &file).unwrap();
        let names: Vec<String> = read(&file).into_iter().map(|w| w.name).collect();
        assert!(names.contains(&format!("{prefix}decoder.up.3.block.0.conv1.weight")));
        same_picture(folder.path(), &vae(&file));
    }
}

#[test]
fn the_text_encoder_is_read_with_the_prefix_and_the_position_ids_of_older_files() {
    for prefix in ["", "text_model."] {
        let folder = input();
        let path = folder.path().join("model").join(TEXT);
        let mut weights = read(&path);
        for weight in &mut weights {
            weight.name = format!("{prefix}{}", weight.name);
        }
        weights.push(Weight {
            name: format!("{prefix}embeddings.position_ids"),
            dtype: Dtype::I64,
            shape: vec![1, 77],
            bytes: (0i64..77).flat_map(i64::to_le_bytes).collect(),
        });
        write(&path, &weights);
        same_picture(folder.path(), "");
    }
}

#[test]
fn weights_kept_in_16_bits_give_the_picture_of_the_same_values_in_32_and_64() {
    for narrow in [Dtype::F16, Dtype::BF16] {
        let folder = input();
        let shards = SHARDS.iter().chain(&[TEXT, VAE]);
        let as_dtype = |dtype| {
            for file in shards.clone() {
                changed(folder.path(), file, |weight| weight.into_dtype(dtype));
            }
        };
        as_dtype(narrow);
        let in_16_bits = made(folder.path(), "");
        for wide in [Dtype::F32, Dtype::F64] {
            as_dtype(wide);
            assert!(
                made(folder.path(), "") == in_16_bits,
                "{narrow:?}, {wide:?}"
            );
        }
        assert!(
            in_16_bits != expected(folder.path()),
            "the rounding shows nowhere"
        );
    }
}

#[test]
fn one_file_and_several_shards_give_the_same_picture() {
    let folder = input();
    let model = folder.path().join("model");
    let unet: Vec<Weight> = SHARDS
        .iter()
        .flat_map(|shard| read(&model.join(shard)))
        .collect();
    for file in SHARDS.iter().chain(&[UNET_INDEX]) {
        fs::remove_file(model.join(file)).unwrap();
    }
    write(&model.join(UNET), &unet);
    same_picture(folder.path(), "");
    // And the VAE, which is one file, in two.
    let vae = read(&model.join(VAE));
    let (first, second) = vae.split_at(vae.len() / 3);
    let shard = |number| format!("diffusion_pytorch_model-0000{number}-of-00002.safetensors");
    let mut map = serde_json::Map::new();
    for (number, weights) in [(1, first), (2, second)] {
        write(&model.join("vae").join(shard(number)), weights);
        for weight in weights {
            map.insert(weight.name.clone(), shard(number).into());
        }
    }
    fs::remove_file(model.join(VAE)).unwrap();
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    let path = model.join("vae/diffusion_pytorch_model.safetensors.index.json");
    fs::write(path, index.to_string()).unwrap();
    same_picture(folder.path(), "");
}
