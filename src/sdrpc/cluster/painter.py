"""The far half of a seat: a session in an actor's process, and what it tells, as values that can be sent."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, NamedTuple

from .. import __version__, models
from ..device import Device, Memory
from ..diffusion.events import Cancel, Event, OnEvent
from ..diffusion.pictures import Picture, Pixels, Sound
from ..diffusion.request import Settings
from ..diffusion.session import Session
from ..errors import Cancelled, ConnectionFailed, DeviceLost, InvalidValue, SdrpcError, UsageError
from ..families.model import Model, ModelFiles, open_model

log = logging.getLogger(__name__)

Connect = Callable[[], AbstractContextManager[Sequence[Device]]]
"""Gives the devices of a lease. Raises :class:`SdrpcError`."""

Place = Callable[[Model, Sequence[Any]], Mapping[str, Sequence[Any]]]
"""A model, and the devices that there are (or what else has their names) → those of each component. Raises
:class:`InvalidValue`."""

REMEMBERED = 64
"""Numbers of pictures that were stopped, of which the newest may still be drawn."""


class Failure(NamedTuple):
    """An error of ours: of ``kind`` (a key of :data:`KINDS`), with its ``words`` and the ``names`` of fields in them.
    Errors themselves don't travel: they are made from facts that their message does not give back."""

    kind: str
    words: str
    names: tuple[str, ...] = ()


KINDS: Mapping[str, tuple[type[SdrpcError], ...]] = {
    "cancelled": (Cancelled,),
    "lost": (DeviceLost, ConnectionFailed),
    "usage": (UsageError,),
    "error": (SdrpcError,),
}
"""Kinds of failures → the errors that those who wait for a picture don't tell apart. The first kind that fits."""


class Film(NamedTuple):
    """A film begins, as :class:`sdrpc.diffusion.pictures.Video` says it; so many ``frames`` follow."""

    frames: int
    fps: int
    width: int
    height: int
    seed: int
    sound: Sound | None


class Frame(NamedTuple):
    """A frame of the film that has begun."""

    image: Pixels


Told = Event | Picture | Film | Frame | Failure


def failure(error: SdrpcError) -> Failure:
    names = (error.field, *error.names) if isinstance(error, InvalidValue) else tuple(error.names)
    return Failure(next(kind for kind, classes in KINDS.items() if isinstance(error, classes)), str(error), names)


def raised(failure: Failure) -> SdrpcError:
    """An error as ``failure`` tells it."""
    if failure.kind == "cancelled":
        return Cancelled()
    error = KINDS[failure.kind][0](failure.words)
    error.names = failure.names
    return error


class Described(NamedTuple):
    """A device of an actor."""

    name: str
    description: str


class About(NamedTuple):
    """Which sdrpc an actor runs, its devices, or why it has none."""

    version: str
    devices: tuple[Described, ...]
    failure: Failure | None = None


@dataclass(frozen=True)
class Work:
    """A model to draw with. ``paths``: of its files, by :class:`ModelFiles`' fields, with the name of a model that
    ships in its path's place; ``sizes``: their bytes where there is one file; ``beside``: its fields that are no files.
    ``options``: of :class:`Session`."""

    paths: Mapping[str, str]
    sizes: Mapping[str, int]
    options: Mapping[str, Any]
    beside: Mapping[str, Any]

    @classmethod
    def of(cls, files: ModelFiles, options: Mapping[str, Any]) -> Work:
        shipped = {path: name for name, path in models.SHIPPED.items()}
        return cls(
            {field: shipped.get(path, str(path.absolute())) for field, path in files.named.items()},
            {field: path.stat().st_size for field, path in files.named.items() if path.is_file()},
            options,
            files.beside,
        )

    def files(self) -> ModelFiles:
        """The files, in this process's file system. Raises :class:`UsageError` where they are not there."""
        found: dict[str, Any] = {field: models.named(path) for field, path in self.paths.items()}
        for field, path in found.items():
            if not path.exists():
                raise UsageError(f"{path} is not on this node: put the model where all nodes find it by the same path")
            if path.is_file() and path.stat().st_size != self.sizes.get(field):
                raise UsageError(f"{path} is another file on this node than on sd-server's machine")
        return ModelFiles(**found, **self.beside)


