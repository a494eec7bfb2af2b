"""The published configuration at its full size with random weights, and what diffusers makes of it on the CPU.

    python benches/full_size.py make DIR                                       2.3 GB of weights
    python benches/full_size.py make-base DIR                                  a Stable Diffusion 1.4 of the published size, 4.3 GB
    python benches/full_size.py make-taesd DIR                                 an AutoencoderTiny of the published size, 10 MB
    python benches/full_size.py prepare assets/astronaut.png --size 256 --out small.png
    python benches/full_size.py run DIR --image small.png --steps 4 --out ref.png --latents ref.safetensors
    python benches/full_size.py compare ref.png ours.png                       or two latents files

`run` prints the seconds of each stage and the peak memory of the process; compare.py runs it beside the binary.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderTiny, StableDiffusionLatentUpscalePipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
sys.path.insert(0, str(DATA))
import random_model

SEED = 1

# text_encoder/config.json, unet/config.json and vae/config.json of stabilityai/sd-x2-latent-upscaler
TEXT = dict(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    projection_dim=768,
    hidden_act="quick_gelu",
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)
UNET = dict(
    block_out_channels=(384, 384, 768, 768),
    layers_per_block=4,
    attention_head_dim=64,
    cross_attention_dim=768,
    time_cond_proj_dim=896,
)
VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32, sample_size=512)

# unet/config.json of CompVis/stable-diffusion-v1-4
BASE_UNET = dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8, cross_attention_dim=768)


def sample_image():
    """(1, 3, 64, 96) in [-1, 1]."""
    image = np.asarray(Image.open(DATA / "inputs" / "wide-96x64.png").convert("RGB"), dtype=np.float32)
    return torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1


def write(folder, parts, layout):
    """Text encoder, UNet and VAE beside the tokenizer of the tests and the index of one of their models."""
    for name, module in zip(("text_encoder", "unet", "vae"), parts):
        module.save_pretrained(folder / name)
        print(f"{name}: {sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters")
    shutil.copytree(DATA / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    shutil.copyfile(DATA / layout / "model_index.json", folder / "model_index.json")


def make_base(args):
    write(args.folder, random_model.build_base(CLIPTextConfig(**TEXT), BASE_UNET, VAE, sample_image(), SEED + 1), "base/sd1")
    shutil.copytree(DATA / "base" / "sd1" / "scheduler", args.folder / "scheduler", dirs_exist_ok=True)


def make(args):
    write(args.folder, random_model.build(CLIPTextConfig(**TEXT), UNET, VAE, sample_image(), SEED), "model")
    random_model.scheduler("log-linear").save_pretrained(args.folder / "scheduler")


def make_taesd(args):
    # diffusers' defaults are madebyollin/taesd's config.json.
    vae = random_model.build_tiny_vae({}, sample_image(), SEED)
    vae.save_pretrained(args.folder)
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters")


def resized(path, size):
    image = Image.open(path).convert("RGB")
    return image.resize((size, size), Image.BOX) if size else image


def prepare(args):
    resized(args.image, args.size).save(args.out)


def finished(stages, label, start):
    seconds = time.perf_counter() - start
    stages.setdefault(label, []).append(round(seconds, 3))
    print(f"{label} {seconds:.3f} s", file=sys.stderr, flush=True)


def timed(owner, name, stages, label):
    """Replaces the method `name` of `owner` by one that appends its seconds to stages[label], and says so at once on
    standard error, where compare.py watches the stages go by."""
    method = getattr(owner, name)

    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = method(*args, **kwargs)
        finished(stages, label, start)
        return result

    setattr(owner, name, wrapper)


@torch.no_grad()
def run(args):
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    pipe = StableDiffusionLatentUpscalePipeline.from_pretrained(args.folder, dtype=torch.float32)
    pipe.scheduler = random_model.scheduler(args.schedule)
    if args.vae:
        pipe.vae = AutoencoderTiny.from_pretrained(args.vae)
    pipe.set_progress_bar_config(disable=True)
    if args.tiling:
        pipe.vae.enable_tiling()
    stages = {}
    finished(stages, "load", start)
    timed(pipe, "encode_prompt", stages, "text")
    timed(pipe.vae, "encode", stages, "encode")
    timed(pipe.unet, "forward", stages, "unet")
    timed(pipe.vae, "decode", stages, "decode")

    start = time.perf_counter()
    latents = pipe(
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        image=resized(args.image, args.size),
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=torch.Generator("cpu").manual_seed(args.seed),
        output_type="latent",
    ).images
    image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    image = pipe.image_processor.postprocess(image, output_type="pil")[0]
    total = time.perf_counter() - start
    image.save(args.out)
    if args.latents:
        save_file({"latents": latents.contiguous()}, args.latents)

    levels = np.asarray(image)
    report = {
        "seconds": stages,
        "total_without_load": round(total, 3),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "threads": args.threads,
        "latents_std": round(latents.std().item(), 4),
        "levels_mean_std": [round(float(levels.mean()), 2), round(float(levels.std()), 2)],
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers, np)}
        | {"python": platform.python_version()},
    }
    print(json.dumps(report, indent=1))


def compare(args):
    if args.a.suffix == ".safetensors":
        a, b = (next(iter(load_file(p).values())).double() for p in (args.a, args.b))
        if a.shape != b.shape:
            sys.exit(f"{args.a} is {tuple(a.shape)}, {args.b} is {tuple(b.shape)}")
        difference = a - b
        print(f"relative error: {difference.norm() / a.norm():.3e} (root mean square)")
        print(f"largest: {difference.abs().max():.3e} of {a.abs().max():.3f}")
        return
    a, b = (np.asarray(Image.open(p).convert("RGB"), dtype=np.int16) for p in (args.a, args.b))
    if a.shape != b.shape:
        sys.exit(f"{args.a} is {a.shape[1]}x{a.shape[0]}, {args.b} is {b.shape[1]}x{b.shape[0]}")
    difference = np.abs(a - b)
    print(f"levels: {difference.max()} at most, {difference.mean():.5f} in the mean")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("make", help="write the model")
    command.add_argument("folder", type=Path)
    command.set_defaults(do=make)

    command = commands.add_parser("make-base", help="write a Stable Diffusion 1.4")
    command.add_argument("folder", type=Path)
    command.set_defaults(do=make_base)

    command = commands.add_parser("make-taesd", help="write an AutoencoderTiny")
    command.add_argument("folder", type=Path)
    command.set_defaults(do=make_taesd)

    command = commands.add_parser("prepare", help="write an image scaled down to a square, each pixel a box average")
    command.add_argument("image", type=Path)
    command.add_argument("--size", type=int, default=256)
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(do=prepare)

    command = commands.add_parser("run", help="upscale with diffusers, float32, on the CPU")
    command.add_argument("folder", type=Path)
    command.add_argument("--image", type=Path, required=True)
    command.add_argument("--size", type=int, help="scale the image to this square first, as prepare does")
    command.add_argument("--prompt", default="")
    command.add_argument("--negative-prompt")
    command.add_argument("--steps", type=int, default=4)
    command.add_argument("--schedule", choices=("karras", "log-linear"), default="karras")
    command.add_argument("--guidance", type=float, default=1.0)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--threads", type=int, default=os.cpu_count())
    command.add_argument("--vae", type=Path, help="a folder of an AutoencoderTiny to use in place of the model's VAE")
    command.add_argument("--tiling", action="store_true", help="the VAE tile by tile, as enable_tiling does")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--latents", type=Path)
    command.set_defaults(do=run)

    command = commands.add_parser("compare", help="how far apart two images, or two files of latents, are")
    command.add_argument("a", type=Path)
    command.add_argument("b", type=Path)
    command.set_defaults(do=compare)

    args = parser.parse_args()
    torch.manual_seed(0)
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    args.do(args)


if __name__ == "__main__":
    main()
