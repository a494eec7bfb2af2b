"""This program against diffusers on a CUDA card, side by side and in turns: parity first, then time and memory.

    python benches/cuda.py --program target/release/sd-upscale --work WORK                every part
    python benches/cuda.py --program ... --work ... --part time                           one part, within ten minutes
    python benches/cuda.py --program ... --work ... --dry       the small model on the CPU: checks this script alone

It makes the model of the published size with random weights in the work folder (2.3 GB) where --model names no other.
Needs PyTorch; without diffusers its lines are left out, and --model is needed. Ends with status 1 where a parity bound
is broken or one of our own runs fails.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
PROMPT = "a photograph of an astronaut"
PART_SECONDS = 570.0

# Multiply-adds counted as two, of the published configuration: the UNet for a 64x64 latent, the decoder to 1024x1024.
UNET_TFLOP, DECODER_TFLOP = 0.324, 10.0

# Relative differences (root mean square) of the final latents after 4 steps. float32: the order of sums alone. The
# others: the step of the type (2^-11, 2^-8) added up over about 200 layers as a random walk is 0.7 % and 5.5 %;
# three times that, so that an overflow or a sum kept in the narrow type is caught and rounding is not.
BOUNDS = {"f32": 1e-3, "f16": 2e-2, "bf16": 1.6e-1}


class Bench:
    def __init__(self, args):
        self.args = args
        self.device = "cpu" if args.dry else "cuda"
        self.dtype = "f32" if args.dry else "f16"
        self.failed = False
        self.deadline = 0.0
        self.rounds = 1 if args.dry else 3
        self.steps = 4 if args.dry else 20
        try:
            import diffusers

            self.rival = diffusers.__version__
        except ImportError:
            self.rival = None
        args.work.mkdir(parents=True, exist_ok=True)

    def say(self, text):
        print(text, flush=True)

    def fail(self, text):
        self.failed = True
        self.say(f"FAILED: {text}")

    def run(self, command):
        """(seconds, standard output, standard error, peak bytes on the device) of a process; None where it failed."""
        left = self.deadline - time.monotonic()
        name = " ".join(Path(str(c)).name for c in command[:2])
        if left < 5:
            self.say(f"skipped, the part's ten minutes are over: {name}")
            return None
        with DeviceMemory(self.device) as memory:
            start = time.perf_counter()
            try:
                done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=left)
            except subprocess.TimeoutExpired:
                self.say(f"stopped, the part's ten minutes are over: {name}")
                return None
            seconds = time.perf_counter() - start
        if done.returncode != 0:
            last = "\n".join(done.stderr.strip().splitlines()[-6:])
            self.say(f"{name} ended with {done.returncode}: {last}")
            return None
        return seconds, done.stdout, done.stderr, memory.peak

    def ours(self, inputs, out, *, dtype=None, device=None, steps=None, extra=()):
        """(seconds, stages, peak bytes): stages holds the seconds of each stage, a list with one entry a picture."""
        command = [self.args.program, "-v", "--model", self.model(), "--device", device or self.device]
        command += ["--dtype", dtype or self.dtype, "--prompt", PROMPT, "-s", steps or self.steps, "-o", out, *extra]
        result = self.run([*command, *inputs])
        if result is None:
            self.failed = True
            return None
        seconds, _, log, peak = result
        stages = {}
        for stage, value in re.findall(r": (text|encode|denoise|decode|step) ([\d.]+) s\b", log):
            stages.setdefault(stage, []).append(float(value))
        return seconds, stages, peak

    def diffusers(self, inputs, out, *, mode="eager", dtype=None, steps=None, batch=1, extra=()):
        """(seconds, its report, peak bytes)."""
        if self.rival is None:
            return None
        command = [sys.executable, HERE / "cuda_diffusers.py", self.model(), *inputs, "--out", out, *extra]
        command += ["--device", self.device, "--dtype", dtype or self.dtype, "--mode", mode, "--prompt", PROMPT]
        result = self.run([*command, "--steps", steps or self.steps, "--batch", batch])
        return result and (result[0], json.loads(result[1].strip().splitlines()[-1]), result[3])

    def model(self):
        if self.args.model:
            return self.args.model
        if self.args.dry:
            return ROOT / "tests" / "data" / "model"
        folder = self.args.work / "model"
        if not (folder / "model_index.json").exists():
            if self.rival is None:
                sys.exit("diffusers is not installed, which makes the model: install it, or give --model")
            self.say("making the model ...")
            subprocess.run([sys.executable, HERE / "full_size.py", "make", folder], check=True)
        return folder

    def full_size(self):
        config = json.loads((Path(self.model()) / "unet" / "config.json").read_text())
        return config["block_out_channels"] == [384, 384, 768, 768]

    def pictures(self, side, count=1):
        """`count` square pictures in a folder of their own."""
        from PIL import Image

        folder = self.args.work / f"in-{side}-{count}"
        folder.mkdir(exist_ok=True)
        source = Image.open(ROOT / "assets" / "astronaut.png").convert("RGB").resize((side, side), Image.BOX)
        for i in range(count):
            source.rotate(90 * i).save(folder / f"{i:02}.png")
        return sorted(folder.iterdir())

    def out(self, name):
        folder = self.args.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder


class DeviceMemory:
    """The most memory in use on the device while it is entered, over what was in use before: weights, workspaces and
    the context of the process watched, whichever allocator they come from."""

    def __init__(self, device):
        self.watch = device == "cuda"
        self.peak = None

    def used(self):
        free, total = torch.cuda.mem_get_info()
        return total - free

    def __enter__(self):
        if self.watch:
            before, self.peak, self.over = self.used(), 0, threading.Event()

            def poll():
                while not self.over.wait(0.01):
                    self.peak = max(self.peak, self.used() - before)

            self.thread = threading.Thread(target=poll)
            self.thread.start()
        return self

    def __exit__(self, *_):
        if self.watch:
            self.over.set()
            self.thread.join()


def read_latents(path):
    """The tensor `latents` of a safetensors file, in float64."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    info = json.loads(data[8 : 8 + size])["latents"]
    assert info["dtype"] == "F32", info
    begin, end = info["data_offsets"]
    values = torch.frombuffer(bytearray(data[8 + size + begin : 8 + size + end]), dtype=torch.float32)
    return values.reshape(info["shape"]).double()


