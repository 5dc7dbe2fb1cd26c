"""Buffers that hold the same bytes in one storage, until one of them is written to.

Where the CPU can touch memory, buffers share pages of it (:mod:`sdrpc.engine.pages`). On a GPU whole buffers share.
When some of a buffer's bytes were copied from the same places of another one, all of both are compared before the next
run, on the device. If they are the same, the buffer's own storage is given back and its programs are bound to the other
one, with the weights that lie there in another form. Who is about to write, a message or a program, gets a copy of its
own before, as the bytes came, and its programs are bound to that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from threading import Lock

import torch

from .memory import LocalBuffer, Storage
from .weights import Weights

log = logging.getLogger(__name__)

_key = attrgetter("key")
LEAST = 1 << 20
"""Bytes below which sharing is not worth binding programs anew."""
PIECE = 64 << 20
"""Bytes that are compared or copied at a time: as many more may be needed for what does not lie as it came."""


class Storages:
    """Which storages the buffers of a device have. For any thread. ``make`` gives new memory of so many bytes;
    ``weights`` are what programs have made of storages. ``spared``: bytes that buffers would take beyond what they do
    if each had a storage of its own."""

    def __init__(self, make: Callable[[int], Storage], weights: Weights) -> None:
        self.spared = 0
        self._make, self._weights = make, weights
        self._lock = Lock()

    def allocate(self, key: int, size: int) -> LocalBuffer:
        """A new buffer, with a storage of its own."""
        buffer = LocalBuffer(key, size, self._make(size))
        buffer.storage.users.add(buffer)
        return buffer

    def free(self, buffer: LocalBuffer) -> None:
        """Nobody has ``buffer`` any more, but perhaps programs."""
        with self._lock:
            left = self._leave(buffer)
        self._free(left)
        self._weights.unmark(buffer)

    def share(self, buffer: LocalBuffer) -> bool:
        """Let ``buffer`` have its twin's storage, if both hold the same; whether it has given its own back for that.
        No program writes to either meanwhile."""
        twin, buffer.twin = None if buffer.twin is None else buffer.twin(), None
        if twin is None or not may_share(buffer, twin):
            return False
        with held(buffer, twin):
            if buffer.storage.claims or twin.storage.claims:
                return False
            try:
                if not _same(buffer.storage, twin.storage):
                    return False
            except RuntimeError:  # to compare them takes more than there is, which MPS says in words only
                return False
            with self._lock:
                if buffer not in buffer.storage.users or twin not in twin.storage.users:  # one was just freed
                    return False
                left = self._leave(buffer)
                self._enter(buffer, twin.storage)
                self.spared += buffer.size
        self._free(left)
        log.debug("two buffers of %d bytes hold the same and have one storage", buffer.size)
        return left is not None

    @contextmanager
    def own(self, buffer: LocalBuffer) -> Iterator[Storage]:
        """Within the context the storage of ``buffer``, which is held, and so is that; it is nobody else's from now on.
        Raises what it takes to copy it."""
        if not is_shared(buffer):
            yield buffer.storage
            return
        made = self._make(buffer.size)
        with made.forms.lock:  # before anybody can have it. It is the last one made, so the order stays
            _copy(buffer.storage, made)
            with self._lock:
                if buffer in buffer.storage.users:
                    left = self._leave(buffer)
                    self._enter(buffer, made)
                else:  # freed: only a program has it
                    left, buffer.storage, made.freed = None, made, True
            self._free(left)
            yield made

    def _enter(self, buffer: LocalBuffer, storage: Storage) -> None:
        buffer.storage = storage
        storage.users.add(buffer)

    def _leave(self, buffer: LocalBuffer) -> Storage | None:
        """``buffer`` has its storage no longer: that, if nobody has it now."""
        users = buffer.storage.users
        users.remove(buffer)
        self.spared -= buffer.size if users else 0
        return None if users else buffer.storage

    def _free(self, storage: Storage | None) -> None:
        if storage is not None:
            storage.forms.free()
            self._weights.free(storage)


@contextmanager
def held(*buffers: LocalBuffer) -> Iterator[None]:
    """Nobody else reads ``buffers`` or writes to them, nor gives them another storage. Storages are taken in one order,
    so that two threads that copy to and fro don't wait for each other."""
    while True:
        storages = [buffer.storage for buffer in buffers]
        locks = [storage.forms.lock for storage in sorted(storages, key=_key)]
        for lock in locks:
            lock.acquire()
        try:
            if storages == [buffer.storage for buffer in buffers]:
                yield
                return
        finally:
            for lock in locks:
                lock.release()


def may_share(one: LocalBuffer, other: LocalBuffer) -> bool:
    """Whether they could have one storage, if they hold the same."""
    there = one.storage.host is None and other.storage.host is None
    return there and one.size == other.size >= LEAST and one.storage is not other.storage


def is_shared(buffer: LocalBuffer) -> bool:
    """Whether others have its storage, too."""
    return not buffer.storage.users <= {buffer}


def _same(one: Storage, other: Storage) -> bool:
    """Whether two storages of one size hold the same, as it came. Both are held."""
    for at, end in _pieces(len(one.data)):
        if not torch.equal(one.forms.read(one.data, at, end), other.forms.read(other.data, at, end)):
            return False
    return True


def _copy(source: Storage, target: Storage) -> None:
    """Let ``target``, of the same size, hold what ``source`` holds, as it came. ``source`` is held."""
    for at, end in _pieces(len(source.data)):
        target.data[at:end].copy_(source.forms.read(source.data, at, end))


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    for at in range(0, size, PIECE):
        yield at, min(at + PIECE, size)
