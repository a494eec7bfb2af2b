"""diffusers' side of benches/cuda.py: one process that upscales pictures and prints, as JSON, what it measured.

    python benches/cuda_diffusers.py MODEL PICTURE... --out FOLDER [--device cuda] [--dtype f16] [--mode eager]

A step is the time between the first and the last of the pipeline's callbacks over their distance, a decode that of
`vae.decode`, both with the device synchronised at their ends and nowhere between; the first group of pictures is left
out where there are others, so that neither holds the choice of kernels or a compilation.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import full_size
import torch
from diffusers import StableDiffusionLatentUpscalePipeline
from PIL import Image
from safetensors.torch import save_file

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def load(args):
    # Without TF32: float32 here is what the other program is checked against.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    pipe = StableDiffusionLatentUpscalePipeline.from_pretrained(args.model, dtype=DTYPES[args.dtype])
    pipe = pipe.to(args.device)
    pipe.scheduler = full_size.random_model.scheduler("karras")
    pipe.set_progress_bar_config(disable=True)
    if args.mode != "eager":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if args.mode == "compile":
        # Without a card this checks the calls, not the compiler.
        how = {"mode": "max-autotune"} if args.device == "cuda" else {"backend": "eager"}
        pipe.unet.compile(**how)
        pipe.vae.decoder.compile(**how)
    return pipe


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="f16")
    parser.add_argument("--mode", choices=("eager", "channels-last", "compile"), default="eager")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--latents", action="store_true", help="write the latents too")
    args = parser.parse_args()

    def now():
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    pipe = load(args)
    args.out.mkdir(parents=True, exist_ok=True)
    steps, decodes, groups = [], [], []
    for first in range(0, len(args.pictures), args.batch):
        start = time.perf_counter()
        paths = args.pictures[first : first + args.batch]
        ends = []

        def mark(step, timestep, latents):
            if step in (0, args.steps - 1):
                ends.append(now())

        latents = pipe(
            prompt=[args.prompt] * len(paths),
            image=[Image.open(path).convert("RGB") for path in paths],
            num_inference_steps=args.steps,
            guidance_scale=1.0,
            generator=[torch.Generator("cpu").manual_seed(0) for _ in paths],
            output_type="latent",
            callback=mark,
            callback_steps=1,
        ).images
        for path, latent in zip(paths, latents):
            began = now()
            image = pipe.vae.decode(latent[None] / pipe.vae.config.scaling_factor).sample
            decodes.append(now() - began)
            image = pipe.image_processor.postprocess(image, output_type="pil")[0]
            image.save(args.out / f"{path.stem}.png")
            if args.latents:
                save_file({"latents": latent[None].float().cpu()}, args.out / f"{path.stem}.safetensors")
        if len(ends) == 2:
            steps.append((ends[1] - ends[0]) / (args.steps - 1) / len(paths))
        groups.append(time.perf_counter() - start)

    def typical(values, skipped):
        return statistics.median(values[skipped:] or values) if values else None

    report = {
        "step": typical(steps, 1),
        "decode": typical(decodes, args.batch),
        "picture": typical(groups, 1) / args.batch,
    }
    if args.device == "cuda":
        report["reserved"] = torch.cuda.max_memory_reserved()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
