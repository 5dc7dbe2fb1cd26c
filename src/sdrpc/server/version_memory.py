"""Which protocol version a client speaks, from the little that it says. State without IO: no sockets, no files.

A native client takes any server of its own major version whose minor version is not above its own, whatever the patch;
it gives up, mostly with abort(), on every other. So one *offer* for each major version, with the lowest minor version
that is known, serves all its clients. A HELLO without payload is protocol 3.x, and our own clients say who they are;
all others send the same bytes whatever they speak. Those are learnt by their address: one that leaves right after HELLO
did not like the offer, and the next time it gets the next; one that sends a request did. What was right at an address
is offered there first, then what was right elsewhere, then the newest, and last what hardly any client speaks.

Clients that share an address (a machine, or a network behind NAT) and speak different versions can't be told apart: a
refusal counts for all of them. What was right for one of them is then tried before what was right for none, so that
each change from one to the other costs no more than one run; and what was right last comes every other time, so that a
neighbour who does nothing but come and go leaves every other start to the rest.

Which patch, and which minor version above the offer's, a client speaks shows in its graphs only
(:func:`sdrpc.wire.graphs.meanings`).
"""

from __future__ import annotations

import ipaddress
import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

from ..ggml.dialect import Dialect, dialects, newest
from ..wire.hello import NATIVE, Hello

MAX_ADDRESSES = 256
"""Addresses that are remembered; the ones not seen for longest go first. A server has a few dozen clients."""
FORMAT = 1

Versions = tuple[Dialect, ...]
"""What a client may speak, the likeliest first; never empty."""


class Offer(NamedTuple):
    """What HELLO is answered with, and what a client that stays may speak."""

    told: Dialect
    versions: Versions

    @property
    def name(self) -> str:
        """How people call it: ``3.6``, ``5.0 or 5.1``."""
        return " or ".join(sorted({_minor(dialect.version) for dialect in self.versions}))


def accepting(told: Dialect) -> Versions:
    """Whoever takes a server that says it speaks ``told``: that version first, then the others, newest first."""
    major, minor, _ = told.triple
    others = [d for d in dialects().values() if d.triple[0] == major and d.triple[1] >= minor and d is not told]
    return told, *reversed(others)


@cache
def families() -> dict[str, Versions]:
    """All versions by offer (the lowest minor version of each major), newest first, but those that hardly any client
    speaks (``Dialect.brief``) behind the others: a search through them would cost everybody else a run."""
    by_major = groupby(reversed(dialects().values()), lambda dialect: dialect.triple[0])
    members = [tuple(group) for _, group in by_major]
    members.sort(key=lambda family: all(dialect.brief for dialect in family))
    return {_minor(family[-1].version): family for family in members}


@cache
def family_of(version: str) -> str:
    """The offer that a client of ``version`` takes."""
    return next(name for name, family in families().items() if dialects()[version] in family)


def own() -> Offer:
    """What a client of ours gets: it finds its way with whatever it is told."""
    return Offer(newest(), (newest(),))


class Known(NamedTuple):
    """About an address: which versions were ``right`` (the last first, one for each offer), and which offers were
    ``refused`` since."""

    right: tuple[str, ...] = ()
    refused: frozenset[str] = frozenset()


NOTHING = Known()


