"""rpc-server: offer this machine's devices to clients of ggml's RPC protocol."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from .. import __version__
from ..content import fnv1a
from ..device_names import resolve
from ..errors import UsageError
from ..ggml.dialect import Dialect, dialects
from ..server import Cache, CacheService, Limits, Server
from ..server.negotiation import Fixed, Learning, Protocol, default_path
from ..storage import cache_folder
from . import report
from .entry import ready

if TYPE_CHECKING:
    from ..device import ServedDevice
    from ..engine.device import LocalDevice

AUTO = "auto"
STOP_SECONDS = 1.0
"""How long each device may take to end what it computes when the server stops."""

app = typer.Typer(
    rich_markup_mode=None, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


def main() -> None:
    """The console script; exit status 0 after Ctrl-C or SIGTERM, 2 for an option that can't be honoured, else 1."""
    ready()
    sys.exit(report.guarded(lambda: run(sys.argv[1:])))


def run(arguments: Sequence[str]) -> None:
    """The command with ``arguments``."""
    typer.main.get_command(app).main(list(arguments), prog_name="rpc-server")


@app.command()
def rpc_server(
    host: Annotated[str, typer.Option("--host", "-H", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="Port; 0 picks a free one.")] = 50052,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            "-d",
            metavar="NAME,…",
            help="Devices to offer.",
            show_default="all accelerators, else CPU",
        ),
    ] = "",
    threads: Annotated[int, typer.Option("--threads", "-t", min=0, help="Threads of the CPU; 0: one per core.")] = 0,
    precision: Annotated[
        str,
        typer.Option(
            metavar="exact|fast|ggml|auto",
            help="How to compute; ggml: rounding as ggml's CPU does; auto: fast where the hardware is made for it.",
        ),
    ] = "auto",
    protocol: Annotated[
        str,
        typer.Option(
            metavar="auto|VERSION",
            help="Protocol of the clients, such as 5.0; auto: what each of them speaks, learnt where it can't be seen.",
        ),
    ] = AUTO,
    dequant_cache: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory of each device for weights in the form that they are computed in.",
            show_default="256M; a quarter of an accelerator",
        ),
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache", "-c", help="Keep weights on disk: clients that come again need not send them.")
    ] = False,
    cache_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Disk space for --cache; what was used longest ago goes first.")
    ] = "32G",
    max_clients: Annotated[
        int, typer.Option("--max-clients", min=1, help="Connections at one time; further ones are refused.")
    ] = Limits.connections,
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory for the buffers of all clients.", show_default="all that is free"),
    ] = None,
    max_memory_per_client: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for one client's buffers and running graph.",
            show_default=f"{Limits.share:.0%} of a device",
        ),
    ] = None,
    list_devices: Annotated[
        bool, typer.Option("--list-devices", help="Print this machine's devices and exit.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every client.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print versions and exit.")] = False,
) -> None:
    """Offer this machine's devices to clients of ggml's RPC protocol: sdrpc's sd-cli, stable-diffusion.cpp, llama.cpp.

    Any number of clients at once; none sees another's memory. The protocol has neither passwords nor encryption: listen
    in trusted networks only."""
    report.logging_to_console(verbose)
    if version:
        print(f"rpc-server {__version__} (RPC protocols {', '.join(dialects())})")
        return
    versions = protocol_of(protocol)
    limits = limited(max_clients, max_memory, max_memory_per_client)
    converted = None if dequant_cache is None else size(dequant_cache)
    kept = Cache(cache_folder("weights"), size(cache_size, "--cache-size")) if cache else None

    from ..engine.device import devices  # torch takes a while: not before the options are known to be good
    from ..engine.system import keep_freed_memory

    keep_freed_memory()
    found = devices(precision, threads or None, compute_limit=limits.compute_seconds, dequant_cache=converted)
    if list_devices:
        print(*map(described, found), sep="\n")
        return
    with cache_service(kept) as shared:
        server = Server(offered(found, device), versions, host, port, limits, shared)
        announce(server)
        serve(server)
    end(server)


def protocol_of(version: str) -> Protocol:
    """What ``--protocol`` means."""
    return Learning(default_path()) if version == AUTO else Fixed(choose(version))


def limited(clients: int, memory: str | None, memory_per_client: str | None) -> Limits:
    """The limits that the options say; the defaults where they don't."""
    chosen: dict[str, int] = {"connections": clients}
    if memory is not None:
        chosen["bytes_of_all"] = size(memory, "--max-memory")
    if memory_per_client is not None:
        chosen["buffer_bytes"] = size(memory_per_client, "--max-memory-per-client")
    return replace(Limits(), **chosen)


def choose(version: str) -> Dialect:
    """The dialect that ``version`` means: that one, or the newest of a family ("5", "5.0")."""
    wanted = version.removeprefix("v").split(".")
    fitting = [dialect for known, dialect in dialects().items() if known.split(".")[: len(wanted)] == wanted]
    if not fitting:
        raise UsageError(f"--protocol {version}: there are {AUTO}, {', '.join(dialects())}")
    return fitting[-1]


def size(text: str, option: str = "--dequant-cache") -> int:
    """Bytes from ``512M``, ``2G``, ``1.5GiB``, ``0``: the value of ``option``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise UsageError(f"{option} {text}: not a size; write it as 512M or 2G")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def offered(found: Sequence[LocalDevice], names: str) -> list[LocalDevice]:
    """The devices called ``names``, in that order; all accelerators, else the CPU, when none is named."""
    if not names:
        return [device for device in found if device.name != "CPU"] or list(found)
    known = [device.name for device in found]
    wanted = [resolve(name, known, known[0], "device") for name in re.split("[,/]", names)]
    if len(set(wanted)) < len(wanted):
        raise UsageError(f"--device {names}: a device is named twice")
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
