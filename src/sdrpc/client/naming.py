"""What bytes are called when a server is asked for them, and the threads that find that out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

from ..content import FNV_START, SMALLEST, THREADS, fnv1a, hashed, joined, split

NATIVE_THRESHOLD = 10 << 20
"""Native clients ask for data that is larger than this, and native servers keep such only."""
SMALL = 1 << 15
"""Bytes that are made and hashed sooner than handed to another thread."""

Views = Sequence[memoryview]
"""Bytes, one view after the other."""


class Scheme(NamedTuple):
    """How bytes are called. ``smallest``: bytes for which it is worthwhile. ``split`` gives what threads can hash side
    by side, ``joined`` makes the name of all that was ``hashed``, in order. ``first``: whether to compute a name that
    is not remembered for the question, or after sending, for the next time."""

    kind: str
    smallest: int
    split: Callable[[Views], Iterable[Views]]
    hashed: Callable[[Views], bytes]
    joined: Callable[[Iterable[bytes]], bytes]
    first: bool

    def name(self, views: Views) -> bytes:
        """What these bytes are called, found out in this thread."""
        return self.joined(map(self.hashed, self.split(views)))


BY_DIGEST = Scheme("blake3", SMALLEST, split, lambda views: hashed(*views), joined, True)
"""Between our own peers: the question costs less than the answer on any network."""


def by_hash() -> Scheme | None:
    """With native servers, which do not say whether they keep anything: what is not remembered is not asked for. None
    where there is no fast FNV-1a."""
    fnv = fnv1a()
    if fnv is None:
        return None

    def hashed(views: Views) -> bytes:
        return reduce(lambda state, view: fnv(view, state), views, FNV_START).to_bytes(8, "little")

    return Scheme("fnv1a", NATIVE_THRESHOLD + 1, lambda views: [views], hashed, b"".join, False)


@dataclass(frozen=True, eq=False)
class Naming:
    """A name that is being found out: ``hashes`` of its parts."""

    scheme: Scheme
    hashes: Future[list[Future[bytes]]]

    def result(self) -> bytes:
        """The name, once it is known. Raises what went wrong."""
        return self.scheme.joined([each.result() for each in self.hashes.result()])


class Namer:
    """Names by a ``scheme``, found out in threads that leave the GIL to the one that sends. Close it when done."""

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme
        self._making, self._hashing = (ThreadPoolExecutor(THREADS, thread_name_prefix="sdrpc-names") for _ in range(2))

    def name(self, data: Callable[[], Views]) -> Naming:
        """The name of the bytes that ``data`` gives, which another thread asks for them."""
        return Naming(self._scheme, self._making.submit(self._begin, data))

    def close(self) -> None:
        """Nothing is found out any more."""
        self._making.shutdown(cancel_futures=True)
        self._hashing.shutdown(cancel_futures=True)

    def _begin(self, data: Callable[[], Views]) -> list[Future[bytes]]:
        """Have bytes hashed by threads that do nothing else: they wait for none that others are still making."""
        return [self._hashing.submit(self._scheme.hashed, part) for part in self._scheme.split(data())]
