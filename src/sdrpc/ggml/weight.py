"""Weights as bytes that are elsewhere: in a mapped file, in a torch module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .types import Type


@dataclass(frozen=True, slots=True)
class Weight:
    """A named tensor of a model. ``shape`` is in torch's order (``ne`` reversed, any number of dimensions).

    ``data`` gives its bytes when they are needed, ideally a view of the mapped file: nothing is copied before.
    """

    name: str
    type: Type
    shape: tuple[int, ...]
    data: Callable[[], memoryview]
