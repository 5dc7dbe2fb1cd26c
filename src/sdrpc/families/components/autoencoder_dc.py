"""Sana's autoencoder (VAE): diffusers' AutoencoderDC, whose latents stand for 32 pixels on a side.

Encoder and decoder have levels; the first ones are convolutions, the coarse ones attend (EfficientViT). All of it is
told by shapes but for the activations.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from ...ggml.weight import Weight
from .. import configs
from ..base import Config, Found, Naming, VaeComponent, Weights
from ..keys import same, substituted, table, thirds
from .autoencoder import ENCODES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call

HEAD = 32
"""Width of an attention head where no convolution of heads tells it."""
FACTOR = 2
"""By which a level is smaller than the one before it."""
ACTIVATIONS = ("silu", "relu")

# Configuration --------------------------------------------------------------------------------------------------------


class _Level(NamedTuple):
    """One of the encoder or the decoder: its width, its blocks, whether they attend, and to what neighbourhoods."""

    width: int
    blocks: int
    attends: bool
    kernels: list[int]


def _levels(found: Found, side: str, within: str) -> list[_Level]:
    """Of the ``side``, whose levels are called ``within``, from the fine end. The decoder enlarges before the blocks of
    a level, the encoder reduces behind them."""
    count = found.count(f"{side}.{within}.")
    levels = []
    for number in range(count):
        prefix = f"{side}.{within}.{number}."
        resizes = number < count - 1
        blocks = found.count(prefix) - resizes
        first = f"{prefix}{int(resizes and side == 'decoder')}."
        if blocks < 1:
            raise found.error(f"level {number} of its {side} has no blocks; such a VAE is not supported")
        attends = found.has(f"{first}attn.")
        width, *_ = found.shape(f"{first}conv_out.conv_point.weight" if attends else f"{first}conv2.weight", 4)
        scales = f"{first}attn.to_qkv_multiscale."
        kernels = [found.shape(f"{scales}{i}.proj_in.weight", 4)[-1] for i in range(found.count(scales))]
        levels.append(_Level(width, blocks, attends, kernels))
    return levels


def _side(levels: list[_Level], name: str) -> dict[str, Any]:
    """Arguments of the class for the encoder or the decoder."""
    return {
        f"{name}_block_out_channels": [level.width for level in levels],
        f"{name}_layers_per_block": [level.blocks for level in levels],
        f"{name}_block_types": ["EfficientViTBlock" if level.attends else "ResBlock" for level in levels],
        f"{name}_qkv_multiscales": [level.kernels for level in levels],
    }


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderDC."""
    if any(name.endswith(".running_mean") for name in found.tensors):
        raise found.error("normalizes batches, as DC-AEs of other models than Sana do; it is not supported")
    decoder = _levels(found, "decoder", "up_blocks")
    encoder = _levels(found, "encoder", "down_blocks") or decoder
    _, latent, *_ = found.shape("decoder.conv_in.weight", 4)
    image, *_ = found.shape("decoder.conv_out.weight", 4)
    enlarged, *_ = found.shape("decoder.up_blocks.0.0.conv.weight", 4)
    reducing = f"encoder.down_blocks.0.{encoder[0].blocks}.conv.weight"
    reduced = found.shape(reducing, 4)[0] if found.has("encoder.") else encoder[1].width
    for levels in (encoder, decoder):
        _check(found, [level.width for level in levels], latent, len(decoder))
    activations = told.get("decoder_act_fns") or ACTIVATIONS[0]
    activations = activations if isinstance(activations, list) else [activations] * len(decoder)
    if len(activations) != len(decoder) or not all(each in ACTIVATIONS for each in activations):
        raise found.error(f"decoder_act_fns of the {found.component.title} can't be {activations!r}")
    inferred = {
        "in_channels": image, "latent_channels": latent, "attention_head_dim": _head(found, decoder),
        "decoder_act_fns": activations, "decoder_conv_act_fn": "relu",
        "downsample_block_type": "Conv" if reduced == encoder[1].width else "pixel_unshuffle",
        "upsample_block_type": "interpolate" if enlarged == decoder[0].width else "pixel_shuffle",
        **_side(encoder, "encoder"), **_side(decoder, "decoder"),
    }  # fmt: skip
    config = configs.merged(found, inferred, told, ("attention_head_dim", "decoder_conv_act_fn"))
    widths = [level.width for level in (*encoder, *decoder) if level.attends]
    configs.check_divides(found, config, "attention_head_dim", widths)
    return config


