"""The small autoencoders that stand in for a VAE: TAESD, TAESDXL, TAESD3, TAEF1 (diffusers' AutoencoderTiny).

They decode the diffusion model's own latents, in no scale of a VAE's.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ...ggml.weight import Weight
from ..base import Component, Config, Found, Naming, Weights
from ..keys import same

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call


LEVELS = 4


def _configure(found: Found, _told: Config) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderTiny."""
    width, latent, *_ = found.shape("decoder.layers.0.weight", 4)
    return {
        "latent_channels": latent, "decoder_block_out_channels": [width] * LEVELS,
        "encoder_block_out_channels": [width] * LEVELS,
    }  # fmt: skip


def build(config: Config) -> tuple[nn.Module, Call]:
    """Input: latents of the diffusion model (1, channels, height, width). Output: the picture (1, 3, 8 · height,
    8 · width), about -1 … 1."""
    import diffusers

    def decode(module: Any, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (module.decode(latents, return_dict=False)[0],)

    make: Any = diffusers.AutoencoderTiny
    return make(**config), decode


_LAYER = re.compile(r"(\d{1,3})\.")


def _original(weights: Weights) -> dict[str, Weight]:
    """A decoder of its author's own: its first layer limits numbers, which diffusers' class does without a layer."""
    numbered = {name: match for name in weights if (match := _LAYER.match(name)) and int(match[1]) > 0}
    return {
        f"decoder.layers.{int(match[1]) - 1}.{name[match.end() :]}": weights[name] for name, match in numbered.items()
    }


TAESD = Component(
    "taesd",
    "tiny autoencoder",
    ("tae.", "decoder.", ""),
    (Naming("decoder.layers.2.conv.0.weight", same), Naming("3.conv.0.weight", _original)),
    _configure,
    build,
    "vae",
    idle=("encoder.",),
)
