"""Which devices a cluster offers, and who gets which of them.

A node of a Ray cluster says which rpc-servers it reaches by resources that are named after them:

    ray start --address head:6379 --resources '{"rpc:desktop:50052": 1}'

``rpc:HOST:PORT`` are all devices of a server, ``rpc:HOST:PORT/1`` is its second one alone. An actor that has a resource
has the devices for itself, whoever else uses the cluster: that is a lease.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..client import parse_endpoint
from ..client.endpoint import Endpoint
from ..errors import InvalidValue, UsageError

PREFIX = "rpc:"
LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[?::1\]?):")


class Offer(NamedTuple):
    """A server's devices, or (``device``) one of them, as a resource names them."""

    endpoint: Endpoint
    device: int | None = None

    def __str__(self) -> str:
        return str(self.endpoint) + ("" if self.device is None else f"/{self.device}")

    @property
    def resource(self) -> str:
        return PREFIX + str(self)

    @classmethod
    def parse(cls, text: str) -> Offer:
        """``HOST:PORT`` or ``HOST:PORT/INDEX``. Raises :class:`UsageError`."""
        address, slash, index = text.partition("/")
        if slash and not re.fullmatch("[0-9]{1,3}", index):
            raise InvalidValue("rpc", text, "behind / stands which of the server's devices is meant: 0, 1 …")
        return cls(parse_endpoint(address), int(index) if slash else None)


class Lease(NamedTuple):
    """What one actor has: its devices are RPC0, RPC1 … in this order."""

    offers: tuple[Offer, ...]

    def __str__(self) -> str:
        return "+".join(map(str, self.offers))

    @property
    def resources(self) -> dict[str, float]:
        return {offer.resource: 1.0 for offer in self.offers}


def leases(nodes: Sequence[Mapping[str, float]], together: bool, only: Sequence[str] = ()) -> list[Lease]:
    """What is to be leased, of nodes with these resources.

    Each offer for itself; or, ``together``, all of a node's, because a model's components are to be on several of them.
    What two nodes offer is leased once, so that one of them can stand in for the other; but where it is their own
    (localhost), once on each. ``only``: those offers alone. Raises :class:`UsageError` where there is nothing to lease.
    """
    wanted = [Offer.parse(text).resource for text in only]
    found = [[_offer(name) for name in sorted(node) if name.startswith(PREFIX)] for node in nodes]
    there = {offer.resource for offers in found for offer in offers}
    if missing := [name for name in wanted if name not in there]:
        raise UsageError(
            f"no node of the cluster has the resource {missing[0]}: start one that reaches this server with "
            f"ray start --resources '{{\"{missing[0]}\": 1}}'; there are {', '.join(sorted(there)) or 'none'}"
        )
    if not there:
        raise UsageError(
            "no node of the cluster offers devices: start those that reach rpc-servers with "
            "ray start --resources '{\"rpc:HOST:PORT\": 1}'"
        )
    order = {name: position for position, name in enumerate(wanted)}
    chosen = [
        sorted((o for o in offers if not wanted or o.resource in order), key=lambda o: order.get(o.resource, 0))
        for offers in found
    ]
    groups = [Lease(tuple(offers)) for offers in chosen if offers]
    if not together:
        groups = [Lease((offer,)) for group in groups for offer in group.offers]
    counted = Counter(groups)
    return [lease for lease, count in counted.items() for _ in range(count if _is_local(lease) else 1)]


def _offer(resource: str) -> Offer:
    offer = Offer.parse(resource.removeprefix(PREFIX))
    if offer.resource != resource:
        raise UsageError(f"a node of the cluster has the resource {resource}: name it {offer.resource}")
    return offer


def _is_local(lease: Lease) -> bool:
    return any(LOOPBACK.match(str(offer)) for offer in lease.offers)
