"""What clients have in memory, found by what it is: another client of the same owner gets it without sending it.

Only what is small is hashed while it comes. When a client asks for bytes, ranges of as many bytes that its owner has
sent are hashed, each once and the likeliest first: those at the same offset of a buffer, since the same program puts
the same model there. What is hashed is frozen before, where the device can do that
(:meth:`sdrpc.device.ServedDevice.freeze`), so that it stays what its digest says, whatever its client does with its own
memory; and then the asker gets the same memory, not a copy. Elsewhere it gets a copy, and that is what is hashed, in
its own memory. What was copied before anybody wrote to it again (:meth:`sdrpc.device.ServedDevice.mark`) need not be
hashed once more.

Only what its own owner has sent is looked at for a client, and it takes no longer when others have the same: nobody
learns from it what others draw with.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import NamedTuple, Protocol, TypeVar

from ..content import FNV_START, PIECE, THREADS, fnv1a, hashed, joined, pieces
from ..device import Buffer, Bytes, Frozen, Mark, ServedDevice
from ..errors import DeviceError
from .questions import Questions
from .threads import Threads

RANGES, RANGES_OF_OWNER = 1 << 16, 1 << 14
"""Ranges that are remembered at one time, of all clients and of those of one owner: a large model has two thousand."""
WORTH_ASKING = 1 << 20
"""Bytes that an owner's clients must have, before it pays for another one to hash what it could send."""
MOST = 1 << 30
"""Bytes that are hashed for what a thread looks for at a time: what else there is must be sent, or asked for again."""
_QUESTIONS = max(2, THREADS)
KEPT_THREADS = _QUESTIONS + THREADS
"""Threads that a server has for all of its clients, at most; they begin when they are first needed, and stay."""

T = TypeVar("T")


class Look(Protocol):
    """A way to look at bytes."""

    def __call__(self, at: int, size: int, see: Callable[[Sequence[Bytes]], T]) -> T:
        """What ``see`` makes of ``size`` bytes from ``at`` on, in parts, which it must not keep."""


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

    def look(self, at: int, size: int, see: Callable[[Sequence[Bytes]], T]) -> T:
        return self.device.look(self.buffer, self.offset + at, size, lambda data: see((data,)))


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


