"""Writes the two small base checkpoints (base/sd1, base/sd2) and every reference number of their parity tests, with diffusers on the CPU.

    python tests/data/make_base_reference.py           write everything; takes about a minute
    python tests/data/make_base_reference.py --check   show that the cases are sensitive and well conditioned

sd1 is built as Stable Diffusion 1.x is (convolutions before and after a transformer, one number of heads, PNDM, epsilon), sd2 as 2.x
(linear layers, a number of heads a level, a text encoder with erf GELU, padding by "!", v-prediction).
"""

import argparse
import itertools
import json
import shutil

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import random_model
from make_reference import HERE, HIDDEN, INPUTS, REFERENCE, generator, load_pipe, pixels, write_tokenizer

BASE = HERE / "base"
SEED = 20250714
SCHEDULERS = {c.__name__: c for c in (PNDMScheduler, DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler)}

# CompVis/stable-diffusion-v1-4 and stabilityai/stable-diffusion-2-1, scheduler/scheduler_config.json, foreign keys included.
PUBLISHED = {
    "sd1": dict(
        _class_name="PNDMScheduler",
        beta_end=0.012,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        num_train_timesteps=1000,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
        trained_betas=None,
        clip_sample=False,
    ),
    "sd2": dict(
        _class_name="DDIMScheduler",
        beta_end=0.012,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        num_train_timesteps=1000,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type="v_prediction",
        clip_sample=False,
    ),
}

# What each end-to-end case asks: a sampler by its configuration's changes, and the pipeline's arguments.
EULER = dict(_class_name="EulerDiscreteScheduler")
DPM = dict(_class_name="DPMSolverMultistepScheduler")
CASES = [
    dict(name="sd1-pndm", model="sd1", scheduler={}, steps=5, guidance=7.5, seed=3, size=(64, 96)),
    dict(name="sd1-ddim", model="sd1", scheduler=dict(_class_name="DDIMScheduler"), steps=4, guidance=1.0, seed=4, size=(96, 96)),
    dict(name="sd1-euler", model="sd1", scheduler=EULER, steps=5, guidance=3.0, seed=5, size=(64, 64)),
    dict(name="sd1-dpm-karras", model="sd1", scheduler=dict(**DPM, use_karras_sigmas=True), steps=6, guidance=7.5, seed=6, size=(64, 96)),
    dict(name="sd2-ddim", model="sd2", scheduler={}, steps=5, guidance=7.5, seed=7, size=(96, 64)),
    dict(name="sd2-pndm", model="sd2", scheduler=dict(_class_name="PNDMScheduler"), steps=6, guidance=0.0, seed=8, size=(64, 64)),
    dict(name="sd2-euler-karras", model="sd2", scheduler=dict(**EULER, use_karras_sigmas=True, timestep_spacing="trailing"), steps=5, guidance=7.5, seed=9, size=(64, 64)),
    dict(name="sd2-dpm", model="sd2", scheduler=DPM, steps=16, guidance=3.0, seed=10, size=(96, 96)),
]
REFINED = [
    dict(name="sd1-pndm-0.3", model="sd1", scheduler={}, steps=10, strength=0.3, guidance=7.5, seed=11),
    dict(name="sd1-ddim-0.58", model="sd1", scheduler=dict(_class_name="DDIMScheduler"), steps=10, strength=0.58, guidance=3.0, seed=12),
    dict(name="sd2-euler-0.3", model="sd2", scheduler=EULER, steps=10, strength=0.3, guidance=7.5, seed=13),
    dict(name="sd2-dpm-0.6", model="sd2", scheduler=dict(**DPM, use_karras_sigmas=True), steps=10, strength=0.6, guidance=1.0, seed=14),
]
# From a prompt to upscaled latents, as the upscaler's model card has it, and refined.
WHOLE = [
    dict(CASES[0], name="sd1-card", upscaler_steps=4, upscaler_guidance=0.0, schedule="log-linear", strength=None),
    dict(CASES[6], name="sd2-guided", upscaler_steps=5, upscaler_guidance=3.0, schedule="karras", strength=None),
    dict(CASES[2], name="sd1-refined-0.4", upscaler_steps=4, upscaler_guidance=1.0, schedule="karras", strength=0.4),
    dict(CASES[7], name="sd2-refined-0.25", upscaler_steps=4, upscaler_guidance=0.0, schedule="log-linear", strength=0.25),
]
# Of these, what the base made and the result as pictures.
PICTURES = ("sd1-card", "sd1-refined-0.4")
PROMPT, NEGATIVE = "a cat on a red sofa, wow!!", "blurry"


# ---- the checkpoints ------------------------------------------------------------------------------------------------


