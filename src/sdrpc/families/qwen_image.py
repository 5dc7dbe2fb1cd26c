"""Qwen-Image and Qwen-Image-Edit (2509, 2511): 60 blocks of picture and text side by side; Qwen2.5-VL reads the prompt
and, of models that are shown pictures, sees these as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InvalidValue
from ..prompts import Template, qwen_tokenizer
from . import configs
from .base import (
    F32,
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
from .components import film, flux, llm, qwen25_vision
from .components.qwen25 import QWEN25
from .keys import same

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .base import Call

PATCH = flux.PATCH
TIMESTEPS = 1000
TOKENS = 1024
"""Of a text, at most, as in diffusers."""
TEMPLATE = Template(
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
)
HIDDEN = 34
"""Tokens of the template before the text, which the diffusion model is not told."""
EDITING = Template(
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where "
    "appropriate.<|im_end|>\n<|im_start|>user\n",
    TEMPLATE.after,
)
HIDDEN_EDITING = 64
"""The same of a request that refers to pictures."""
SEEN_PIXELS, DRAWN_PIXELS = 384**2, 1024**2
"""Of a picture that Qwen2.5-VL sees, and of what is drawn of it, about."""
MULTIPLE = 32
"""Of their sides, and of those of pictures that the diffusion model is shown."""

# The diffusion model --------------------------------------------------------------------------------------------------

ZERO_TIMESTEP = "__index_timestep_zero__"
"""A tensor that says, by being there, that pictures which are shown have the timestep 0: Qwen-Image-Edit-2511."""


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' QwenImageTransformer2DModel."""
    if found.has("time_text_embed.addition_t_embedding."):
        raise found.error("this is Qwen-Image-Layered; it is not supported")
    inner, inputs = found.shape("img_in.weight", 2)
    outputs, _ = found.shape("proj_out.weight", 2)
    _, text = found.shape("txt_in.weight", 2)
    (head,) = found.shape("transformer_blocks.0.attn.norm_q.weight", 1)
    if inner % head or outputs % PATCH**2:
        raise found.error(f"a width of {inner} with heads of {head} and tokens of {outputs} numbers makes no sense")
    inferred = {
        "patch_size": PATCH, "in_channels": inputs, "out_channels": outputs // PATCH**2,
        "num_layers": found.count("transformer_blocks."), "attention_head_dim": head,
        "num_attention_heads": inner // head, "joint_attention_dim": text, "axes_dims_rope": configs.axes(head, 7, 16),
        "zero_cond_t": ZERO_TIMESTEP in found.tensors or told.get("zero_cond_t") is True,
    }  # fmt: skip
    config = configs.merged(found, inferred, told, ("axes_dims_rope",))
    configs.check_axes(found, config, "axes_dims_rope", head)
    return config


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: latents (1 or batch, channels, height, width), timestep (1 or batch,) of 0 … 1000, context (batch,
    tokens, 3584), and the latents of pictures that the model is shown (batch, channels, …) in sizes of their own.
    Output: the velocity (batch, channels, height, width)."""
    import diffusers
    import torch

    def call(
        module: Any,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        **references: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        batch = context.shape[0]
        pictures = [latents.expand(batch, -1, -1, -1), *references.values()]
        shapes = [(1, picture.shape[2] // PATCH, picture.shape[3] // PATCH) for picture in pictures]
        predicted = module(
            hidden_states=torch.cat([flux.to_tokens(picture) for picture in pictures], 1),
            timestep=timestep.expand(batch) / TIMESTEPS,
            encoder_hidden_states=context,
            img_shapes=[shapes] * batch,
            return_dict=False,
        )[0]
        height, width = latents.shape[2:]
        return (flux.to_latents(predicted[:, : shapes[0][1] * shapes[0][2]], height, width),)

    make: Any = diffusers.QwenImageTransformer2DModel
    return make(**config), call


TRANSFORMER = Component(
    "diffusion",
    "diffusion model",
    flux.PREFIXES,
    (Naming("transformer_blocks.0.img_mod.1.weight", same),),
    _configure,
    build,
    "transformer",
    idle=(ZERO_TIMESTEP,),
    blocks={"transformer_blocks": "num_layers"},
)
"""Files have the names of diffusers' class."""