def parity(bench):
    side = 64 if bench.args.dry else 256
    inputs = bench.pictures(side)
    results = {}
    runs = [("cpu", "f32")] + [(bench.device, dtype) for dtype in BOUNDS if (bench.device, dtype) != ("cpu", "f32")]
    for device, dtype in runs:
        path = bench.out(f"parity-{device}-{dtype}") / "latents.safetensors"
        if bench.ours(inputs, path, device=device, dtype=dtype, steps=4):
            results[f"ours {device} {dtype}"] = read_latents(path)
        else:
            bench.fail(f"no latents on {device} in {dtype}")
    if bench.rival is None:
        bench.say("diffusers is not installed: compared with our own float32 on the CPU alone")
    for dtype in ("f32",) if bench.args.dry else ("f32", "f16"):
        out = bench.out(f"parity-diffusers-{dtype}")
        if bench.diffusers(inputs, out, dtype=dtype, steps=4, extra=["--latents"]):
            results[f"diffusers {dtype}"] = read_latents(out / f"{inputs[0].stem}.safetensors")

    def check(a, b, bound):
        if a in results and b in results:
            x, y = results[a], results[b]
            error = ((x - y).norm() / y.norm()).item() if x.shape == y.shape else float("nan")
            bench.say(f"{a} against {b}: {error:.2e}" + (f" (at most {bound:.1e})" if bound else ""))
            if bound and not error <= bound:
                bench.fail(f"{a} is not within {bound:.1e} of {b}")

    ours = f"ours {bench.device}"
    check("ours cpu f32", "diffusers f32", BOUNDS["f32"])
    if bench.device != "cpu":
        check(f"{ours} f32", "ours cpu f32", BOUNDS["f32"])
        check(f"{ours} f32", "diffusers f32", BOUNDS["f32"])
    for dtype in ("f16", "bf16"):
        check(f"{ours} {dtype}", f"{ours} f32", BOUNDS[dtype])
    check("diffusers f16", "diffusers f32", None)


