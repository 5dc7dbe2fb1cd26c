"""The autoencoder (VAE) of Stable Diffusion and FLUX.1: diffusers' AutoencoderKL.

Its decoder has to be there; pictures as input need its encoder as well.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from ...ggml.weight import Weight
from .. import configs
from ..base import Config, Found, Naming, VaeComponent, Weights
from ..keys import substituted

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call

GROUPS = 32
ENCODES = "encodes"
"""Option of the module: from a picture to latents."""


def configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderKL."""
    levels = found.count("decoder.up_blocks.")
    widths = [found.shape(f"decoder.up_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in range(levels)]
    widths.reverse()  # the decoder counts from the coarse end
    _, latent, *_ = found.shape("decoder.conv_in.weight", 4)
    image, *_ = found.shape("decoder.conv_out.weight", 4)
    inferred = {
        "in_channels": image, "out_channels": image, "latent_channels": latent, "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": found.count("decoder.up_blocks.0.resnets.") - 1,
        "mid_block_add_attention": found.has("decoder.mid_block.attentions."),
        "use_post_quant_conv": found.has("post_quant_conv."), "use_quant_conv": found.has("quant_conv."),
        "norm_num_groups": math.gcd(GROUPS, *widths), "act_fn": "silu", "sample_size": 512,
    }  # fmt: skip
    config = configs.merged(found, inferred, told, ("norm_num_groups", "act_fn"))
    configs.check_divides(found, config, "norm_num_groups", widths)
    return config


def pixels(config: Config) -> int:
    """Pixels on a side that a latent stands for: every level but one halves."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def build(config: Config) -> tuple[nn.Module, Call]:
    """Input: latents (1, channels, height, width). Output: the picture (1, 3, factor · height, factor · width), about
    -1 … 1.

    With ``encodes`` in the configuration the other way round. Input: a picture. Output: the mean of its latents and the
    logarithm of their variance, one behind the other (1, 2 · channels, height, width).
    """
    import diffusers

    def decode(module: Any, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (module.decode(latents, return_dict=False)[0],)

    def encode(module: Any, picture: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (module.encode(picture).latent_dist.parameters,)

    make: Any = diffusers.AutoencoderKL
    arguments = {name: value for name, value in config.items() if name != ENCODES}
    return make(**arguments), encode if config.get(ENCODES) else decode


# Names ----------------------------------------------------------------------------------------------------------------

_to_diffusers = substituted(
    [
        (r"\.down\.(\d+)\.block\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
        (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
        (r"\.up\.(\d+)\.block\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
        (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
        (r"(attentions\.0)\.norm\.", r"\1.group_norm."),
        (r"(attentions\.0)\.([qkv])\.", r"\1.to_\2."),
        (r"(attentions\.0)\.proj_out\.", r"\1.to_out.0."),
    ]
)

_modernized = substituted(
    [(r"\.query\.", ".to_q."), (r"\.key\.", ".to_k."), (r"\.value\.", ".to_v."), (r"\.proj_attn\.", ".to_out.0.")]
)
"""Early diffusers files call an autoencoder's attention otherwise."""

_UP = re.compile(r"\.up_blocks\.(\d{1,4})\.")


def from_ldm(weights: Weights) -> dict[str, Weight]:
    """LDM counts the decoder's levels from the fine end, diffusers from the coarse one."""
    found = {_to_diffusers(name): weight for name, weight in weights.items()}
    last = max((int(match[1]) for name in found if (match := _UP.search(name))), default=0)
    return {_UP.sub(lambda m: f".up_blocks.{last - int(m[1])}.", name): weight for name, weight in found.items()}


def from_diffusers(weights: Weights) -> dict[str, Weight]:
    return {_modernized(name): weight for name, weight in weights.items()}


VAE = VaeComponent(
    "vae",
    "VAE",
    ("first_stage_model.", "vae.", ""),
    (
        Naming("decoder.mid.block_1.conv1.weight", from_ldm),
        Naming("decoder.mid_block.resnets.0.conv1.weight", from_diffusers),
    ),
    configure,
    build,
    "vae",
    sometimes=("encoder.", "quant_conv."),
    channels=lambda config: int(config["latent_channels"]),
    pixels=pixels,
)
