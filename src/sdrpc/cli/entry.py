"""Where the console scripts begin: before anything large is imported, so that Ctrl-C, closed streams and odd encodings
are met from the first moment."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from . import interrupts
from .streams import prepare

NVIDIA = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/dxg")
"""What Linux has of NVIDIA's driver: as a rule, on Tegra, on Windows' Linux."""
ALLOCATOR = frozenset({"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"})
"""Variables in which a user tells torch how to have a GPU's memory."""
SWITCH_SECONDS = 0.0002
"""For which a thread may keep the interpreter when others want it. Who receives weights, tells several devices what to
draw or answers requests may wait so long behind each system call, and there are thousands: Python's own 5 ms add up."""


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
    threads_take_turns()
    segments_grow()


def _run(module: str) -> None:
    ready()
    interrupts.at_once()
    main = import_module(f"{__package__}.{module}").main
    interrupts.soon()
    try:
        main()
    finally:
        gc.freeze()  # or Python, at its end, looks for garbage in all that torch and diffusers made: a second or two


@contextmanager
def importing() -> Iterator[None]:
    """While large modules are imported: Python does not look for garbage in what they make, then or later."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def threads_sleep() -> None:
    """Let the threads of torch's OpenMP sleep while they have nothing to do, unless the user chose otherwise.

    As a rule they spin, and where other programs want the cores, each of torch's operations then waits for threads that
    have none. OpenMP reads the variable when torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def threads_take_turns() -> None:
    """Let Python's threads wait for each other no longer than ``SWITCH_SECONDS``."""
    sys.setswitchinterval(SWITCH_SECONDS)


def segments_grow() -> None:
    """Let torch take memory of NVIDIA's GPUs in segments that grow and shrink, unless the user chose otherwise.

    As a rule it takes blocks of many sizes and has hundreds of megabytes of gaps between what is in use. It reads the
    variable, which has another name since 2.9, when a GPU is first used. Windows and ROCm have no such segments.
    """
    if sys.platform != "linux" or ALLOCATOR & set(os.environ) or not any(map(os.path.exists, NVIDIA)):
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        number, _, build = version("torch").partition("+")
    except PackageNotFoundError:
        return
    if not build.startswith(("cpu", "rocm", "xpu")):
        renamed = tuple(map(int, number.split(".")[:2])) >= (2, 9)
        os.environ["PYTORCH_ALLOC_CONF" if renamed else "PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
