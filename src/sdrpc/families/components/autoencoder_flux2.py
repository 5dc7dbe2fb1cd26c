"""FLUX.2's autoencoder (VAE): diffusers' AutoencoderKLFlux2.

2×2 of its latents are one of the diffusion model's, with four times the channels, each of which is normalized with a
mean and a variance that the file has (``bn.``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...ggml.weight import Weight
from .. import configs
from ..base import Config, Found, Naming, Weights
from ..keys import substituted
from . import autoencoder

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call

PATCH = 2


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderKLFlux2. The encoder may be wider than the decoder."""
    config = autoencoder.configure(found, told)
    widths = config["block_out_channels"]
    if found.has("encoder."):
        encoder = [
            found.shape(f"encoder.down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in range(len(widths))
        ]
        config["block_out_channels"] = encoder
        configs.check_divides(found, config, "norm_num_groups", encoder)
    (normalized,) = found.shape("bn.running_mean", 1)
    if normalized != config["latent_channels"] * PATCH**2:
        raise found.error(
            f"normalizes {normalized} channels, not {config['latent_channels']} of {PATCH}×{PATCH} latents"
        )
    more = {"decoder_block_out_channels": widths, "patch_size": [PATCH, PATCH], "batch_norm_eps": 1e-4}
    return configs.merged(found, config | more, told, ("batch_norm_eps",))


def build(config: Config) -> tuple[nn.Module, Call]:
    """Input: latents (1, 4 · channels, height, width). Output: the picture (1, 3, 16 · height, 16 · width), about
    -1 … 1.

    With ``encodes`` in the configuration the other way round. Input: a picture. Output: the mean of its latents alone,
    which is what diffusers and stable-diffusion.cpp take.
    """
    import diffusers
    import torch

    def normalization(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
        deviation = torch.sqrt(module.bn.running_var + module.bn.eps)
        return module.bn.running_mean[None, :, None, None], deviation[None, :, None, None]

    def decode(module: Any, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean, deviation = normalization(module)
        return (module.decode(_apart(latents * deviation + mean), return_dict=False)[0],)

    def encode(module: Any, picture: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean, deviation = normalization(module)
        return ((_together(module.encode(picture).latent_dist.mean) - mean) / deviation,)

    make: Any = diffusers.AutoencoderKLFlux2
    arguments = {name: value for name, value in config.items() if name != autoencoder.ENCODES}
    return make(**arguments), encode if config.get(autoencoder.ENCODES) else decode


def _together(latents: torch.Tensor) -> torch.Tensor:
    """(1, channels, height, width) → (1, 4 · channels, height / 2, width / 2): 2×2 become channels, row after row."""
    batch, channels, height, width = latents.shape
    squares = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return squares.permute(0, 1, 3, 5, 2, 4).reshape(batch, channels * PATCH**2, height // PATCH, width // PATCH)


def _apart(latents: torch.Tensor) -> torch.Tensor:
    """The reverse of :func:`_together`."""
    batch, channels, height, width = latents.shape
    squares = latents.reshape(batch, channels // PATCH**2, PATCH, PATCH, height, width)
    return squares.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels // PATCH**2, height * PATCH, width * PATCH)


_convolutions = substituted(
    [(r"^decoder\.post_quant_conv\.", "post_quant_conv."), (r"^encoder\.quant_conv\.", "quant_conv.")]
)


def _from_original(weights: Weights) -> dict[str, Weight]:
    """Black Forest Labs' own classes have the outer convolutions within encoder and decoder."""
    return {_convolutions(name): weight for name, weight in autoencoder.from_ldm(weights).items()}


VAE = replace(
    autoencoder.VAE,
    namings=(
        Naming("decoder.mid.block_1.conv1.weight", _from_original),
        Naming("decoder.mid_block.resnets.0.conv1.weight", autoencoder.from_diffusers),
    ),
    configure=_configure,
    build=build,
    idle=("bn.num_batches_tracked",),
    channels=lambda config: int(config["latent_channels"]) * PATCH**2,
    pixels=lambda config: autoencoder.pixels(config) * PATCH,
)
