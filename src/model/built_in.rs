//! The small model that is built into the binary: see assets/tiny/README.md for what it is and how it was trained.

macro_rules! built_in {
    ($path:literal) => {
        ($path, include_bytes!(concat!("../../assets/tiny/", $path)))
    };
}

/// Its files in the diffusers layout: (relative path, content).
pub const BUILT_IN_FILES: &[(&str, &[u8])] = &[
    built_in!("model_index.json"),
    built_in!("scheduler/scheduler_config.json"),
    built_in!("text_encoder/config.json"),
    built_in!("text_encoder/model.safetensors"),
    built_in!("tokenizer/merges.txt"),
    built_in!("tokenizer/special_tokens_map.json"),
    built_in!("tokenizer/tokenizer_config.json"),
    built_in!("tokenizer/vocab.json"),
    built_in!("unet/config.json"),
    built_in!("unet/diffusion_pytorch_model.safetensors"),
    built_in!("vae/config.json"),
    built_in!("vae/diffusion_pytorch_model.safetensors"),
];
