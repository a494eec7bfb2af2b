"""A call of the base checkpoint's UNet, float32, on the CPU: cargo bench --bench base, diffusers and OpenVINO in turns.

    pip install torch diffusers transformers openvino
    python benches/full_size.py make-base BASE
    python benches/base_unet.py BASE

One row, 77 tokens, 64x64 latents. Each is a process of its own, which calls the network once to bring everything in and then five times; the
median is taken, and of the rounds the best. OpenVINO's model is converted once, to BASE/openvino.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CALLS = 5
KINDS = ("ours", "diffusers", "openvino")


def inputs(folder, side):
    import torch

    width = json.loads((folder / "unet" / "config.json").read_text())["cross_attention_dim"]
    draw = torch.Generator().manual_seed(0)
    return torch.randn(1, 4, side, side, generator=draw), torch.tensor([500.0]), torch.randn(1, 77, width, generator=draw)


def module(folder):
    """The network as a module of plain tensors."""
    import torch
    from diffusers import UNet2DConditionModel

    class Unet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()

        def forward(self, sample, time, context):
            return self.unet(sample, time, encoder_hidden_states=context, return_dict=False)[0]

    return Unet()


def median(call):
    call()
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    print(f"{statistics.median(seconds):.3f} s")


def diffusers(args):
    import torch

    torch.set_num_threads(args.threads)
    unet, values = module(args.base), inputs(args.base, args.side)
    with torch.no_grad():
        median(lambda: unet(*values))


def openvino(args):
    import openvino
    import torch

    from peers import settings

    path = args.base / "openvino" / "unet.xml"
    values = inputs(args.base, args.side)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with torch.no_grad():
            converted = openvino.convert_model(module(args.base), example_input=values)
        openvino.save_model(converted, path, compress_to_fp16=False)
    core = openvino.Core()
    model = core.read_model(path)
    # The batch stays open, as in peers.py.
    model.reshape({port: [-1, *value.shape[1:]] for port, value in zip(model.inputs, values)})
    compiled = core.compile_model(model, "CPU", settings(args.threads))
    values = [value.numpy() for value in values]
    median(lambda: compiled(values))


def ours(args):
    built = ["cargo", "bench", "--bench", "base", "--", str(args.base), str(args.side)]
    out = subprocess.run(built, cwd=HERE.parent, env=os.environ | {"RAYON_NUM_THREADS": str(args.threads)}, capture_output=True, text=True)
    if out.returncode:
        sys.exit(out.stderr)
    print(out.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="the checkpoint's folder")
    parser.add_argument("--side", type=int, default=64, help="of the latents")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", choices=KINDS, help="one of them, once")
    args = parser.parse_args()
    if args.only:
        globals()[args.only](args)
        return
    best = dict.fromkeys(KINDS, float("inf"))
    for _ in range(args.rounds):
        for kind in KINDS:
            command = [sys.executable, __file__, args.base.resolve(), "--side", str(args.side), "--threads", str(args.threads), "--only", kind]
            out = subprocess.run(command, capture_output=True, text=True)
            if out.returncode:
                sys.exit(f"{kind}: {out.stderr}")
            best[kind] = min(best[kind], float(re.findall(r"([0-9.]+) s\b", out.stdout)[-1]))
            print(f"{kind} {best[kind]:.3f} s", flush=True)
    print(f"{best['diffusers'] / best['ours']:.2f}x diffusers, {best['openvino'] / best['ours']:.2f}x OpenVINO")


if __name__ == "__main__":
    main()
