"""Train the UNet of the built-in model on the CPU; interrupt it at will, the same command goes on where it was.

    pip install torch diffusers transformers pillow
    python pictures.py data && python train_tiny.py data run --steps 9000

Each crop gives two lessons, both with the true picture as their target:
1. From pure noise at sigma_max: the network learns the mean picture given the small one (what one step gives).
2. From that picture of its own (a step later) plus noise at a lower sigma: it learns to remove the noise, keep the picture,
   and improve it. The target's own detail never leaks through the noise, so sampling does not invent grain: any number
   of steps ends near the mean picture, tempered to the end. That is what a small model does best, and it is no more.
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


def lesson(data, n, s):
    """Scaled (rgb target, low-res picture, condition latents): the low-res picture is box-downscaled and rounded to levels."""
    hr = torch.from_numpy(data.batch(n, s))
    lr = F.avg_pool2d(hr, 2).round() / 127.5 - 1
    return hr / 127.5 - 1, lr, F.interpolate(encode(lr), scale_factor=2.)


def low_sigmas(n):
    """A third at sigma_min, where every karras schedule takes its last step; the rest log-uniform below sigma_max."""
    s = torch.exp(torch.empty(n, 1, 1, 1).uniform_(math.log(SIGMA_MIN), math.log(SIGMA_MAX)))
    return torch.where(torch.rand(n, 1, 1, 1) < .33, torch.full_like(s, SIGMA_MIN), s)


@torch.no_grad()
def watch(unet, folder, ones):
    """PSNR of one and five karras steps, and of the five steps' box-downscaled picture against the input."""
    out = []
    for name, a in np.load(Path(folder) / "watch.npz").items():
        h, w = (v // 32 * 32 for v in a.shape[:2])
        hr = torch.from_numpy(a[:h, :w].astype(np.float32)).permute(2, 0, 1)[None]
        lr = F.avg_pool2d(hr, 2).round() / 127.5 - 1
        cond, hr = F.interpolate(encode(lr), scale_factor=2.), hr / 127.5 - 1
        g = torch.Generator().manual_seed(0)
        noise = torch.randn(cond.shape, generator=g)
        psnr = lambda p, q: 10 * math.log10(4 / float((p.clamp(-1, 1) - q).square().mean()))
        row = [psnr(F.interpolate(lr, scale_factor=2., mode="bicubic"), hr)]
        for steps in (1, 5):
            ramp = torch.linspace(0, 1, steps)
            sigmas = [*((SIGMA_MAX ** (1 / 7) + ramp * (SIGMA_MIN ** (1 / 7) - SIGMA_MAX ** (1 / 7))) ** 7).tolist(), 0.]
            x = noise * SIGMA_MAX
            for a_, b_ in zip(sigmas, sigmas[1:]):
                x = x + (x - denoise(unet, x, torch.full((1, 1, 1, 1), a_), cond, ones)) * (b_ - a_) / a_
            row.append(psnr(decode(x), hr))
        row.append(psnr(F.avg_pool2d(decode(x).clamp(-1, 1), 2), lr))
        out.append(f"{name}: bicubic {row[0]:.2f}, 1 step {row[1]:.2f}, 5 steps {row[2]:.2f}, back to input {row[3]:.2f}")
    return "; ".join(out)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data"), p.add_argument("run")
    p.add_argument("--steps", type=int, default=9000, help="of the whole run; a resumed run may name another number")
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

    shown, saved, mean, old = time.time(), time.time(), {}, None
    tick, log = time.time(), open(run / "log.txt", "a", buffering=1)
    while step < a.steps:
        progress = step / a.steps
        for group in optimiser.param_groups:
            group["lr"] = a.peak * min(1, (step + 1) / 150) * (.5 + .5 * math.cos(math.pi * progress) + .003)
        n, s = (8, 48) if progress < .55 else (6, 64) if progress < .9 else (3, 96)
        hr, lr, cond = lesson(data, n, s)
        sigma, x = torch.full((n, 1, 1, 1), SIGMA_MAX), SIGMA_MAX * torch.randn_like(cond)
        both = old is not None and old[0].shape[-1] == s and progress > .15
        if both:                                                       # the crops of the step before, with what was made of them
            sigma2 = low_sigmas(len(old[0]))
            x, sigma = torch.cat([x, old[3] + sigma2 * torch.randn_like(old[3])]), torch.cat([sigma, sigma2])
            hr, lr, cond = (torch.cat([u, v]) for u, v in zip((hr, lr, cond), old))
        z = denoise(unet, x, sigma, cond, ones)
        rgb = decode(z)
        apart = z - encode(rgb)                                        # what the decoder ignores: keep it small
        e = charbonnier(rgb - hr)
        loss = e.mean() + .5 * charbonnier(F.avg_pool2d(rgb, 2) - lr).mean() + .02 * apart.square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        cond_proj.grad[:, 128:] = 0                                    # the pooled prompt stays unread
        torch.nn.utils.clip_grad_norm_(params, .5)
        optimiser.step()
        old = (hr[:n], lr[:n], cond[:n], z[:n].detach())
        step += 1
        keep = min(.999, (step + 1) / (step + 30))
        torch._foreach_lerp_(average, [q.detach() for q in params], 1 - keep)
        for tag, v in (("one", e[:n].mean()), ("low", e[n:].mean() if both else None)):
            if v is not None:
                mean[tag] = .98 * mean.get(tag, v.item()) + .02 * v.item()
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
