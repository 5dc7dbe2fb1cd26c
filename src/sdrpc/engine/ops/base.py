"""What the table of kernels is made of: its rows, and what kernels share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor

from sdrpc.ggml.tensor import Dims

from ..dtypes import shape_of
from ..operations import OpName
from ..values import Value

P = TypeVar("P")
Q = ParamSpec("Q")


class Autocast(Enum):
    """In which dtype an operation is computed in *fast* precision (the classes of torch.autocast, and moves)."""

    FLOAT32 = auto()
    """In float32 always."""
    NARROW = auto()
    """Matrix products, convolutions, attention: in the narrow dtype always, since that is what it is fast for."""
    FOLLOWS = auto()
    """In the narrow dtype when an operand that was computed is in it (torch computes these in float32 inside)."""
    MOVES = auto()
    """It moves numbers without computing: in the dtype of its operands."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """What the engine does for one operation; made by :func:`kernel`."""

    op: OpName
    params: type
    """The class of its values' parameters."""
    function: Callable[..., Tensor]
    """It gets the value to compute and its operands (:mod:`sdrpc.engine.ops` says in which form)."""
    autocast: Autocast
    raw: tuple[int, ...]
    """Operands that it takes as they are held: in any type, blocks too."""
    moves_blocks: bool
    """Of operands in blocks of the result's own type it moves the bytes; nothing is dequantized."""
    in_place: bool
    """It changes its first operand, a view of memory, and stores what it makes itself."""
    takes_device: bool
    """It has no operands to compute on: it gets the torch device in their place."""
    rounds: tuple[int, int] | None
    """ggml's CPU backend rounds the second of these operands, to what suits the type of the first one."""


def kernel(
    op: OpName,
    params: type[P],
    function: Callable[Concatenate[Value[P], Q], Tensor],
    autocast: Autocast = Autocast.FLOAT32,
    *,
    raw: tuple[int, ...] = (),
    moves_blocks: bool = False,
    in_place: bool = False,
    takes_device: bool = False,
    rounds: tuple[int, int] | None = None,
) -> Kernel:
    """A row of the table. ``function`` takes a value with parameters of the class that the row names."""
    erased: Callable[..., Any] = function
    return Kernel(op, params, erased, autocast, raw, moves_blocks, in_place, takes_device, rounds)


def operand(v: Value, i: int) -> Value:
    source = v.src[i]
    if source is None:
        raise ValueError(f"{v.node}: operand {i} is missing")  # validation has counted them
    return source


def repeat_to(x: Tensor, ne: Dims) -> Tensor:
    """``x`` repeated until it has the shape ``ne``; no copy where a dimension has one element or all of them."""
    shape = shape_of(ne)
    if all(have in (1, want) for have, want in zip(x.shape, shape, strict=True)):
        return x.expand(shape)
    return x.repeat([want // max(have, 1) for have, want in zip(x.shape, shape, strict=True)])


def within(numbers: Tensor, n: int) -> Tensor:
    """``numbers``, which must be below ``n``. A CPU checks them; an accelerator would fail for good, and reading them
    costs a wait for all that is queued, so there the nearest row is taken."""
    if numbers.device.type != "cpu":
        return numbers.clamp(0, n - 1)
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < n:
        raise IndexError(f"rows {int(numbers.min())} … {int(numbers.max())} of {n}")
    return numbers
