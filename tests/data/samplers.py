"""k-diffusion's samplers on the small model and on a denoiser in closed form: the numbers that ours are held to, and what tells them
from wrong ones. `make_reference.py --samplers` writes samplers.safetensors and samplers.json; `--check` judges them.

k-diffusion 0.1.1 from PyPI, of which `sampling.py` is loaded alone: the package as a whole imports what trains and judges models.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

import make_reference as ref
import random_model
from cases import BLURRY, LATENTS, SQUARE

PROMPT, SEED = "a photo of a cat", 33

# Ours: (k-diffusion's, what it takes)
SAMPLERS = {
    "euler": ("sample_euler", ("sigmas",)),
    "euler-ancestral": ("sample_euler_ancestral", ("sigmas", "eta")),
    "heun": ("sample_heun", ("sigmas",)),
    "dpm2": ("sample_dpm_2", ("sigmas",)),
    "dpm2-ancestral": ("sample_dpm_2_ancestral", ("sigmas", "eta")),
    "dpm-fast": ("sample_dpm_fast", ("ends", "steps", "eta")),
    "dpm-adaptive": ("sample_dpm_adaptive", ("ends", "tolerance", "eta")),
    "dpmpp-2s-ancestral": ("sample_dpmpp_2s_ancestral", ("sigmas", "eta")),
    "dpmpp-2m": ("sample_dpmpp_2m", ("sigmas",)),
}
SCHEDULES = ("karras", "log-linear")


def source():
    """Of k-diffusion's sampling.py."""
    package = importlib.util.find_spec("k_diffusion")
    return Path(package.submodule_search_locations[0], "sampling.py").read_text()


def load(text):
    """sampling.py as a module, with stand-ins for what its samplers do not use."""
    stand_ins = {"torchsde": {}, "torchdiffeq": {"odeint": None}, "scipy": {"integrate": None}, "k_diffusion": {}}
    stand_ins["k_diffusion.utils"] = {"append_dims": lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]}
    before = {name: sys.modules.get(name) for name in stand_ins}
    for name, names in stand_ins.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(names)
    sys.modules["k_diffusion"].utils = sys.modules["k_diffusion.utils"]
    try:
        module = types.ModuleType("k_diffusion.sampling")
        module.__package__ = "k_diffusion"
        exec(compile(text, "k_diffusion/sampling.py", "exec"), module.__dict__)
    finally:
        for name, module_before in before.items():
            del sys.modules[name]
            if module_before is not None:
                sys.modules[name] = module_before
    return module


# ---- a run ----------------------------------------------------------------------------------------------------------


def sigmas_of(case):
    """The schedule's, or where the sampler takes none the ends of the range: those of one step."""
    schedule, steps = (case["schedule"], case["steps"]) if case["schedule"] else ("log-linear", 1)
    scheduler = random_model.scheduler(schedule)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas[: steps + 1]


@torch.no_grad()
def sample(sampling, case, denoise, start, generator):
    """(result, evaluations, draws) of a case: `denoise(x, sigma)` from the noise `start` of spread 1."""
    name, takes = SAMPLERS[case["sampler"]]
    sigmas = sigmas_of(case)
    counted = dict(evaluations=0, draws=0)

    def model(x, sigma):
        counted["evaluations"] += 1
        return denoise(x, sigma[0])

    def noise(*_):
        counted["draws"] += 1
        return torch.randn(start.shape, generator=generator)

    options = dict(disable=True)
    if "eta" in takes:
        options |= dict(eta=case["eta"], noise_sampler=noise)
    arguments = []
    if "sigmas" in takes:
        arguments = [sigmas]
    if "ends" in takes:
        arguments = [sigmas[1].item(), sigmas[0].item()]
    if "steps" in takes:
        arguments.append(case["steps"])
    if "tolerance" in takes:
        scale = case["tolerance"]
        options |= dict(rtol=0.05 * scale, atol=scale / 127.5, pcoeff=0.2, icoeff=0.4, dcoeff=0)
    result = getattr(sampling, name)(model, start * sigmas[0], *arguments, **options)
    return result, counted["evaluations"], counted["draws"]


# ---- a denoiser in closed form --------------------------------------------------------------------------------------

