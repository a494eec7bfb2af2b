"""sd-upscale beside diffusers, OpenVINO and torch.compile: the same model, picture, threads and precision (float32).

    cargo build --release
    pip install torch diffusers transformers openvino pillow
    python benches/full_size.py make DIR
    python benches/compare.py DIR

The binary and diffusers take turns, each a process of its own from start to file, with every weight file in the page
cache. OpenVINO and torch.compile run the UNet and the VAE decoder of the same PyTorch modules, once a size. Prints
Markdown tables of seconds, CPU seconds and peak memory with the ratios, how far the results are apart, the versions and
the machine. torch.compile takes minutes to compile: ask for it with --only.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file
from watch import watch

HERE = Path(__file__).resolve().parent
NAMES = {"binary": "sd-upscale", "diffusers": "diffusers", "openvino": "OpenVINO", "compile": "torch.compile"}
PROMPT = "a photo of an astronaut"
GIB = 2**30

# CPU features that decide which kernels run, as /proc/cpuinfo spells them.
ISA = ("avx", "avx2", "fma", "f16c", "avx512", "avx_vnni", "amx", "asimd", "sve")


def output_of(*command):
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version(package):
    """Of an installed Python package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(threads):
    """(CPU model and its features, everything else) in words."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
    except OSError:
        fields = {}
    flags = fields.get("flags", fields.get("Features", "")).split()
    flags = [flag for flag in flags if flag in ISA or flag.startswith(("avx512", "amx", "sve"))]
    family = f" (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else ""
    cpu = fields.get("model name", platform.processor() or platform.machine()) + family
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    return (
        f"{cpu}, {os.cpu_count()} cores ({threads} threads used), {memory:.0f} GiB, {platform.system()} "
        f"{platform.machine()}; {' '.join(flags)}; load average at the start {os.getloadavg()[0]:.1f}"
    )


def versions(binary):
    commit = output_of("git", "rev-parse", "--short", "HEAD")
    if output_of("git", "status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    packages = ("torch", "diffusers", "transformers", "openvino")
    return ", ".join(
        [f"{output_of(binary, '-V')} (commit {commit}, {output_of('rustc', '--version')})"]
        + [f"{name} {version(name)}" for name in packages if version(name)]
        + [f"Python {platform.python_version()}"]
    )


def warm(folder):
    """Reads every weight file, so that no program pays for the disk."""
    for path in folder.rglob("*"):
        if path.suffix in (".safetensors", ".bin"):
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def run_binary(args, picture, steps, out):
    command = [args.binary, "-v", "--model", args.folder, "--device", "cpu", "--dtype", "f32", "--prompt", PROMPT]
    command += ["--steps", str(steps), "--seed", "0", "-o", out, picture]
    return watch(command, environment(args))


def run_diffusers(args, picture, steps, out, latents):
    command = [sys.executable, HERE / "full_size.py", "run", args.folder, "--prompt", PROMPT]
    command += ["--threads", str(args.threads), "--steps", str(steps), "--seed", "0"]
    command += ["--image", picture, "--out", out, "--latents", latents]
    return watch(command, environment(args))


def run_peer(args, kind, size, steps):
    """A UNet step at the latent of a `size` picture doubled, and the decode of that latent."""
    command = [sys.executable, HERE / "peers.py", kind, args.folder, "--threads", str(args.threads)]
    # One more UNet call than the others make when they make one: the first is not counted.
    return watch([*command, "--latent", str(size // 4), "--steps", str(max(2, steps))], environment(args))


def environment(args):
    return {name: str(args.threads) for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS")}


def why_not(kind):
    """A reason that a peer cannot run here, or None."""
    if kind == "openvino" and version("openvino") is None:
        return "the package openvino is not installed"
    if kind == "compile" and not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))):
        return "it needs a C++ compiler (g++ or clang++), and there is none"
    return None


def quantities(run):
    """{quantity: {row: value}} of one run; seconds and bytes."""
    wall, cpu, peak = {"whole process": run["wall"]}, {"whole process": run["cpu"]}, {"whole process": run["peak"]}
    stages = dict(run["stages"])
    calls = stages.pop("unet", None)
    step = run["step"]
    if calls:
        # The first call faults the weights in and warms the allocator up.
        step = statistics.median(call["seconds"] for call in calls[1:] or calls)
        stages["denoise"] = calls
    for label in ("load", "text", "encode", "denoise", "decode"):
        if label in stages:
            entries = stages[label]
            wall[label] = sum(entry["seconds"] for entry in entries)
            if all(entry["cpu"] is not None and entry["peak"] is not None for entry in entries):
                cpu[label] = sum(entry["cpu"] for entry in entries)
                peak[label] = max(entry["peak"] for entry in entries)
    if run["first"] is not None:
        wall["start to first UNet step"] = run["first"]
    if step is not None:
        wall["UNet step"] = step
    return {"wall": wall, "cpu": cpu, "peak": peak}


def medians(runs, of_peer):
    """The median of each quantity and row over the runs of one program; a peer runs parts, not the whole, and its
    number of steps is its own."""
    every = [quantities(run) for run in runs]
    rows = {quantity: set.intersection(*(set(one[quantity]) for one in every)) for quantity in every[0]}
    if of_peer:
        rows["wall"] -= {"whole process", "start to first UNet step", "denoise"}
        rows["cpu"] -= {"whole process", "denoise"}
        rows["peak"] -= {"whole process"}
    return {
        quantity: {row: statistics.median(one[quantity][row] for one in every) for row in of_quantity}
        for quantity, of_quantity in rows.items()
    }


ROWS = ("whole process", "start to first UNet step", "load", "text", "encode", "denoise", "UNet step", "decode")


def table(size, steps, title, quantity, results):
    """Markdown lines: a row a stage, a column a program, and beside each peer its ratio to the binary."""
    unit = GIB if quantity == "peak" else 1
    ours = results.get("binary", {}).get(quantity)
    peers = [kind for kind in results if kind != "binary"]
    count = f"{steps} step{'s' * (steps > 1)}"
    heads = [f"{size} -> {2 * size}, {count}: {title}"] + ([NAMES["binary"]] if ours else [])
    for kind in peers:
        heads += [NAMES[kind]] + (["ratio"] if ours else [])
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for row in ROWS:
        values = {kind: results[kind][quantity].get(row) for kind in results}
        if not any(values.values()):
            continue
        name = f"UNet step ({size // 4}x{size // 4} latent)" if row == "UNet step" else row
        cell = lambda value: "" if value is None else f"{value / unit:.2f}"
        line = [f"{name}, {count}" if row == "denoise" else name] + ([cell(values["binary"])] if ours else [])
        for kind in peers:
            line.append(cell(values[kind]))
            if ours:
                both = values["binary"] and values[kind]
                line.append(f"{values[kind] / values['binary']:.2f}" if both else "")
        lines.append(line)
    return ["| " + " | ".join(line) + " |" for line in lines]


def parity(ours, theirs):
    """(largest, mean) difference of two pictures' levels."""
    a, b = (np.asarray(Image.open(path).convert("RGB"), dtype=np.int16) for path in (ours, theirs))
    if a.shape != b.shape:
        sys.exit(f"{ours} is {a.shape[1]}x{a.shape[0]}, {theirs} is {b.shape[1]}x{b.shape[0]}")
    difference = np.abs(a - b)
    return int(difference.max()), float(difference.mean())


