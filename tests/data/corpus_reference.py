#!/usr/bin/env python3
"""Reads every picture under a folder with Pillow and keeps what it saw, for tests/library/corpus.rs. Needs Pillow and NumPy:

    python tests/data/corpus_reference.py FOLDER

Writes FOLDER/reference.safetensors: for each file that Pillow reads, by its path below FOLDER, the first frame turned
upright, as 8-bit RGBA with the colour multiplied by alpha, halved (2x2 means) once and then until no side is above 256;
its metadata has `size:PATH` = "WIDTHxHEIGHT" for these, and `error:PATH` for those that Pillow refuses."""

import json
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MOST = 256


def rgba(image):
    """(h, w, 4) float, 0..=1, of the first frame."""
    image.seek(0)
    image.load()
    clear = gray_key(image)
    image = ImageOps.exif_transpose(image)
    # Modes that `convert` would clip instead of scaling.
    if image.mode.startswith("I;16"):
        gray = np.asarray(image).astype(np.uint16) / 65535
    elif image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        bits = image.getexif().get(258) or 16  # a TIFF's BitsPerSample
        bits = bits[0] if isinstance(bits, tuple) else bits
        gray = (values % (1 << bits)) / ((1 << bits) - 1)
    elif image.mode == "F":
        gray = np.nan_to_num(np.asarray(image), nan=0.0).clip(0, 1)
    elif clear is not None:
        gray = np.asarray(image.convert("L")) / 255
    else:
        return np.asarray(image.convert("RGBA")) / 255
    return np.dstack([gray, gray, gray, np.ones_like(gray) if clear is None else gray != clear])


def gray_key(image):
    """The transparent level of a grey PNG, 0..=1: Pillow's `convert` compares it unscaled, and not with 16 bits."""
    key = image.info.get("transparency")
    if image.format != "PNG" or image.mode not in ("1", "L", "I;16") or not isinstance(key, int):
        return None
    if image.mode == "1":
        return float(key > 0)
    with open(image.filename, "rb") as file:
        bits = file.read(25)[24]
    return key / ((1 << bits) - 1)


def halve(pixels):
    h, w = pixels.shape[:2]
    pixels = np.pad(pixels, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge")
    return pixels.reshape(pixels.shape[0] // 2, 2, pixels.shape[1] // 2, 2, 4).mean((1, 3))


def main(folder):
    warnings.simplefilter("ignore")
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    names = [n for n in names if not n.startswith(".") and "/" in n]
    metadata, tensors = {}, {}
    for name in names:
        try:
            with Image.open(folder / name) as image:
                pixels = rgba(image)
        except Exception as error:  # whatever a decoder throws: the file is one that Pillow does not read
            metadata[f"error:{name}"] = f"{type(error).__name__}: {error}"
            continue
        metadata[f"size:{name}"] = f"{pixels.shape[1]}x{pixels.shape[0]}"
        pixels = pixels.astype(np.float32)
        pixels[..., :3] *= pixels[..., 3:]
        pixels = halve(pixels)
        while max(pixels.shape) > MOST:
            pixels = halve(pixels)
        tensors[name] = np.rint(pixels * 255).astype(np.uint8)
    header, offset = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "U8", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.size]}
        offset += tensor.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "reference.safetensors", "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            out.write(tensor.tobytes())
    print(f"{len(names)} files, Pillow {Image.__version__} reads {len(tensors)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
