"""The table of rules, and what rules are made of.

A rule gets the emitter, what the result has to be, and the operation's arguments under ATen's own names; tensors arrive
as values, dtypes as their kind. It returns the result, or a tuple of results. Shapes are those that torch worked out
while the module was captured: rules don't check what torch has checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..emitter import Emitter, Kind, Shape, Value

Number = int | float
Operand = Value | int | float


class Out(NamedTuple):
    """What torch says of an operation's (first) result."""

    shape: Shape
    kind: Kind


Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)
RULES: dict[str, Rule] = {}
"""ATen operation (without overload) → its rule: ``rule(emitter, out, *args, **kwargs)``."""


def rule(*names: str) -> Callable[[R], R]:
    """Enter a function in the table under ``names``."""

    def register(function: R) -> R:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def positive(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim + rank if dim < 0 else dim


def dims(dim: int | Sequence[int] | None, rank: int) -> list[int]:
    """Dimensions of a reduction, in order; all of them where none is named."""
    if dim is None or dim == []:
        return list(range(rank))
    return sorted(positive(d, rank) for d in ([dim] if isinstance(dim, int) else dim))


def pair(value: Any) -> tuple[int, int]:
    """A size in y and x, given as both or as one for both."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers[0], numbers[-1]


def number(value: Operand) -> float | None:
    """The operand's number, where it is one and known."""
    return value.scalar if isinstance(value, Value) else value


def value(e: Emitter, operand: Operand) -> Value:
    """The operand as a value."""
    if isinstance(operand, Value):
        return operand
    return e.constant(np.asarray(operand, np.float32 if isinstance(operand, float) else np.int64))


def filled(e: Emitter, out: Out, fill: Number) -> Value:
    """``out`` with one number everywhere."""
    dtype = {"f": np.float32, "i": np.int64, "b": bool}[out.kind]
    return e.constant(np.broadcast_to(np.asarray(fill, dtype), out.shape), out.kind)
