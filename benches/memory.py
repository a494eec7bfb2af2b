"""Peak memory and time against pixels, of the binary and of diffusers with and without VAE tiling; and the seams of what is
done in pieces.

    cargo build --release
    python benches/full_size.py make DIR
    python benches/memory.py DIR --work WORK                                     everything, from 0.25 to 64 megapixels
    python benches/memory.py DIR --work WORK --only binary --megapixels 0.25,1,4
    python benches/memory.py DIR --work WORK --only binary --limits ,4GB,6GB     as it is, and within --max-memory
    python benches/memory.py assets/tiny --work WORK
    python benches/memory.py DIR --work WORK --megapixels ""                     measures nothing: table and plot of what is there

One step at each size (megapixels of the result, a square), each in a process of its own; the peak is the kernel's VmHWM. What
will not fit in free memory, or would take too long, is left out, and the table says so. Results are kept in WORK/results.json
and its pictures: a run measures what is missing, so that binary and diffusers can be run at different times (--again
measures anew). Prints a Markdown table and writes a plot. Needs Pillow, numpy and matplotlib, and for diffusers what full_size.py
needs; Linux.

Seams: the mean absolute gradient across the borders of tiles, or of the bands of the decoder's last map where
`sd-upscale -v` says that there are bands, over that elsewhere in the picture, divided by the same of the picture that was decoded whole: 1.00 is none. `off the whole` is how
far the picture is from that one, in levels of 255 in the mean and at most. A picture that has no whole one beside it is told apart.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from compare import versions
from PIL import Image
from watch import watch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
Image.MAX_IMAGE_PIXELS = None  # they are our own

WHOLE, TILED = "diffusers", "diffusers, tiled VAE"
# How `sd-upscale -v` says that the decoder's maps are not kept whole: those above so many MiB are made in bands of that size.
BANDS = re.compile(r"\bdecode: about .*\bmaps above ([0-9.]+) MiB kept in bands")
# Lines that a band is a multiple of (`Room::ALIGNED`).
ALIGNED = 4
# As `sd-upscale --dry-run` says what a run takes.
PLANNED = re.compile(r"^memory.*?: about ([0-9.]+) GB", re.MULTILINE)
# Of free memory what a run may be expected to take.
SHARE = 0.95


def free_bytes():
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def side_of(megapixels):
    """Of a square result: a multiple of 128, so that nothing is extended."""
    return round((megapixels * 2**20) ** 0.5 / 128) * 128


class Kept:
    """Results of this run and earlier ones, and their pictures."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / "results.json"
        self.all = json.loads(self.file.read_text()) if self.file.exists() else {}

    def of(self, model, program):
        """side -> row."""
        return {int(side): row for side, row in self.all.get(model, {}).get(program, {}).items()}

    def measured(self, model, program):
        return {side: row for side, row in self.of(model, program).items() if "peak" in row}

    def keep(self, model, program, side, row):
        self.all.setdefault(model, {}).setdefault(program, {})[str(side)] = row
        self.file.write_text(json.dumps(self.all, indent=1) + "\n")

    def picture(self, model, program, side):
        name = re.sub(r"[^a-zA-Z0-9]+", "-", f"{model} {program}")
        return self.folder / f"{name}-{side}.png"


