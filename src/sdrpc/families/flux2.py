"""FLUX.2: klein (4B and 9B, whose text Qwen3 reads) and dev (whose text Mistral reads)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..prompts import Template, mistral_tokenizer, qwen_tokenizer
from ..prompts.byte_pairs import MISTRAL_PAD, QWEN_PAD
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
    References,
)
from .components import flux, llm, mistral, qwen3
from .components.autoencoder_flux2 import VAE
from .keys import same, table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .base import Call

TOKENS = 512
"""That every text is filled up to."""
AXES = 4
"""A position is the number of a picture, row, column, and place in the text."""
REFERENCE_NUMBERS = 10
"""Between the numbers of two pictures that the model is shown; the one that is drawn has 0."""

KLEIN_STATES, DEV_STATES = (9, 18, 27), (10, 20, 30)
"""Layers of the language models whose results are read."""
KLEIN_TEMPLATE = Template("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
DEV_TEMPLATE = Template(
    "<s>[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give structured responses focusing on "
    "object relationships, object\nattribution and actions without speculation.[/SYSTEM_PROMPT][INST]",
    "[/INST]",
)
DEV_IMAGE = "[IMG]"
"""A token that stands for a picture in Mistral's texts; in a prompt it stands for nothing."""

# The diffusion model --------------------------------------------------------------------------------------------------

