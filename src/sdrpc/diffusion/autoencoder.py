"""A model's VAE on its device: between pictures and the latents of the diffusion model."""

from __future__ import annotations

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
        """A picture (1, 3, height, width) of -1 … 1 → latents (1, c, h, w): the VAE tells how they are distributed,
        ``rng`` draws them; None: their mean. Raises :class:`CheckpointError` for a VAE without an encoder."""
        with self._devices.telling.stage("encode", "vae"):
            (told,) = self._devices.run("vae", {ENCODES: True}, {"picture": picture})
        mean, log_variance = np.split(finite(told, "what the VAE makes of a picture"), 2, axis=1)
        latents = mean
        if rng is not None:
            deviation = np.exp(f32(0.5) * np.clip(log_variance, f32(-30), f32(20)))
            latents = mean + deviation * rng.normal(mean.size).reshape(mean.shape)
        return (latents - f32(self._model.shift)) * f32(self._model.scale)

    def decode(self, latents: F32) -> F32:
        """Latents → the picture (1, 3, height, width), about -1 … 1."""
        unscaled = latents / f32(self._model.scale) + f32(self._model.shift)
        (picture,) = self._devices.run("vae", {}, {"latents": unscaled})
        return finite(picture, "the VAE's picture")