def low_res(args, side):
    path = args.work / f"input-{side // 2}.png"
    if not path.exists():
        Image.open(args.image).convert("RGB").resize((side // 2, side // 2), Image.Resampling.BICUBIC).save(path)
    return path


def command_of(args, program, side, out):
    if program in (WHOLE, TILED):
        command = [sys.executable, HERE / "full_size.py", "run", args.folder, "--steps", "1", "--threads", str(args.threads)]
        command += ["--image", low_res(args, side), "--out", out]
        return command + ["--tiling"] * (program == TILED)
    command = [args.binary, low_res(args, side), "-o", out, "--model", args.folder, "-s", "1", "--device", "cpu", "-v"]
    limit = limit_of(program)
    if args.temp_dir:
        command += ["--temp-dir", args.temp_dir]
    return command + (["--max-memory", limit] if limit else [])


def name_of(limit):
    return f"sd-upscale within {limit}" if limit else "sd-upscale"


def limit_of(program):
    """The --max-memory of a row's name."""
    return program.partition(" within ")[2]


def expected_bytes(args, kept, program, side):
    """What a run will take: as the binary says itself; of diffusers on the line through the two sizes before, in proportion where
    there is one."""
    if program not in (WHOLE, TILED):
        command = [*command_of(args, program, side, args.work / "none.png"), "--dry-run"]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        found = PLANNED.search(said)
        return float(found[1]) * 1e9 if found else 0
    points = [(of * of, row["peak"]) for of, row in sorted(kept.measured(args.name, program).items()) if of < side][-2:]
    match points:
        case [(near, low), (far, high)]:
            return high + (high - low) / (far - near) * (side * side - far)
        case [(only, peak)]:
            return peak / only * side * side
    return 0


def expected_seconds(args, kept, program, side):
    """At least, in proportion to the pixels of the largest size before."""
    before = {of: row["seconds"] for of, row in kept.measured(args.name, program).items() if of < side}
    return before[max(before)] / max(before) ** 2 * side * side if before else 0


def why_not(args, kept, program, side):
    """A reason to leave a run out, or None."""
    needed, free = expected_bytes(args, kept, program, side), free_bytes()
    if needed > SHARE * free:
        return f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} free"
    seconds = expected_seconds(args, kept, program, side)
    if seconds > args.most_minutes * 60:
        return f"would take {seconds / 60:.0f} min or more"
    return None


def measure(args, kept, program, side):
    """A row: peak in bytes and seconds from start to file, and the rows or columns at which pieces meet; or why it is left out."""
    if reason := why_not(args, kept, program, side):
        return {"left_out": reason}
    out = kept.picture(args.name, program, side)
    threads = {name: str(args.threads) for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS")}
    try:
        run = watch([str(word) for word in command_of(args, program, side, out)], threads)
    except SystemExit as failed:
        print(failed, file=sys.stderr)
        said = str(failed).splitlines()
        reason = next((line for line in said if line.startswith("error: ")), said[-1])
        return {"left_out": reason.replace(f"{low_res(args, side)}: ", "")[:160]}
    with Image.open(out) as made:
        assert made.size == (side, side), made.size
    row = {"peak": run["peak"], "seconds": run["wall"], "rows": [], "columns": []}
    if program == TILED:
        row["rows"] = row["columns"] = tile_borders(args, side)
    elif found := next(filter(None, map(BANDS.search, run["stderr"])), None):
        row["rows"] = band_borders(args, side, float(found[1]) * 2**20)
    return row


def vae_config(args):
    return json.loads((args.folder / "vae" / "config.json").read_text())


def band_borders(args, side, most):
    """Where the bands of the decoder's last map begin, which is as large as the picture: `most` bytes each (`Room::band_lines`)."""
    line = side * vae_config(args)["block_out_channels"][0] * 4
    if side * line <= most:
        return []
    step = max(int(most / line) // ALIGNED, 1) * ALIGNED
    return list(range(step, side, step))


def tile_borders(args, side):
    """The edges of the tiles of diffusers' decoder (AutoencoderKL.tiled_decode, its factors as they come): where one begins, and where
    the one before, which fades over a quarter of its side, ends. A latent that is no larger than a tile is decoded whole."""
    config = vae_config(args)
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    tile = config["sample_size"] // factor
    if side // factor <= tile:
        return []
    fade = int(config["sample_size"] * 0.25)
    step = config["sample_size"] - fade
    starts = range(step, side, step)
    return sorted({edge for start in starts for edge in (start, start + fade) if edge < side})


def levels(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.int16)


def gradient_at(picture, rows, columns):
    """The mean absolute difference of neighbours across the borders, over that of all other neighbours in the same direction; of a
    picture with borders in both directions the mean of the two."""
    ratios = []
    for axis, borders in ((0, rows), (1, columns)):
        if borders:
            # A line at a time: a picture of 64 megapixels is 400 MB as it is.
            line = lambda i: np.take(picture, i, axis)
            gradients = np.array([np.abs(line(i) - line(i - 1)).mean() for i in range(1, picture.shape[axis])])
            at = np.zeros(len(gradients), bool)
            at[np.array(borders) - 1] = True
            ratios.append(gradients[at].mean() / gradients[~at].mean())
    return sum(ratios) / len(ratios)


def compared(kept, model, program, side, row):
    """(seams, levels off) of a row whose picture was made in pieces, in words; empty where it was not."""
    if not row["rows"] and not row["columns"]:
        return "", ""
    path = kept.picture(model, program, side)
    if not path.exists():
        return "", ""
    picture = levels(path)
    ratio = gradient_at(picture, row["rows"], row["columns"])
    whole = whole_picture(kept, model, program, side)
    if whole is None:
        return f"{ratio:.3f} (of the picture alone)", ""
    off = np.abs(picture - whole)
    return (
        f"{ratio / gradient_at(whole, row['rows'], row['columns']):.3f}",
        f"{off.mean():.3f}, {off.max()} at most",
    )


def whole_picture(kept, model, program, side):
    """The picture that was decoded whole, where there is one: of a program of the same kind, else diffusers'."""
    # diffusers' whole picture is ours but for single levels.
    ours = [p for p in kept.all.get(model, {}) if p.startswith("sd-upscale")]
    peers = [WHOLE] if program == TILED else [*ours, WHOLE]
    for peer in peers:
        row = kept.measured(model, peer).get(side)
        path = kept.picture(model, peer, side)
        if peer != program and row and not row["rows"] and path.exists():
            return levels(path)
    return None


def table(kept):
    lines = ["| | result | megapixels | peak memory | start to file | seams | off the whole, levels |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for model, programs in kept.all.items():
        for program in programs:
            for side, row in sorted(kept.of(model, program).items()):
                head = f"| {model}: {program} | {side}x{side} | {side * side / 2**20:g} |"
                if "peak" not in row:
                    lines.append(f"{head} {row['left_out']} | | | |")
                    continue
                seams, off = compared(kept, model, program, side, row)
                lines.append(f"{head} {row['peak'] / 1e9:.2f} GB | {row['seconds']:.1f} s | {seams} | {off} |")
    return "\n".join(lines)


def plot(kept, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, (memory, time) = pyplot.subplots(1, 2, figsize=(10, 4.8), dpi=90, layout="constrained")
    drawn = [
        (model, program) for model, programs in kept.all.items() for program in programs if kept.measured(model, program)
    ]
    for model, program in drawn:
        points = sorted(kept.measured(model, program).items())
        megapixels = [side * side / 2**20 for side, _ in points]
        style = "o-" if program.startswith("sd-upscale") else "s--" if program == WHOLE else "^:"
        label = f"{program} ({model})"
        memory.plot(megapixels, [row["peak"] / 1e9 for _, row in points], style, label=label)
        time.plot(megapixels, [row["seconds"] for _, row in points], style, label=label)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axes, title in ((memory, "peak memory, GB"), (time, "start to file with one step, s")):
        axes.set_xscale("log", base=4)
        axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel("megapixels of the result")
        axes.xaxis.set_major_formatter(plain)
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
    if drawn:
        figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path)
    pyplot.close(figure)
    size = path.stat().st_size
    assert size < 100_000, f"{path} has {size} bytes"


def numbers(text):
    return [float(part) for part in text.split(",") if part]


def words(text):
    return [part for part in text.split(",") if part]


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a model in the diffusers layout")
    parser.add_argument("--work", type=Path, required=True, help="where results and pictures are kept")
    parser.add_argument("--name", help="what the model is called in table and plot (its folder's name)")
    parser.add_argument("--binary", type=Path, default=ROOT / "target" / "release" / "sd-upscale")
    parser.add_argument("--image", type=Path, default=ROOT / "assets" / "astronaut.png")
    parser.add_argument("--megapixels", type=numbers, default=[0.25, 1, 4, 16, 64], help="of the results (0.25,1,4,16,64)")
    parser.add_argument("--only", type=words, default=["binary", "diffusers", "tiled"], help="of binary,diffusers,tiled")
    parser.add_argument("--limits", type=lambda text: text.split(","), default=[""],
                        help="run the binary within each of these --max-memory; an empty one is none")
    parser.add_argument("--temp-dir", type=Path, help="the binary's")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--most-minutes", type=float, default=60, help="leave out what would take longer (60)")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured before")
    parser.add_argument("--plot", type=Path, default=HERE / "memory.png")
    args = parser.parse_args()
    if unknown := set(args.only) - {"binary", "diffusers", "tiled"}:
        parser.error(f"--only {unknown.pop()}: expected binary, diffusers or tiled")
    if not (args.folder / "unet").is_dir():
        parser.error(f"{args.folder}: no model here; write one with `python benches/full_size.py make {args.folder}`")
    if args.megapixels and "binary" in args.only and not args.binary.is_file():
        parser.error(f"{args.binary}: no such file; build it with `cargo build --release`")
    args.name = args.name or args.folder.resolve().name
    args.binary, args.folder = args.binary.resolve(), args.folder.resolve()
    return args


def main():
    args = parse()
    kept = Kept(args.work)
    programs = {"binary": [name_of(limit) for limit in args.limits], "diffusers": [WHOLE], "tiled": [TILED]}
    # Smaller sizes first: what they take says what the larger ones will.
    for side in sorted(map(side_of, args.megapixels)):
        for program in (program for kind in args.only for program in programs[kind]):
            if args.again or side not in kept.measured(args.name, program):
                row = measure(args, kept, program, side)
                kept.keep(args.name, program, side, row)
                print(f"{args.name}: {program}, {side}: {row}", file=sys.stderr, flush=True)
    print(f"{versions(args.binary)}; {args.threads} threads, {platform.machine()}\n\n{table(kept)}")
    plot(kept, args.plot)


if __name__ == "__main__":
    main()
