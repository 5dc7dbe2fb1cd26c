"""What a picture will look like while it is drawn: latents as colours, without a network or with one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import InvalidValue
from ..families.base import Colours
from .denoising import Denoise, Guess
from .pictures import F32, Pixels, f32, to_pixels

MODES = ("none", "proj", "tae", "vae")
"""Of sd-cli's --preview."""

MAX_INTERVAL = 10000


@dataclass(frozen=True)
class Previews:
    """Which previews are wanted: ``mode``, of every ``interval``-th step, of latents with their noise (``noisy``)."""

    mode: str
    interval: int = 1
    noisy: bool = False


def find_previews(mode: str, interval: int, noisy: bool) -> Previews | None:
    """What options mean; None: no previews. Raises :class:`InvalidValue`."""
    if mode not in MODES:
        raise InvalidValue("preview", mode, f"does not exist; there are {', '.join(MODES)}")
    if not 1 <= interval <= MAX_INTERVAL:
        raise InvalidValue("preview_interval", interval, f"it can be 1 … {MAX_INTERVAL}")
    return None if mode == "none" else Previews(mode, interval, noisy)


def projected(latents: F32, colours: Colours) -> Pixels:
    """Latents (1, c, h, w) as pixels (h, w, 3): the colour of each latent is a linear function of its channels."""
    factors, bias = np.array(colours.factors, f32), np.array(colours.bias, f32)
    return to_pixels(np.tensordot(factors, latents[0], (0, 0)) + bias[:, None, None])


class Watched:
    """A :class:`Denoise` that keeps what it saw last in a step, and makes a preview of it."""

    def __init__(self, denoise: Denoise, previews: Previews, show: Callable[[F32], Pixels]) -> None:
        self._denoise, self._previews, self._show = denoise, previews, show
        self._latents: F32 | None = None

    def __call__(self, x: F32, sigma: f32) -> Guess:
        guess = self._denoise(x, sigma)
        self._latents = x if self._previews.noisy else guess.guided
        return guess

    def of_step(self, done: int, total: int) -> Pixels | None:
        """A preview where one is wanted after ``done`` of ``total`` steps; the last one is the picture itself."""
        if self._latents is None or not 0 < done < total or done % self._previews.interval:
            return None
        return self._show(self._latents)
