"""The upscaler's model card's own example, from words to 1024 pixels: sd-upscale beside diffusers on the CPU in float32.

    cargo build --release
    pip install torch diffusers transformers pillow
    python benches/full_size.py make DIR
    python benches/full_size.py make-base BASE
    python benches/generate.py DIR BASE

Random weights of the published sizes. Each program is a process of its own from start to both files, with every weight file in the page
cache; they take turns. diffusers' two pipelines share one generator and hand latents on, as the example has it; sd-upscale is one command.
Prints a table of seconds by stage and of peak memory, and how far the pictures are apart.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROMPT = "a photo of an astronaut high resolution, unreal engine, ultra realistic"
SEED = "33"
STAGES = ("load", "text", "base", "denoise", "decode")


def reference(args):
    """What the model card has, stage by stage."""
    import torch
    from diffusers import StableDiffusionLatentUpscalePipeline, StableDiffusionPipeline
    from full_size import finished, random_model, timed

    torch.set_num_threads(args.threads)
    stages = {}
    start = time.perf_counter()
    base = StableDiffusionPipeline.from_pretrained(args.base, dtype=torch.float32, safety_checker=None)
    upscaler = StableDiffusionLatentUpscalePipeline.from_pretrained(args.model, dtype=torch.float32)
    upscaler.scheduler = random_model.scheduler("log-linear")
    for pipe in (base, upscaler):
        pipe.set_progress_bar_config(disable=True)
        timed(pipe, "encode_prompt", stages, "text")
    finished(stages, "load", start)

    generator = torch.Generator("cpu").manual_seed(int(SEED))
    start = time.perf_counter()
    low_res = base(PROMPT, generator=generator, num_inference_steps=args.base_steps, output_type="latent").images
    finished(stages, "base", start)
    start = time.perf_counter()
    latents = upscaler(
        prompt=PROMPT,
        image=low_res,
        num_inference_steps=args.steps,
        guidance_scale=0,
        generator=generator,
        output_type="latent",
    ).images
    finished(stages, "denoise", start)
    with torch.no_grad():
        for pipe, of, out in ((upscaler, latents, args.out), (base, low_res, args.out.with_stem(f"{args.out.stem}-low-res"))):
            start = time.perf_counter()
            image = pipe.vae.decode(of / pipe.vae.config.scaling_factor).sample
            pipe.image_processor.postprocess(image, output_type="pil")[0].save(out)
            finished(stages, "decode", start)


def ours(args, out):
    command = [args.binary, "--generate", "-v", "--device", "cpu", "--dtype", "f32", "-p", PROMPT, "--seed", SEED, "-g", "0"]
    command += ["--schedule", "log-linear", "--model", args.model, "--base", args.base, "--save-low-res", "-o", out]
    return [*command, "-s", str(args.steps), "--base-steps", str(args.base_steps)]


def theirs(args, out):
    command = [sys.executable, __file__, args.model, args.base, "--reference", "--out", out, "--threads", str(args.threads)]
    return [*command, "--steps", str(args.steps), "--base-steps", str(args.base_steps)]


def seconds(run, stage):
    return sum(one["seconds"] for one in run["stages"].get(stage, []))


def compare(args):
    from compare import GIB, environment, machine, parity, versions, warm
    from watch import watch

    for folder in (args.model, args.base):
        warm(folder)
    runs = {"sd-upscale": [], "diffusers": []}
    with tempfile.TemporaryDirectory() as work:
        pictures = {name: Path(work) / f"{name}.png" for name in runs}
        for _ in range(args.repeats):
            for name, command in (("sd-upscale", ours), ("diffusers", theirs)):
                runs[name].append(watch(command(args, pictures[name]), environment(args)))
        apart = [parity(*(path.with_stem(path.stem + end) for path in pictures.values())) for end in ("", "-low-res")]
    print(f"{args.base_steps} base steps and {args.steps} of the upscaler, best of {args.repeats}\n")
    print("| | sd-upscale | diffusers | ratio |\n| --- | ---: | ---: | ---: |")
    rows = [("whole process, s", lambda run: run["wall"])]
    rows += [(f"{stage}, s", lambda run, stage=stage: seconds(run, stage)) for stage in STAGES]
    rows += [("CPU, s", lambda run: run["cpu"]), ("peak, GiB", lambda run: run["peak"] / GIB)]
    for label, of in rows:
        mine, other = (min(map(of, runs[name])) for name in ("sd-upscale", "diffusers"))
        ratio = f"{other / mine:.2f}" if mine and other else ""
        print(f"| {label} | {mine:.2f} | {other:.2f} | {ratio} |")
    for what, (largest, mean) in zip(("result", "low-res"), apart):
        print(f"\n{what}: levels differ by {largest} at most, {mean:.5f} in the mean")
    print(f"\n{versions(args.binary)}\n\n{machine(args.threads)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the upscaler's folder")
    parser.add_argument("base", type=Path, help="the base checkpoint's")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--base-steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--binary", type=Path, default=HERE.parent / "target" / "release" / "sd-upscale")
    parser.add_argument("--reference", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    reference(args) if args.reference else compare(args)


if __name__ == "__main__":
    main()
