"""All devices that a command can use: those of servers, and this machine's where somebody asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..client import connect
from ..device import Device
from ..device_names import only_remote, resolve


@contextmanager
def every_device(rpc: Sequence[str], precision: str, threads: int | None) -> Iterator[list[Device]]:
    """This machine's devices, then RPC0, RPC1 … of the servers at ``rpc``."""
    with _opened(list(connect(rpc))) as remote, _opened(_local(precision, threads)) as local:
        yield [*local, *remote]


@contextmanager
def placed_devices(
    wanted: Mapping[str, str], rpc: Sequence[str], precision: str, threads: int | None
) -> Iterator[dict[str, Device]]:
    """Component → device, as :func:`sdrpc.diffusion.placement.wanted` says. ``auto`` is RPC0 when there are servers,
    else this machine's first. This machine's devices, and torch with them, are left alone when no component can be
    there."""
    with _opened(list(connect(rpc))) as remote:
        nothing_here = bool(remote) and all(only_remote(name) or name == "auto" for name in wanted.values())
        with _opened([] if nothing_here else _local(precision, threads)) as local:
            devices = {device.name: device for device in (*local, *remote)}
            default = (remote or local)[0].name
            yield {component: devices[resolve(name, devices, default)] for component, name in wanted.items()}


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
