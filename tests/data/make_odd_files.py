#!/usr/bin/env python3
"""Writes small files of kinds that other programs write and few readers get right into tests/data/odd/, with the pixels
that they stand for (odd/expected.safetensors). Needs Pillow, NumPy, safetensors, tifffile, imagecodecs:

    python tests/data/make_odd_files.py

Seeded; run it again only to add files, as Pillow's encoders change between versions."""

import io
import struct
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageCms, ImageOps
from safetensors.numpy import save_file

HERE = Path(__file__).parent
OUT = HERE / "odd"
FILES = HERE / "files"
W, H = 20, 14  # small, and more than one tile

expected = {}


def keep(name, pixels):
    pixels = np.asarray(pixels)
    expected[name] = np.ascontiguousarray(pixels if pixels.ndim == 3 else pixels[..., None])


def tiff(name, fields, data):
    """A little-endian TIFF of one strip; fields: {tag: (type, values)}."""
    fields = {256: (3, [W]), 257: (3, [H]), 278: (3, [H]), **fields}
    fields[273], fields[279] = (4, [8]), (4, [len(data)])
    sizes = {1: "B", 2: "B", 3: "H", 4: "I", 5: "II", 7: "B"}
    start = 8 + len(data) + len(data) % 2
    outside, entries = b"", b""
    for tag, (kind, values) in sorted(fields.items()):
        packed = b"".join(struct.pack("<" + sizes[kind], *(v if isinstance(v, tuple) else (v,))) for v in values)
        if len(packed) > 4:
            place = struct.pack("<I", start + 2 + 12 * len(fields) + 4 + len(outside))
            outside += packed + b"\0" * (len(packed) % 2)
        else:
            place = packed.ljust(4, b"\0")
        entries += struct.pack("<HHI", tag, kind, len(values)) + place
    file = b"II*\0" + struct.pack("<I", start) + data + b"\0" * (len(data) % 2)
    (OUT / name).write_bytes(file + struct.pack("<H", len(fields)) + entries + b"\0\0\0\0" + outside)


