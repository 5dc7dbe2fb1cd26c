"""Pictures that a request begins with or refers to, as numbers of the diffusion model: pure functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from hashlib import sha256
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..families.base import Conditions, Config, Controls
from .pictures import F32, Pixels, f32, from_pixels
from .request import Settings
from .rng import Rng

REFERENCE_PIXELS = 1 << 20
"""Pixels that a reference picture is scaled to, or as many as the picture that is drawn has, if those are fewer."""


class Begin(NamedTuple):
    """What pictures begin with besides noise: latents (1, c, h, w), and how much of each is drawn anew (1, 1, h, w),
    0 … 1; None is all. ``rng``: where the noise comes from, if not from the beginning of the seed's."""

    latents: F32 | None = None
    anew: F32 | None = None
    rng: Rng | None = None


NOTHING = Begin()


class Control(NamedTuple):
    """What a ControlNet is told besides the diffusion model's inputs, by name, and which of those it ``reads``;
    ``options``: what the diffusion model's configuration gets for what it gives."""

    told: Mapping[str, NDArray[Any]]
    reads: Collection[str]
    options: Mapping[str, Any]


def control_of(settings: Settings, controls: Controls, config: Config, encode: Callable[[F32], F32]) -> Control | None:
    """What a request shows a ControlNet of this configuration; None where that is nothing, or counts for nothing.
    ``encode``: from a picture (1, 3, height, width) of -1 … 1 to latents."""
    image = settings.control_image
    if image is None or not settings.control_strength:
        return None
    if controls.latents(config):
        picture = encode(from_pixels(image))
    else:
        picture = np.ascontiguousarray(image.transpose(2, 0, 1)[None]).astype(f32) / f32(255)
    told = {"strength": np.array([settings.control_strength], f32), "picture": picture}
    kind = {} if settings.control_mode is None else {"mode": np.array([settings.control_mode], np.int32)}
    return Control(told | kind, controls.reads(config), controls.options(config))


class Beside(NamedTuple):
    """Conditions that pictures are, beside those of a text: with what is around a mask, and without."""

    shown: Conditions
    hidden: Conditions


NOTHING_BESIDE = Beside({}, {})


def steps_left_out(strength: float, steps: int) -> int:
    """How many of ``steps`` a picture that is begun with does not need, as in stable-diffusion.cpp: the first four of
    20 with a strength of 0.75, none with 1."""
    if strength >= 1:
        return 0
    return steps - min(int(f32(steps) * f32(strength)), steps - 1) - 1


def latent_mask(mask: Pixels | None, pixels: int) -> F32 | None:
    """Of a mask (height, width) the whitest pixel of each latent, which stands for ``pixels`` on a side: (1, 1, h, w),
    0 … 1. As in stable-diffusion.cpp, which however makes black or white of grey."""
    if mask is None:
        return None
    height, width = (side // pixels for side in mask.shape)
    return mask.reshape(1, 1, height, pixels, width, pixels).max((3, 5)).astype(f32) / f32(255)


def hidden(settings: Settings) -> tuple[F32, F32 | None]:
    """A request's mask as inpainting models are shown it (1, 1, height, width), 1 where it is drawn anew, and the
    picture (1, 3, height, width) with grey in these places. Without a mask that is everywhere; without a picture there
    is none."""
    mask = np.ones((1, 1, settings.height, settings.width), f32)
    if settings.mask is not None:
        mask[0, 0] = settings.mask >= 128
    return mask, None if settings.init_image is None else from_pixels(settings.init_image) * (f32(1) - mask)


def reference_size(picture: Pixels, settings: Settings, multiple: int) -> tuple[int, int]:
    """Width and height that a reference picture is scaled to, multiples of ``multiple``: its own shape, as sd-cli does
    it."""
    pixels = min(REFERENCE_PIXELS, settings.width * settings.height)
    rows, columns = picture.shape[:2]
    width = sqrt(pixels * columns / rows)
    height = width * rows / columns
    return max(1, round(width / multiple)) * multiple, max(1, round(height / multiple)) * multiple


def same_pixels(picture: Pixels) -> tuple[tuple[int, ...], bytes]:
    """Equal for equal pictures."""
    return picture.shape, sha256(picture.tobytes()).digest()