def relative_error(ours, theirs):
    a, b = (next(iter(load_file(path).values())).astype(np.float64) for path in (ours, theirs))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def one_size(args, size, steps, repeats, work):
    """Runs everything at one size and prints its tables; returns the raw runs and the parity figures."""
    picture = work / f"{size}.png"
    Image.open(args.image).convert("RGB").resize((size, size), Image.Resampling.BOX).save(picture)
    ours, theirs = work / f"ours-{size}.png", work / f"theirs-{size}.png"
    runs = {kind: [] for kind in args.only}
    for _ in range(repeats):
        if "binary" in runs:
            runs["binary"].append(run_binary(args, picture, steps, ours))
        if "diffusers" in runs:
            latents = theirs.with_suffix(".safetensors")
            runs["diffusers"].append(run_diffusers(args, picture, steps, theirs, latents))
    for kind in ("openvino", "compile"):
        if kind in runs:
            runs[kind].append(run_peer(args, kind, size, steps))

    results = {kind: medians(of_kind, kind in ("openvino", "compile")) for kind, of_kind in runs.items()}
    for title, quantity in (("seconds", "wall"), ("CPU seconds", "cpu"), ("peak GiB", "peak")):
        print("\n".join(table(size, steps, title, quantity, results)), end="\n\n")

    figures = None
    if "binary" in runs and "diffusers" in runs:
        run_binary(args, picture, steps, ours.with_suffix(".safetensors"))
        largest, mean = parity(ours, theirs)
        error = relative_error(ours.with_suffix(".safetensors"), theirs.with_suffix(".safetensors"))
        figures = {"levels_max": largest, "levels_mean": mean, "latents_relative_error": error}
        print(
            f"Parity with diffusers at {size} -> {2 * size}: levels differ by {largest} at most, "
            f"{mean:.5f} in the mean; latents have a relative error of {error:.1e}.\n"
        )
    sys.stdout.flush()
    return {"size": size, "steps": steps, "repeats": repeats, "runs": runs, "medians": results, "parity": figures}


