//! k-diffusion's names of the upscaler's tensors to diffusers', and the configuration that their shapes tell.
//!
//! After diffusers' `scripts/convert_k_upscaler_to_diffusers.py` (58eb52c) and k-diffusion's `models/image_v1.py` (0.1.1).

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::super::config::shortened;
use super::super::weights::Entry;

/// Width of an attention's head: k-diffusion's `head_size`, which the checkpoint does not say.
const HEAD: usize = 64;

/// What a checkpoint is in diffusers' terms.
pub struct Network {
    pub tensors: Vec<(String, Entry)>,
    /// `unet/config.json`
    pub config: Value,
}

/// Which way a block lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Down,
    Up,
}

impl Side {
    /// Of the original's lists of blocks and of diffusers'.
    fn lists(self) -> (&'static str, &'static str) {
        match self {
            Self::Down => ("d_blocks", "down_blocks"),
            Self::Up => ("u_blocks", "up_blocks"),
        }
    }
}

/// What stands at one place of a block's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Module {
    Resnet,
    SelfAttention,
    CrossAttention,
}

impl Module {
    /// By a tensor that it alone has.
    fn of(tensor: &str) -> Option<Self> {
        Some(match tensor {
            "main.2.weight" => Self::Resnet,
            "qkv_proj.weight" => Self::SelfAttention,
            "kv_proj.weight" => Self::CrossAttention,
            _ => return None,
        })
    }
}

/// The modules of a block by their places in its list.
type Modules = BTreeMap<usize, Module>;
type Blocks = BTreeMap<(Side, usize), Modules>;

/// A key within a block: `u_net.d_blocks.1.2.q_proj.weight` is of block 1 on the way down, place 2, `q_proj.weight`.
struct Place<'a> {
    side: Side,
    block: usize,
    place: usize,
    tensor: &'a str,
}

impl<'a> Place<'a> {
    fn of(key: &'a str) -> Option<Self> {
        let mut parts = key.strip_prefix("u_net.")?.splitn(4, '.');
        let side = match parts.next()? {
            "d_blocks" => Side::Down,
            "u_blocks" => Side::Up,
            _ => return None,
        };
        Some(Self {
            side,
            block: parts.next()?.parse().ok()?,
            place: parts.next()?.parse().ok()?,
            tensor: parts.next()?,
        })
    }
}

/// The checkpoint in diffusers' names, with what its shapes tell.
///
/// # Errors
/// It is not the latent upscaler's: the message names the tensor.
pub fn to_diffusers(original: HashMap<String, Entry>) -> Result<Network> {
    let config = Shapes(&original).config()?;
    let blocks = blocks(&original);
    let mut tensors = Vec::with_capacity(original.len());
    for (key, entry) in original {
        let renamed = renamed(&key, entry, &blocks);
        tensors.extend(renamed.with_context(|| format!("`{}`", shortened(&key)))?);
    }
    Ok(Network { tensors, config })
}

/// What stands where, as the names of the tensors tell.
fn blocks(original: &HashMap<String, Entry>) -> Blocks {
    let mut blocks = Blocks::new();
    // In one order, so that a file is refused for one reason.
    for key in original.keys().collect::<BTreeSet<_>>() {
        let Some(key) = key.strip_prefix(PREFIX).and_then(Place::of) else {
            continue;
        };
        if let Some(module) = Module::of(key.tensor) {
            let block = blocks.entry((key.side, key.block)).or_default();
            block.insert(key.place, module);
        }
    }
    blocks
}

/// Of everything but the noise level's frequencies, which the network's wrapper has.
const PREFIX: &str = "inner_model.";
const NOISE_LEVEL: &str = "low_res_noise_embed.weight";

/// What one tensor becomes: nothing, one, or its parts.
fn renamed(key: &str, entry: Entry, blocks: &Blocks) -> Result<Vec<(String, Entry)>> {
    if key == NOISE_LEVEL {
        return Ok(vec![(key.into(), entry)]);
    }
    let Some(key) = key.strip_prefix(PREFIX) else {
        bail!(UNKNOWN);
    };
    if let Some(place) = Place::of(key) {
        return of_block(&place, entry, blocks);
    }
    let (layer, leaf) = key.rsplit_once('.').context(UNKNOWN)?;
    let layer = match layer {
        "proj_in" => "conv_in",
        "proj_out" => "conv_out",
        "timestep_embed" => {
            let entry = entry.squeezed(1)?;
            return Ok(vec![("time_proj.weight".into(), entry)]);
        }
        "mapping.0" => "time_embedding.linear_1",
        "mapping.2" => "time_embedding.linear_2",
        "mapping_cond" => "time_embedding.cond_proj",
        _ => bail!(UNKNOWN),
    };
    Ok(vec![(format!("{layer}.{leaf}"), entry)])
}

