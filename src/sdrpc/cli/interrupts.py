"""Ctrl-C ends a command within a second, and at once the second time. So do SIGTERM and a terminal that is closed: what
is not whole is removed, and it ends also as the first process of a container, which the system does not end by itself.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

SIGNALLED = 128
"""And the signal's number is the exit status, as shells have it."""

SECONDS = 0.7
"""What is tidied up after the first signal may take so long: connections are closed, files that are not whole removed.
What can't be interrupted (a kernel of torch, a thread that reads a disk) does not end sooner for being waited for."""

_news = threading.Lock()
_ended_by: int = signal.SIGINT


def at_once() -> None:
    """From now on a signal ends the process: for while modules are imported, when an exception could come out as
    anything."""
    _listen(_leave)


def soon() -> None:
    """From now on a signal raises KeyboardInterrupt, and the process ends ``SECONDS`` later if it has not by then."""
    _listen(_first)


def hang_up() -> tuple[signal.Signals, ...]:
    """The signal of a terminal that is closed, where there is one and nobody wants it ignored, as nohup does."""
    number: signal.Signals | None = getattr(signal, "SIGHUP", None)  # Windows has none
    return () if number is None or signal.getsignal(number) == signal.SIG_IGN else (number,)


def next_ends(number: int) -> None:
    """Let the next signal of this number end the process, whatever it is at."""
    first = os.getpid() == 1  # for which the system does nothing on its own
    signal.signal(number, _leave if first else signal.SIG_DFL)


def _listen(handler: signal._HANDLER) -> None:
    usual = (signal.default_int_handler, signal.SIG_DFL, _leave, _first)
    for number in (signal.SIGINT, signal.SIGTERM, *hang_up()):
        if signal.getsignal(number) in usual:
            signal.signal(number, handler)  # else whoever started us wants it ignored


def _first(number: int, _frame: FrameType | None) -> None:
    global _ended_by
    _ended_by, hang_ups = number, hang_up()
    for further in (signal.SIGINT, signal.SIGTERM):
        signal.signal(further, _leave)
    for further in hang_ups:  # it comes twice: from the shell, and from the system when the shell has ended
        signal.signal(further, signal.SIG_IGN)
    timer = threading.Timer(SECONDS, leave)
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _leave(number: int, _frame: FrameType | None) -> None:
    global _ended_by
    _ended_by = number
    leave()


def is_news() -> bool:
    """Whether nobody has said yet that the command was interrupted; whoever asks says it."""
    return _news.acquire(blocking=False)


def said() -> str:
    """What ended the command, in words."""
    return "interrupted" if _ended_by == signal.SIGINT else f"ended by {signal.Signals(_ended_by).name}"


def status() -> int:
    """The exit status of a command that was interrupted."""
    return SIGNALLED + _ended_by


def leave() -> None:
    """End the process."""
    if sys.stderr is not None and is_news():
        start = "\r\x1b[2K" if sys.stderr.isatty() else ""  # over what a status line says
        sys.stderr.write(f"{start}{said()}\n")
        sys.stderr.flush()
    os._exit(status())
