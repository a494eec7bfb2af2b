"""Writes a model of a published configuration whose weights are all zero: stabilityai/sd-x2-latent-upscaler's, or, as the base
checkpoint, Stable Diffusion 1.4's.

    python3 published.py FOLDER [--base]

The weight files are holes, which take no room on the disk. For counts of calls and bytes, where SIM_SKIP computes nothing.
"""

import json
import pathlib
import shutil
import struct
import sys

DATA = pathlib.Path(__file__).resolve().parents[1] / "data"

# What text_encoder/, unet/ and vae/config.json have other than those of tests/data/model.
TEXT = dict(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
)  # fmt: skip
UNET = dict(
    block_out_channels=[384, 384, 768, 768], layers_per_block=4, attention_head_dim=64, cross_attention_dim=768, time_cond_proj_dim=896
)  # fmt: skip
BASE_UNET = dict(
    block_out_channels=[320, 640, 1280, 1280], layers_per_block=2, attention_head_dim=8, cross_attention_dim=768,
    norm_num_groups=32, sample_size=64
)  # fmt: skip
VAE = dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, norm_num_groups=32, sample_size=512)


class Shapes(dict):
    """The tensors of a file, by the checkpoint's keys."""

    def layer(self, key, *shape, bias=True):
        """A convolution (outputs, inputs, side) or a linear (outputs, inputs)."""
        self[f"{key}.weight"] = [*shape, shape[2]] if len(shape) == 3 else list(shape)
        if bias:
            self[f"{key}.bias"] = [shape[0]]

    def norm(self, key, width):
        self[f"{key}.weight"] = self[f"{key}.bias"] = [width]