class VersionMemory:
    """What is known about clients by address. Not thread-safe."""

    def __init__(self) -> None:
        self._addresses: OrderedDict[str, Known] = OrderedDict()
        self._everywhere: tuple[str, ...] = ()

    def offer(self, address: str, hello: Hello) -> Offer:
        """What to answer a HELLO from ``address`` with."""
        if hello.capabilities != NATIVE:
            return own()
        known = self._addresses.get(address, NOTHING)
        order = self._order(known, hello.with_caps)
        name = next((name for name in order if name not in known.refused), order[0])
        return _offer(name, (*known.right, *self._everywhere))

    def accepted(self, address: str, version: str) -> bool:
        """A client there speaks ``version``, or one that is not told apart yet; whether that is news."""
        before = self._state(address)
        self._everywhere = _first(version, self._everywhere)
        self._remember(address, Known(_first(version, self._addresses.get(address, NOTHING).right)))
        return self._state(address) != before

    def refused(self, address: str, hello: Hello, offer: Offer) -> bool:
        """A client there left right after this ``offer``; whether that is news. After the last one it begins anew."""
        before = self._state(address)
        known = self._addresses.get(address, NOTHING)
        refused = known.refused | {family_of(offer.told.version)}
        if known.right and (best := family_of(known.right[0])) != family_of(offer.told.version):
            refused -= {best}  # whoever comes and goes all day long shall not keep those out who are known here
        possible = frozenset(self._order(known, hello.with_caps))
        self._remember(address, Known(known.right, refused - possible if refused >= possible else refused))
        return self._state(address) != before

    def dump(self) -> str:
        """All of it as text."""
        addresses = [[address, list(known.right), sorted(known.refused)] for address, known in self._addresses.items()]
        return json.dumps({"format": FORMAT, "everywhere": list(self._everywhere), "addresses": addresses})

    @classmethod
    def parse(cls, text: str) -> VersionMemory:
        """What :meth:`dump` wrote, whoever may have written ``text``. Raises :class:`ValueError` for anything else."""
        try:
            table = json.loads(text)
        except RecursionError:
            raise ValueError("nested too deep") from None
        if not isinstance(table, dict) or table.get("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        learnt = cls()
        learnt._everywhere = _right(table.get("everywhere"))
        for entry in _list(table.get("addresses"), MAX_ADDRESSES):
            address, right, refused = _list(entry, 3)
            if not isinstance(address, str) or normal(address) != address:
                raise ValueError(f"{address!r:.60} is no address")
            learnt._addresses[address] = Known(_right(right), frozenset(_strings(refused, families())))
        return learnt

    def _order(self, known: Known, with_caps: bool) -> list[str]:
        """Offers for a HELLO of this form, the likeliest first."""
        likely = [family_of(version) for version in (*known.right, *self._everywhere)]
        return [name for name in dict.fromkeys((*likely, *families())) if _has_caps(name) == with_caps]

    def _remember(self, address: str, known: Known) -> None:
        self._addresses[address] = known
        self._addresses.move_to_end(address)
        if len(self._addresses) > MAX_ADDRESSES:
            # those of whom nothing is known first: it takes nothing to be one
            idle = next((name for name, each in self._addresses.items() if not each.right), None)
            del self._addresses[idle if idle not in (None, address) else next(iter(self._addresses))]

    def _state(self, address: str) -> tuple[Known | None, tuple[str, ...]]:
        return self._addresses.get(address), self._everywhere


def normal(address: str) -> str:
    """One name for one address: IPv4 as such when it comes as ::ffff:…, IPv6 without a zone.

    Raises :class:`ValueError` for what is none.
    """
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


def _offer(name: str, likely: Sequence[str]) -> Offer:
    likely = [version for version in likely if family_of(version) == name]
    names = dict.fromkeys((*likely, *(dialect.version for dialect in families()[name])))
    versions = tuple(dialects()[version] for version in names)
    return Offer(next(dialect for dialect in versions if _minor(dialect.version) == name), versions)


def _minor(version: str) -> str:
    return version.rpartition(".")[0]


def _has_caps(name: str) -> bool:
    return families()[name][0].hello_request_bytes > 0


def _first(version: str, others: Sequence[str]) -> tuple[str, ...]:
    """``version`` before ``others``, in the place of the one of the same offer."""
    return version, *(other for other in others if family_of(other) != family_of(version))


def _right(value: Any) -> tuple[str, ...]:
    found = _strings(value, dialects())
    if len({family_of(version) for version in found}) < len(found):
        raise ValueError("two versions of one family")
    return found


def _strings(value: Any, known: Iterable[str]) -> tuple[str, ...]:
    allowed = frozenset(known)
    items = _list(value, len(allowed))
    if not all(isinstance(item, str) and item in allowed for item in items):
        raise ValueError("a protocol version that is not known")
    return tuple(items)


def _list(value: Any, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"not a list of at most {most}")
    return value
