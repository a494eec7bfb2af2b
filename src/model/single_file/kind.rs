//! What a file of weights is, as the names of its tensors tell: a Stable Diffusion 1 or 2 with all its parts, or something to be refused by name.

use std::collections::HashMap;

use anyhow::{Result, bail};

use super::{Version, names};
use crate::model::weights::Entry;

/// What every refusal says.
pub const EXPECTED: &str = "expected a Stable Diffusion 1.x or 2.x checkpoint for text to image in one file, such as v1-5-pruned-emaonly.safetensors, or a folder in the diffusers layout";

/// The names of a file's tensors.
struct Keys<'a>(&'a HashMap<String, Entry>);

impl Keys<'_> {
    fn begin(&self, prefix: &str) -> bool {
        self.0.keys().any(|key| key.starts_with(prefix))
    }

    fn hold(&self, part: &str) -> bool {
        self.0.keys().any(|key| key.contains(part))
    }

    /// Channels of what goes into the UNet.
    fn channels(&self) -> Option<usize> {
        let key = format!("{}input_blocks.0.0.weight", names::UNET);
        self.0.get(&key)?.shape().get(1).copied()
    }
}

/// A kind of file that is none of these checkpoints.
struct Other {
    is: fn(&Keys) -> bool,
    what: &'static str,
    /// Empty where there is none but another file.
    cure: &'static str,
}

/// The first that fits is named: those that hold what others hold too come first.
const OTHERS: [Other; 19] = [
    Other {
        is: |keys| {
            keys.hold("lora_up.")
                || keys.hold("lora_down.")
                || keys.hold(".lora_")
                || keys.hold(".hada_w")
                || keys.hold(".lokr_")
        },
        what: "a LoRA, which changes a checkpoint and is none",
        cure: "merge it into its checkpoint first",
    },
    Other {
        is: |keys| {
            keys.begin("control_model.")
                || keys.hold("input_hint_block.")
                || keys.begin("controlnet_cond_embedding.")
        },
        what: "a ControlNet's, which steers a checkpoint and is none",
        cure: "",
    },
    Other {
        is: |keys| keys.hold("motion_modules.") || keys.hold("temporal_transformer."),
        what: "a motion module's (AnimateDiff)",
        cure: "",
    },
    Other {
        is: |keys| keys.begin("conditioner.embedders.1."),
        what: "Stable Diffusion XL's",
        cure: "",
    },
    Other {
        is: |keys| keys.begin("conditioner.embedders."),
        what: "Stable Diffusion XL's refiner's",
        cure: "",
    },
    Other {
        is: |keys| keys.hold("joint_blocks."),
        what: "Stable Diffusion 3's",
        cure: "",
    },
    Other {
        is: |keys| keys.hold("double_blocks.") || keys.hold("single_blocks."),
        what: "Flux's",
        cure: "",
    },
    Other {
        is: |keys| keys.begin("depth_model.") || keys.channels() == Some(5),
        what: "Stable Diffusion 2's for depth",
        cure: "",
    },
    Other {
        is: |keys| keys.channels() == Some(9),
        what: "an inpainting checkpoint (its UNet takes 9 channels)",
        cure: "",
    },
    Other {
        is: |keys| keys.channels() == Some(8),
        what: "a checkpoint that edits a picture (instruct-pix2pix; its UNet takes 8 channels)",
        cure: "",
    },
    Other {
        is: |keys| keys.channels() == Some(7),
        what: "the x4 upscaler's (its UNet takes 7 channels)",
        cure: "",
    },
    Other {
        is: |keys| keys.begin("model.diffusion_model.label_emb."),
        what: "a checkpoint that is told a class, a picture or a size (unCLIP, Stable Diffusion XL)",
        cure: "",
    },
    Other {
        is: |keys| {
            keys.begin("down_blocks.")
                || keys.begin("encoder.down_blocks.")
                || keys.begin("decoder.up_blocks.")
        },
        what: "one part of a model in the diffusers layout, a UNet or a VAE",
        cure: "give the folder that holds its model_index.json",
    },
    Other {
        is: |keys| keys.begin("text_model.") || keys.begin("embeddings.token_embedding."),
        what: "a text encoder alone",
        cure: "give the folder that holds its model_index.json",
    },
    Other {
        is: |keys| keys.begin("input_blocks."),
        what: "a UNet alone",
        cure: "give the checkpoint with its VAE and its text encoder",
    },
    Other {
        is: |keys| {
            (keys.begin("encoder.down.") || keys.begin("decoder.up.") || keys.begin(names::VAE))
                && !keys.begin(names::UNET)
                && !keys.begin("model_ema.")
        },
        what: "a VAE alone",
        cure: "--vae takes it",
    },
    Other {
        is: |keys| keys.begin("model_ema.") && !keys.begin(names::UNET),
        what: "one of averaged weights alone (model_ema.)",
        cure: "save these as model.diffusion_model. first, or take the file with the plain ones",
    },
    Other {
        is: |keys| keys.begin(names::UNET) && !keys.begin(names::VAE),
        what: "a checkpoint without its VAE (first_stage_model.)",
        cure: "take the file with all its parts",
    },
    Other {
        is: |keys| {
            keys.begin(names::UNET)
                && !keys.begin(names::text(Version::One))
                && !keys.begin(names::text(Version::Two))
        },
        what: "a checkpoint without its text encoder (cond_stage_model.)",
        cure: "take the file with all its parts",
    },
];

/// Which of the two it is.
///
/// # Errors
/// It is neither: what it is, and what would help.
pub fn check(tensors: &HashMap<String, Entry>) -> Result<Version> {
    let keys = Keys(tensors);
    if let Some(Other { what, cure, .. }) = OTHERS.iter().find(|other| (other.is)(&keys)) {
        let cure = if cure.is_empty() {
            String::new()
        } else {
            format!("; {cure}")
        };
        bail!("the file is {what}; {EXPECTED}{cure}");
    }
    if !keys.begin(names::UNET) {
        bail!(
            "the file is of another model, without `{}`; {EXPECTED}",
            names::UNET
        );
    }
    Ok(if keys.begin(names::text(Version::Two)) {
        Version::Two
    } else {
        Version::One
    })
}
