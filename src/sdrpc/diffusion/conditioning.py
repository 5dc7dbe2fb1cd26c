"""What a request means to the diffusion model: its texts and pictures as conditions, encoded on devices."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from ..errors import UsageError
from ..families.base import AROUND, F32, REFERENCE, Conditions, Prompt
from ..families.lora import Lora
from ..families.model import Model
from .autoencoder import Autoencoder
from .device_model import DeviceModel
from .drawable import inpaints
from .embeddings import Embeddings
from .encoders import FilmEncoder, TextEncoders
from .guidance import Told
from .halves import HIGH_NOISE
from .inputs import (
    NOTHING_BESIDE,
    Begin,
    Beside,
    Control,
    control_of,
    hidden,
    latent_mask,
    reference_size,
    same_pixels,
)
from .pictures import Pixels, f32, fitted, from_pixels
from .request import Settings
from .rng import make_rng

PROMPTS = 16
"""Texts whose conditions a session remembers: the next picture of the same text, with another seed, needs no text
encoder, whose weights may have left their device meanwhile."""


class Conditioning:
    """A model's text encoders and VAE as what makes conditions of requests. Texts that it had before are not encoded
    again. ``loras``: those that text encoders work with now, each followed by its strength."""

    def __init__(self, model: Model, devices: DeviceModel, vae: Autoencoder, embeddings: Embeddings) -> None:
        self.loras: tuple[Lora | float, ...] = ()
        self._model, self._devices, self._vae, self._embeddings = model, devices, vae, embeddings
        self._encoded: OrderedDict[tuple[Prompt, object, object], Conditions] = OrderedDict()

    def conditions(self, settings: Settings, beside: Beside = NOTHING_BESIDE) -> Told:
        """What the diffusion model is told about the prompts of a request, and ``beside`` them about its pictures."""

        def encoded(text: str, negative: bool) -> Conditions:
            prompt = Prompt(text, settings.width, settings.height, settings.clip_skip, settings.guidance, negative)
            prompt = prompt._replace(learned=self._embeddings.of(text), frames=settings.video_frames, fps=settings.fps)
            known = prompt, shown, self.loras
            if known not in self._encoded:
                encode = TextEncoders(self._devices, tuple(self._seen(settings.ref_images)))
                self._encoded[known] = self._model.family.conditions(encode, prompt)
            self._encoded.move_to_end(known)
            while len(self._encoded) > PROMPTS:
                self._encoded.popitem(last=False)
            return self._encoded[known]

        shown = tuple(same_pixels(picture) for picture in settings.ref_images)
        positive: Conditions = {**encoded(settings.text, False), **beside.shown}
        apart = settings.img_cfg_scale != settings.cfg_scale
        if settings.cfg_scale == settings.of(HIGH_NOISE).cfg_scale == 1 and not apart:
            return Told(positive)
        negative = encoded(settings.negative_prompt, True)
        told = Told(positive, {**negative, **beside.hidden}, {**negative, **beside.shown} if apart else None)
        return Told(positive, told.shown) if apart and settings.img_cfg_scale == 1 else told

    def _seen(self, pictures: Sequence[Pixels]) -> Iterator[F32]:
        """What text encoders see of reference pictures, if they see any."""
        references = self._model.family.references
        if references is not None and references.seen is not None:
            for picture in pictures:
                yield from_pixels(fitted(picture, *references.seen(picture.shape[1], picture.shape[0])))

    def pictures(self, settings: Settings) -> tuple[Begin, Beside]:
        """What a request's pictures mean to the diffusion model: to begin with, and as conditions."""
        family, in_tiles = self._model.family, (settings.tiling, settings.vae_tiling)
        rng = make_rng(settings.rng, settings.seed)  # the first picture's, as in stable-diffusion.cpp
        begin, configs = Begin(), self._model.configs
        if family.begun is not None and family.begun.takes(configs, settings.video_frames):
            if settings.init_image is None:
                return begin, NOTHING_BESIDE
            first, end = settings.init_image, settings.end_image
            encode = FilmEncoder(self._vae, self._devices, [first] if end is None else [first, end])
            last = None if end is None else from_pixels(end)
            told = family.begun.conditions(encode, configs, from_pixels(first), last, settings.video_frames)
            return begin, Beside(told, told)
        if settings.init_image is not None:
            latents = self._vae.encode(from_pixels(settings.init_image), rng, *in_tiles)
            begin = Begin(latents, latent_mask(settings.mask, self._model.pixels))
        references, multiple = {}, 1 if family.references is None else family.references.multiple
        for number, picture in enumerate(settings.ref_images):
            size = reference_size(picture, settings, multiple)
            references[f"{REFERENCE}{number}"] = self._vae.encode(from_pixels(fitted(picture, *size)), None, *in_tiles)
        if family.inpainting is None or not inpaints(self._model):
            return begin, Beside(references, references)
        mask, picture_around = hidden(settings)
        side = self._model.pixels
        nothing = np.zeros((1, self._model.latent_channels, settings.height // side, settings.width // side), f32)
        latents = nothing if picture_around is None else self._vae.encode(picture_around, rng, *in_tiles)
        shown, unseen = (family.inpainting.around(mask, each) for each in (latents, nothing))
        return begin, Beside({AROUND: shown, **references}, {AROUND: unseen, **references})

    def control(self, settings: Settings) -> Control | None:
        """What a request shows its ControlNet, if there is one. Raises :class:`UsageError`."""
        if settings.control_image is None:
            return None
        controls = self._model.family.controls
        if controls is None:
            raise UsageError(f"{self._model.family.title} has no ControlNets in sdrpc")

        def encode(picture: F32) -> F32:
            return self._vae.encode(picture, None, settings.tiling, settings.vae_tiling)

        return control_of(settings, controls, self._model["control"].config, encode)

    def forget(self) -> None:
        """Texts are encoded anew."""
        self._encoded.clear()
