"""What clients have in memory, found by what it is: another client of the same owner gets it without sending it.

Nothing is hashed while it comes. When a client asks for bytes, ranges of as many bytes that its owner has sent are
hashed, each once and the likeliest first: those at the same offset of a buffer, since the same program puts the same
model there. What is hashed is frozen before, where the device can do that (:meth:`sdrpc.device.ServedDevice.freeze`),
so that it stays what its digest says, whatever its client does with its own memory; and then the asker gets the same
memory, not a copy. Elsewhere it gets a copy, which is checked in its own memory.

Only what its own owner has sent is looked at for a client, and it takes no longer when others have the same: nobody
learns from it what others draw with.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from threading import Lock
from typing import NamedTuple

from ..content import FNV_START, PIECE, fnv1a, joined, pieces
from ..device import Buffer, Bytes, Frozen, Mark, ServedDevice
from ..errors import DeviceError

RANGES, RANGES_OF_OWNER = 1 << 16, 1 << 14
"""Ranges that are remembered at one time, of all clients and of those of one owner: a large model has two thousand."""
WORTH_ASKING = 1 << 20
"""Bytes that an owner's clients must have, before it pays for another one to hash what it could send."""
MOST = 1 << 30
"""Bytes that are hashed for one question, at most: what else there is must be sent, or asked for again."""
_THREADS = min(8, os.cpu_count() or 1)

Read = Callable[[int, int], Sequence[Bytes]]
"""(at, size) → bytes, in parts."""


class Wanted(NamedTuple):
    """Bytes by what they are called: by our clients and by native ones (:mod:`sdrpc.content`)."""

    digest: bytes | None
    fnv: int | None

    def met_by(self, held: Held) -> bool | None:
        """Whether ``held`` is that; None while nobody knows."""
        found = held.fnv if self.digest is None else held.digest
        return None if found is None else found == (self.fnv if self.digest is None else self.digest)


class Spot(NamedTuple):
    """``size`` bytes from ``offset`` on in a buffer of ``device``."""

    device: ServedDevice
    buffer: Buffer
    offset: int
    size: int

    def read(self, at: int, size: int) -> Sequence[Bytes]:
        return (self.device.read(self.buffer, self.offset + at, size),)


@dataclass(eq=False)
class Held:
    """Bytes of a client at ``spot``, and what is known of them. ``digest`` and ``fnv`` were true when they were found;
    of what is ``frozen`` they stay true."""

    spot: Spot
    mark: Mark
    digest: bytes | None = None
    fnv: int | None = None
    frozen: Frozen | None = None
    lock: Lock = field(default_factory=Lock)


Group = tuple[str, int, int]
"""Owner, device and size: what may be the same."""
Position = tuple[int, int, int]
"""Buffer, offset and size: what is replaced when it is sent again."""

Hold = Callable[[int], Callable[[], None] | None]
"""Counts bytes for a client beyond its buffers, if it may have them: what gives them up again."""


@dataclass
class Owned:
    """What all clients of an owner have: ranges, and bytes."""

    ranges: int = 0
    size: int = 0


