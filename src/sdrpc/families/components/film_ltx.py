"""The autoencoders (VAE) of LTX-Video and LTX-2: diffusers' AutoencoderKLLTXVideo and AutoencoderKLLTX2Video. The first
frame is a latent frame of its own, then each stands for eight.

What it decodes depends on what is before and behind, so a film is decoded at once.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from math import isqrt
from typing import TYPE_CHECKING, Any

from ...ggml.weight import Weight
from ..base import Config, Found, Naming, VaeComponent, Weights
from ..keys import same, substituted
from .autoencoder import ENCODES
from .film import COLOURS, FRAMES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call

CLEAN = 0.0
"""The level of noise that autoencoders which are told one are told: as diffusers' pipelines do it unasked."""
STEPS = {2: "temporal", 4: "spatial", 8: "spatiotemporal"}
"""Places that a step down makes one of, and a step up of one, and diffusers' names for which ones: two frames, two rows
and columns, or both."""


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderKLLTXVideo."""
    config = _inferred(found, told)
    steps = config.pop("upsample_type")
    if {*steps} != {STEPS[8]} or (max(config["upsample_factor"]) > 1 and not config["timestep_conditioning"]):
        raise found.error("this is the VAE of LTX-2, and not LTX-Video's")
    return config


def _configure_2(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderKLLTX2Video."""
    config = _inferred(found, told)
    older = {*config.get("down_block_types", ())} == {_DOWN}
    if max(config["upsample_factor"]) == 1 or config["timestep_conditioning"] or older:
        raise found.error("this is the VAE of LTX-Video, and not LTX-2's")
    if "block_out_channels" in config:  # the class begins with as many channels as latents have
        first, *config["block_out_channels"] = config["block_out_channels"]
        if first != config["latent_channels"]:
            raise found.error(f"its encoder begins with {first} channels, and not with those of its latents")
        config["down_block_types"] = ["LTX2VideoDownBlock3D"] * len(config["block_out_channels"])
    levels = len(config["upsample_factor"])
    return config | {
        "decoder_causal": False, "upsample_residual": [levels == LEVELS] * levels,
        "decoder_spatial_padding_mode": "reflect" if levels == LEVELS else "zeros",
    }  # fmt: skip


LEVELS = 3
"""Of the decoder of LTX-2.0, whose steps up add what they are given and which sees a mirror beside a film; that of 2.3
has four."""


_DOWN, _NEWER_DOWN = "LTXVideoDownBlock3D", "LTXVideo095DownBlock3D"


