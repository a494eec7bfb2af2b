"""Train the UNet of the built-in model on the CPU; interrupt it at will, the same command goes on where it was.

    pip install torch diffusers transformers pillow
    python pictures.py data && python train_tiny.py data run --steps 11000

The network is trained along its own trajectories. Each crop starts from noise at sigma_max and is sampled as the pipeline
would, with 1 to 20 steps of either schedule; at every step the denoised picture is compared with the true one, the weights
move, and the sampler goes on. The noisy picture so never holds more than the small picture and the network's own guess
tell, and the best answer at each sigma is the mean picture given the small one: the network learns to remove the noise and
its own mistakes, and invents no grain. Any number of steps ends near that mean. It is tempered to the end, by design.
"""
import argparse, math, time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.downsampling import KDownsample2D
from diffusers.models.upsampling import KUpsample2D

from parts import SIGMA_MAX, SIGMA_MIN, decode, denoise, encode, start_unet, timestep_cond
from pictures import Crops


def downsample(_, x):
    """KDownsample2D's [1, 3, 3, 1] / 8 by slices: the same numbers, several times faster on a CPU."""
    x = F.pad(x, (1,) * 4, "reflect")
    x = (x[..., :-2:2, :] + x[..., 3::2, :]) * .125 + (x[..., 1:-2:2, :] + x[..., 2:-1:2, :]) * .375
    return (x[..., :-2:2] + x[..., 3::2]) * .125 + (x[..., 1:-2:2] + x[..., 2:-1:2]) * .375


def upsample(_, x):
    x = F.pad(x, (1,) * 4, "reflect")
    mid = x[..., 1:-1, :] * .75
    x = torch.stack((x[..., :-2, :] * .25 + mid, x[..., 2:, :] * .25 + mid), -2).flatten(-3, -2)
    mid = x[..., 1:-1] * .75
    return torch.stack((x[..., :-2] * .25 + mid, x[..., 2:] * .25 + mid), -1).flatten(-2, -1)


def charbonnier(d, eps=.004):
    return (d * d + eps * eps).sqrt().mean((1, 2, 3))


def schedule(steps, karras):
    """The pipeline's sigmas: `steps` of them and then 0 (karras), or one more that ends at sigma_min (log-linear)."""
    if karras:
        ramp = np.linspace(0, 1, steps)
        return [*(SIGMA_MAX ** (1 / 7) + ramp * (SIGMA_MIN ** (1 / 7) - SIGMA_MAX ** (1 / 7))) ** 7, 0.]
    return list(np.exp(np.linspace(math.log(SIGMA_MAX), math.log(SIGMA_MIN), steps + 1)))