def text_encoder():
    shapes, width = Shapes(), TEXT["hidden_size"]
    shapes["embeddings.token_embedding.weight"] = [TEXT["vocab_size"], width]
    shapes["embeddings.position_embedding.weight"] = [77, width]
    for i in range(TEXT["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        for name in ["q_proj", "k_proj", "v_proj", "out_proj"]:
            shapes.layer(f"{layer}.self_attn.{name}", width, width)
        shapes.layer(f"{layer}.mlp.fc1", TEXT["intermediate_size"], width)
        shapes.layer(f"{layer}.mlp.fc2", width, TEXT["intermediate_size"])
        shapes.norm(f"{layer}.layer_norm1", width)
        shapes.norm(f"{layer}.layer_norm2", width)
    shapes.norm("final_layer_norm", width)
    return shapes


def unet():
    shapes, blocks, layers = Shapes(), UNET["block_out_channels"], UNET["layers_per_block"]
    time, context = 2 * blocks[0], UNET["cross_attention_dim"]

    def resnet(key, inputs, middle, outputs):
        for name, norm, ins, outs in [("1", inputs, inputs, middle), ("2", middle, middle, outputs)]:
            shapes.layer(f"{key}.norm{name}.linear", 2 * norm, time)
            shapes.layer(f"{key}.conv{name}", outs, ins, 3)
        if inputs != outputs:
            shapes.layer(f"{key}.conv_shortcut", outputs, inputs, 1, bias=False)

    def attention(key, channels, of_itself):
        for attn, norm, keys in [("attn1", "norm1", channels)] * of_itself + [("attn2", "norm2", context)]:
            shapes.layer(f"{key}.{norm}.linear", 2 * channels, time)
            for name, inputs in [("to_q", channels), ("to_k", keys), ("to_v", keys), ("to_out.0", channels)]:
                shapes.layer(f"{key}.{attn}.{name}", channels, inputs)
        shapes.norm(f"{key}.attn2.norm_cross", context)

    shapes["time_proj.weight"] = [blocks[0]]
    shapes.layer("time_embedding.cond_proj", time, UNET["time_cond_proj_dim"], bias=False)
    shapes.layer("time_embedding.linear_1", time, time)
    shapes.layer("time_embedding.linear_2", time, time)
    shapes.layer("conv_in", blocks[0], 8, 1)
    shapes.layer("conv_out", 5, blocks[0], 1)
    last = len(blocks) - 1
    for level, channels in enumerate(blocks):
        for i in range(layers):
            inputs = blocks[max(level - 1, 0)] if i == 0 else channels
            resnet(f"down_blocks.{level}.resnets.{i}", inputs, channels, channels)
            if level > 0:
                attention(f"down_blocks.{level}.attentions.{i}", channels, level == last)
    for index, level in enumerate(reversed(range(len(blocks)))):
        channels, below = blocks[level], blocks[max(level - 1, 0)]
        for i in range(layers):
            inputs = channels if i or level == last else 2 * channels
            outputs = below if i + 1 == layers else channels
            resnet(f"up_blocks.{index}.resnets.{i}", inputs, channels if level > 0 else outputs, outputs)
            if level > 0:
                attention(f"up_blocks.{index}.attentions.{i}", outputs, level == last)
    return shapes


def base_unet():
    shapes, blocks, layers = Shapes(), BASE_UNET["block_out_channels"], BASE_UNET["layers_per_block"]
    time, context = 4 * blocks[0], BASE_UNET["cross_attention_dim"]

    def resnet(key, inputs, outputs):
        for name, ins in [("1", inputs), ("2", outputs)]:
            shapes.norm(f"{key}.norm{name}", ins)
            shapes.layer(f"{key}.conv{name}", outputs, ins, 3)
        shapes.layer(f"{key}.time_emb_proj", outputs, time)
        if inputs != outputs:
            shapes.layer(f"{key}.conv_shortcut", outputs, inputs, 1)

    def transformer(key, channels):
        block = f"{key}.transformer_blocks.0"
        shapes.norm(f"{key}.norm", channels)
        for name in ["proj_in", "proj_out"]:
            shapes.layer(f"{key}.{name}", channels, channels, 1)
        for i in range(3):
            shapes.norm(f"{block}.norm{i + 1}", channels)
        for attn, keys in [("attn1", channels), ("attn2", context)]:
            for name, inputs in [("to_q", channels), ("to_k", keys), ("to_v", keys)]:
                shapes.layer(f"{block}.{attn}.{name}", channels, inputs, bias=False)
            shapes.layer(f"{block}.{attn}.to_out.0", channels, channels)
        shapes.layer(f"{block}.ff.net.0.proj", 8 * channels, channels)
        shapes.layer(f"{block}.ff.net.2", channels, 4 * channels)

    shapes.layer("time_embedding.linear_1", time, blocks[0])
    shapes.layer("time_embedding.linear_2", time, time)
    shapes.layer("conv_in", blocks[0], 4, 3)
    shapes.norm("conv_norm_out", blocks[0])
    shapes.layer("conv_out", 4, blocks[0], 3)
    last = len(blocks) - 1
    for level, channels in enumerate(blocks):
        key = f"down_blocks.{level}"
        for i in range(layers):
            resnet(f"{key}.resnets.{i}", blocks[max(level - 1, 0)] if i == 0 else channels, channels)
            if level < last:
                transformer(f"{key}.attentions.{i}", channels)
        if level < last:
            shapes.layer(f"{key}.downsamplers.0.conv", channels, channels, 3)
    for i in range(2):
        resnet(f"mid_block.resnets.{i}", blocks[-1], blocks[-1])
    transformer("mid_block.attentions.0", blocks[-1])
    for index, level in enumerate(reversed(range(len(blocks)))):
        key, channels = f"up_blocks.{index}", blocks[level]
        for i in range(layers + 1):
            inputs = blocks[min(level + 1, last)] if i == 0 else channels
            skip = blocks[max(level - 1, 0)] if i == layers else channels
            resnet(f"{key}.resnets.{i}", inputs + skip, channels)
            if level < last:
                transformer(f"{key}.attentions.{i}", channels)
        if level > 0:
            shapes.layer(f"{key}.upsamplers.0.conv", channels, channels, 3)
    return shapes


def vae():
    shapes, blocks, layers = Shapes(), VAE["block_out_channels"], VAE["layers_per_block"]

    def resnet(key, inputs, outputs):
        for name, ins in [("1", inputs), ("2", outputs)]:
            shapes.norm(f"{key}.norm{name}", ins)
            shapes.layer(f"{key}.conv{name}", outputs, ins, 3)
        if inputs != outputs:
            shapes.layer(f"{key}.conv_shortcut", outputs, inputs, 1)

    def middle(key, channels):
        for i in range(2):
            resnet(f"{key}.resnets.{i}", channels, channels)
        shapes.norm(f"{key}.attentions.0.group_norm", channels)
        for name in ["to_q", "to_k", "to_v", "to_out.0"]:
            shapes.layer(f"{key}.attentions.0.{name}", channels, channels)

    shapes.layer("encoder.conv_in", blocks[0], 3, 3)
    for level, channels in enumerate(blocks):
        key = f"encoder.down_blocks.{level}"
        for i in range(layers):
            resnet(f"{key}.resnets.{i}", blocks[max(level - 1, 0)] if i == 0 else channels, channels)
        if level + 1 < len(blocks):
            shapes.layer(f"{key}.downsamplers.0.conv", channels, channels, 3)
    middle("encoder.mid_block", blocks[-1])
    shapes.norm("encoder.conv_norm_out", blocks[-1])
    shapes.layer("encoder.conv_out", 8, blocks[-1], 3)
    shapes.layer("quant_conv", 8, 8, 1)

    shapes.layer("post_quant_conv", 4, 4, 1)
    shapes.layer("decoder.conv_in", blocks[-1], 4, 3)
    middle("decoder.mid_block", blocks[-1])
    upwards = blocks[::-1]
    for level, channels in enumerate(upwards):
        key = f"decoder.up_blocks.{level}"
        for i in range(layers + 1):
            resnet(f"{key}.resnets.{i}", upwards[max(level - 1, 0)] if i == 0 else channels, channels)
        if level + 1 < len(blocks):
            shapes.layer(f"{key}.upsamplers.0.conv", channels, channels, 3)
    shapes.norm("decoder.conv_norm_out", blocks[0])
    shapes.layer("decoder.conv_out", 3, blocks[0], 3)
    return shapes


def write_holes(path, shapes):
    """A safetensors file of float32 zeros."""
    header, end = {}, 0
    for key, shape in sorted(shapes.items()):
        size = 4
        for dim in shape:
            size *= dim
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def write(folder, small, unet_config, unet_shapes):
    """A checkpoint in `folder`: the files of the `small` one, of these sizes, with CLIP's own tokenizer."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DATA / "tokenizer", folder / "tokenizer")
    shutil.copytree(small / "scheduler", folder / "scheduler")
    shutil.copy(small / "model_index.json", folder)
    parts = [("text_encoder", "model", TEXT, text_encoder()), ("unet", "diffusion_pytorch_model", unet_config, unet_shapes),
             ("vae", "diffusion_pytorch_model", VAE, vae())]  # fmt: skip
    for part, file, config, shapes in parts:
        (folder / part).mkdir()
        of_small = json.loads((small / part / "config.json").read_text())
        (folder / part / "config.json").write_text(json.dumps(of_small | config))
        write_holes(folder / part / f"{file}.safetensors", shapes)


def main(folder):
    write(folder, DATA / "model", UNET, unet())


def base(folder):
    write(folder, DATA / "base" / "sd1", BASE_UNET, base_unet())


if __name__ == "__main__":
    (base if "--base" in sys.argv[2:] else main)(pathlib.Path(sys.argv[1]))
