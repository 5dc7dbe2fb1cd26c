"""ControlNets for the UNets of Stable Diffusion 1.x, 2.x and XL: diffusers' ControlNetModel.

A copy of the UNet's way down, which is shown a picture (edges, depth, poses …) and gives what is added to what the UNet
carries over to its way up. Files have diffusers' names or those of the original code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...ggml.weight import Weight
from ..base import Component, Config, Controls, Found, Joint, Naming, Weights
from ..keys import Rule, same, table
from . import unet

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call

HINT = "controlnet_cond_embedding"
"""The layers that read the picture."""


CONTROLS = Controls(reads=lambda _: ("latents", "timestep", "context", "pooled", "sizes"))


def controlnet(heads: unet.Heads) -> Component:
    """The component of a family whose UNets have such ``heads``."""

    def configure(found: Found, told: Config) -> dict[str, Any]:
        return _configure(found, told, heads)

    return Component(
        "control",
        "ControlNet",
        ("control_model.", "controlnet.", ""),
        (Naming("input_hint_block.0.weight", _from_original), Naming(f"{HINT}.conv_in.weight", same)),
        configure,
        build,
        "controlnet",
    )


def _configure(found: Found, told: Config, heads: unet.Heads) -> dict[str, Any]:
    """Arguments of diffusers' ControlNetModel."""
    if found.has("control_add_embedding.") or found.has("task_embedding"):
        raise found.error("this is a ControlNet for several kinds of pictures (Union); it is not supported")
    first, seen, *_ = found.shape(f"{HINT}.conv_in.weight", 4)
    if seen != COLOURS:
        raise found.error(f"it is shown pictures of {seen} channels, not {COLOURS}")
    blocks = range(1, found.count(f"{HINT}.blocks."), 2)
    widths = [first, *(found.shape(f"{HINT}.blocks.{block}.weight", 4)[0] for block in blocks)]
    config = unet.down_path(found, told, heads)
    del config["freq_shift"], config["flip_sin_to_cos"]  # which are the same in all
    return config | {"conditioning_embedding_out_channels": widths, "global_pool_conditions": False}


COLOURS = 3


def build(config: Config) -> tuple[nn.Module, Call]:
    """Inputs: strength (1,), picture (1, 3, 8 · height, 8 · width) of 0 … 1, latents (1, channels, height, width),
    timestep (1,), context (batch, length, width); for XL also pooled (batch, width) and sizes (batch, 6), pixels.
    Outputs, strength in them: for each layer of the UNet's way down, and for its middle (batch, channels, h, w)."""
    import diffusers

    def call(
        module: Any,
        strength: torch.Tensor,
        picture: torch.Tensor,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        pooled: torch.Tensor | None = None,
        sizes: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        batch = context.shape[0]
        down, middle = module(
            latents.expand(batch, -1, -1, -1),
            timestep.expand(batch),
            context,
            picture.expand(batch, -1, -1, -1),
            added_cond_kwargs=unet.added(pooled, sizes),
            return_dict=False,
        )
        return tuple(residual * strength for residual in (*down, middle))

    make: Any = diffusers.ControlNetModel
    return make(**config), call


def hint_rules(target: str) -> list[Rule]:
    """From the original names of the layers that read a picture to those of diffusers' class in ``target``."""
    parts = {0: "conv_in", **{2 * number + 2: f"blocks.{number}" for number in range(6)}, 14: "conv_out"}
    return [(rf"input_hint_block\.{old}\.(weight|bias)", rf"{target}.{new}.\1") for old, new in parts.items()]


_OWN = table(
    [
        (r"zero_convs\.(\d+)\.0\.(weight|bias)", r"controlnet_down_blocks.\1.\2"),
        (r"middle_block_out\.0\.(weight|bias)", r"controlnet_mid_block.\1"),
        *hint_rules(HINT),
    ]
)


def _from_original(weights: Weights) -> dict[str, Weight]:
    return {new: weights[old] for old, new in unet.renamed(weights).items()} | _OWN(weights)


def _text(configs: Mapping[str, Config]) -> int:
    return int(configs["control"]["cross_attention_dim"])


def _widths(configs: Mapping[str, Config]) -> int:
    return sum(configs["control"]["block_out_channels"])


JOINTS = (
    Joint("control", _text, "diffusion", lambda c: int(c["diffusion"]["cross_attention_dim"]), "channels of text"),
    Joint("control", _widths, "diffusion", lambda c: sum(c["diffusion"]["block_out_channels"]), "channels in all"),
)
"""What a ControlNet and its UNet have in common."""
