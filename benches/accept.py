"""The published weights, fetched, and sd-upscale beside diffusers on ten pictures and latents: a table and a verdict.

    cargo build --release
    pip install torch diffusers transformers pillow
    python benches/accept.py --json report.json

Fetches 2.3 GB into the Hugging Face cache, unless they are there, and lets both programs read those files in float32: on the CPU and, where
PyTorch and the binary have one, on a CUDA card. Exit status 0 where every case is within TOLERANCES, else 1. The report is for sending:
it names versions, machine and the weights' hashes. --weights DIR takes a folder in place of the repository. --with-base makes the latents with
Stable Diffusion 1.4 (another 4.3 GB) instead of encoding pictures. --plant shows that the verdict can fail.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compare import GIB, environment, machine, parity, versions
from PIL import Image
from safetensors.numpy import load_file
from watch import watch

HERE = Path(__file__).resolve().parent
REPO, REVISION = "stabilityai/sd-x2-latent-upscaler", "1f2883b22f62cfb29323770ba9cfdcf601757bd3"
BASE, BASE_REVISION = "CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b"
PARTS = ["model_index.json", "scheduler/*", "tokenizer/*"] + [f"{part}/{name}" for part in ("text_encoder", "unet", "vae") for name in ("*.json", "*.safetensors")]

# By device: relative error of the latents (root mean square), their largest distance as a share of the largest value, levels of the picture
# at most and in the mean. Both programs sum in float32, in another order: with random weights of the published size that gives latents 2e-6
# apart. Trained weights may amplify it, so fifty times that is allowed; float16 gives 1e-3, and a wrong seed, schedule or prompt 1e-2 and more.
# A colour that lies between two levels is rounded either way: one level; a second is for the decoder's own rounding, and few may differ. A card's
# libraries choose among algorithms of other rounding (Winograd, split sums): ten times the latents' error and twice the levels.
TOLERANCES = {"cpu": (1e-4, 1e-3, 2, 0.05), "cuda": (1e-3, 1e-2, 4, 0.1)}

PROMPT = "a portrait photo of an astronaut, orange space suit, flag"
# Kind, sides as shares of --size, prompt, negative prompt, guidance, seed, schedule.
CASES = [
    ("picture", 0.5, 0.5, PROMPT, "", 1, 0, "log-linear"),
    ("picture", 0.5, 0.5, PROMPT, "", 1, 0, "karras"),
    ("picture", 0.5, 0.5, PROMPT, "", 0, 33, "log-linear"),
    ("picture", 0.75, 0.5, PROMPT, "blurry, low quality", 4, 7, "karras"),
    ("picture", 1, 0.625, "a photograph", "", 4, 2**31 + 9, "log-linear"),
    ("picture", 1, 1, "", "", 1, 1, "karras"),
    ("latents", 0.5, 0.5, PROMPT, "", 1, 0, "karras"),
    ("latents", 0.5, 0.75, PROMPT, "", 0, 5, "log-linear"),
    ("latents", 0.75, 0.75, PROMPT, "blurry", 4, 1234567, "log-linear"),
    ("latents", 1, 1, "a 写真, naïve café", "", 1, 33, "karras"),
]


def side(share, size):
    """A side that diffusers takes: a multiple of 64, since smaller ones it rounds."""
    return max(64, round(share * size / 64) * 64)


def shape(case, size):
    return side(case[1], size), side(case[2], size)


def picture(case, number, size):
    """A part of the photograph, another for each case."""
    photograph = Image.open(HERE.parent / "assets" / "astronaut.png").convert("RGB")
    width, height = shape(case, size)
    # A window of the case's shape, four fifths of the photograph at most, somewhere else each time.
    scale = 400 / max(width, height)
    left, top = 11 * number, 7 * number
    box = (left, top, left + width * scale, top + height * scale)
    return photograph.resize((width, height), Image.Resampling.BICUBIC, box)


def fetched(repo, revision, parts):
    """The folder of a repository in the cache, fetched where it is not there."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, revision=revision, allow_patterns=parts))


def hashes(folder):
    return {str(path.relative_to(folder)): hashlib.file_digest(path.open("rb"), "sha256").hexdigest() for path in sorted(folder.rglob("*.safetensors"))}


