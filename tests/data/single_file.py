"""Checkpoints in a single file: the names that the published code gives its tensors, and what diffusers makes of such a file.

    python tests/data/single_file.py COMPVIS STABILITY OPEN_CLIP           write base/single_file.json, reference/single_file.safetensors
                                                                           and torch/lightning.ckpt
    python tests/data/single_file.py COMPVIS STABILITY OPEN_CLIP --check   write nothing; hold what stands there to what would be written, and
                                                                           show that diffusers makes base/sd1 and base/sd2 of their single files

The three are checkouts of CompVis/stable-diffusion (21f890f), Stability-AI/stablediffusion (cf1d67a) and mlfoundations/open_clip (89fb801), whose
networks are built here for the names and shapes of their tensors: 1.x of the first, 2.x of the others. Nothing of them is run but constructors.
What each tensor is in diffusers is what `loaders/single_file_utils.py` makes of it. The single files themselves are not in the repository: the tests
write them with `value`.
"""

import argparse
import collections
import contextlib
import copy
import importlib
import io
import json
import math
import pickle
import shutil
import sys
import tempfile
import types
import zipfile
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils as ldm
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import make_base_reference as base
from make_reference import HERE, REFERENCE, generator

TABLE = HERE / "base" / "single_file.json"
NUMBERS = REFERENCE / "single_file.safetensors"
CKPT = HERE / "torch" / "lightning.ckpt"

# The text encoders: openai/clip-vit-large-patch14 (transformers' configuration) and OpenCLIP's ViT-H-14 (its `text_cfg`).
TEXT = {
    "1": dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu"),
    "2": dict(vocab_size=49408, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act="gelu"),
}
# The narrowest that the constants of the published networks allow: 32 groups, 8 heads or heads of 64. Levels of two widths, one without attention.
SMALL_UNET = dict(model_channels=64, channel_mult=[1, 2, 2], num_res_blocks=1, attention_resolutions=[1, 2], context_dim=64)
SMALL_VAE = dict(ch=32, ch_mult=[1, 1, 2, 2], num_res_blocks=1)
SMALL_TEXT = dict(vocab_size=714, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=1)
CASES = {
    "1": dict(dtype="F16", steps=4, guidance=3.0, seed=41, size=(96, 64), pixels=512),
    "2": dict(dtype="F32", steps=4, guidance=3.0, seed=42, size=(64, 64), pixels=768),
}
MODELS = {"1": "sd1", "2": "sd2"}


# ---- the published code --------------------------------------------------------------------------------------------


def stand_in(name, **content):
    module = types.ModuleType(name)
    module.__dict__.update(content)
    return sys.modules.setdefault(name, module)


def load_code(folder, names):
    """Modules of a checkout, with stand-ins for what constructors do not need."""
    sys.path.insert(0, str(folder))
    stand_in("einops", rearrange=None, repeat=None)
    stand_in("omegaconf")
    stand_in("omegaconf.listconfig", ListConfig=list)
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] in ("ldm", "open_clip")]:
            del sys.modules[name]


def load_open_clip(folder):
    """`transformer.py` alone: the package as a whole imports what trains and loads."""
    stand_in("open_clip", __path__=[str(folder / "src" / "open_clip")])
    stand_in("open_clip.utils", to_2tuple=None, feature_take_indices=None)
    return load_code(folder / "src", ["open_clip.transformer"])[0]


