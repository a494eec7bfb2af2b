"""The parts of the built-in model: what each is, how it starts, and how the folder is written.

The VAE has one level, so it does not shrink: its four latent channels are a fixed tight frame of the pixel's three
colours, and decoding what was encoded gives the picture back. That is a construction, not training: `linear_vae`.
The UNet is the real model's (K-blocks, Fourier time, AdaGN) with few channels, and starts as "enlarge by nearest".
"""
import json, math, shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionLatentUpscalePipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LATENTS, TEXT, MERGES, SCALING = 4, 32, 500, 0.18215
GAIN = 2.5                                  # scaled latent per unit of RGB in [-1, 1]: latents of photographs then have a spread near 1
SIGMA_MIN, SIGMA_MAX = 0.0291675, 14.6146   # ends of the scheduler's table
LEVELS = 5                                  # of the UNet: the last, with its self-attention, sees 1/16 of each side
WIDTHS = (32, 32, 32, 64, 64)
SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
                 interpolation_type="log_linear", prediction_type="original_sample")


def frame():
    """(4, 3): orthonormal columns. Grey goes to all four channels alike; the colour differences to +/- pairs."""
    grey_and_colours = torch.tensor([[1., 1, 1], [1, 0, -1], [-.5, 1, -.5]])
    signs = torch.tensor([[1., 1, 1], [1, 1, -1], [1, -1, 1], [1, -1, -1]]) / 2
    return signs @ (grey_and_colours / grey_and_colours.norm(dim=1, keepdim=True))


def encode(rgb):
    """(n, 3, h, w) in [-1, 1] -> scaled latents (n, 4, h, w): what `linear_vae` does, as one product."""
    return GAIN * torch.einsum("lc,nchw->nlhw", frame(), rgb)


def decode(z):
    return torch.einsum("lc,nlhw->nchw", frame(), z) / GAIN


@torch.no_grad()
def linear_vae(hold=32.):
    """An AutoencoderKL of one level and eight channels that computes `encode` and `decode`.

    Its layers are not linear, so values travel in pairs: silu(v) - silu(-v) = v; every residual branch ends in zeros;
    and two channels held at +/-32 keep the spread that GroupNorm divides by the same (to 0.1 %) for every picture.
    """
    vae = AutoencoderKL(in_channels=3, out_channels=3, latent_channels=LATENTS, block_out_channels=(8,), layers_per_block=1,
                        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), norm_num_groups=1,
                        mid_block_add_attention=False, scaling_factor=SCALING).eval()
    for name, p in vae.named_parameters():
        if "conv2" in name:
            p.zero_()
    m = frame() * GAIN / SCALING                                       # raw latents, before the pipeline's scaling factor
    for part, into, out in ((vae.encoder, torch.eye(3), m), (vae.decoder, m.T / m.T.norm(dim=1)[:, None] ** 2, torch.eye(3))):
        for conv in (part.conv_in, part.conv_out):
            conv.weight.zero_(), conv.bias.zero_()
        for i in range(3):
            part.conv_in.weight[2 * i, :, 1, 1], part.conv_in.weight[2 * i + 1, :, 1, 1] = into[i], -into[i]
        part.conv_in.bias[6], part.conv_in.bias[7] = hold, -hold
        spread = math.sqrt((2 * hold ** 2 + 6 * .2) / 8)               # .2: a typical mean square of a colour in [-1, 1]
        part.conv_norm_out.weight.fill_(0), part.conv_norm_out.bias.zero_()
        part.conv_norm_out.weight[:6] = spread
        rows = out.shape[0]
        part.conv_out.weight[:rows, 0:6:2, 1, 1], part.conv_out.weight[:rows, 1:6:2, 1, 1] = out, -out
    for conv, n in ((vae.quant_conv, 2 * LATENTS), (vae.post_quant_conv, LATENTS)):
        conv.weight.copy_(torch.eye(n)[:, :, None, None]), conv.bias.zero_()
    vae.quant_conv.bias[LATENTS:] = -20.                               # log-variance: the posterior's spread is 5e-5
    return vae


def start_shortcut(conv, half_is_skip):
    """Copy the input's channels (in an up block: those of the skip, its second half), and its constants into every 32."""
    first = conv.in_channels // 2 if half_is_skip else 0
    copied = conv.in_channels - first
    conv.weight.mul_(.2)
    for k in range(conv.out_channels):
        constant = k % 32 >= 30
        if constant or k < 2 * LATENTS:                                # nothing else may disturb these
            conv.weight[k].zero_()
        if k < copied:
            conv.weight[k, first + k, 0, 0] = 1
        elif constant:
            conv.weight[k, first + k % 32, 0, 0] = 1