const UNKNOWN: &str = "the latent upscaler has no such tensor: the file is of another model";

fn of_block(place: &Place, entry: Entry, blocks: &Blocks) -> Result<Vec<(String, Entry)>> {
    if place.tensor == "kernel" {
        // Of resampling, which diffusers' layers have as a constant.
        return Ok(Vec::new());
    }
    let modules = blocks.get(&(place.side, place.block)).context(UNKNOWN)?;
    let module = modules.get(&place.place).context(UNKNOWN)?;
    let is_resnet = |module: &Module| *module == Module::Resnet;
    let before = modules.range(..=place.place);
    let layers = before.filter(|(_, module)| is_resnet(module)).count();
    let layer = layers.checked_sub(1).context(UNKNOWN)?;
    let list = if is_resnet(module) {
        "resnets"
    } else {
        "attentions"
    };
    let (_, blocks) = place.side.lists();
    let named = |name: &str| format!("{blocks}.{}.{list}.{layer}.{name}", place.block);
    let (part, leaf) = place.tensor.rsplit_once('.').context(UNKNOWN)?;
    // Attention's convolutions of 1x1 are linear layers in diffusers.
    let linear = |entry: Entry| {
        if leaf == "weight" {
            entry.squeezed(2)
        } else {
            Ok(entry)
        }
    };
    let parts = |names: &[&str]| -> Result<Vec<(String, Entry)>> {
        let entry = linear(entry.clone())?;
        let each = names.iter().enumerate();
        each.map(|(number, name)| {
            let part = entry.part(number, names.len())?;
            Ok((named(&format!("{name}.{leaf}")), part))
        })
        .collect()
    };
    let one = |name: &str| vec![(named(&format!("{name}.{leaf}")), entry.clone())];
    Ok(match (module, part) {
        (Module::Resnet, "main.0.mapper") => one("norm1.linear"),
        (Module::Resnet, "main.2") => one("conv1"),
        (Module::Resnet, "main.4.mapper") => one("norm2.linear"),
        (Module::Resnet, "main.6") => one("conv2"),
        (Module::Resnet, "skip") => one("conv_shortcut"),
        (Module::SelfAttention, "norm_in.mapper") => one("norm1.linear"),
        (Module::SelfAttention, "qkv_proj") => parts(&["attn1.to_q", "attn1.to_k", "attn1.to_v"])?,
        (Module::SelfAttention, "out_proj") => parts(&["attn1.to_out.0"])?,
        (Module::CrossAttention, "norm_dec.mapper") => one("norm2.linear"),
        (Module::CrossAttention, "norm_enc") => one("attn2.norm_cross"),
        (Module::CrossAttention, "q_proj") => parts(&["attn2.to_q"])?,
        (Module::CrossAttention, "kv_proj") => parts(&["attn2.to_k", "attn2.to_v"])?,
        (Module::CrossAttention, "out_proj") => parts(&["attn2.to_out.0"])?,
        _ => bail!(UNKNOWN),
    })
}

/// What the shapes of the original's tensors tell.
struct Shapes<'a>(&'a HashMap<String, Entry>);

/// A level, by its block on the way down.
struct Level {
    width: usize,
    layers: usize,
    attends: bool,
}

