"""rpc-server: offer this machine's devices to clients of ggml's RPC protocol."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..content import fnv1a
from ..device_names import resolve
from ..errors import InvalidValue, UsageError
from ..ggml.dialect import Dialect, dialects
from ..server import Cache, CacheService, Door, Keys, Limits, Policy, Server, identity, key_ring
from ..server.announcing import announced
from ..server.key_ring import KeyRing
from ..server.negotiation import Fixed, Learning, Protocol, default_path
from ..storage import cache_folder
from . import interrupts, keys, report
from .command import Chosen, Command
from .entry import importing, ready
from .server_options import AUTO, OPTIONS, REFUSED

if TYPE_CHECKING:
    from ..device import ServedDevice
    from ..engine.device import LocalDevice

STOP_SECONDS = 1.0
"""How long each device may take to end what it computes when the server stops."""


def main() -> None:
    """The console script; exit status 0 after Ctrl-C or SIGTERM, 2 for an option that can't be honoured, else 1."""
    ready()
    sys.exit(report.guarded(lambda: run(sys.argv[1:]), COMMAND.fields))


def run(arguments: Sequence[str]) -> int:
    """The command with ``arguments``; its exit status."""
    if arguments and arguments[0] == KEYS:
        return keys.run(arguments[1:])
    return COMMAND.run(arguments)


def rpc_server(**chosen: Any) -> int:
    """Offer this machine's devices to clients of ggml's RPC protocol: sdrpc's sd-cli, stable-diffusion.cpp, llama.cpp.

    Any number of clients at once; none sees another's memory. From this machine, everybody may come; from others, who
    has a key, over an encrypted connection (rpc-server keys --help)."""
    report.logging_to_console(chosen["verbose"])
    if chosen["version"]:
        print(f"rpc-server {__version__} (RPC protocols {', '.join(dialects())})")
        return 0
    if chosen["completion"]:
        print(COMMAND.completion(chosen["completion"]))
        return 0
    if chosen["warm"] and chosen["compile"] == "off":
        raise UsageError("--warm has nothing to load with --compile off, which lets no program be compiled")
    versions = protocol_of(chosen["protocol"])
    limits = limited(chosen)
    door = Door(policy(chosen), Keys(KeyRing(key_ring.default_path()), identity.default_path()), limits)
    kept = Cache(cache_folder("weights"), chosen["cache_size"]) if chosen["cache"] else None

    with importing():
        from ..engine.discovery import devices  # torch takes a while: not before the options are known to be good
        from ..engine.system import keep_freed_memory

        keep_freed_memory()
        found = devices(
            chosen["precision"],
            chosen["threads"] or None,
            compute_limit=limits.compute_seconds,
            dequant_cache=chosen["dequant_cache"],
            compile=chosen["compile"],
        )
    if chosen["list_devices"]:
        print(*map(described, found), sep="\n")
        return 0
    with cache_service(kept) as shared:
        offer = offered(found, chosen["device"])
        server = Server(offer, versions, chosen["host"], chosen["port"], limits, shared, door)
        if chosen["announce"] and not server.exposed:
            raise UsageError(f"--announce: nobody else can reach {server.host}; listen with -H 0.0.0.0")
        if chosen["warm"] and not sum(device.warm() for device in offer):
            report.warn(
                "--warm has no effect: no device that is offered compiles programs (GPUs do, in fast precision)"
            )
        announce(server)
        with announced(server) if chosen["announce"] else nullcontext():
            serve(server, chosen["grace"])
    end(server)
    return 0


KEYS = "keys"

COMMAND = Command(
    "rpc-server",
    OPTIONS,
    rpc_server,
    REFUSED,
    acts_on={"cache_size": "cache"},
    bare=True,
    first=(KEYS,),
    help=rpc_server.__doc__,
)


def protocol_of(version: str) -> Protocol:
    """What ``--protocol`` means."""
    return Learning(default_path()) if version == AUTO else Fixed(choose(version))