@torch.no_grad()
def write_checkpoint(name, index):
    folder = BASE / name
    shutil.rmtree(folder, ignore_errors=True)
    vocab_size = write_tokenizer(folder / "tokenizer")
    second = name == "sd2"
    if second:
        path = folder / "tokenizer" / "special_tokens_map.json"
        special = json.loads(path.read_text())
        path.write_text(json.dumps(special | {"pad_token": "!"}, indent=2) + "\n")
    text_config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=3 if second else 2,
        num_attention_heads=3,
        projection_dim=HIDDEN,
        hidden_act="gelu" if second else "quick_gelu",
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    unet_config = dict(
        sample_size=8,
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=1 if second else 2,
        attention_head_dim=[2, 4, 4, 8] if second else 4,
        cross_attention_dim=HIDDEN,
        norm_num_groups=8,
        use_linear_projection=second,
        upcast_attention=second,
    )
    vae_config = dict(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, sample_size=64)
    image = pixels(INPUTS / "wide-96x64.png")
    text, unet, vae = random_model.build_base(text_config, unet_config, vae_config, image, SEED + index)
    text.save_pretrained(folder / "text_encoder")
    vae.half().save_pretrained(folder / "vae")
    unet.half().save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(PUBLISHED[name], indent=2) + "\n")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", PUBLISHED[name]["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def parts(name):
    folder = BASE / name
    return dict(
        vae=AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval(),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def scheduler(model, changes):
    config = PUBLISHED[model] | changes
    return SCHEDULERS[config["_class_name"]].from_config({k: v for k, v in config.items() if k != "_class_name"})


# ---- the numbers ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def network_reference(models):
    """Per checkpoint: token ids and contexts of two prompts; calls of the UNet with batch 1, and with batch 2 at a time that is no whole
    number, on sides that round up on the way down."""
    out = {}
    for name, model in models.items():
        draw = generator(21)
        for label, prompt in (("prompt", PROMPT), ("empty", "")):
            ids = model["tokenizer"](prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
            out[f"{name}.{label}.ids"] = ids
            out[f"{name}.{label}.context"] = model["text_encoder"](ids).last_hidden_state
        both = torch.cat([out[f"{name}.empty.context"], out[f"{name}.prompt.context"]])
        for label, batch, time, size in (("b1", 1, 601.0, (12, 20)), ("b2", 2, 749.25, (16, 8)), ("odd", 1, 3.0, (5, 9))):
            x = torch.randn(batch, 4, *size, generator=draw)
            time = torch.tensor([time])
            result = model["unet"](x, time, encoder_hidden_states=both[-batch:]).sample
            out |= {f"{name}.{label}.x": x, f"{name}.{label}.time": time, f"{name}.{label}.output": result}
    save_file({k: v.contiguous() for k, v in out.items()}, REFERENCE / "base_networks.safetensors")


def combinations():
    """Configurations of every sampler, each a few keys."""
    product = lambda **keys: (dict(zip(keys, values)) for values in itertools.product(*keys.values()))
    spacing = ["leading", "linspace", "trailing"]
    beta = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    kinds = [
        (PNDMScheduler, dict(skip_prk_steps=True), product(prediction_type=["epsilon", "v_prediction"], timestep_spacing=spacing, set_alpha_to_one=[False, True])),
        (DDIMScheduler, dict(clip_sample=False), product(prediction_type=["epsilon", "v_prediction", "sample"], timestep_spacing=spacing, set_alpha_to_one=[False, True])),
        (EulerDiscreteScheduler, {}, product(prediction_type=["epsilon", "v_prediction", "sample"], timestep_spacing=spacing, use_karras_sigmas=[False, True], final_sigmas_type=["zero", "sigma_min"])),
        (
            DPMSolverMultistepScheduler,
            {},
            product(
                prediction_type=["epsilon", "v_prediction", "sample"],
                timestep_spacing=spacing,
                use_karras_sigmas=[False, True],
                final_sigmas_type=["zero", "sigma_min"],
                solver=[(1, "midpoint", True), (2, "midpoint", True), (2, "heun", False)],
            ),
        ),
    ]
    for kind, fixed, changes in kinds:
        for change in changes:
            if "solver" in change:
                order, solver, final = change.pop("solver")
                change |= dict(solver_order=order, solver_type=solver, lower_order_final=final)
            yield kind, beta | fixed | change
    # The defaults of each class, but for what it must have.
    for kind, fixed in ((PNDMScheduler, dict(skip_prk_steps=True)), (DDIMScheduler, dict(clip_sample=False)), (EulerDiscreteScheduler, {}), (DPMSolverMultistepScheduler, {})):
        yield kind, fixed | dict(steps_offset=1)


def predicted(x, time):
    """What stands for the network: smooth, bounded, and different at every time."""
    return 0.8 * x / (1 + x * x).sqrt() + 0.3 * (time / 1000 - 0.5)


def schedule_reference():
    """Where each sampler leads from [0.7, -1.1] (times its first spread) by `predicted`, in so many steps from step `start` on."""
    rows = []
    for kind, config in combinations():
        results = []
        for steps, start in ((1, 0), (2, 0), (5, 0), (14, 0), (20, 0), (5, 3), (14, 10), (20, 14)):
            s = kind(**config)
            s.set_timesteps(steps)
            x = torch.tensor([0.7, -1.1]) * s.init_noise_sigma
            times = s.timesteps[start:]
            if hasattr(s, "set_begin_index"):
                s.set_begin_index(start)
            for time in times:
                x = s.step(predicted(s.scale_model_input(x, time), time.to(torch.float32)), time, x).prev_sample
            # Karras' last noise level is the smallest: DPM-Solver++ by the trapezoid then divides 0 by 0.
            if bool(x.isfinite().all()):
                results.append([steps, start, *(float(v) for v in x)])
        rows.append({"config": {"_class_name": kind.__name__} | config, "results": results})
    text = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    (REFERENCE / "base_schedules.json").write_text(f"[\n{text}\n]\n")


@torch.no_grad()
def asked(pipeline, models, case, draw, **more):
    """Latents that a pipeline of diffusers gives for a case, with the draws of a generator, or of the case's own."""
    pipe = pipeline(**models[case["model"]], scheduler=scheduler(case["model"], case["scheduler"]))
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=case["steps"],
        guidance_scale=case["guidance"],
        generator=draw or generator(case["seed"]),
        output_type="latent",
        **more,
    ).images


def generated(models, case, draw=None):
    width, height = case["size"]
    return asked(StableDiffusionPipeline, models, case, draw, width=width, height=height)


def refined(models, case, latents, draw=None):
    return asked(StableDiffusionImg2ImgPipeline, models, case, draw, image=latents, strength=case["strength"])


@torch.no_grad()
def whole(models, case):
    """Base latents; and these upscaled and, where the case says so, refined: one generator runs through all of it."""
    draw = generator(case["seed"])
    base = generated(models, case, draw)
    upscale = load_pipe()
    upscale.scheduler = random_model.scheduler(case["schedule"])
    latents = upscale(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        image=base,
        num_inference_steps=case["upscaler_steps"],
        guidance_scale=case["upscaler_guidance"],
        generator=draw,
        output_type="latent",
    ).images
    return base, refined(models, case, latents, draw) if case["strength"] else latents


@torch.no_grad()
def write_picture(vae, latents, name):
    picture = VaeImageProcessor().postprocess(vae.decode(latents / vae.config.scaling_factor).sample)[0]
    picture.save(REFERENCE / f"{name}.png")


def end_to_end_reference(models):
    latents = torch.randn(1, 4, 12, 16, generator=generator(31))
    out = {"refine.latents": latents}
    for case in CASES:
        out[case["name"]] = generated(models, case)
    for case in REFINED:
        out[f"refine.{case['name']}"] = refined(models, case, latents)
    for case in WHOLE:
        base, out[f"whole.{case['name']}"] = whole(models, case)
        if case["name"] in PICTURES:
            own, latents = models[case["model"]]["vae"], out[f"whole.{case['name']}"]
            write_picture(own, base, f"base_{case['name']}_low-res")
            write_picture(own if case["strength"] else load_pipe().vae, latents, f"base_{case['name']}")
    save_file({k: v.contiguous() for k, v in out.items()}, REFERENCE / "base_end_to_end.safetensors")
    cases = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "generated": CASES, "refined": REFINED, "whole": WHOLE}
    (REFERENCE / "base_end_to_end.json").write_text(json.dumps(cases, indent=1) + "\n")


