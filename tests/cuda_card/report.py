"""What the published configuration costs on the card, stage by stage, and how long a real card would take: a prediction.

    python3 tests/cuda_card/report.py OUT PROGRAM [--side 512] [--dtype f16] [--calls STAGE]

For a change: print it before and after. `--calls` lists a stage's calls, those that move most first.

Counts are exact. Bytes moved are the memory that a call is given, from its pointers to the end of what they lie in: each
byte read or written once, which caches make less and a second reading more. Products are counted in the libraries' calls; for
attention of our own they come from the configuration. The prediction: the host gives a call 2.5 us; the card takes for a call
its bytes over the bandwidth or its products over 60 % of the peak, whichever is longer; a stage takes the longer of both.
"""

import argparse
import collections
import pathlib
import re
import sys
import tempfile

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import published  # noqa: E402
from card import Card, base_stages, stages  # noqa: E402

LAUNCH = 2.5e-6  # seconds of the host
OF_PEAK = 0.6
# Bytes and products (two operations each) a second, from the makers' data sheets: dense, sums in float32.
CARDS = {
    "H100": dict(bandwidth=3.35e12, f16=989e12, bf16=989e12, tf32=495e12, f32=67e12),
    "RTX 4070": dict(bandwidth=504e9, f16=58.3e12, bf16=58.3e12, tf32=29.1e12, f32=29.1e12),
}


def attention_operations(side, stage):
    """Operations of the attention of a stage: scores and their sums, 2 x 2 x queries x keys x width each."""

    def attention(queries, keys, width):
        return 4 * queries * keys * width

    blocks, layers = published.UNET["block_out_channels"], published.UNET["layers_per_block"]
    latents, tokens = side // 8, 77
    if stage in ("text", "base"):
        prompts = 2 if stage == "base" else 1
        return prompts * published.TEXT["num_hidden_layers"] * attention(tokens, tokens, published.TEXT["hidden_size"])
    if stage == "base step":
        return base_attention_operations(latents, tokens, attention)
    if stage in ("encode", "decode"):
        queries = latents**2 * (4 if stage == "decode" else 1)
        return attention(queries, queries, published.VAE["block_out_channels"][-1])
    total = 0
    for level, width in list(enumerate(blocks))[1:]:
        queries = (2 * latents >> level) ** 2
        total += 2 * layers * attention(queries, tokens, width)
        if level == len(blocks) - 1:
            total += 2 * layers * attention(queries, queries, width)
    return total


def base_attention_operations(latents, tokens, attention):
    """The same of a call of the base checkpoint's UNet, for two prompts."""
    blocks, layers = published.BASE_UNET["block_out_channels"], published.BASE_UNET["layers_per_block"]
    last = len(blocks) - 1
    transformers = [(level, 2 * layers + 1) for level in range(last)] + [(last, 1)]
    total = 0
    for level, count in transformers:
        queries = (latents >> level) ** 2
        total += count * sum(attention(queries, keys, blocks[level]) for keys in [queries, tokens])
    return 2 * total


class Call:
    """The calls of one shape."""

    def __init__(self, name, units, moved, times):
        self.name, self.moved, self.times = name, moved, times
        self.operations = units if name.startswith(("cublas", "cudnn")) else 0

    def seconds(self, card, dtype):
        return self.times * max(self.moved / card["bandwidth"], self.operations / (OF_PEAK * card[dtype]))


def calls_of(stage, name, side):
    calls = [Call(*key, times) for key, times in stage.shapes.items()]
    own = [call for call in calls if "attention" in call.name]
    for call in own:  # shared out by the threads that they have, which is by their queries
        call.operations = attention_operations(side, name) // sum(c.times for c in own)
    return calls


def dtype_of(calls, asked):
    """The type of a stage's products: the narrowest of which its kernels move a tenth of their bytes."""
    moved = collections.Counter()
    for call in calls:
        for dtype in ["f16", "bf16", "f32"]:
            if re.search(rf"_{dtype}(_|$)", call.name):
                moved[dtype] += call.moved * call.times
    used = [dtype for dtype in ["f16", "bf16", "f32"] if moved[dtype] > 0.1 * moved.total()]
    return used[0] if used else asked


def host_seconds(counts):
    given = counts["calls"] + counts["uploads"] + counts["downloads"] + counts["memsets"] - counts["graph_nodes"]
    return LAUNCH * (max(given, 0) + counts["graphs"])


def print_table(parts, side, asked):
    head = ["stage", "of", "kernels", "library calls", "uploads", "MB up", "allocations", "syncs", "GB moved", "GFLOP", "peak MB", "host ms"]
    rows = [head + [f"{name} ms, predicted" for name in CARDS]]
    for name, stage in parts.items():
        calls, c = calls_of(stage, name, side), stage.counts
        dtype = dtype_of(calls, asked)
        moved = sum(call.moved * call.times for call in calls)
        operations = sum(call.operations * call.times for call in calls)
        host = host_seconds(c)
        rows.append(
            [name, dtype, c["kernels"], c["library_calls"], c["uploads"], f"{c['uploaded_bytes'] / 1e6:.1f}", c["allocations"], c["syncs"]]
            + [f"{moved / 1e9:.2f}", f"{operations / 1e9:.0f}", f"{stage.peak / 1e6:.0f}", f"{host * 1e3:.2f}"]
            + [f"{max(host, sum(call.seconds(card, dtype) for call in calls)) * 1e3:.2f}" for card in CARDS.values()]
        )
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for i, row in enumerate(rows):
        print("| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def print_calls(stage, name, side):
    by_name = collections.defaultdict(lambda: [0, 0, 0])
    for call in calls_of(stage, name, side):
        total = by_name[call.name]
        for i, more in enumerate([call.times, call.times * call.moved, call.times * call.operations]):
            total[i] += more
    print(f"\n{'calls of ' + name:40} {'times':>7} {'MB moved':>10} {'GFLOP':>8}")
    for call, (times, moved, operations) in sorted(by_name.items(), key=lambda item: -item[1][1]):
        print(f"{call:40} {times:7} {moved / 1e6:10.1f} {operations / 1e9:8.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the card, as build.sh made it")
    parser.add_argument("program")
    parser.add_argument("--side", type=int, default=512, help="of the square image that is upscaled")
    parser.add_argument("--dtype", default="f16")
    parser.add_argument("--calls", choices=["text", "encode", "step", "decode", "base", "base step"], action="append", default=[])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        model, base, card = folder / "published", folder / "base", Card(args.out, args.program)
        published.main(model)
        published.base(base)
        parts = stages(card, model, args.side, folder, args.dtype)
        parts |= base_stages(card, model, base, args.side, folder, args.dtype)
    print(
        f"published configurations, {args.side} -> {2 * args.side}, {args.dtype}, guidance 1, and of the base checkpoint, PNDM, 7.5; "
        "times are predicted, none was measured\n"
    )
    print_table(parts, args.side, args.dtype)
    for name in args.calls:
        print_calls(parts[name], name, args.side)


main()
