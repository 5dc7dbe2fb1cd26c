"""All devices that a command can use: those of servers, and this machine's where somebody asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

from ..client import DEFAULT_TIMEOUTS, Keychain, RemoteDevice, Timeouts, connect, parse_endpoint
from ..device import Device
from ..device_names import AUTO, folded, only_remote, resolve
from ..errors import KeyNeeded, SdrpcError, UsageError
from . import report
from .discovery import located


class Found(NamedTuple):
    """Devices that are there, and for each server that is not what is wrong with it."""

    devices: list[Device]
    failures: list[SdrpcError]


@contextmanager
def every_device(
    rpc: Sequence[str],
    precision: str,
    threads: int | None,
    keychain: Keychain | None = None,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
) -> Iterator[Found]:
    """This machine's devices, then RPC0, RPC1 … of those servers at ``rpc`` that answer.

    Raises :class:`UsageError` for what is no server's address, or is given twice.
    """
    rpc, keychain = located(rpc, keychain or Keychain())
    endpoints = [parse_endpoint(text) for text in rpc]
    for position, endpoint in enumerate(endpoints):
        if endpoint in endpoints[:position]:
            raise UsageError(f"{endpoint} is given twice")
    remote: list[Device] = []
    failures: list[SdrpcError] = []
    with _opened(remote):
        for endpoint in endpoints:
            try:
                found = _connected([str(endpoint)], timeouts, keychain)
            except SdrpcError as error:
                failures.append(error)
                continue
            for device in found:
                device.name = f"RPC{len(remote)}"
                remote.append(device)
        with _opened(_local(precision, threads)) as local:
            yield Found([*local, *remote], failures)


@contextmanager
def placed_devices(
    wanted: Mapping[str, Sequence[str]],
    rpc: Sequence[str],
    precision: str,
    threads: int | None,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
    keychain: Keychain | None = None,
) -> Iterator[dict[str, list[Device]]]:
    """Component → devices in order of preference, as :func:`sdrpc.diffusion.placement.wanted` says. ``auto`` is all of
    the servers' when there are any, else this machine's first. This machine's devices, and torch with them, are left
    alone when no component can be there."""
    rpc, keychain = located(rpc, keychain or Keychain())
    with _opened(list(_connected(rpc, timeouts, keychain))) as remote:
        named = [name for names in wanted.values() for name in names]
        nothing_here = bool(remote) and all(only_remote(name) or folded(name) == AUTO for name in named)
        with _opened([] if nothing_here else _local(precision, threads)) as local:
            yield resolved(wanted, [*local, *remote], remote or local[:1])


def resolved(
    wanted: Mapping[str, Sequence[str]], devices: Sequence[Device], default: Sequence[Device]
) -> dict[str, list[Device]]:
    """Component → those of ``devices`` that its names mean, in order of preference; ``auto``: the ``default`` ones."""
    by_name = {device.name: device for device in devices}

    def meant(name: str) -> Sequence[Device]:
        return default if folded(name) == AUTO else [by_name[resolve(name, by_name, default[0].name)]]

    return {part: list(dict.fromkeys(chain(*map(meant, names)))) for part, names in wanted.items()}


def _connected(rpc: Sequence[str], timeouts: Timeouts, keychain: Keychain) -> list[RemoteDevice]:
    """The devices of the servers at ``rpc``. Somebody at a terminal is asked for keys that are missing."""
    while True:
        try:
            return connect(rpc, timeouts, keychain=keychain)
        except KeyNeeded as error:
            key = report.ask_key(error.endpoint)
            if key is None:
                raise
            keychain = keychain.plus(parse_endpoint(error.endpoint), key)


def _local(precision: str, threads: int | None) -> list[Device]:
    from ..engine.device import devices
    from ..engine.system import keep_freed_memory

    keep_freed_memory()
    return list(devices(precision, threads))


@contextmanager
def _opened(devices: list[Device]) -> Iterator[list[Device]]:
    try:
        yield devices
    finally:
        for device in devices:
            device.close()