@torch.no_grad()
def start_unet(seed=0):
    """The UNet, started so that it enlarges by nearest, with branches that add nothing yet.

    Two channels of every 32 are held at constants, in the residual stream and inside each block, so that AdaGN divides
    by nearly the same number for a flat crop and a busy photograph (learnt later, these may move).
    """
    torch.manual_seed(seed)
    plain, cross = 2, LEVELS - 2
    unet = UNet2DConditionModel(
        in_channels=2 * LATENTS, out_channels=LATENTS + 1, block_out_channels=WIDTHS, layers_per_block=1, attention_head_dim=32,
        cross_attention_dim=TEXT, time_cond_proj_dim=128 + TEXT, act_fn="gelu", norm_num_groups=None, mid_block_type=None,
        conv_in_kernel=1, conv_out_kernel=1, resnet_time_scale_shift="scale_shift", time_embedding_type="fourier",
        timestep_post_act="gelu", down_block_types=("KDownBlock2D",) * plain + ("KCrossAttnDownBlock2D",) * cross,
        up_block_types=("KCrossAttnUpBlock2D",) * cross + ("KUpBlock2D",) * plain)
    stream, inside = 8., 4.
    for name, p in unet.named_parameters():
        if name.endswith(("conv2.weight", "conv2.bias", "to_out.0.weight", "to_out.0.bias")) or "norm_cross" in name:
            p.zero_()                                                  # norm_cross at 0: the prompt changes nothing, by construction
        if ".linear.weight" in name and ".norm" in name:
            p.mul_(.3)
        if name.endswith("norm1.linear.bias"):
            p.zero_(), p[:len(p) // 2].fill_(math.sqrt(stream ** 2 / 16 + .5) - 1)
        if name.endswith("norm2.linear.bias"):
            p.zero_()
    unet.time_embedding.cond_proj.weight[:, 128:].zero_()
    for name, m in unet.named_modules():
        if name.endswith("conv1"):
            for g in range(0, m.out_channels, 32):
                m.weight[g + 30:g + 32].zero_(), m.bias[g + 30].fill_(inside), m.bias[g + 31].fill_(-inside)
        if name.endswith("conv_shortcut"):
            start_shortcut(m, half_is_skip=name.startswith("up_blocks") and not name.startswith("up_blocks.0"))
    n = LATENTS
    for conv in (unet.conv_in, unet.conv_out):
        conv.bias.zero_()
    w = unet.conv_in.weight
    w[:2 * n].zero_(), w[30:].zero_()
    w[:n, n:, 0, 0], w[n:2 * n, :n, 0, 0] = torch.eye(n), torch.eye(n)  # channels 0-3: the condition; 4-7: the noisy latents
    unet.conv_in.bias[30], unet.conv_in.bias[31] = stream, -stream
    w = unet.conv_out.weight
    w.zero_()
    w[:n, :n, 0, 0], w[:n, n:2 * n, 0, 0] = torch.eye(n), -torch.eye(n) / SIGMA_MAX
    return unet


def denoise(unet, x, sigma, cond, ones):
    """denoised = x / (sigma^2 + 1) + sigma / sqrt(sigma^2 + 1) * F, as the pipeline does; sigma is (n, 1, 1, 1)."""
    n, c_in = x.shape[0], (sigma ** 2 + 1).rsqrt()
    f = unet(torch.cat([c_in * x, cond], 1), .25 * sigma.log().reshape(n), encoder_hidden_states=torch.zeros(n, 1, TEXT),
             timestep_cond=ones.expand(n, -1), return_dict=False)[0][:, :-1]
    return x * c_in ** 2 + sigma * c_in * f


def timestep_cond():
    """(1, 160): [ones(64), zeros(64), pooled]; the weights that would read the pooled text are 0."""
    c = torch.zeros(1, 128 + TEXT)
    c[:, :64] = 1
    return c


def small_tokenizer(source, out):
    """The first merges of CLIP's tokenizer (MIT) in `source`, with the vocabulary they need, written into `out`."""
    source, out = Path(source), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    merges = (source / "merges.txt").read_text("utf-8").split("\n")[1:][:MERGES]
    full = json.loads((source / "vocab.json").read_text("utf-8"))
    vocab = sorted(full, key=full.get)[:512] + ["".join(m.split()) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    (out / "vocab.json").write_text(json.dumps({v: i for i, v in enumerate(vocab)}, ensure_ascii=False), "utf-8")
    (out / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        shutil.copy(source / name, out)
    return len(vocab)


@torch.no_grad()
def export(unet, tokenizer_source, out):
    """Write the diffusers folder: UNet and text encoder rounded to f16, the VAE in f32."""
    from safetensors.torch import load_file, save_file
    out = Path(out)
    words = small_tokenizer(tokenizer_source, out / "tokenizer")
    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=words, hidden_size=TEXT, intermediate_size=2 * TEXT, num_attention_heads=2,
                                        num_hidden_layers=1, hidden_act="quick_gelu", bos_token_id=words - 2, eos_token_id=words - 1,
                                        pad_token_id=words - 1, projection_dim=TEXT)).eval()
    StableDiffusionLatentUpscalePipeline(vae=linear_vae(), text_encoder=text, tokenizer=CLIPTokenizer.from_pretrained(out / "tokenizer"),
                                         unet=unet, scheduler=EulerDiscreteScheduler(**SCHEDULER)).save_pretrained(out)
    shutil.rmtree(out / "tokenizer")
    small_tokenizer(tokenizer_source, out / "tokenizer")
    for name in ("text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        tensors = load_file(out / name)
        save_file({k: t.half() if t.is_floating_point() else t for k, t in tensors.items()}, out / name, metadata={"format": "pt"})
