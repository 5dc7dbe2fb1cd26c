"""FLUX.1: dev (distilled with guidance), schnell, Krea-dev."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoints.expressions import split, swap_halves
from ..ggml.weight import Weight
from ..prompts import clip_chunks, t5_chunks
from . import configs
from .base import Component, Conditions, Config, Defaults, Encode, Family, Found, Joint, Latents, Naming, Prompt, joined
from .base import Weights as Tensors
from .components import clip, t5
from .components.autoencoder import VAE
from .keys import same, table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .base import Call

PATCH = 2
"""Latents on a side that make one token."""
INPUTS = {384: "FLUX.1 Fill", 128: "FLUX.1 Canny or Depth"}
"""Other members of the family, by the width of their input."""
T5_TOKENS = 256
"""In a chunk, as in stable-diffusion.cpp."""

# The diffusion model --------------------------------------------------------------------------------------------------


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' FluxTransformer2DModel."""
    inner, inputs = found.shape("x_embedder.weight", 2)
    outputs, _ = found.shape("proj_out.weight", 2)
    if inputs in INPUTS and inputs != outputs:
        raise found.error(f"this is {INPUTS[inputs]}; it is not supported")
    _, context = found.shape("context_embedder.weight", 2)
    _, pooled = found.shape("time_text_embed.text_embedder.linear_1.weight", 2)
    (head,) = found.shape("transformer_blocks.0.attn.norm_q.weight", 1)
    if inner % head:
        raise found.error(f"heads of {head} do not divide its width of {inner}")
    inferred = {
        "patch_size": 1, "in_channels": inputs, "out_channels": outputs,
        "num_layers": found.count("transformer_blocks."),
        "num_single_layers": found.count("single_transformer_blocks."),
        "attention_head_dim": head, "num_attention_heads": inner // head, "joint_attention_dim": context,
        "pooled_projection_dim": pooled, "guidance_embeds": found.has("time_text_embed.guidance_embedder."),
        "axes_dims_rope": _axes(head),
    }  # fmt: skip
    config = configs.merged(found, inferred, told, ("axes_dims_rope",))
    if sum(config["axes_dims_rope"]) != head:
        raise found.error(f"axes_dims_rope {config['axes_dims_rope']} is no division of heads of {head}")
    return config


