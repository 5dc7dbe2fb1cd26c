"""Ctrl-C ends a command within a second, and at once the second time."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

SECONDS = 0.7
"""What is tidied up after the first Ctrl-C may take so long: connections are closed, files that are not whole removed.
What can't be interrupted (a kernel of torch, a thread that reads a disk) does not end sooner for being waited for."""


_news = threading.Lock()


def at_once() -> None:
    """From now on Ctrl-C ends the process: for while modules are imported, when an exception could come out as
    anything."""
    _listen(_leave)


def soon() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, and the process ends ``SECONDS`` later if it has not by then."""
    _listen(_first)


def hang_up() -> tuple[signal.Signals, ...]:
    """The signal of a terminal that is closed, where there is one and nobody wants it ignored, as nohup does."""
    number: signal.Signals | None = getattr(signal, "SIGHUP", None)  # Windows has none
    return () if number is None or signal.getsignal(number) == signal.SIG_IGN else (number,)


def _listen(handler: signal._HANDLER) -> None:
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _leave, _first):
        signal.signal(signal.SIGINT, handler)  # else whoever started us wants Ctrl-C ignored


def _first(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _leave)
    timer = threading.Timer(SECONDS, leave)
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _leave(_number: int, _frame: FrameType | None) -> None:
    leave()


def is_news() -> bool:
    """Whether nobody has said yet that the command was interrupted; whoever asks says it."""
    return _news.acquire(blocking=False)


def leave() -> None:
    """End the process."""
    if sys.stderr is not None and is_news():
        start = "\r\x1b[2K" if sys.stderr.isatty() else ""  # over what a status line says
        sys.stderr.write(f"{start}interrupted\n")
        sys.stderr.flush()
    os._exit(INTERRUPTED)
