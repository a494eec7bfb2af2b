"""The mistakes that check_cases.py makes in diffusers, one function each: FAULTS lists (name, where it is seen, f)."""

import math
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.normalization import AdaGroupNorm
from diffusers.models.resnet import Downsample2D
from torch import nn

import make_reference as ref
from cases import END_TO_END

CASES = {case["name"]: case for case in END_TO_END}
PLAIN, LOG_LINEAR, GUIDED = "square-karras-4", "square-log-linear-4", "wide-guided-karras-4"

FAULTS = []


def fault(case=PLAIN):
    """Registers `f(pipe, stack)`, which spoils `pipe`; patches of shared classes go on `stack`."""

    def register(f):
        FAULTS.append((f.__name__.replace("_", " "), case, f))
        return f

    return register


class NoNorm(nn.LayerNorm):
    def forward(self, x):
        return x


def modules(root, kind):
    return [m for m in root.modules() if isinstance(m, kind)]


def attentions(pipe, name):
    return [m for n, m in pipe.unet.named_modules() if n.endswith(name)]


def rewrap(pipe, change):
    """Replaces the UNet's forward by one whose inputs pass through `change(sample, timestep, kwargs)`."""
    forward = pipe.unet.forward

    def wrapped(sample, timestep, **kwargs):
        sample, timestep = change(sample, timestep, kwargs)
        return forward(sample, timestep, **kwargs)

    pipe.unet.forward = wrapped


# ---- the UNet's layers ----------------------------------------------------------------------------------------------


@fault()
def unet_norm_eps_1e_6(pipe, stack):
    for m in modules(pipe.unet, AdaGroupNorm):
        m.eps = 1e-6


@fault()
def unet_norm_in_one_group(pipe, stack):
    for m in modules(pipe.unet, AdaGroupNorm):
        m.num_groups = 1


def ada_norm(stack, scale_shift):
    def forward(self, x, emb):
        scale, shift = self.linear(emb)[:, :, None, None].chunk(2, dim=1)
        return scale_shift(F.group_norm(x, self.num_groups, eps=self.eps), scale, shift)

    stack.enter_context(patch.object(AdaGroupNorm, "forward", forward))


@fault()
def unet_norm_scale_without_1(pipe, stack):
    ada_norm(stack, lambda x, scale, shift: x * scale + shift)


@fault()
def unet_norm_scale_and_shift_swapped(pipe, stack):
    ada_norm(stack, lambda x, scale, shift: x * (1 + shift) + scale)


@fault()
def unet_norm_without_shift(pipe, stack):
    ada_norm(stack, lambda x, scale, shift: x * (1 + scale))


@fault("unet")
def unet_tanh_gelu(pipe, stack):
    for m in modules(pipe.unet, nn.GELU):
        m.approximate = "tanh"


@fault()
def unet_resnet_without_residual_projection(pipe, stack):
    for name, p in pipe.unet.named_parameters():
        if "conv_shortcut" in name:
            p.zero_()


@fault()
def unet_resnet_second_conv_without_bias(pipe, stack):
    for name, p in pipe.unet.named_parameters():
        if name.endswith("conv2.bias"):
            p.zero_()


@fault()
def unet_one_resnet_left_out(pipe, stack):
    pipe.unet.down_blocks[1].resnets[1].forward = lambda x, temb: x


@fault()
def downsample_zero_padding(pipe, stack):
    for block in pipe.unet.down_blocks[:-1]:
        block.downsamplers[0].pad_mode = "constant"


@fault()
def upsample_zero_padding(pipe, stack):
    for block in pipe.unet.up_blocks[:-1]:
        block.upsamplers[0].pad_mode = "constant"


@fault()
def downsample_by_box(pipe, stack):
    box = torch.tensor([0.0, 0.5, 0.5, 0.0])
    for block in pipe.unet.down_blocks[:-1]:
        block.downsamplers[0].kernel = box[:, None] * box


@fault()
def upsample_kernel_not_doubled(pipe, stack):
    for block in pipe.unet.up_blocks[:-1]:
        block.upsamplers[0].kernel = block.upsamplers[0].kernel / 4


