"""A session: a model whose components are on devices, and pictures drawn with it, one request after the other."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..device import Device
from ..errors import InvalidValue, UsageError
from ..families.base import F32, REFERENCE, Conditions, Config, Prompt
from ..families.model import Model, ModelFiles, open_model
from ..runtime.cache import Cache
from ..runtime.lost import RETRY_SECONDS
from .autoencoder import Autoencoder
from .device_model import DeviceModel
from .events import Cancel, Event, OnEvent
from .inputs import NOTHING, Begin, latent_mask, reference_size, same_pixels, steps_left_out
from .pictures import Picture, f32, finite, fitted, from_pixels, to_pixels
from .placement import assigned
from .predictions import Prediction, flux_shift_by_size, prediction
from .request import Request, Settings
from .rng import make_rng
from .samplers import Guess, denoiser, kept_outside, sample
from .schedules import make_sigmas
from .stage_timer import StageTimer

PROMPTS = 16
"""Texts whose conditions a session remembers: the next picture of the same text, with another seed, needs no text
encoder, whose weights may have left their device meanwhile."""

TOKEN_SIDE = 2
"""Latents on a side that FLUX.1 makes one token of: its shift follows from the number of tokens."""


class Session:
    """A model on devices. Use it as a context manager, or close it: then its memory on the devices is free again.

    ``placement``: the device of each component, by name; ``te`` stands for all text encoders, ``all`` for the rest.
    Several devices, in order of preference: the first that has room, and the next when that one is lost. ``cache``: of
    graphs that were captured before. Weights are uploaded when they are first needed, stay for the next picture, and
    leave a device when another component needs the room.

    ``retry``: seconds to wait for a server that is lost in the middle, however that happened (0: that is an error at
    once). When it is back, what is missing is uploaded again, and drawing goes on after the last evaluation of the
    model that was finished: the picture is the same.

    A session draws one picture at a time and is not thread-safe; its devices may be shared.
    """

    def __init__(
        self,
        model: Model,
        placement: Mapping[str, Device | Sequence[Device]],
        cache: Cache | None = None,
        timer: StageTimer | None = None,
        retry: float = RETRY_SECONDS,
    ) -> None:
        if not retry >= 0:
            raise InvalidValue("retry", retry, "it is a number of seconds")
        self.model = model
        given = {name: (put,) if isinstance(put, Device) else tuple(put) for name, put in placement.items()}
        self.placement = assigned(list(model.components), given)
        self.timer = timer or StageTimer()
        """Seconds of all pictures together, by stage."""
        self._devices = DeviceModel(model, self.placement, cache or Cache(), self.timer, retry)
        self._vae = Autoencoder(model, self._devices)
        self._encoded: OrderedDict[tuple[Prompt, object], Conditions] = OrderedDict()

    @classmethod
    def open(
        cls,
        files: ModelFiles | Path | str,
        placement: Mapping[str, Device | Sequence[Device]] | Device,
        cache: Cache | None = None,
        retry: float = RETRY_SECONDS,
    ) -> Session:
        """The model in ``files`` (a path: a whole model), each component on its device or all of them on one.

        Files are mapped, nothing is uploaded yet. Raises :class:`CheckpointError` for files that can't be used or don't
        belong together, and :class:`MissingComponent`.
        """
        model = open_model(files if isinstance(files, ModelFiles) else ModelFiles(Path(files)))
        return cls(model, {"all": placement} if isinstance(placement, Device) else placement, cache, retry=retry)

    def settings(self, request: Request) -> Settings:
        """``request`` with everything filled in. Raises :class:`InvalidValue` for what can't be drawn."""
        model = self.model
        settings = request.resolved(model.defaults, model.size, model.family.latents.multiple)
        if settings.ref_images and not model.family.references:
            raise InvalidValue(
                "ref_images", len(settings.ref_images), f"{model.family.title} draws without reference pictures"
            )
        return settings

    def generate(
        self, request: Request, on_event: OnEvent = lambda _: None, cancel: Cancel = lambda: False
    ) -> Iterator[Picture]:
        """Draw the pictures of ``request``, one after the other, with seeds counting up.

        ``on_event`` is told what happens; ``cancel`` is asked between evaluations of the model and while weights are
        uploaded: when it says yes, :class:`Cancelled` is raised, and the weights stay where they are.

        Raises :class:`InvalidValue` and :class:`DoesNotFit` before anything is uploaded, :class:`CheckpointError` for
        tensors that are missing or of another shape, :class:`ComputeError` when a component's output is not a number,
        :class:`DeviceGone` when a device was lost for good, and what the devices raise.
        """
        return self.draw(self.settings(request), on_event, cancel)

    def draw(
        self, settings: Settings, on_event: OnEvent = lambda _: None, cancel: Cancel = lambda: False
    ) -> Iterator[Picture]:
        """As :meth:`generate`, of a request in which everything is filled in."""
        if settings.prediction is not None:
            self._prediction(settings)
        self._devices.check_fits()
        telling = self._devices.telling
        telling.on_event, telling.cancel = on_event, cancel
        with self.timer("encode"):
            begin, shown = self._encoded_pictures(settings)
            with telling.stage("encode"):
                conditions = [{**told, **shown} for told in self.conditions(settings)]
        settings = replace(settings, prediction=self._prediction(settings).name)
        for number in range(settings.batch_count):
            seed = settings.seed + number
            began = time.perf_counter()

            def on_step(done: int, total: int, number: int = number, began: float = began) -> None:
                seconds = time.perf_counter() - began
                on_event(Event("sample", "diffusion", done, total, None, number + 1, settings.batch_count, seconds))

            with self.timer("sample"):
                latents = self.sample(settings, seed, conditions, on_step, begin)
            with self.timer("decode"), telling.stage("decode", "vae"):
                picture = to_pixels(self._vae.decode(latents)[0])
            yield Picture(picture, seed)

    def unused(self) -> dict[str, list[str]]:
        """Per file, the names of the tensors that no component uses; complete once a picture was drawn."""
        return self._devices.unused()

    def close(self) -> None:
        """Free everything that the session has on the devices. The devices stay open."""
        self._encoded.clear()
        self._devices.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the model as functions

    def predict(self, latents: F32, timestep: F32, conditions: Conditions) -> F32:
        """What the diffusion model predicts (b, c, h, w), from latents (1, c, h, w), a timestep (1,) and the conditions
        of b prompts."""
        inputs = {"latents": latents, "timestep": timestep, **conditions}
        (predicted,) = self._devices.run("diffusion", {}, inputs)
        return predicted

    def conditions(self, settings: Settings) -> list[Conditions]:
        """What the diffusion model is told about the prompt, and before it about the negative one where guidance needs
        it."""

        def encoded(text: str, negative: bool) -> Conditions:
            prompt = Prompt(text, settings.width, settings.height, settings.clip_skip, settings.guidance, negative)
            known = prompt, shown
            if known not in self._encoded:
                encode = _Encode(self._devices, tuple(from_pixels(picture) for picture in settings.ref_images))
                self._encoded[known] = self.model.family.conditions(encode, prompt)
            self._encoded.move_to_end(known)
            while len(self._encoded) > PROMPTS:
                self._encoded.popitem(last=False)
            return self._encoded[known]

        shown = tuple(same_pixels(picture) for picture in settings.ref_images)

        positive = encoded(settings.prompt, False)
        return [positive] if settings.cfg_scale == 1 else [encoded(settings.negative_prompt, True), positive]

    def _prediction(self, settings: Settings) -> Prediction:
        """What the model predicts; a family whose files don't tell asks the model itself."""
        name, family = settings.prediction, self.model.family
        if name is None:
            if family.probe is None:
                raise UsageError(f"nothing tells what this {family.title} predicts: name it (prediction)")
            with self.timer("sample"):
                name = family.probe(self.predict, self.model["diffusion"].config)
        shift = settings.flow_shift
        if shift is None and name == "flux_flow":
            side = self.model.pixels * TOKEN_SIDE
            shift = flux_shift_by_size(settings.width // side * (settings.height // side))
        return prediction(name, shift=shift)

    def sample(
        self,
        settings: Settings,
        seed: int,
        conditions: Sequence[Conditions],
        on_step: Callable[[int, int], None] = lambda *_: None,
        begin: Begin = NOTHING,
    ) -> F32:
        """Latents (1, c, h, w) without noise, of the noise of ``seed`` and what it is added to. ``on_step`` is told the
        steps that are done, and how many there are."""
        model, predicts = self.model, self._prediction(settings)
        height, width = settings.height // model.pixels, settings.width // model.pixels
        sigmas = make_sigmas(
            settings.scheduler, settings.steps, predicts, tokens=height * width, aligned=model.family.aligned
        )
        if begin.latents is not None:
            sigmas = sigmas[steps_left_out(settings.strength, len(sigmas) - 1) :]
        shape = (1, model.latent_channels, height, width)
        rng = make_rng(settings.rng, seed)
        start = predicts.start(rng.normal(int(np.prod(shape))).reshape(shape), sigmas[0], begin.latents)
        # a generator of its own begins with the seed as well; else the sampler goes on where the first noise ended
        noise = rng if settings.sampler_rng == settings.rng else make_rng(settings.sampler_rng, seed)
        denoise = denoiser(self._guided(conditions, f32(settings.cfg_scale)), predicts)
        if begin.latents is not None and begin.anew is not None:
            denoise = kept_outside(denoise, begin.latents, begin.anew)
        return sample(
            settings.sampling_method,
            denoise,
            start,
            sigmas,
            noise,
            flow=predicts.flow,
            eta=settings.eta,
            on_step=on_step,
        )

    def _guided(self, conditions: Sequence[Conditions], cfg_scale: f32) -> Callable[[F32, f32], Guess]:
        """Classifier-free guidance: one evaluation of a batch of two, or two where the texts differ in length."""
        alike = len({tuple(array.shape for array in each.values()) for each in conditions}) == 1
        batches = [_joined(conditions)] if alike else conditions

        def predict(x: F32, timestep: f32) -> Guess:
            results = [self.predict(x, np.array([timestep], f32), batch) for batch in batches]
            predicted = finite(np.concatenate(results), f"the diffusion model's prediction at timestep {timestep:.3g}")
            if len(predicted) == 1:
                return Guess(predicted)
            negative, positive = predicted[:1], predicted[1:]
            return Guess(negative + cfg_scale * (positive - negative), negative)

        return predict

    def _encoded_pictures(self, settings: Settings) -> tuple[Begin, Conditions]:
        """What a request's pictures mean to the diffusion model: to begin with, and as conditions."""
        rng = make_rng(settings.rng, settings.seed)  # the first picture's, as in stable-diffusion.cpp
        begin = Begin()
        if settings.init_image is not None:
            latents = self._vae.encode(from_pixels(settings.init_image), rng)
            begin = Begin(latents, latent_mask(settings.mask, self.model.pixels))
        shown = {}
        for number, picture in enumerate(settings.ref_images):
            size = reference_size(picture, settings, self.model.family.latents.multiple)
            shown[f"{REFERENCE}{number}"] = self._vae.encode(from_pixels(fitted(picture, *size)))
        return begin, shown


class _Encode:
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


def _joined(conditions: Sequence[Conditions]) -> Conditions:
    return {name: np.concatenate([each[name] for each in conditions]) for name in conditions[0]}
