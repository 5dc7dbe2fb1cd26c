"""Who draws: seats, each with devices of its own, take jobs from the queue and keep the model of the last one warm."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import chain
from pathlib import Path
from threading import Event as Flag
from threading import Lock, Thread
from typing import Any, NamedTuple, Protocol

from PIL import Image

from ..device import Device, Memory
from ..diffusion.events import Cancel, Event, OnEvent
from ..diffusion.image_files import read_mask, read_picture
from ..diffusion.loras import SUFFIXES, find
from ..diffusion.metadata import QUALITY, encode, parameters_of
from ..diffusion.pictures import Picture, Pixels
from ..diffusion.request import Request, Settings
from ..diffusion.session import Session, settings_of
from ..errors import Cancelled, ConnectionFailed, DeviceLost, SdrpcError
from ..families.model import Model, ModelFiles
from ..runtime.chain import Lanes, devices_of
from .board import Board
from .jobs import FORMATS, Job, State, Task
from .metrics import Metrics
from .shelf import Shelf
from .store import JobStore

log = logging.getLogger(__name__)

Place = Callable[[Model], Mapping[str, Sequence[Lanes]]]
"""A model → where each of its components may be, in order of preference. Raises :class:`InvalidValue`."""

LOOK_SECONDS = 1.0
"""How often a seat without work looks up: for idle models, and for the end."""

PRUNE_SECONDS = 60.0

PREVIEW_SIDE = 160
"""Pixels: as large as a page or a phone shows it beside a job."""

TRIES = 3
"""How often a job may lose its servers for good: it could be what ends them."""

PAUSE_SECONDS = 10.0
"""How long a seat that lost its servers takes no job."""


class Opening(NamedTuple):
    """A model that is to be drawn with. ``options``: those of :class:`Session`, by name."""

    model: Model
    files: ModelFiles
    options: Mapping[str, Any]


class Drawing(Protocol):
    """What a seat draws with: a :class:`Session`, or what stands for one in another process."""

    @property
    def model(self) -> Model: ...

    def settings(self, request: Request) -> Settings: ...

    def draw(self, settings: Settings, on_event: OnEvent, cancel: Cancel) -> Iterator[Picture]: ...

    def close(self) -> None: ...


class Shown(Protocol):
    """What is said of a device that a seat draws on."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    def memory(self) -> Memory:
        """Raises :class:`SdrpcError` where it can't be known."""


class Seat(ABC):
    """Where one picture is drawn at a time."""

    name: str

    def ready(self) -> bool:
        """Whether it can take a job now. May wait for up to a second to find out."""
        return True

    @abstractmethod
    def open(self, opening: Opening) -> Drawing:
        """Something to draw with. Raises :class:`InvalidValue` where the devices that were asked for are not there."""

    @abstractmethod
    def devices(self, model: Model) -> Sequence[Shown]:
        """Those that ``model`` uses here."""


@dataclass
class OwnSeat(Seat):
    """A name, and where models go there: on devices of this process."""

    name: str
    place: Place

    def open(self, opening: Opening) -> Session:
        return Session(opening.model, self.place(opening.model), **opening.options)

    def devices(self, model: Model) -> Sequence[Device]:
        return devices_of(chain.from_iterable(self.place(model).values()))


@dataclass(frozen=True)
class Adapters:
    """Where LoRAs are found by name, and how they are applied (of :data:`sdrpc.diffusion.request.APPLY_MODES`);
    ``words``: where learnt words are."""

    folder: Path
    mode: str
    words: Path | None = None

    def names(self) -> dict[str, Path]:
        """Name → file of those directly in the folder."""
        if not self.folder.is_dir():
            return {}
        return {path.stem: path for path in sorted(self.folder.iterdir()) if path.suffix.lower() in SUFFIXES}


