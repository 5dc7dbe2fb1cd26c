"""An application on a socket, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterable
from types import FrameType

import uvicorn
from fastapi import FastAPI

GRACE_SECONDS = 2
"""How long answers that are under way may take when the server ends; jobs stay in the queue."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ending: Callable[[], None]) -> None:
        super().__init__(config)
        self._ending = ending

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        signal.signal(sig, signal.SIG_DFL)  # a second one ends the process at once
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
    hangs_up: Iterable[signal.Signals] = (),
) -> None:
    """Answer on ``listening``, up to ``connections`` at one time: further ones are told 503. ``ending`` is called when
    it ends, while answers are still under way. ``hangs_up``: further signals that end it."""
    config = uvicorn.Config(
        app, log_config=None, access_log=verbose, limit_concurrency=connections, server_header=False, lifespan="off",
        timeout_graceful_shutdown=GRACE_SECONDS,
    )  # fmt: skip
    server = _Server(config, ending)

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
