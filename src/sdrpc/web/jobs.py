"""What people ask for and what became of it, as values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from heapq import heapify, heappop, heapreplace
from typing import Any

from ..errors import SdrpcError


class State(str, Enum):
    """Where a job is. The values are those of stable-diffusion.cpp's sd-server."""

    QUEUED = "queued"
    RUNNING = "generating"
    DONE = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def over(self) -> bool:
        return self in (State.DONE, State.FAILED, State.CANCELLED)


class Kind(str, Enum):
    """What a job makes: the modes of stable-diffusion.cpp."""

    PICTURES = "img_gen"
    FILM = "vid_gen"
    LARGER = "upscale"


FORMATS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
"""Formats of pictures → what their files end with."""

FILM_FORMATS = {"webm": ".webm", "webp": ".webp", "avi": ".avi", "mp4": ".mp4", "gif": ".gif"}
"""The same of films."""

SUFFIXES = {**FORMATS, **FILM_FORMATS}

MEDIA_TYPES = {
    "png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp",
    "webm": "video/webm", "avi": "video/x-msvideo", "mp4": "video/mp4", "gif": "image/gif",
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What to draw: a model by name, and the fields of a :class:`sdrpc.Request` whose seed is settled, so that the same
    pictures come out whenever it is drawn. ``inputs``: how many pictures there are for a field; the store has them.
    ``quality``: of JPEG and WebP, 0 … 100; ``metadata``: pictures tell how they came about. ``kind``: what comes out;
    of :attr:`Kind.LARGER` the request has the fields of :class:`sdrpc.web.enlarging.Larger`, and there is no model."""

    model: str
    request: Mapping[str, Any]
    output_format: str = "png"
    quality: int | None = None
    metadata: bool = True
    inputs: Mapping[str, int] = field(default_factory=dict)
    kind: Kind = Kind.PICTURES

    @property
    def pictures(self) -> int:
        return int(self.request.get("batch_count", 1))


@dataclass(frozen=True)
class Job:
    """A task in the queue. Times are seconds since the epoch. ``user``: whose turn it takes; ``seeds``: of the pictures
    that are there; ``error``: why there are none, as :func:`marked` has it."""

    id: str
    user: str
    task: Task
    state: State
    created: float
    started: float | None = None
    finished: float | None = None
    seeds: tuple[int, ...] = ()
    error: str | None = None


MARK = "\x1f"
"""Stands around a field's name in what is kept of an error: each API has its own name for it."""


def marked(error: SdrpcError) -> str:
    """The words of ``error``, to be kept."""
    return error.told(lambda field: f"{MARK}{field}{MARK}")


def told(words: str, called: Callable[[str], str]) -> str:
    """``words`` of :func:`marked`, with what ``called`` makes of the fields in them."""
    return re.sub(f"{MARK}(.*?){MARK}", lambda field: called(field[1]), words)


def in_turn(queued: Sequence[Job], served: Mapping[str, float]) -> list[Job]:
    """``queued`` (oldest first) in the order in which they are drawn: users take turns. Whoever waited longest since a
    job of theirs began goes first; each one's jobs stay in their order. ``served``: user → when a job of theirs began.
    """
    waiting: dict[str, list[Job]] = {}
    for job in queued:
        waiting.setdefault(job.user, []).append(job)
    lines = [iter(jobs) for jobs in waiting.values()]
    turns = [(served.get(user, 0.0), jobs[0].created, line) for line, (user, jobs) in enumerate(waiting.items())]
    ahead = [next(line) for line in lines]
    heapify(turns)
    order = list[Job]()
    turn = max(served.values(), default=0.0)
    while turns:
        _, _, line = turns[0]
        order.append(ahead[line])
        turn += 1.0
        following = next(lines[line], None)
        if following is None:
            heappop(turns)
        else:
            ahead[line] = following
            heapreplace(turns, (turn, following.created, line))
    return order


def chosen(order: Sequence[Job], loaded: str | None, in_a_row: int, most: int) -> Job | None:
    """The job to draw next, from ``order`` of :func:`in_turn`: the first; but one of the ``loaded`` model where there
    is one and fewer than ``most`` went before others ``in_a_row``, because a change of the model takes longer than a
    picture.
    """
    if not order:
        return None
    same = next((job for job in order if job.task.model == loaded), None)
    return same if same and in_a_row < most else order[0]
