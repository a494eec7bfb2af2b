#!/usr/bin/env python3
"""Writes small valid files of every kind that the tool reads into tests/data/files/, with the pixels and values that
other programs read from them (files/expected.safetensors). Needs Pillow, NumPy, safetensors, tifffile:

    python tests/data/make_files.py

Seeded; run it again only to add files, as Pillow's encoders change between versions."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from safetensors.numpy import save_file

HERE = Path(__file__).parent
OUT = HERE / "files"
PHOTO = HERE.parent.parent / "assets" / "astronaut.png"
W, H = 40, 30  # no multiple of 8 or 16: the edge blocks of JPEG and WebP matter

A1111 = (
    "a (portrait:1.2) of an astronaut, orange suit <lora:film:0.8>\n"
    "Negative prompt: blurry, low quality\n"
    "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1234, Size: 512x512, Model: sd15"
)
# Two samplers; the prompts pass through a combine node, a ControlNet node and a primitive string node.
COMFY = {
    "3": {"class_type": "KSampler", "inputs": {"seed": 5, "steps": 20, "cfg": 8.0, "model": ["4", 0],
          "positive": ["20", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 512, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "beautiful scenery", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": ["30", 0], "clip": ["4", 1]}},
    "8": {"class_type": "CLIPTextEncode", "inputs": {"text": "purple galaxy bottle", "clip": ["4", 1]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["10", 0]}},
    "10": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "20": {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["6", 0], "conditioning_2": ["21", 0]}},
    "21": {"class_type": "ControlNetApply", "inputs": {"conditioning": ["8", 0], "strength": 1.0}},
    "30": {"class_type": "PrimitiveString", "inputs": {"value": "text, watermark"}},
}
WORKFLOW = {"last_node_id": 30, "nodes": [], "version": 0.4}

expected = {}


def keep(name, pixels):
    """Remembers what another program reads from a file: (h, w, c), upright."""
    pixels = np.asarray(pixels)
    expected[name] = np.ascontiguousarray(pixels if pixels.ndim == 3 else pixels[..., None])


def by_pillow(name, mode=None):
    image = ImageOps.exif_transpose(Image.open(OUT / name))
    keep(name, image.convert(mode) if mode else image)


def png_bytes(pixels, color_type, extra=()):
    """A 16-bit PNG, which Pillow does not write. pixels: (h, w, c) uint16."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    h, w = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", w, h, 16, color_type, 0, 0, 0)
    body = [chunk(b"IHDR", head), *(chunk(k, d) for k, d in extra), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def user_comment(text):
    return b"UNICODE\0" + text.encode("utf-16-be")


def images():
    photo = Image.open(PHOTO).convert("RGB").crop((120, 0, 360, 180)).resize((W, H), Image.LANCZOS)
    gray = photo.convert("L")
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, W).astype(np.uint8), (H, 1)))
    rgba = photo.copy()
    rgba.putalpha(ramp)
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    srgb[24:36] = struct.pack(">6H", 2024, 1, 1, 0, 0, 0)  # the profile states when it was made
    srgb = bytes(srgb)

    # PNG
    photo.save(OUT / "rgb.png", icc_profile=srgb)
    gray.save(OUT / "gray.png")
    rgba.save(OUT / "rgba.png")
    gray_alpha = Image.merge("LA", (gray, ramp))
    gray_alpha.save(OUT / "gray-alpha.png")
    opaque = photo.copy()
    opaque.putalpha(255)
    opaque.save(OUT / "opaque-alpha.png")
    palette = photo.quantize(16)
    palette.save(OUT / "palette.png")
    palette.save(OUT / "palette-trns.png", transparency=bytes([0, 128] + [255] * 14))
    gray.convert("1").save(OUT / "one-bit.png")
    for name in ["rgb", "gray", "rgba", "gray-alpha", "opaque-alpha"]:
        by_pillow(f"{name}.png")
    by_pillow("palette.png", "RGB")
    by_pillow("palette-trns.png", "RGBA")
    by_pillow("one-bit.png", "L")
    wide = np.asarray(photo).astype(np.uint16) * 257 + np.arange(W, dtype=np.uint16)[None, :, None]
    wide = np.minimum(wide, 65535).astype(np.uint16)
    (OUT / "rgb16.png").write_bytes(png_bytes(wide, 2))
    (OUT / "gray16.png").write_bytes(png_bytes(wide[..., :1], 0))
    keep("rgb16.png", wide)
    keep("gray16.png", wide[..., :1])
    frames = [photo, ImageOps.mirror(photo), ImageOps.flip(photo)]
    photo.save(OUT / "animated.png", save_all=True, append_images=frames[1:], duration=50)
    keep("animated.png", photo)

    # PNG text
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", A1111)
    info.add_text("Comment", "kept as it is", zip=True)
    info.add_itxt("Title", "Ürsprünglich 日本", lang="de", tkey="Titel")
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "Camera"
    photo.save(OUT / "a1111.png", pnginfo=info, exif=exif)
    by_pillow("a1111.png")
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", json.dumps(COMFY))
    info.add_text("workflow", json.dumps(WORKFLOW))
    photo.save(OUT / "comfy.png", pnginfo=info)
    by_pillow("comfy.png")

    # JPEG
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        exif[0x010F] = "Camera"
        exif[0x0132] = "2024:01:02 03:04:05"
        ifd = exif.get_ifd(0x8769)
        ifd[0xA002], ifd[0xA003] = W, H
        ifd[0x920A] = 50.0
        exif.get_ifd(0x8825)[0x1] = "N"
        name = f"orientation-{orientation}.jpg"
        photo.save(OUT / name, quality=90, subsampling=0, exif=exif)
        by_pillow(name)
    photo.save(OUT / "progressive-420.jpg", quality=85, progressive=True, icc_profile=srgb)
    gray.save(OUT / "gray.jpg", quality=90)
    photo.convert("CMYK").save(OUT / "cmyk.jpg", quality=95)
    by_pillow("progressive-420.jpg")
    by_pillow("gray.jpg")
    by_pillow("cmyk.jpg", "RGB")
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = user_comment(A1111.replace("astronaut", "astronaut 日本"))
    photo.save(OUT / "a1111.jpg", quality=90, exif=exif)
    by_pillow("a1111.jpg")

    # WebP
    photo.save(OUT / "lossy.webp", quality=85, icc_profile=srgb)
    photo.save(OUT / "lossless.webp", lossless=True)
    rgba.save(OUT / "alpha.webp", lossless=True, exact=True)
    photo.save(OUT / "a1111.webp", lossless=True, exif=exif)
    photo.save(OUT / "animated.webp", save_all=True, append_images=frames[1:], lossless=True)
    by_pillow("lossy.webp")
    by_pillow("lossless.webp")
    by_pillow("alpha.webp")
    by_pillow("a1111.webp")
    keep("animated.webp", photo)

    # TIFF
    exif = Image.Exif()
    exif[0x0112] = 8
    exif[0x010F] = "Camera"
    exif.get_ifd(0x8769)[0x920A] = 50.0
    photo.save(OUT / "rgb.tif", compression="tiff_lzw", exif=exif, icc_profile=srgb)
    photo.quantize(16).save(OUT / "palette.tif")
    rgba.save(OUT / "rgba.tif", compression="tiff_adobe_deflate")
    gray.convert("1").save(OUT / "one-bit.tif")
    by_pillow("rgb.tif")
    by_pillow("palette.tif", "RGB")
    by_pillow("rgba.tif")
    by_pillow("one-bit.tif", "L")
    tifffile.imwrite(OUT / "rgb16.tif", wide, photometric="rgb", byteorder=">")
    tifffile.imwrite(OUT / "gray16.tif", wide[..., 0], photometric="minisblack", compression="zlib")
    tifffile.imwrite(OUT / "pages.tif", np.stack([np.asarray(photo)] * 2), photometric="rgb", compression="zlib")
    tifffile.imwrite(OUT / "planar.tif", np.moveaxis(np.asarray(photo), 2, 0), photometric="rgb", planarconfig="separate")
    floats = (wide.astype(np.float32) / 65535).astype(np.float32)
    tifffile.imwrite(OUT / "float.tif", floats, photometric="rgb", compression="zlib")
    tifffile.imwrite(OUT / "gray-float.tif", floats[..., 0], photometric="minisblack", compression="zlib")
    keep("rgb16.tif", wide)
    keep("gray16.tif", wide[..., 0])
    keep("pages.tif", photo)
    keep("planar.tif", photo)
    keep("float.tif", wide)
    keep("gray-float.tif", wide[..., 0])

    # BMP, GIF
    photo.save(OUT / "rgb.bmp")
    photo.quantize(16).save(OUT / "palette.bmp")
    gif = photo.quantize(15)
    gif.save(OUT / "animated.gif", save_all=True, append_images=[f.quantize(15) for f in frames[1:]], duration=50)
    cut = rgba.convert("RGB").quantize(15)
    cut.save(OUT / "transparent.gif", transparency=3)
    by_pillow("rgb.bmp")
    by_pillow("palette.bmp", "RGB")
    by_pillow("animated.gif", "RGB")
    by_pillow("transparent.gif", "RGBA")
    photo.save(OUT / "jpeg-named.png", format="JPEG", quality=90)
    by_pillow("jpeg-named.png")


