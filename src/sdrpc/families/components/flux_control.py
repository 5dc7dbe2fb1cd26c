"""ControlNets for FLUX.1: diffusers' FluxControlNetModel.

A few blocks like the transformer's, which are shown a picture (edges, depth, poses …) and give what is added behind the
transformer's. InstantX's and Shakker's are shown the picture as latents; those for several kinds of pictures (Union)
are told by a number which it is. XLabs' have layers of their own that read pixels, and the original code's names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any

from .. import configs
from ..base import Component, Config, Controls, Found, Joint, Naming
from ..keys import same, table
from . import flux
from .controlnet import COLOURS, hint_rules

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call

HINT = "input_hint_block"
"""The layers that read pixels, where there are such."""
PIXELS = 8
"""On a side, that they make one of."""
GIVEN = "control"
"""Of the transformer's configuration, added to it for a ControlNet: how many outputs are added to the blocks for two
streams and to those for one, and whether the first ones are dealt out in turn (XLabs) or in runs."""


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' FluxControlNetModel."""
    inner, inputs = found.shape("x_embedder.weight", 2)
    _, context = found.shape("context_embedder.weight", 2)
    _, pooled = found.shape("time_text_embed.text_embedder.linear_1.weight", 2)
    (head,) = found.shape("transformer_blocks.0.attn.norm_q.weight", 1)
    if inner % head:
        raise found.error(f"heads of {head} do not divide its width of {inner}")
    kinds = found.shape("controlnet_mode_embedder.weight", 2)[0] if found.has("controlnet_mode_embedder.") else None
    inferred = {
        "patch_size": 1, "in_channels": inputs, "num_layers": found.count("controlnet_blocks."),
        "num_single_layers": found.count("controlnet_single_blocks."), "attention_head_dim": head,
        "num_attention_heads": inner // head, "joint_attention_dim": context, "pooled_projection_dim": pooled,
        "guidance_embeds": found.has("time_text_embed.guidance_embedder."), "axes_dims_rope": configs.axes(head, 7, 16),
        "num_mode": kinds, "conditioning_embedding_channels": None,
    }  # fmt: skip
    if found.has(f"{HINT}."):
        _, seen, *_ = found.shape(f"{HINT}.conv_in.weight", 4)
        if seen != COLOURS:
            raise found.error(f"it is shown pictures of {seen} channels, not {COLOURS}")
        read, *_ = found.shape(f"{HINT}.conv_out.weight", 4)
        side = isqrt(inputs // read)
        if side * side * read != inputs:
            raise found.error(f"{read} channels of a picture do not make the {inputs} of a token")
        inferred |= {"patch_size": side, "conditioning_embedding_channels": read}
    return flux.merged(found, inferred, told)


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: strength (1,), picture (1, channels, height, width) as latents, or (1, 3, 8 · height, 8 · width) of
    0 … 1; latents (1, channels, height, width), timestep (1,) of 0 … 1, context (batch, tokens, width), pooled (batch,
    width), where it has guidance guidance (batch,), and of those for several kinds of pictures mode, int32 (1,).
    Outputs, strength in them: (batch, height · width / 4, width) for each of its blocks."""
    import diffusers
    import torch

    def call(
        module: Any,
        strength: torch.Tensor,
        picture: torch.Tensor,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        pooled: torch.Tensor,
        guidance: torch.Tensor | None = None,
        mode: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        batch, (height, width) = context.shape[0], latents.shape[2:]
        shown = flux.to_tokens(picture) if _sees_latents(config) else picture * 2 - 1
        doubles, singles = module(
            hidden_states=flux.to_tokens(latents).expand(batch, -1, -1),
            controlnet_cond=shown,
            controlnet_mode=None if mode is None else mode[None].expand(batch, -1),
            timestep=timestep.expand(batch),
            encoder_hidden_states=context,
            pooled_projections=pooled,
            guidance=guidance,
            img_ids=flux.places(height, width),
            txt_ids=torch.zeros(context.shape[1], 3),
            return_dict=False,
        )
        return tuple(each * strength for each in (*(doubles or ()), *(singles or ())))

    make: Any = diffusers.FluxControlNetModel
    return make(**config), call


def added(given: Sequence[Any] | None, outputs: Sequence[torch.Tensor]) -> dict[str, Any]:
    """What the transformer is given of a ControlNet's outputs, as :data:`GIVEN` says; nothing where there is none."""
    if given is None:
        return {}
    doubles, _, in_turn = given
    return {
        "controlnet_block_samples": list(outputs[:doubles]) or None,
        "controlnet_single_block_samples": list(outputs[doubles:]) or None,
        "controlnet_blocks_repeat": in_turn,
    }


def _sees_latents(config: Config) -> bool:
    return config["conditioning_embedding_channels"] is None


def _reads(config: Config) -> tuple[str, ...]:
    told = ("latents", "timestep", "context", "pooled")
    return (*told, "guidance") if config["guidance_embeds"] else told


def _given(config: Config) -> dict[str, Any]:
    return {GIVEN: [config["num_layers"], config["num_single_layers"], not _sees_latents(config)]}


CONTROLS = Controls(_reads, _sees_latents, lambda config: config["num_mode"] or 0, _given)

_XLABS = table(
    [
        *flux.RULES,
        *flux.MODULATION,
        *hint_rules(HINT),
        *flux.linear(
            {"pos_embed_input": "controlnet_x_embedder", r"controlnet_blocks\.(\d+)": r"controlnet_blocks.\1"}
        ),
    ]
)

CONTROLNET = Component(
    "control",
    "ControlNet",
    ("controlnet.", ""),
    (Naming("pos_embed_input.weight", _XLABS), Naming("controlnet_x_embedder.weight", same)),
    _configure,
    build,
    "controlnet",
)


def _text(configs: Mapping[str, Config]) -> int:
    return int(configs["control"]["joint_attention_dim"])


def _width(config: Config) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])


JOINTS = (
    Joint("control", _text, "diffusion", flux.takes("joint_attention_dim"), "channels of text"),
    Joint("control", lambda c: _width(c["control"]), "diffusion", lambda c: _width(c["diffusion"])),
    Joint(
        "control", lambda c: int(c["control"]["guidance_embeds"]), "diffusion",
        lambda c: int(c["control"]["guidance_embeds"] and c["diffusion"]["guidance_embeds"]), "guidance",
    ),
)  # fmt: skip
"""What a ControlNet and its transformer have in common."""
