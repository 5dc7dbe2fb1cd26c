"""A model's diffusion models as functions, and latents drawn with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np

from ..errors import DeviceLost, UsageError
from ..families.base import CONTROL, F32, Conditions
from ..families.model import Model
from ..runtime.ahead import Ahead, DeviceArray
from ..runtime.mirrors import Mirrors
from . import dbcache, easycache
from .autoencoder import Autoencoder
from .dbcache import DBCache, told_of
from .denoising import denoiser, kept_outside
from .device_model import DeviceModel
from .drawable import latents_shape, predicts_with, with_sound
from .easycache import EasyCache
from .guidance import Guide, Told
from .halves import HIGH_NOISE, Half, halves
from .inputs import NOTHING, Begin, Control, steps_left_out
from .pictures import Pixels, f32, finite
from .predictions import Prediction
from .previews import Watched, projected
from .request import Settings
from .rng import Rng, make_rng
from .samplers import sample
from .schedules import make_sigmas
from .stage_timer import StageTimer

log = logging.getLogger(__name__)

OnStep = Callable[..., None]
"""Called with the steps that are done and how many there are, and with a preview, pixels, where one is wanted."""


class Sampling:
    """The diffusion models of ``model`` on ``devices``, with the ``vae`` for previews. ``control``: what the ControlNet
    is told of what is drawn now, if there is one."""

    def __init__(self, model: Model, devices: DeviceModel, vae: Autoencoder, timer: StageTimer) -> None:
        self.control: Control | None = None
        self._model, self._devices, self._vae, self._timer = model, devices, vae, timer

    def predict(
        self,
        latents: F32,
        timestep: F32,
        conditions: Conditions,
        component: str = "diffusion",
        *,
        lane: int = 0,
        blocks: DBCache | None = None,
        **options: Any,
    ) -> F32:
        """What the diffusion model predicts (b, c, h, w), from latents (1, c, h, w), a timestep (1,) and the conditions
        of b prompts. ``options`` are added to its configuration. ``component``: another one than the diffusion model
        itself, where there is one for high noise; ``lane``: which of several that are side by side; ``blocks``: what
        may leave out some of its own."""
        inputs: dict[str, F32] = {"latents": latents, "timestep": timestep, **conditions}
        if self.control is not None:
            inputs |= self._given(self.control, inputs)
            options |= self.control.options
        ahead = latents.ahead if isinstance(latents, DeviceArray) else None
        if blocks is None:
            (predicted,) = self._run(component, lane, ahead, options, inputs)
            return predicted
        on = self._devices.ahead(component, lane, waited_for=True) if blocks.kept and ahead is None else ahead
        predicted = blocks.predict(
            lambda more, given: self._run(component, lane, on, {**options, **more}, given), inputs
        )
        return predicted if ahead is not None else np.asarray(predicted)

    def _run(
        self, component: str, lane: int, ahead: Ahead | None, options: Mapping[str, Any], inputs: Mapping[str, F32]
    ) -> Sequence[F32]:
        """What a component gives, here or ``ahead`` on its device, which has an array's arithmetic."""
        if ahead is None:
            return self._devices.run(component, options, inputs, lane=lane)
        return cast(list[F32], self._devices.run_ahead(component, options, inputs, ahead, lane))

    def _given(self, control: Control, inputs: Mapping[str, F32]) -> dict[str, F32]:
        """What a ControlNet adds to the diffusion model that has these inputs."""
        read = {name: array for name, array in inputs.items() if name in control.reads}
        latents = inputs["latents"]
        if isinstance(latents, DeviceArray):
            there = self._devices.run_ahead("control", {}, {**control.told, **read}, latents.ahead)
            latents.ahead.keep()
            return {f"{CONTROL}{n}": cast(F32, each) for n, each in enumerate(there)}
        given = self._devices.run("control", {}, {**control.told, **read})
        return {f"{CONTROL}{n}": finite(each, "the ControlNet's output") for n, each in enumerate(given)}

    def prediction(self, settings: Settings) -> Prediction:
        """What the model predicts; a family whose files don't tell asks the model itself."""
        name, family = settings.prediction, self._model.family
        if name is None:
            if family.probe is None:
                raise UsageError(f"nothing tells what this {family.title} predicts: name it (prediction)", "prediction")
            with self._timer("sample"):
                name = family.probe(self.predict, self._model["diffusion"].config)
        return predicts_with(self._model, settings, name)

    def sample(
        self,
        settings: Settings,
        seed: int,
        told: Told,
        on_step: OnStep = lambda *_: None,
        begin: Begin = NOTHING,
        lanes: Sequence[int] = (0,),
    ) -> F32:
        """Latents without noise, of the noise of ``seed`` and what it is added to: (1, c, h, w), of models that draw
        films (1, c, frames, h, w), with those of sound as further frames behind them. ``on_step`` is told the steps
        that are done, how many there are, and a preview where one is wanted. ``lanes``: of the diffusion model, those
        that may be used.

        Where the diffusion model's device queues its work, latents stay there, and the steps are told ahead; what they
        come to is the same. On several lanes that is so where no other picture is drawn meanwhile
        (:mod:`sdrpc.runtime.mirrors`). If such a device is lost, the picture begins anew, with numbers here. So it does
        where what is between blocks stays on a device (:mod:`sdrpc.diffusion.dbcache`).
        """
        reached = -1

        def once(done: int, total: int, *preview: Pixels | None) -> None:
            nonlocal reached
            if done > reached:
                reached = done
                on_step(done, total, *preview)

        beside = () if self.control is None else ("control",)
        everywhere = len(lanes) == self._devices.lanes("diffusion")
        lanes = lanes[: max(settings.predictions, settings.of(HIGH_NOISE).predictions)]
        ahead: Ahead | Mirrors | None = None
        if self._may_be_ahead(settings) and len(lanes) == 1:
            ahead = self._devices.ahead("diffusion", lanes[0], *beside)
        elif self._may_be_ahead(settings) and everywhere and not isinstance(settings.cache, dbcache.Options):
            ahead = self._devices.mirrors("diffusion", lanes, *beside)
        if ahead is not None or isinstance(settings.cache, dbcache.Options):
            try:
                return self._sample(settings, seed, told, once, begin, lanes, ahead)
            except DeviceLost as lost:
                log.info("the picture begins anew: %s", lost)
        return self._sample(settings, seed, told, once, begin, lanes, None, kept=False)

    def _may_be_ahead(self, settings: Settings) -> bool:
        """Whether drawing asks for no numbers between its steps."""
        family = self._model.family
        looks = isinstance(settings.cache, easycache.Options), settings.previews, family.tempered
        # two models that draw one film's halves may be on different devices
        return not (any(looks) or HIGH_NOISE in self._model.components)

    def _sample(
        self,
        settings: Settings,
        seed: int,
        told: Told,
        on_step: OnStep,
        begin: Begin,
        lanes: Sequence[int],
        ahead: Ahead | Mirrors | None,
        kept: bool = True,
    ) -> F32:
        model, predicts = self._model, self.prediction(settings)
        shape = latents_shape(model, settings)
        if settings.sigmas:
            sigmas = np.array(settings.sigmas, f32)
        else:
            sigmas = make_sigmas(
                settings.scheduler, settings.all_steps, predicts, tokens=shape[-2] * shape[-1],
                frames=int(np.prod(shape[2:-2])), aligned=model.family.aligned,
            )  # fmt: skip
        if begin.latents is not None:
            sigmas = sigmas[steps_left_out(settings.strength, len(sigmas) - 1) :]
        rng = make_rng(settings.rng, seed) if begin.rng is None else deepcopy(begin.rng)  # it may begin anew
        drawn = with_sound(model, settings, shape)
        start = predicts.start(rng.normal(int(np.prod(drawn))).reshape(drawn), sigmas[0], begin.latents)
        if ahead is not None:
            ahead.begin()
            start = cast(F32, ahead.put(start))  # it has an array's arithmetic
        # a generator of its own begins with the seed as well; else the sampler goes on where the first noise ended
        noise = rng if settings.sampler_rng == settings.rng else make_rng(settings.sampler_rng, seed)
        latents, done = start, 0
        for half in self._halves(settings, predicts, sigmas):
            telling = _Steps(on_step, done, len(sigmas) - 1, ahead)
            latents = self._sample_half(half, settings, predicts, told, latents, begin, noise, lanes, telling, kept)
            done += len(half.sigmas) - 1
        if ahead is not None:
            latents = finite(np.asarray(latents), "the latents")
            ahead.tell()
        return latents

    def _halves(self, settings: Settings, predicts: Prediction, sigmas: F32) -> list[Half]:
        """What of a schedule which model draws."""
        if HIGH_NOISE not in self._model.components:
            return [Half("diffusion", sigmas)]
        steps = None if settings.high_noise is None else settings.high_noise.steps
        return halves(sigmas, steps, settings.moe_boundary, predicts)

    def _sample_half(
        self,
        half: Half,
        settings: Settings,
        predicts: Prediction,
        told: Told,
        x: F32,
        begin: Begin,
        noise: Rng,
        lanes: Sequence[int],
        steps: _Steps,
        kept: bool,
    ) -> F32:
        """Latents at the last level of what one model draws, from ``x`` at its first one. ``kept``: on its device, what
        is between blocks."""
        how, chosen = settings.of(half.component), settings.cache
        count = self._model[half.component].blocks
        cache = EasyCache(chosen, predicts) if isinstance(chosen, easycache.Options) else None
        blocks = partial(DBCache, chosen, count, kept) if isinstance(chosen, dbcache.Options) else None
        guide = Guide(
            partial(self.predict, component=half.component), told.followed(how.cfg_scale, how.img_cfg_scale),
            half.sigmas, cfg_scale=how.cfg_scale, img_cfg_scale=how.img_cfg_scale, left_out=settings.left_out,
            cache=cache, blocks=blocks, tempered=self._model.family.tempered, lanes=lanes,
        )  # fmt: skip
        denoise = denoiser(guide, predicts, settings.timestep_shift)
        if begin.latents is not None and begin.anew is not None:
            denoise = kept_outside(denoise, begin.latents, begin.anew)
        watched = None
        if settings.previews is not None:
            denoise = watched = Watched(denoise, settings.previews, lambda x: self._preview(x, settings))

        def step_done(done: int, total: int) -> None:
            guide.step_done(done)
            steps.tell(done, () if watched is None else (watched.of_step(done, total),))

        latents = sample(
            how.sampling_method, denoise, x, half.sigmas, noise, flow=predicts.flow, eta=how.eta, on_step=step_done
        )
        if cache is not None:
            log.info("easycache: %d of %d steps were not computed", cache.reused, len(half.sigmas) - 1)
        if isinstance(chosen, dbcache.Options):
            log.info("dbcache: %s", told_of(guide.caches, chosen, count))
        return latents

    def _preview(self, latents: F32, settings: Settings) -> Pixels:
        """What latents look like, as the settings' previews say."""
        mode, colours = settings.previews and settings.previews.mode, self._model.colours
        if mode == "proj" and colours is not None:
            return projected(latents, colours)
        return self._vae.shown(latents, settings, tiny=mode == "tae")


class _Steps(NamedTuple):
    """Whom to tell of steps: ``before`` them are those of another model, ``total`` are all. ``ahead``: of a device that
    is still to do them."""

    on_step: OnStep
    before: int
    total: int
    ahead: Ahead | Mirrors | None

    def tell(self, done: int, preview: tuple[Pixels | None, ...]) -> None:
        told = partial(self.on_step, self.before + done, self.total, *preview)
        if self.ahead is None:
            told()
        else:
            self.ahead.then(told)
