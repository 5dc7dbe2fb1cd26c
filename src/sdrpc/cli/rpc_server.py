"""rpc-server: offer this machine's devices to clients of ggml's RPC protocol."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..content import fnv1a
from ..device_names import resolve
from ..errors import InvalidValue
from ..ggml.dialect import Dialect, dialects
from ..server import Cache, CacheService, Limits, Server
from ..server.negotiation import Fixed, Learning, Protocol, default_path
from ..storage import cache_folder
from . import report
from .command import Command
from .entry import ready
from .server_options import AUTO, OPTIONS

if TYPE_CHECKING:
    from ..device import ServedDevice
    from ..engine.device import LocalDevice

STOP_SECONDS = 1.0
"""How long each device may take to end what it computes when the server stops."""

Chosen = Mapping[str, Any]
"""The options' values, by the options' names in Python."""


def main() -> None:
    """The console script; exit status 0 after Ctrl-C or SIGTERM, 2 for an option that can't be honoured, else 1."""
    ready()
    sys.exit(report.guarded(lambda: run(sys.argv[1:]), COMMAND.fields))


def run(arguments: Sequence[str]) -> int:
    """The command with ``arguments``; its exit status."""
    return COMMAND.run(arguments)


def rpc_server(**chosen: Any) -> int:
    """Offer this machine's devices to clients of ggml's RPC protocol: sdrpc's sd-cli, stable-diffusion.cpp, llama.cpp.

    Any number of clients at once; none sees another's memory. The protocol has neither passwords nor encryption: listen
    in trusted networks only."""
    report.logging_to_console(chosen["verbose"])
    if chosen["version"]:
        print(f"rpc-server {__version__} (RPC protocols {', '.join(dialects())})")
        return 0
    if chosen["completion"]:
        print(COMMAND.completion(chosen["completion"]))
        return 0
    versions = protocol_of(chosen["protocol"])
    limits = limited(chosen)
    kept = Cache(cache_folder("weights"), chosen["cache_size"]) if chosen["cache"] else None

    from ..engine.device import devices  # torch takes a while: not before the options are known to be good
    from ..engine.system import keep_freed_memory

    keep_freed_memory()
    found = devices(
        chosen["precision"],
        chosen["threads"] or None,
        compute_limit=limits.compute_seconds,
        dequant_cache=chosen["dequant_cache"],
    )
    if chosen["list_devices"]:
        print(*map(described, found), sep="\n")
        return 0
    with cache_service(kept) as shared:
        server = Server(offered(found, chosen["device"]), versions, chosen["host"], chosen["port"], limits, shared)
        announce(server)
        serve(server)
    end(server)
    return 0


COMMAND = Command("rpc-server", OPTIONS, rpc_server, bare=True, help=rpc_server.__doc__)


def protocol_of(version: str) -> Protocol:
    """What ``--protocol`` means."""
    return Learning(default_path()) if version == AUTO else Fixed(choose(version))


def limited(chosen: Chosen) -> Limits:
    """The limits that the options say; the defaults where they don't."""
    asked = {
        "connections": chosen["max_clients"],
        "bytes_of_all": chosen["max_memory"],
        "buffer_bytes": chosen["max_memory_per_client"],
    }
    return replace(Limits(), **{field: value for field, value in asked.items() if value is not None})


def choose(version: str) -> Dialect:
    """The dialect that ``version`` means: that one, or the newest of a family ("5", "5.0")."""
    wanted = version.removeprefix("v").split(".")
    fitting = [dialect for known, dialect in dialects().items() if known.split(".")[: len(wanted)] == wanted]
    if not fitting:
        raise InvalidValue("protocol", version, f"there are {AUTO}, {', '.join(dialects())}")
    return fitting[-1]


def offered(found: Sequence[LocalDevice], names: str) -> list[LocalDevice]:
    """The devices called ``names``, in that order; all accelerators, else the CPU, when none is named."""
    if not names:
        return [device for device in found if device.name != "CPU"] or list(found)
    known = [device.name for device in found]
    wanted = [resolve(name, known, known[0], "device") for name in re.split("[,/]", names)]
    if len(set(wanted)) < len(wanted):
        raise InvalidValue("device", names, "a device is named twice")
    return [found[known.index(name)] for name in wanted]


def described(device: ServedDevice) -> str:
    """A line about ``device``, as the native server writes it."""
    free, total = device.memory()
    return f"  {device.name}: {device.description} ({total >> 20} MiB, {free >> 20} MiB free)"


@contextmanager
def cache_service(cache: Cache | None) -> Iterator[CacheService | None]:
    """``cache`` at work until the end; a warning when native clients can't use it."""
    if cache is None:
        yield None
        return
    if fnv1a() is None:
        report.warn(
            "llama.cpp and stable-diffusion.cpp can't use the cache: they ask for weights by a hash that is too slow "
            "without numba (pip install 'sdrpc[cache]'). Clients of sdrpc can."
        )
    opened = CacheService(cache)
    try:
        yield opened
    finally:
        opened.close()


def announce(server: Server) -> None:
    """Print what is offered where, and warn when other machines can reach it."""
    print(f"Starting RPC server {server.protocol}")
    print("Devices:", *map(described, server.devices), sep="\n")
    cache = server.cache_service and server.cache_service.cache
    print(f"  local cache    : {f'{cache.folder} (at most {cache.budget >> 20} MiB)' if cache else 'n/a'}")
    print(f"  endpoint       : {server.endpoint}", flush=True)
    if server.exposed:
        report.warn(
            f"whoever can reach {server.endpoint} can use these devices and their memory: the "
            "protocol has neither passwords nor encryption. Listen on 127.0.0.1 or in a trusted network only."
        )


def serve(server: Server) -> None:
    """Until Ctrl-C or SIGTERM; a second one ends the process at once."""

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        server.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    server.serve()


def end(server: Server) -> None:
    """End what is still computed. Where a kernel can't be stopped, the process ends with it: Python would wait."""
    if all(device.stop(STOP_SECONDS) for device in server.devices):
        return
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(0)