_TIME = "time_guidance_embed"


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' Flux2Transformer2DModel."""
    config = flux.inferred(found)
    width, head = config["attention_head_dim"] * config["num_attention_heads"], config["attention_head_dim"]
    _, inner = found.shape("transformer_blocks.0.ff.linear_out.weight", 2)
    _, numbers = found.shape(f"{_TIME}.timestep_embedder.linear_1.weight", 2)
    config |= {
        "mlp_ratio": inner / width, "timestep_guidance_channels": numbers, "axes_dims_rope": [head // AXES] * AXES,
        "guidance_embeds": found.has(f"{_TIME}.guidance_embedder."),
    }  # fmt: skip
    return flux.merged(found, config, told, AXES)


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: latents (1 or batch, channels, height, width), timestep (1 or batch,) of 0 … 1, context (batch, tokens,
    joint_attention_dim), for models with guidance guidance (batch,), and the latents of pictures that the model is
    shown (batch, channels, …) in sizes of their own. Output: the velocity (batch, channels, height, width).

    A latent is a token. Text has positions (0, 0, 0, place), a picture (number, row, column, 0).
    """
    import diffusers
    import torch

    def call(
        module: Any,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        guidance: torch.Tensor | None = None,
        **references: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        batch, length = context.shape[:2]
        pictures = [latents.expand(batch, -1, -1, -1), *references.values()]
        places = [_places(REFERENCE_NUMBERS * n, *picture.shape[2:]) for n, picture in enumerate(pictures)]
        words = torch.zeros(length, AXES)
        words[:, 3] = torch.arange(length)
        predicted = module(
            hidden_states=torch.cat([picture.flatten(2).transpose(1, 2) for picture in pictures], 1),
            timestep=timestep.expand(batch),
            encoder_hidden_states=context,
            guidance=guidance,
            img_ids=torch.cat(places),
            txt_ids=words,
            return_dict=False,
        )[0]
        drawn = predicted[:, : len(places[0])].transpose(1, 2)
        return (drawn.reshape(batch, -1, *latents.shape[2:]),)

    make: Any = diffusers.Flux2Transformer2DModel
    return make(**config), call


def _places(number: int, height: int, width: int) -> torch.Tensor:
    """The position of each latent of a picture: (height · width, 4)."""
    import torch

    found = torch.zeros(height, width, AXES)
    found[..., 0] = number
    found[..., 1] += torch.arange(height)[:, None]
    found[..., 2] += torch.arange(width)[None]
    return found.reshape(height * width, AXES)


_LINEAR = {
    **{
        rf"{old}_in\.{layer}_layer": f"{_TIME}.{new}_embedder.linear_{number}"
        for old, new in (("time", "timestep"), ("guidance", "guidance"))
        for number, layer in enumerate(("in", "out"), 1)
    },
    **{
        rf"{name}\.lin": f"{name}.linear"
        for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    },
    **{
        rf"{flux.DOUBLE}\.{stream}_mlp\.{number}": f"{flux.DOUBLES}.{block}.linear_{layer}"
        for stream, block in (("img", "ff"), ("txt", "ff_context"))
        for number, layer in ((0, "in"), (2, "out"))
    },
    rf"{flux.SINGLE}\.linear1": f"{flux.SINGLES}.attn.to_qkv_mlp_proj",
    rf"{flux.SINGLE}\.linear2": f"{flux.SINGLES}.attn.to_out",
}
_ORIGINAL = table([*flux.COMMON, *flux.linear(_LINEAR), *flux.LAST_NORM])
"""Black Forest Labs' names."""

TRANSFORMER = Component(
    "diffusion",
    "diffusion model",
    flux.PREFIXES,
    (
        Naming("double_stream_modulation_img.lin.weight", _ORIGINAL),
        Naming("double_stream_modulation_img.linear.weight", same),
    ),
    _configure,
    build,
    "transformer",
    blocks=flux.BLOCKS,
)

# The families ---------------------------------------------------------------------------------------------------------


def recognizes_klein(diffusion: Found) -> bool:
    """What was distilled with guidance is dev."""
    return "x_embedder.weight" in diffusion.tensors and not recognizes_dev(diffusion)


def recognizes_dev(diffusion: Found) -> bool:
    return f"{_TIME}.guidance_embedder.linear_1.weight" in diffusion.tensors


def klein_conditions(encode: Encode, prompt: Prompt) -> Conditions:
    """Hidden states of three of Qwen3's layers, side by side, of 512 tokens (1, 512, 3 · hidden_size)."""
    padding = llm.Padding(QWEN_PAD, TOKENS)
    text = prompt.text
    return {"context": llm.padded_hidden_states(encode, text, KLEIN_TEMPLATE, qwen_tokenizer, KLEIN_STATES, padding)}


def dev_conditions(encode: Encode, prompt: Prompt) -> Conditions:
    """Hidden states of three of Mistral's layers, side by side, of 512 tokens (1, 512, 3 · hidden_size), the text at
    their end; and the guidance (1,)."""
    padding = llm.Padding(MISTRAL_PAD, TOKENS, left=True)
    text = prompt.text.replace(DEV_IMAGE, "")
    return {
        "context": llm.padded_hidden_states(encode, text, DEV_TEMPLATE, mistral_tokenizer, DEV_STATES, padding),
        "guidance": np.array([prompt.guidance], np.float32),
    }


def klein_settings(found: Mapping[str, Found]) -> Defaults:
    """Distilled to four steps without guidance. klein base has the same tensors, and is told by its directory alone,
    which says so: it draws as its authors recommend."""
    common: dict[str, Any] = {"size": 1024, "sampler": "euler", "prediction": "flux2_flow"}
    if found["diffusion"].checkpoint.configs.get("", {}).get("is_distilled") is False:
        return Defaults(steps=50, cfg_scale=4.0, **common)
    return Defaults(steps=4, cfg_scale=1.0, **common)


def dev_settings(_: Mapping[str, Found]) -> Defaults:
    """As its authors recommend, with fewer steps of theirs."""
    return Defaults(size=1024, sampler="euler", steps=28, cfg_scale=1.0, guidance=4.0, prediction="flux2_flow")


_JOINTS = (
    Joint(llm.NAME, lambda c: 3 * c[llm.NAME]["hidden_size"], "diffusion", flux.takes("joint_attention_dim")),
    Joint("vae", lambda c: VAE.channels(c["vae"]), "diffusion", flux.takes("in_channels")),
)
_LATENTS = Latents(scale=1.0, multiple=16)

FLUX2_KLEIN = Family(
    "flux2-klein",
    "FLUX.2 klein",
    (llm.reading(qwen3.QWEN3, *KLEIN_STATES), TRANSFORMER, VAE),
    recognizes_klein,
    klein_conditions,
    _LATENTS,
    klein_settings,
    _JOINTS,
    references=References(),
)
FLUX2_DEV = Family(
    "flux2",
    "FLUX.2 dev",
    (llm.reading(mistral.MISTRAL, *DEV_STATES), TRANSFORMER, VAE),
    recognizes_dev,
    dev_conditions,
    _LATENTS,
    dev_settings,
    _JOINTS,
    references=References(),
)
