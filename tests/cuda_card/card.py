"""Runs the program on the card: for test_card.py and report.py."""

import collections
import json
import os
import pathlib
import struct
import subprocess
import zlib

HERE = pathlib.Path(__file__).resolve().parent
DATA = HERE.parent / "data"
# A run takes a second, where the machine is busy a few; one that has not ended by then hangs.
LIMIT = 180


class Run:
    """A finished run of the program."""

    def __init__(self, done):
        self.status = done.returncode
        lines = done.stderr.decode(errors="replace").splitlines()
        self.counts, self.bytes, self.peaks = {}, {}, []
        self.shapes = collections.Counter()  # with SIM_STATS=2: how often (name, units, bytes of device memory)
        self.told = []  # what is not the card's
        for line in lines:
            if line.startswith("sim "):
                self._count(line[4:])
            elif line.strip():
                self.told.append(line)
        self.stdout = done.stdout

    def _count(self, line):
        words = line.split()
        if line.startswith("peak bytes"):
            self.peaks.append(int(words[5].rstrip(",")))
        elif line.startswith("call "):
            name, numbers = line[5:].rsplit(": ", 1)
            times, units, moved = (int(part.split()[0]) for part in numbers.split(", "))
            self.shapes[name, units, moved] = times
        elif words[-1].isdigit() and words[-2].isdigit():
            name = line.rsplit(None, 2)[0]
            self.counts[name], self.bytes[name] = int(words[-2]), int(words[-1])

    def count(self, *prefixes):
        return sum(n for name, n in self.counts.items() if name.startswith(prefixes))

    def summary(self):
        """The counts that ceilings are about."""
        return dict(
            calls=self.count("kernel ", "cublas", "cudnn"),
            kernels=self.count("kernel "),
            library_calls=self.count("cublas", "cudnn"),
            uploads=self.count("copy to the card"),
            uploaded_bytes=sum(n for name, n in self.bytes.items() if name.startswith("copy to the card")),
            downloads=self.count("copy from the card"),
            allocations=self.count("alloc"),
            memsets=self.count("memset"),
            syncs=self.count("sync", "copy from the card (awaits it)"),
            graphs=self.count("graph launch"),
            graph_nodes=self.bytes.get("graph launch", 0),
            moved=sum(moved * times for (_, _, moved), times in self.shapes.items()),  # as report.py says
        )

    def __repr__(self):
        return f"status {self.status}, told {self.told}"


class Card:
    """The card that build.sh made, and the program built for it."""

    def __init__(self, out, program):
        self.out, self.program = pathlib.Path(out).resolve(), pathlib.Path(program).resolve()

    def run(self, *arguments, limit=LIMIT, **settings):
        """One run; `settings` are SIM_ variables without their SIM_. Hangs end in an error (TimeoutExpired)."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SIM_", "RUST_"))}
        environment |= {f"SIM_{name.upper()}": str(value) for name, value in settings.items()}
        # Several runs at a time; and a refusal is one line whatever the user wants to know of his own programs' panics.
        environment |= {"RAYON_NUM_THREADS": "1", "RUST_BACKTRACE": "1"}
        command = [HERE / "run.sh", self.out, self.program, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, timeout=limit, env=environment, stdin=subprocess.DEVNULL)
        return Run(done)


class Stage:
    """What a part of a run costs: its counts, how often each shape of call comes, and the bytes held at most so far."""

    def __init__(self, counts, shapes, peak=0):
        self.counts, self.shapes, self.peak = counts, shapes, peak

    @classmethod
    def of(cls, run):
        return cls(run.summary(), run.shapes, run.peaks[0])

    def less(self, other, parts=1, times=1):
        """What is more here than so many times in `other`, in equal parts."""
        counts = {name: (n - times * other.counts[name]) // parts for name, n in self.counts.items()}
        shapes = {key: (n - times * other.shapes.get(key, 0)) // parts for key, n in self.shapes.items()}
        return Stage(counts, {key: n for key, n in shapes.items() if n > 0}, self.peak)


def stages(card, model, side, folder, dtype="f16"):
    """The stages of a run on a square image that computes nothing, from runs that differ in one of them. Each has the
    weights that it reads; of the steps, what the first has more is counted with the text."""
    image, latents = folder / "image.png", folder / "latents.safetensors"
    write_png(image, side)
    write_latents(latents, side // 8)

    def run(input, out, steps):
        arguments = ["--model", model, "-p", "a cat", "-s", steps, "--dtype", dtype, "--device", "cuda", "-q", "-o", folder / out]
        done = card.run(input, *arguments, skip=1, stats=2, memory=80 << 30)
        assert done.status == 0, done
        return Stage.of(done)

    picture, one = run(image, "a.png", 1), run(image, "a.safetensors", 1)
    three, from_latents = run(image, "a.safetensors", 3), run(latents, "b.safetensors", 1)
    step = three.less(one, parts=2)
    return {"text": from_latents.less(step), "encode": one.less(from_latents), "step": step, "decode": picture.less(one)}


def base_arguments(base, side, steps, dtype="f16"):
    """A run that makes a square picture of words, with both prompts of guidance, and upscales it in one step."""
    return ["--generate", "--base", base, "--size", f"{side}x{side}", "--base-steps", steps, "-p", "a cat", "-s", 1, "--dtype", dtype, "--device", "cuda", "-q"]


def base_stages(card, model, base, side, folder, dtype="f16"):
    """What the base checkpoint adds to a run that is given latents: what is done once, and a step."""
    write_latents(folder / "latents.safetensors", side // 8)

    def run(*arguments):
        done = card.run(*arguments, "--model", model, "-o", folder / "c.safetensors", skip=1, stats=2, memory=80 << 30)
        assert done.status == 0, done
        return Stage.of(done)

    # PNDM's steps are alike from the fifth call of the UNet on; there is one call more than steps.
    six, eight = (run(*base_arguments(base, side, steps, dtype)) for steps in [6, 8])
    upscaled = run(folder / "latents.safetensors", "-p", "a cat", "-s", 1, "--dtype", dtype, "--device", "cuda", "-q")
    step = eight.less(six, parts=2)
    return {"base": six.less(upscaled).less(step, times=7), "base step": step}


def write_png(path, side):
    """A square picture without repetition."""
    rows = b"".join(
        b"\0" + bytes((x * 7 + y * 3 + x * y // 16 + c * 50) & 255 for x in range(side) for c in range(3)) for y in range(side)
    )

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def write_latents(path, side):
    """Latents of a square image, (1, 4, side, side), with a spread near 1."""
    values = [(i * 37 % 101 - 50) / 30 for i in range(4 * side * side)]
    header = json.dumps({"latents": {"dtype": "F32", "shape": [1, 4, side, side], "data_offsets": [0, 4 * len(values)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack(f"<{len(values)}f", *values))


def read_tensors(path):
    """The float32 tensors of a safetensors file, as lists."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        assert entry["dtype"] == "F32", f"{path}: {name} is {entry['dtype']}"
        tensors[name] = struct.unpack(f"<{(end - start) // 4}f", data[8 + size + start : 8 + size + end])
    return tensors


def relative_error(a, b):
    """|a - b| / |b|; infinite where a number is missing or none."""
    if len(a) != len(b):
        return float("inf")
    error = (sum((x - y) ** 2 for x, y in zip(a, b)) / sum(y * y for y in b)) ** 0.5
    return error if error == error else float("inf")


def read_bmp(path):
    """The samples of a BMP file, and its size."""
    data = path.read_bytes()
    start, size = struct.unpack("<I", data[10:14])[0], struct.unpack("<ii", data[18:26])
    return data[start:], size
