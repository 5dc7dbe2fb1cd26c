"""What an adapter adds to a weight: a product of two thin matrices, a difference of the weight's own shape, or the
weight itself, scaled.

Values that say how a weight changes, and the weight with such changes merged into it while it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from ..ggml.types import F32, Type
from ..ggml.weight import Origin, Weight, Whole, joined_origin
from .expressions import NUMBERS, Made, cast, joined, whole_array
from .numbers import converter

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LowRank:
    """``factor`` · up · down. ``down``: (rank, columns …), the dimensions after the first those of the weight; ``up``:
    (rows, rank). Several changes may share one ``down``."""

    down: Weight
    up: Weight
    factor: float = 1.0

    @property
    def weights(self) -> tuple[Weight, ...]:
        return self.down, self.up

    def rows(self, start: int, stop: int) -> Array:
        """What is added to rows ``start`` to ``stop`` of the weight as a matrix."""
        down = numbers(self.down).reshape(self.down.shape[0], -1)
        added: Array = np.float32(self.factor) * (numbers(self.up)[start:stop] @ down)
        return added


@dataclass(frozen=True, eq=False)
class Difference:
    """``factor`` times a tensor of the weight's shape."""

    tensor: Weight
    factor: float = 1.0

    @property
    def weights(self) -> tuple[Weight, ...]:
        return (self.tensor,)

    def rows(self, start: int, stop: int) -> Array:
        """As :meth:`LowRank.rows`."""
        added: Array = np.float32(self.factor) * numbers(self.tensor).reshape(self.tensor.shape[0], -1)[start:stop]
        return added


@dataclass(frozen=True, eq=False)
class RowScaling:
    """``factor`` times the weight with each of its rows times a number of ``by``, (rows,)."""

    by: Weight
    factor: float = 1.0

    @property
    def weights(self) -> tuple[Weight, ...]:
        return (self.by,)

    def of(self, base: Array, start: int) -> Array:
        """What is added to ``base``, rows of the weight as a matrix, the first of them number ``start``."""
        by = np.float32(self.factor) * numbers(self.by)[start : start + len(base)]
        scaled: Array = by[:, None] * base
        return scaled


@dataclass(frozen=True, eq=False)
class ColumnScaling:
    """``factor`` times the weight with what it multiplies each channel of its input with times a number of ``by``,
    (channels,)."""

    by: Weight
    factor: float = 1.0

    @property
    def weights(self) -> tuple[Weight, ...]:
        return (self.by,)

    def of(self, base: Array, _start: int) -> Array:
        """As :meth:`RowScaling.of`."""
        by = np.float32(self.factor) * numbers(self.by)
        scaled: Array = base.reshape(len(base), len(by), -1) * by[:, None]
        return scaled.reshape(base.shape)


Product = LowRank | Difference
Scaling = RowScaling | ColumnScaling
Delta = Product | Scaling


def added(change: Delta, base: Array, start: int) -> Array:
    """What ``change`` adds to ``base``, rows of the weight as a matrix, the first of them number ``start``."""
    if isinstance(change, Scaling):
        return change.of(base, start)
    return change.rows(start, start + len(base))


def numbers(w: Weight) -> Array:
    """A small tensor's numbers, float32."""
    found: Array = whole_array(cast(w, F32)).view("<f4").reshape(w.shape)
    return found


def row_reader(w: Weight) -> Callable[[int, int], Array]:
    """A function that gives some rows of a weight as a matrix of numbers. Raises :class:`ValueError` for a type that
    can't be read."""
    read, columns = converter(w.type, F32), prod(w.shape[1:])
    stride = w.type.row_bytes(columns)

    def rows(first: int, last: int) -> Array:
        found: Array = read(joined(w.pieces, first * stride, last * stride)).view("<f4").reshape(last - first, columns)
        return found

    return rows


def computed(name: str, shape: tuple[int, ...], sources: Sequence[Weight], make: Callable[..., Any]) -> Weight:
    """A small F32 tensor that ``make`` computes of the arrays of ``sources`` whenever its bytes are asked for."""

    def data() -> bytes:
        with np.errstate(all="ignore"):  # what is too large becomes infinite, which the picture's check finds
            made = np.ascontiguousarray(make(*map(numbers, sources)), "<f4")
        if made.size != prod(shape):
            raise CheckpointError(sources[0].file, f"gives {list(made.shape)}, not {list(shape)}", name)
        return made.tobytes()

    origin = joined_origin(f"{name} {list(shape)}", [source.origin for source in sources])
    return Weight(name, F32, shape, Whole(data), origin, sources[0].file)


def merged(w: Weight, changes: Sequence[tuple[Delta, float]]) -> Weight:
    """``w`` plus each change times its strength, in the type of ``w``, made piece by piece.

    Raises :class:`CheckpointError` for a type that can't be written.
    """
    columns = prod(w.shape[1:])
    try:
        read, write = row_reader(w), converter(F32, w.type)
    except ValueError as error:
        raise CheckpointError(w.file, f"nothing can be merged into it: {error}", w.name) from error

    def make(first: int, last: int) -> np.ndarray:
        values = base = read(first, last)
        with np.errstate(all="ignore"):  # as in computed
            for change, strength in changes:
                values = values + np.float32(strength) * added(change, base, first)
        return write(np.ascontiguousarray(values).reshape(-1).view(np.uint8))

    said = " ".join(f"{strength * change.factor!r}" for change, strength in changes)
    parts = [part.origin for change, _ in changes for part in change.weights]
    origin: Origin | None = joined_origin(f"merged {said}", [w.origin, *parts])
    step = max(1, NUMBERS // max(1, columns))
    return Weight(w.name, w.type, w.shape, Made(w.nbytes, w.type.row_bytes(columns), step, make), origin, w.file)


def can_merge(type: Type) -> bool:
    """Whether numbers can be written in ``type``."""
    try:
        converter(F32, type)
    except ValueError:
        return False
    return True