def limited(chosen: Chosen) -> Limits:
    """The limits that the options say; the defaults where they don't."""
    asked = {
        "connections": chosen["max_clients"],
        "connections_of_address": chosen["max_connections_per_client"],
        "computing": chosen["max_requests"],
        "computing_of_client": chosen["max_requests_per_client"],
        "compute_seconds_of_all": chosen["max_compute"],
        "compute_seconds_of_client": chosen["max_compute_per_client"],
        "bytes_of_all": chosen["max_memory"],
        "buffer_bytes": chosen["max_memory_per_client"],
        "compute_seconds": chosen["compute_limit"],
    }
    return replace(Limits(), **{field: value for field, value in asked.items() if value is not None})


def policy(chosen: Chosen) -> Policy:
    """Who may come without a key. In a container whose port others can reach, clients that seem to come from here may
    come from anywhere: what forwards the port runs here."""
    if chosen["plain"] and (chosen["allow_from"] or chosen["require_key"]):
        other = "allow_from" if chosen["allow_from"] else "require_key"
        raise UsageError(f"--plain lets everybody in, so {COMMAND.fields[other]} means nothing with it")
    forwarded = in_container() and not is_local(chosen["host"])
    return Policy(chosen["plain"], not chosen["require_key"] and not forwarded, chosen["allow_from"])


def in_container() -> bool:
    return any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv"))) or "KUBERNETES_SERVICE_HOST" in os.environ


def is_local(host: str) -> bool:
    """Whether only this machine can reach who listens at ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
    """Print what is offered where, and what other machines need to reach it."""
    print(f"Starting RPC server {server.protocol}")
    print("Devices:", *map(described, server.devices), sep="\n")
    cache = server.cache_service and server.cache_service.cache
    print(f"  local cache    : {f'{cache.folder} (at most {cache.budget >> 20} MiB)' if cache else 'n/a'}")
    if server.exposed or not server.door.policy.local:
        announce_keys(server)
    print(f"  endpoint       : {server.endpoint}", flush=True)
    open_to = server.door.policy.open_to
    if server.exposed and open_to:
        report.warn(
            f"whoever can reach {server.endpoint} from {open_to} can use these devices and their memory, unencrypted: "
            "give clients keys instead (rpc-server keys add NAME)"
        )


def announce_keys(server: Server) -> None:
    """The line that lets another machine in: on a terminal, and where a first key was just made. Elsewhere it might end
    in a log."""
    if server.door.keys is None:
        return
    ring, _ = server.door.keys.ring, server.door.keys.identity
    known = ring.all()
    new = not known and not server.door.policy.everybody
    if new:
        known = [ring.add(key_ring.FIRST)]
    if new or (known and sys.stdout.isatty()):
        print(f"  other machines : {keys.line(server.host, server.port, known[0])}")
    elif known:
        names = ", ".join(key.name for key in known)
        print(f"  other machines : by key; there are {names} (rpc-server keys show {known[0].name})")


def serve(server: Server, grace: float) -> None:
    """Until Ctrl-C, or SIGTERM or a terminal that is closed and what clients are at then, for ``grace`` seconds; a
    second Ctrl-C or SIGTERM ends the process at once."""
    hang_up = interrupts.hang_up()

    def stop(number: int, _: object) -> None:
        # a terminal is closed once, and told of twice: by the shell, and by the system when the shell has ended
        if number in hang_up:
            signal.signal(number, signal.SIG_IGN)
        else:
            interrupts.next_ends(number)
        server.stop(0 if number == signal.SIGINT else grace)

    for number in (signal.SIGINT, signal.SIGTERM, *hang_up):
        signal.signal(number, stop)
    server.serve()


def end(server: Server) -> None:
    """End what is still computed. Where a kernel can't be stopped, or a client's thread is still at something, the
    process ends with it: at its own end Python would wait, and torch abort() when it comes back to a Python that is
    gone."""
    stopped = [device.stop(STOP_SECONDS) for device in server.devices]
    if all(stopped) and not server.clients:
        return
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(0)