@fault()
def skips_missing(pipe, stack):
    for block in pipe.unet.up_blocks[1:]:
        block.resnets[0].register_forward_pre_hook(
            lambda _, args: (torch.cat([args[0].chunk(2, 1)[0], 0 * args[0].chunk(2, 1)[1]], 1), *args[1:])
        )


@fault()
def skips_concatenated_first(pipe, stack):
    for block in pipe.unet.up_blocks[1:]:
        block.resnets[0].register_forward_pre_hook(
            lambda _, args: (torch.cat(args[0].chunk(2, 1)[::-1], 1), *args[1:])
        )


@fault()
def self_attention_missing(pipe, stack):
    for m in attentions(pipe, "attn1.to_out.0"):
        m.weight.zero_(), m.bias.zero_()


@fault()
def cross_attention_missing(pipe, stack):
    for m in attentions(pipe, "attn2.to_out.0"):
        m.weight.zero_(), m.bias.zero_()


@fault()
def attention_without_query_bias(pipe, stack):
    for m in attentions(pipe, "to_q"):
        m.bias.zero_()


@fault()
def attention_scaled_by_the_whole_width(pipe, stack):
    for m in attentions(pipe, "attn1") + attentions(pipe, "attn2"):
        m.to_q.weight.div_(math.sqrt(m.heads)), m.to_q.bias.div_(math.sqrt(m.heads))


@fault()
def attention_heads_and_features_swapped(pipe, stack):
    for m in attentions(pipe, "attn1") + attentions(pipe, "attn2"):
        order = torch.arange(m.inner_dim).view(-1, m.heads).T.flatten()
        for linear in (m.to_q, m.to_k, m.to_v):
            linear.weight.copy_(linear.weight[order]), linear.bias.copy_(linear.bias[order])
        m.to_out[0].weight.copy_(m.to_out[0].weight[:, order])


@fault()
def attention_with_one_head(pipe, stack):
    for m in attentions(pipe, "attn1") + attentions(pipe, "attn2"):
        m.heads = 1


@fault()
def context_norm_missing(pipe, stack):
    for m in attentions(pipe, "attn2"):
        m.norm_cross = NoNorm(m.norm_cross.normalized_shape)


@fault()
def context_norm_eps_1e_6(pipe, stack):
    for m in attentions(pipe, "norm_cross"):
        m.eps = 1e-6


@fault()
def padding_tokens_masked_out(pipe, stack):
    def change(sample, timestep, kwargs):
        mask = torch.zeros(sample.shape[0], 77)
        mask[:, :7] = 1  # "a photo of a cat" has 7 tokens
        kwargs["encoder_attention_mask"] = mask
        return sample, timestep

    rewrap(pipe, change)


# ---- time embedding -------------------------------------------------------------------------------------------------


@fault()
def fourier_sine_first(pipe, stack):
    pipe.unet.time_proj.flip_sin_to_cos = False


@fault()
def fourier_without_2_pi(pipe, stack):
    pipe.unet.time_proj.weight.div_(2 * math.pi)


@fault()
def time_embedding_without_last_gelu(pipe, stack):
    pipe.unet.time_embedding.post_act = None


@fault()
def time_is_ln_sigma(pipe, stack):
    rewrap(pipe, lambda sample, timestep, kwargs: (sample, timestep * 4))


@fault()
def noise_level_zeros_first(pipe, stack):
    def change(sample, timestep, kwargs):
        cond = kwargs["timestep_cond"]
        kwargs["timestep_cond"] = torch.cat([cond[:, 64:128], cond[:, :64], cond[:, 128:]], 1)
        return sample, timestep

    rewrap(pipe, change)


@fault()
def pooled_text_before_noise_level(pipe, stack):
    def change(sample, timestep, kwargs):
        kwargs["timestep_cond"] = kwargs["timestep_cond"].roll(-128, 1)
        return sample, timestep

    rewrap(pipe, change)


# ---- preconditioning, guidance, schedule ----------------------------------------------------------------------------


@fault()
def condition_before_noise(pipe, stack):
    rewrap(pipe, lambda sample, timestep, kwargs: (sample.roll(4, 1), timestep))