def numbers(text):
    return [int(part) for part in text.split(",")]


def kinds(text):
    chosen = text.split(",")
    if unknown := [kind for kind in chosen if kind not in NAMES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected {', '.join(NAMES)}")
    return chosen


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the model that `full_size.py make` wrote")
    parser.add_argument("--binary", type=Path, default=HERE.parent / "target" / "release" / "sd-upscale")
    parser.add_argument("--image", type=Path, default=HERE.parent / "assets" / "astronaut.png")
    parser.add_argument("--sizes", type=numbers, default=[256, 512], help="sides of the low-res pictures (256,512)")
    parser.add_argument("--steps", type=numbers, default=[4, 2], help="denoising steps at each size (4,2)")
    parser.add_argument("--repeats", type=numbers, default=[2], help="runs of the binary and diffusers at each (2)")
    parser.add_argument("--only", type=kinds, default=["binary", "diffusers", "openvino"], help=f"of {','.join(NAMES)}")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every figure of every run here")
    args = parser.parse_args()
    if not (args.folder / "unet").is_dir():
        parser.error(f"{args.folder}: no model here; write one with `python benches/full_size.py make {args.folder}`")
    if "binary" in args.only and not args.binary.is_file():
        parser.error(f"{args.binary}: no such file; build it with `cargo build --release`")
    args.binary = args.binary.resolve()
    return args


def main():
    args = parse()
    # The folder is the reader's own choice.
    again = ["DIR" if argument == str(args.folder) else argument for argument in sys.argv[1:]]
    header = {"command": f"python benches/compare.py {shlex.join(again)}", "machine": machine(args.threads)}
    header["versions"] = versions(args.binary)
    for kind in list(args.only):
        if reason := why_not(kind):
            print(f"{NAMES[kind]} is left out: {reason}.\n")
            args.only.remove(kind)

    print(f"`{header['command']}`\n\n{header['versions']}.\n\n{header['machine']}.\n", flush=True)
    if "openvino" in args.only and not (args.folder / "openvino" / "parity.json").exists():
        watch([sys.executable, HERE / "peers.py", "convert", args.folder, "--threads", str(args.threads)], {})
    warm(args.folder)

    sizes = []
    with tempfile.TemporaryDirectory() as work:
        for i, size in enumerate(args.sizes):
            steps, repeats = (of[min(i, len(of) - 1)] for of in (args.steps, args.repeats))
            sizes.append(one_size(args, size, steps, repeats, Path(work)))
    print(
        "sd-upscale's stages include reading their weights, diffusers' do not (`load`). Its UNet step is the median of "
        "all steps, the peers' that of the steps after the first. Ratios are peer / sd-upscale."
    )
    if "openvino" in args.only:
        errors = json.loads((args.folder / "openvino" / "parity.json").read_text())
        words = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        print(f"OpenVINO's relative error to PyTorch eager: {words}.")
    if args.json:
        args.json.write_text(json.dumps(header | {"sizes": sizes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
