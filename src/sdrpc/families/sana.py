"""Sana: a transformer of linear attention over a strongly compressed picture; Gemma 2 reads the prompt behind an
instruction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InvalidValue
from ..prompts import Template
from . import configs
from .base import Component, Conditions, Config, Defaults, Encode, Family, Found, Joint, Latents, Naming, Prompt
from .components import flux, gemma2, llm
from .components.autoencoder_dc import VAE
from .keys import halves, same, table, thirds

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .base import Call

HEAD = 32
"""Width of a head of linear attention, which no shape tells."""
CROSS_HEADS = {1152: 72, 2240: 112}
"""Widths of the heads that attend to the text, by the width of the models that were published (0.6B; 1.6B and 4.8B)."""
SAMPLE_SIZE = 32
"""Latents on a side that a model was trained at, where nothing tells."""
LARGE = 128
"""Of models of 4K."""
STRETCHED = {64: 1, LARGE: 2}
"""How positions are stretched in models of 2K and 4K, by their sample size; the others have none."""
TOKENS = 300
"""Of a text, at most."""
FLOW_SHIFT, LARGE_FLOW_SHIFT = 3.0, 6.0
"""Of all models, and of those of 4K."""

INSTRUCTION = """\
Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image \
generation. Evaluate the level of detail in the user prompt:
- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial relationships \
to create vivid and concrete scenes.
- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.
Here are examples of how to transform or refine prompts:
- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping peacefully \
on a warm sunny windowsill, surrounded by pots of blooming red flowers.
- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street lamps, \
a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.
Please generate only the enhanced description for the prompt below and avoid including any additional commentary or \
evaluations:
User Prompt: """
"""What the models were trained with before a prompt (NVlabs' configurations, diffusers' pipeline)."""
TEMPLATE = Template(f"{gemma2.START}{INSTRUCTION}", "")
NEGATIVE = Template(gemma2.START, "")
"""Negative prompts stand alone."""

# The diffusion model --------------------------------------------------------------------------------------------------

_GUIDANCE = "time_embed.guidance_embedder."
_NO_TEXT = "caption_projection.y_embedding"
"""What stands for no text in training. No picture needs it."""
_PLACES = "pos_embed"
"""A table of positions that original files have; the module makes its own, if it has any."""


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' SanaTransformer2DModel."""
    if found.has(_GUIDANCE):
        raise found.error("is Sana-Sprint, which is told its guidance and samples otherwise; it is not supported")
    inner, channels, patch, other = found.shape("patch_embed.proj.weight", 4)
    outputs, _ = found.shape("proj_out.weight", 2)
    _, text = found.shape("caption_projection.linear_1.weight", 2)
    first = "transformer_blocks.0."
    hidden, *_ = found.shape(f"{first}ff.conv_inverted.weight", 4)
    if patch != other or outputs != channels * patch**2:
        raise found.error(f"patches of {patch}×{other} latents in {channels} channels and {outputs} out make no sense")
    size = configs.sample_size(found, _PLACES, patch, SAMPLE_SIZE)
    inferred = {
        "in_channels": channels, "out_channels": channels, "patch_size": patch, "caption_channels": text,
        "num_layers": found.count("transformer_blocks."), "cross_attention_dim": inner,
        "attention_head_dim": HEAD, "cross_attention_head_dim": CROSS_HEADS.get(inner, HEAD),
        "mlp_ratio": (hidden // 2 + 0.5) / inner,  # the class rounds (width · ratio) down
        "attention_bias": f"{first}attn1.to_q.bias" in found.tensors,
        "qk_norm": "rms_norm_across_heads" if f"{first}attn1.norm_q.weight" in found.tensors else None,
        "sample_size": size, "interpolation_scale": STRETCHED.get(size),
    }  # fmt: skip
    keys = ("attention_head_dim", "cross_attention_head_dim", "sample_size", "interpolation_scale", "norm_eps")
    config = configs.merged(found, inferred, told, keys)
    for key in ("attention_head_dim", "cross_attention_head_dim"):
        configs.check_divides(found, config, key, [inner])
    return config | {
        "num_attention_heads": inner // config["attention_head_dim"],
        "num_cross_attention_heads": inner // config["cross_attention_head_dim"],
    }


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: latents (1 or batch, channels, height, width), timestep (1 or batch,) of 0 … 1000, context (batch,
    tokens, caption_channels), seen (batch, tokens): 1, or 0 behind the end of a text. Output: the velocity (batch,
    channels, height, width)."""
    import diffusers

    def call(
        module: Any, latents: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, seen: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        batch = context.shape[0]
        predicted: tuple[torch.Tensor, ...] = module(
            latents.expand(batch, -1, -1, -1),
            encoder_hidden_states=context,
            timestep=timestep.expand(batch),
            encoder_attention_mask=seen,
            return_dict=False,
        )
        return predicted

    make: Any = diffusers.SanaTransformer2DModel
    return make(**config), call


_BLOCK, _BLOCKS = r"blocks\.(\d+)", r"transformer_blocks.\1"
_ORIGINAL = table(
    [
        *flux.linear(
            {
                r"x_embedder\.proj": "patch_embed.proj",
                r"y_embedder\.y_proj\.fc1": "caption_projection.linear_1",
                r"y_embedder\.y_proj\.fc2": "caption_projection.linear_2",
                r"t_embedder\.mlp\.0": "time_embed.emb.timestep_embedder.linear_1",
                r"t_embedder\.mlp\.2": "time_embed.emb.timestep_embedder.linear_2",
                r"t_block\.1": "time_embed.linear",
                rf"{_BLOCK}\.attn\.proj": f"{_BLOCKS}.attn1.to_out.0",
                rf"{_BLOCK}\.cross_attn\.q_linear": f"{_BLOCKS}.attn2.to_q",
                rf"{_BLOCK}\.cross_attn\.proj": f"{_BLOCKS}.attn2.to_out.0",
                rf"{_BLOCK}\.mlp\.inverted_conv\.conv": f"{_BLOCKS}.ff.conv_inverted",
                rf"{_BLOCK}\.mlp\.depth_conv\.conv": f"{_BLOCKS}.ff.conv_depth",
                r"final_layer\.linear": "proj_out",
            }
        ),
        (r"attention_y_norm\.weight", "caption_norm.weight"),
        (rf"{_BLOCK}\.attn\.qkv\.weight", [f"{_BLOCKS}.attn1.to_{name}.weight" for name in "qkv"], thirds),
        (rf"{_BLOCK}\.attn\.([qk])_norm\.weight", rf"{_BLOCKS}.attn1.norm_\2.weight"),
        *(
            (
                rf"{_BLOCK}\.cross_attn\.kv_linear\.{kind}",
                [f"{_BLOCKS}.attn2.to_{name}.{kind}" for name in "kv"],
                halves,
            )
            for kind in flux.BOTH
        ),
        (rf"{_BLOCK}\.cross_attn\.([qk])_norm\.weight", rf"{_BLOCKS}.attn2.norm_\2.weight"),
        (rf"{_BLOCK}\.mlp\.point_conv\.conv\.weight", f"{_BLOCKS}.ff.conv_point.weight"),
        (rf"{_BLOCK}\.scale_shift_table", f"{_BLOCKS}.scale_shift_table"),
        (r"final_layer\.scale_shift_table", "scale_shift_table"),
        (r"cfg_embedder\.mlp\.(.*)", rf"{_GUIDANCE}\1"),
        (r"y_embedder\.y_embedding", _NO_TEXT),
        (r"pos_embed", _PLACES),
    ]
)
"""NVlabs' names."""

TRANSFORMER = Component(
    "diffusion",
    "diffusion model",
    flux.PREFIXES,
    (
        Naming("blocks.0.mlp.inverted_conv.conv.weight", _ORIGINAL),
        Naming("transformer_blocks.0.ff.conv_inverted.weight", same),
    ),
    _configure,
    build,
    "transformer",
    idle=(_NO_TEXT, _PLACES),
    blocks={"transformer_blocks": "num_layers"},
)

# The family -----------------------------------------------------------------------------------------------------------


def recognizes(diffusion: Found) -> bool:
    return {"patch_embed.proj.weight", "caption_norm.weight"} <= diffusion.tensors.keys()


def conditions(encode: Encode, prompt: Prompt) -> Conditions:
    """Gemma's hidden states behind its final norm (1, tokens, hidden_size), of the first token and of those from the
    last one of the instruction on, filled up with zeros to a multiple of 64 tokens; and which of them are the text's
    (1, tokens). Raises :class:`InvalidValue` for a text that is too long.

    A prompt is read in small letters, as in training."""
    states = [encode.config(llm.NAME)["num_hidden_layers"]]
    text = prompt.text.lower().strip()
    template = NEGATIVE if prompt.negative else TEMPLATE
    hidden = llm.hidden_states(encode, text, template, gemma2.no_tokenizer, states)
    if not prompt.negative:
        hidden = np.concatenate((hidden[:, :1], hidden[:, _instructed(encode) - 1 :]), 1)
    length = hidden.shape[1]
    if length > TOKENS:
        reason = f"has {length} tokens with those around it; Sana reads {TOKENS}"
        raise InvalidValue("negative_prompt" if prompt.negative else "prompt", prompt.text, reason)
    context, seen = llm.filled(hidden)
    return {"context": context, "seen": seen}


def _instructed(encode: Encode) -> int:
    """Tokens of the instruction alone, with that of its beginning."""
    tokenizer = encode.tokenizer(llm.NAME) or gemma2.no_tokenizer()
    return len(tokenizer.encode(TEMPLATE.before, add_special_tokens=False).ids)


def settings(found: Mapping[str, Found]) -> Defaults:
    """As the authors' pipelines have them. Models of 4K are told by their directory, or by their table of positions."""
    diffusion = found["diffusion"]
    said = diffusion.checkpoint.configs.get("scheduler", {}).get("flow_shift")
    large = said == LARGE_FLOW_SHIFT or configs.sample_size(diffusion, _PLACES, 1, SAMPLE_SIZE) == LARGE
    shift = LARGE_FLOW_SHIFT if large else FLOW_SHIFT
    return Defaults(size=1024, sampler="euler", steps=20, cfg_scale=4.5, prediction="sd3_flow", flow_shift=shift)


SANA = Family(
    "sana",
    "Sana",
    (gemma2.GEMMA2, TRANSFORMER, VAE),
    recognizes,
    conditions,
    Latents(scale=0.41407, multiple=32),
    settings,
    (
        Joint(llm.NAME, lambda c: c[llm.NAME]["hidden_size"], "diffusion", flux.takes("caption_channels")),
        Joint("vae", lambda c: c["vae"]["latent_channels"], "diffusion", flux.takes("in_channels")),
    ),
)
