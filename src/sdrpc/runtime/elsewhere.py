"""Arrays that are not here, with numpy's arithmetic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

NUMPY: dict[str, Callable[..., Any]] = {
    "ADD": np.add, "SUB": np.subtract, "MUL": np.multiply, "DIV": np.divide, "NEG": np.negative, "ABS": np.abs,
    "MEAN": np.mean,
}  # fmt: skip
"""The operations that such arrays know, as numpy has them."""


class Elsewhere(ABC):
    """A float32 array that is not here. It has numpy's arithmetic; ``np.asarray`` reads it."""

    __array_ufunc__ = None  # so that numpy's numbers and arrays leave their operators to this class
    dtype = np.dtype(np.float32)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @abstractmethod
    def read(self) -> Array:
        """Its numbers."""

    @abstractmethod
    def rows(self, rows: Any) -> Any:
        """Consecutive rows of the first dimension; None where that is no array there."""

    @abstractmethod
    def apply(self, op: str, *others: Any) -> Any:
        """An operation with this as the first operand."""

    @property
    def size(self) -> int:
        return prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self.read().astype(dtype or np.float32, copy=False)

    def __getitem__(self, rows: Any) -> Any:
        """Rows of the first dimension, as an array on the device; anything else as numpy has it."""
        found = self.rows(rows)
        return np.asarray(self)[rows] if found is None else found

    def __add__(self, other: Any) -> Any:
        return self.apply("ADD", other)

    def __radd__(self, other: Any) -> Any:
        return self.apply("ADD", other)

    def __mul__(self, other: Any) -> Any:
        return self.apply("MUL", other)

    def __rmul__(self, other: Any) -> Any:
        return self.apply("MUL", other)

    def __sub__(self, other: Any) -> Any:
        return self.apply("SUB", other)

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __truediv__(self, other: Any) -> Any:
        return self.apply("DIV", other)

    def __rtruediv__(self, other: Any) -> Any:
        return other / np.asarray(self)

    def __neg__(self) -> Any:
        return self.apply("NEG")

    def __abs__(self) -> Any:
        return self.apply("ABS")

    def mean(self) -> Any:
        """Of all its numbers, an array of no dimensions; added up in the device's order, not numpy's."""
        return self.apply("MEAN")
