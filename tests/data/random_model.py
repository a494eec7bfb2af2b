"""Random weights under which every layer of the latent upscaler matters, for a model of any size.

Each residual stream is kept small (UNET_STREAM, VAE_STREAM, TEXT_STREAM) so that the epsilon of every normalisation is
visible in the result, its branches add about as much as they are given, norms are away from 1 and 0, biases are not 0,
and the last layers are scaled so that latents have a standard deviation near 1 and images fill their range unclipped.
"""

import math

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

UNET_STREAM = 0.01  # variance 1e-4, norm eps 1e-5
VAE_STREAM = 0.005  # variance 2.5e-5, norm eps 1e-6
BASE_STREAM = 0.01  # variance 1e-4, norm eps 1e-5 and 1e-6
TEXT_STREAM = 0.005  # variance 2.5e-5, norm eps 1e-5

# stabilityai/sd-x2-latent-upscaler scheduler/scheduler_config.json
SCHEDULER = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    interpolation_type="log_linear",
    prediction_type="original_sample",
)

# What the UNet configurations of every size share with the published unet/config.json.
UNET = dict(
    in_channels=8,
    out_channels=5,
    act_fn="gelu",
    norm_num_groups=None,
    conv_in_kernel=1,
    conv_out_kernel=1,
    down_block_types=("KDownBlock2D",) + ("KCrossAttnDownBlock2D",) * 3,
    up_block_types=("KCrossAttnUpBlock2D",) * 3 + ("KUpBlock2D",),
    mid_block_type=None,
    resnet_time_scale_shift="scale_shift",
    time_embedding_type="fourier",
    timestep_post_act="gelu",
)

VAE = dict(
    latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    scaling_factor=0.18215,
)


def scheduler(schedule):
    """The scheduler of a --schedule value: `log-linear` is the published one, `karras` the same with Karras sigmas."""
    return EulerDiscreteScheduler(**SCHEDULER, use_karras_sigmas=schedule == "karras")


def unet_gain(name):
    """Standard deviation of a layer's output for an input of standard deviation 1."""
    if "time_embedding.linear_2" in name:
        return 1.5  # GELU has halved its input
    if name.startswith("time_embedding"):
        return 1.0
    if "norm" in name:
        return 0.4  # scale and shift of the adaptive norms
    if "attn2.to_out" in name:
        return 0.4 * UNET_STREAM  # prompts differ by about 1 in the result, so that guidance of 7.5 does not explode
    if name.startswith("conv_in") or "conv1" in name or "to_out" in name:
        return UNET_STREAM
    if "conv2" in name:
        return 0.8 * UNET_STREAM
    if "to_q" in name or "to_k" in name:
        return 1.5  # attention that is neither uniform nor one-hot
    return 1.0


def vae_gain(name):
    if name.startswith("encoder.conv_in"):
        return 2 * VAE_STREAM  # pixels have a standard deviation near 0.5
    if name.startswith("decoder.conv_in"):
        return VAE_STREAM / 5.5  # raw latents have one near 5.5
    if "to_out" in name:
        return 2 * VAE_STREAM  # an average over positions
    if "conv1" in name or "conv2" in name:
        return VAE_STREAM
    if "to_q" in name or "to_k" in name:
        return 1.5
    return 1.0


def text_gain(name):
    if "fc1" in name:
        return 2.0  # where the kinds of GELU differ most
    if "fc2" in name:
        return 2 * TEXT_STREAM
    if "out_proj" in name:
        return TEXT_STREAM
    if "q_proj" in name or "k_proj" in name:
        return 1.5
    return 1.0


def base_unet_gain(name):
    """Standard deviation of a layer's output for an input of standard deviation 1."""
    if name.startswith("time_embedding"):
        return 1.5
    if name.startswith("conv_in") or "conv1" in name or "time_emb_proj" in name or "proj_in" in name:
        return BASE_STREAM
    if "conv2" in name or "to_out" in name:
        return 0.8 * BASE_STREAM
    if "net.2" in name:
        return 8 * BASE_STREAM
    if "proj_out" in name:
        return 3.0
    if "to_q" in name or "to_k" in name:
        return 1.5
    return 1.0


def tiny_vae_gain(name):
    if name.endswith("conv.4"):
        return 0.5  # of a residual block's own part
    return 1.4  # ReLU halves what comes next


