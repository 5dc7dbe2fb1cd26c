"""The studio: what is asked for becomes tasks, and its seats draw the jobs of the queue."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from threading import Event as Flag
from threading import Lock, Thread
from typing import Any, TypeVar, cast

from PIL import Image

from ..device_names import AUTO
from ..diffusion.drawable import settings_of
from ..diffusion.events import Cancel, Event
from ..diffusion.films import check_format, has_sound
from ..diffusion.films import encode as encode_film
from ..diffusion.hires import PIXEL_FILTERS, UPSCALERS
from ..diffusion.image_files import READERS, read_picture
from ..diffusion.loras import find, names
from ..diffusion.metadata import QUALITY, Parameters, encode, parameters_of
from ..diffusion.pictures import Picture, Pixels, Video
from ..diffusion.placement import UPSCALER
from ..diffusion.request import Request, Settings
from ..diffusion.upscaling import Upscalers
from ..errors import Cancelled, ConnectionFailed, DeviceLost, InvalidValue, SdrpcError
from ..families.model import Model
from .board import Board
from .devices import Devices
from .enlarging import Larger, enlarged
from .jobs import FILM_FORMATS, FORMATS, Job, Kind, State, Task, marked
from .metrics import Metrics
from .placements import Chosen, Placements
from .seats import Drawing, OwnSeat, Placed, Seat
from .shelf import Shelf
from .store import JobStore, NotKept
from .tasks import MAX_PIXELS, check_size, fields_of, request_of
from .warm import Adapters, Warm

log = logging.getLogger(__name__)

T = TypeVar("T")

Made = tuple[int, bytes]
"""A seed, and the file of what was drawn with it."""

LOOK_SECONDS = 1.0
"""How often a seat without work looks up: for idle models, and for the end."""

PRUNE_SECONDS = 60.0

PREVIEW_SIDE = 160
"""Pixels: as large as a page or a phone shows it beside a job."""

TRIES = 3
"""How often a job may lose its servers for good: it could be what ends them."""

PAUSE_SECONDS = 10.0
"""How long a seat that lost its servers takes no job."""


class Studio:
    """``seats`` that draw the jobs of ``store``; start and stop it once. A model that somebody placed is drawn by the
    first of them, since others would want the same devices.

    ``idle_seconds``: after so long without a job a seat frees its devices' memory; 0: never. ``retry``: how long a job
    waits for a server that is lost before it is put back into the queue. So is what is being drawn when the studio is
    stopped.
    """

    def __init__(
        self,
        store: JobStore,
        shelf: Shelf,
        seats: Sequence[Seat],
        devices: Devices,
        placements: Placements,
        board: Board,
        metrics: Metrics,
        idle_seconds: float,
        retry: float,
        adapters: Adapters,
        upscalers: Upscalers,
        memory: Mapping[str, Any] | None = None,
    ) -> None:
        self._memory = memory or {}
        self.store, self.shelf, self.board, self.metrics = store, shelf, board, metrics
        self.devices, self.placements = devices, placements
        self.seats = {seat.name: seat for seat in seats}
        self._first = next(iter(self.seats.values()))
        self._idle_seconds, self._retry = idle_seconds, retry
        self.adapters, self.upscalers = adapters, upscalers
        self._stopping = Flag()
        self._lock = Lock()
        self._cancelled: set[str] = set()
        self._running: dict[str, Job] = {}
        self._plans: dict[str, tuple[Chosen, Placed]] = {}
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
        self,
        model: str | None,
        request: Request,
        output_format: str,
        quality: int | None,
        metadata: bool,
        kind: Kind = Kind.PICTURES,
    ) -> Task:
        """A task with its seed settled, from a request that can be drawn. Raises :class:`InvalidValue`, and
        :class:`CheckpointError` for a model that can't be used."""
        name, opened = self.shelf.open(model)
        film = kind is Kind.FILM
        self._check_kind(kind)
        settings = settings_of(opened, self._with_network(request), film)
        check_size(settings)
        if film:
            check_format(FILM_FORMATS[output_format])
        for lora in settings.loras:
            find(self.adapters.folder, lora.name)
        return Task(name, fields_of(request, settings, kind), output_format, quality, metadata, kind=kind)

    def loras(self) -> dict[str, Path]:
        """Name → file of the LoRAs directly in the folder, and of those that ship with sdrpc where their model is
        here."""
        return names(self.adapters.folder, [files.model for files in self.shelf.models().values()])

    def enlarged(self, upscaler: str, width: int, height: int) -> Task:
        """A task that makes a picture larger. Raises :class:`InvalidValue`."""
        self.upscalers.find(upscaler, PIXEL_FILTERS, "upscaler")
        self._check_kind(Kind.LARGER)
        if width * height > MAX_PIXELS:
            raise InvalidValue("width", width, f"a picture can have {MAX_PIXELS >> 20} mebipixels")
        return Task("", vars(Larger(upscaler, max(width, 1), max(height, 1))), metadata=False, kind=Kind.LARGER)

    def _with_network(self, request: Request) -> Request:
        """A request that names a network to enlarge its pictures by, with that one's file."""
        if not request.hires:
            return request
        return replace(
            request, hires_upscaler=self.upscalers.find(str(request.hires_upscaler), UPSCALERS, "hires_upscaler")
        )

    def _check_kind(self, kind: Kind) -> None:
        if not any(kind in seat.kinds for seat in self.seats.values()):
            raise InvalidValue("mode", kind.value, "this server's cluster draws pictures alone")

    def placed(self, model: str) -> dict[str, list[str]]:
        """Where the components of a model are, or will be: names of devices by component, in order of preference;
        ``auto`` where a plan will say, when it is next drawn with. Raises what :meth:`Shelf.open` raises."""
        name, opened = self.shelf.open(model)
        if not isinstance(self._first, OwnSeat):
            names = [device.name for device in self._first.devices(opened)]
            return dict.fromkeys(opened.components, names)
        chosen = self.placements.chosen(name)
        known, planned = self._plans.get(name, ({}, {}))
        found = planned if chosen == known and planned else self._by_hand(self._first, chosen, opened)
        left = {part: [AUTO] for part in _for_a_plan(chosen) if found is not planned}
        return {part: [place.name for place in places] for part, places in found.items()} | left

    def _placement(self, seat: Seat, name: str, model: Model) -> Placed | None:
        """Where the components of a model are on this process's devices; None at a seat that has others. Where somebody
        leaves that to a plan, it is made here."""
        if not isinstance(seat, OwnSeat):
            return None
        chosen = self.placements.chosen(name)
        found = self._by_hand(seat, chosen, model)
        if _for_a_plan(chosen):
            found = seat.fit(model, found, found.keys() - _for_a_plan(chosen))
            self._plans[name] = chosen, found
        return found

    def _by_hand(self, seat: OwnSeat, chosen: Chosen, model: Model) -> Placed:
        """Where the seat has a model's components, or somebody put them."""
        by_hand = {part: names for part, names in chosen.items() if part in model.components}
        return {**seat.place(model), **self.placements.lanes(by_hand)}

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
        place = partial(self._placement, seat)
        warm = Warm(seat, self.shelf, self.placements.chosen, place, self._retry, self.adapters, self._memory)
        pruned, first = 0.0, seat is self._first

        def mine(job: Job) -> bool:
            return job.task.kind in seat.kinds and (first or not self.placements.chosen(job.task.model))

        def look() -> None:
            """One look at the queue."""
            nonlocal pruned
            if not self._is_ready(seat):
                self._stopping.wait(LOOK_SECONDS)
                return
            job = self.store.take(seat.name, warm.model, LOOK_SECONDS, mine)
            if job is not None:
                self._run(seat, job, warm)
            elif self._idle_seconds and warm.idle_seconds > self._idle_seconds:
                log.info("%s: %s leaves its devices, nobody asked for it for a while", seat.name, warm.model)
                warm.close()
            if first and time.monotonic() - pruned > PRUNE_SECONDS:
                pruned = time.monotonic()
                self.store.prune()

        while not self._stopping.is_set():
            try:
                look()
            except NotKept as error:
                self._pause(seat, error)
            except Exception:  # a fault of ours must neither end the seat nor lose the queue behind it
                log.exception("%s: no job is taken for a while", seat.name)
                self._stopping.wait(PAUSE_SECONDS)
        warm.close()

    def _pause(self, seat: Seat, error: NotKept) -> None:
        """The disk refuses: nothing can be drawn for a while."""
        log.warning(
            "%s: nothing is drawn for now, since %s does not keep the queue: %s", seat.name, self.store.folder, error
        )
        self._stopping.wait(PAUSE_SECONDS)

    def _noted(self, seat: Seat, note: Callable[[], T]) -> T:
        """Have what became of a job written down, when the disk takes it. Raises :class:`NotKept` where it has not by
        the end of the server: when that is started again, the job is in the queue as any that was being drawn."""
        while True:
            try:
                return note()
            except NotKept as error:
                if self._stopping.is_set():
                    raise
                self._pause(seat, error)

    def _is_ready(self, seat: Seat) -> bool:
        """Whether a seat can take a job; what it finds out about devices is known to everybody."""
        doubted = seat.lost
        ready = seat.ready()
        for device in doubted:
            if device in seat.lost:
                self.devices.absent(device.name, f"seat {seat.name} takes no job until it is")
            else:
                self.devices.present(device.name)
        return ready

    def _run(self, seat: Seat, job: Job, warm: Warm) -> None:
        """Draw ``job``; whatever happens, it is over, or in the queue again, and the seat can go on."""
        with self._lock:
            self._running[job.id] = job
        self.metrics.began(job)
        warmed = job.task.model in (warm.model, "")
        self.board.show(job.id, stage="starting" if warmed else "opening", seat=seat.name)
        self.board.ring()  # all behind it are one place further
        try:
            self._make(seat, job, warm)
        except Cancelled:
            self._noted(seat, lambda: self._ended(job))
        except (DeviceLost, ConnectionFailed) as error:
            log.warning("%s: %s: %s", seat.name, job.id, error)
            warm.close()
            seat.lose(warm.devices)
            if not self._noted(seat, lambda: self.store.put_back(job, TRIES)):
                self._failed(seat, job, marked(error))
            self._stopping.wait(PAUSE_SECONDS)  # another seat may have its servers
        except SdrpcError as error:
            log.warning("%s: %s", job.id, error)
            self._failed(seat, job, marked(error))
        except Exception as error:  # a fault of ours must neither end the seat nor lose the queue behind it
            log.exception("%s failed", job.id)
            warm.close()
            self._failed(seat, job, f"{type(error).__name__}: {error}")
        finally:
            warm.rest()
            self.devices.end(job.id)
            with self._lock:
                del self._running[job.id]
                self._cancelled.discard(job.id)
            self.board.clear(job.id)
            self._note(seat, job)

    def _failed(self, seat: Seat, job: Job, why: str) -> None:
        self._noted(seat, lambda: self.store.finish(job, State.FAILED, why))

    def _note(self, seat: Seat, job: Job) -> None:
        """A line of the log about a job that a seat is done with."""
        now = self.store.get(job.id)
        if now is None or not log.isEnabledFor(logging.INFO):
            return
        facts: dict[str, Any] = {
            "job": job.id, "user": job.user, "model": job.task.model, "seat": seat.name, "status": now.state.value,
        }  # fmt: skip
        if now.started is not None and now.finished is not None:
            facts |= {"waited": round(now.started - now.created, 3), "seconds": round(now.finished - now.started, 3)}
        log.info("%s is %s", job.id, now.state.value, extra=facts)

    def _ended(self, job: Job) -> None:
        if self._stopping.is_set():
            self.store.put_back(job)
        else:
            self.store.finish(job, State.CANCELLED)

    def _make(self, seat: Seat, job: Job, warm: Warm) -> None:
        """Draw ``job`` to its end."""

        def cancel() -> bool:
            return self._stopping.is_set() or job.id in self._cancelled

        for seed, data in _MAKERS[job.task.kind](self, seat, job, warm, cancel):
            self.store.add_picture(job, seed, data)
            self.metrics.drawn(seat.name, job.task.model)
            self.board.ring(job.id)
        self._noted(seat, lambda: self.store.finish(job, State.DONE))

    def _pictures(self, seat: Seat, job: Job, warm: Warm, cancel: Cancel) -> Iterator[Made]:
        session, task = self._session(job, warm), job.task
        colours = session.model.colours
        settings = session.settings(replace(self._request(job), preview="proj" if colours else "none"))
        quality = QUALITY if task.quality is None else task.quality
        for picture in session.draw(settings, lambda event: self._tell(seat, job, event), cancel):
            told = self._told(task, settings, picture)
            yield picture.seed, encode(picture.image, FORMATS[task.output_format], told, quality)

    def _film(self, seat: Seat, job: Job, warm: Warm, cancel: Cancel) -> Iterator[Made]:
        session, task = self._session(job, warm), job.task
        settings = session.settings(self._request(job), video=True)
        for film in session.draw_video(settings, lambda event: self._tell(seat, job, event), cancel):
            file, suffix = BytesIO(), FILM_FORMATS[task.output_format]
            if film.sound is not None and not has_sound(suffix):
                holds = ", ".join(name for name, other in FILM_FORMATS.items() if has_sound(other))
                log.warning("%s: the film is silent, for %s holds no sound; there are %s", job.id, suffix, holds)
            encode_film(film, suffix, file, self._told(task, settings, film))
            yield film.seed, file.getvalue()

    def _session(self, job: Job, warm: Warm) -> Drawing:
        session = warm.session(job.task.model)
        self.devices.begin(job.id, warm.devices)
        return session

    def _larger(self, seat: Seat, job: Job, _: Warm, cancel: Cancel) -> Iterator[Made]:
        wanted = Larger(**job.task.request)
        found = self.upscalers.find(wanted.upscaler, PIXEL_FILTERS, "upscaler")
        image = read_picture("image", self.store.inputs(job, "image")[0])

        def on_tile(done: int, total: int) -> None:
            self._tell(seat, job, Event("decode", UPSCALER, done, total))

        network = None
        if isinstance(found, Path):
            device = cast(OwnSeat, seat).upscaler()  # no others take such jobs
            self.devices.begin(job.id, [device])
            network = found, device, self._retry
        yield 0, encode(enlarged(image, wanted, network, on_tile, cancel), FORMATS[job.task.output_format], None)

    def _told(self, task: Task, settings: Settings, drawn: Picture | Video) -> Parameters | None:
        """What the file of something drawn says of how it came about."""
        return parameters_of(settings, drawn, self.shelf.find(task.model)[1]) if task.metadata else None

    def _tell(self, seat: Seat, job: Job, event: Event) -> None:
        shown = {"stage": event.stage, "component": event.component, "done": event.done, "total": event.total}
        if event.stage == "sample":
            shown |= {"step": event.done, "steps": event.total, "picture": event.picture}
        if event.preview is not None:
            shown |= {"preview": small(event.preview), "previews": self.board.get(job.id).previews + 1}
        if event.stage == "waiting":
            self.devices.absent(event.device, event.reason)
        elif event.stage == "reconnected":
            self.devices.present(event.device, anew=True)
        self.board.show(job.id, **shown)
        self.metrics.told(seat.name, event)

    def _request(self, job: Job) -> Request:
        pictures = {field: self.store.inputs(job, field) for field in READERS}
        return self._with_network(request_of(job.task.request, pictures))


def small(pixels: Pixels) -> bytes:
    """A preview (height, width, 3) as a PNG file of :data:`PREVIEW_SIDE` pixels on its longer side."""
    image = Image.fromarray(pixels)
    factor = PREVIEW_SIDE / max(image.size)
    buffer = BytesIO()
    sides = [max(1, round(side * factor)) for side in image.size]
    image.resize((sides[0], sides[1]), Image.Resampling.BICUBIC).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _for_a_plan(chosen: Chosen) -> set[str]:
    """The components that somebody left to a plan."""
    return {part for part, names in chosen.items() if names == (AUTO,)}


_MAKERS = {Kind.PICTURES: Studio._pictures, Kind.FILM: Studio._film, Kind.LARGER: Studio._larger}
"""Kind of a job → what makes it: seeds and files."""