def _head(found: Found, levels: list[_Level]) -> int:
    """The convolutions of neighbourhoods have a group for each head."""
    for number, level in enumerate(levels):
        if level.kernels:
            block = int(number < len(levels) - 1)
            name = f"decoder.up_blocks.{number}.{block}.attn.to_qkv_multiscale.0.proj_out.weight"
            return found.shape(name, 4)[1]
    return HEAD


def _check(found: Found, widths: list[int], latent: int, levels: int) -> None:
    """Whether channels can be repeated and averaged from a level to the next one, and to the latents."""
    area = FACTOR**2
    fits = all(not (fine * area % coarse or coarse % area) for fine, coarse in pairwise(widths))
    if len(widths) != levels or levels < 2 or not fits or widths[-1] % latent:
        raise found.error(f"levels of {widths} channels and latents of {latent} make no DC-AE")


def build(config: Config) -> tuple[nn.Module, Call]:
    """Input: latents (1, channels, height, width). Output: the picture (1, 3, 32 · height, 32 · width), about -1 … 1.

    With ``encodes`` in the configuration the other way round. Input: a picture. Output: its latents: this autoencoder
    knows no variance.
    """
    import diffusers

    def decode(module: Any, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (module.decode(latents, return_dict=False)[0],)

    def encode(module: Any, picture: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (module.encode(picture, return_dict=False)[0],)

    make: Any = diffusers.AutoencoderDC
    arguments = {name: value for name, value in config.items() if name != ENCODES}
    return make(**arguments), encode if config.get(ENCODES) else decode


def pixels(config: Config) -> int:
    """Pixels on a side that a latent stands for: every level but one halves."""
    return int(FACTOR ** (len(config["decoder_block_out_channels"]) - 1))


# Names ----------------------------------------------------------------------------------------------------------------

_renamed = substituted(
    [
        (r"\b(main|op_list)\.", ""),
        (r"\bcontext_module\.", "attn."),
        (r"\blocal_module\.", "conv_out."),
        (r"\baggreg\.(\d+)\.0\.", r"to_qkv_multiscale.\1.proj_in."),
        (r"\baggreg\.(\d+)\.1\.", r"to_qkv_multiscale.\1.proj_out."),
        (r"\b(inverted|depth|point)_conv\.conv\.", r"conv_\1."),
        (r"\bpoint_conv\.norm\.", "norm."),
        (r"\b(conv[12]?)\.conv\.", r"\1."),
        (r"\bconv2\.norm\.", "norm."),
        (r"\bproj\.conv\.", "to_out."),
        (r"\bproj\.norm\.", "norm_out."),
        (r"^encoder\.project_out\.0\.conv\.", "encoder.conv_out."),
        (r"^decoder\.project_out\.0\.", "decoder.norm_out."),
        (r"^decoder\.project_out\.2\.conv\.", "decoder.conv_out."),
        (r"\bproject_in\.conv\.", "conv_in."),
        (r"^encoder\.stages\.", "encoder.down_blocks."),
        (r"^decoder\.stages\.", "decoder.up_blocks."),
    ]
)
_divided = table(
    [(r"(.*\.attn)\.qkv\.conv\.weight", [rf"\1.to_{letter}.weight" for letter in "qkv"], thirds), (r".*", r"\g<0>")]
)


def _from_original(weights: Weights) -> dict[str, Weight]:
    """EfficientViT's own names; its matrices are convolutions."""
    return _divided({_renamed(name): weight for name, weight in weights.items()})


VAE = VaeComponent(
    "vae",
    "DC-AE (VAE)",
    ("first_stage_model.", "vae.", ""),
    (
        Naming("decoder.project_in.main.conv.weight", _from_original),
        Naming("decoder.up_blocks.0.0.conv.weight", same),
    ),
    _configure,
    build,
    "vae",
    sometimes=("encoder.",),
    channels=lambda config: int(config["latent_channels"]),
    pixels=pixels,
)
