//! The published model's configurations without its weights: what it would take can be told before it is there.

/// The parts of `stabilityai/sd-x2-latent-upscaler` that say what it is, in the diffusers layout: (relative path, content). Keys
/// that say nothing here are left out.
pub const PUBLISHED_CONFIGURATIONS: &[(&str, &[u8])] = &[
    ("unet/config.json", UNET.as_bytes()),
    ("vae/config.json", VAE.as_bytes()),
    ("scheduler/scheduler_config.json", SCHEDULER.as_bytes()),
];

/// Those of `CompVis/stable-diffusion-v1-4`, whose VAE is the upscaler's own.
pub const PUBLISHED_BASE_CONFIGURATIONS: &[(&str, &[u8])] = &[
    ("unet/config.json", BASE_UNET.as_bytes()),
    ("vae/config.json", VAE.as_bytes()),
    ("scheduler/scheduler_config.json", BASE_SCHEDULER.as_bytes()),
];

const BASE_UNET: &str = r#"{
 "_class_name": "UNet2DConditionModel",
 "act_fn": "silu",
 "attention_head_dim": 8,
 "block_out_channels": [320, 640, 1280, 1280],
 "center_input_sample": false,
 "cross_attention_dim": 768,
 "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
 "downsample_padding": 1,
 "flip_sin_to_cos": true,
 "freq_shift": 0,
 "in_channels": 4,
 "layers_per_block": 2,
 "mid_block_scale_factor": 1,
 "norm_eps": 1e-05,
 "norm_num_groups": 32,
 "out_channels": 4,
 "sample_size": 64,
 "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
}"#;

const BASE_SCHEDULER: &str = r#"{
 "_class_name": "PNDMScheduler",
 "beta_end": 0.012,
 "beta_schedule": "scaled_linear",
 "beta_start": 0.00085,
 "num_train_timesteps": 1000,
 "set_alpha_to_one": false,
 "skip_prk_steps": true,
 "steps_offset": 1,
 "trained_betas": null,
 "clip_sample": false
}"#;

const UNET: &str = r#"{
 "act_fn": "gelu",
 "attention_head_dim": 64,
 "block_out_channels": [384, 384, 768, 768],
 "conv_in_kernel": 1,
 "conv_out_kernel": 1,
 "cross_attention_dim": 768,
 "down_block_types": ["KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"],
 "flip_sin_to_cos": true,
 "in_channels": 8,
 "layers_per_block": 4,
 "mid_block_type": null,
 "norm_eps": 1e-05,
 "norm_num_groups": null,
 "out_channels": 5,
 "time_cond_proj_dim": 896,
 "time_embedding_type": "fourier",
 "timestep_post_act": "gelu",
 "up_block_types": ["KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"],
 "_class_name": "UNet2DConditionModel"
}"#;

const VAE: &str = r#"{
 "_class_name": "AutoencoderKL",
 "act_fn": "silu",
 "block_out_channels": [128, 256, 512, 512],
 "in_channels": 3,
 "latent_channels": 4,
 "layers_per_block": 2,
 "norm_num_groups": 32,
 "out_channels": 3,
 "scaling_factor": 0.18215
}"#;

const SCHEDULER: &str = r#"{
 "_class_name": "EulerDiscreteScheduler",
 "beta_start": 0.00085,
 "beta_end": 0.012,
 "beta_schedule": "scaled_linear",
 "num_train_timesteps": 1000,
 "prediction_type": "original_sample"
}"#;
