"""Fusion (being written)."""

from collections.abc import Sequence

from .values import Value

Report = dict[str, int]


def fuse(effects: Sequence[Value]) -> tuple[tuple[Value, ...], Report]:
    return tuple(effects), {}