class Studio:
    """``seats`` that draw the jobs of ``store``; start and stop it once.

    ``idle_seconds``: after so long without a job a seat frees its devices' memory; 0: never. ``retry``: how long a job
    waits for a server that is lost before it is put back into the queue. What is being drawn when
    it is stopped is put back into the queue.
    """

    def __init__(
        self,
        store: JobStore,
        shelf: Shelf,
        seats: Sequence[Seat],
        board: Board,
        metrics: Metrics,
        idle_seconds: float,
        retry: float,
        adapters: Adapters,
    ) -> None:
        self.store, self.shelf, self.board, self.metrics = store, shelf, board, metrics
        self.seats = {seat.name: seat for seat in seats}
        self._idle_seconds, self._retry, self.adapters = idle_seconds, retry, adapters
        self._stopping = Flag()
        self._lock = Lock()
        self._cancelled: set[str] = set()
        self._running: dict[str, Job] = {}
        self._threads = [Thread(target=self._work, args=(seat,), name=f"seat {seat.name}") for seat in seats]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End what is drawn, within a step; it stays in the queue."""
        self._stopping.set()
        self.board.ring()
        for thread in self._threads:
            thread.join()

    # --- for requests

    def resolved(
        self, model: str | None, request: Request, output_format: str, quality: int | None, metadata: bool
    ) -> Task:
        """A task with its seed settled, from a request that can be drawn. Raises :class:`InvalidValue`, and
        :class:`CheckpointError` for a model that can't be used."""
        name, opened = self.shelf.open(model)
        settings = settings_of(opened, request)
        for lora in settings.loras:
            find(self.adapters.folder, lora.name)
        fields = {
            entry: value
            for entry, value in vars(request).items()
            if entry not in PICTURES and value is not None and value != getattr(_NOTHING, entry)
        }
        return Task(name, {**fields, "prompt": request.prompt, "seed": settings.seed}, output_format, quality, metadata)

    def cancel(self, id: str) -> bool:
        """End a job, waiting or being drawn; whether there was anything to end."""
        if self.store.cancel(id):
            self.board.clear(id)
            return True
        with self._lock:
            if id not in self._running:
                return False
            self._cancelled.add(id)
            return True

    def running(self) -> list[Job]:
        with self._lock:
            return list(self._running.values())

    # --- a seat

    def _work(self, seat: Seat) -> None:
        warm = _Warm(seat, self.shelf, self._retry, self.adapters)
        pruned, first = 0.0, seat is next(iter(self.seats.values()))
        while not self._stopping.is_set():
            if not seat.ready():
                self._stopping.wait(LOOK_SECONDS)
                continue
            job = self.store.take(seat.name, warm.model, LOOK_SECONDS)
            if first and time.monotonic() - pruned > PRUNE_SECONDS:
                pruned = time.monotonic()
                self.store.prune()
            if job is not None:
                self._run(seat, job, warm)
            elif self._idle_seconds and warm.idle_seconds > self._idle_seconds:
                log.info("%s: %s leaves its devices, nobody asked for it for a while", seat.name, warm.model)
                warm.close()
        warm.close()

    def _run(self, seat: Seat, job: Job, warm: _Warm) -> None:
        """Draw ``job``; whatever happens, it is over, or in the queue again, and the seat can go on."""
        with self._lock:
            self._running[job.id] = job
        self.board.show(job.id, stage="starting", seat=seat.name)
        try:
            self._draw(seat, job, warm.session(job.task.model))
        except Cancelled:
            self._ended(job)
        except (DeviceLost, ConnectionFailed) as error:
            log.warning("%s: %s: %s", seat.name, job.id, error)
            warm.close()
            if not self.store.put_back(job, TRIES):
                self.store.finish(job, State.FAILED, str(error))
            self._stopping.wait(PAUSE_SECONDS)  # another seat may have its servers
        except SdrpcError as error:
            log.warning("%s: %s", job.id, error)
            self.store.finish(job, State.FAILED, str(error))
        except Exception as error:  # a fault of ours must neither end the seat nor lose the queue behind it
            log.exception("%s failed", job.id)
            self.store.finish(job, State.FAILED, f"{type(error).__name__}: {error}")
            warm.close()
        finally:
            with self._lock:
                del self._running[job.id]
                self._cancelled.discard(job.id)
            self.board.clear(job.id)

    def _ended(self, job: Job) -> None:
        if self._stopping.is_set():
            self.store.put_back(job)
        else:
            self.store.finish(job, State.CANCELLED)

    def _draw(self, seat: Seat, job: Job, session: Drawing) -> None:
        colours = session.model.family.latents.colours
        settings = session.settings(replace(self._request(job), preview="proj" if colours else "none"))
        files = self.shelf.find(job.task.model)[1]
        suffix = FORMATS[job.task.output_format]
        quality = QUALITY if job.task.quality is None else job.task.quality

        def cancel() -> bool:
            return self._stopping.is_set() or job.id in self._cancelled

        for picture in session.draw(settings, lambda event: self._tell(seat, job, event), cancel):
            parameters = parameters_of(settings, picture, files) if job.task.metadata else None
            self.store.add_picture(job, picture.seed, encode(picture.image, suffix, parameters, quality))
            self.metrics.drawn(seat.name, job.task.model)
            self.board.ring()
        self.store.finish(job, State.DONE)

    def _tell(self, seat: Seat, job: Job, event: Event) -> None:
        shown = {"stage": event.stage, "component": event.component, "done": event.done, "total": event.total}
        if event.stage == "sample":
            shown |= {"step": event.done, "steps": event.total, "picture": event.picture}
        if event.preview is not None:
            shown |= {"preview": small(event.preview), "previews": self.board.get(job.id).previews + 1}
        self.board.show(job.id, **shown)
        self.metrics.told(seat.name, event)

    def _request(self, job: Job) -> Request:
        pictures = {field: self.store.inputs(job, field) for field in PICTURES}
        read = {
            field: read_picture(field, pictures[field][0])
            for field in ("init_image", "control_image")
            if pictures[field]
        }
        if pictures["mask"]:
            read["mask"] = read_mask("mask", pictures["mask"][0])
        references = tuple(read_picture("ref_images", data) for data in pictures["ref_images"])
        return Request(**{**job.task.request, **read, "ref_images": references})


