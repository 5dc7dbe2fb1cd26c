"""What one client asks for by its name: found in the memory of its owner's clients, or in the cache; and if it is not,
kept when it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import NamedTuple

from ..content import PIECE, SMALLEST, fnv1a
from ..device import ServedDevice
from ..fair_queue import Path
from ..grouping import grouped
from .client_cache import SMALL, CacheWriter, ClientCache
from .live import Allowance, Held, Hold, Live, Spot, Wanted
from .places import Place, touch

TOGETHER = 64 << 20
"""Bytes that one thread looks for, one behind the other; one question of our own clients is for no more. To hand each
small tensor to a thread takes longer than to find it, and threads that wait for Python's lock gain nothing."""


class Question(NamedTuple):
    """``place`` shall have the bytes of a ``digest`` (None: nobody knows it). ``name``: what a native client calls
    them."""

    place: Place
    digest: bytes | None
    name: int | None = None


class Looking(NamedTuple):
    """Questions about ``places`` of one buffer that threads work on."""

    places: list[Place]
    under_way: list[Future[list[bool]]]

    def done(self) -> bool:
        return all(each.done() for each in self.under_way)

    def wait(self, seconds: float | None = None) -> None:
        """Until the answers are there, or so long."""
        wait(self.under_way, seconds)

    def answers(self) -> list[bool]:
        """Whether each of ``places`` has now what it shall have; to be asked once. Raises what went wrong."""
        self.wait()
        found: list[bool] = []
        try:
            while self.under_way:
                found += self.under_way.pop(0).result()
            return found
        finally:  # an error refers to frames that have this, which must not refer to the error
            self.under_way.clear()


class Finder:
    """For one client with memory on ``devices``. What ``owner`` has sent may be found in ``live``, and in ``cache`` if
    there is one. ``client`` takes its turn with others; ``hold`` counts what it gets beyond its buffers. At most
    ``most`` answers of no are remembered."""

    def __init__(
        self,
        devices: Sequence[ServedDevice],
        live: Live,
        cache: ClientCache | None,
        owner: str,
        client: Path,
        hold: Hold,
        most: int,
    ) -> None:
        self._devices, self._live, self._cache = devices, live, cache
        self._owner, self._client, self._hold, self._most = owner, client, hold, most
        self._missed: dict[tuple[int, int, int], int | None] = {}
        self._looking: list[Looking] = []

    @property
    def has_any(self) -> bool:
        """Whether it pays for the client to ask for tensors by what they are."""
        return self._cache is not None or self._live.has_any(self._owner)

    def received(self, place: Place, digest: bytes | None = None) -> None:
        """The data for ``place`` is there: other clients of the same owner need not send it. (To note every byte that
        comes alone would take more memory than the bytes.) ``digest``: if it is known."""
        if place.size >= SMALLEST:
            spot = self._spot(place)
            self._live.add(self._owner, Held(spot, spot.device.mark(spot.buffer, spot.offset, spot.size), digest))

    def writer(self, place: Place) -> CacheWriter | None:
        """For the data that comes to ``place``: kept for the next time if the client asked for it by its name before,
        as clients do with what they may send again."""
        key = _key(place)
        if self._cache is None or key not in self._missed:
            return None
        return self._cache.writer(place.size, self._missed.pop(key, None))

    def forget(self, handle: int) -> None:
        """The client's buffer of that handle is freed."""
        self._missed = {key: name for key, name in self._missed.items() if key[0] != handle}

    def begin(self, asked: Sequence[Question]) -> Looking:
        """Look for what is ``asked``, of one buffer, in other threads. Nothing but further questions may be dealt with
        before that is answered."""
        places = [each.place for each in asked]
        self._looking = [each for each in self._looking if not each.done()]
        if any(touch(places, each.places) for each in self._looking):  # what was found is there until it is noted
            self.finish()
        ask = self._live.questions.ask
        groups = grouped(asked, lambda each: each.place.size, lambda _, size: size <= TOGETHER)
        looking = Looking(places, [])
        self._looking.append(looking)  # before: if there is no memory for all of it, what has begun is waited for
        looking.under_way.extend(ask(self._client, partial(self.find, group)) for group in groups)
        return looking

    def finish(self) -> None:
        """Wait until nothing is looked for any more."""
        for each in self._looking:
            each.wait()
        self._looking.clear()

    def name(self, place: Place, name: int) -> Question:
        """The question for bytes that are called so by a native client."""
        return Question(place, None if self._cache is None else self._cache.lookup(name, place.size), name)

    def find(self, asked: Sequence[Question]) -> list[bool]:
        """Whether each place of one buffer now has what is ``asked`` for. Where not it may have anything; data is
        expected there next, and is kept then."""
        self._devices[asked[0].place.region.device].serve_here()
        allowance = Allowance()
        found = [self._in_memory(each, allowance) for each in asked]
        if self._cache is None:
            return found
        left = [each for each, there in zip(asked, found, strict=True) if not there]
        restored = set(self._restored(self._cache, left))
        for place, digest, name in left:
            if place in restored:
                self.received(place, digest)
            elif len(self._missed) < self._most:
                self._missed[_key(place)] = name
        return [there or each.place in restored for each, there in zip(asked, found, strict=True)]

    def _in_memory(self, asked: Question, allowance: Allowance) -> bool:
        """Whether a client of the same owner has these bytes, so that their place has them now, too."""
        place, digest, name = asked
        if digest is None and fnv1a() is None:
            return False
        wanted = Wanted(digest, None if digest else name)
        return self._live.find(self._owner, wanted, self._spot(place), self._hold, allowance)

    def _restored(self, cache: ClientCache, asked: Sequence[Question]) -> Iterator[Place]:
        """Give places what the cache has of what is ``asked`` for: those that have it now. What is small is written
        together."""
        small: dict[Place, bytes] = {}
        for place, digest, _ in asked:
            if digest is None:
                continue
            if place.size > SMALL:
                if self._restore(cache, place, digest):
                    yield place
            elif data := cache.read(digest, place.size):
                small[place] = data
        if small:
            self._write(small)
        yield from small

    def _restore(self, cache: ClientCache, place: Place, digest: bytes) -> bool:
        """Whether the cache had the bytes of ``digest``, which are at ``place`` then."""
        (region, offset, size), file = place, cache.open(digest, place.size)
        if file is None:
            return False
        with file, self._devices[region.device].receiving(region.buffer, [(offset, size)]) as receive:

            def put(at: int, length: int, fill: Callable[[memoryview], None]) -> None:
                receive([(offset + at, length)], fill)

            return cache.restore(file, digest, size, put)

    def _write(self, found: Mapping[Place, bytes]) -> None:
        """Write small ones, all of one buffer."""
        region = next(iter(found)).region
        wanted = [(place.offset, place.size) for place in found]
        with self._devices[region.device].receiving(region.buffer, wanted) as receive:
            for some in grouped(found.items(), lambda each: each[0].size, lambda _, size: size <= PIECE):
                receive([(place.offset, place.size) for place, _ in some], _putting(data for _, data in some))

    def _spot(self, place: Place) -> Spot:
        return Spot(self._devices[place.region.device], place.region.buffer, place.offset, place.size)


def _key(place: Place) -> tuple[int, int, int]:
    return place.region.handle, place.offset, place.size


def _putting(data: Iterable[bytes]) -> Callable[[memoryview], None]:
    """What puts ``data``, one behind the other, into memory that it is given bit by bit."""
    left = memoryview(b"".join(data))

    def fill(memory: memoryview) -> None:
        nonlocal left
        memory[:] = left[: len(memory)]
        left = left[len(memory) :]

    return fill