class Code:
    def __init__(self, compvis, stability, open_clip):
        names = ["ldm.modules.diffusionmodules.openaimodel", "ldm.modules.diffusionmodules.model"]
        self.ldm = {version: load_code(folder, names) for version, folder in (("1", compvis), ("2", stability))}
        self.open_clip = load_open_clip(open_clip)
        configs = {"1": compvis / "configs/stable-diffusion/v1-inference.yaml", "2": stability / "configs/stable-diffusion/v2-inference-v.yaml"}
        self.configs = {version: yaml.safe_load(path.read_text()) for version, path in configs.items()}

    def config(self, version, unet={}, vae={}):
        config = copy.deepcopy(self.configs[version])
        params = config["model"]["params"]
        params["unet_config"]["params"] |= unet
        params["first_stage_config"]["params"]["ddconfig"] |= vae
        return config

    def shapes(self, version, config, text):
        """Every tensor of the three networks under its key in the file."""
        unet, autoencoder = self.ldm[version]
        params = config["model"]["params"]
        vae, embed = params["first_stage_config"]["params"]["ddconfig"], params["first_stage_config"]["params"]["embed_dim"]
        with torch.device("meta"):
            parts = {
                "model.diffusion_model": unet.UNetModel(**params["unet_config"]["params"] | dict(use_fp16=False)),
                "first_stage_model.encoder": autoencoder.Encoder(**vae),
                "first_stage_model.decoder": autoencoder.Decoder(**vae),
                # `AutoencoderKL` of ldm/models/autoencoder.py, which imports what trains it.
                "first_stage_model.quant_conv": torch.nn.Conv2d(2 * vae["z_channels"], 2 * embed, 1),
                "first_stage_model.post_quant_conv": torch.nn.Conv2d(embed, vae["z_channels"], 1),
            }
            if version == "1":
                # transformers' `CLIPTextModel` of that time had it all in one more module, and the positions' numbers as a buffer.
                parts["cond_stage_model.transformer.text_model"] = CLIPTextModel(CLIPTextConfig(**text))
                extra = {"cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77)}
            else:
                names = dict(width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads", vocab_size="vocab_size", output_dim="hidden_size")
                sizes = {name: text[key] for name, key in names.items()}
                parts["cond_stage_model.model"] = self.open_clip.TextTransformer(**sizes, mlp_ratio=text["intermediate_size"] / text["hidden_size"])
                extra = {"cond_stage_model.model.logit_scale": ()}
        found = {f"{prefix}.{key}": tuple(value.shape) for prefix, part in parts.items() for key, value in part.state_dict().items()}
        return found | extra


# ---- what diffusers makes of it -----------------------------------------------------------------------------------


def configurations(config, version, checkpoint, text):
    layers = text["num_hidden_layers"] - (version == "2" and text["num_hidden_layers"] == 24)
    return {
        "unet": ldm.create_unet_diffusers_config_from_ldm(config, checkpoint),
        "vae": ldm.create_vae_diffusers_config_from_ldm(config, checkpoint),
        "text_encoder": text | dict(num_hidden_layers=layers),
    }


def convert(checkpoint, configs, version):
    """The file's tensors in diffusers' names, by diffusers."""
    unet = ldm.convert_ldm_unet_checkpoint(dict(checkpoint), configs["unet"])
    vae = ldm.convert_ldm_vae_checkpoint(dict(checkpoint), configs["vae"])
    if version == "1":
        text = ldm.convert_ldm_clip_checkpoint(dict(checkpoint))
    else:
        model = types.SimpleNamespace(config=types.SimpleNamespace(hidden_size=configs["text_encoder"]["hidden_size"]))
        text = ldm.convert_open_clip_checkpoint(model, dict(checkpoint))
    # No part of the network that is asked for.
    for key in ("text_projection.weight", "text_model.embeddings.position_ids"):
        text.pop(key, None)
    return {"unet": unet, "vae": vae, "text_encoder": text}


def table(shapes, configs, version):
    """Original key -> its names in diffusers, `part/name`; several where it is cut."""
    marked = {key: torch.tensor(float(number)).expand(shape) for number, (key, shape) in enumerate(shapes.items())}
    keys = list(shapes)
    names = {key: [] for key in keys}
    for part, tensors in convert(marked, configs, version).items():
        for name, tensor in tensors.items():
            number = int(tensor.flatten()[0])
            names[keys[number]].append((f"{part}/{name}", tuple(tensor.shape)))
    return names


def tree(flat):
    """A dict of dotted keys as dicts in dicts."""
    root = {}
    for key, value in flat.items():
        *above, last = key.split(".")
        at = root
        for name in above:
            at = at.setdefault(name, {})
        at[last] = value
    return root


# ---- values ---------------------------------------------------------------------------------------------------------


def value(key, shape, mean, spread, dtype):
    """Numbers that the tests make as well: splitmix64 from the key's FNV-1a, 24 bits of each, `mean` +- `spread`."""
    seed = 0xCBF29CE484222325
    for byte in key.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    uniform = (z >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)
    values = np.float32(mean) + np.float32(spread) * uniform
    return torch.from_numpy(values.reshape(shape)).to({"F16": torch.float16, "F32": torch.float32}[dtype])


def law(key, shape, names):
    """(mean, spread) under which every layer matters and latents stay near 1."""
    layer = names[0].rsplit(".", 1)[0].rsplit("/", 1)[1] if names else ""
    if len(shape) < 2:
        norm = "norm" in layer or "ln_" in key
        return (1.0, 0.5) if norm and key.endswith("weight") else (0.0, 0.3)
    if "embed" in key and "cond_stage" in key:
        return 0.0, 0.5
    gain = 0.5 if any(name in layer for name in ("conv2", "to_out", "net.2", "fc2", "out_proj")) else 1.5 if "to_q" in layer or "to_k" in layer else 1.0
    return 0.0, float(f"{gain * math.sqrt(3 / math.prod(shape[1:])):.3g}")


# What else such files hold. The averaged weights are of other values than the plain ones.
BESIDE = {
    "betas": (1000,),
    "alphas_cumprod": (1000,),
    "model_ema.decay": (),
    "model_ema.num_updates": (),
    "model_ema.diffusion_modelinput_blocks00weight": (64, 4, 3, 3),
    "first_stage_model.loss.logvar": (),
    "cond_stage_model.logit_scale": (),
}


def small(code, version):
    """(configuration of the training, of the text encoder, original key -> [names, shape, mean, spread])"""
    config = code.config(version, SMALL_UNET, SMALL_VAE)
    text = TEXT[version] | SMALL_TEXT
    shapes = code.shapes(version, config, text) | BESIDE
    names = table(shapes, configurations(config, version, {}, text), version)
    if version == "2":
        # The last block of OpenCLIP's, of another number here: it stands where no use is made of it.
        last = {key.replace("resblocks.1.", "resblocks.23."): shape for key, shape in shapes.items() if "resblocks.1." in key}
        shapes |= last
        names |= dict.fromkeys(last, [])
    rows = {}
    for key, shape in shapes.items():
        own = [name for name, _ in names[key]]
        rows[key] = [own, list(shape), *law(key, shape, own)]
    return config, text, rows


def small_file(rows, dtype, path):
    save_file({key: value(key, shape, mean, spread, dtype) for key, (_, shape, mean, spread) in rows.items()}, path)


def write_folder(folder, config, version, text, case):
    """The configurations of a small file, of which `from_single_file` takes all that it does not read."""
    configs = configurations(config, version, {}, text)
    size = dict(sample_size=case["pixels"] // 8)
    model = MODELS[version]
    with torch.device("meta"):
        UNet2DConditionModel(**configs["unet"] | size).save_config(folder / "unet")
        AutoencoderKL(**configs["vae"]).save_config(folder / "vae")
    CLIPTextConfig(**configs["text_encoder"], bos_token_id=0, eos_token_id=2, pad_token_id=1).save_pretrained(folder / "text_encoder")
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(HERE / "base" / model / name, folder / name)
    shutil.copy(HERE / "base" / model / "model_index.json", folder)


@torch.no_grad()
def numbers(code):
    """Latents that diffusers makes by each small file, and what its VAE makes of latents."""
    out = {}
    for version, case in CASES.items():
        config, text, rows = small(code, version)
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            small_file(rows, case["dtype"], folder / "file.safetensors")
            write_folder(folder, config, version, text, case)
            pipe = from_single_file(folder / "file.safetensors", folder)
        out[f"{version}.latents"] = latents_of(pipe, case)
        latents = torch.randn(1, 4, 4, 6, generator=generator(case["seed"]))
        picture = pipe.vae.decode(latents).sample
        out |= {f"{version}.decode.latents": latents, f"{version}.decode.picture": picture}
        out[f"{version}.encode.mean"] = pipe.vae.encode(picture.clamp(-1, 1)).latent_dist.mean
    return {key: tensor.contiguous() for key, tensor in out.items()}


# Two tensors of one shape that a mistake in the names could exchange, and a wrong number of heads.
EXCHANGED = {
    "a query and its key": ("model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight", "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_k.weight"),
    "a resnet's convolutions": ("model.diffusion_model.middle_block.0.in_layers.2.weight", "model.diffusion_model.middle_block.0.out_layers.3.weight"),
    "two resnets' norms": ("model.diffusion_model.middle_block.0.in_layers.0.weight", "model.diffusion_model.middle_block.2.in_layers.0.weight"),
}


@torch.no_grad()
def sensitivity(code):
    """By how much a file with two tensors exchanged, or other heads, moves the latents: the least of what the tests must see."""
    least = 1.0
    expected = load_file(NUMBERS)
    for version, case in CASES.items():
        config, text, rows = small(code, version)
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            write_folder(folder, config, version, text, case)
            whole = {key: value(key, shape, mean, spread, case["dtype"]) for key, (_, shape, mean, spread) in rows.items()}
            for what, pair in EXCHANGED.items():
                changed = dict(whole, **dict(zip(pair, reversed([whole[key] for key in pair]))))
                save_file(changed, folder / "file.safetensors")
                pipe = from_single_file(folder / "file.safetensors", folder)
                moved = base.relative(latents_of(pipe, case), expected[f"{version}.latents"])
                print(f"{version}: {what} exchanged: {moved:.1e}")
                least = min(least, moved)
            save_file(whole, folder / "file.safetensors")
            heads = json.loads((folder / "unet" / "config.json").read_text())
            heads["attention_head_dim"] = 4 if version == "1" else [1, 1, 1]
            (folder / "unet" / "config.json").write_text(json.dumps(heads))
            pipe = from_single_file(folder / "file.safetensors", folder)
            moved = base.relative(latents_of(pipe, case), expected[f"{version}.latents"])
            print(f"{version}: other heads: {moved:.1e}")
            least = min(least, moved)
    assert least > 3e-3, least


def latents_of(pipe, case):
    width, height = case["size"]
    arguments = dict(negative_prompt=base.NEGATIVE, num_inference_steps=case["steps"], guidance_scale=case["guidance"], width=width, height=height)
    return pipe(base.PROMPT, generator=generator(case["seed"]), output_type="latent", **arguments).images


def from_single_file(path, config):
    pipe = StableDiffusionPipeline.from_single_file(str(path), config=str(config), torch_dtype=torch.float32, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- what is written ------------------------------------------------------------------------------------------------


def published(code, version):
    config, text = code.config(version), TEXT[version]
    shapes = code.shapes(version, config, text)
    marks = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    configs = configurations(config, version, marks, text)
    of_diffusers = {name: list(shape) for names in table(shapes, configs, version).values() for name, shape in names}
    return {
        "original": tree({key: list(shape) for key, shape in shapes.items()}),
        "diffusers": tree(of_diffusers),
        "configs": configs,
    }


def document(code):
    both = {"prompt": base.PROMPT, "negative_prompt": base.NEGATIVE, "published": {}, "small": {}}
    for version, case in CASES.items():
        both["published"][version] = published(code, version)
        config, text, rows = small(code, version)
        both["small"][version] = dict(case, tensors=tree(rows))
    return json.loads(json.dumps(both))


class ModelCheckpoint:
    """What PyTorch Lightning names in the checkpoints that it writes."""


def write_lightning():
    """A checkpoint as the first of Stable Diffusion were: what Lightning knows of the training stands beside the tensors."""
    names = "pytorch_lightning.callbacks.model_checkpoint".split(".")
    for count in range(1, len(names) + 1):
        sys.modules[".".join(names[:count])] = types.ModuleType(".".join(names[:count]))
    ModelCheckpoint.__module__ = ".".join(names)
    sys.modules[".".join(names)].ModelCheckpoint = ModelCheckpoint
    saved = {
        "epoch": 3,
        "global_step": 875000,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {ModelCheckpoint: {"best_model_score": np.float64(0.25), "best_model_path": "somewhere"}},
        "state_dict": collections.OrderedDict({"betas": torch.ones(3), "model.diffusion_model.out.2.bias": torch.arange(4.0), "no tensor": 3}),
        "lr_schedulers": [{"base_lrs": [1e-4], "last_epoch": np.int64(3)}],
    }
    written = io.BytesIO()
    torch.save(saved, written)
    # numpy was of an older version then.
    with zipfile.ZipFile(written) as read, zipfile.ZipFile(CKPT, "w") as write:
        for entry in read.infolist():
            write.writestr(zipfile.ZipInfo(entry.filename), read.read(entry).replace(b"numpy._core.", b"numpy.core."))
    assert b"numpy.core.multiarray" in CKPT.read_bytes() and b"ModelCheckpoint" in CKPT.read_bytes()


# ---- checks ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def any_groups():
    """The published code has 32 groups in every norm, where these networks have fewer: the tensors are of the same shapes."""
    norm = torch.nn.GroupNorm
    init = norm.__init__
    norm.__init__ = lambda self, num_groups, num_channels, **more: init(self, 1, num_channels, **more)
    try:
        yield
    finally:
        norm.__init__ = init


@torch.no_grad()
def check_folders(code):
    """base/sd1 and base/sd2 as single files: diffusers' conversions give exactly the folders' tensors, and `from_single_file` the same latents."""
    widths = dict(model_channels=16, channel_mult=[1, 2, 2, 2], context_dim=48)
    vae = dict(ch=8, ch_mult=[1, 1, 2, 2], num_res_blocks=1)
    for version, model in MODELS.items():
        folder = HERE / "base" / model
        heads = dict(num_heads=4) if version == "1" else dict(num_head_channels=8)
        layers = dict(num_res_blocks=2 if version == "1" else 1)
        text = TEXT[version] | dict(vocab_size=714, hidden_size=48, intermediate_size=96, num_hidden_layers=2 if version == "1" else 3, num_attention_heads=3)
        config = code.config(version, widths | heads | layers, vae)
        with any_groups():
            shapes = code.shapes(version, config, text)
        configs = configurations(config, version, {}, text)
        tensors = {part: load_part(folder, part) for part in ("unet", "vae", "text_encoder")}
        checkpoint = {}
        for key, names in table(shapes, configs, version).items():
            own = [tensors[part][name.removeprefix("text_model.")] for part, name in (full.split("/") for full, _ in names)]
            checkpoint[key] = torch.cat(own).reshape(shapes[key]) if own else torch.zeros(shapes[key])
        converted = convert(checkpoint, configs, version)
        for part, expected in tensors.items():
            found = {name.removeprefix("text_model."): tensor for name, tensor in converted[part].items()}
            assert found.keys() == expected.keys(), (part, found.keys() ^ expected.keys())
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), part
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "file.safetensors"
            save_file({key: tensor.contiguous().clone() for key, tensor in checkpoint.items()}, path)
            pipe = from_single_file(path, folder)
        case = next(case for case in base.CASES if case["model"] == model and not case["scheduler"])
        latents = latents_of(pipe, case)
        expected = load_file(REFERENCE / "base_end_to_end.safetensors")[case["name"]]
        print(f"{model}: {len(checkpoint)} tensors as in the folder; latents {base.relative(latents, expected):.1e} from the folder's")
        assert base.relative(latents, expected) < 1e-5


def load_part(folder, part):
    (path,) = (folder / part).glob("*.safetensors")
    return load_file(path)


def check_written(code):
    assert json.loads(TABLE.read_text()) == document(code), "base/single_file.json is another"
    expected, found = load_file(NUMBERS), numbers(code)
    assert expected.keys() == found.keys()
    for key, tensor in found.items():
        print(f"{key}: {base.relative(tensor, expected[key]):.1e} from what stands there, std {float(tensor.std()):.2f}")
        assert base.relative(tensor, expected[key]) < 1e-5


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("compvis", "stability", "open_clip"):
        parser.add_argument(name, type=Path, help="the checkout")
    parser.add_argument("--check", action="store_true", help="write nothing, and hold what stands there to what would be written")
    args = parser.parse_args()
    code = Code(args.compvis, args.stability, args.open_clip)
    if args.check:
        check_written(code)
        sensitivity(code)
        check_folders(code)
    else:
        text = json.dumps(document(code), separators=(",", ":"))
        TABLE.write_text(text.replace('},"', '},\n"') + "\n")
        save_file(numbers(code), NUMBERS)
        write_lightning()