# The family -----------------------------------------------------------------------------------------------------------


def recognizes(diffusion: Found) -> bool:
    """Not its ControlNets, which give no picture."""
    return {"txt_norm.weight", "proj_out.weight"} <= diffusion.tensors.keys()


def conditions(encode: Encode, prompt: Prompt) -> Conditions:
    """Hidden states behind Qwen2.5-VL's final norm (1, tokens, 3584), of the text with its pictures before it, without
    those of the template before these. Raises :class:`InvalidValue` for a text that is too long."""
    layers, seen = encode.config(llm.NAME)["num_hidden_layers"], qwen25_vision.see(encode)
    shown = "".join(f"Picture {number}: {each.text}" for number, each in enumerate(seen, 1))
    template, hidden = (Template(EDITING.before + shown, EDITING.after), HIDDEN_EDITING) if seen else (TEMPLATE, HIDDEN)
    among = qwen25_vision.among(seen)
    context = llm.hidden_states(encode, prompt.text, template, qwen_tokenizer, [layers], among)[:, hidden:]
    words = context.shape[1] - sum(len(each.tokens) for each in seen)
    if words > TOKENS:
        reason = f"has {words} tokens with the end of its template; Qwen-Image reads {TOKENS}"
        raise InvalidValue("negative_prompt" if prompt.negative else "prompt", prompt.text, reason)
    return {"context": context}


def seen_size(width: int, height: int) -> tuple[int, int]:
    """Of what Qwen2.5-VL sees of a picture, as by diffusers' pipeline and transformers' processor in turn."""
    return qwen25_vision.processed_size(*qwen25_vision.size(width, height, SEEN_PIXELS, MULTIPLE))


def drawn_size(width: int, height: int) -> tuple[int, int]:
    """Of what is drawn of a picture, as by diffusers' pipeline."""
    return qwen25_vision.size(width, height, DRAWN_PIXELS, MULTIPLE)


def tempered(guided: F32, positive: F32) -> F32:
    """Guidance changes the direction of what is predicted for a token (2×2 latents), not its length, as in diffusers'
    pipeline, which is the model's own."""
    now, before = _lengths(guided), _lengths(positive)
    return guided * np.divide(before, now, out=np.ones_like(now), where=now > 0)


def _lengths(predicted: F32) -> F32:
    """Of each token (1, channels, height, width) at all of its latents (1, 1, height, width)."""
    batch, channels, height, width = predicted.shape
    squares = np.square(predicted).reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    lengths: F32 = np.sqrt(squares.sum(axis=(1, 3, 5)))[:, None]
    return lengths.repeat(PATCH, axis=2).repeat(PATCH, axis=3)


def settings(_: Mapping[str, Found]) -> Defaults:
    """The shift is stable-diffusion.cpp's, size and guidance are those of the authors' examples."""
    return Defaults(size=1328, sampler="euler", cfg_scale=4.0, prediction="sd3_flow", flow_shift=3.0)


QWEN_IMAGE = Family(
    "qwen-image",
    "Qwen-Image",
    (qwen25_vision.VISION, QWEN25, TRANSFORMER, film.VAE),
    recognizes,
    conditions,
    Latents(scale=1.0, multiple=16),
    settings,
    (
        Joint(
            llm.NAME, lambda c: c[llm.NAME]["hidden_size"], "diffusion", lambda c: c["diffusion"]["joint_attention_dim"]
        ),
        Joint(
            qwen25_vision.NAME, lambda c: c[qwen25_vision.NAME]["out_hidden_size"], llm.NAME,
            lambda c: c[llm.NAME]["hidden_size"],
        ),
        Joint("vae", lambda c: c["vae"]["z_dim"] * PATCH**2, "diffusion", lambda c: c["diffusion"]["in_channels"]),
    ),
    optional=frozenset({qwen25_vision.NAME}),
    references=References(MULTIPLE, seen_size, qwen25_vision.NAME, drawn_size),
    tempered=tempered,
)  # fmt: skip
