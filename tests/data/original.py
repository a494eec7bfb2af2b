"""The original implementation: k-diffusion's network and what its notebook does around it, on random weights.

`make_reference.py --original` writes original/upscaler.pth (the checkpoint, as the published one is built), what it gives
(original.safetensors, original.json), the published network's names and shapes on both sides (original/published.json), and the
files of torch/: tensors in every form that torch.save writes, and pickles that would run something.

k-diffusion 0.1.1 from PyPI, of which `layers.py`, `sampling.py` and `models/image_v1.py` are loaded alone: the package as a whole imports
what trains and judges models. The notebook's wrapper, guidance and text are those of "Stable Diffusion Upscaler Demo", which the
checkpoint was published with.
"""

import collections
import importlib.util
import io
import json
import os
import pickle
import shutil
import sys
import types
import zipfile
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import make_reference as ref
import random_model
from cases import BLURRY, LATENTS, LONG, SQUARE, WIDE

ORIGINAL = ref.HERE / "original"
TORCH = ref.HERE / "torch"
SEED = 20230105

# As the network is called in the original's configuration.
PUBLISHED = dict(
    c_in=4, feats_in=768, depths=[4] * 4, channels=[384, 384, 768, 768], self_attn_depths=[False] * 3 + [True],
    cross_attn_depths=[False] + [True] * 3, mapping_cond_dim=896, unet_cond_dim=4, cross_cond_dim=768, has_variance=True,
)
# The narrowest that diffusers' blocks take with heads of 64; the middle level has two layers, so that layers are told apart.
SMALL = PUBLISHED | dict(
    feats_in=128, depths=[1, 2, 1], channels=[64, 128, 128], self_attn_depths=[False, False, True],
    cross_attn_depths=[False, True, True], mapping_cond_dim=128 + ref.HIDDEN, cross_cond_dim=ref.HIDDEN,
)

# ---- k-diffusion ----------------------------------------------------------------------------------------------------


def load_k_diffusion():
    """(layers, sampling, image_v1), with stand-ins for what these do not use."""
    root = Path(importlib.util.find_spec("k_diffusion").submodule_search_locations[0])
    nothing = dict.fromkeys(("rearrange", "repeat", "odeint", "integrate", "functional"))
    stand_ins = ("dctorch", "einops", "scipy", "torchdiffeq", "torchsde", "k_diffusion", "k_diffusion.utils", "k_diffusion.models")
    names = stand_ins + ("k_diffusion.sampling", "k_diffusion.layers", "k_diffusion.models.image_v1")
    before = {name: sys.modules.pop(name, None) for name in names}
    for name in stand_ins:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(nothing)
    utils = sys.modules["k_diffusion.utils"]
    utils.append_dims = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]
    package = sys.modules["k_diffusion"]
    package.__path__, package.utils = [str(root)], utils
    sys.modules["k_diffusion.models"].__path__ = [str(root / "models")]
    try:
        found = [importlib.import_module(f"k_diffusion.{name}") for name in ("layers", "sampling", "models.image_v1")]
    finally:
        for name in names:
            sys.modules.pop(name, None)
            if before[name] is not None:
                sys.modules[name] = before[name]
    return found


class NoiseLevelAndTextConditionedUpscaler(nn.Module):
    """The notebook's class of this name."""

    def __init__(self, layers, inner_model, embed_dim=128):
        super().__init__()
        self.inner_model = inner_model
        self.low_res_noise_embed = layers.FourierFeatures(1, embed_dim, std=2)

    def forward(self, input, sigma, low_res, low_res_sigma, c):
        cross_cond, cross_cond_padding, pooler = c
        c_in = 1 / (low_res_sigma**2 + 1) ** 0.5
        c_noise = low_res_sigma.log1p()[:, None]
        low_res_in = F.interpolate(low_res, scale_factor=2, mode="nearest") * c_in[:, None, None, None]
        mapping_cond = torch.cat([self.low_res_noise_embed(c_noise), pooler], dim=1)
        return self.inner_model(
            input, sigma, unet_cond=low_res_in, cross_cond=cross_cond, cross_cond_padding=cross_cond_padding,
            mapping_cond=mapping_cond,
        )


