"""What all APIs do: submit a request, wait for its job, answer with pictures or with a reason."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Depends
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from ...diffusion.image_files import pixels_of, read_pictures
from ...diffusion.request import Request
from ...errors import CheckpointError, InvalidValue, SdrpcError, UsageError
from ..board import Progress
from ..context import Context
from ..gate import error_body
from ..jobs import Job, Kind, State, Task, told
from ..store import NotKept, QueueFull
from .described import MAX_PICTURES, MAX_STEPS

T = TypeVar("T")

MAX_TEXT, MAX_ASKED = 1 << 15, 1 << 18
"""Characters of a prompt, and of all that a request says beside its pictures."""

MAX_PIXELS = 1 << 27
"""Of all pictures that a request begins with: twice what one may have. A file of a few bytes can have as many as one
may, and each is 3 bytes in memory."""

_READING = CapacityLimiter(2)
"""Requests whose pictures are read at one time: each takes seconds and up to a gigabyte. Others wait without a thread,
which are for who wants less."""

LOOK_SECONDS = 5.0
"""How often somebody who waits looks at the job, should a bell have been missed."""

PLACE_SECONDS = 1.0
"""How often somebody in the line is told of another place."""


async def _context(request: HttpRequest) -> Context:  # what is not async goes through another thread
    found: Context = request.app.state.context
    return found


async def _user(request: HttpRequest) -> str:
    return str(request.state.user)


Here = Annotated[Context, Depends(_context)]
"""What the server is made of, for a function that answers requests."""

User = Annotated[str, Depends(_user)]
"""Whose turn a request takes: its key's name, else its address."""


class NoPicture(Exception):
    """A job ended without pictures."""

    def __init__(self, job: Job) -> None:
        self.job = job
        super().__init__(why_not(job, str))

    def told(self, called: Callable[[str], str]) -> str:
        """Why, with what ``called`` makes of the fields in it."""
        return why_not(self.job, called)


def why_not(job: Job, called: Callable[[str], str]) -> str:
    """Why a job that is over has no pictures; ``called``: what a field is to who asks."""
    return "the job was cancelled" if job.state is State.CANCELLED else told(job.error or "nothing was drawn", called)


class Ending(Exception):
    """The server ends before the job is drawn."""

    def __init__(self) -> None:
        super().__init__("the server is ending; the job stays in its queue and is drawn when it is there again")


async def apart(work: Callable[[], T]) -> T:
    """What ``work`` gives, which reads pictures: beside all other requests, and few at one time."""
    return await to_thread.run_sync(work, limiter=_READING)


async def submit(
    here: Context,
    who: str,
    model: str | None,
    asked: Mapping[str, Any],
    pictures: Mapping[str, Sequence[bytes]] | None = None,
    output_format: str = "png",
    quality: int | None = None,
    metadata: bool = True,
    kind: Kind = Kind.PICTURES,
) -> Job:
    """Put a request of the fields ``asked`` into the queue, None meaning the model's default, with the files of the
    ``pictures`` that it begins with.

    Raises :class:`InvalidValue` for what can't be drawn, :class:`CheckpointError`, :class:`QueueFull` and
    :class:`NotKept`.
    """
    check_texts(asked)
    given = {name: files for name, files in (pictures or {}).items() if files}

    def enter() -> Job:
        check_pictures(given)
        named = {name: value for name, value in asked.items() if value is not None}
        request = Request(**named | read_pictures(given))
        if not 1 <= request.batch_count <= MAX_PICTURES:
            raise InvalidValue("batch_count", request.batch_count, f"it can be 1 … {MAX_PICTURES}")
        if not 1 <= (request.steps or 1) <= MAX_STEPS:
            raise InvalidValue("steps", request.steps, f"it can be 1 … {MAX_STEPS}")
        task = here.studio.resolved(model, request, output_format, quality, metadata, kind)
        return submit_task(here, who, task, given)

    # Without files to read this takes less than a thread: fifty requests of one moment would be forty threads that want
    # the interpreter, and each would wait for all of them.
    if given:
        return await apart(enter)
    return await run_in_threadpool(enter) if here.shelf.known(model) is None else enter()


def check_texts(asked: Mapping[str, Any]) -> None:
    """Raises :class:`InvalidValue` for texts and lists that nobody writes: a prompt is taken apart in the square of its
    length, and a job is kept for days."""
    for name in ("prompt", "negative_prompt"):
        if len(asked.get(name) or "") > MAX_TEXT:
            raise InvalidValue(name, f"{asked[name][:24]}…", f"is longer than {MAX_TEXT} characters")
    if len(json.dumps(asked, default=str)) > MAX_ASKED:
        name = max(asked, key=lambda name: len(str(asked[name])))
        raise InvalidValue(
            name, f"{str(asked[name])[:24]}…", f"a request can have {MAX_ASKED >> 10} KiB beside pictures"
        )