@fault()
def condition_bilinear(pipe, stack):
    def change(sample, timestep, kwargs):
        low = sample[:, 4:, ::2, ::2]
        return torch.cat([sample[:, :4], F.interpolate(low, scale_factor=2, mode="bilinear")], 1), timestep

    rewrap(pipe, change)


@fault()
def input_not_scaled(pipe, stack):
    def change(sample, timestep, kwargs):
        c_in = 1 / (torch.exp(8 * timestep) + 1).sqrt()
        return torch.cat([sample[:, :4] / c_in, sample[:, 4:]], 1), timestep

    rewrap(pipe, change)


@fault()
def first_channel_dropped(pipe, stack):
    pipe.unet.register_forward_hook(lambda _, args, out: type(out)(sample=out.sample.roll(-1, 1)))


@fault("schedule")
def noise_scaled_by_sqrt_sigma2_plus_1(pipe, stack):
    stack.enter_context(
        patch.object(EulerDiscreteScheduler, "init_noise_sigma", property(lambda self: (self.sigmas[0] ** 2 + 1) ** 0.5))
    )


def after_set_timesteps(stack, change):
    original = EulerDiscreteScheduler.set_timesteps

    def set_timesteps(self, *args, **kwargs):
        original(self, *args, **kwargs)
        change(self)

    stack.enter_context(patch.object(EulerDiscreteScheduler, "set_timesteps", set_timesteps))


@fault(LOG_LINEAR)
def log_linear_ends_at_0(pipe, stack):
    after_set_timesteps(stack, lambda s: s.sigmas[s.num_inference_steps :].zero_())


@fault(LOG_LINEAR)
def log_linear_of_n_points_then_0(pipe, stack):
    def change(s):
        n = s.num_inference_steps
        s.sigmas[:n] = torch.linspace(s.sigmas[0].log(), s.sigmas[n].log(), n).exp()
        s.sigmas[n] = 0

    after_set_timesteps(stack, change)


@fault()
def karras_ends_at_sigma_min(pipe, stack):
    after_set_timesteps(stack, lambda s: s.sigmas[-1].copy_(s.sigmas[-2]))


@fault()
def karras_rho_5(pipe, stack):
    def change(s):
        ramp = torch.linspace(float(s.sigmas[0]) ** 0.2, float(s.sigmas[-2]) ** 0.2, s.num_inference_steps)
        s.sigmas[:-1] = ramp**5

    after_set_timesteps(stack, change)


@fault()
def unscaled_linear_betas(pipe, stack):
    other = EulerDiscreteScheduler(**(ref.random_model.SCHEDULER | {"beta_schedule": "linear"}))
    after_set_timesteps(stack, lambda s: s.sigmas.mul_(other.sigmas[0] / s.sigmas[0]))


@fault(GUIDED)
def guidance_off_by_one(pipe, stack):
    override(pipe, guidance_scale=6.5)


@fault(GUIDED)
def negative_prompt_ignored(pipe, stack):
    override(pipe, negative_prompt=None)


@fault("square-guidance-0")
def guidance_0_keeps_the_prompt(pipe, stack):
    override(pipe, guidance_scale=1.0)


def override(pipe, **changed):
    """Runs the pipeline with some arguments replaced."""
    pipe.overridden = changed


@fault(GUIDED)
def noise_drawn_before_the_posterior(pipe, stack):
    """The noise drawn before the posterior sample instead of after it."""
    latents = torch.randn(1, 4, 16, 24, generator=ref.generator(CASES[GUIDED]["seed"]))
    override(pipe, latents=latents)


@fault()
def posterior_mean_instead_of_sample(pipe, stack):
    def sample(self, generator=None):
        torch.randn(self.mean.shape, generator=generator)  # keeps the order of the draws
        return self.mean

    stack.enter_context(patch.object(DiagonalGaussianDistribution, "sample", sample))


@fault()
def posterior_logvar_not_halved(pipe, stack):
    def sample(self, generator=None):
        return self.mean + self.logvar.exp() * torch.randn(self.mean.shape, generator=generator)

    stack.enter_context(patch.object(DiagonalGaussianDistribution, "sample", sample))