@dataclass
class Allowance:
    """``left``: bytes that may still be hashed; then only what is known is found. (The last range may be more.)"""

    left: int = field(default_factory=lambda: MOST)


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
        self.questions = Questions(_QUESTIONS)
        """For what clients ask for; it waits for pieces, devices and disks."""
        self._pool = Threads(THREADS, "sdrpc-live")

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
        if held.digest is not None:
            spot.device.identify(spot.buffer, held.mark, _name(owner, held.digest))
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

    def find(self, owner: str, wanted: Wanted, target: Spot, hold: Hold, allowance: Allowance) -> bool:
        """Whether ``target`` has the bytes ``wanted`` now. If not, it may have others than before."""
        self._give_up()
        for held in self._likely(owner, wanted, target):
            spot = held.spot
            if held.mark.written and held.frozen is None:  # nobody asks for what a graph has made
                with self._lock:
                    self._remove(_position(spot), held)
                continue
            try:
                with held.lock:
                    known = wanted.met_by(held)
                    if known is False or (known is None and allowance.left <= 0):
                        continue
                    allowance.left -= 0 if known else spot.size
                    found = self._becomes(owner, held, wanted, target, hold)
            except DeviceError:  # its client has just freed it
                found = False
            if found:
                self.add(owner, self._here(held, target))
                return True
        return False

    def _give_up(self) -> None:
        """Count what was frozen and is gone no longer."""
        while self._over:
            try:
                give_up = self._over.popleft()
            except IndexError:  # another thread took the last one
                return
            give_up()

    def _likely(self, owner: str, wanted: Wanted, target: Spot) -> Iterator[Held]:
        """What may be ``wanted``: what is known to be, then what nobody has looked at, that at the same place first."""
        group, mine = (owner, id(target.device), target.size), target.buffer.key
        with self._lock:
            same_size = list(self._groups.get(group, {}).values())
        yield from [held for held in same_size if wanted.met_by(held) and held.spot.buffer.key != mine]
        unknown = [held for held in same_size if wanted.met_by(held) is None and held.spot.buffer.key != mine]
        yield from [held for held in unknown if held.spot.offset == target.offset]
        yield from [held for held in unknown if held.spot.offset != target.offset]

    def _becomes(self, owner: str, held: Held, wanted: Wanted, target: Spot, hold: Hold) -> bool:
        """Find out whether ``held`` is ``wanted``; if so, ``target`` is the same now."""
        source, known = held.spot, wanted.met_by(held)
        if held.frozen is None:
            self._freeze(owner, held, hold)
        if held.frozen is not None:
            if known is None:
                self._look_at(owner, held, wanted, _inside(held.frozen))
            if not wanted.met_by(held):
                return False
            _give(held.frozen, target)
            return True
        source.device.copy(source.buffer, source.offset, target.buffer, target.offset, target.size)
        if held.mark.written:  # perhaps before it was copied, and what it was is known no longer
            return False
        if known is None:
            self._look_at(owner, held, wanted, target.look)
        same = bool(wanted.met_by(held))
        if same and source.offset == target.offset:
            target.device.may_be_same(target.buffer, source.buffer)
        return same

    def _freeze(self, owner: str, held: Held, hold: Hold) -> None:
        """Have ``held`` stay what it is, where that can be; if its digest is known, what that says."""
        spot, give_up = held.spot, hold(held.spot.size)
        if give_up is None:
            return
        frozen = spot.device.freeze(spot.buffer, spot.offset, spot.size)
        if frozen is None:
            give_up()
            return
        # not at once: it may be collected in the middle of anything
        weakref.finalize(frozen, self._over.append, give_up).atexit = False
        if held.digest is not None:
            if held.mark.written:  # perhaps before it was frozen
                return
            spot.device.identify(spot.buffer, held.mark, _name(owner, held.digest))
        held.frozen = frozen

    def _look_at(self, owner: str, held: Held, wanted: Wanted, look: Look) -> None:
        """Find out what ``held`` is; ``look`` shows its bytes."""
        spot = held.spot
        held.digest = self._digest(look, spot.size)
        if wanted.digest is None:
            held.fnv = _fnv(look, spot.size)
        spot.device.identify(spot.buffer, held.mark, _name(owner, held.digest))

    def _here(self, held: Held, target: Spot) -> Held:
        """``target``, which has become the same as ``held``."""
        mark = target.device.mark(target.buffer, target.offset, target.size)
        return Held(target, mark, held.digest, held.fnv, held.frozen)

    def _digest(self, look: Look, size: int) -> bytes:
        if size <= PIECE:
            return joined([_hashed(look, (0, size))])
        return joined(self._pool.map(partial(_hashed, look), pieces(size)))

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


def _give(frozen: Frozen, target: Spot) -> None:
    """Have ``target`` be ``frozen``: the same memory, if it can be."""
    if not target.device.take(target.buffer, target.offset, frozen):
        for at, size in pieces(target.size):
            target.device.write(target.buffer, target.offset + at, b"".join(frozen.read(at, size)))


def _inside(frozen: Frozen) -> Look:
    def look(at: int, size: int, see: Callable[[Sequence[Bytes]], T]) -> T:
        return see(frozen.read(at, size))

    return look


def _hashed(look: Look, piece: tuple[int, int]) -> bytes:
    return look(*piece, lambda parts: hashed(*parts))


def _fnv(look: Look, size: int) -> int | None:
    """None where there is no fast FNV-1a."""
    fnv, state = fnv1a(), FNV_START
    if fnv is None:
        return None

    def see(parts: Sequence[Bytes]) -> None:
        nonlocal state
        for part in parts:
            state = fnv(part, state)

    for piece in pieces(size):
        look(*piece, see)
    return state


def _name(owner: str, digest: bytes) -> Hashable:
    return owner, digest