class Trajectories:
    """`n` crops of side `s`, each somewhere on its way from noise to a picture."""
    LENGTHS, ODDS = (1, 2, 3, 5, 8, 12, 20), (.10, .14, .10, .28, .08, .06, .24)

    def __init__(self, data, n, s):
        self.data, self.side = data, s
        self.hr, self.lr, self.cond, self.x = (torch.empty(n, *shape) for shape in ((3, s, s), (3, s // 2, s // 2), (4, s, s), (4, s, s)))
        self.sigmas = [None] * n
        for k in range(n):
            self.begin(k)

    def begin(self, k):
        """A new crop; the small picture is box-downscaled and rounded to whole levels."""
        hr = torch.from_numpy(self.data.crop(self.side))[None]
        lr = F.avg_pool2d(hr, 2).round() / 127.5 - 1
        self.hr[k], self.lr[k], self.cond[k] = hr[0] / 127.5 - 1, lr[0], F.interpolate(encode(lr), scale_factor=2.)[0]
        self.x[k] = SIGMA_MAX * torch.randn_like(self.cond[k])
        self.sigmas[k] = schedule(self.data.rng.choice(self.LENGTHS, p=self.ODDS), self.data.rng.random() < .85)

    def sigma(self):
        return torch.tensor([s[0] for s in self.sigmas], dtype=torch.float32).reshape(-1, 1, 1, 1)

    def advance(self, denoised):
        """One Euler step each; those that arrived begin anew."""
        now, then = self.sigma(), torch.tensor([s[1] for s in self.sigmas], dtype=torch.float32).reshape(-1, 1, 1, 1)
        self.x = self.x + (self.x - denoised) / now * (then - now)
        for k, s in enumerate(self.sigmas):
            self.sigmas[k] = s[1:]
            if s[1] == 0 or len(s) == 2:
                self.begin(k)


@torch.no_grad()
def watch(unet, folder, ones):
    """PSNR of 1, 5 and 20 karras steps on pictures never trained on, and of the last box-downscaled against its input."""
    out = []
    for name, a in np.load(Path(folder) / "watch.npz").items():
        hr = torch.from_numpy(a[:224, :192].astype(np.float32)).permute(2, 0, 1)[None]
        lr = F.avg_pool2d(hr, 2).round() / 127.5 - 1
        cond, hr = F.interpolate(encode(lr), scale_factor=2.), hr / 127.5 - 1
        g = torch.Generator().manual_seed(0)
        noise = torch.randn(cond.shape, generator=g)
        psnr = lambda p, q: 10 * math.log10(4 / float((p.clamp(-1, 1) - q).square().mean()))
        row = [psnr(F.interpolate(lr, scale_factor=2., mode="bicubic"), hr)]
        for steps in (1, 5, 20):
            x, sigmas = noise * SIGMA_MAX, schedule(steps, karras=True)
            for now, then in zip(sigmas, sigmas[1:]):
                x = x + (x - denoise(unet, x, torch.full((1, 1, 1, 1), now), cond, ones)) * (then - now) / now
            row.append(psnr(decode(x), hr))
        row.append(psnr(F.avg_pool2d(decode(x).clamp(-1, 1), 2), lr))
        out.append(f"{name}: bicubic {row[0]:.2f}, 1 step {row[1]:.2f}, 5 steps {row[2]:.2f}, 20 steps {row[3]:.2f}, back to input {row[4]:.2f}")
    return "; ".join(out)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data"), p.add_argument("run")
    p.add_argument("--steps", type=int, default=11000, help="of the whole run; a resumed run may name another number")
    p.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    KDownsample2D.forward, KUpsample2D.forward = downsample, upsample
    run = Path(a.run)
    run.mkdir(parents=True, exist_ok=True)
    unet, ones = start_unet(), timestep_cond()
    cond_proj, fixed = unet.time_embedding.cond_proj.weight, [q for n, q in unet.named_parameters() if "norm_cross" in n or "time_proj" in n]
    for q in fixed:
        q.requires_grad_(False)
    params = [q for q in unet.parameters() if q.requires_grad]
    optimiser = torch.optim.Adam(params, lr=a.peak, betas=(.9, .99))
    data, step, seconds, average = Crops(a.data, 0), 0, 0., [q.detach().clone() for q in params]
    last = run / "last.pt"
    if last.exists():
        k = torch.load(last, weights_only=False)
        unet.load_state_dict(k["unet"]), optimiser.load_state_dict(k["optimiser"])
        data.rng.bit_generator.state, step, seconds, average = k["crops"], k["step"], k["seconds"], k["average"]
        torch.set_rng_state(k["torch"])

    def save():
        torch.save(dict(unet=unet.state_dict(), optimiser=optimiser.state_dict(), crops=data.rng.bit_generator.state, step=step,
                        seconds=seconds, average=average, torch=torch.get_rng_state()), run / "next.pt")
        (run / "next.pt").replace(last)

    def averaged(then):
        kept = [q.detach().clone() for q in params]
        with torch.no_grad():
            for q, v in zip(params, average):
                q.copy_(v)
            out = then()
            for q, v in zip(params, kept):
                q.copy_(v)
        return out

    shown, saved, mean, ways = time.time(), time.time(), {}, None
    tick, log = time.time(), open(run / "log.txt", "a", buffering=1)
    while step < a.steps:
        progress = step / a.steps
        for group in optimiser.param_groups:
            group["lr"] = a.peak * min(1, (step + 1) / 150) * (.5 + .5 * math.cos(math.pi * progress) + .003)
        n, s = (14, 48) if progress < .5 else (8, 64) if progress < .85 else (4, 96)
        if ways is None or ways.side != s:
            ways = Trajectories(data, n, s)
        sigma = ways.sigma()
        z = denoise(unet, ways.x, sigma, ways.cond, ones)
        rgb = decode(z)
        apart = z - encode(rgb)                                        # what the decoder ignores: keep it small
        e = charbonnier(rgb - ways.hr)
        loss = e.mean() + .5 * charbonnier(F.avg_pool2d(rgb, 2) - ways.lr).mean() + .02 * apart.square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        cond_proj.grad[:, 128:] = 0                                    # the pooled prompt stays unread
        torch.nn.utils.clip_grad_norm_(params, .5)
        optimiser.step()
        ways.advance(z.detach())
        step += 1
        keep = min(.999, (step + 1) / (step + 30))
        torch._foreach_lerp_(average, [q.detach() for q in params], 1 - keep)
        for tag, among in (("above 3", sigma > 3), ("0.3 to 3", (sigma > .3) & (sigma <= 3)), ("below 0.3", sigma <= .3)):
            if among.any():
                v = e.detach()[among.flatten()].mean().item()
                mean[tag] = .99 * mean.get(tag, v) + .01 * v
        now = time.time()
        seconds, tick = seconds + min(now - tick, 20), now              # a paused process does not count
        if now - shown > 30:
            shown = now
            print(f"{step} of {a.steps}, {seconds:.0f} s,", ", ".join(f"{k} {v * 127.5:.3f}" for k, v in mean.items()), file=log)
        if now - saved > 240 or step == a.steps:
            save()
            print("   ", averaged(lambda: watch(unet, a.data, ones)), file=log)
            saved = tick = time.time()
    averaged(lambda: torch.save(unet.state_dict(), run / "unet.pt"))


if __name__ == "__main__":
    main()
