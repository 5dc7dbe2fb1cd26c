"""A model's VAE, or the tiny one that stands in for it, on their devices: between pictures and latents of the diffusion
model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np

from ..errors import ComputeError, OutOfMemory, Stopped
from ..families.base import F32
from ..families.components.autoencoder import ENCODES
from ..families.components.film import FRAMES
from ..families.model import Model
from .device_model import DeviceModel
from .pictures import Pixels, f32, finite, to_pixels
from .request import Settings
from .rng import Rng
from .tiles import Cell, Tiling, tiled

log = logging.getLogger(__name__)

VAE, TINY = "vae", "taesd"

WHOLE = Tiling(1 << 31, 1 << 31)
SMALLEST = 8
"""Latents on a side of the smallest tile that is tried."""


class Autoencoder:
    """The autoencoders of a model whose components are on ``devices``."""

    def __init__(self, model: Model, devices: DeviceModel) -> None:
        self._model, self._devices = model, devices
        self._fitting: dict[tuple[str, Cell, int, int], Tiling] = {}
        """Tiles that a device has memory for, of what it had too little for before."""

    @property
    def has_tiny(self) -> bool:
        """Whether there is a tiny autoencoder."""
        return TINY in self._model.components

    def encode(self, picture: F32, rng: Rng | None = None, tiling: Tiling | None = None, always: bool = False) -> F32:
        """A picture (1, 3, height, width) of -1 … 1 → latents (1, c, h, w), of models of films (1, c, 1, h, w).

        The VAE tells how they are distributed, ``rng`` draws them; None: their mean, which some VAEs tell alone.
        ``tiling``: in tiles of so many latents, ``always`` or where memory would not do for the whole; in smaller ones
        where it does not do for these either. Raises :class:`CheckpointError` for a VAE without an encoder.
        """

        def run(piece: F32) -> F32:
            (told,) = self._devices.run(VAE, {ENCODES: True}, {"picture": piece})
            return told

        with self._devices.telling.stage("encode", VAE):
            told = self._in_tiles_or_whole(picture, VAE, Cell(self._model.pixels, 1), run, tiling, always)
        told = finite(told, "what the VAE makes of a picture")
        latents, log_variance = np.split(told, [self._model.latent_channels], axis=1)
        if rng is not None and log_variance.size:
            mean, deviation = latents, np.exp(f32(0.5) * np.clip(log_variance, f32(-30), f32(20)))
            latents = mean + deviation * rng.normal(mean.size).reshape(mean.shape)
        scaled = (latents - f32(self._model.shift)) * f32(self._model.scale)
        return scaled[:, :, None] if self._model.frames else scaled

    def encode_film(self, first: F32, last: F32 | None, frames: int) -> F32:
        """A film that is grey but for its first picture and perhaps its last one (1, 3, height, width) of -1 … 1 → the
        mean of its latents (1, c, frames, h, w). Raises :class:`CheckpointError` for a VAE without an encoder."""
        inputs = {"picture": first} | ({} if last is None else {"last": last})
        with self._devices.telling.stage("encode", VAE):
            (told,) = self._devices.run(VAE, {ENCODES: True, FRAMES: frames}, inputs)
        return (finite(told, "what the VAE makes of a film") - f32(self._model.shift)) * f32(self._model.scale)

    def decode(
        self, latents: F32, tiling: Tiling | None = None, always: bool = False, tiny: bool = False, lane: int = 0
    ) -> F32:
        """Latents → the picture (1, 3, height, width), about -1 … 1, by the VAE or the ``tiny`` one. ``tiling`` as for
        :meth:`encode`; ``lane``: where, if it is side by side on several devices."""
        name = TINY if tiny else VAE

        def run(piece: F32) -> F32:
            (picture,) = self._devices.run(name, {}, {"latents": piece}, lane=lane)
            return picture

        theirs = latents if tiny else self._unscaled(latents)
        picture = self._in_tiles_or_whole(theirs, name, Cell(1, self._model.pixels), run, tiling, always)
        return finite(picture, "the VAE's picture")

    def shown(self, latents: F32, settings: Settings, tiny: bool = False, lane: int = 0) -> Pixels:
        """The picture of latents as pixels, in tiles where ``settings`` say so."""
        return to_pixels(self.decode(latents, settings.tiling, settings.vae_tiling, tiny, lane)[0])

    def frames(self, latents: F32) -> Iterator[F32]:
        """Latents of a film (1, c, frames, h, w) → its frames, those of a latent one together (1 or 4, 3, height,
        width), each read from the device when it is asked for."""
        for frames in self._devices.stream("vae", {}, {"latents": self._unscaled(latents)}):
            yield finite(frames, "the VAE's film")

    def _unscaled(self, latents: F32) -> F32:
        return latents / f32(self._model.scale) + f32(self._model.shift)

    def _in_tiles_or_whole(
        self, x: F32, name: str, cell: Cell, run: Callable[[F32], F32], tiling: Tiling | None, always: bool
    ) -> F32:
        if tiling is None:
            return run(x)
        height, width = (side // cell.into for side in x.shape[-2:])
        kind = name, cell, height, width
        fitting = self._fitting.get(kind, tiling if always else WHOLE)
        while True:
            try:
                whole = width <= fitting.width and height <= fitting.height
                return run(x) if whole else tiled(x, fitting, cell, run)
            except Stopped:
                raise
            except (OutOfMemory, ComputeError) as error:  # a server says the former as the latter
                smaller = tiling if fitting == WHOLE else _half(fitting)
                if smaller == fitting:
                    raise
                log.warning("%s: goes on in tiles of %d×%d: %s", name, smaller.width, smaller.height, error)
                self._fitting[kind] = fitting = smaller


def _half(tiling: Tiling) -> Tiling:
    """Tiles that need a quarter of the memory, as far as they may be small."""
    return tiling._replace(width=_least(tiling.width), height=_least(tiling.height))


def _least(side: int) -> int:
    return min(side, max(SMALLEST, side // 2))