def relative(a, b):
    return float((a - b).norm() / b.norm())


def check(models):
    """Prints by how much a change of 1e-6 in the starting noise's scale moves each case, and the first prompt against the second."""
    for case in CASES:
        expected = generated(models, case)
        unet = models[case["model"]]["unet"]
        plain = unet.conv_in.forward
        unet.conv_in.forward = lambda x: plain(x * (1 + 1e-5))
        moved = relative(generated(models, case), expected) / 1e-5
        unet.conv_in.forward = plain
        print(f"{case['name']}: amplifies {moved:.2f}x, std {float(expected.std()):.2f}")
        for part, layer in (("time", unet.time_embedding.linear_1), ("feed-forward", unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2]), ("attention", unet.up_blocks[2].attentions[0].transformer_blocks[0].attn2.to_out[0])):
            weight = layer.weight.data.clone()
            layer.weight.data *= 1.1
            print(f"    {part} 10% off: {relative(generated(models, case), expected):.1e}")
            layer.weight.data.copy_(weight)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="print how sensitive the cases are, and write nothing")
    args = parser.parse_args()
    np.random.seed(0)
    if not args.check:
        for index, name in enumerate(PUBLISHED):
            write_checkpoint(name, index)
    models = {name: parts(name) for name in PUBLISHED}
    if args.check:
        check(models)
    else:
        network_reference(models)
        schedule_reference()
        end_to_end_reference(models)