class Live:
    """What all clients have in memory. For any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._groups: dict[Group, dict[Position, Held]] = {}
        self._of_buffer: dict[int, dict[Position, Group]] = {}
        self._owners: dict[str, Owned] = {}
        self._ranges = 0
        self._over: deque[Callable[[], None]] = deque()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="sdrpc-live")

    def has_any(self, owner: str) -> bool:
        """Whether there is much that a client of ``owner`` might ask for."""
        with self._lock:
            owned = self._owners.get(owner)
            return owned is not None and owned.size >= WORTH_ASKING

    def add(self, owner: str, held: Held) -> None:
        """A client of ``owner`` has sent this, or has it otherwise. More than can be remembered is nothing that others
        find."""
        spot = held.spot
        if held.mark.written:
            return
        group, position = (owner, id(spot.device), spot.size), _position(spot)
        with self._lock:
            self._remove(position)
            owned = self._owners.get(owner, Owned())
            if self._ranges >= RANGES or owned.ranges >= RANGES_OF_OWNER:
                return
            self._groups.setdefault(group, {})[position] = held
            self._of_buffer.setdefault(spot.buffer.key, {})[position] = group
            self._count(owner, 1, spot.size)

    def forget(self, buffer: Buffer) -> None:
        """The buffer is freed."""
        self._give_up()
        with self._lock:
            for position in list(self._of_buffer.get(buffer.key, ())):
                self._remove(position)

    def find(self, owner: str, wanted: Wanted, target: Spot, hold: Hold) -> bool:
        """Whether ``target`` has the bytes ``wanted`` now. If not, it may have others than before."""
        self._give_up()
        looked_at = 0
        for held in self._likely(owner, wanted, target):
            spot = held.spot
            if held.mark.written and held.frozen is None:  # nobody asks for what a graph has made
                with self._lock:
                    self._remove(_position(spot), held)
                continue
            try:
                with held.lock:
                    if wanted.met_by(held) is None and looked_at < MOST:
                        looked_at += spot.size
                        self._look_at(owner, held, wanted, hold)
                    found = wanted.met_by(held) and self._given(held, target)
            except DeviceError:  # its client has just freed it
                found = False
            if found:
                self.add(owner, self._here(owner, held, target))
                return True
        return False

    def _give_up(self) -> None:
        """Count what was frozen and is gone no longer."""
        while self._over:
            self._over.popleft()()

    def _likely(self, owner: str, wanted: Wanted, target: Spot) -> Iterator[Held]:
        """What may be ``wanted``: what is known to be, then what nobody has looked at, that at the same place first."""
        group = owner, id(target.device), target.size
        with self._lock:
            same_size = self._groups.get(group, {}).values()
            candidates = [each for each in same_size if wanted.met_by(each) is not False]
        candidates.sort(key=lambda each: (not wanted.met_by(each), each.spot.offset != target.offset))
        return (held for held in candidates if held.spot.buffer.key != target.buffer.key)

    def _look_at(self, owner: str, held: Held, wanted: Wanted, hold: Hold) -> None:
        """Find out what ``held`` is."""
        spot = held.spot
        if held.frozen is None and (give_up := hold(spot.size)):
            held.frozen = spot.device.freeze(spot.buffer, spot.offset, spot.size)
            if held.frozen is None:
                give_up()
            else:
                # not at once: it may be collected in the middle of anything
                weakref.finalize(held.frozen, self._over.append, give_up).atexit = False
        read = spot.read if held.frozen is None else held.frozen.read
        held.digest = self._digest(read, spot.size)
        if wanted.digest is None:
            held.fnv = _fnv(read, spot.size)
        spot.device.identify(spot.buffer, held.mark, _name(owner, held.digest))

    def _given(self, held: Held, target: Spot) -> bool:
        """Whether ``target`` is the same as ``held`` now."""
        source, frozen, digest = held.spot, held.frozen, held.digest
        if frozen is not None:
            if not target.device.take(target.buffer, target.offset, frozen):
                for at, size in pieces(target.size):
                    target.device.write(target.buffer, target.offset + at, b"".join(frozen.read(at, size)))
            return True
        source.device.copy(source.buffer, source.offset, target.buffer, target.offset, target.size)
        return self._digest(target.read, target.size) == digest

    def _here(self, owner: str, held: Held, target: Spot) -> Held:
        """``target``, which has become the same as ``held``."""
        mark = target.device.mark(target.buffer, target.offset, target.size)
        if held.digest is not None:
            target.device.identify(target.buffer, mark, _name(owner, held.digest))
        return Held(target, mark, held.digest, held.fnv, held.frozen)

    def _digest(self, read: Read, size: int) -> bytes:
        if size <= PIECE:
            return joined([_sha(read, (0, size))])
        return joined(self._pool.map(partial(_sha, read), pieces(size)))

    def _remove(self, position: Position, only: Held | None = None) -> None:
        """Forget what is there, if anything is (and that is ``only``)."""
        of_buffer = self._of_buffer.get(position[0], {})
        group = of_buffer.get(position)
        if group is None or (only is not None and self._groups[group][position] is not only):
            return
        del of_buffer[position], self._groups[group][position]
        if not of_buffer:
            del self._of_buffer[position[0]]
        if not self._groups[group]:
            del self._groups[group]
        self._count(group[0], -1, -group[2])

    def _count(self, owner: str, ranges: int, size: int) -> None:
        owned = self._owners.setdefault(owner, Owned())
        owned.ranges += ranges
        owned.size += size
        self._ranges += ranges
        if not owned.ranges:
            del self._owners[owner]


def _position(spot: Spot) -> Position:
    return spot.buffer.key, spot.offset, spot.size


def _sha(read: Read, piece: tuple[int, int]) -> bytes:
    hashing = sha256()
    for part in read(*piece):
        hashing.update(part)
    return hashing.digest()


def _fnv(read: Read, size: int) -> int | None:
    """None where there is no fast FNV-1a."""
    fnv, state = fnv1a(), FNV_START
    if fnv is None:
        return None
    for piece in pieces(size):
        for part in read(*piece):
            state = fnv(part, state)
    return state


def _name(owner: str, digest: bytes) -> Hashable:
    return owner, digest