def _axes(head: int) -> list[int]:
    """How positions (text, row, column) share a head: 16, 56, 56 of 128, all even."""
    rows = head * 7 // 16 // 2 * 2
    return [head - 2 * rows, rows, rows]


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: latents (1 or batch, channels, height, width), timestep (1 or batch,) of 0 … 1, context (batch, tokens,
    4096), pooled (batch, 768), and for models with guidance guidance (batch,). Output: the velocity (batch, channels,
    height, width).

    2×2 latents are a token; text has position (0, 0, 0), a token of the picture (0, row, column).
    """
    import diffusers
    import torch

    def call(
        module: Any,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        pooled: torch.Tensor,
        guidance: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        _, channels, height, width = latents.shape
        batch = context.shape[0]
        latents, timestep = latents.expand(batch, -1, -1, -1), timestep.expand(batch)
        rows, columns = height // PATCH, width // PATCH
        tokens = latents.reshape(batch, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
        places = torch.zeros(rows, columns, 3)
        places[..., 1] += torch.arange(rows)[:, None]
        places[..., 2] += torch.arange(columns)[None]
        predicted = module(
            hidden_states=tokens.reshape(batch, rows * columns, channels * PATCH * PATCH),
            timestep=timestep,
            encoder_hidden_states=context,
            pooled_projections=pooled,
            guidance=guidance,
            img_ids=places.reshape(rows * columns, 3),
            txt_ids=torch.zeros(context.shape[1], 3),
            return_dict=False,
        )[0]
        squares = predicted.reshape(batch, rows, columns, channels, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        return (squares.reshape(batch, channels, height, width),)

    make: Any = diffusers.FluxTransformer2DModel
    return make(**config), call


def _thirds(weight: Weight) -> tuple[Weight, ...]:
    return split(weight, [weight.shape[0] // 3] * 3)


def _swapped(weight: Weight) -> tuple[Weight, ...]:
    return (swap_halves(weight),)


def _qkv(kinds: tuple[str, ...], source: str, target: str, names: tuple[str, str, str]) -> list[Any]:
    return [(rf"{source}\.{kind}", [rf"{target}.{name}.{kind}" for name in names], _thirds) for kind in kinds]


_BOTH = ("weight", "bias")
_DOUBLE, _SINGLE = r"double_blocks\.(\d+)", r"single_blocks\.(\d+)"
_DOUBLES, _SINGLES = r"transformer_blocks.\1", r"single_transformer_blocks.\1"
_EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
_LINEAR = {
    rf"{_DOUBLE}\.img_mod\.lin": f"{_DOUBLES}.norm1.linear",
    rf"{_DOUBLE}\.txt_mod\.lin": f"{_DOUBLES}.norm1_context.linear",
    rf"{_DOUBLE}\.img_mlp\.0": f"{_DOUBLES}.ff.net.0.proj",
    rf"{_DOUBLE}\.img_mlp\.2": f"{_DOUBLES}.ff.net.2",
    rf"{_DOUBLE}\.txt_mlp\.0": f"{_DOUBLES}.ff_context.net.0.proj",
    rf"{_DOUBLE}\.txt_mlp\.2": f"{_DOUBLES}.ff_context.net.2",
    rf"{_DOUBLE}\.img_attn\.proj": f"{_DOUBLES}.attn.to_out.0",
    rf"{_DOUBLE}\.txt_attn\.proj": f"{_DOUBLES}.attn.to_add_out",
    rf"{_SINGLE}\.modulation\.lin": f"{_SINGLES}.norm.linear",
    rf"{_SINGLE}\.linear2": f"{_SINGLES}.proj_out",
    "txt_in": "context_embedder", "img_in": "x_embedder", r"final_layer\.linear": "proj_out",
} | {
    rf"{old}\.{layer}_layer": f"time_text_embed.{new}.linear_{number}"
    for old, new in _EMBEDDERS.items()
    for number, layer in enumerate(("in", "out"), 1)
}  # fmt: skip


def _single(weight: Weight) -> tuple[Weight, ...]:
    """A single block's first matrix makes queries, keys, values (as wide as the model) and the MLP's input (four times
    as wide)."""
    width = weight.shape[0] // 7
    return split(weight, [width, width, width, weight.shape[0] - 3 * width])


_ORIGINAL = table(
    [
        *((rf"{old}\.(weight|bias)", rf"{new}.\{old.count('(') + 1}") for old, new in _LINEAR.items()),
        *_qkv(_BOTH, rf"{_DOUBLE}\.img_attn\.qkv", f"{_DOUBLES}.attn", ("to_q", "to_k", "to_v")),
        *_qkv(_BOTH, rf"{_DOUBLE}\.txt_attn\.qkv", f"{_DOUBLES}.attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
        *(
            (
                rf"{_SINGLE}\.linear1\.{kind}",
                [
                    rf"{_SINGLES}.{name}.{kind}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
                ],
                _single,
            )
            for kind in _BOTH
        ),
        *(
            (rf"{_DOUBLE}\.{stream}_attn\.norm\.{old}_norm\.(?:scale|weight)", f"{_DOUBLES}.attn.{new}.weight")
            for stream, old, new in (
                ("img", "query", "norm_q"), ("img", "key", "norm_k"),
                ("txt", "query", "norm_added_q"), ("txt", "key", "norm_added_k"),
            )
        ),
        *(
            (rf"{_SINGLE}\.norm\.{old}_norm\.(?:scale|weight)", f"{_SINGLES}.attn.{new}.weight")
            for old, new in (("query", "norm_q"), ("key", "norm_k"))
        ),
        *((rf"final_layer\.adaLN_modulation\.1\.{kind}", f"norm_out.linear.{kind}", _swapped) for kind in _BOTH),
    ]
)  # fmt: skip
"""Black Forest Labs' names. Its final layer gives shift and scale, diffusers' scale and shift."""


def _original(weights: Tensors) -> dict[str, Weight]:
    return _ORIGINAL(weights)


TRANSFORMER = Component(
    "diffusion",
    "diffusion model",
    ("model.diffusion_model.", "diffusion_model.", "transformer.", "net.", ""),
    (
        Naming("double_blocks.0.img_attn.qkv.weight", _original),
        Naming("single_transformer_blocks.0.proj_mlp.weight", same),
    ),
    _configure,
    build,
    "transformer",
)

# The family -----------------------------------------------------------------------------------------------------------


def recognizes(diffusion: Found) -> bool:
    """Not Chroma, whose blocks have no modulation of their own."""
    return "transformer_blocks.0.norm1.linear.weight" in diffusion.tensors


def conditions(encode: Encode, prompt: Prompt) -> Conditions:
    """T5's hidden states (1, tokens, 4096), CLIP-L's pooled text without a projection (1, 768), and the guidance (1,)
    of models that were distilled with it."""
    context = joined(t5.encode_chunks(encode, "t5xxl", t5_chunks(prompt.text, length=T5_TOKENS)))
    length = encode.config("clip_l")["max_position_embeddings"]
    told = {"context": context, "pooled": clip.pooled(encode, "clip_l", clip_chunks(prompt.text, length=length))}
    if encode.config("diffusion")["guidance_embeds"]:
        told["guidance"] = np.array([prompt.guidance], np.float32)
    return told


def settings(found: Mapping[str, Found]) -> Defaults:
    """schnell was distilled to four steps; its shift of 1 is stable-diffusion.cpp's. dev's follows from the size."""
    common: dict[str, Any] = {
        "size": 1024, "sampler": "euler", "cfg_scale": 1.0, "prediction": "flux_flow"
    }  # fmt: skip
    if found["diffusion"].has("time_text_embed.guidance_embedder."):
        return Defaults(**common)
    return Defaults(steps=4, flow_shift=1.0, **common)


def _takes(key: str) -> Callable[[Mapping[str, Config]], int]:
    return lambda configs: int(configs["diffusion"][key])


FLUX1 = Family(
    "flux1",
    "FLUX.1",
    (clip.CLIP_L, t5.T5, TRANSFORMER, VAE),
    recognizes,
    conditions,
    Latents(scale=0.3611, shift=0.1159, multiple=16),
    settings,
    (
        Joint("t5xxl", lambda c: c["t5xxl"]["d_model"], "diffusion", _takes("joint_attention_dim")),
        Joint("clip_l", lambda c: c["clip_l"]["hidden_size"], "diffusion", _takes("pooled_projection_dim")),
        Joint("vae", lambda c: c["vae"]["latent_channels"] * PATCH**2, "diffusion", _takes("out_channels")),
    ),
)
