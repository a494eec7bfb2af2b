"""Latents from a diffusers script, piped into sd-upscale: no picture is decoded in between.

    pip install torch diffusers transformers safetensors
    python examples/diffusers_latents.py "a photo of an astronaut" |
        sd-upscale - --latent-scale scaled -p "a photo of an astronaut" -o astronaut.png

--model takes any Stable Diffusion 1.x or 2.x checkpoint, a folder or a repository, and --steps and --seed what they say. Only the latents go to
standard output: diffusers' bars and warnings are on standard error.
"""

import argparse
import sys

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt")
parser.add_argument("--model", default="CompVis/stable-diffusion-v1-4")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

pipe = StableDiffusionPipeline.from_pretrained(args.model, safety_checker=None)
generator = torch.Generator("cpu").manual_seed(args.seed)
# (1, 4, height / 8, width / 8), scaled: what the upscaler takes.
latents = pipe(args.prompt, num_inference_steps=args.steps, generator=generator, output_type="latent").images
sys.stdout.buffer.write(save({"latents": latents.contiguous()}))