# Each value is one of three numbers, more or less: weights, means, and the spread about each. Numbers of the size of the first noise, so that no
# step is so nearly linear that the error an adaptive sampler sees is the rounding of float32.
MIXTURE = ((0.3, 0.45, 0.25), (-6.0, 1.2, 6.6), 1.5)
SHAPE = (1, 4, 3, 5)


def mixture(x, sigma):
    """What a value of the mixture is in the mean that noise of this spread made x of, in double precision."""
    x, noise = x.double()[..., None], sigma.double() ** 2
    weights, means = (torch.tensor(values, dtype=torch.float64) for values in MIXTURE[:2])
    own = MIXTURE[2] ** 2
    shares = (weights.log() - (x - means) ** 2 / (2 * (own + noise))).softmax(-1)
    return (shares * (means * noise + x * own) / (own + noise)).sum(-1).float()


def closed_cases():
    for sampler, (_, takes) in SAMPLERS.items():
        for eta in (0.0, 0.5, 1.0) if "eta" in takes else (None,):
            for schedule in SCHEDULES if "sigmas" in takes else (None,):
                for steps in (1, 2, 3, 4, 5, 6, 7, 10, 20, 50) if "tolerance" not in takes else (None,):
                    for tolerance in (0.05, 0.25, 1.0, 5.0) if "tolerance" in takes else (None,):
                        yield dict(sampler=sampler, schedule=schedule, steps=steps, eta=eta, tolerance=tolerance)


def run_closed(sampling, case):
    generator = ref.generator(SEED)
    start = torch.randn(SHAPE, generator=generator)
    return sample(sampling, case, mixture, start, generator)


# ---- the small model ------------------------------------------------------------------------------------------------


def model_cases():
    for sampler, (_, takes) in SAMPLERS.items():
        if sampler == "euler":
            continue  # end_to_end.safetensors has it, by diffusers
        for eta in (0.5, 1.0) if "eta" in takes else (None,):
            for schedule in SCHEDULES if "sigmas" in takes else (None,):
                for guidance in (1.0, 3.0):
                    for input in (SQUARE, LATENTS):
                        yield dict(
                            sampler=sampler, schedule=schedule, steps=None if "tolerance" in takes else 5, eta=eta,
                            tolerance=TOLERANCE if "tolerance" in takes else None, guidance=guidance, input=input,
                        )  # fmt: skip
    for steps in (3, 6, 7):
        yield dict(sampler="dpm-fast", schedule=None, steps=steps, eta=1.0, tolerance=None, guidance=1.0, input=SQUARE)
    yield dict(sampler="dpm-fast", schedule=None, steps=5, eta=0.0, tolerance=None, guidance=1.0, input=SQUARE)
    yield dict(sampler="dpm-adaptive", schedule=None, steps=None, eta=0.0, tolerance=TOLERANCE, guidance=1.0, input=SQUARE)


TOLERANCE = 1.0


@torch.no_grad()
def run_model(sampling, pipe, case):
    """As the pipeline of diffusers does it, with its scheduler's step replaced by the sampler."""
    generator = ref.generator(SEED)
    low = ref.case_input(case)
    if isinstance(low, Image.Image):
        moments = pipe.vae.encode(ref.pixels(ref.INPUTS / case["input"])).latent_dist
        low = moments.sample(generator) * pipe.vae.config.scaling_factor
    condition = torch.nn.functional.interpolate(low, scale_factor=2, mode="nearest")
    start = torch.randn(condition.shape, generator=generator)
    guided = case["guidance"] > 1
    prompts = ([BLURRY] if guided else []) + [PROMPT]
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    text = pipe.text_encoder(ids, output_hidden_states=True)
    level = torch.cat([torch.ones(1, 64), torch.zeros(1, 64)], dim=1).expand(len(prompts), -1)
    timestep_cond = torch.cat([level, text.pooler_output], dim=1)

    def denoise(x, sigma):
        inputs = torch.cat([x / (sigma**2 + 1) ** 0.5, condition], dim=1).expand(len(prompts), -1, -1, -1)
        out = pipe.unet(inputs, sigma.log() * 0.25, encoder_hidden_states=text.hidden_states[-1], timestep_cond=timestep_cond).sample
        each = x / (sigma**2 + 1) + out[:, :-1] * (sigma / (sigma**2 + 1) ** 0.5)
        if guided:
            each = each[:1] + case["guidance"] * (each[1:] - each[:1])
        return each

    return sample(sampling, case, denoise, start, generator)


