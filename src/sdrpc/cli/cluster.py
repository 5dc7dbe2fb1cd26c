"""``sd-server --ray``: seats in a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ..client import Endpoint, Keychain, RemoteDevice, Timeouts, given_keys
from ..client.discovery import AUTO
from ..errors import ConnectionFailed, InvalidValue, UsageError
from ..key import Key
from .chosen import servers, threads, timeouts
from .command import Chosen
from .devices import every_device

if TYPE_CHECKING:
    from ..cluster.lease import Lease, Offer
    from ..cluster.painter import Place
    from ..device import Device
    from ..web.seats import Seat


class Reaching(NamedTuple):
    """How an actor gets its devices: what the user chose, as values that can be sent to it."""

    keys: Sequence[tuple[Endpoint | None, Key]]
    precision: str
    threads: int | None
    timeouts: Timeouts


@contextmanager
def cluster_seats(chosen: Chosen, place: Place, together: bool) -> Iterator[Sequence[Seat]]:
    """Seats at what the cluster of ``--ray`` offers; of that only what ``--rpc`` names, if it does. ``together``: a
    model's components are on several devices. Raises :class:`UsageError`."""
    only = servers(chosen)
    if AUTO in only:
        raise InvalidValue("rpc", AUTO, "with --ray the cluster says which servers there are; leave it out")
    try:
        from ..cluster import seats
    except ImportError as error:
        raise UsageError(f"--ray needs more packages ({error.name}): pip install 'sdrpc[ray]'") from error
    keys = given_keys(chosen["rpc_key"], chosen["rpc_key_file"])
    reaching = Reaching(keys, chosen["precision"], threads(chosen), timeouts(chosen))
    with seats.joined(chosen["ray"]):
        yield seats.seats(partial(leased, reaching), place, together, only)


@contextmanager
def leased(reaching: Reaching, lease: Lease) -> Iterator[Sequence[Device]]:
    """The devices of ``lease``, RPC0, RPC1 …, behind those of this machine. Raises :class:`SdrpcError`."""
    endpoints = list(dict.fromkeys(str(offer.endpoint) for offer in lease.offers))
    keychain = Keychain(reaching.keys)
    with every_device(endpoints, reaching.precision, reaching.threads, keychain, reaching.timeouts) as found:
        for why in found.absent.values():
            raise why
        here = [device for device in found.devices if not isinstance(device, RemoteDevice)]
        theirs = [device for device in found.devices if isinstance(device, RemoteDevice)]
        there = [device for offer in lease.offers for device in _those(offer, theirs)]
        for number, device in enumerate(there):
            device.name = f"RPC{number}"
        yield [*here, *there]


def _those(offer: Offer, devices: Sequence[RemoteDevice]) -> list[RemoteDevice]:
    found = [device for device in devices if device.endpoint == offer.endpoint]
    if offer.device is None:
        return found
    if offer.device >= len(found):
        raise ConnectionFailed(str(offer.endpoint), f"it has {len(found)} devices, and no {offer}")
    return [found[offer.device]]
