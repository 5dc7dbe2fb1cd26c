"""Large pictures in two passes ("hires fix"): drawn in a size that the model knows, enlarged, and on from there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import InvalidValue
from .pictures import F32, Pixels

LATENT, PIXELS = "Latent", "Lanczos"

LATENT_FILTERS = {LATENT: Image.Resampling.BILINEAR, "Latent (nearest)": Image.Resampling.NEAREST}
"""Ways to enlarge latents, by sd-cli's names."""

PIXEL_FILTERS = {PIXELS: Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
"""Ways to enlarge the picture that the VAE makes of them."""

UPSCALERS = (*LATENT_FILTERS, *PIXEL_FILTERS)

MAX_SCALE = 16.0


@dataclass(frozen=True)
class Hires:
    """The second pass: ``width`` and ``height`` in pixels, how it is enlarged, of how many ``steps``, and how much of
    the noise (``strength``, 0 … 1) the enlarged picture gets. ``network``: the file of one that enlarges it, in tiles
    of ``tile`` pixels on a side; None: a filter does. ``sigmas``: all its levels of noise, instead of ``strength``'s
    part of a schedule."""

    width: int
    height: int
    upscaler: str
    steps: int
    strength: float
    network: Path | None = None
    tile: int = 128
    sigmas: tuple[float, ...] = ()


def second_size(
    width: int, height: int, wanted: tuple[int | None, int | None], scale: float, multiple: int
) -> tuple[int, int]:
    """Width and height of the second pass: those that are ``wanted``, the other side in proportion, or ``scale`` times
    the first ones; multiples of ``multiple``. Raises :class:`InvalidValue` for a size that is smaller."""
    if not 1 <= scale <= MAX_SCALE:
        raise InvalidValue("hires_scale", scale, f"it can be 1 … {MAX_SCALE:g}")
    given_width, given_height = wanted
    larger = given_width or (width * given_height / height if given_height else width * scale)
    higher = given_height or (height * given_width / width if given_width else height * scale)
    found = tuple(max(1, round(side / multiple)) * multiple for side in (larger, higher))
    for field, side, before in (("hires_width", found[0], width), ("hires_height", found[1], height)):
        if side < before:
            raise InvalidValue(field, side, f"the first pass has {before} pixels already")
    return found[0], found[1]


def enlarged_latents(latents: F32, upscaler: str, height: int, width: int) -> F32:
    """Latents (1, c, h, w) → (1, c, ``height``, ``width``)."""
    planes = [Image.fromarray(plane).resize((width, height), LATENT_FILTERS[upscaler]) for plane in latents[0]]
    return np.stack([np.asarray(plane) for plane in planes])[None]


def enlarged_pixels(image: Pixels, upscaler: str, height: int, width: int) -> Pixels:
    """Pixels (h, w, 3) → (``height``, ``width``, 3)."""
    return np.asarray(Image.fromarray(image).resize((width, height), PIXEL_FILTERS[upscaler]))
