"""The cache at work: uploads are hashed and stored in the background, what is asked for is read and checked.

All of it in threads beside the one that serves the client: reading, writing and hashing leave the GIL to others.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ..content import FNV_START, PIECE, SMALLEST, THREADS, fnv1a, hashed, joined, pieces
from ..storage import remove
from .cache import Cache
from .threads import Threads

WAITING = 16
"""Pieces that are held in memory until they are hashed and written: so far a disk may lag behind an upload. One that is
slower slows it down."""
SMALL = 1 << 18
"""Bytes of a tensor that is read in one go."""
_SEEKING = threading.Lock()

Receive = Callable[[int, int, Callable[[memoryview], None]], None]
"""(offset, size, fill): have ``fill`` put a piece of at most :data:`sdrpc.content.PIECE` bytes where it belongs."""


class Room:
    """Memory for up to ``most`` pieces, for those who :meth:`enter` it. While anybody is inside, it is kept and used
    again, what was used last first: new memory takes longer to be had than to be filled. For any thread."""

    def __init__(self, most: int) -> None:
        self._left = threading.Semaphore(most)
        self._lock = threading.Lock()
        self._free: list[np.ndarray] = []
        self._inside = 0

    def enter(self) -> None:
        with self._lock:
            self._inside += 1

    def leave(self) -> None:
        """To be called once for each :meth:`enter`."""
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._free.clear()

    def copy(self, piece: memoryview) -> np.ndarray:
        """A copy of ``piece``, once there is room for it; other threads run meanwhile."""
        self._left.acquire()
        try:
            with self._lock:
                memory = self._free.pop() if self._free else np.empty(PIECE, np.uint8)
        except BaseException:  # there is no memory: one client's trouble, and no room less for all others
            self._left.release()
            raise
        data = memory[: len(piece)]
        np.copyto(data, np.frombuffer(piece, np.uint8))
        return data

    def give_back(self, data: np.ndarray) -> None:
        """What :meth:`copy` gave is not needed any more."""
        assert data.base is not None  # noqa: S101
        with self._lock:
            if self._inside:
                self._free.append(data.base)
        self._left.release()


class CacheService:
    """A cache with the threads that work for it. Shared by all clients of a server; close it when done."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.pool = Threads(THREADS, "sdrpc-cache")
        """For pieces; what runs there waits for nothing but the disk."""
        self.line = Threads(1, "sdrpc-cache-line")
        """For what must happen in order: names, which are hashed from end to end, and changes of the folder."""
        self.room = Room(WAITING)
        self.line.submit(self._tidy)

    def client_cache(self, owner: str) -> ClientCache:
        """The cache for a client of ``owner`` (:attr:`sdrpc.server.visitor.Visitor.owner`)."""
        return ClientCache(self, blake2b(owner.encode(), digest_size=8).hexdigest())

    def flush(self) -> None:
        """Wait until all that came so far is on disk."""
        self.line.submit(lambda: None).result()

    def close(self) -> None:
        """Finish what is under way, which is never much."""
        self.line.shutdown()
        self.pool.shutdown()

    def _tidy(self) -> None:
        try:
            self.cache.shrink()
        except OSError as error:
            self.cache.complain(error)


@dataclass(frozen=True)
class ClientCache:
    """The cache as the clients of one owner see it. ``owner`` stands for it in names of files."""

    service: CacheService
    owner: str

    def lookup(self, name: int, size: int) -> bytes | None:
        """The digest of the ``size`` bytes that these clients sent before and call ``name`` (FNV-1a 64)."""
        return self.service.cache.lookup(name, size, self.owner)

    def read(self, digest: bytes, size: int) -> bytes | None:
        """The ``size`` bytes of ``digest``, at most :data:`SMALL`; None when they are not there, or others have sent
        them."""
        file = self.open(digest, size)
        if file is None:
            return None
        with file:
            try:
                data = file.read(size)
            except OSError:  # the disk
                data = b""
        return data if self._is_whole(digest, [hashed(data)]) else None

    def open(self, digest: bytes, size: int) -> BinaryIO | None:
        """What may be the ``size`` bytes of ``digest``, for :meth:`restore`; None when they are not there, or others
        have sent them."""
        cache = self.service.cache
        return cache.open(digest, size) if cache.owned(digest, self.owner) else None

    def restore(self, file: BinaryIO, digest: bytes, size: int, receive: Receive) -> bool:
        """Read the ``size`` bytes of ``digest`` from ``file`` to where ``receive`` has them;
        False when it holds something else, and the target is overwritten nevertheless."""

        def read(piece: tuple[int, int]) -> bytes:
            at, length = piece
            digest = b""

            def fill(target: memoryview) -> None:
                nonlocal digest
                _read_all(file, at, target)
                digest = hashed(target)

            receive(at, length, fill)
            return digest

        try:
            if size <= PIECE:  # handing it to another thread would take longer
                return self._is_whole(digest, [read((0, size))])
            done = [self.service.pool.submit(read, piece) for piece in pieces(size)]
            wait(done)  # nobody writes to the target any more when this returns
            return self._is_whole(digest, [piece.result() for piece in done])
        except OSError:  # the disk, or a file that became shorter
            return self._is_whole(digest, [])

    def _is_whole(self, digest: bytes, pieces: Sequence[bytes]) -> bool:
        """Whether a file whose ``pieces`` have these digests is that of ``digest``. Any other is thrown out."""
        whole = joined(pieces) == digest
        (self.service.cache.used if whole else self.service.cache.drop)(digest)
        return whole

    def writer(self, size: int, name: int | None) -> CacheWriter | None:
        """For ``size`` bytes that are about to come, called ``name`` by a native client; None when they can't be kept:
        names can be checked only where FNV-1a is fast enough."""
        service = self.service
        if not SMALLEST <= size <= service.cache.budget or (name is not None and fnv1a() is None):
            return None
        return CacheWriter(service, self.owner, size, name)