class CFGUpscaler(nn.Module):
    """The notebook's class of this name; here guidance up to 1 is the prompt alone, as in the contract."""

    def __init__(self, model, uc, cond_scale):
        super().__init__()
        self.model, self.uc, self.cond_scale = model, uc, cond_scale

    def forward(self, x, sigma, low_res, low_res_sigma, c):
        if self.cond_scale <= 1:
            return self.model(x, sigma, low_res=low_res, low_res_sigma=low_res_sigma, c=self.uc if self.cond_scale == 0 else c)
        twice = [torch.cat([v] * 2) for v in (x, sigma, low_res, low_res_sigma)]
        both = tuple(torch.cat([u, v]) for u, v in zip(self.uc, c))
        uncond, cond = self.model(twice[0], twice[1], low_res=twice[2], low_res_sigma=twice[3], c=both).chunk(2)
        return uncond + (cond - uncond) * self.cond_scale


# ---- weights --------------------------------------------------------------------------------------------------------


def diffusers_config(config):
    levels, channels = len(config["depths"]), config["channels"]
    attends = config["cross_attn_depths"]
    depths = config["depths"]
    return random_model.UNET | dict(
        in_channels=config["c_in"] + config["unet_cond_dim"],
        out_channels=config["c_in"] + 1,
        block_out_channels=tuple(channels),
        layers_per_block=depths[0] if len(set(depths)) == 1 else tuple(depths),
        down_block_types=tuple("KCrossAttnDownBlock2D" if a else "KDownBlock2D" for a in attends),
        up_block_types=tuple("KCrossAttnUpBlock2D" if a else "KUpBlock2D" for a in reversed(attends)),
        attention_head_dim=64,
        cross_attention_dim=config["cross_cond_dim"],
        time_cond_proj_dim=config["mapping_cond_dim"],
    )


