"""The near half of a seat in a Ray cluster: it stands in sd-server for a session that an actor has."""

from __future__ import annotations

import itertools
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from .. import __version__
from ..client import parse_endpoint
from ..device import Device, Memory
from ..diffusion.drawable import settings_of
from ..diffusion.events import Cancel, Event, OnEvent
from ..diffusion.pictures import Picture, Video
from ..diffusion.request import Request, Settings
from ..errors import ConnectionLost, DeviceError, UsageError
from ..families.model import Model
from ..runtime.chain import devices_of
from ..web.jobs import Kind
from ..web.seats import Opening, Seat
from .lease import Lease, leases
from .painter import About, Described, Failure, Painter, Place, Told, Work, path_of, raised

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.1
"""How often it is asked, while an actor draws, whether to stop."""
READY_SECONDS = 1.0
ANSWER_SECONDS = 10.0
AUTO = "auto"
PATIENCE_SECONDS = 10.0
"""How long an actor may take to start before that is worth a word."""
MEMORY_SECONDS = 2.0
CLOSE_SECONDS = 10.0
CALLS = 4
"""Of one actor at a time: a picture is drawn while memory is asked for and pictures are stopped."""


@contextmanager
def joined(address: str) -> Iterator[None]:
    """This process in the cluster at ``address`` (auto: that of this machine). Raises :class:`UsageError`."""
    try:
        if address != AUTO:  # Ray asks for minutes
            socket.create_connection(parse_endpoint(address), ANSWER_SECONDS).close()
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (RayError, RuntimeError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or _line(error)
        raise UsageError(
            f"no Ray cluster can be joined at {address}: {reason}; start one with ray start --head"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _line(error: Exception) -> str:
    """The first sentence of what Ray says, which may be pages."""
    return str(error).partition("\n")[0].partition(". ")[0].rstrip(".")


Connecting = Callable[[Lease], AbstractContextManager[Sequence[Device]]]
"""Gives an actor the devices of its lease."""


def seats(connecting: Connecting, place: Place, together: bool, only: Sequence[str]) -> list[ClusterSeat]:
    """Seats at all devices that the cluster offers now, as :func:`leases` says."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    actor = ray.remote(Painter)
    made = []
    for lease in leases(nodes, together, only):
        # An actor whose process or node ends is started again, there or where the same devices are offered.
        options = {"num_cpus": 0, "resources": lease.resources, "max_restarts": -1, "max_concurrency": CALLS}
        made.append(ClusterSeat(lease, actor.options(**options).remote(partial(connecting, lease), place), place))
    return made


class ClusterSeat(Seat):
    """An actor with the devices of ``lease``."""

    kinds = frozenset({Kind.PICTURES, Kind.FILM})

    def __init__(self, lease: Lease, actor: Any, place: Place) -> None:
        self.name, self._actor, self._place = str(lease), actor, place
        self._numbers = itertools.count()
        self._asked: Any = None
        self._about: About | None = None
        self._trouble: str | None = None
        self._since = time.monotonic()

    def ready(self) -> bool:
        """Whether the actor is there, has its devices, and is of our version."""
        try:
            about = self._ask()
        except RayError as error:
            self._say(f"its actor is not there: {_line(error)}")
            return False
        if about is None:
            if time.monotonic() - self._since > PATIENCE_SECONDS:
                self._say("waits for its devices: another sd-server has them, or no node that offers them is there")
            return False
        self._since = time.monotonic()
        self._about = about
        trouble = about.failure.words if about.failure else ""
        if about.version != __version__:
            trouble = f"its node has sdrpc {about.version}, this machine {__version__}: install the same on both"
        self._say(trouble)
        return not trouble

    def open(self, opening: Opening) -> FarSession:
        options = {**opening.options, "lora_dir": path_of(opening.options["lora_dir"])}
        options["embd_dir"] = path_of(options["embd_dir"])
        return FarSession(self.name, self._actor, self._numbers, opening.model, Work.of(opening.files, options))

    def devices(self, model: Model) -> Sequence[FarDevice]:
        """Those that the actor has told of; none while it has not. Raises :class:`InvalidValue` where the user asked
        for others."""
        if self._about is None or not self._about.devices:
            return []
        placed = self._place(model, self._about.devices)
        used: list[Any] = devices_of(itertools.chain.from_iterable(placed.values()))
        titles = [self.name] if len(used) == 1 else [f"{self.name} {device.name}" for device in used]
        return [FarDevice(title, device, self._actor) for title, device in zip(titles, used, strict=True)]

    def _ask(self) -> About | None:
        """What the actor says; None where it has not said it yet. Raises :class:`RayError`."""
        if self._asked is None:
            self._asked = self._actor.about.remote()
        done, _ = ray.wait([self._asked], timeout=READY_SECONDS)
        if not done:
            return None  # no node has the resource to give, or it is being started
        asked, self._asked = self._asked, None
        told: About = ray.get(asked)
        return told

    def _say(self, trouble: str) -> None:
        """Log what keeps the seat from drawing, or that nothing does, when that is news."""
        if trouble != self._trouble:
            self._trouble = trouble
            log.log(logging.WARNING if trouble else logging.INFO, "%s: %s", self.name, trouble or "is there")


@dataclass(frozen=True)
class FarDevice:
    """What is known here of an actor's device, ``about`` as the actor tells it."""

    name: str
    about: Described
    actor: Any

    @property
    def description(self) -> str:
        return self.about.description

    def memory(self) -> Memory:
        with suppress(RayError):
            said: Mapping[str, Memory] = ray.get(self.actor.memory.remote(), timeout=MEMORY_SECONDS)
            if self.about.name in said:
                return said[self.about.name]
        raise DeviceError(f"{self.name}: its actor does not say how much memory it has")


class FarSession:
    """As much of a session as a seat needs. ``numbers``: for the actor's pictures."""

    def __init__(self, name: str, actor: Any, numbers: Iterator[int], model: Model, work: Work) -> None:
        self.model, self._name, self._actor, self._numbers, self._work = model, name, actor, numbers, work

    def settings(self, request: Request, video: bool = False) -> Settings:
        return settings_of(self.model, request, video)

    def draw(self, settings: Settings, on_event: OnEvent, cancel: Cancel) -> Iterator[Picture]:
        """As :meth:`sdrpc.Session.draw`. An actor that ends in the middle is a device that is lost."""
        yield from self._drawn(settings, False, on_event, cancel)

    def draw_video(self, settings: Settings, on_event: OnEvent, cancel: Cancel) -> Iterator[Video]:
        """As :meth:`sdrpc.Session.draw_video`."""
        drawn = self._drawn(settings, True, on_event, cancel)
        for film in drawn:
            frames = (frame.image for frame in itertools.islice(drawn, film.frames))
            yield Video(frames, film.frames, film.fps, film.width, film.height, film.seed, film.sound)
            deque(frames, 0)  # those that nobody took

    def _drawn(self, settings: Settings, films: bool, on_event: OnEvent, cancel: Cancel) -> Iterator[Any]:
        """Pictures, or films with their frames behind them, as the actor draws them."""
        number, over = next(self._numbers), False
        answers = self._actor.draw.options(num_returns="streaming").remote(number, self._work, settings, films)
        try:
            for told in self._told(number, answers, cancel):
                if isinstance(told, Failure):
                    over = True
                    raise raised(told)
                if isinstance(told, Event):
                    on_event(told)
                else:
                    yield told
            over = True
        except RayTaskError:
            raise  # a fault of ours: it would come again
        except RayError as error:
            over = True
            raise ConnectionLost(self._name, "it drew", f"its actor is not there: {_line(error)}") from error
        finally:
            if not over:  # nobody wants the rest
                self._actor.stop.remote(number)

    def _told(self, number: int, answers: Any, cancel: Cancel) -> Iterator[Told]:
        """What the actor tells, which is told to stop when ``cancel`` says so."""
        stopped = False
        while True:
            done, _ = ray.wait([answers], timeout=LOOK_SECONDS)
            if not stopped and cancel():
                stopped = True
                self._actor.stop.remote(number)
            if done:
                try:
                    answer = next(answers)
                except StopIteration:
                    return
                yield from ray.get(answer)

    def close(self) -> None:
        """Free the actor's devices; the actor stays."""
        with suppress(RayError):
            ray.get(self._actor.put_aside.remote(), timeout=CLOSE_SECONDS)
