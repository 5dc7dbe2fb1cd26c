"""An application on a socket, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as _Usual
except ImportError:  # it takes none where it can't be built
    from uvicorn.protocols.http.h11_impl import H11Protocol as _Usual  # type: ignore[assignment]

GRACE_SECONDS = 2
"""How long answers that are under way may take when the server ends; jobs stay in the queue."""


HEAD_SECONDS = 10.0
"""From connecting, or the last answer, to a whole request but for its body: whoever says nothing, or ends no line, must
not hold a place for ever."""

MAX_HEAD = 1 << 16
"""Bytes of that."""


class _Protocol(_Usual):
    """A connection on which no head of a request is larger than :data:`MAX_HEAD`."""

    _head = 0

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        of_a_body = before is not None and before.more_body
        super().data_received(data)
        self._head = 0 if of_a_body or self.cycle is not before else self._head + len(data)
        if self._head > MAX_HEAD:
            self.transport.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ending: Callable[[], None], next_ends: Callable[[int], None]) -> None:
        super().__init__(config)
        self._ending, self._next_ends = ending, next_ends
        self._silent: dict[Any, float] = {}

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # each second
            self._look()
        return await super().on_tick(counter)

    def _look(self) -> None:
        """End connections that have asked for nothing for too long."""
        now = time.monotonic()
        connections: Iterable[Any] = self.server_state.connections
        idle = [each for each in connections if each.cycle is None or each.cycle.response_complete]
        self._silent = {each: self._silent.get(each, now) for each in idle}
        for each, since in self._silent.items():
            if now - since > HEAD_SECONDS:
                each.transport.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._next_ends(sig)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._ending()
        await super().shutdown(sockets)


def serve(
    app: FastAPI,
    listening: socket.socket,
    connections: int,
    verbose: bool,
    ending: Callable[[], None],
    next_ends: Callable[[int], None],
    hangs_up: Iterable[signal.Signals] = (),
) -> None:
    """Answer on ``listening``, up to ``connections`` at one time: further ones are told 503. ``ending`` is called when
    it ends, while answers are still under way; ``next_ends`` when a signal ends it, so that the next one of that number
    ends the process. ``hangs_up``: further signals that end it."""
    config = uvicorn.Config(
        app, log_config=None, access_log=verbose, limit_concurrency=connections, server_header=False, lifespan="off",
        timeout_graceful_shutdown=GRACE_SECONDS, http=_Protocol, ws="none",
    )  # fmt: skip
    server = _Server(config, ending, next_ends)

    def hung_up(_: int, frame: FrameType | None) -> None:
        server.handle_exit(signal.SIGTERM, frame)

    before = {number: signal.signal(number, _over) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in hangs_up:
        signal.signal(number, hung_up)  # for good: it comes once more when the shell has ended, and we put away
    server.run(sockets=[listening])
    for number, handler in before.items():
        signal.signal(number, handler)


def _over(_number: int, _frame: FrameType | None) -> None:
    """uvicorn repeats the signal that ended it, when it has ended: we have more to put away."""
