"""The autoencoder (VAE) of films, Wan's, which Qwen-Image and Krea 2 draw single pictures with: diffusers'
AutoencoderKLWan. Its first frame is a latent frame of its own, then each stands for four.

It is causal: a frame depends on those before it. So it works frame after frame and remembers what its convolutions have
to know of the last two, which bounds the memory that a film takes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any

from ...ggml.weight import Weight
from ..base import Config, Found, Naming, VaeComponent, Weights
from ..keys import same, substituted
from .autoencoder import ENCODES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..base import Call

COLOURS = 3
FRAMES = "frames"
"""Option of the module beside ``encodes``: of how many frames a film is that is encoded."""

_MEANS = {
    16: (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922,
        -0.9497, 0.2503, -0.2921,
    ),
    48: (
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570,
        -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322,
        0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520,
        0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
}  # fmt: skip
_DEVIATIONS = {
    16: (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253,
        2.8251, 1.9160,
    ),
    48: (
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165,
        0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917,
        0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600,
        0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
}  # fmt: skip
"""Of the latents that models draw, by channel, for both of Wan's autoencoders: 2.1's (16 channels) and 2.2's (48)."""


def _configure(found: Found, told: Config) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderKLWan."""
    levels = found.count("decoder.up_blocks.")
    (finest, *_) = found.shape("decoder.norm_out.gamma", 4)
    _, latent, *_ = found.shape("decoder.conv_in.weight", 5)
    widths = [found.shape(f"decoder.up_blocks.{n}.resnets.0.conv2.weight", 5)[0] for n in reversed(range(levels))]
    if not levels or widths[0] != finest or any(width % finest for width in widths):
        raise found.error(f"its levels have {widths} channels, which are no multiples of the finest one's")
    residual = found.has("decoder.up_blocks.0.upsampler.")
    doubles = [
        found.has(f"decoder.up_blocks.{n}.{'upsampler' if residual else 'upsamplers.0'}.time_conv.")
        for n in reversed(range(levels - 1))
    ]
    outputs = found.shape("decoder.conv_out.weight", 5)[0]
    patch = isqrt(outputs // COLOURS)
    if patch < 1 or outputs != COLOURS * patch**2:
        raise found.error(f"gives {outputs} channels, which are no squares of pixels", "decoder.conv_out.weight")
    config: dict[str, Any] = {
        "base_dim": finest, "decoder_base_dim": finest, "z_dim": latent, "dim_mult": [w // finest for w in widths],
        "num_res_blocks": found.count("decoder.up_blocks.0.resnets.") - 1, "temperal_downsample": doubles,
        "is_residual": residual, "in_channels": outputs, "out_channels": outputs,
        "patch_size": None if patch == 1 else patch, "scale_factor_temporal": 2 ** sum(doubles),
        "scale_factor_spatial": 2 ** (levels - 1) * patch, "attn_scales": [],
    }  # fmt: skip
    if "encoder.conv_in.weight" in found.tensors:
        config["base_dim"], config["in_channels"], *_ = found.shape("encoder.conv_in.weight", 5)
    return config | {
        "latents_mean": _statistics(found, told, "latents_mean", _MEANS, latent),
        "latents_std": _statistics(found, told, "latents_std", _DEVIATIONS, latent),
    }


def _statistics(
    found: Found, told: Config, key: str, published: dict[int, tuple[float, ...]], channels: int
) -> list[float]:
    """One number for each channel: what the file says, else those of the published autoencoder with so many."""
    said = told.get(key)
    if said is None:
        if channels not in published:
            raise found.error(f"nothing tells the {key} of latents with {channels} channels")
        return list(published[channels])
    if not isinstance(said, list) or len(said) != channels or not all(isinstance(n, int | float) for n in said):
        raise found.error(f"{key} of the {found.component.title} can't be {said!r}")
    return [float(number) for number in said]


def build(config: Config) -> tuple[nn.Module, Call]:
    """Input: latents as the diffusion model draws them: of a picture (1, channels, height, width) or of a film (1,
    channels, frames, height, width). Output: the picture (1, 3, factor · height, factor · width); of a film the frames
    of each latent one, (1, 3, …) and then (4, 3, …) each, all -1 … 1.

    With ``encodes`` in the configuration the other way round. Input: a picture. Output: the mean of its latents and the
    logarithm of their variance, one behind the other (1, 2 · channels, height, width). With ``frames`` besides inputs
    are the first picture of a film of so many and, as ``last``, perhaps its last one; what is between is grey. Output:
    the mean of its latents (1, channels, frames, height, width).
    """
    import diffusers
    import torch

    patch = config["patch_size"] or 1

    def numbers(key: str) -> torch.Tensor:
        return torch.tensor(config[key])[None, :, None, None, None]

    def decode(module: Any, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        film = latents if latents.ndim == 5 else latents[:, :, None]
        hidden = module.post_quant_conv(film * numbers("latents_std") + numbers("latents_mean"))
        remembered: Any = defaultdict(lambda: None)
        return tuple(
            _pixels(
                module.decoder(
                    hidden[:, :, frame : frame + 1], feat_cache=remembered, feat_idx=[0], first_chunk=frame == 0
                ),
                patch,
            )
            for frame in range(hidden.shape[2])
        )

    def encode(module: Any, picture: torch.Tensor) -> tuple[torch.Tensor, ...]:
        squares = _squares(picture[:, :, None], patch)
        mean, log_variance = module.quant_conv(module.encoder(squares)).chunk(2, 1)
        mean = (mean - numbers("latents_mean")) / numbers("latents_std")
        return (torch.cat((mean, log_variance - 2 * numbers("latents_std").log()), 1)[:, :, 0],)

    def encode_film(module: Any, picture: torch.Tensor, last: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        together = config["scale_factor_temporal"]
        first = _squares(picture[:, :, None], patch)
        grey = first * 0
        end = grey if last is None else _squares(last[:, :, None], patch)
        pieces = (config[FRAMES] - 1) // together
        remembered: Any = defaultdict(lambda: None)
        encoded = []
        for number in range(pieces + 1):
            frames = [first] if number == 0 else [*[grey] * (together - 1), end if number == pieces else grey]
            encoded.append(module.encoder(torch.cat(frames, 2), feat_cache=remembered, feat_idx=[0]))
        mean = module.quant_conv(torch.cat(encoded, 2)).chunk(2, 1)[0]
        return ((mean - numbers("latents_mean")) / numbers("latents_std"),)

    make: Any = diffusers.AutoencoderKLWan
    arguments = {name: value for name, value in config.items() if name not in (ENCODES, FRAMES)}
    calls = {(False, False): decode, (True, False): encode, (True, True): encode_film}
    return make(**arguments), calls[ENCODES in config, FRAMES in config]


def _pixels(decoded: torch.Tensor, patch: int) -> torch.Tensor:
    """Frames (1, 3 · patch², frames, height, width) with the pixels of a square as channels, column first →
    (frames, 3, patch · height, patch · width)."""
    _, _, frames, height, width = decoded.shape
    squares = decoded[0].reshape(COLOURS, patch, patch, frames, height, width).permute(3, 0, 4, 2, 5, 1)
    return squares.reshape(frames, COLOURS, height * patch, width * patch).clamp(-1, 1)


def _squares(film: torch.Tensor, patch: int) -> torch.Tensor:
    """The reverse: (1, 3, frames, height, width) → (1, 3 · patch², frames, height / patch, width / patch)."""
    _, _, frames, height, width = film.shape
    rows, columns = height // patch, width // patch
    apart = film.reshape(COLOURS, frames, rows, patch, columns, patch).permute(0, 5, 3, 1, 2, 4)
    return apart.reshape(1, COLOURS * patch**2, frames, rows, columns)


# Names ----------------------------------------------------------------------------------------------------------------

_inner = substituted(
    [
        (r"\bresidual\.0\.", "norm1."), (r"\bresidual\.2\.", "conv1."), (r"\bresidual\.3\.", "norm2."),
        (r"\bresidual\.6\.", "conv2."), (r"\bshortcut\.", "conv_shortcut."),
    ]
)  # fmt: skip
_outer = substituted(
    [
        (r"^conv1\.", "quant_conv."), (r"^conv2\.", "post_quant_conv."), (r"^(\w+)\.conv1\.", r"\1.conv_in."),
        (r"^(\w+)\.head\.0\.", r"\1.norm_out."), (r"^(\w+)\.head\.2\.", r"\1.conv_out."),
        (r"\.middle\.0\.", ".mid_block.resnets.0."), (r"\.middle\.1\.", ".mid_block.attentions.0."),
        (r"\.middle\.2\.", ".mid_block.resnets.1."),
        # 2.2 has levels of blocks, the last of which changes the size
        (r"\.(up|down)samples\.(\d+)\.\w+samples\.\d+\.(resample|time_conv)\.", r".\1_blocks.\2.\1sampler.\3."),
        (r"\.(up|down)samples\.(\d+)\.\w+samples\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
        (r"\.downsamples\.", ".down_blocks."),
    ]
)  # fmt: skip
_BLOCK = re.compile(r"decoder\.upsamples\.(\d{1,4})\.(.*)")


def _original(weights: Weights) -> dict[str, Weight]:
    """2.1 numbers the decoder's blocks through, where diffusers counts levels: one ends where the size changes."""
    renamed = {_outer(name): weight for name, weight in weights.items()}
    blocks = {name: match for name in renamed if (match := _BLOCK.fullmatch(name))}
    ends = sorted({int(match[1]) for match in blocks.values() if match[2].startswith("resample.")})
    found: dict[str, Weight] = {}
    for name, weight in renamed.items():
        match = blocks.get(name)
        found[_inner(name if match is None else _of_level(int(match[1]), match[2], ends))] = weight
    return found


def _of_level(block: int, rest: str, ends: Sequence[int]) -> str:
    """The diffusers name of a part of the decoder's ``block``, when the size changes at the blocks ``ends``."""
    level = sum(end < block for end in ends)
    first = ends[level - 1] + 1 if level else 0
    within = "upsamplers.0" if block in ends else f"resnets.{block - first}"
    return f"decoder.up_blocks.{level}.{within}.{rest}"


VAE = VaeComponent(
    "vae",
    "VAE of films",
    ("first_stage_model.", "vae.", ""),
    (
        Naming("decoder.middle.0.residual.0.gamma", _original),
        Naming("decoder.mid_block.resnets.0.norm1.gamma", same),
    ),
    _configure,
    build,
    "vae",
    sometimes=("encoder.", "quant_conv."),
    channels=lambda config: int(config["z_dim"]),
    pixels=lambda config: int(config["scale_factor_spatial"]),
    frames=lambda config: int(config["scale_factor_temporal"]),
)