class _Warm:
    """The session of a seat, with the model of its last job."""

    def __init__(self, seat: Seat, shelf: Shelf, retry: float, adapters: Adapters) -> None:
        self._seat, self._shelf, self._retry, self._adapters = seat, shelf, retry, adapters
        self._session: Drawing | None = None
        self._used = 0.0
        self.model: str | None = None

    @property
    def idle_seconds(self) -> float:
        """Since the last job; 0 where there is nothing to put aside."""
        return time.monotonic() - self._used if self._session else 0.0

    def session(self, name: str) -> Drawing:
        """A session with the model called ``name``. Raises what :meth:`Shelf.open` and :meth:`Seat.open` raise."""
        if self._session is None or self.model != name:
            self.close()
            _, model = self._shelf.open(name)
            adapters = self._adapters
            options = {
                "retry": self._retry, "lora_dir": adapters.folder, "lora_apply_mode": adapters.mode,
                "embd_dir": adapters.words,
            }  # fmt: skip
            self._session = self._seat.open(Opening(model, self._shelf.find(name)[1], options))
            self.model = name
        self._used = time.monotonic()
        return self._session

    def close(self) -> None:
        session, self._session, self.model = self._session, None, None
        if session:
            with suppress(SdrpcError):  # a device that is gone has freed it
                session.close()


def small(pixels: Pixels) -> bytes:
    """A preview (height, width, 3) as a PNG file of :data:`PREVIEW_SIDE` pixels on its longer side."""
    image = Image.fromarray(pixels)
    factor = PREVIEW_SIDE / max(image.size)
    buffer = BytesIO()
    sides = [max(1, round(side * factor)) for side in image.size]
    image.resize((sides[0], sides[1]), Image.Resampling.BICUBIC).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


_NOTHING = Request("")

PICTURES = ("init_image", "mask", "ref_images", "control_image")
"""Fields of a request that are pictures."""
