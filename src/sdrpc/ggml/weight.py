"""Weights as bytes that are elsewhere: in a mapped file, in a torch module, or made of such when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from typing import NamedTuple, Protocol

from .types import Type

LONG = 256
"""Characters of a description above which its hash takes its place."""


class Origin(NamedTuple):
    """Where bytes come from, such that the same origin means the same bytes for good."""

    file: str
    """One state of a file, or of several: another one after any change."""
    part: str
    """What of it, and what was made of that."""

    def made(self, what: str) -> Origin:
        """The origin of what is made of these bytes."""
        return Origin(self.file, f"{self.part} {what}")


def joined_origin(what: str, origins: Sequence[Origin | None]) -> Origin | None:
    """The origin of what is made of several tensors' bytes; None if that of one of them is not known."""
    known = [origin for origin in origins if origin is not None]
    if not known or len(known) < len(origins):
        return None
    files = list(dict.fromkeys(origin.file for origin in known))
    parts = ", ".join(f"{files.index(origin.file)}:{origin.part}" for origin in known)
    part = f"{what} ({parts})"
    return Origin("\n".join(files), part if len(part) <= LONG else blake2b(part.encode(), digest_size=32).hexdigest())


class Pieces(Protocol):
    """A tensor's bytes ``start`` to ``stop`` (None: to the end), in order, as views of bounded size or of memory that
    is there anyway (a mapped file). Bytes outside of the range are not read unless they have to be."""

    def __call__(self, start: int = 0, stop: int | None = None, /) -> Iterator[memoryview]: ...


@dataclass(frozen=True, slots=True)
class View:
    """Bytes that are in memory in one run."""

    data: memoryview

    def __call__(self, start: int = 0, stop: int | None = None, /) -> Iterator[memoryview]:
        if view := self.data[start:stop]:
            yield view

    def part(self, start: int, stop: int) -> View:
        """Bytes ``start`` to ``stop`` of these."""
        return View(self.data[start:stop])


@dataclass(frozen=True, slots=True)
class Whole:
    """Bytes that ``data`` gives all at once when it is asked: as often as there are ranges asked for."""

    data: Callable[[], bytes | bytearray | memoryview]

    def __call__(self, start: int = 0, stop: int | None = None, /) -> Iterator[memoryview]:
        return View(memoryview(self.data()).cast("B"))(start, stop)


class Held:
    """What ``weight`` gives, kept in this machine's memory once it was asked for."""

    def __init__(self, weight: Weight) -> None:
        self._weight = weight
        self._data: bytes | None = None

    def __call__(self, start: int = 0, stop: int | None = None, /) -> Iterator[memoryview]:
        if self._data is None:
            self._data = b"".join(self._weight.pieces())
        return View(memoryview(self._data))(start, stop)


class Before(NamedTuple):
    """What a tensor is in its file, where plain numbers were made of it because no type holds it: ``format``, in words,
    and the ``bits`` that a number takes there, with its share of scales."""

    format: str
    bits: float


@dataclass(frozen=True, slots=True)
class Weight:
    """A named tensor of a model. ``shape`` is in torch's order (``ne`` reversed, any number of dimensions).

    ``pieces`` give its bytes when they are needed, ideally views of the mapped file: nothing is copied before.
    ``origin``: None where nothing can be said. ``file``: what errors name. ``before``: None where it is as in the file,
    or became what somebody asked for.
    """

    name: str
    type: Type
    shape: tuple[int, ...]
    pieces: Pieces
    origin: Origin | None = None
    file: object = "the model"
    before: Before | None = None

    @property
    def nbytes(self) -> int:
        return self.type.row_bytes(prod(self.shape))

    def data(self) -> memoryview:
        """All bytes in one run: a view where they are in one piece, else a copy. For small tensors and tests."""
        views = list(self.pieces())
        return views[0] if len(views) == 1 else memoryview(b"".join(views))
