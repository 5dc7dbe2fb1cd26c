"""FLUX.1: dev (distilled with guidance), schnell, Krea-dev, Kontext (is shown pictures), Fill (for inpainting)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..prompts import clip_chunks, t5_chunks
from . import colours
from .base import (
    CONTROL,
    F32,
    REFERENCE,
    Component,
    Conditions,
    Config,
    Defaults,
    Encode,
    Family,
    Found,
    Inpainting,
    Joint,
    Latents,
    Naming,
    Prompt,
    References,
    joined,
)
from .components import clip, flux, flux_control, t5
from .components.autoencoder import VAE
from .keys import same, table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .base import Call

INPUTS = {128: "FLUX.1 Canny or Depth"}
"""Other members of the family, by the width of their input."""
MASK_PIXELS = 64
"""Of a mask that Fill is shown with each latent: 8×8."""
T5_TOKENS = 256
"""In a chunk, as in stable-diffusion.cpp."""

# The diffusion model --------------------------------------------------------------------------------------------------


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' FluxTransformer2DModel."""
    config = flux.inferred(found)
    inputs = config["in_channels"]
    if inputs in INPUTS and inputs != config["out_channels"]:
        raise found.error(f"this is {INPUTS[inputs]}; it is not supported")
    _, pooled = found.shape("time_text_embed.text_embedder.linear_1.weight", 2)
    config |= {
        "pooled_projection_dim": pooled, "guidance_embeds": found.has("time_text_embed.guidance_embedder."),
    }  # fmt: skip
    return flux.merged(found, config, told)


def fills(config: Config) -> bool:
    """Whether it is FLUX.1 Fill: it is shown, beside latents, other ones and a mask."""
    shown = config["in_channels"] - config["out_channels"]
    return bool(shown == config["out_channels"] + MASK_PIXELS * flux.PATCH**2)


def _around(mask: F32, latents: F32) -> F32:
    """The latents, then the mask's pixels in the place of each: (1, channels + 64, h, w)."""
    _, _, height, width = latents.shape
    pixels = mask.shape[2] // height
    squares = mask.reshape(1, height, pixels, width, pixels).transpose(0, 2, 4, 1, 3)
    return np.concatenate([latents, squares.reshape(1, pixels * pixels, height, width)], 1)


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: latents (1 or batch, channels, height, width), timestep (1 or batch,) of 0 … 1, context (batch, tokens,
    4096), pooled (batch, 768); for models with guidance guidance (batch,), for Fill around (batch, channels + 64,
    height, width), for Kontext the latents of reference pictures (batch, channels, …) in sizes of their own; control_0
    … what a ControlNet gives, in its order (:data:`.components.flux_control.GIVEN` says what). Output: the velocity
    (batch, channels, height, width).

    2×2 latents are a token; text has position (0, 0, 0), a token of the picture (0, row, column), one of a reference
    (1, row, column).
    """
    import diffusers
    import torch

    config = dict(config)
    given = config.pop(flux_control.GIVEN, None)

    def call(
        module: Any,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        pooled: torch.Tensor,
        guidance: torch.Tensor | None = None,
        around: torch.Tensor | None = None,
        **others: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        height, width = latents.shape[2:]
        batch = context.shape[0]
        shown = [picture for name, picture in others.items() if name.startswith(REFERENCE)]
        corners = flux.beside([(reference.shape[2], reference.shape[3]) for reference in shown])
        latents = latents.expand(batch, -1, -1, -1)
        pictures = [latents if around is None else torch.cat((latents, around), 1), *shown]
        places = [flux.places(height, width)]
        places += [
            flux.places(r.shape[2], r.shape[3], 1, top, left) for r, (top, left) in zip(shown, corners, strict=True)
        ]
        predicted = module(
            hidden_states=torch.cat([flux.to_tokens(picture) for picture in pictures], 1),
            timestep=timestep.expand(batch),
            encoder_hidden_states=context,
            pooled_projections=pooled,
            guidance=guidance,
            img_ids=torch.cat(places),
            txt_ids=torch.zeros(context.shape[1], 3),
            return_dict=False,
            **flux_control.added(given, [others[f"{CONTROL}{n}"] for n in range(len(others) - len(shown))]),
        )[0]
        return (flux.to_latents(predicted[:, : len(places[0])], height, width),)

    make: Any = diffusers.FluxTransformer2DModel
    return make(**config), call


_ORIGINAL = table([*flux.RULES, *flux.MODULATION, *flux.LAST_NORM])
"""Black Forest Labs' names."""


TRANSFORMER = Component(
    "diffusion",
    "diffusion model",
    flux.PREFIXES,
    (
        Naming("double_blocks.0.img_attn.qkv.weight", _ORIGINAL),
        Naming("single_transformer_blocks.0.proj_mlp.weight", same),
    ),
    _configure,
    build,
    "transformer",
    blocks=flux.BLOCKS,
)

# The family -----------------------------------------------------------------------------------------------------------


def recognizes(diffusion: Found) -> bool:
    """Not Chroma, whose blocks have no modulation of their own, nor a ControlNet, which gives no picture."""
    return {"transformer_blocks.0.norm1.linear.weight", "proj_out.weight"} <= diffusion.tensors.keys()


def conditions(encode: Encode, prompt: Prompt) -> Conditions:
    """T5's hidden states (1, tokens, 4096), CLIP-L's pooled text without a projection (1, 768), and the guidance (1,)
    of models that were distilled with it."""
    context = joined(t5.encode_chunks(encode, "t5xxl", t5_chunks(prompt.text, length=T5_TOKENS)))
    length = encode.config("clip_l")["max_position_embeddings"]
    pooled = clip.pooled(encode, "clip_l", clip_chunks(prompt.text, length=length, breaks=False))
    told = {"context": context, "pooled": pooled}
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


FLUX1 = Family(
    "flux1",
    "FLUX.1",
    (clip.CLIP_L, t5.T5, flux_control.CONTROLNET, TRANSFORMER, VAE),
    recognizes,
    conditions,
    Latents(scale=0.3611, shift=0.1159, multiple=16, colours=colours.FLUX1),
    settings,
    (
        Joint("t5xxl", lambda c: c["t5xxl"]["d_model"], "diffusion", flux.takes("joint_attention_dim")),
        Joint("clip_l", lambda c: c["clip_l"]["hidden_size"], "diffusion", flux.takes("pooled_projection_dim")),
        *flux_control.JOINTS,
        Joint("vae", lambda c: c["vae"]["latent_channels"] * flux.PATCH**2, "diffusion", flux.takes("out_channels")),
    ),
    references=References(),
    inpainting=Inpainting(fills, _around),
    controls=flux_control.CONTROLS,
    optional=frozenset({"control"}),
)
