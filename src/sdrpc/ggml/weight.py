"""Weights as bytes that are elsewhere: in a mapped file, in a torch module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .types import Type


class Origin(NamedTuple):
    """Where bytes come from, such that the same origin means the same bytes for good."""

    file: str
    """One state of a file: another one after any change."""
    part: str
    """What of it, and what was made of that."""

    def made(self, what: str) -> Origin:
        """The origin of what is made of these bytes."""
        return Origin(self.file, f"{self.part} {what}")


@dataclass(frozen=True, slots=True)
class Weight:
    """A named tensor of a model. ``shape`` is in torch's order (``ne`` reversed, any number of dimensions).

    ``data`` gives its bytes when they are needed, ideally a view of the mapped file: nothing is copied before.
    ``origin``: None where nothing can be said.
    """

    name: str
    type: Type
    shape: tuple[int, ...]
    data: Callable[[], memoryview]
    origin: Origin | None = None
