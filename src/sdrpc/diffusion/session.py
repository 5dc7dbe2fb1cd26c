"""A session: a model whose components are on devices, and pictures drawn with it, one request after the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event as ThreadEvent
from typing import Any, TypeVar

import numpy as np

from ..device import Device
from ..errors import ComputeError, InvalidValue, Stopped
from ..families.base import F32
from ..families.components.sound import AUDIO_VAE, VOCODER
from ..families.components.sound import rate as sound_rate
from ..families.model import Model, ModelFiles, open_model
from ..runtime.cache import Cache
from ..runtime.chain import Placed, choices, devices_of
from ..runtime.lost import RETRY_SECONDS
from . import dbcache
from .autoencoder import TINY, VAE, Autoencoder
from .conditioning import Conditioning
from .demands import AUTOENCODERS, DRAWING
from .device_model import DeviceModel
from .drawable import latents_shape, settings_of
from .embeddings import Embeddings
from .events import Cancel, Event, OnEvent
from .guidance import Told
from .halves import HIGH_NOISE
from .hires import LATENT_FILTERS, PIXELS, Hires, enlarged_latents, enlarged_pixels
from .inputs import Begin, Beside
from .loras import Loras
from .pictures import Picture, Pixels, Sound, Video, finite, fitted, from_pixels, to_pixels
from .placement import UPSCALER, WAITING, assigned
from .request import APPLY_MODES, Applied, Request, Settings
from .rng import make_rng
from .sampling import OnStep, Sampling
from .stage_timer import StageTimer
from .upscaling import Upscaler

log = logging.getLogger(__name__)

T = TypeVar("T")


class Session:
    """A model on devices. Use it as a context manager, or close it: then its memory on the devices is free again.

    ``placement``: the device of each component, by name; ``te`` stands for all text encoders, ``all`` for the rest.
    Several devices, in order of preference: the first that has room, and the next when that one is lost. A
    :class:`~sdrpc.runtime.chain.Chain` of devices computes a component together, each a part of its layers;
    :class:`~sdrpc.runtime.chain.Lanes` have it side by side. ``cache``: of graphs that were captured before. Weights
    are uploaded when they are first needed, stay for the next picture, and leave a device when another component needs
    the room.

    ``retry``: seconds to wait for a server that is lost in the middle, however that happened (0: that is an error at
    once). When it is back, what is missing is uploaded again, and drawing goes on after the last evaluation of the
    model that was finished (or begins anew, where the latents were on that device: a GPU's steps are short); the
    picture is the same.

    ``lora_dir``: where LoRAs are found by name; ``lora_apply_mode``: one of
    :data:`sdrpc.diffusion.request.APPLY_MODES`. ``embd_dir``: where learnt words (textual inversion) are.

    ``max_vram``: bytes of weights that a device may have at one time, by its name ("": all others). ``params_backend``:
    where the weights of components are while nobody uses them (of :data:`sdrpc.diffusion.placement.WAITING`), by names
    as in ``placement``. Those that need not stay on their device leave it after each use, and where it has too little
    room for all of them, they are there one part after the other.

    ``upscaler``: where a network runs that enlarges pictures between two passes; None: where the VAE is.

    A session draws one picture at a time and is not thread-safe; its devices may be shared.
    """

    def __init__(
        self,
        model: Model,
        placement: Mapping[str, Placed | Sequence[Placed]],
        cache: Cache | None = None,
        timer: StageTimer | None = None,
        retry: float = RETRY_SECONDS,
        *,
        lora_dir: Path | str = ".",
        lora_apply_mode: str = "auto",
        embd_dir: Path | str | None = None,
        max_vram: Mapping[str, int] | None = None,
        params_backend: Mapping[str, str] | None = None,
        upscaler: Device | None = None,
    ) -> None:
        if not retry >= 0:
            raise InvalidValue("retry", retry, "it is a number of seconds")
        if lora_apply_mode not in APPLY_MODES:
            raise InvalidValue("lora_apply_mode", lora_apply_mode, f"there are {', '.join(APPLY_MODES)}")
        self.model = model
        self.placement = assigned(list(model.components), {name: choices(put) for name, put in placement.items()})
        self.timer = timer or StageTimer()
        """Seconds of all pictures together, by stage."""
        waits = assigned(list(model.components), params_backend or {}, "params_backend", "auto")
        for component, where in waits.items():
            if where not in WAITING:
                raise InvalidValue("params_backend", f"{component}={where}", f"there are {', '.join(WAITING)}")
        self._devices = DeviceModel(model, self.placement, cache or Cache(), self.timer, retry, max_vram, waits)
        self._vae = Autoencoder(model, self._devices)
        self._loras = Loras(model, Path(lora_dir))
        embeddings = Embeddings(model, None if embd_dir is None else Path(embd_dir))
        self.conditioning = Conditioning(model, self._devices, self._vae, embeddings)
        self.sampling = Sampling(model, self._devices, self._vae, self.timer)
        self._enlarges_on, self._retry = upscaler, retry
        self._upscaler: Upscaler | None = None
        self._merge = lora_apply_mode == "immediately"

    @classmethod
    def open(
        cls,
        files: ModelFiles | Path | str,
        placement: Mapping[str, Placed | Sequence[Placed]] | Placed,
        cache: Cache | None = None,
        **options: Any,
    ) -> Session:
        """The model in ``files`` (a path: a whole model), each component on its device or all of them on one;
        ``options`` as the class takes them.

        Files are mapped, nothing is uploaded yet. Raises :class:`CheckpointError` for files that can't be used or don't
        belong together, and :class:`MissingComponent`.
        """
        model = open_model(files if isinstance(files, ModelFiles) else ModelFiles(Path(files)))
        return cls(model, placement if isinstance(placement, Mapping) else {"all": placement}, cache, **options)

    def settings(self, request: Request, video: bool = False) -> Settings:
        """``request`` with everything filled in, for pictures or for films. Raises :class:`InvalidValue` for what can't
        be drawn."""
        return settings_of(self.model, request, video)

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
        settings = replace(settings, video_frames=1)

        def decoded(latents: F32, lane: int) -> Pixels:
            with self.timer("decode"), self._devices.telling.stage("decode", "vae"):
                return self._vae.shown(self._silent(latents, settings), settings, self._decoder(settings) == TINY, lane)

        with self._with_network(settings.hires):
            for picture, seed in self._drawn(settings, on_event, cancel, decoded):
                yield Picture(picture, seed)

    def generate_video(
        self, request: Request, on_event: OnEvent = lambda _: None, cancel: Cancel = lambda: False
    ) -> Iterator[Video]:
        """Draw the films of ``request``, as :meth:`generate` draws pictures. A film's frames come when they are asked
        for; ``cancel`` is asked then as well."""
        return self.draw_video(self.settings(request, video=True), on_event, cancel)

    def draw_video(
        self, settings: Settings, on_event: OnEvent = lambda _: None, cancel: Cancel = lambda: False
    ) -> Iterator[Video]:
        """As :meth:`generate_video`, of a request in which everything is filled in."""
        audible = self._is_audible(settings)
        for whole, seed in self._drawn(settings, on_event, cancel, lambda latents, _: latents):
            sound = self._sound(whole, settings) if audible else None
            frames = self._film(self._silent(whole, settings), settings.video_frames, on_event)
            yield Video(frames, settings.video_frames, settings.fps, settings.width, settings.height, seed, sound)

    def draw_latents(
        self, settings: Settings, on_event: OnEvent = lambda _: None, cancel: Cancel = lambda: False
    ) -> Iterator[tuple[F32, int]]:
        """As :meth:`draw` and :meth:`draw_video`, without decoding: the latents of each picture or film, without noise,
        and its seed."""
        return self._drawn(settings, on_event, cancel, lambda latents, _: self._silent(latents, settings))

    def _drawn(
        self, settings: Settings, on_event: OnEvent, cancel: Cancel, finished: Callable[[F32, int], T]
    ) -> Iterator[tuple[T, int]]:
        """What ``finished`` makes of latents without noise (and the lane that they come from), and the seed that they
        began as noise of."""
        try:
            yield from self._drawing(settings, on_event, cancel, finished)
        except ComputeError as error:
            if not isinstance(error, Stopped):
                self._loras.check(settings.loras)  # it may not be the model's fault
            raise

    def _drawing(
        self, settings: Settings, on_event: OnEvent, cancel: Cancel, finished: Callable[[F32, int], T]
    ) -> Iterator[tuple[T, int]]:
        """Several pictures are drawn at the same time where the diffusion model is there as often."""
        if settings.prediction is not None:
            self.sampling.prediction(settings)
        self._devices.check_fits()
        self._check_whole(settings)
        telling = self._devices.telling
        telling.listener, telling.cancel = on_event, cancel
        self._adapt(settings.loras)
        with self.timer("encode"):
            self.sampling.control = self.conditioning.control(settings)
            begin, beside = self.conditioning.pictures(settings)
            with telling.stage("encode"):
                told = self.conditioning.conditions(settings, beside)
        self._devices.leave_devices(*(name for name in self.model.components if name not in DRAWING))
        settings = replace(settings, prediction=self.sampling.prediction(settings).name)
        pictures = self._side_by_side(settings)
        if len(pictures) == 1:
            yield from self._one_by_one(settings, told, begin, beside, pictures[0], finished)
            return
        over, free = ThreadEvent(), SimpleQueue[Sequence[int]]()
        telling.cancel = lambda: over.is_set() or cancel()
        for lanes in pictures:
            free.put(lanes)

        def draw(number: int) -> T:
            """Where there is room; the next one may begin there while this one is decoded, if that sends no weights
            away."""
            mine = free.get()
            with ExitStack() as room:
                room.callback(free.put, mine)
                latents = self._picture(settings, number, told, begin, beside, mine)
                if self._devices.resident((*DRAWING, self._decoder(settings)), mine[0]):
                    room.close()
                return finished(latents, mine[0])

        pool = ThreadPoolExecutor(2 * len(pictures))
        try:
            waiting = [pool.submit(draw, number) for number in range(settings.batch_count)]
            for number, each in enumerate(waiting):
                with self.timer("sample"):
                    picture = each.result()
                yield picture, settings.seed + number
        finally:
            over.set()
            pool.shutdown(cancel_futures=True)
            self._devices.leave_devices(*self.model.components)

    def _decoder(self, settings: Settings) -> str:
        """The component that makes pictures of latents."""
        return TINY if self._vae.has_tiny and not settings.taesd_preview_only else VAE

    def _check_whole(self, settings: Settings) -> None:
        """Raises :class:`InvalidValue` for blocks to be left out of a model that is not on one device."""
        if isinstance(settings.cache, dbcache.Options):
            for name in ("diffusion", HIGH_NOISE):
                if name in self.model.components and self._devices.cut(name):
                    reason = f"{name} is not on one device as a whole, and what is between its blocks does not travel"
                    raise InvalidValue("cache_mode", "dbcache", f"{reason}; easycache goes with that", "backend")

    def _side_by_side(self, settings: Settings) -> list[Sequence[int]]:
        """The lanes of the diffusion model that each of the pictures has which are drawn at the same time."""
        lanes = range(self._devices.lanes("diffusion"))
        together = min(len(lanes), settings.batch_count) if settings.hires is None else 1
        return [lanes[first::together] for first in range(together)]

    def _one_by_one(
        self,
        settings: Settings,
        told: Told,
        begin: Begin,
        beside: Beside,
        lanes: Sequence[int],
        finished: Callable[[F32, int], T],
    ) -> Iterator[tuple[T, int]]:
        """As :meth:`_drawn`; where the diffusion model does not stay on its device, it draws all before it leaves."""
        several = settings.batch_count if self._devices.waits("diffusion") else 1
        for first in range(0, settings.batch_count, several):
            numbers = range(first, min(first + several, settings.batch_count))
            drawn = [self._picture(settings, number, told, begin, beside, lanes) for number in numbers]
            self._devices.leave_devices(*DRAWING)
            for number, latents in zip(numbers, drawn, strict=True):
                yield finished(latents, lanes[0]), settings.seed + number
            self._devices.leave_devices(*self.model.components)

    def _picture(
        self, settings: Settings, number: int, told: Told, begin: Begin, beside: Beside, lanes: Sequence[int]
    ) -> F32:
        """The latents of picture ``number``, without noise, drawn in these lanes."""
        seed, began = settings.seed + number, time.perf_counter()

        def on_step(done: int, total: int, preview: Pixels | None = None) -> None:
            seconds = time.perf_counter() - began
            event = Event("sample", "diffusion", done, total, None, number + 1, settings.batch_count, seconds)
            self._devices.telling.on_event(replace(event, preview=preview))

        with self.timer("sample"):
            latents = self.sampling.sample(settings, seed, told, on_step, begin, lanes)
        if settings.hires is not None:
            latents = self._second_pass(settings, settings.hires, seed, latents, beside, on_step, lanes)
        return latents

    def _silent(self, latents: F32, settings: Settings) -> F32:
        """What was drawn, without the sound's latents, which are further frames behind those of the pictures. (Those of
        pictures have no frames, and may be larger than the first pass's.)"""
        return latents[:, :, : latents_shape(self.model, settings)[2]] if latents.ndim == 5 else latents

    def _is_audible(self, settings: Settings) -> bool:
        """Whether films have a sound. It is said before they are drawn where only what decodes it is lacking."""
        if not self.model.family.latents.sound(settings.video_frames, settings.fps):
            return False
        lacking = [name for name in (AUDIO_VAE, VOCODER) if name not in self.model.components]
        if lacking:
            what = " and ".join(self.model.family.component(name).title for name in lacking)
            log.warning("%s: the film is silent, for no file that was named has its %s", self.model.family.title, what)
        return not lacking

    def _sound(self, latents: F32, settings: Settings) -> Sound:
        """What is heard of what was drawn."""
        length = self.model.family.latents.sound(settings.video_frames, settings.fps)
        batch, channels, frames, *_ = latents_shape(self.model, settings)
        drawn = np.ascontiguousarray(latents[:, :, frames:].reshape(batch, channels, -1)[:, :, :length])
        with self.timer("decode"), self._devices.telling.stage("decode", AUDIO_VAE):
            (spectra,) = self._devices.run(AUDIO_VAE, {}, {"latents": drawn})
            (samples,) = self._devices.run(VOCODER, {}, {"spectra": spectra})
        samples = finite(samples[0], "the film's sound")
        return Sound(samples, sound_rate(self.model[VOCODER].config))

    def _film(self, latents: F32, count: int, on_event: OnEvent) -> Iterator[Pixels]:
        """The frames of a film, as they are asked for."""
        began, done = time.perf_counter(), 0
        on_event(Event("decode", "vae", 0, count))
        for frames in self._vae.frames(latents):
            for frame in frames:
                yield to_pixels(frame)
            done += len(frames)
            on_event(Event("decode", "vae", done, count, seconds=time.perf_counter() - began))

    def idle(self, settings: Settings) -> list[str]:
        """The devices that a request has nothing for, by name. Side by side are only its pictures, and of one picture
        what is predicted at one time."""
        pictures = self._side_by_side(settings)
        drawing = [lane for lanes in pictures for lane in lanes[: settings.predictions]]
        decoding = [lanes[0] for lanes in pictures]
        by_component = {"diffusion": drawing, HIGH_NOISE: drawing, **dict.fromkeys(AUTOENCODERS, decoding)}
        used = {
            device
            for name in self.model.components
            for lane in by_component.get(name, [0])
            for device in self._devices.devices(name, lane)
        }
        named = devices_of(places[0] for places in self.placement.values())
        return [device.name for device in named if device not in used]

    def unused(self) -> dict[str, list[str]]:
        """Per file, the names of the tensors that no component uses; complete once a picture was drawn."""
        return self._devices.unused() | self._loras.unknown()

    def close(self) -> None:
        """Free everything that the session has on the devices. The devices stay open."""
        self.conditioning.forget()
        self._devices.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _adapt(self, loras: Sequence[Applied]) -> None:
        """Draw with these LoRAs from now on."""
        opened = [(self._loras.opened(applied), applied.strength) for applied in loras if applied.strength]
        self._devices.adapt(opened, self._merge)
        self.conditioning.loras = tuple(
            part for lora, strength in opened if lora.components.keys() - {"diffusion"} for part in (lora, strength)
        )

    def _second_pass(
        self,
        first: Settings,
        hires: Hires,
        seed: int,
        latents: F32,
        beside: Beside,
        on_step: OnStep,
        lanes: Sequence[int],
    ) -> F32:
        """Latents that are enlarged and drawn on from there."""
        side, hint = self.model.pixels, first.control_image
        second = replace(
            first, width=hires.width, height=hires.height, steps=hires.steps, strength=hires.strength,
            sigmas=hires.sigmas, control_image=None if hint is None else fitted(hint, hires.width, hires.height),
        )  # fmt: skip
        rng = make_rng(first.rng, seed)
        with self.timer("encode"):
            if hires.upscaler in LATENT_FILTERS:
                larger = enlarged_latents(latents, hires.upscaler, hires.height // side, hires.width // side)
            else:
                picture = self._enlarged(self._vae.shown(latents, first), hires)
                larger = self._vae.encode(from_pixels(picture), rng, first.tiling, first.vae_tiling)
            told = self.conditioning.conditions(second, beside)
        before, self.sampling.control = self.sampling.control, self.conditioning.control(second)
        try:
            with self.timer("sample"):
                return self.sampling.sample(second, seed, told, on_step, Begin(larger, rng=rng), lanes)
        finally:
            self.sampling.control = before

    @contextmanager
    def _with_network(self, hires: Hires | None) -> Iterator[None]:
        """Have the network that enlarges pictures between two passes, if one does. Its file is read at once."""
        if hires is None or hires.network is None:
            yield
            return
        device = self._enlarges_on or devices_of(self.placement["vae"])[0]
        self._upscaler = Upscaler(hires.network, device, self._retry)
        try:
            yield
        finally:
            self._upscaler = None

    def _enlarged(self, picture: Pixels, hires: Hires) -> Pixels:
        """A picture in the size of the second pass, enlarged as that says."""
        if self._upscaler is None:
            return enlarged_pixels(picture, hires.upscaler, hires.height, hires.width)
        telling, began = self._devices.telling, time.perf_counter()

        def on_tile(done: int, total: int) -> None:
            telling.check()
            telling.on_event(Event("decode", UPSCALER, done, total, seconds=time.perf_counter() - began))

        try:
            larger = self._upscaler.up_to(picture, hires.width, hires.height, hires.tile, on_tile)
        finally:
            self._upscaler.close()  # the second pass needs more room than the first
        return enlarged_pixels(larger, PIXELS, hires.height, hires.width)
