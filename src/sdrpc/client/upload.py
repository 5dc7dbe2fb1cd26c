"""Uploads that send what the server does not have.

A server is asked for bytes by their name (:mod:`sdrpc.client.naming`), and gets them if it answers no. Names are
remembered where bytes come from a file (:mod:`sdrpc.client.names`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

from ..device import Content
from ..ggml.weight import Origin
from ..grouping import grouped
from ..wire.ranges import MOST_RANGES
from .names import Names
from .naming import SMALL, Namer, Naming, Scheme

PART = 32 << 20
"""Bytes that have a name of their own: native servers hold what they receive at once in memory twice."""
GROUP_BYTES = 64 << 20
"""What is asked for together, and sent together, at most. While one group is sent, the answers for the next one are on
their way and the names of the one behind that are computed: the bytes of all of them may be in memory."""
LOAD_BYTES = 128 << 20
"""What is sent together at most to a server that is asked for nothing: between two loads it has to see what the next
one is."""
FIRST_BYTES = 16 << 20
"""What is sent together at first, and later if that takes its time: what is sent is told between two."""
QUICK, SLOW = 0.1, 1.0
"""Seconds for what was sent together: in less, the next is twice as much; in more, half."""
BEHIND = 4
"""Parts that are sent and whose names are not known yet. Their bytes may be in memory too."""

T = TypeVar("T")


class Offered(NamedTuple):
    """``size`` bytes of a buffer from ``offset`` on, by their name."""

    offset: int
    size: int
    name: bytes


class Run(NamedTuple):
    """Bytes from ``offset`` on, one view after the other; ``keep``: the server may want to have them again."""

    offset: int
    data: Sequence[memoryview]
    keep: bool = False


class Sender(Protocol):
    """What an upload needs of a device."""

    def offer(self, scheme: Scheme, offered: Sequence[Offered]) -> Callable[[], list[bool]]:
        """Ask for bytes by their names. What this gives waits for the answers: whether the server had them, and has
        them there now."""

    def send(self, runs: Sequence[Run], sent: Callable[[], None]) -> None:
        """Send bytes; ``sent`` is called when they are, which may be in a later call."""

    def finish(self) -> None:
        """Wait until all bytes are sent."""

    @property
    def together(self) -> bool:
        """Whether it pays to give many runs at once."""


@dataclass(eq=False)
class _Part:
    """``size`` bytes of a content; ``name`` is what they are called, or will be."""

    content: Content
    start: int
    size: int
    origin: Origin | None
    name: Naming | bytes | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    views: tuple[memoryview, ...] | None = None

    @property
    def offset(self) -> int:
        return self.content.offset + self.start

    def data(self) -> tuple[memoryview, ...]:
        """The bytes: views of what is in memory anyway, the rest made once for the name and for sending."""
        with self.lock:
            if self.views is None:
                self.views = tuple(self.content.pieces(self.start, self.start + self.size))
            return self.views

    def forget(self) -> None:
        """Let go of bytes that were made. Whoever reads them at the moment keeps them until then."""
        with self.lock:
            self.views = None


class _Pace:
    """How many bytes are sent together: up to ``most``, as few as take a moment."""

    def __init__(self, most: int) -> None:
        self._most, self.room = most, min(FIRST_BYTES, most)
        self._since = time.monotonic()

    def fits(self, count: int, size: int) -> bool:
        """Whether ``count`` parts of ``size`` bytes in all may be sent together."""
        return count <= MOST_RANGES and size <= self.room

    def sent(self) -> None:
        """What was sent together is."""
        before, self._since = self._since, time.monotonic()
        if self._since - before < QUICK:
            self.room = min(2 * self.room, self._most)
        elif self._since - before > SLOW:
            self.room = max(self.room // 2, min(FIRST_BYTES, self._most))


def upload(
    scheme: Scheme, contents: Sequence[Content], sender: Sender, names: Names, progress: Callable[[int], None]
) -> None:
    """Bring ``contents`` to the server, sending as little as can be."""
    done, pace = 0, _Pace(GROUP_BYTES)
    behind: deque[tuple[_Part, Naming]] = deque()
    namer = Namer(scheme)

    def learn(part: _Part, name: bytes) -> None:
        """Note what a part is called, for later runs as well."""
        part.name = name
        if part.origin:
            names.put(part.origin, name)

    def begin(group: list[_Part]) -> list[_Part]:
        """Have names computed."""
        for part in group:
            if part.size < scheme.smallest:
                continue
            part.name = names.get(part.origin) if part.origin else None
            if part.name is None and scheme.first:
                if part.content.size > SMALL:  # a short rest of more may be made only with all of it
                    part.name = namer.name(part.data)
                else:
                    learn(part, scheme.name(part.data()))
        return group

    def ask(group: list[_Part]) -> tuple[list[_Part], list[_Part], Callable[[], list[bool]]]:
        """Ask for the parts that have names. The group, which of it was asked for, and what gives the answers."""
        for part in group:
            if isinstance(part.name, Naming):
                learn(part, part.name.result())
        asked = [part for part in group if isinstance(part.name, bytes)]
        offered = [Offered(part.offset, part.size, part.name) for part in asked if isinstance(part.name, bytes)]
        return group, asked, sender.offer(scheme, offered)

    def sent(parts: list[_Part]) -> None:
        nonlocal done
        for part in parts:
            part.forget()
            done += part.size
        pace.sent()
        progress(done)

    def finish(left: int) -> None:
        while len(behind) > left:
            part, naming = behind.popleft()
            learn(part, naming.result())

    try:
        groups = grouped(_parts(scheme, contents), lambda part: part.size, pace.fits)
        begun = _one_ahead(map(begin, groups))
        for group, asked, answers in _one_ahead(map(ask, begun)):
            had = {part for part, answer in zip(asked, answers(), strict=True) if answer}
            for some in [group] if sender.together else [[part] for part in group]:
                missing = [part for part in some if part not in had]
                for part in missing:
                    if part.name is None and part.origin and part.size >= scheme.smallest:
                        views = part.data()  # now: the part forgets them once they are sent
                        behind.append((part, namer.name(partial(tuple, views))))
                runs = [Run(part.offset, part.data(), part.size >= scheme.smallest) for part in missing]
                sender.send(runs, partial(sent, some))
                finish(BEHIND)
        sender.finish()
        finish(0)
        names.save()
    finally:
        namer.close()


def send_all(contents: Sequence[Content], sender: Sender, progress: Callable[[int], None]) -> None:
    """Bring ``contents`` to a server that has nothing of them."""
    done, size, pace = 0, 0, _Pace(LOAD_BYTES)
    runs: list[Run] = []

    def sent(count: int) -> None:
        nonlocal done
        done += count
        pace.sent()
        progress(done)

    def flush() -> None:
        nonlocal size
        sender.send(tuple(runs), partial(sent, size))
        size = 0
        runs.clear()

    for content in contents:
        at = content.offset
        for piece in content.pieces():
            whole = memoryview(piece).cast("B")
            for start in range(0, len(whole), PART):
                part = whole[start : start + PART]
                if runs and not pace.fits(len(runs) + 1, size + len(part)):
                    flush()
                runs.append(Run(at, [part]))
                size += len(part)
                at += len(part)
    flush()
    sender.finish()


def _parts(scheme: Scheme, contents: Iterable[Content]) -> Iterator[_Part]:
    for content in contents:
        for start in range(0, content.size, PART):
            size = min(PART, content.size - start)
            origin = content.origin and content.origin.made(f"{start}+{size} {scheme.kind}")
            yield _Part(content, start, size, origin)


def _one_ahead(groups: Iterable[T]) -> Iterator[T]:
    """The same, of which the next one is made before one is worked on."""
    before: T | None = None
    for group in groups:
        if before is not None:
            yield before
        before = group
    if before is not None:
        yield before
