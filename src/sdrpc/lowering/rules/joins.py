"""Parts of tensors, parts put back, and tensors joined."""

# ruff: noqa: ARG001  all rules are called alike, whether or not they need what they get

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from ...errors import CaptureError
from ..emitter import Emitter, Value
from .base import Out, positive, rule


@rule("slice")
def sliced(
    e: Emitter, out: Out, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    dim = positive(dim, len(x.shape))
    first, _, _ = slice(start, end, step).indices(x.shape[dim])
    return e.slice(x, dim, first, out.shape[dim], step)


@rule("select")
def selected(e: Emitter, out: Out, x: Value, dim: int, index: int) -> Value:
    dim = positive(dim, len(x.shape))
    return e.reshape(e.slice(x, dim, positive(index, x.shape[dim]), 1), out.shape)


@rule("split", "split_with_sizes")
def split(e: Emitter, out: Out, x: Value, sizes: Any, dim: int = 0) -> tuple[Value, ...]:
    dim = positive(dim, len(x.shape))
    n = x.shape[dim]
    parts = [min(sizes, n - i) for i in range(0, n, sizes)] if isinstance(sizes, int) else list(sizes)
    return split_at(e, x, dim, parts)


def split_at(e: Emitter, x: Value, dim: int, sizes: Sequence[int]) -> tuple[Value, ...]:
    """``x`` in parts of these sizes along ``dim``."""
    starts = np.cumsum([0, *sizes]).tolist()
    return tuple(e.slice(x, dim, start, size) for start, size in zip(starts, sizes, strict=False))


@rule("unbind")
def unbound(e: Emitter, out: Out, x: Value, dim: int = 0) -> tuple[Value, ...]:
    dim = positive(dim, len(x.shape))
    shape = x.shape[:dim] + x.shape[dim + 1 :]
    return tuple(e.reshape(e.slice(x, dim, i, 1), shape) for i in range(x.shape[dim]))


@rule("cat")
def joined(e: Emitter, out: Out, tensors: Sequence[Value], dim: int = 0) -> Value:
    tensors = [x for x in tensors if x.shape != (0,)]
    return e.concat(tensors, positive(dim, len(out.shape)))


@rule("stack")
def stacked(e: Emitter, out: Out, tensors: Sequence[Value], dim: int = 0) -> Value:
    dim = positive(dim, len(out.shape))
    shape = (*out.shape[:dim], 1, *out.shape[dim + 1 :])
    return e.concat([e.reshape(x, shape) for x in tensors], dim)


@rule("roll")
def rolled(e: Emitter, out: Out, x: Value, shifts: Sequence[int], dims: Sequence[int] = ()) -> Value:
    """Without ``dims`` all elements in one row."""
    if not dims:
        flat = e.reshape(x, (prod(x.shape),))
        return e.reshape(rolled(e, out, flat, shifts, [0]), x.shape)
    for shift, dim in zip(shifts, (positive(d, len(x.shape)) for d in dims), strict=True):
        cut = -shift % x.shape[dim]
        x = e.concat([e.slice(x, dim, cut, x.shape[dim] - cut), e.slice(x, dim, 0, cut)], dim)
    return x


@rule("slice_scatter")
def slice_scattered(
    e: Emitter, out: Out, x: Value, part: Value, dim: int = 0, start: int | None = None, end: int | None = None,
    step: int = 1,
) -> Value:  # fmt: skip
    """``x`` with ``part`` in the place of x[start:end:step] of a dimension."""
    dim = positive(dim, len(x.shape))
    n, length = x.shape[dim], part.shape[dim]
    first, _, _ = slice(start, end, step).indices(n)
    if step == 1:
        return _between(e, x, part, dim, first)
    if n % step or length != n // step or first >= step:
        raise CaptureError(f"a write into every {step}th of {n} elements that leaves some out")
    outer, inner = x.shape[:dim], x.shape[dim + 1 :]
    blocks = e.reshape(x, (*outer, length, step, *inner))
    return e.reshape(_between(e, blocks, e.reshape(part, (*outer, length, 1, *inner)), dim + 1, first), x.shape)


@rule("select_scatter")
def select_scattered(e: Emitter, out: Out, x: Value, part: Value, dim: int, index: int) -> Value:
    dim = positive(dim, len(x.shape))
    row = e.reshape(part, (*x.shape[:dim], 1, *x.shape[dim + 1 :]))
    return _between(e, x, row, dim, positive(index, x.shape[dim]))


def _between(e: Emitter, x: Value, part: Value, dim: int, at: int) -> Value:
    """``part`` with what ``x`` has before and behind it."""
    behind = at + part.shape[dim]
    return e.concat([e.slice(x, dim, 0, at), part, e.slice(x, dim, behind, x.shape[dim] - behind)], dim)