def reference(work, settings):
    """What diffusers makes of every case, in a process of its own: WORK/N.png or N.safetensors in, theirs-N out, theirs.json beside them."""
    import resource

    import torch
    from diffusers import StableDiffusionLatentUpscalePipeline, StableDiffusionPipeline
    from full_size import random_model
    from safetensors.torch import save_file

    device, size, steps = settings["device"], settings["size"], settings["steps"]
    torch.set_num_threads(settings["threads"])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipe = StableDiffusionLatentUpscalePipeline.from_pretrained(settings["model"], dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    if settings["plant"] == "weight":
        with torch.no_grad():
            pipe.unet.conv_out.weight.mul_(1.01)
    base = None
    if settings["base"]:
        base = StableDiffusionPipeline.from_pretrained(settings["base"], dtype=torch.float32, safety_checker=None).to(device)
    cpu = lambda seed: torch.Generator("cpu").manual_seed(seed)

    def latents_of(case, number):
        if base:
            width, height = shape(case, size)
            words = dict(height=height, width=width, num_inference_steps=steps, generator=cpu(number), output_type="latent")
            return base(case[3], **words).images
        pixels = pipe.image_processor.preprocess(picture(case, number, size)).to(device)
        return pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor

    seconds = []
    for number, case in enumerate(CASES):
        kind, _, _, prompt, negative, guidance, seed, schedule = case
        pipe.scheduler = random_model.scheduler(schedule)
        with torch.no_grad():
            if kind == "picture":
                image = picture(case, number, size)
                image.save(work / f"{number}.png")
            else:
                image = latents_of(case, number)
                save_file({"latents": image.cpu().contiguous()}, work / f"{number}.safetensors")
            start = time.perf_counter()
            latents = pipe(
                prompt=prompt,
                negative_prompt=negative or None,
                image=image,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=cpu(seed + (settings["plant"] == "seed")),
                output_type="latent",
            ).images
            decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
            pipe.image_processor.postprocess(decoded, output_type="pil")[0].save(work / f"theirs-{number}.png")
            seconds.append(time.perf_counter() - start)
            save_file({"latents": latents.cpu().contiguous()}, work / f"theirs-{number}.safetensors")
        print(f"diffusers: case {number + 1} of {len(CASES)}, {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (work / "theirs.json").write_text(json.dumps({"seconds": seconds, "peak": peak}))


def ours(args, case, number, work, device):
    """The tool on a case, to latents and to a picture; what the run to the picture took."""
    kind, _, _, prompt, negative, guidance, seed, schedule = case
    source = work / f"{number}.{'png' if kind == 'picture' else 'safetensors'}"
    command = [args.binary, "--json", "--device", device, "--dtype", "f32", "--overwrite", "--latent-scale", "scaled", "-p", prompt]
    command += ["--model", args.weights or REPO] + ([] if args.weights else ["--revision", REVISION])
    command += ["-g", str(guidance), "-s", str(args.steps), "--seed", str(seed), "--schedule", schedule]
    command += ["-n", negative] if negative else []
    # Nothing is fetched: the files are those that diffusers read.
    around = environment(args) | {"HF_HUB_OFFLINE": "1"}
    for end in ("safetensors", "png"):
        ran = watch([*map(str, command), "-o", str(work / f"ours-{number}.{end}"), str(source)], around)
    return ran


def distances(work, number):
    """Of the latents: relative error in the root mean square, the largest as a share of the largest value and as it is; of the pictures: levels at
    most and in the mean."""
    import numpy as np

    mine, theirs = (load_file(work / f"{who}-{number}.safetensors")["latents"].astype(np.float64) for who in ("ours", "theirs"))
    if mine.shape != theirs.shape:
        sys.exit(f"case {number + 1}: latents are {mine.shape}, expected {theirs.shape}")
    apart = np.abs(mine - theirs)
    relative = float(np.linalg.norm(apart) / np.linalg.norm(theirs))
    largest, mean = parity(work / f"ours-{number}.png", work / f"theirs-{number}.png")
    return {"relative": relative, "share": float(apart.max() / np.abs(theirs).max()), "largest": float(apart.max()), "levels": largest, "mean": mean}


def within(found, tolerances):
    """Not a number is not within."""
    return all(found[name] <= most for name, most in zip(("relative", "share", "levels", "mean"), tolerances))


def on_device(args, device, model, base):
    """Every case on one device: a list of what was found."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        settings = {"device": device, "model": str(model), "base": base and str(base), "plant": args.plant}
        settings |= {"size": args.size, "steps": args.steps, "threads": args.threads, "cases": len(CASES)}
        child = [sys.executable, __file__, "--reference", folder, json.dumps(settings)]
        subprocess.run(child, check=True)
        theirs = json.loads((work / "theirs.json").read_text())
        print(f"\n{device}, {args.steps} steps, float32\n")
        print("| case | latents, relative | largest | levels, most | mean | seconds | diffusers | GiB | |\n| --- |" + " ---: |" * 7 + " --- |")
        for number, case in enumerate(CASES):
            ran = ours(args, case, number, work, device)
            found = distances(work, number)
            ok = within(found, TOLERANCES[device])
            width, height = shape(case, args.size)
            name = f"{number + 1}: {case[0]} {width}x{height}, guidance {case[5]}, {case[7]}"
            row = found | {"case": name, "ok": ok, "seconds": ran["wall"], "diffusers": theirs["seconds"][number], "peak": ran["peak"]}
            rows.append(row)
            print(
                f"| {name} | {found['relative']:.1e} | {found['largest']:.1e} | {found['levels']} | {found['mean']:.4f} | {ran['wall']:.1f} | "
                f"{row['diffusers']:.1f} | {ran['peak'] / GIB:.2f} | {'ok' if ok else 'WRONG'} |",
                flush=True,
            )
    relative, share, levels, mean = TOLERANCES[device]
    print(f"\nAllowed: latents {relative:g} relative and {share:g} of the largest; {levels} levels, {mean:g} in the mean.")
    print(f"Seconds are a process's from start to file, diffusers' without loading; its process took {theirs['peak'] / GIB:.2f} GiB for all cases.")
    return {"device": device, "tolerances": TOLERANCES[device], "diffusers_peak": theirs["peak"], "cases": rows}


def devices(args):
    """The CPU, and a card where both programs have one."""
    import torch

    listed = subprocess.run([args.binary, "--list-devices", "--json"], capture_output=True, text=True, check=True).stdout
    cards = [line for line in map(json.loads, listed.splitlines()) if line["device"] != "cpu" and line["error"] is None]
    return ["cpu"] + (["cuda"] if cards and torch.cuda.is_available() else [])


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, metavar="DIR", help="a folder in the diffusers layout, in place of the published repository")
    parser.add_argument("--with-base", nargs="?", const=BASE, metavar="DIR|REPO", help=f"make the latents with a base checkpoint ({BASE})")
    parser.add_argument("--binary", type=Path, default=HERE.parent / "target" / "release" / "sd-upscale")
    parser.add_argument("--size", type=int, default=512, help="the largest side of an input, from 64 (512)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only so many of them; the verdict is then of those")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report here too")
    parser.add_argument("--plant", choices=("seed", "weight"), help="give diffusers another seed, or a last layer 1 %% larger: the verdict must be wrong")
    args = parser.parse_args()
    if not args.binary.is_file():
        parser.error(f"{args.binary}: no such file; build it with `cargo build --release`")
    args.binary = args.binary.resolve()
    return args


def main():
    if sys.argv[1:2] == ["--reference"]:
        settings = json.loads(sys.argv[3])
        del CASES[settings["cases"] :]
        return reference(Path(sys.argv[2]), settings)
    args = parse()
    del CASES[args.cases :]
    model = args.weights or fetched(REPO, REVISION, PARTS)
    base = args.with_base
    if base and not Path(base).is_dir():
        base = fetched(base, BASE_REVISION if base == BASE else None, PARTS)
    report = {"versions": versions(args.binary), "machine": machine(args.threads), "weights": hashes(model), "steps": args.steps, "plant": args.plant}
    print(f"{report['versions']}\n\n{report['machine']}")
    report["devices"] = [on_device(args, device, model, base) for device in devices(args)]
    wrong = [f"{of['device']} {row['case']}" for of in report["devices"] for row in of["cases"] if not row["ok"]]
    report["verdict"] = "wrong" if wrong else "right"
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nVerdict: {'WRONG in ' + '; '.join(wrong) if wrong else 'right: every case gives what diffusers gives'}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