@fault()
def wrong_scaling_factor(pipe, stack):
    pipe.vae.register_to_config(scaling_factor=0.13025)


# ---- text -----------------------------------------------------------------------------------------------------------


def text_result(pipe, change):
    """Passes the text encoder's result through `change(result, ids)`, which edits it."""
    forward = pipe.text_encoder.forward

    def wrapped(ids, **kwargs):
        result = forward(ids, **kwargs)
        change(result, ids)
        return result

    pipe.text_encoder.forward = wrapped


@fault()
def context_after_final_norm(pipe, stack):
    def change(result, ids):
        result.hidden_states = (*result.hidden_states[:-1], result.last_hidden_state)

    text_result(pipe, change)


@fault()
def context_of_the_layer_before(pipe, stack):
    def change(result, ids):
        result.hidden_states = result.hidden_states[:-1]

    text_result(pipe, change)


@fault()
def pooled_before_final_norm(pipe, stack):
    def change(result, ids):
        result.pooler_output = result.hidden_states[-1][:, int(ids[0].argmax())]

    text_result(pipe, change)


@fault()
def pooled_at_the_last_token(pipe, stack):
    def change(result, ids):
        result.pooler_output = result.last_hidden_state[:, -1]

    text_result(pipe, change)


@fault()
def text_norm_eps_1e_6(pipe, stack):
    for m in modules(pipe.text_encoder, nn.LayerNorm):
        m.eps = 1e-6


@fault()
def text_gelu_instead_of_quick_gelu(pipe, stack):
    for layer in pipe.text_encoder.encoder.layers:
        layer.mlp.activation_fn = nn.GELU()


@fault()
def text_without_causal_mask(pipe, stack):
    from transformers.models.clip import modeling_clip

    stack.enter_context(patch.object(modeling_clip, "create_causal_mask", lambda **kwargs: None))
    for layer in pipe.text_encoder.encoder.layers:
        layer.self_attn.is_causal = False
    forward = pipe.text_encoder.encoder.forward
    pipe.text_encoder.encoder.forward = lambda *args, is_causal=None, **kwargs: forward(*args, is_causal=False, **kwargs)


@fault()
def text_without_positions(pipe, stack):
    pipe.text_encoder.embeddings.position_embedding.weight.zero_()


# ---- VAE ------------------------------------------------------------------------------------------------------------


def vae_faults(half, seen_in):
    """The same mistakes in the encoder, seen in the latents, and in the decoder, seen in the image."""

    def part(pipe):
        return getattr(pipe.vae, half)

    def norm_eps(pipe, stack):
        for m in modules(part(pipe), nn.GroupNorm):
            m.eps = 1e-5

    def mid_attention_missing(pipe, stack):
        part(pipe).mid_block.attentions[0].to_out[0].weight.zero_()
        part(pipe).mid_block.attentions[0].to_out[0].bias.zero_()

    def mid_attention_without_norm(pipe, stack):
        part(pipe).mid_block.attentions[0].group_norm = nn.Identity()

    def last_norm_missing(pipe, stack):
        part(pipe).conv_norm_out = nn.Identity()

    def gelu_instead_of_silu(pipe, stack):
        for m in part(pipe).modules():
            for name in ("nonlinearity", "conv_act"):
                if hasattr(m, name):
                    setattr(m, name, nn.GELU())

    def quant_conv_missing(pipe, stack):
        setattr(pipe.vae, {"encoder": "quant_conv", "decoder": "post_quant_conv"}[half], nn.Identity())

    for f in (norm_eps, mid_attention_missing, mid_attention_without_norm, last_norm_missing, gelu_instead_of_silu, quant_conv_missing):
        FAULTS.append((f"{half}: {f.__name__.replace('_', ' ')}", seen_in, f))


vae_faults("encoder", PLAIN)
vae_faults("decoder", "image")


@fault()
def encoder_downsample_padded_on_both_sides(pipe, stack):
    for m in modules(pipe.vae.encoder, Downsample2D):
        m.padding, m.conv.padding = 1, (1, 1)