# ---- writing and judging --------------------------------------------------------------------------------------------


def name_of(case):
    return ".".join(str(value) for value in case.values() if value is not None)


def reference(pipe):
    sampling, out, kept = load(source()), {}, {}
    for kind, cases, run in (
        ("closed", closed_cases(), lambda case: run_closed(sampling, case)),
        ("model", model_cases(), lambda case: run_model(sampling, pipe, case)),
    ):
        kept[kind] = []
        for case in cases:
            name = f"{kind}.{name_of(case)}"
            out[name], evaluations, draws = run(case)
            assert out[name].isfinite().all(), name
            kept[kind].append(dict(name=name) | case | dict(evaluations=evaluations, draws=draws))
            if kind == "model":
                print(f"{name:60} {evaluations:4} evaluations, {draws:3} draws, std {out[name].std():.3f}")
    ref.save("samplers", out)
    lines = {kind: ",\n".join("  " + json.dumps(case) for case in cases) for kind, cases in kept.items()}
    text = "{\n" + ",\n".join(f' "{kind}": [\n{rows}\n ]' for kind, rows in lines.items()) + "\n}\n"
    (ref.REFERENCE / "samplers.json").write_text(text)


# What the parity tests allow the final latents.
MODEL_TOLERANCE, ADAPTIVE_TOLERANCE, CLOSED_TOLERANCE = 2e-4, 1e-3, 2e-5
MARGIN = 4

# (of which function, what it says, what it says wrongly, a case that shows it)
FAULTS = [
    ("get_ancestral_step", "eta * (sigma_to", "1 * (sigma_to", "euler-ancestral.karras.5.0.5"),
    ("get_ancestral_step", "(sigma_to ** 2 - sigma_up ** 2) ** 0.5", "sigma_to - sigma_up", "euler-ancestral.karras.5.0.5"),
    ("sample_euler_ancestral", "dt = sigma_down - sigmas[i]", "dt = sigmas[i + 1] - sigmas[i]", "euler-ancestral.karras.5.0.5"),
    ("sample_euler_ancestral", "* s_noise * sigma_up", "* s_noise * sigmas[i + 1]", "euler-ancestral.log-linear.5.0.5"),
    ("sample_heun", "(d + d_2) / 2", "d_2", "heun.karras.5"),
    ("sample_heun", "if sigmas[i + 1] == 0:", "if i == len(sigmas) - 2:", "heun.log-linear.5"),
    ("sample_dpm_2", "lerp(sigmas[i + 1].log(), 0.5)", "lerp(sigmas[i + 1].log(), 0.4)", "dpm2.karras.5"),
    ("sample_dpm_2", "if sigmas[i + 1] == 0:", "if i == len(sigmas) - 2:", "dpm2.log-linear.5"),
    ("sample_dpm_2_ancestral", "lerp(sigma_down.log(), 0.5)", "lerp(sigmas[i + 1].log(), 0.5)", "dpm2-ancestral.log-linear.5.1.0"),
    ("sample_dpm_2_ancestral", "dt_2 = sigma_down -", "dt_2 = sigmas[i + 1] -", "dpm2-ancestral.karras.5.0.5"),
    ("sample_dpmpp_2s_ancestral", "r = 1 / 2", "r = 1 / 3", "dpmpp-2s-ancestral.karras.5.0.5"),
    ("sample_dpmpp_2s_ancestral", "t_fn(sigma_down)", "t_fn(sigmas[i + 1])", "dpmpp-2s-ancestral.log-linear.5.0.5"),
    ("sample_dpmpp_2m", "r = h_last / h", "r = h / h_last", "dpmpp-2m.karras.5"),
    ("sample_dpmpp_2m", "old_denoised is None or", "", "dpmpp-2m.karras.5"),
    ("sample_dpmpp_2m", "sigmas[i + 1] == 0", "i == len(sigmas) - 2", "dpmpp-2m.log-linear.5"),
    ("dpm_solver_fast", "[2, 1]", "[1, 2]", "dpm-fast.6.1.0"),
    ("dpm_solver_fast", "su = (self.sigma(t_next) ** 2 - self.sigma(t_next_) ** 2) ** 0.5", "pass", "dpm-fast.5.1.0"),
    ("dpm_solver_fast", "torch.minimum(t_end, self.t(sd))", "self.t(sd)", "dpm-fast.5.1.0"),
    ("dpm_solver_2_step", "r1=1 / 2", "r1=1 / 3", "dpm-fast.5.0.5"),
    ("dpm_solver_3_step", "(r2 / r1)", "(r2 * r1)", "dpm-fast.5.0.5"),
    ("dpm_solver_3_step", "/ r2 * (h.expm1() / h - 1)", "/ r1 * (h.expm1() / h - 1)", "dpm-fast.5.0.5"),
    ("dpm_solver_adaptive", "x_prev = x_low", "x_prev = x_high", "dpm-adaptive.1.0"),
    ("dpm_solver_adaptive", "1.5 if eta else order", "order", "dpm-adaptive.0.5"),
    ("dpm_solver_adaptive", "x_low.abs(), x_prev.abs()", "x_low.abs(), x_low.abs()", "dpm-adaptive.0.5"),
    ("dpm_solver_adaptive", "r1=1 / 3", "r1=1 / 2", "dpm-adaptive.0.5"),
    ("dpm_solver_adaptive", "x = x_high + su", "x = x_low + su", "dpm-adaptive.0.5"),
    ("dpm_solver_adaptive", "            if accept:", "            noise_sampler(None, None)\n            if accept:", "dpm-adaptive.0.5"),
    ("propose_step", "if not self.errs", "if True", "dpm-adaptive.0.5"),
    ("limiter", "math.atan(x - 1)", "math.tanh(x - 1)", "dpm-adaptive.0.5"),
]


