"""Where the console scripts begin: before anything large is imported, so that Ctrl-C, closed streams and odd encodings
are met from the first moment."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from types import FrameType

from .streams import prepare

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def sd_cli() -> None:
    """The console script sd-cli."""
    _run("sd_cli")


def rpc_server() -> None:
    """The console script rpc-server."""
    _run("rpc_server")


def sdrpc() -> None:
    """The console script sdrpc, which holds the others."""
    _run("main")


def ready() -> None:
    """What every command needs before it imports torch or prints. To do it again changes nothing."""
    prepare()
    threads_sleep()


def _run(module: str) -> None:
    ready()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else whoever started us wants Ctrl-C ignored
        signal.signal(signal.SIGINT, _leave)
    main = import_module(f"{__package__}.{module}").main
    signal.signal(signal.SIGINT, before)
    main()


def threads_sleep() -> None:
    """Let the threads of torch's OpenMP sleep while they have nothing to do, unless the user chose otherwise.

    As a rule they spin, and where other programs want the cores, each of torch's operations then waits for threads that
    have none. OpenMP reads the variable when torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _leave(_number: int, _frame: FrameType | None) -> None:
    """Ctrl-C while modules are imported: an exception there could come out as anything."""
    sys.stderr.write("interrupted\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)