impl Shapes<'_> {
    fn config(&self) -> Result<Value> {
        let blocks = blocks(self.0);
        let levels = blocks
            .keys()
            .filter(|(side, _)| *side == Side::Down)
            .count();
        ensure!(
            levels > 0,
            "it has no blocks: it is not the latent upscaler's checkpoint"
        );
        let down: Vec<Level> = (0..levels)
            .map(|number| self.level(&blocks, Side::Down, number))
            .collect::<Result<_>>()?;
        for (number, level) in down.iter().enumerate() {
            let up = self.level(&blocks, Side::Up, levels - 1 - number)?;
            ensure!(
                (up.layers, up.attends) == (level.layers, level.attends),
                "level {number} has other layers on the way up than on the way down, which the latent upscaler's has not"
            );
        }
        self.self_attention_is_where_diffusers_has_it(&blocks, &down)?;
        let kind = |level: &Level, plain: &str, attending: &str| {
            Value::from(if level.attends { attending } else { plain })
        };
        let each = |value: fn(&Level) -> usize| -> Value {
            let all: Vec<usize> = down.iter().map(value).collect();
            match all[..] {
                [first, ..] if all.iter().all(|value| *value == first) => first.into(),
                _ => all.into(),
            }
        };
        let widths: Vec<usize> = down.iter().map(|level| level.width).collect();
        let time = self.time_width()?;
        let up = down.iter().rev();
        Ok(json!({
            "_class_name": "UNet2DConditionModel",
            "act_fn": "gelu",
            "attention_head_dim": HEAD,
            "block_out_channels": widths,
            "conv_in_kernel": self.size("proj_in.weight", 2)?,
            "conv_out_kernel": self.size("proj_out.weight", 2)?,
            "cross_attention_dim": self.context_width()?,
            "down_block_types": down.iter().map(|level| kind(level, "KDownBlock2D", "KCrossAttnDownBlock2D")).collect::<Vec<_>>(),
            "flip_sin_to_cos": true,
            "in_channels": self.size("proj_in.weight", 1)?,
            "layers_per_block": each(|level| level.layers),
            "mid_block_type": null,
            "norm_eps": 1e-5,
            "norm_num_groups": null,
            "out_channels": self.size("proj_out.weight", 0)?,
            "resnet_time_scale_shift": "scale_shift",
            "time_cond_proj_dim": self.size("mapping_cond.weight", 1)?,
            "time_embedding_dim": (time != 2 * down[0].width).then_some(time),
            "time_embedding_type": "fourier",
            "timestep_post_act": "gelu",
            "up_block_types": up.map(|level| kind(level, "KUpBlock2D", "KCrossAttnUpBlock2D")).collect::<Vec<_>>(),
        }))
    }

    /// A dimension of a tensor.
    fn size(&self, key: &str, dimension: usize) -> Result<usize> {
        let entry = self.0.get(&format!("{PREFIX}{key}"));
        let entry = entry.with_context(|| {
            format!("`{PREFIX}{key}` is missing: it is not the latent upscaler's checkpoint")
        })?;
        let size = entry.shape().get(dimension).copied();
        size.with_context(|| {
            format!(
                "`{PREFIX}{key}` is of shape {:?}, which it is not in the latent upscaler",
                entry.shape()
            )
        })
    }

    fn level(&self, blocks: &Blocks, side: Side, number: usize) -> Result<Level> {
        let (list, _) = side.lists();
        let modules = blocks.get(&(side, number));
        let modules = modules.with_context(|| format!("its {list} are not in one row"))?;
        let of = |kind: Module| modules.iter().filter(move |(_, module)| **module == kind);
        let layers = of(Module::Resnet).count();
        let (first, _) = of(Module::Resnet)
            .next()
            .with_context(|| format!("{list}.{number} has no residual block"))?;
        let attentions = of(Module::CrossAttention).count();
        ensure!(
            attentions == 0 || attentions == layers,
            "{list}.{number} attends to the prompt behind {attentions} of its {layers} layers; expected all or none"
        );
        Ok(Level {
            width: self.size(&format!("u_net.{list}.{number}.{first}.main.2.weight"), 0)?,
            layers,
            attends: attentions > 0,
        })
    }

    /// diffusers' blocks have it in the lowest level alone, told by its width (see `networks::unet::blocks`).
    fn self_attention_is_where_diffusers_has_it(
        &self,
        blocks: &Blocks,
        down: &[Level],
    ) -> Result<()> {
        let lowest = down.len() - 1;
        for ((side, number), modules) in blocks {
            let found = modules
                .values()
                .filter(|module| **module == Module::SelfAttention);
            let is_lowest = match side {
                Side::Down => *number == lowest,
                Side::Up => *number == 0,
            };
            let expected = if is_lowest && down[lowest].attends {
                down[lowest].layers
            } else {
                0
            };
            ensure!(
                found.count() == expected,
                "{}.{number} has not the self-attention of a latent upscaler: in the lowest level, behind every layer",
                side.lists().0
            );
        }
        let width = down[lowest].width;
        let above = down[lowest.saturating_sub(1)].width;
        ensure!(
            !down[lowest].attends || (width == above && width == self.time_width()?),
            "its lowest level is {width} wide, the one above {above} and the time embedding {}: diffusers' network has them alike",
            self.time_width()?
        );
        Ok(())
    }

    fn time_width(&self) -> Result<usize> {
        self.size("mapping.0.weight", 0)
    }

    /// The width of what is attended to.
    fn context_width(&self) -> Result<usize> {
        let keys = self.0.keys();
        let mut found = keys.filter_map(|key| {
            let key = key.strip_prefix(PREFIX)?;
            key.ends_with(".norm_enc.weight").then_some(key)
        });
        let key = found
            .next()
            .context("it does not attend to a prompt: it is not the latent upscaler's")?;
        self.size(key, 0)
    }
}