class Painter:
    """Draws one picture at a time; made in an actor, whose methods may be called from several threads."""

    def __init__(self, connect: Connect, place: Place) -> None:
        self._connect, self._place = connect, place
        self._opened = ExitStack()
        self._devices: Sequence[Device] = ()
        self._connecting, self._drawing = Lock(), Lock()
        self._session: Session | None = None
        self._work: Work | None = None
        self._stopped: list[int] = []

    def about(self) -> About:
        """Connects to the devices where that is not done."""
        try:
            devices = self._connected()
        except SdrpcError as error:
            return About(__version__, (), failure(error))
        return About(__version__, tuple(Described(device.name, device.description) for device in devices))

    def memory(self) -> dict[str, Memory]:
        """Of those devices that say it, each when it is its turn: pictures are drawn over the same connections."""
        said = {}
        for device in self._devices:
            with suppress(SdrpcError), device.turns:
                said[device.name] = device.memory()
        return said

    def draw(self, number: int, work: Work, settings: Settings, films: bool = False) -> Iterator[list[Told]]:
        """What happens while the pictures (or ``films``) of ``settings`` are drawn, several values at once where they
        come quickly. A :class:`Failure` is the last one. ``number``: for :meth:`stop`."""
        told: SimpleQueue[Told | None] = SimpleQueue()
        thread = Thread(target=self._draw, args=(number, work, settings, films, told.put), name="painter")
        thread.start()
        over = False
        while not over:
            batch = [told.get()]
            with suppress(Empty):
                while True:
                    batch.append(told.get_nowait())
            over = batch[-1] is None
            if values := [value for value in batch if value is not None]:
                yield values
        thread.join()

    def stop(self, number: int) -> None:
        """End what is drawn under that number, within a step."""
        self._stopped = [*self._stopped[1 - REMEMBERED :], number]

    def put_aside(self) -> None:
        """Free the memory of the devices."""
        with self._drawing:
            self._close_session()

    def _draw(
        self, number: int, work: Work, settings: Settings, films: bool, tell: Callable[[Told | None], None]
    ) -> None:
        try:
            with self._drawing:
                session = self._session_of(work)
                draw: Callable[..., Iterator[Told]] = _frames if films else Session.draw
                for drawn in draw(session, settings, tell, lambda: number in self._stopped):
                    tell(drawn)
        except SdrpcError as error:
            told = failure(error)
            if told.kind == "lost":
                self._give_up()
            tell(told)
        except Exception as error:  # a fault of ours must not end the actor
            log.exception("a picture failed")
            tell(Failure("error", f"{type(error).__name__}: {error}"))
        finally:
            tell(None)

    def _session_of(self, work: Work) -> Session:
        if self._session is None or self._work != work:
            self._close_session()
            model = open_model(work.files())
            self._session, self._work = Session(model, self._place(model, self._connected()), **work.options), work
        return self._session

    def _connected(self) -> Sequence[Device]:
        with self._connecting:
            if not self._devices:
                self._devices = self._opened.enter_context(self._connect())
            return self._devices

    def _give_up(self) -> None:
        """Whoever draws next connects anew."""
        self._close_session()
        with self._connecting, suppress(SdrpcError):
            self._devices = ()
            self._opened.close()

    def _close_session(self) -> None:
        session, self._session, self._work = self._session, None, None
        if session is not None:
            with suppress(SdrpcError):  # a device that is gone has freed it
                session.close()


def _frames(session: Session, settings: Settings, on_event: OnEvent, cancel: Cancel) -> Iterator[Film | Frame]:
    """The films of ``settings``, frame by frame."""
    for film in session.draw_video(settings, on_event, cancel):
        yield Film(film.count, film.fps, film.width, film.height, film.seed, film.sound)
        yield from map(Frame, film.frames)


def path_of(text: str | Path | None) -> str | None:
    """A folder's path as every node shall look for it."""
    return None if text is None else str(Path(text).absolute())