def bf16(values):
    """float32 -> the bits of bfloat16, rounded to even, as uint16."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path, tensors, metadata=None):
    """Any dtype, by its safetensors name. tensors: {name: (dtype, shape, bytes)}."""
    header, offset = {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(d for _, _, d in tensors.values()))


def latents():
    values = np.random.default_rng(7).standard_normal((1, 4, 6, 8)).astype(np.float32)
    raw = (values / 0.18215).astype(np.float32)
    expected["latents"] = values
    save_file({"latents": values}, OUT / "f32.safetensors", metadata={"format": "pt"})
    save_file({"latents": raw}, OUT / "unstated-raw.safetensors")
    save_file({"latent": values.astype(np.float16)}, OUT / "f16.safetensors")
    save_file({"anything": values[0].astype(np.float64)}, OUT / "f64-rank3.safetensors")
    write_safetensors(OUT / "bf16.safetensors", {"latents": ("BF16", values.shape, bf16(values).tobytes())})
    batch = np.concatenate([values, -values, 2 * values])
    save_file({"latents": batch}, OUT / "batch3.safetensors")
    # As ComfyUI's SaveLatent writes them: F32, an empty mark, the graph in the metadata.
    graph = {"prompt": json.dumps(COMFY), "workflow": json.dumps(WORKFLOW)}
    save_file({"latent_tensor": raw, "latent_format_version_0": np.zeros(0, np.float32)}, OUT / "marked.latent", metadata=graph)
    save_file({"latent_tensor": values}, OUT / "unmarked.latent")
    # As kohya's sd-scripts caches them.
    sizes = {"original_size": np.array([512, 384]), "crop_ltrb": np.array([0, 0, 512, 384])}
    np.savez(OUT / "sd-scripts.npz", latents=raw[0], **sizes)
    np.savez_compressed(OUT / "sd-scripts-sized.npz", latents_6x8=raw[0], latents_3x4=raw[0, :, :3, :4],
                        original_size_6x8=np.array([512, 384]))
    np.savez(OUT / "fortran.npz", latents=np.asfortranarray(raw[0].astype(np.float64)))
    # What must be refused.
    rng = np.random.default_rng(8)
    save_file({"latents": rng.standard_normal((1, 16, 6, 8)).astype(np.float32)}, OUT / "refused-flux.safetensors")
    save_file({"latents": rng.integers(0, 9, (1, 4, 6, 8))}, OUT / "refused-integers.safetensors")
    save_file({"latents": values[0, 0]}, OUT / "refused-rank2.safetensors")
    save_file({"latents": np.moveaxis(values, 1, 3).copy()}, OUT / "refused-channels-last.safetensors")
    nan = values.copy()
    nan[0, 2, 3, 4] = np.nan
    save_file({"latents": nan}, OUT / "refused-nan.safetensors")
    save_file({"latents": values[:, :, :0]}, OUT / "refused-empty.safetensors")
    weights = {f"layers.{i}.weight": values[0, 0] for i in range(9)}
    save_file(weights, OUT / "refused-weights.safetensors")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for old in OUT.iterdir():
        old.unlink()
    images()
    latents()
    save_file(expected, OUT / "expected.safetensors")
    total = sum(f.stat().st_size for f in OUT.iterdir())
    print(f"{len(list(OUT.iterdir()))} files, {total / 1000:.0f} kB")
