"""Where the console scripts begin: before anything large is imported, so that Ctrl-C, closed streams and odd encodings
are met from the first moment."""

from __future__ import annotations

import gc
import os
from importlib import import_module

from . import interrupts
from .streams import prepare


def sd_cli() -> None:
    """The console script sd-cli."""
    _run("sd_cli")


def rpc_server() -> None:
    """The console script rpc-server."""
    _run("rpc_server")


def sd_server() -> None:
    """The console script sd-server."""
    _run("sd_server")


def sdrpc() -> None:
    """The console script sdrpc, which holds the others."""
    _run("main")


def ready() -> None:
    """What every command needs before it imports torch or prints. To do it again changes nothing."""
    prepare()
    threads_sleep()


def _run(module: str) -> None:
    ready()
    interrupts.at_once()
    main = import_module(f"{__package__}.{module}").main
    interrupts.soon()
    try:
        main()
    finally:
        gc.freeze()  # or Python, at its end, looks for garbage in all that torch and diffusers made: a second or two


def threads_sleep() -> None:
    """Let the threads of torch's OpenMP sleep while they have nothing to do, unless the user chose otherwise.

    As a rule they spin, and where other programs want the cores, each of torch's operations then waits for threads that
    have none. OpenMP reads the variable when torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
