"""All devices that a command can use: those of servers, and this machine's where somebody asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

from ..client import DEFAULT_TIMEOUTS, Keychain, RemoteDevice, Timeouts, connect, device_counts, parse_endpoint
from ..device import Device, Memory
from ..device_names import AUTO, folded, only_remote
from ..diffusion import placement
from ..diffusion.placement import side_by_side
from ..errors import (
    ConnectionFailed,
    ConnectionLost,
    InvalidValue,
    KeyNeeded,
    KeyRefused,
    OverQuota,
    SdrpcError,
    ServerStopping,
    UsageError,
    WrongServer,
)
from ..runtime.chain import Chain, Lanes, lanes
from . import report
from .discovery import located

REMOTE = "RPC"
"""Devices of servers are called so, with a number."""


def _number(name: str) -> int:
    return int(name.removeprefix(REMOTE))


class Found(NamedTuple):
    """Devices that are there, and by its name what is wrong with each that is not. A server that can't be used has as
    many as it had when it was last there, and where nobody knows (``guessed`` are their names) one."""

    devices: list[Device]
    absent: dict[str, SdrpcError]
    guessed: frozenset[str] = frozenset()

    def told(self) -> dict[str, str]:
        """What is wrong with those that are not there, in words: ``RPC0, RPC1 are not there`` → why."""
        behind = [device.name for device in self.devices if device.name.startswith(REMOTE)] + [*self.absent]
        last = max(behind, key=_number, default="")
        note = "; it counts as one device: if it has more, those behind it had other numbers"
        servers: dict[SdrpcError, list[str]] = {}
        for name, why in self.absent.items():
            servers.setdefault(why, []).append(name)
        return {
            f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not there": str(why)
            + (note if names[0] in self.guessed and names[0] != last else "")
            for why, names in servers.items()
        }


class Placing(NamedTuple):
    """Component → where it may be, in order of preference; and all devices that are there."""

    places: dict[str, list[Lanes]]
    devices: list[Device]


class Listed(NamedTuple):
    """What a list of devices says of one."""

    name: str
    description: str
    memory: Memory


@contextmanager
def every_device(
    rpc: Sequence[str],
    precision: str,
    threads: int | None,
    keychain: Keychain | None = None,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
    apart: bool = False,
) -> Iterator[Found]:
    """This machine's devices, then RPC0, RPC1 … of the servers at ``rpc``, whatever is wrong with some of them.
    ``apart``: as for :func:`sdrpc.client.connect`.

    Raises :class:`UsageError` for what is no server's address, or is given twice.
    """
    with (
        _servers(rpc, timeouts, keychain, lambda _: True, apart) as remote,
        _opened(_local(precision, threads)) as local,
    ):
        yield remote._replace(devices=[*local, *remote.devices])


def listed(rpc: Sequence[str], keychain: Keychain) -> tuple[list[Listed], list[str]]:
    """The same for a list, and what is wrong with servers. Torch is left alone where this machine has just a CPU."""
    with _servers(rpc, DEFAULT_TIMEOUTS, keychain, lambda _: True) as remote:
        return [*_listed_here(), *map(_listed, remote.devices)], list(remote.told().values())


def _listed_here() -> list[Listed]:
    from ..engine.system import accelerator_possible, host_memory, processor

    if not accelerator_possible():
        return [Listed("CPU", processor(), host_memory())]
    with _opened(_local("auto", None)) as local:
        return [_listed(device) for device in local]


def _listed(device: Device) -> Listed:
    return Listed(device.name, device.description, device.memory())


@contextmanager
def placed_devices(
    wanted: Mapping[str, Sequence[str]],
    rpc: Sequence[str],
    precision: str,
    threads: int | None,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
    keychain: Keychain | None = None,
    everything: bool = False,
    several: bool = False,
) -> Iterator[Placing]:
    """Where components may be, for one picture or ``several``, as :func:`sdrpc.diffusion.placement.wanted` says.
    ``auto`` is all of the servers' devices when there are any, else this machine's first. This machine's devices, and
    torch with them, are left alone when no component can be there, unless ``everything`` is wanted. A server that does
    not answer is passed over, and the user told so, where all components have other devices; what else is wrong with
    one is an error."""
    places = [side_by_side(text) for names in wanted.values() for text in names]
    cut = any(len(some) > 1 for lanes in places for some in lanes)
    # two devices with one picture copy to each other, and so do those that compute one after the other
    apart = several and any(len(lanes) > 1 for lanes in places) and not cut
    with _servers(rpc, timeouts, keychain, _is_away, apart) as remote:
        named = [name for lanes in places for some in lanes for name in some]
        nothing_here = not everything and bool(rpc) and all(only_remote(name) or folded(name) == AUTO for name in named)
        with _opened([] if nothing_here else _local(precision, threads)) as local:
            there = remote._replace(devices=[*local, *remote.devices])
            placed = resolved(wanted, there, remote.devices if rpc else local[:1])
            for what, why in there.told().items():
                report.warn(f"{what}, others do the work: {why}")
            yield Placing(placed, there.devices)


def limits_of(text: str, devices: Sequence[Device]) -> dict[str, int]:
    """``--max-vram``. Raises :class:`InvalidValue` for a device that is not there."""
    found, names = placement.limits(text), {folded(device.name) for device in devices}
    for name in found:
        if name and folded(name) not in names:
            there = ", ".join(device.name for device in devices)
            raise InvalidValue("max_vram", name, f"there is no such device; there are {there}")
    return found


def resolved(wanted: Mapping[str, Sequence[str]], found: Found, default: Sequence[Device]) -> dict[str, list[Lanes]]:
    """Component → those places that its names mean and whose devices are there, in order of preference; ``auto``: the
    ``default`` ones. Raises what is wrong with the first one of a component for which none is left, and
    :class:`InvalidValue` for what does not exist, or is named twice where devices have to differ."""
    by_name: dict[str, Device | SdrpcError] = {device.name: device for device in found.devices} | found.absent

    def meant(text: str) -> Sequence[Lanes | SdrpcError]:
        if folded(text) == AUTO:
            return [*map(lanes, default), *(() if default else found.absent.values())]
        chains = placement.meant(text, by_name)
        absent = [one for one in chain(*chains) if isinstance(one, SdrpcError)]
        there = (tuple(one for one in some if not isinstance(one, SdrpcError)) for some in chains)
        return absent[:1] or [Lanes(tuple(map(Chain, there)))]

    placed: dict[str, list[Lanes]] = {}
    for part, names in wanted.items():
        choices = list(dict.fromkeys(chain(*map(meant, names))))
        placed[part] = [choice for choice in choices if not isinstance(choice, SdrpcError)]
        if not placed[part]:
            raise next(choice for choice in choices if isinstance(choice, SdrpcError))
    return placed


@contextmanager
def _servers(
    rpc: Sequence[str],
    timeouts: Timeouts,
    keychain: Keychain | None,
    borne: Callable[[SdrpcError], bool],
    apart: bool = False,
) -> Iterator[Found]:
    """RPC0, RPC1 … of the servers at ``rpc``; one that raises what can be ``borne`` stands for its devices.
    ``apart``: as for :func:`sdrpc.client.connect`."""
    rpc, keychain = located(rpc, keychain or Keychain())
    endpoints = [parse_endpoint(text) for text in rpc]
    for position, endpoint in enumerate(endpoints):
        if endpoint in endpoints[:position]:
            raise UsageError(f"{endpoint} is given twice")
    with _opened([]) as remote:
        absent: dict[str, SdrpcError] = {}
        guessed = set[str]()
        for endpoint in endpoints:
            number = len(remote) + len(absent)
            try:
                found = _connected(str(endpoint), timeouts, keychain, apart)
            except SdrpcError as error:
                if not borne(error):
                    raise
                count = device_counts.remembered(endpoint)
                names = [f"{REMOTE}{number + index}" for index in range(count or 1)]
                absent |= dict.fromkeys(names, error)
                guessed |= set(() if count else names)
                continue
            device_counts.remember(endpoint, len(found))
            for index, device in enumerate(found, number):
                device.name = f"{REMOTE}{index}"
            remote += found
        yield Found(remote, absent, frozenset(guessed))


def _is_away(error: SdrpcError) -> bool:
    """Whether it says that a server is not there, or has no place: not that one is another than the user thinks."""
    somebody = isinstance(error, KeyNeeded | KeyRefused | WrongServer)
    return isinstance(error, ConnectionFailed | ConnectionLost | OverQuota | ServerStopping) and not somebody


def _connected(rpc: str, timeouts: Timeouts, keychain: Keychain, apart: bool) -> list[RemoteDevice]:
    """The devices of the server at ``rpc``. Somebody at a terminal is asked for a key that is missing."""
    while True:
        try:
            return connect([rpc], timeouts, keychain=keychain, apart=apart)
        except KeyNeeded as error:
            key = report.ask_key(error.endpoint)
            if key is None:
                raise
            keychain = keychain.plus(parse_endpoint(error.endpoint), key)


def _local(precision: str, threads: int | None) -> list[Device]:
    from ..engine.discovery import devices
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
