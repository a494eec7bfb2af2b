"""Shows that the end-to-end cases tell a right implementation from a wrong one, and forgive rounding.

Each fault in faults.py is one mistake that a port can make. It is made in diffusers itself, a case is run again, and the final
latents (for a fault in the decoder: the image) must move far past what the parity tests allow. A random relative change
of 1e-5 of every weight, much more than the rounding of float32, must not. Two mistakes are too small to be seen in the
final latents of any well conditioned model; for them the numbers of one stage must move past what that stage allows.
"""

from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
import torch
from diffusers import StableDiffusionLatentUpscalePipeline
from safetensors.torch import load_file

import make_reference as ref
from cases import END_TO_END
from faults import CASES, FAULTS, PLAIN

LATENT_TOLERANCE = 1e-3  # relative error that the parity tests allow the final latents
MEAN_TOLERANCE = 0.05  # mean difference in 8-bit levels that they allow the image
STAGE_TOLERANCE = 1e-5  # relative error that one stage should keep to; 1e-6 is usual
MARGIN = 4  # a fault must exceed the tolerance by this factor


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def run(pipe, name):
    """Final latents of a case under what `override` asked for."""
    changed = getattr(pipe, "overridden", {})
    if not changed:
        return ref.run_case(pipe, CASES[name])
    original = StableDiffusionLatentUpscalePipeline.__call__

    def call(self, **kwargs):
        return original(self, **(kwargs | changed))

    with patch.object(StableDiffusionLatentUpscalePipeline, "__call__", call):
        return ref.run_case(pipe, CASES[name])


def unet_output(pipe):
    """The UNet's first reference call, again."""
    b1 = {k[3:]: v for k, v in load_file(ref.REFERENCE / "unet.safetensors").items() if k.startswith("b1.")}
    context = {"encoder_hidden_states": b1["context"], "timestep_cond": b1["timestep_cond"]}
    return pipe.unet(b1["sample"], b1["timestep"][0], **context).sample


def levels(pipe, latents):
    return np.asarray(ref.decode(pipe, latents), dtype=np.float64)


@torch.no_grad()
def check():
    """Prints both tables; returns how many rows fail."""
    expected = load_file(ref.REFERENCE / "end_to_end.safetensors")
    stage = {name: load_file(ref.REFERENCE / f"{name}.safetensors") for name in ("unet", "schedule")}
    image = levels(ref.load_pipe(), expected[PLAIN])
    failures = 0

    print("\nFaults, where they are seen, how far they move it, and how far they must\n")
    for name, case, spoil in FAULTS:
        pipe = ref.load_pipe()
        with ExitStack() as stack:
            spoil(pipe, stack)
            if case == "image":
                moved, tolerance = np.abs(levels(pipe, expected[PLAIN]) - image).mean(), MEAN_TOLERANCE
            elif case == "unet":
                moved, tolerance = relative(unet_output(pipe), stage["unet"]["b1.output"]), STAGE_TOLERANCE
            elif case == "schedule":
                pipe.scheduler.set_timesteps(4)
                sigma = pipe.scheduler.init_noise_sigma
                moved, tolerance = relative(sigma, stage["schedule"]["log-linear.4.init_noise_sigma"]), STAGE_TOLERANCE
            else:
                moved, tolerance = relative(run(pipe, case), expected[case]), LATENT_TOLERANCE
        caught = moved > MARGIN * tolerance
        failures += not caught
        print(f"{'ok  ' if caught else 'FAIL'} {name:48} {case:22} {moved:.1e} > {MARGIN * tolerance:.0e}")

    print(f"\nWeights changed by 1e-5: latents must move less than {LATENT_TOLERANCE}\n")
    pipe = ref.load_pipe()
    draw = ref.generator(1)
    for module in (pipe.text_encoder, pipe.unet, pipe.vae):
        for p in module.parameters():
            p.mul_(1 + 1e-5 * torch.randn(p.shape, generator=draw))
    for case in (c for c in END_TO_END if c["weights"] == "f32"):
        latents = ref.run_case(pipe, case)
        moved = relative(latents, expected[case["name"]])
        moved_image = np.abs(levels(pipe, latents) - levels(ref.load_pipe(), expected[case["name"]]))
        steady = moved < LATENT_TOLERANCE and moved_image.max() <= 2 and moved_image.mean() < MEAN_TOLERANCE
        failures += not steady
        print(f"{'ok  ' if steady else 'FAIL'} {case['name']:34} {moved:.2e}  image {moved_image.max():.0f} max {moved_image.mean():.4f} mean levels")
    print(f"\n{failures} failures")
    return failures
