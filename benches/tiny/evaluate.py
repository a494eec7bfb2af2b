"""Write the built-in model's folder from a training run, judge it on the held-out photographs, and draw the comparison.

    python evaluate.py export RUN/unet.pt TOKENIZER_FOLDER assets/tiny
    python evaluate.py table assets/tiny DATA_FOLDER > table.md          # PSNR, SSIM, back to input; diffusers' own pipeline
    python evaluate.py figure assets/tiny DATA_FOLDER assets/tiny.png

TOKENIZER_FOLDER holds the four files of CLIP's tokenizer (those of the real model's repository, or openai/clip-vit-large-patch14).
Needs scikit-image beside what training needs.
"""
import argparse

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionLatentUpscalePipeline
from PIL import Image, ImageDraw, ImageFont
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from parts import export, start_unet
from pictures import HELD_OUT, fetch

MULTIPLE = 32                 # sides of the original: the enlarged latents must halve four times
CROPS = {"astronaut": (165, 60), "coffee": (330, 150), "rocket": (290, 150), "grace_hopper": (150, 110)}      # left, top of the figure's details


def pipeline(folder):
    pipe = StableDiffusionLatentUpscalePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def ours(pipe, small, steps, karras=True, seed=0):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=karras)
    return pipe(prompt="", image=small, num_inference_steps=steps, guidance_scale=1., generator=torch.Generator().manual_seed(seed)).images[0]


@torch.no_grad()
def there_and_back(pipe, image):
    """The VAE alone on the original: what no denoiser can exceed."""
    x = torch.from_numpy(np.asarray(image).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    y = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample[0].clamp(-1, 1)
    return Image.fromarray(((y.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8))


def pair(image):
    """(original cropped to whole multiples, its box-downscaled half)."""
    w, h = (v // MULTIPLE * MULTIPLE for v in image.size)
    image = image.crop((0, 0, w, h))
    return image, image.resize((w // 2, h // 2), Image.BOX)


def psnr(a, b):
    """In dB over whole levels; 99 stands for equal pictures."""
    return 99. if np.array_equal(a, b) else peak_signal_noise_ratio(a, b)


def candidates(pipe, original, small):
    size = original.size
    yield "nearest", lambda: small.resize(size, Image.NEAREST)
    yield "bicubic", lambda: small.resize(size, Image.BICUBIC)
    yield "Lanczos", lambda: small.resize(size, Image.LANCZOS)
    for steps in (1, 5, 20):
        yield f"tiny, karras {steps}", lambda steps=steps: ours(pipe, small, steps)
    yield "tiny, log-linear 20", lambda: ours(pipe, small, 20, karras=False)
    yield "its VAE alone (99: exact)", lambda: there_and_back(pipe, original)


def table(pipe, photographs):
    rows, names = {}, list(photographs)
    for name, image in photographs.items():
        original, small = pair(image)
        for label, make in candidates(pipe, original, small):
            a, b = np.asarray(make()), np.asarray(original)
            back = np.asarray(Image.fromarray(a).resize(small.size, Image.BOX))
            rows.setdefault(label, {})[name] = (psnr(b, a), structural_similarity(b, a, channel_axis=2),
                                                psnr(np.asarray(small), back))
    for k, (title, digits) in enumerate((("PSNR (dB)", 2), ("SSIM", 4), ("output box-downscaled against the input, PSNR (dB)", 1))):
        print(f"\n| {title} | " + " | ".join(names) + " | mean |\n| --- |" + " ---: |" * (len(names) + 1))
        for label, row in rows.items():
            if k == 2 and "tiny" not in label:
                continue
            v = [row[n][k] for n in names]
            print(f"| {label} | " + " | ".join(f"{x:.{digits}f}" for x in [*v, np.mean(v)]) + " |")


def figure(pipe, photographs, out, side=112, zoom=3):
    """One row per photograph: nearest, bicubic, ours at the command's defaults (20 karras steps), original."""
    columns = ("input (nearest)", "bicubic", "tiny, 20 steps", "original")
    cell, head = side * zoom, 28
    sheet = Image.new("RGB", (cell * 4 + 12, (cell + 4) * len(CROPS) + head), "white")
    draw = ImageDraw.Draw(sheet)
    for i, c in enumerate(columns):
        draw.text((i * (cell + 4) + 6, 4), c, fill="black", font=ImageFont.load_default(size=18))
    for j, (name, (x, y)) in enumerate(CROPS.items()):
        original, small = pair(photographs[name])
        for i, im in enumerate((small.resize(original.size, Image.NEAREST), small.resize(original.size, Image.BICUBIC), ours(pipe, small, 20), original)):
            sheet.paste(im.crop((x, y, x + side, y + side)).resize((cell, cell), Image.NEAREST), (i * (cell + 4), head + j * (cell + 4)))
    sheet.save(out, optimize=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("export", "table", "figure")), p.add_argument("paths", nargs="+")
    a = p.parse_args()
    torch.set_num_threads(2)
    if a.what == "export":
        weights, tokenizer, out = a.paths
        unet = start_unet()
        unet.load_state_dict(torch.load(weights))
        return export(unet, tokenizer, out)
    pipe, photographs = pipeline(a.paths[0]), fetch(a.paths[1], HELD_OUT)
    table(pipe, photographs) if a.what == "table" else figure(pipe, photographs, a.paths[2])


if __name__ == "__main__":
    main()