def tiffs(photo, gray, rgba):
    one_bit = gray.point(lambda v: 255 * (v > 110)).convert("1")
    for name, compression in [("g3.tif", "group3"), ("g4.tif", "group4"), ("runs.tif", "tiff_ccitt")]:
        one_bit.save(OUT / name, compression=compression)
        keep(name, one_bit.convert("L"))
    strip = np.packbits(np.asarray(one_bit), axis=1)
    swapped = np.packbits(np.unpackbits(strip.reshape(-1, 1), axis=1)[:, ::-1], axis=1).tobytes()
    tiff("fill-order.tif", {258: (3, [1]), 259: (3, [1]), 262: (3, [1]), 266: (3, [2])}, swapped)
    keep("fill-order.tif", one_bit.convert("L"))

    rgb = np.asarray(photo)
    wide = rgb.astype(np.uint32) * 16843009
    tifffile.imwrite(OUT / "uint32.tif", wide, photometric="rgb")
    keep("uint32.tif", rgb)
    pixels = np.asarray(rgba).astype(np.uint16)
    alpha = pixels[..., 3:]
    multiplied = np.concatenate([(pixels[..., :3] * alpha + 127) // 255, alpha], axis=2).astype(np.uint8)
    tifffile.imwrite(OUT / "premultiplied.tif", multiplied, photometric="rgb", extrasamples=["assocalpha"])
    straight = multiplied.astype(np.float64)
    straight[..., :3] = np.where(alpha > 0, np.minimum(straight[..., :3] * 255 / np.maximum(alpha, 1), 255), straight[..., :3])
    keep("premultiplied.tif", np.rint(straight).astype(np.uint8))
    planes = np.moveaxis(rgb, 2, 0)
    for name, compression in [("planar-tiles.tif", None), ("planar-tiles-lzw.tif", "lzw")]:
        tifffile.imwrite(OUT / name, planes, photometric="rgb", planarconfig="separate", tile=(16, 16),
                         compression=compression, predictor=bool(compression))
        keep(name, rgb)
    tifffile.imwrite(OUT / "half.tif", (rgb / 255).astype(np.float16), photometric="rgb")
    keep("half.tif", rgb)
    tifffile.imwrite(OUT / "float-predictor.tif", (rgb / 255).astype(np.float32), photometric="rgb", compression="zlib", predictor=3)
    keep("float-predictor.tif", rgb)
    tifffile.imwrite(OUT / "big-endian-big.tif", rgb, photometric="rgb", bigtiff=True, byteorder=">")
    keep("big-endian-big.tif", rgb)
    photo.save(OUT / "ycbcr-jpeg.tif", compression="jpeg", quality=95)
    keep("ycbcr-jpeg.tif", Image.open(OUT / "ycbcr-jpeg.tif").convert("RGB"))

    levels = (np.asarray(gray).astype(np.uint32) * 4095 // 255).astype(">u2")
    bits = np.unpackbits(levels.view(np.uint8).reshape(H, W, 2), axis=2)[..., 4:]
    tiff("gray12.tif", {258: (3, [12]), 259: (3, [1]), 262: (3, [1])}, np.packbits(bits.reshape(H, -1), axis=1).tobytes())
    keep("gray12.tif", gray)
    inverted = ImageOps.invert(gray)
    tiff("white-is-zero.tif", {258: (3, [8]), 259: (3, [1]), 262: (3, [0])}, inverted.tobytes())
    keep("white-is-zero.tif", gray)
    # Chroma of half the width and height, not compressed: four Y, one Cb, one Cr.
    y, cb, cr = (np.asarray(c) for c in photo.convert("YCbCr").split())
    cb, cr = cb[::2, ::2], cr[::2, ::2]
    luma = y.reshape(H // 2, 2, W // 2, 2).transpose(0, 2, 1, 3).reshape(H // 2, W // 2, 4)
    data = np.dstack([luma, cb, cr]).tobytes()
    ycbcr = {258: (3, [8, 8, 8]), 259: (3, [1]), 262: (3, [6]), 277: (3, [3]), 530: (3, [2, 2])}
    tiff("ycbcr-half.tif", ycbcr, data)
    full = [Image.fromarray(np.ascontiguousarray(c)) for c in (y, cb.repeat(2, 0).repeat(2, 1), cr.repeat(2, 0).repeat(2, 1))]
    keep("ycbcr-half.tif", Image.merge("YCbCr", full).convert("RGB"))
    palette = photo.quantize(16)
    indices = np.asarray(palette)
    colors = np.array(palette.getpalette()[:48], dtype=np.uint16).reshape(16, 3)
    map_ = np.zeros((256, 3), np.uint16)
    map_[:16] = colors * 257
    ramp = np.asarray(rgba)[..., 3]
    tiff("palette-alpha.tif", {258: (3, [8, 8]), 259: (3, [1]), 262: (3, [3]), 277: (3, [2]), 320: (3, list(map_.T.ravel())),
                               338: (3, [2])}, np.dstack([indices, ramp]).tobytes())
    keep("palette-alpha.tif", np.dstack([colors[indices].astype(np.uint8), ramp]))
    lab = ImageCms.profileToProfile(photo, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    lab.save(OUT / "lab.tif")
    keep("lab.tif", photo)

    # Refused.
    tifffile.imwrite(OUT / "refused-signed.tif", rgb[..., 0].astype(np.int16), photometric="minisblack")
    tiff("refused-zstd.tif", {258: (3, [8]), 259: (3, [50000]), 262: (3, [1])}, gray.tobytes())
    tiff("refused-cfa.tif", {258: (3, [8]), 259: (3, [1]), 262: (3, [32803])}, gray.tobytes())
    tiff("refused-short.tif", {258: (3, [8]), 259: (3, [1]), 262: (3, [1])}, gray.tobytes()[: W * H // 2])
    tiff("refused-lzw.tif", {258: (3, [8]), 259: (3, [5]), 262: (3, [1])}, b"\x80\0\xff\xff\xff\xff\xff\xff")
    tiff("refused-white.tif", {258: (3, [32]), 259: (3, [1]), 262: (3, [1]), 339: (3, [3])},
         (np.asarray(gray).astype("<f4") + 2).tobytes())


def segments(jpeg):
    """The segments before the scan, each with its marker, and the rest."""
    at, found = 2, []
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + struct.unpack(">H", jpeg[at + 2:at + 4])[0]
        found.append(jpeg[at:end])
        at = end
    return found, jpeg[at:]


def jpegs(photo):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    out = io.BytesIO()
    photo.save(out, "JPEG", quality=90, subsampling=0, icc_profile=profile)
    found, scans = segments(out.getvalue())
    kinds = {kind: [s for s in found if s[1] == kind] for kind in {s[1] for s in found}}
    rest = [s for s in found if s[1] not in (0xE2, 0xDB, 0xC0)]
    # The profile and the quantization tables after the frame header.
    (OUT / "late-profile-and-tables.jpg").write_bytes(
        b"\xff\xd8" + b"".join([rest[0], *kinds[0xC0], *kinds[0xDB], *kinds[0xE2], *rest[1:]]) + scans)
    keep("late-profile-and-tables.jpg", Image.open(io.BytesIO(out.getvalue())))
    frame = kinds[0xC0][0]
    plain = [s for s in found if s[1] not in (0xE2, 0xC0)]
    for name, changed in [
        ("refused-arithmetic.jpg", b"\xff\xc9" + frame[2:]),
        ("refused-lossless.jpg", b"\xff\xc3" + frame[2:]),
        ("refused-12-bit.jpg", frame[:4] + b"\x0c" + frame[5:]),
    ]:
        (OUT / name).write_bytes(b"\xff\xd8" + b"".join([*plain, changed]) + scans)
    # Another program's caption, comment and resolution.
    records = b"\x1c\x02\x78\0\x07caption"
    resource = b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0" + struct.pack(">I", len(records)) + records
    app13 = b"\xff\xed" + struct.pack(">H", len(resource) + 2) + resource
    out = io.BytesIO()
    photo.save(out, "JPEG", quality=90, dpi=(300, 300), comment="a person's words")
    found, scans = segments(out.getvalue())
    (OUT / "iptc-comment-300-dpi.jpg").write_bytes(b"\xff\xd8" + b"".join([found[0], app13, *found[1:]]) + scans)


def orientations(photo):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    turned = photo.transpose(Image.Transpose.ROTATE_270)
    photo.save(OUT / "xmp-orientation.webp", lossless=True, xmp=xmp)
    keep("xmp-orientation.webp", turned)
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    photo.save(out, "WEBP", lossless=True, exif=exif.tobytes())
    file = out.getvalue()
    at = file.index(b"EXIF")
    block = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    body = file[8:at] + b"EXIF" + struct.pack("<I", len(block)) + block + b"\0" * (len(block) % 2)
    (OUT / "exif-prefix.webp").write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    keep("exif-prefix.webp", turned)


def animations(photo):
    png = (FILES / "animated.png").read_bytes()
    at = png.index(b"fdAT") + 20
    (OUT / "later-frame-damaged.png").write_bytes(png[:at] + bytes([png[at] ^ 255]) + png[at + 1:])
    keep("later-frame-damaged.png", photo_of("animated.png"))
    gif = (FILES / "animated.gif").read_bytes()
    (OUT / "cut-in-the-second-frame.gif").write_bytes(gif[: len(gif) // 2])
    keep("cut-in-the-second-frame.gif", photo_of("animated.gif"))


def photo_of(name):
    return Image.open(FILES / name).convert("RGB")


def bmps(photo):
    palette = photo.quantize(16)
    out = io.BytesIO()
    palette.save(out, "BMP")
    file = out.getvalue()
    offset = struct.unpack("<I", file[10:14])[0]
    info = struct.pack("<I", 64) + file[18:54] + b"\0" * 24
    (OUT / "os2-v2.bmp").write_bytes(file[:10] + struct.pack("<I", offset + 24) + info + file[54:])
    keep("os2-v2.bmp", palette.convert("RGB"))
    (OUT / "refused-early-pixels.bmp").write_bytes(file[:10] + struct.pack("<I", 54) + file[14:])


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for old in OUT.iterdir():
        old.unlink()
    photo = photo_of("rgb.png").crop((10, 4, 10 + W, 4 + H))
    photo.info.pop("icc_profile", None)
    gray = photo.convert("L")
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, W).astype(np.uint8), (H, 1)))
    rgba = photo.copy()
    rgba.putalpha(ramp)
    tiffs(photo, gray, rgba)
    jpegs(photo)
    orientations(photo)
    animations(photo)
    bmps(photo)
    save_file(expected, OUT / "expected.safetensors")
    print(f"{len(list(OUT.iterdir()))} files, {sum(f.stat().st_size for f in OUT.iterdir()) / 1000:.0f} kB")
