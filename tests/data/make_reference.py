"""Writes the small model (model/) and every reference number (reference/) of the parity tests, with diffusers on the CPU.

    python tests/data/make_reference.py           write everything; takes about a minute
    python tests/data/make_reference.py --tiny    write only what the built-in model (assets/tiny) gives
    python tests/data/make_reference.py --taesd   write only the small AutoencoderTiny (vae-tiny/) and what it gives
    python tests/data/make_reference.py --samplers   write only what k-diffusion's samplers give (samplers.py)
    python tests/data/make_reference.py --original   write only the original checkpoint, what it gives, and files of torch.save (original.py)
    python tests/data/make_reference.py --check   show that the end-to-end cases are sensitive and well conditioned

The tests read the files as committed. Written again on another machine or with other versions, the numbers may differ
in their last digits; the weights, the inputs and the token ids may not.
"""

import argparse
import json
import os
import platform
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionLatentUpscalePipeline, UNet2DConditionModel
from diffusers.models.downsampling import KDownsample2D
from diffusers.models.upsampling import KUpsample2D
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import random_model
from cases import END_TO_END, NOISE_COUNTS, NOISE_SEEDS, PROMPTS, STEP_COUNTS, TAESD_CASES, TOKENIZER_TEXTS

HERE = Path(__file__).resolve().parent
MODEL = HERE / "model"
TINY_VAE = HERE / "vae-tiny"
REFERENCE = HERE / "reference"
INPUTS = HERE / "inputs"
SEED = 20240229
MERGES = 200
HIDDEN = 48  # text width: no other width of the small model equals it


def save(name, tensors):
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, REFERENCE / f"{name}.safetensors")


def generator(seed):
    return torch.Generator("cpu").manual_seed(seed)


def pixels(path):
    """(1, 3, H, W) in [-1, 1] of an image file."""
    rgb = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)
    return torch.from_numpy(rgb).permute(2, 0, 1)[None] / 127.5 - 1


# ---- the model ------------------------------------------------------------------------------------------------------


def write_inputs():
    """Cuts of the sample photograph, and low-resolution latents (1, 4, 8, 12) with a standard deviation near 1."""
    INPUTS.mkdir(exist_ok=True)
    photo = Image.open(HERE.parents[1] / "assets" / "astronaut.png").convert("RGB")
    photo.resize((64, 64), Image.BOX, box=(96, 0, 352, 256)).save(INPUTS / "square-64x64.png")
    photo.resize((96, 64), Image.BOX, box=(32, 0, 416, 256)).save(INPUTS / "wide-96x64.png")
    latents = torch.randn(1, 4, 8, 12, generator=generator(7))
    save_file({"latents": latents}, INPUTS / "latents-8x12.safetensors")


