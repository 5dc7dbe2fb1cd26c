"""Wan 2.1 and 2.2: films of a text (1.3B, 14B, A14B with a model for each half of the noise, TI2V-5B)."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..prompts import t5_chunks, umt5_tokenizer
from . import configs
from .base import (
    Component,
    Conditions,
    Config,
    Defaults,
    Encode,
    Family,
    Found,
    Joint,
    Latents,
    Naming,
    Prompt,
    joined,
)
from .components import film, umt5
from .keys import same, table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .base import Call

HEAD_SIZE = 128
"""Of attention in all published models: no tensor tells it."""
TOKENS = 512
"""Of a text, as in Wan's own code, diffusers and stable-diffusion.cpp."""
PATCH = 2
"""Latents on a side that make one token."""

OTHERS = re.compile(r"\b(vace_|face_adapter|motion_encoder|casual_audio_encoder|control_adapter)")
"""Names that only models have which are told more: VACE, Animate, S2V, Fun Control."""

# The diffusion model --------------------------------------------------------------------------------------------------


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' WanTransformer3DModel."""
    inner, inputs, *patch = found.shape("patch_embedding.weight", 5)
    outputs, _ = found.shape("proj_out.weight", 2)
    _, frequencies = found.shape("condition_embedder.time_embedder.linear_1.weight", 2)
    _, text = found.shape("condition_embedder.text_embedder.linear_1.weight", 2)
    feed_forward, _ = found.shape("blocks.0.ffn.net.0.proj.weight", 2)
    if patch != [1, PATCH, PATCH]:
        raise found.error(f"makes tokens of {patch} latents, not of 1, {PATCH} and {PATCH}", "patch_embedding.weight")
    channels = outputs // PATCH**2
    if inputs != channels:
        raise found.error(f"takes {inputs} channels and gives {channels}: this is no text-to-video model")
    inferred = {
        "patch_size": patch, "in_channels": inputs, "out_channels": channels, "attention_head_dim": HEAD_SIZE,
        "num_attention_heads": inner // HEAD_SIZE, "text_dim": text, "freq_dim": frequencies, "ffn_dim": feed_forward,
        "num_layers": found.count("blocks."), "cross_attn_norm": found.has("blocks.0.norm2."),
    }  # fmt: skip
    config = configs.merged(found, inferred, told, ("attention_head_dim", "num_attention_heads", "eps"))
    if config["num_attention_heads"] * config["attention_head_dim"] != inner or config["attention_head_dim"] % 2:
        raise found.error(f"heads of {config['attention_head_dim']} do not divide its width of {inner}")
    return config


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: latents (1 or batch, channels, frames, height, width), timestep (1 or batch,) of 0 … 1000, context
    (batch, tokens, 4096). Output: the velocity (batch, channels, frames, height, width)."""
    import diffusers

    def call(
        module: Any, latents: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        batch = context.shape[0]
        predicted = module(
            hidden_states=latents.expand(batch, -1, -1, -1, -1),
            timestep=timestep.expand(batch),
            encoder_hidden_states=context,
            return_dict=False,
        )[0]
        return (predicted,)

    make: Any = diffusers.WanTransformer3DModel
    return make(**config), call


_BLOCK = r"blocks\.(\d+)"
_ATTENTION = {r"self_attn\.": "attn1.", r"cross_attn\.": "attn2."}
_PARTS = {
    **{rf"{letter}\.": f"to_{letter}." for letter in "qkv"},
    r"o\.": "to_out.0.", r"norm_q\.": "norm_q.", r"norm_k\.": "norm_k.",
}  # fmt: skip
_KIND = r"(weight|bias)"
_ORIGINAL = table(
    [
        *(
            (rf"{_BLOCK}\.{attention}{part}{_KIND}", rf"blocks.\1.{new}{inner}\2")
            for attention, new in _ATTENTION.items()
            for part, inner in _PARTS.items()
        ),
        # cross-attention's norm is the third in the file and the second in the class
        (rf"{_BLOCK}\.norm3\.{_KIND}", r"blocks.\1.norm2.\2"),
        (rf"{_BLOCK}\.ffn\.0\.{_KIND}", r"blocks.\1.ffn.net.0.proj.\2"),
        (rf"{_BLOCK}\.ffn\.2\.{_KIND}", r"blocks.\1.ffn.net.2.\2"),
        (rf"{_BLOCK}\.modulation", r"blocks.\1.scale_shift_table"),
        (rf"patch_embedding\.{_KIND}", r"patch_embedding.\1"),
        *(
            (rf"{old}\.{_KIND}", rf"condition_embedder.{new}.\1")
            for old, new in {
                r"time_embedding\.0": "time_embedder.linear_1", r"time_embedding\.2": "time_embedder.linear_2",
                r"text_embedding\.0": "text_embedder.linear_1", r"text_embedding\.2": "text_embedder.linear_2",
                r"time_projection\.1": "time_proj",
            }.items()
        ),
        (rf"head\.head\.{_KIND}", r"proj_out.\1"),
        ("head.modulation", "scale_shift_table"),
    ]
)  # fmt: skip
"""The names of Wan's own code."""

TRANSFORMER = Component(
    "diffusion",
    "diffusion model",
    ("model.diffusion_model.", "diffusion_model.", "transformer.", "net.", ""),
    (
        Naming("blocks.0.self_attn.q.weight", _ORIGINAL),
        Naming("blocks.0.attn2.norm_k.weight", same),
    ),
    _configure,
    build,
    "transformer",
)

# The family -----------------------------------------------------------------------------------------------------------


def recognizes(diffusion: Found) -> bool:
    """Not the models that take more than text and pictures."""
    others = any(OTHERS.search(name) for name in diffusion.checkpoint.tensors)
    return not others and "condition_embedder.time_proj.weight" in diffusion.tensors


def conditions(encode: Encode, prompt: Prompt) -> Conditions:
    """UMT5's hidden states (1, tokens, 4096), zeros for padding. HTML's entities are read and white space is one space,
    as in diffusers' pipeline."""
    text = " ".join(html.unescape(html.unescape(prompt.text)).split())
    tokens = t5_chunks(text, length=TOKENS, tokenizer=umt5_tokenizer())
    return {"context": joined(umt5.encode_chunks(encode, "t5xxl", tokens))}


def settings(found: Mapping[str, Found]) -> Defaults:
    """The shift is that of stable-diffusion.cpp; sizes, frames and guidance are those of diffusers' pipelines."""
    common: dict[str, Any] = {
        "sampler": "euler", "cfg_scale": 5.0, "prediction": "sd3_flow", "flow_shift": 5.0
    }  # fmt: skip
    if found["vae"].has("decoder.up_blocks.0.upsampler."):  # 2.2's own autoencoder: TI2V-5B
        return Defaults(size=(1280, 704), frames=121, fps=24, **common)
    return Defaults(size=(832, 480), frames=81, fps=16, **common)


WAN = Family(
    "wan",
    "Wan",
    (umt5.UMT5, TRANSFORMER, film.VAE),
    recognizes,
    conditions,
    Latents(scale=1.0, multiple=16, films=True),
    settings,
    (
        Joint("t5xxl", lambda c: c["t5xxl"]["d_model"], "diffusion", lambda c: c["diffusion"]["text_dim"]),
        Joint("vae", lambda c: c["vae"]["z_dim"], "diffusion", lambda c: c["diffusion"]["out_channels"]),
    ),
)