class Came(NamedTuple):
    """A piece at ``at`` of a tensor, and its digest once it is written."""

    at: int
    data: np.ndarray
    stored: Future[bytes]


class CacheWriter:
    """A tensor on its way to the cache. What the disk does is logged, and never the client's problem."""

    def __init__(self, service: CacheService, owner: str, size: int, name: int | None) -> None:
        self._service, self._owner, self._size, self._name = service, owner, size, name
        self._lock = threading.Lock()
        self._waiting: deque[Came] = deque()
        self._at_work = False
        self._file: BinaryIO | None = None
        self._path: Path | None = None
        self._left = size
        self._digests: dict[int, Future[bytes]] = {}
        self._state = FNV_START
        service.room.enter()

    def feed(self, at: int, piece: memoryview) -> None:
        """The :data:`PIECE` bytes from ``at`` on (or the rest), which are copied: the caller may change them. In any
        order, from any thread, where the client has no name for them."""
        try:
            data, stored = self._service.room.copy(piece), Future[bytes]()
        except MemoryError:  # it is never complete then: the cache's loss, and not the client's
            return
        self._digests[at] = stored
        with self._lock:
            self._waiting.append(Came(at, data, stored))
            begins, self._at_work = not self._at_work, True
        if begins:
            self._service.pool.submit(self._store)
        if self._name is None:
            stored.add_done_callback(lambda _: self._service.room.give_back(data))
        else:
            self._service.line.submit(self._hash, data, stored)

    def finish(self, complete: bool) -> None:
        """Keep it, if it is ``complete``."""
        self._service.line.submit(self._finish, complete)

    def _store(self) -> None:
        """Write and hash what came, one piece after the other: a system lets only one thread write to a file, and
        others are better off with another tensor. The file is closed with its last piece: many small tensors may wait
        for what happens in order, and descriptors are few."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._at_work = False
                    return
                at, data, stored = self._waiting.popleft()
            try:
                if self._file is None:
                    self._file, self._path = self._service.cache.create()
                self._file.seek(at)
                _write_all(self._file, data.data)
                self._left -= len(data)
                if not self._left:
                    self._file.close()
                stored.set_result(hashed(data.data))
            except Exception as error:  # for who keeps the whole
                stored.set_exception(error)

    def _hash(self, data: np.ndarray, stored: Future[bytes]) -> None:
        """The client's name for it, which is hashed from end to end."""
        try:
            if fnv := fnv1a():
                self._state = fnv(data.data, self._state)
            wait([stored])
        finally:
            self._service.room.give_back(data)

    def _finish(self, complete: bool) -> None:
        cache = self._service.cache
        try:
            wait(self._digests.values())
            digest = joined(self._digests[at].result() for at in sorted(self._digests))
            if complete and not self._left and self._path is not None and self._name in (None, self._state):
                cache.commit(self._path, digest, self._size)
                cache.add_owner(digest, self._owner)
                if self._name is not None:
                    cache.add_alias(digest, self._name, self._size, self._owner)
        except OSError as error:
            cache.complain(error)
        finally:
            self._service.room.leave()
            if self._file is not None:
                self._file.close()
            if self._path is not None:
                remove(self._path)


def _read_all(file: BinaryIO, at: int, target: memoryview) -> None:
    """Fill ``target`` with what is in the file from ``at`` on, whoever else reads it."""
    while target:
        if hasattr(os, "preadv"):
            got = os.preadv(file.fileno(), [target], at)
        else:  # Windows
            with _SEEKING:
                file.seek(at)
                got = file.readinto(target)  # type: ignore[attr-defined]
        if not got:
            raise OSError("the file ends too early")
        target, at = target[got:], at + got


def _write_all(file: BinaryIO, rest: memoryview) -> None:
    while rest:
        rest = rest[file.write(rest) :]
