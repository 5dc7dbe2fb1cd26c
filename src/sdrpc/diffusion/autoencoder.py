"""A model's VAE on its device: between pictures and the latents of the diffusion model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..families.base import F32
from ..families.components.autoencoder import ENCODES
from ..families.model import Model
from .device_model import DeviceModel
from .pictures import f32, finite
from .rng import Rng


class Autoencoder:
    """The VAE of a model whose components are on ``devices``."""

    def __init__(self, model: Model, devices: DeviceModel) -> None:
        self._model, self._devices = model, devices

    def encode(self, picture: F32, rng: Rng | None = None) -> F32:
        """A picture (1, 3, height, width) of -1 … 1 → latents (1, c, h, w), of models of films (1, c, 1, h, w).

        The VAE tells how they are distributed, ``rng`` draws them; None: their mean, which some VAEs tell alone. Raises
        :class:`CheckpointError` for a VAE without an encoder."""
        with self._devices.telling.stage("encode", "vae"):
            (told,) = self._devices.run("vae", {ENCODES: True}, {"picture": picture})
        told = finite(told, "what the VAE makes of a picture")
        latents, log_variance = np.split(told, [self._model.latent_channels], axis=1)
        if rng is not None and log_variance.size:
            mean, deviation = latents, np.exp(f32(0.5) * np.clip(log_variance, f32(-30), f32(20)))
            latents = mean + deviation * rng.normal(mean.size).reshape(mean.shape)
        scaled = (latents - f32(self._model.shift)) * f32(self._model.scale)
        return scaled[:, :, None] if self._model.frames else scaled

    def decode(self, latents: F32) -> F32:
        """Latents → the picture (1, 3, height, width), about -1 … 1."""
        (picture,) = self._devices.run("vae", {}, {"latents": self._unscaled(latents)})
        return finite(picture, "the VAE's picture")

    def frames(self, latents: F32) -> Iterator[F32]:
        """Latents of a film (1, c, frames, h, w) → its frames, those of a latent one together (1 or 4, 3, height,
        width), each read from the device when it is asked for."""
        for frames in self._devices.stream("vae", {}, {"latents": self._unscaled(latents)}):
            yield finite(frames, "the VAE's film")

    def _unscaled(self, latents: F32) -> F32:
        return latents / f32(self._model.scale) + f32(self._model.shift)