def write_tokenizer(folder):
    """The CLIP tokenizer cut down to its bytes and first merges; returns the size of the vocabulary."""
    folder.mkdir(parents=True)
    full = HERE / "tokenizer"
    merges = (full / "merges.txt").read_text("utf-8").split("\n")[1 : MERGES + 1]
    ids = json.loads((full / "vocab.json").read_text("utf-8"))
    tokens = sorted(ids, key=ids.get)[:512] + [m.replace(" ", "") for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        shutil.copyfile(full / name, folder / name)
    return len(vocab)


def write_model():
    shutil.rmtree(MODEL, ignore_errors=True)
    vocab_size = write_tokenizer(MODEL / "tokenizer")
    text_config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        projection_dim=HIDDEN,
        hidden_act="quick_gelu",
        # As in the published file: ids that the tokenizer does not use, 2 meaning "the highest id ends the text".
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    unet_config = dict(
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=2,
        attention_head_dim=16,
        cross_attention_dim=HIDDEN,
        time_cond_proj_dim=128 + HIDDEN,
    )
    vae_config = dict(block_out_channels=(16, 24, 32, 32), layers_per_block=1, norm_num_groups=8, sample_size=64)
    image = pixels(INPUTS / "wide-96x64.png")
    text, unet, vae = random_model.build(text_config, unet_config, vae_config, image, SEED)
    text.save_pretrained(MODEL / "text_encoder")
    vae.save_pretrained(MODEL / "vae")
    # float16 and two files, so that the repository stays small and both ways of storing weights are always tested.
    unet.half().save_pretrained(MODEL / "unet", max_shard_size="1500KB")
    random_model.scheduler("log-linear").save_pretrained(MODEL / "scheduler")
    index = {
        "_class_name": "StableDiffusionLatentUpscalePipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (MODEL / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def load_pipe(round_to=None):
    """The pipeline of model/ in float32; `round_to`, a dtype, first rounds every weight to it."""
    text = CLIPTextModel.from_pretrained(MODEL / "text_encoder", dtype=torch.float32).eval()
    unet = UNet2DConditionModel.from_pretrained(MODEL / "unet", dtype=torch.float32).eval()
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").eval()
    if round_to is not None:
        for module in (text, unet, vae):
            module.to(round_to).to(torch.float32)
    pipe = StableDiffusionLatentUpscalePipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(MODEL / "tokenizer"),
        unet=unet,
        scheduler=random_model.scheduler("log-linear"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- stage by stage -------------------------------------------------------------------------------------------------


def tokenizer_reference():
    out = {}
    for name, folder in (("full", HERE / "tokenizer"), ("small", MODEL / "tokenizer")):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        rows = []
        for text in TOKENIZER_TEXTS:
            ids = tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids
            untruncated = tokenizer(text).input_ids
            rows.append({"text": text, "ids": ids, "untruncated": untruncated})
            if len(untruncated) > 77:  # the part that diffusers' warning quotes
                rows[-1]["cut"] = tokenizer.decode(untruncated[76:-1])
        out[name] = rows
    (REFERENCE / "tokenizer.json").write_text(json.dumps(out, indent=None, separators=(",", ":")) + "\n")


@torch.no_grad()
def text_reference(pipe):
    """Per prompt: ids (1, 77), context (1, 77, 48) and pooled (1, 48); and the two rules for the end of the text."""
    out = {}
    for name, prompt in PROMPTS.items():
        ids = pipe.tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        result = pipe.text_encoder(ids, output_hidden_states=True)
        out[f"{name}.ids"], out[f"{name}.context"] = ids, result.hidden_states[-1]
        out[f"{name}.pooled"] = result.pooler_output
        normed = pipe.text_encoder.final_layer_norm(result.hidden_states[-1])
        assert torch.equal(normed, result.last_hidden_state)
        end = ids[0].tolist().index(pipe.tokenizer.eos_token_id)
        assert torch.equal(normed[:, end], result.pooler_output)
    # eos_token_id 2 pools at the highest id, any other value at its own first position. They agree where the tokenizer's
    # end token is the highest id and the one configured; `other_eos` is a case where they do not.
    encoder = pipe.text_encoder
    ids = out["cat.ids"]
    encoder.eos_token_id = pipe.tokenizer.eos_token_id
    assert torch.equal(encoder(ids).pooler_output, out["cat.pooled"])
    encoder.eos_token_id = int(ids[0, 3])
    out["other_eos.eos_token_id"] = ids[0, 3:4]
    out["other_eos.pooled"] = encoder(ids).pooler_output
    encoder.eos_token_id = 2
    save("text", out)


@torch.no_grad()
def vae_reference(pipe):
    """Encoder and decoder on sizes that are multiples of 8 only; the mid-block attention on its own."""
    vae, draw = pipe.vae, generator(11)
    seen = {}
    hooks = [
        m.register_forward_hook(lambda _, args, out, name=name: seen.update({f"{name}.in": args[0], f"{name}.out": out}))
        for name, m in (
            ("encoder.mid_block", vae.encoder.mid_block),
            ("decoder.mid_block", vae.decoder.mid_block),
            ("decoder.up_block_0", vae.decoder.up_blocks[0]),
            ("decoder.mid_block.attention", vae.decoder.mid_block.attentions[0]),
        )
    ]
    image = torch.nn.functional.interpolate(pixels(INPUTS / "wide-96x64.png"), size=(40, 56), mode="bilinear")
    moments = vae.encode(image).latent_dist
    latents = 5.5 * torch.randn(1, 4, 5, 7, generator=draw)
    out = {"encode.image": image, "encode.mean": moments.mean, "encode.logvar": moments.logvar}
    out |= {"decode.latents": latents, "decode.image": vae.decode(latents).sample}
    for hook in hooks:
        hook.remove()
    save("vae", out | seen)


@torch.no_grad()
def unet_reference(pipe):
    """One call with batch 1 at a low sigma, block by block, and one with batch 2 at a high one, on 16x24 latents."""
    unet, draw, out = pipe.unet, generator(12), {}
    prompts = [
        pipe.encode_prompt(prompt=PROMPTS[name], device="cpu", do_classifier_free_guidance=False)
        for name in ("cat", "empty")
    ]
    noise_level = torch.cat([torch.ones(1, 64), torch.zeros(1, 64)], dim=1)
    contexts = torch.cat([p[0] for p in prompts])
    conds = torch.cat([torch.cat([noise_level, p[2]], dim=1) for p in prompts])
    for name, batch, sigma in (("b1", 1, 0.3), ("b2", 2, 9.0)):
        sample = torch.randn(batch, 8, 16, 24, generator=draw)
        sigma = torch.tensor(sigma)
        timestep = sigma.log() * 0.25
        seen, hooks = {}, []

        def watch(label, module):
            def hook(_, args, result):
                if isinstance(result, tuple):
                    if result[1][-1] is not None:  # the lowest level has no skip
                        seen[f"{name}.{label}.skip"] = result[1][-1]
                    result = result[0]
                seen[f"{name}.{label}"] = result

            hooks.append(module.register_forward_hook(hook))

        if batch == 1:
            watch("temb", unet.time_embedding)
            watch("fourier", unet.time_proj)
            watch("conv_in", unet.conv_in)
            for i in range(4):
                watch(f"down_blocks.{i}", unet.down_blocks[i])
                watch(f"up_blocks.{i}", unet.up_blocks[i])
            watch("down_blocks.2.resnets.0", unet.down_blocks[2].resnets[0])
            watch("down_blocks.3.attentions.0", unet.down_blocks[3].attentions[0])
        result = unet(sample, timestep, encoder_hidden_states=contexts[:batch], timestep_cond=conds[:batch]).sample
        for hook in hooks:
            hook.remove()
        out |= {f"{name}.sample": sample, f"{name}.sigma": sigma[None], f"{name}.timestep": timestep[None]}
        out |= {f"{name}.context": contexts[:batch], f"{name}.timestep_cond": conds[:batch], f"{name}.output": result}
        out |= seen
    small = torch.randn(2, 5, 6, 10, generator=draw)
    out |= {"resample.input": small, "resample.down": KDownsample2D()(small), "resample.up": KUpsample2D()(small)}
    tiny = small[:, :, :2, :3]
    out |= {"resample.tiny_down": KDownsample2D()(tiny), "resample.tiny_up": KUpsample2D()(tiny)}
    save("unet", out)


def schedule_reference():
    """`SCHEDULE.N.sigmas` (N + 1: those an N-step run goes through), `.timesteps` (N: the UNet's times, 0.25 ln sigma)
    and `.init_noise_sigma` (1: what the first noise is multiplied by)."""
    out = {}
    for schedule in ("karras", "log-linear"):
        for steps in STEP_COUNTS:
            scheduler = random_model.scheduler(schedule)
            scheduler.set_timesteps(steps)
            sigmas = scheduler.sigmas[: steps + 1]
            assert len(scheduler.timesteps) == steps
            out[f"{schedule}.{steps}.sigmas"] = sigmas
            out[f"{schedule}.{steps}.timesteps"] = sigmas[:-1].log() * 0.25
            out[f"{schedule}.{steps}.init_noise_sigma"] = scheduler.init_noise_sigma[None]
    save("schedule", out)


def noise_reference():
    """torch.randn of a fresh generator, `DTYPE.SEED.COUNT`; of 65536 values only the ends, every 997th and the sum."""
    out = {}
    for seed in NOISE_SEEDS:
        for count in NOISE_COUNTS:
            for name, dtype in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
                values = torch.randn(count, generator=generator(seed), dtype=dtype)
                key = f"{name}.{seed}.{count}"
                if count <= 1000:
                    out[key] = values
                elif dtype == torch.float32:
                    out |= {f"{key}.first": values[:64], f"{key}.last": values[-64:], f"{key}.every_997th": values[::997]}
                    out |= {f"{key}.sum": values.double().sum()[None], f"{key}.square_sum": values.double().square().sum()[None]}
        # Draws that follow one another: the counts are in the keys, in order.
        draw = generator(seed)
        for i, count in enumerate((1, 15, 3, 256, 17, 1, 1024, 2)):
            out[f"sequence.{seed}.{i}.{count}"] = torch.randn(count, generator=draw)
    save("noise", out)


# ---- end to end -----------------------------------------------------------------------------------------------------


def case_input(case):
    path = INPUTS / case["input"]
    if path.suffix == ".png":
        return Image.open(path).convert("RGB")
    from safetensors.torch import load_file

    return load_file(path)["latents"]


@torch.no_grad()
def run_case(pipe, case):
    """Upscaled latents (1, 4, 2h, 2w), scaled, of one end-to-end case."""
    pipe.scheduler = random_model.scheduler(case["schedule"])
    return pipe(
        prompt=case["prompt"],
        negative_prompt=case["negative_prompt"],
        image=case_input(case),
        num_inference_steps=case["steps"],
        guidance_scale=case["guidance"],
        generator=generator(case["seed"]),
        output_type="latent",
    ).images


@torch.no_grad()
def decode(pipe, latents):
    image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return pipe.image_processor.postprocess(image, output_type="pil")[0]


def end_to_end_reference():
    """latents of every case in end_to_end.safetensors, NAME.png of those that say so, and the cases themselves."""
    dtypes = {"f32": None, "f16": torch.float16, "bf16": torch.bfloat16}
    out = {}
    for weights, dtype in dtypes.items():
        pipe = load_pipe(dtype)
        for case in (c for c in END_TO_END if c["weights"] == weights):
            out[case["name"]] = run_case(pipe, case)
            if case["image"]:
                decode(pipe, out[case["name"]]).save(REFERENCE / f"{case['name']}.png", optimize=True)
            print(f"{case['name']:34} latents std {out[case['name']].std():.3f}")
    save("end_to_end", out)
    (REFERENCE / "end_to_end.json").write_text(json.dumps(END_TO_END, indent=1, ensure_ascii=False) + "\n")


@torch.no_grad()
def tiny_reference():
    """tiny.png and tiny.safetensors: the model built into the binary, at the defaults of the command line and one step."""
    pipe = StableDiffusionLatentUpscalePipeline.from_pretrained(HERE.parents[1] / "assets" / "tiny", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    image, out = Image.open(INPUTS / "square-64x64.png").convert("RGB"), {}
    for steps in (1, 20):
        out[f"steps-{steps}"] = pipe(
            prompt="", image=image, num_inference_steps=steps, guidance_scale=1.0, generator=generator(0), output_type="latent"
        ).images
    decode(pipe, out["steps-20"]).save(REFERENCE / "tiny.png", optimize=True)
    save("tiny", out)


def write_tiny_vae():
    """vae-tiny/: an AutoencoderTiny for the latents of model/, its levels of different depths, some of no block at all."""
    config = dict(
        encoder_block_out_channels=(12,) * 4,
        decoder_block_out_channels=(16,) * 4,
        num_encoder_blocks=(1, 0, 2, 3),
        num_decoder_blocks=(3, 2, 0, 1),
    )
    vae = random_model.build_tiny_vae(config, pixels(INPUTS / "wide-96x64.png"), SEED)
    shutil.rmtree(TINY_VAE, ignore_errors=True)
    vae.half().save_pretrained(TINY_VAE)


@torch.no_grad()
def taesd_reference():
    """taesd.safetensors and taesd-*.png: vae-tiny/ alone, on sizes that are multiples of 8 only, and as the pipeline's VAE; and
    `odd.*`, one of two levels, other activations and latents of five channels, with its weights."""
    vae, draw = AutoencoderTiny.from_pretrained(TINY_VAE, torch_dtype=torch.float32).eval(), generator(13)
    image = torch.nn.functional.interpolate(pixels(INPUTS / "wide-96x64.png"), size=(40, 56), mode="bilinear")
    # Beyond 3 too, where the decoder bends them back.
    latents = 2 * torch.randn(1, 4, 5, 7, generator=draw)
    out = {"encode.image": image, "encode.latents": vae.encode(image).latents}
    out |= {"decode.latents": latents, "decode.image": vae.decode(latents).sample}

    config = dict(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(9, 9),
        num_encoder_blocks=(1, 2),
        num_decoder_blocks=(1, 1),
        latent_channels=5,
        act_fn="silu",
    )
    odd = random_model.build_tiny_vae(config, image, SEED)
    latents = torch.randn(2, 5, 9, 7, generator=draw)
    out |= {f"odd.weights.{name}": values for name, values in odd.state_dict().items()}
    out |= {"odd.encode.latents": odd.encode(image).latents, "odd.decode.latents": latents, "odd.decode.image": odd.decode(latents).sample}

    pipe = load_pipe()
    pipe.vae = vae
    for case in (c for c in END_TO_END if c["name"] in TAESD_CASES):
        name = f"taesd-{case['name']}"
        out[name] = run_case(pipe, case)
        decode(pipe, out[name]).save(REFERENCE / f"{name}.png", optimize=True)
        print(f"{name:34} latents std {out[name].std():.3f}")
    save("taesd", out)


# In numbers: as another program may weigh words, so that no words give the same.
EMBEDS = {"prompts": ("a cat", "a photograph of a dog"), "negative": "blurry", "steps": 3, "seed": 6, "guidance": 4.0}


@torch.no_grad()
def embeds_reference():
    """embeds.safetensors: prompts in numbers as diffusers' pipeline takes them, two rows, and the latents that each gives alone with guidance
    and without; embeds-positive.safetensors: the same without what to steer away from, which is EMBEDS["negative"] in the text encoder's numbers."""
    pipe, draw = load_pipe(), generator(17)
    pipe.scheduler = random_model.scheduler("karras")
    image = Image.open(INPUTS / "square-64x64.png").convert("RGB")
    rows = [pipe.encode_prompt(prompt, "cpu", True, EMBEDS["negative"]) for prompt in EMBEDS["prompts"]]
    embeds, negative, pooled, negative_pooled = (torch.cat(part) for part in zip(*rows))
    embeds = 1.2 * embeds + 0.1 * torch.randn(embeds.shape, generator=draw)
    pooled = 0.9 * pooled + 0.1 * torch.randn(pooled.shape, generator=draw)
    positive = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    both = positive | {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
    out = dict(both)
    for row in range(len(rows)):
        one = {name: values[row : row + 1] for name, values in both.items()}
        for name, guidance in (("guided", EMBEDS["guidance"]), ("alone", 1.0)):
            out[f"latents.{row}.{name}"] = pipe(
                image=image,
                num_inference_steps=EMBEDS["steps"],
                guidance_scale=guidance,
                generator=generator(EMBEDS["seed"]),
                output_type="latent",
                prompt=None,
                **one,
            ).images
    save("embeds", out)
    save("embeds-positive", positive)


def versions():
    names = {"torch": torch, "diffusers": diffusers, "transformers": transformers, "numpy": np}
    return ", ".join([f"python {platform.python_version()}"] + [f"{k} {v.__version__}" for k, v in names.items()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="write only the built-in model's numbers")
    parser.add_argument("--taesd", action="store_true", help="write only the AutoencoderTiny and its numbers")
    parser.add_argument("--embeds", action="store_true", help="write only prompts in numbers and what they give")
    parser.add_argument("--samplers", action="store_true", help="write only what k-diffusion's samplers give")
    parser.add_argument("--original", action="store_true", help="write only what is of the original implementation")
    parser.add_argument("--check", action="store_true", help="judge the cases instead of writing them")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # one order of additions
    torch.use_deterministic_algorithms(True)
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    print(versions())
    import samplers  # which uses this module

    if args.check:
        import check_cases

        return check_cases.check() + samplers.check()
    import original  # which uses this module

    if args.samplers:
        return samplers.reference(load_pipe())
    if args.original:
        return original.reference(load_pipe())
    if args.embeds:
        return embeds_reference()
    if args.tiny:
        return tiny_reference()
    if args.taesd:
        write_tiny_vae()
        return taesd_reference()
    shutil.rmtree(REFERENCE, ignore_errors=True)
    REFERENCE.mkdir()
    write_inputs()
    write_model()
    pipe = load_pipe()
    print("parameters:", {k: sum(p.numel() for p in getattr(pipe, k).parameters()) for k in ("text_encoder", "unet", "vae")})
    tokenizer_reference()
    text_reference(pipe)
    vae_reference(pipe)
    unet_reference(pipe)
    schedule_reference()
    noise_reference()
    end_to_end_reference()
    tiny_reference()
    write_tiny_vae()
    taesd_reference()
    samplers.reference(pipe)
    original.reference(pipe)


if __name__ == "__main__":
    sys.exit(main())
