"""Time and peak memory of the binary over picture sizes: what a user has to expect.

    cargo build --release
    python benches/sizes.py --model tiny
    python benches/sizes.py --model DIR --steps 2 --megapixels 0.25,1,4     DIR from full_size.py make

For each size (megapixels of the result, a square) a photograph is scaled to half of its side and upscaled by a process of
its own. Prints a Markdown table: seconds from start to file, of a step, of the decode, and peak memory; and what the
default 20 steps would take, which is those seconds and the missing steps. Needs Pillow.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import watch

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_STEPS = 20


def row(args, folder, megapixels):
    # The input's side: half of the result's, and a multiple of 64, so that nothing is padded.
    side = round((megapixels * 2**20) ** 0.5 / 2 / 64) * 64
    picture, result = folder / f"{side}.png", folder / f"{side}-2x.png"
    Image.open(args.image).convert("RGB").resize((side, side), Image.BICUBIC).save(picture)
    command = [args.program, picture, "--model", args.model, "-s", args.steps, "-o", result, "-v"]
    run = watch.watch([str(word) for word in command], {})
    with Image.open(result) as made:
        assert made.size == (2 * side, 2 * side), made.size
    step, decode = run["step"], run["stages"]["decode"][0]["seconds"]
    whole = run["wall"] + (DEFAULT_STEPS - args.steps) * step
    return (
        f"| {side}x{side} -> {2 * side}x{2 * side} | {run['wall']:.1f} s | {step:.2f} s | {decode:.1f} s "
        f"| {whole:.0f} s | {run['peak'] / 1e9:.2f} GB |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/sd-upscale")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--image", type=Path, default=ROOT / "assets/astronaut.png")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--megapixels", default="0.25,1,4,16", help="of the results, with commas between")
    args = parser.parse_args()
    print(subprocess.run([args.program, "--version"], capture_output=True, text=True).stdout.strip(), end=", ")
    print(f"{args.model}, {args.steps} steps, {os.cpu_count()} cores\n")
    print(f"| | start to file | a step | decode | at {DEFAULT_STEPS} steps | peak memory |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for megapixels in args.megapixels.split(","):
            print(row(args, Path(folder), float(megapixels)), flush=True)


if __name__ == "__main__":
    main()