def to_original(name, tensors, config):
    """(the original's key, its value) of the layer `name` of diffusers, of its `tensors` ({leaf: value})."""
    parts = name.split(".")
    fixed = {"conv_in": "proj_in", "conv_out": "proj_out", "time_proj": "timestep_embed", "time_embedding.linear_1": "mapping.0",
             "time_embedding.linear_2": "mapping.2", "time_embedding.cond_proj": "mapping_cond"}
    if name in fixed:
        return fixed[name]
    side, block, kind, layer, *rest = parts
    level = int(block) if side == "down_blocks" else len(config["depths"]) - 1 - int(block)
    each = 1 + config["self_attn_depths"][level] + config["cross_attn_depths"][level]
    place = each * int(layer) + (side == "down_blocks")
    rest = ".".join(rest)
    if kind == "attentions":
        self_attention = rest in ("norm1.linear", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
        place += 1 if self_attention else each - 1
    inner = {"norm1.linear": "main.0.mapper", "conv1": "main.2", "norm2.linear": "main.4.mapper", "conv2": "main.6", "conv_shortcut": "skip"}
    if kind == "attentions":
        inner = {"norm1.linear": "norm_in.mapper", "attn1.to_q": "qkv_proj", "attn1.to_k": "qkv_proj", "attn1.to_v": "qkv_proj",
                 "attn1.to_out.0": "out_proj", "norm2.linear": "norm_dec.mapper", "attn2.norm_cross": "norm_enc",
                 "attn2.to_q": "q_proj", "attn2.to_k": "kv_proj", "attn2.to_v": "kv_proj", "attn2.to_out.0": "out_proj"}
    return f"u_net.{side[0]}_blocks.{block}.{place}.{inner[rest]}"


@torch.no_grad()
def copy_weights(unet, model, config):
    """The weights of diffusers' `unet` into k-diffusion's `model`."""
    gathered = collections.defaultdict(list)
    for key, value in unet.state_dict().items():  # q, k and v in their order
        layer, leaf = key.rsplit(".", 1)
        gathered[f"{to_original(layer, None, config)}.{leaf}"].append(value)
    state = model.state_dict()
    for key, values in gathered.items():
        state[key].copy_(torch.cat(values).reshape(state[key].shape))
    given = set(gathered) | {key for key in state if key.endswith(".kernel")}
    assert given == set(state), set(state) ^ given


@torch.no_grad()
def build(pipe, layers, image_v1):
    """The notebook's model on random weights, and diffusers' network of the same."""
    generator = ref.generator(SEED)
    unet = UNet2DConditionModel(**diffusers_config(SMALL)).eval()
    random_model.fill(unet, random_model.unet_gain, generator)
    context, _, pooled = text(pipe, "a photo of a cat")
    latents = torch.randn(1, 8, 16, 24, generator=generator)
    cond = torch.cat([torch.ones(1, 64), torch.zeros(1, 64), pooled], dim=1)
    out = unet(latents, 0.0, encoder_hidden_states=context, timestep_cond=cond).sample
    random_model.scale_output(unet.conv_out, slice(0, 5), out, mean=0.0, std=0.7)
    for parameter in unet.state_dict().values():
        # Four bits of each are kept: as float16 the file packs to half.
        scale = torch.exp2(torch.floor(torch.log2(parameter.abs().clamp(min=2**-14))) - 3)
        parameter.copy_((parameter / scale).round() * scale)
    model = image_v1.ImageDenoiserModelV1(**SMALL).eval()
    copy_weights(unet, model, SMALL)
    wrapped = NoiseLevelAndTextConditionedUpscaler(layers, model).eval()
    wrapped.low_res_noise_embed.weight.copy_((2 * torch.randn(64, 1, generator=generator)).half())
    return wrapped, unet


# ---- the notebook's run ---------------------------------------------------------------------------------------------


@torch.no_grad()
def text(pipe, prompt):
    """(context, padding, pooled): the notebook's CLIPTokenizerTransform and CLIPEmbedder."""
    tokens = pipe.tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    mask = tokens.attention_mask
    visible = int(mask.sum())
    assert mask[0, :visible].all(), "what is padded stands at the end"
    assert tokens.input_ids[0, visible - 1] == pipe.tokenizer.eos_token_id, "the first end token is visible"
    out = pipe.text_encoder(tokens.input_ids, output_hidden_states=True)
    return out.hidden_states[-1], 1.0 - mask, out.pooler_output


@torch.no_grad()
def run(pipe, model, k, case):
    """Upscaled latents (1, 4, 2h, 2w), scaled."""
    layers, sampling, _ = k
    generator = ref.generator(case["seed"])
    path = ref.INPUTS / case["input"]
    if path.suffix == ".png":
        latents = pipe.vae.encode(ref.pixels(path)).latent_dist.sample(generator) * pipe.vae.config.scaling_factor
    else:
        latents = load_file(path)["latents"]
    level = case["noise_level"]
    if level > 0 and case["noise_type"] == "gaussian":
        latents = latents + level * torch.randn(latents.shape, generator=generator)
    elif level > 0:
        latents = latents * (level**2 + 1) ** 0.5
    prompts = [text(pipe, prompt) for prompt in (case["negative_prompt"] or "", case["prompt"])]
    if case["guidance"] == 0:
        prompts[0] = text(pipe, "")
    if not case["mask_padding"]:
        prompts = [(context, torch.zeros_like(padding), pooled) for context, padding, pooled in prompts]
    denoiser = CFGUpscaler(layers.DenoiserWithVariance(model), prompts[0], case["guidance"])
    scheduler = random_model.scheduler(case["schedule"])
    scheduler.set_timesteps(case["steps"])
    sigmas = scheduler.sigmas[: case["steps"] + 1]
    b, c, h, w = latents.shape
    x = torch.randn(b, c, 2 * h, 2 * w, generator=generator) * scheduler.init_noise_sigma
    extra = {"low_res": latents, "low_res_sigma": torch.full([b], level), "c": prompts[1]}
    return sampling.sample_euler(denoiser, x, sigmas, extra_args=extra, disable=True)


def _case(name, input=SQUARE, steps=3, schedule="karras", guidance=1.0, prompt="a photo of a cat", negative=None, seed=0,
          level=0.0, kind="gaussian", mask=False):
    return dict(name=name, input=input, steps=steps, schedule=schedule, guidance=guidance, prompt=prompt, negative_prompt=negative,
                seed=seed, noise_level=level, noise_type=kind, mask_padding=mask)


CASES = [
    _case("plain"),
    _case("plain-guided", WIDE, guidance=3.0, negative=BLURRY, seed=33),
    _case("log-linear-20", steps=20, schedule="log-linear"),
    _case("gaussian-0.1", level=0.1),
    _case("gaussian-0.6", level=0.6),
    _case("fake-0.1", level=0.1, kind="fake"),
    _case("fake-0.6", level=0.6, kind="fake"),
    _case("gaussian-0.6-latents", LATENTS, level=0.6, seed=5),
    _case("gaussian-0.1-guided", WIDE, level=0.1, guidance=3.0, negative=BLURRY, seed=33),
    _case("masked", mask=True),
    _case("masked-log-linear-20", steps=20, schedule="log-linear", mask=True),
    _case("masked-guided", WIDE, guidance=3.0, negative=BLURRY, seed=33, mask=True),
    # Both keep as many tokens, so that they go through the network together.
    _case("masked-guided-alike", guidance=3.0, negative="a photo of a dog", seed=2, mask=True),
    _case("masked-no-negative", guidance=3.0, mask=True),
    _case("masked-guidance-0", guidance=0.0, mask=True),
    _case("masked-long", prompt=LONG, mask=True),
    _case("masked-end-token", prompt="a cat <|endoftext|> and a dog", mask=True),
    _case("masked-gaussian-0.6-guided", LATENTS, guidance=3.0, negative=BLURRY, seed=5, level=0.6, mask=True),
]


@torch.no_grad()
def same_as_diffusers(pipe, model, unet):
    """k-diffusion's network without a mask, and diffusers' on the same weights: the names are right."""
    x, generator = None, ref.generator(3)
    x, low = torch.randn(1, 4, 16, 24, generator=generator), torch.randn(1, 4, 8, 12, generator=generator)
    context, padding, pooled = text(pipe, "a photo of a cat")
    sigma = torch.tensor([0.7])
    theirs = model(x, sigma, low, torch.zeros(1), (context, torch.zeros_like(padding), pooled))
    cond = torch.cat([torch.ones(1, 64), torch.zeros(1, 64), pooled], dim=1)
    sample = torch.cat([x, F.interpolate(low, scale_factor=2, mode="nearest")], dim=1)
    out = unet(sample, sigma.log() * 0.25, encoder_hidden_states=context, timestep_cond=cond).sample[:, :4]
    error = (theirs - out).norm() / out.norm()
    assert error < 1e-5, error


def reference(pipe):
    k = load_k_diffusion()
    model, unet = build(pipe, k[0], k[2])
    same_as_diffusers(pipe, model, unet)
    shutil.rmtree(ORIGINAL, ignore_errors=True)
    ORIGINAL.mkdir()
    # The published file's root: a dict of `model_ema`, an OrderedDict with `_metadata`.
    state = model.state_dict()
    for key in state:
        state[key] = state[key].half()
        assert torch.equal(state[key].float(), model.state_dict()[key]), key
    torch.save({"model_ema": state}, ORIGINAL / "upscaler.pth")
    published(k[2])
    out = {}
    for case in CASES:
        out[case["name"]] = run(pipe, model, k, case)
        print(f"{case['name']:28} latents std {out[case['name']].std():.3f}")
    for one, other in (("plain", "gaussian-0.1"), ("plain", "fake-0.1"), ("plain", "masked"), ("plain-guided", "masked-guided")):
        distance = (out[one] - out[other]).norm() / out[one].norm()
        assert distance > 5e-3, f"{one} and {other} differ by {distance} alone: a test would not tell them apart"
    ref.save("original", out)
    (ref.REFERENCE / "original.json").write_text(json.dumps(CASES, indent=1) + "\n")
    torch_files()


def published(image_v1):
    """Names and shapes of the published network, the original's and diffusers'."""
    with torch.device("meta"):
        theirs = image_v1.ImageDenoiserModelV1(**PUBLISHED).state_dict()
        ours = UNet2DConditionModel(**diffusers_config(PUBLISHED)).state_dict()
    theirs = {f"inner_model.{key}": list(value.shape) for key, value in theirs.items()}
    theirs["low_res_noise_embed.weight"] = [64, 1]
    ours = {key: list(value.shape) for key, value in ours.items()}
    text = json.dumps({"original": theirs, "diffusers": ours}, separators=(",", ":"))
    (ORIGINAL / "published.json").write_text(text.replace("],", "],\n") + "\n")


# ---- torch.save's files ---------------------------------------------------------------------------------------------


class Payload:
    """What pickles to a call of `os.system`."""

    def __reduce__(self):
        return os.system, ("touch evil-was-run",)


class Hidden:
    """The same in the state of an object that itself is harmless."""

    def __reduce__(self):
        return collections.OrderedDict, (), {"attribute": [("nested", {"deep": Payload()})]}


def tensors():
    """A tensor in every form that torch.save keeps: types, strides, offsets, one storage for several."""
    draw = ref.generator(17)
    base = torch.randn(6, 8, generator=draw)
    all = {
        "plain": torch.randn(3, 5, generator=draw),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "base": base,
        "row": base[2],
        "block": base[1:4, 2:7],
        "transposed": base.t(),
        "every_second": base[:, ::2],
        "permuted": torch.randn(2, 3, 4, 5, generator=draw).permute(3, 1, 0, 2),
        "channels_last": torch.randn(2, 3, 4, 5, generator=draw).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.randn(4, generator=draw)),
    }
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        all[str(dtype).split(".")[1]] = torch.randn(7, generator=draw).to(dtype)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16):
        all[str(dtype).split(".")[1]] = torch.arange(5).to(dtype)
    return all