@torch.no_grad()
def fill(model, gain, generator):
    """Draws every parameter: weights for the given gain, biases a fifth of it, norms about 1 and 0."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        layer, kind = name.rsplit(".", 1)
        if "embedding" in name and "time_embedding" not in name:
            p.copy_(TEXT_STREAM * noise)
        elif name == "time_proj.weight":
            p.copy_(noise)
        elif p.ndim == 1 and "norm" in layer and not layer.endswith("linear"):
            p.copy_(1 + 0.2 * noise if kind == "weight" else 0.2 * noise)
        elif kind == "bias":
            p.copy_(0.2 * gain(layer) * noise)
        else:
            p.copy_(gain(layer) / math.sqrt(p[0].numel()) * noise)


@torch.no_grad()
def scale_output(layer, outputs, measured, mean, std):
    """Rescales `outputs` (a slice of output channels) of `layer`, so that each channel of values like `measured`
    (1, c, h, w) varies over the positions by `std` about `mean` and a little: no channel is mostly a constant."""
    flat = measured[0].flatten(1)
    factor = std / flat.std(1)
    offset = mean + 0.2 * std * torch.linspace(-1, 1, len(flat))
    layer.weight[outputs] *= factor[:, None, None, None]
    layer.bias[outputs] = (layer.bias[outputs] - flat.mean(1)) * factor + offset


@torch.no_grad()
def randomise(text, unet, vae, image, seed):
    """Fills the three networks; `image` (1, 3, H, W) in [-1, 1] is what the output scales are measured with."""
    generator = torch.Generator("cpu").manual_seed(seed)
    fill(text, text_gain, generator)
    fill(unet, unet_gain, generator)
    fill(vae, vae_gain, generator)

    moments = vae.quant_conv(vae.encoder(image))
    scale_output(vae.quant_conv, slice(0, 4), moments[:, :4], mean=0.0, std=5.5)
    scale_output(vae.quant_conv, slice(4, 8), moments[:, 4:], mean=-0.5, std=1.0)
    # Without the border, where zero padding makes a random decoder's values several times larger.
    decoded = vae.decode(vae.encode(image).latent_dist.mode()).sample[..., 16:-16, 16:-16]
    scale_output(vae.decoder.conv_out, slice(0, 3), decoded, mean=0.0, std=0.4)

    latents = torch.randn(1, 8, 16, 24, generator=generator)
    context = text(torch.arange(77)[None], output_hidden_states=True)
    cond = torch.cat([torch.ones(1, 64), torch.zeros(1, 64), context.pooler_output], dim=1)
    out = unet(latents, 0.0, encoder_hidden_states=context.hidden_states[-1], timestep_cond=cond).sample
    scale_output(unet.conv_out, slice(0, 5), out, mean=0.0, std=0.7)


@torch.no_grad()
def build_tiny_vae(config, image, seed):
    """An AutoencoderTiny of the given configuration with random weights: latents of `image` have a standard deviation near 1, its
    pictures fill their range."""
    vae = AutoencoderTiny(**config).eval()
    fill(vae, tiny_vae_gain, torch.Generator("cpu").manual_seed(seed))
    latents = vae.encode(image).latents
    scale_output(vae.encoder.layers[-1], slice(0, latents.shape[1]), latents, mean=0.0, std=1.0)
    decoded = vae.decode(vae.encode(image).latents).sample[..., 16:-16, 16:-16]
    # Of what diffusers makes [-1, 1] after it.
    scale_output(vae.decoder.layers[-1], slice(0, 3), decoded / 2 + 0.5, mean=0.5, std=0.2)
    return vae


@torch.no_grad()
def build_base(text_config, unet_config, vae_config, image, seed):
    """(text encoder, UNet, VAE) of a Stable Diffusion 1 or 2 of the given configurations with random weights."""
    draw = torch.Generator("cpu").manual_seed(seed)
    text = CLIPTextModel(text_config).eval()
    fill(text, text_gain, draw)
    blocks = dict(
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    unet = UNet2DConditionModel(**blocks, **unet_config).eval()
    fill(unet, base_unet_gain, draw)
    x, context = torch.randn(1, 4, 16, 24, generator=draw), text(torch.arange(77)[None]).last_hidden_state
    scale_output(unet.conv_out, slice(0, 4), unet(x, 500, encoder_hidden_states=context).sample, mean=0.0, std=0.7)
    vae = AutoencoderKL(**VAE, **vae_config).eval()
    fill(vae, vae_gain, draw)
    moments = vae.quant_conv(vae.encoder(image))
    scale_output(vae.quant_conv, slice(0, 4), moments[:, :4], mean=0.0, std=5.5)
    decoded = vae.decode(vae.encode(image).latent_dist.mode()).sample[..., 16:-16, 16:-16]
    scale_output(vae.decoder.conv_out, slice(0, 3), decoded, mean=0.0, std=0.4)
    return text, unet, vae


def build(text_config, unet_config, vae_config, image, seed):
    """(text encoder, UNet, VAE) of the given configurations with random weights."""
    text = CLIPTextModel(text_config).eval()
    unet = UNet2DConditionModel(**UNET, **unet_config).eval()
    vae = AutoencoderKL(**VAE, **vae_config).eval()
    randomise(text, unet, vae, image, seed)
    return text, unet, vae