def matmul_peak(bench):
    """TFLOP/s of a large square matrix product in the precision of the bench."""
    n, dtype = (512, torch.float32) if bench.args.dry else (8192, torch.float16)
    a = torch.randn(n, n, device=bench.device, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        if bench.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        if bench.device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e12


def mebibytes(value):
    return "-" if value is None else f"{value / 2**20:.0f} MiB"


def times(bench):
    """Whole processes in turns, then the step and the decode where the weights are loaded and the kernels chosen."""
    side = 64 if bench.args.dry else 512
    one, four = bench.pictures(side), bench.pictures(side, 4)
    wholes = {"ours": [], "diffusers eager": []}
    for _ in range(bench.rounds):
        runs = (
            ("ours", bench.ours(one, bench.out("whole-ours") / "out.png")),
            ("diffusers eager", bench.diffusers(one, bench.out("whole-diffusers"))),
        )
        for name, result in runs:
            if result:
                wholes[name].append(result[0])
    for name, seconds in wholes.items():
        if seconds:
            listed = ", ".join(f"{s:.2f}" for s in seconds)
            bench.say(f"whole process, {name}: {statistics.median(seconds):.2f} s (of {listed})")

    peak = matmul_peak(bench)
    bench.say(f"matrix product on {bench.device} in {bench.dtype}: {peak:.3g} TFLOP/s")
    unet_work, decoder_work = UNET_TFLOP * (side / 256) ** 2, DECODER_TFLOP * (side / 512) ** 2

    def line(name, step, decode, memory, note=""):
        def cell(seconds, work):
            if not seconds:
                return "-"
            text = f"{1000 * seconds:.2f} ms"
            if bench.full_size():
                text += f" ({work / seconds:.0f} TFLOP/s, {100 * work / seconds / peak:.0f} % of the product)"
            return text

        bench.say(f"{name}: step {cell(step, unet_work)}; decode {cell(decode, decoder_work)}; {memory}{note}")

    # A stage is told in hundredths of a second and at its end waits for the card: many steps, to divide.
    steps = bench.steps if bench.args.dry else 200
    modes = ("eager", "channels-last", "compile")
    for _ in range(bench.rounds):
        result = bench.ours(four, bench.out("steps-ours"), steps=steps)
        if result:
            _, stages, memory = result
            denoise, decode = stages.get("denoise", []), stages.get("decode", [])
            if len(denoise) != len(four) or len(decode) != len(four):
                bench.fail(f"the program told of {stages}, not of {len(four)} pictures")
            else:  # the first picture's hold the reading of the weights
                step = statistics.mean(denoise[1:]) / steps
                line("ours", step, statistics.mean(decode[1:]), mebibytes(memory))
        for mode in modes:
            result = bench.diffusers(four, bench.out("steps-diffusers"), mode=mode)
            if result:
                _, report, memory = result
                reserved = f" (its allocator {mebibytes(report.get('reserved'))})"
                line(f"diffusers {mode}", report["step"], report["decode"], mebibytes(memory), reserved)
        modes = modes[:2]  # compiling takes minutes, and once is enough


def folder(bench):
    """Pictures a second over a folder, start of the process to the last file."""
    side, count = (64, 4) if bench.args.dry else (512, 32)
    inputs = bench.pictures(side, count)
    for batch in (1, 4):
        result = bench.ours(inputs, bench.out("folder-ours"), extra=["--batch", batch])
        if result:
            written = len(list((bench.args.work / "folder-ours").glob("*.png")))
            if written != count:
                bench.fail(f"{written} of {count} pictures were written")
            rate = f"{count / result[0]:.2f} pictures/s"
            bench.say(f"folder of {count}, ours, batch {batch}: {rate}, peak {mebibytes(result[2])}")
        for mode in ("eager",) if bench.args.dry else ("eager", "channels-last"):
            result = bench.diffusers(inputs, bench.out("folder-diffusers"), mode=mode, batch=batch)
            if result:
                loaded = f"{1 / result[1]['picture']:.2f} once loaded"
                rate = f"{count / result[0]:.2f} pictures/s ({loaded})"
                bench.say(f"folder of {count}, diffusers {mode}, batch {batch}: {rate}, peak {mebibytes(result[2])}")


def profile(bench):
    """Our kernels by the time they took, from Nsight Systems."""
    if bench.device != "cuda" or shutil.which("nsys") is None:
        bench.say("profile: left out, it needs a card and Nsight Systems (nsys)")
        return
    out, inputs = bench.out("profile"), bench.pictures(512)
    command = ["nsys", "profile", "--stats=true", "--force-overwrite=true", "-o", out / "run", bench.args.program]
    command += ["--model", bench.model(), "--device", "cuda", "--dtype", bench.dtype, "--prompt", PROMPT]
    result = bench.run([*command, "-s", 20, "-o", out / "out.png", *inputs])
    if result is None:
        bench.fail("the profile could not be taken")
        return
    rows = result[1].splitlines()
    begin = next((i for i, row in enumerate(rows) if "cuda_gpu_kern_sum" in row), 0)
    bench.say("\n".join(row[:160] for row in rows[begin : begin + 30]))


PARTS = {"parity": parity, "time": times, "folder": folder, "profile": profile}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, required=True, help="our binary, built with --features cuda,cudnn")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the model and the results")
    parser.add_argument("--model", type=Path, help="a model of the published size, instead of making one")
    parser.add_argument("--part", choices=PARTS, action="append", help="repeatable; default: every part")
    parser.add_argument("--dry", action="store_true", help="the small model on the CPU, to check this script")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        sys.exit("no CUDA card is to be had by PyTorch; --dry checks the script without one")
    os.environ["HF_HUB_OFFLINE"] = "1"
    bench = Bench(args)
    card = "the CPU, dry" if args.dry else torch.cuda.get_device_name()
    cuda = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    bench.say(f"{card}; PyTorch {torch.__version__}, {cuda}; diffusers {bench.rival or 'not installed'}")
    if not args.dry and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        bench.say("driver " + subprocess.run(query, capture_output=True, text=True).stdout.strip())
    bench.model()
    for name in args.part or PARTS:
        bench.say(f"== {name}")
        bench.deadline = time.monotonic() + PART_SECONDS
        PARTS[name](bench)
    sys.exit(1 if bench.failed else 0)


if __name__ == "__main__":
    main()