def torch_files():
    shutil.rmtree(TORCH, ignore_errors=True)
    TORCH.mkdir()
    all = tensors()
    # uint16 in a zip alone: legacy files have no storage for it.
    old = {key: value for key, value in all.items() if key != "uint16"}
    state = lambda tensors: {"model_ema": collections.OrderedDict(tensors), "step": 7, "rate": 0.5, "done": True, "note": None}
    torch.save(state(all), TORCH / "zip.pth")
    torch.save(state(all), TORCH / "zip-protocol-4.pth", pickle_protocol=4)
    torch.save(state(old), TORCH / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file({key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in all.items()}, TORCH / "expected.safetensors")

    some = collections.OrderedDict(plain=torch.ones(2))
    torch.save(Payload(), TORCH / "evil-whole.pth")
    torch.save({"model_ema": some, "other": Hidden()}, TORCH / "evil-hidden.pth")
    torch.save({"model_ema": collections.OrderedDict(plain=torch.ones(2), last=Payload())}, TORCH / "evil-tensor.pth")
    torch.save({"model_ema": some, "late": [0] * 1000 + [Payload()]}, TORCH / "evil-late.pth")
    torch.save({"model_ema": some, "late": Payload()}, TORCH / "evil-legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"model_ema": some, "late": Payload()}, TORCH / "evil-protocol-4.pth", pickle_protocol=4)
    # Behind the end of the pickle.
    sound = io.BytesIO()
    torch.save({"model_ema": some}, sound)
    with zipfile.ZipFile(sound) as read, zipfile.ZipFile(TORCH / "evil-behind.pth", "w") as write:
        for entry in read.infolist():
            content = read.read(entry)
            write.writestr(zipfile.ZipInfo(entry.filename), content + (pickle.dumps(Payload(), 2) if entry.filename.endswith("data.pkl") else b""))
    (TORCH / "evil-protocol-0.pth").write_bytes(pickle.dumps(Payload(), 0))
    (TORCH / "evil-bare.pth").write_bytes(pickle.dumps(Payload(), 2))
