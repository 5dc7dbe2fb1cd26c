"""What the functions of all families share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sdrpc.ggml.tensor import Dims

from ..dtypes import shape_of
from ..values import Value

Raise = Callable[..., Tensor]


def operand(v: Value, i: int) -> Value:
    source = v.src[i]
    if source is None:
        raise ValueError(f"{v.node}: operand {i} is missing")  # the rules have counted them
    return source


def repeat_to(x: Tensor, ne: Dims) -> Tensor:
    """``x`` repeated until it has the shape ``ne``; no copy where a dimension has one element or all of them."""
    shape = shape_of(ne)
    if all(have in (1, want) for have, want in zip(x.shape, shape, strict=True)):
        return x.expand(shape)
    return x.repeat([want // have for have, want in zip(x.shape, shape, strict=True)])


def within(numbers: Tensor, n: int) -> Tensor:
    """``numbers``, which must be below ``n``. A CPU says so; an accelerator would fail for good, and asking it costs a
    wait for all that is queued, so there the nearest row is taken."""
    if numbers.device.type != "cpu":
        return numbers.clamp(0, n - 1)
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < n:
        raise IndexError(f"rows {int(numbers.min())} … {int(numbers.max())} of {n}")
    return numbers