def _inferred(found: Found, told: Config) -> dict[str, Any]:
    """What the configurations of both have in common, by the names of the older one's blocks."""
    if any(".per_channel_scale" in name for name in found.tensors):
        raise found.error("adds noise of its own while it decodes (LTX-Video 0.9.1); use the VAE of another version")
    if told.get("decoder_causal"):
        raise found.error("decodes without looking ahead, which no published VAE of LTX-Video does")
    width, latent, *_ = found.shape("decoder.conv_in.conv.weight", 5)
    outputs, *_ = found.shape("decoder.conv_out.conv.weight", 5)
    patch = isqrt(outputs // COLOURS)
    if patch < 1 or outputs != COLOURS * patch**2:
        raise found.error(f"gives {outputs} channels, which are no squares of pixels", "decoder.conv_out.conv.weight")
    levels = [_up(found, number) for number in range(found.count("decoder.up_blocks."))]
    widths, layers, factors, steps = map(list, zip(*levels, strict=True)) if levels else ([], [], [], [])
    grows = [step > 1 for step in steps]
    if not any(grows) or widths[0] != width:
        raise found.error(f"its levels have {widths} channels, but it begins with {width}")
    for statistics in ("latents_mean", "latents_std"):
        (channels,) = found.shape(statistics, 1)
        if channels != latent:
            raise found.error(f"is of {channels} channels, but latents have {latent}", statistics)
    layers.insert(0, found.count("decoder.mid_block.resnets."))
    for one in (widths, layers, factors, grows):
        one.reverse()  # the decoder counts from the coarse end
    return {
        "in_channels": COLOURS, "out_channels": COLOURS, "latent_channels": latent, "patch_size": patch,
        "decoder_block_out_channels": widths, "decoder_layers_per_block": layers,
        "decoder_spatio_temporal_scaling": grows, "decoder_inject_noise": [False] * len(layers),
        "upsample_factor": factors, "upsample_residual": [factor > 1 for factor in factors],
        "upsample_type": [STEPS[step] for step in steps if step > 1],
        "timestep_conditioning": found.has("decoder.time_embedder."), **_encoder(found),
    }  # fmt: skip


def _up(found: Found, number: int) -> tuple[int, int, int, int]:
    """Of a level of the decoder, as diffusers' class is told: its channels, how many layers it has, by what its step up
    divides channels, and how many places that makes of one (1 where there is none)."""
    level = f"decoder.up_blocks.{number}"
    inner, *_ = found.shape(f"{level}.resnets.0.conv1.conv.weight", 5)
    layers, grows = found.count(f"{level}.resnets."), found.has(f"{level}.upsamplers.")
    if not grows:
        return inner, layers, 1, 1
    outputs, inputs, *_ = found.shape(f"{level}.upsamplers.0.conv.conv.weight", 5)
    if inputs % inner or outputs / inner not in STEPS:
        raise found.error(f"level {number} makes {outputs} channels of {inputs}, for layers of {inner}")
    return inputs, layers, inputs // inner, outputs // inner


def _encoder(found: Found) -> dict[str, Any]:
    """What tells of the encoder, if there is one."""
    if "encoder.conv_in.conv.weight" not in found.tensors:
        return {}
    numbers = range(found.count("encoder.down_blocks."))
    levels = [f"encoder.down_blocks.{number}" for number in numbers]
    widths = [found.shape(f"{level}.resnets.0.conv1.conv.weight", 5)[0] for level in levels]
    shrinks = [found.has(f"{level}.downsamplers.") for level in levels]
    layers = [found.count(f"{level}.resnets.") for level in (*levels, "encoder.mid_block")]
    config: dict[str, Any] = {"spatio_temporal_scaling": shrinks, "layers_per_block": layers}
    newer = [f"{level}.downsamplers.0.conv.conv.weight" for level in levels]
    if not any(name in found.tensors for name in newer):
        return config | {
            "block_out_channels": widths, "down_block_types": [_DOWN] * len(levels),
            "downsample_type": ["conv"] * len(levels),
        }  # fmt: skip
    widths.append(found.shape("encoder.mid_block.resnets.0.conv1.conv.weight", 5)[0])
    steps = [widths[number + 1] / found.shape(name, 5)[0] for number, name in enumerate(newer)]
    if not all(step in STEPS for step in steps):
        raise found.error(f"its encoder's levels of {widths} channels join {steps} places, not 2, 4 or 8")
    return config | {
        "block_out_channels": widths, "down_block_types": [_NEWER_DOWN] * len(levels),
        "downsample_type": [STEPS[int(step)] for step in steps],
    }  # fmt: skip


def build(config: Config) -> tuple[nn.Module, Call]:
    """Input: latents as the diffusion model draws them: of a picture (1, channels, height, width) or of a film (1,
    channels, frames, height, width). Output: the picture (1, 3, factor · height, factor · width); of a film the frames
    of each latent one, (1, 3, …) and then (8, 3, …) each, all -1 … 1.

    With ``encodes`` in the configuration the other way round. Input: a picture. Output: the mean of its latents and the
    logarithm of their variance, one behind the other (1, 2 · channels, height, width). With ``frames`` besides, which
    is 1 here: the mean of its latents alone (1, channels, 1, height, width).
    """
    import diffusers

    return _built(diffusers.AutoencoderKLLTXVideo, config)


def build_2(config: Config) -> tuple[nn.Module, Call]:
    """The same of LTX-2."""
    import diffusers

    return _built(diffusers.AutoencoderKLLTX2Video, config)


def _built(make: Any, config: Config) -> tuple[nn.Module, Call]:
    import torch

    def numbers(buffer: torch.Tensor) -> torch.Tensor:
        return buffer[None, :, None, None, None]

    def decode(module: Any, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        film = latents if latents.ndim == 5 else latents[:, :, None]
        told = torch.full((1,), CLEAN) if config["timestep_conditioning"] else None
        hidden = film * numbers(module.latents_std) + numbers(module.latents_mean)
        decoded = module.decoder(hidden, told)[0].transpose(0, 1).clamp(-1, 1)
        together = frames(config)
        starts = range(1, decoded.shape[0], together)
        return (decoded[:1], *(decoded[start : start + together] for start in starts))

    def told(module: Any, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_variance = module.encoder(picture[:, :, None]).chunk(2, 1)
        deviation = numbers(module.latents_std)
        return (mean - numbers(module.latents_mean)) / deviation, log_variance - 2 * deviation.log()

    def encode(module: Any, picture: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.cat(told(module, picture), 1)[:, :, 0],)

    def encode_film(module: Any, picture: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (told(module, picture)[0],)

    arguments = {name: value for name, value in config.items() if name not in (ENCODES, FRAMES)}
    calls = {(False, False): decode, (True, False): encode, (True, True): encode_film}
    return make(**arguments), calls[ENCODES in config, FRAMES in config]


def frames(config: Config) -> int:
    """Of a film that each latent one but the first stands for."""
    return _grown(config, "spatial")


def pixels(config: Config) -> int:
    """On a side that a latent stands for."""
    return int(config["patch_size"]) * _grown(config, "temporal")


def _grown(config: Config, otherwise: str) -> int:
    """Of a place what all steps up make of it in one direction, those ``otherwise`` nothing more."""
    steps = config.get("upsample_type", [STEPS[8]] * sum(config["decoder_spatio_temporal_scaling"]))
    return int(2 ** sum(step != otherwise for step in steps))


# Names ----------------------------------------------------------------------------------------------------------------

_inner = substituted(
    [
        (r"\bres_blocks\.", "resnets."), (r"\bnorm3\.norm\.", "norm3."),
        (r"\bconv_shortcut\.(?!conv\.)", "conv_shortcut.conv."), (r"\blast_time_embedder\.", "time_embedder."),
        (r"\blast_scale_shift_table\b", "scale_shift_table"),
        (r"^per_channel_statistics\.mean-of-means$", "latents_mean"),
        (r"^per_channel_statistics\.std-of-means$", "latents_std"),
    ]
)  # fmt: skip
_BLOCK = re.compile(r"(encoder\.down|decoder\.up)_blocks\.(\d{1,4})\.(.*)")


def _original(weights: Weights) -> dict[str, Weight]:
    """Lightricks' code numbers through what diffusers calls levels: blocks of layers, between which others change size
    or width. The decoder's first block of layers and the encoder's last are the middle."""
    blocks = {name: match for name in weights if (match := _BLOCK.fullmatch(name))}
    layers = {
        side: sorted({int(m[2]) for m in blocks.values() if m[1] == side and m[3].startswith("res_blocks.")})
        for side in ("encoder.down", "decoder.up")
    }
    found: dict[str, Weight] = {}
    for name, weight in weights.items():
        match = blocks.get(name)
        renamed = name if match is None else _of_level(match[1], int(match[2]), match[3], layers[match[1]])
        found[_inner(renamed)] = weight
    return found


def _of_level(side: str, block: int, rest: str, layers: Collection[int]) -> str:
    """The diffusers name of a part of the ``block`` of one ``side``, whose blocks of layers have the numbers
    ``layers``. A level begins with its layers on the way down, and ends with them on the way up."""
    down = side == "encoder.down"
    if block == (max(layers, default=0) if down else 0):
        return f"{side.split('.')[0]}.mid_block.{rest}"
    level = sum(each <= block for each in layers) - 1 if down else sum(0 < each < block for each in layers)
    if rest.startswith("conv."):
        rest = ("downsamplers.0." if down else "upsamplers.0.") + rest
    elif rest.startswith(("conv1.", "conv2.", "norm3.", "conv_shortcut.")):
        rest = ("conv_out." if down else "conv_in.") + rest
    return f"{side}_blocks.{level}.{rest}"


VAE = VaeComponent(
    "vae",
    "VAE of LTX-Video",
    ("first_stage_model.", "vae.", ""),
    (
        Naming("decoder.up_blocks.0.res_blocks.0.conv1.conv.weight", _original),
        Naming("decoder.mid_block.resnets.0.conv1.conv.weight", same),
    ),
    _configure,
    build,
    "vae",
    idle=("per_channel_statistics.",),
    sometimes=("encoder.",),
    channels=lambda config: int(config["latent_channels"]),
    pixels=pixels,
    frames=frames,
)

VAE_2 = replace(VAE, title="VAE of LTX-2", configure=_configure_2, build=build_2)