def check_pictures(given: Mapping[str, Sequence[bytes]]) -> None:
    """Raises :class:`InvalidValue` for more of them than a request may have, before any is decoded."""
    files = [(name, data) for name, each in given.items() for data in each]
    if len(files) > MAX_PICTURES:
        raise InvalidValue(files[0][0], len(files), f"a request can have {MAX_PICTURES} pictures")
    pixels = sum(pixels_of(name, data) for name, data in files)
    if pixels > MAX_PIXELS:
        most = f"all of a request can have {MAX_PIXELS >> 20} mebipixels"
        raise InvalidValue(files[0][0], len(files), f"the pictures have {pixels >> 20} mebipixels; {most}")


def submit_task(here: Context, who: str, task: Task, pictures: Mapping[str, Sequence[bytes]]) -> Job:
    """Put a task into the queue, with the files of its pictures. Raises :class:`QueueFull` and :class:`NotKept`."""
    job = here.store.submit(who, task, pictures)
    here.board.ring(job.id)
    return job


def from_base64(name: str, text: str) -> bytes:
    """The bytes of a picture in base64, or in a data URL of it. Raises :class:`InvalidValue`."""
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidValue(name, text[:24], "is no picture in base64") from error


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def over(here: Context, job: Job) -> Job:
    """``job`` when it is over. Raises :class:`NoPicture` where it ended without pictures, and :class:`Ending`."""
    with here.board.listen(job.id) as bell:
        while True:
            now = here.store.get(job.id)
            if now is None:
                raise NoPicture(job)
            if now.state is State.DONE:
                return now
            if now.state.over:
                raise NoPicture(now)
            if here.board.closed:
                raise Ending
            await here.board.news(bell, LOOK_SECONDS)


async def watched(here: Context, job: Job) -> AsyncIterator[tuple[Job, Progress]]:
    """``job`` and how far it is, whenever that or its place in the line has changed, until it is over."""
    last: tuple[Job, Progress, int] | None = None
    with here.board.listen(job.id) as bell:
        while True:
            now = here.store.get(job.id)
            if now is None:
                return
            seen = now, here.board.get(job.id), here.store.place(now) if now.state is State.QUEUED else 0
            if seen != last:
                yield seen[:2]
            if now.state.over or here.board.closed:
                return
            last = seen
            await here.board.news(bell, PLACE_SECONDS if now.state is State.QUEUED else LOOK_SECONDS)


def pictures_of(here: Context, job: Job) -> list[bytes]:
    """The files of a job's pictures."""
    found = [here.store.picture(job, index) for index in range(len(job.seeds))]
    return [data for data in found if data is not None]


def server_sent(event: str, data: Any) -> str:
    """An event of a text/event-stream."""
    return f"event: {event}\ndata: {json.dumps(data)}\n\n"


STATUS: dict[type[Exception], int] = {
    QueueFull: 429,
    CheckpointError: 500,
    UsageError: 400,
    NoPicture: 500,
    Ending: 503,
    NotKept: 503,
}
"""Error → status of the answer."""


_OPTIONS = {
    "backend": "--backend", "params_backend": "--params-backend", "max_vram": "--max-vram", "rpc": "--rpc",
    "control_net": "--control-net", "taesd": "--taesd", "lora_dir": "--lora-model-dir", "embd_dir": "--embd-dir",
    "hires_upscalers_dir": "--hires-upscalers-dir",
}  # fmt: skip
"""Fields that errors name and no request has → sd-server's options: who started it can change them."""


def naming(called: Mapping[str, str]) -> Callable[[str], str]:
    """What a field of ours is to who asks. ``called``: our field → what their request calls it."""
    return lambda field: called.get(field) or _OPTIONS.get(field, field)


def failed(error: Exception, called: Mapping[str, str]) -> JSONResponse:
    """The answer to a request that ``error`` ended. ``called``: our field → what the request calls it."""
    status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
    headers = {"Retry-After": "5"} if status in (429, 503) else None

    name = naming(called)
    body = error_body(error.told(name) if isinstance(error, SdrpcError | NoPicture) else str(error), status)
    if isinstance(error, InvalidValue):
        body["error"]["param"] = name(error.field)
    return JSONResponse(body, status, headers)
