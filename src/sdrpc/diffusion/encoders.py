"""A model's encoders on devices, as families ask for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..families.base import F32, Config
from .autoencoder import Autoencoder
from .device_model import DeviceModel
from .pictures import Pixels, finite, fitted, from_pixels


class FilmEncoder:
    """What a model has for the pictures that a film begins and ends with, as
    :class:`sdrpc.families.base.EncodeFilm`."""

    def __init__(self, vae: Autoencoder, devices: DeviceModel, pictures: Sequence[Pixels]) -> None:
        self._vae, self._devices, self._pictures = vae, devices, pictures

    def __call__(self, first: F32, last: F32 | None, frames: int) -> F32:
        return self._vae.encode_film(first, last, frames)

    def see(self, component: str, side: int) -> F32:
        with self._devices.telling.stage("encode", component):
            squares = [{"picture": from_pixels(fitted(picture, side, side))} for picture in self._pictures]
            seen = [self._devices.run(component, {}, square)[0] for square in squares]
        return finite(np.concatenate(seen, 1), f"{component}'s output")


class TextEncoders:
    """The text encoders of a model as :class:`sdrpc.families.base.Encode`."""

    def __init__(self, devices: DeviceModel, pictures: tuple[F32, ...]) -> None:
        self._devices = devices
        self.pictures = pictures

    def __call__(self, component: str, inputs: Mapping[str, NDArray[Any]], **options: Any) -> tuple[F32, ...]:
        outputs = self._devices.run(component, options, inputs)
        return tuple(finite(output, f"{component}'s output") for output in outputs)

    def config(self, component: str) -> Config:
        return self._devices.model[component].config

    def tokenizer(self, component: str) -> Tokenizer | None:
        return self._devices.model[component].tokenizer

    def has(self, component: str) -> bool:
        return component in self._devices.model.components