def spoiled(text, function, right, wrong):
    start = text.index(f"def {function}(")
    end = text.find("def ", start + 4)
    body = text[start:end]
    assert right in body, (function, right)
    return text[:start] + body.replace(right, wrong) + text[end:]


def relative(a, b):
    moved = ((a - b).norm() / b.norm()).item()
    return moved if moved == moved else float("inf")


def tolerance_of(case):
    return ADAPTIVE_TOLERANCE if case["sampler"] == "dpm-adaptive" else MODEL_TOLERANCE


def check():
    """Prints both tables; returns how many rows fail."""
    expected, pipe, text, failures = load_file(ref.REFERENCE / "samplers.safetensors"), ref.load_pipe(), source(), 0
    cases = {name_of(case): case for case in model_cases()}

    print("\nFaults of samplers, where they are seen, how far they move it, and how far they must\n")
    for function, right, wrong, name in FAULTS:
        name = next(full for full in cases if full.startswith(name))
        case = cases[name]
        try:
            moved = relative(run_model(load(spoiled(text, function, right, wrong)), pipe, case)[0], expected[f"model.{name}"])
        except (TypeError, ValueError):
            moved = float("inf")
        caught = moved > MARGIN * tolerance_of(case)
        failures += not caught
        print(f"{'ok  ' if caught else 'FAIL'} {function:26} {' '.join(wrong.split())[:44]:44} {name[:30]:30} {moved:.1e} > {MARGIN * tolerance_of(case):.0e}")

    print("\nWeights changed by 1e-6: latents must move less than the tolerance allows\n")
    draw = ref.generator(1)
    for module in (pipe.text_encoder, pipe.unet, pipe.vae):
        for p in module.parameters():
            with torch.no_grad():
                p.mul_(1 + 1e-6 * torch.randn(p.shape, generator=draw))
    sampling = load(text)
    for name, case in cases.items():
        moved = relative(run_model(sampling, pipe, case)[0], expected[f"model.{name}"])
        steady = moved < tolerance_of(case)
        failures += not steady
        print(f"{'ok  ' if steady else 'FAIL'} {name:60} {moved:.2e} < {tolerance_of(case):.0e}")
    print(f"\n{failures} failures")
    return failures
