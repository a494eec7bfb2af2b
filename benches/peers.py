"""The UNet and the VAE decoder in OpenVINO's CPU plugin and under torch.compile, float32: the peers of compare.py.

    python benches/peers.py convert DIR                            once; writes DIR/openvino, and checks it
    python benches/peers.py openvino DIR --latent 64 --steps 3     a UNet step, and a decode to 512x512
    python benches/peers.py compile DIR --latent 64 --steps 3      the same under torch.compile

Standard error tells the stages as they end; standard output gets one JSON object.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

CHECKED_LATENT = 32  # the side at which the converted networks are compared with PyTorch


def configs(folder):
    return [json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae")]


def unet_inputs(unet, side):
    """(1, 8, side, side) latents, a time, (1, 77, 768) context and (1, 896) condition: normal noise."""
    draw = np.random.default_rng(0).standard_normal
    channels, context, cond = (unet[key] for key in ("in_channels", "cross_attention_dim", "time_cond_proj_dim"))
    shapes = (1, channels, side, side), (1,), (1, 77, context), (1, cond)
    return [draw(shape).astype(np.float32) for shape in shapes]


def decoder_inputs(vae, side):
    draw = np.random.default_rng(1).standard_normal((1, vae["latent_channels"], side, side))
    return [(draw / vae["scaling_factor"]).astype(np.float32)]


def torch_modules(folder):
    """(unet, decoder) of the model as modules of plain tensors."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    class Unet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()

        def forward(self, sample, time, context, cond):
            return self.unet(sample, time, encoder_hidden_states=context, timestep_cond=cond, return_dict=False)[0]

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
            del self.vae.encoder

        def forward(self, latents):
            return self.vae.decode(latents, return_dict=False)[0]

    return Unet(), Decoder()


def settings(threads):
    """Without the precision hint the plugin computes in bf16 where the CPU can."""
    return {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}


def convert(args):
    import openvino
    import torch

    torch.set_num_threads(args.threads)
    unet, vae = configs(args.folder)
    inputs = unet_inputs(unet, CHECKED_LATENT), decoder_inputs(vae, CHECKED_LATENT)
    errors = {}
    (args.folder / "openvino").mkdir(exist_ok=True)
    for name, module, values in zip(("unet", "decoder"), torch_modules(args.folder), inputs):
        tensors = tuple(torch.from_numpy(v) for v in values)
        with torch.no_grad():
            model = openvino.convert_model(module, example_input=tensors)
            expected = module(*tensors).numpy()
        compiled = openvino.compile_model(model, "CPU", settings(args.threads))
        result = next(iter(compiled(values).values()))
        errors[name] = float(np.linalg.norm(result - expected) / np.linalg.norm(expected))
        openvino.save_model(model, args.folder / "openvino" / f"{name}.xml", compress_to_fp16=False)
    # Written last: its presence says that the conversion is whole.
    (args.folder / "openvino" / "parity.json").write_text(json.dumps(errors))
    print(json.dumps({"relative_error": errors}))


def finished(label, start):
    seconds = time.perf_counter() - start
    print(f"{label} {seconds:.3f} s", file=sys.stderr, flush=True)
    return seconds


def measure(stages, label, count, call):
    """Appends the seconds of `count` calls to stages[label]."""
    for _ in range(count):
        start = time.perf_counter()
        call()
        stages.setdefault(label, []).append(round(finished(label, start), 3))


def run_openvino(args):
    import openvino

    unet, vae = configs(args.folder)
    core = openvino.Core()
    stages = {}
    parts = (
        ("unet", "unet", unet_inputs(unet, args.latent), args.steps),
        ("decoder", "decode", decoder_inputs(vae, args.latent), args.decodes),
    )
    for name, label, values, count in parts:
        start = time.perf_counter()
        model = core.read_model(args.folder / "openvino" / f"{name}.xml")
        # The UNet's batch stays open: with every shape fixed, OpenVINO 2026.4.1 crashes while it compiles that.
        batch = -1 if name == "unet" else 1
        shapes = [openvino.PartialShape([batch, *value.shape[1:]]) for value in values]
        model.reshape(dict(zip(model.inputs, shapes)))
        compiled = core.compile_model(model, "CPU", settings(args.threads))
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if precision != "f32":
            sys.exit(f"{name}: OpenVINO computes in {precision}; expected f32")
        del model
        request = compiled.create_infer_request()
        stages.setdefault("load", []).append(round(finished("load", start), 3))
        measure(stages, label, count, lambda: request.infer(values))
        del compiled, request
    print(json.dumps({"seconds": stages}))


def run_compile(args):
    import torch

    torch.set_num_threads(args.threads)
    unet, vae = configs(args.folder)
    inputs = unet_inputs(unet, args.latent), decoder_inputs(vae, args.latent)
    stages = {}
    counts = args.steps, args.decodes
    for label, module, values, count in zip(("unet", "decode"), torch_modules(args.folder), inputs, counts):
        tensors = tuple(torch.from_numpy(v) for v in values)
        compiled = torch.compile(module)
        with torch.no_grad():
            start = time.perf_counter()
            compiled(*tensors)  # compiles, and runs once
            stages.setdefault("load", []).append(round(finished("load", start), 3))
            measure(stages, label, count, lambda: compiled(*tensors))
    print(json.dumps({"seconds": stages}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    kinds = (
        ("convert", convert, "write the networks in OpenVINO's format"),
        ("openvino", run_openvino, "time them"),
        ("compile", run_compile, "time them under torch.compile"),
    )
    for name, do, text in kinds:
        command = commands.add_parser(name, help=text)
        command.add_argument("folder", type=Path)
        command.add_argument("--threads", type=int, default=os.cpu_count())
        if do is not convert:
            command.add_argument("--latent", type=int, default=64, help="side of the UNet's latent")
            command.add_argument("--steps", type=int, default=3, help="UNet calls")
            command.add_argument("--decodes", type=int, default=1)
        command.set_defaults(do=do)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
