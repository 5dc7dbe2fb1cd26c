"""Things in groups: what is done for several of them costs less than for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def grouped(things: Iterable[T], size: Callable[[T], int], fit: Callable[[int, int], bool]) -> Iterator[list[T]]:
    """``things`` in their order, as many together as ``fit``: (how many, their sizes in all) → whether that is not too
    much. One that is too much by itself is alone."""
    group: list[T] = []
    total = 0
    for thing in things:
        total += size(thing)
        if group and not fit(len(group) + 1, total):
            yield group
            group, total = [], size(thing)
        group.append(thing)
    if group:
        yield group
