"""Elements picked by number: tables, indices, and writes by index."""

# ruff: noqa: ARG001  all rules are called alike, whether or not they need what they get

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from ...errors import CaptureError
from ..emitter import Emitter, Shape, Value
from .base import Out, positive, rule

EXACT = 1 << 24
"""Integers are computed as F32, which has all of them up to here."""


@rule("embedding")
def embedded(e: Emitter, out: Out, weight: Value, indices: Value, *_: Any, **__: Any) -> Value:
    """Rows of a table [N, K] by indices of any shape."""
    rows = e.reshape(e.i32(indices), (prod(indices.shape),))
    picked = Value(e.node("GET_ROWS", weight.tensor, rows.tensor), (*rows.shape, out.shape[-1]))
    return e.reshape(picked, out.shape)


@rule("index_select")
def index_selected(e: Emitter, out: Out, x: Value, dim: int, index: Value) -> Value:
    return take(e, x, positive(dim, len(x.shape)), index)


def take(e: Emitter, x: Value, dim: int, index: Value) -> Value:
    """The elements ``index`` of dimension ``dim``, as rows of a matrix."""
    rank, count = len(x.shape), len(index.shape)
    order = [dim, *(d for d in range(rank) if d != dim)]
    moved = e.permute(e.f32(x), order)
    table = e.contiguous(e.reshape(moved, (x.shape[dim], prod(moved.shape[1:]))))
    rows = embedded(e, Out((*index.shape, table.shape[1]), "f"), table, wrapped(e, index, x.shape[dim]))
    result = e.reshape(rows, (*index.shape, *moved.shape[1:]))
    return e.permute(result, [*range(count, count + dim), *range(count), *range(count + dim, count + rank - 1)])


def wrapped(e: Emitter, index: Value, size: int) -> Value:
    """An index without negative numbers, where it is known."""
    if index.array is None or not (index.array < 0).any():
        return index
    return e.constant(np.where(index.array < 0, index.array + size, index.array), "i")


@rule("index")
def indexed(e: Emitter, out: Out, x: Value, indices: Sequence[Value | None]) -> Value:
    """Several indices are one index into their dimensions merged. Indices that are apart come first, as in torch."""
    x, first, given, sizes = _adjacent(e, x, indices)
    merged = e.reshape(x, (*x.shape[:first], prod(sizes), *x.shape[first + len(given) :]))
    return take(e, merged, first, _flat(e, given, sizes))


@rule("index_put")
def index_put(
    e: Emitter, out: Out, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False
) -> Value:
    """Known places get ``values``: rows are picked from x and the values, which lie one below the other."""
    at = [i for i, index in enumerate(indices) if index is not None]
    x, first, given, sizes = _adjacent(e, x, indices)
    if accumulate or any(index.array is None for index in given) or at[0] != first:
        raise CaptureError("a write by index that adds up, whose places are inputs, or in dimensions that are apart")
    places = _array(_flat(e, given, sizes))
    before, inner = x.shape[:first], x.shape[first + len(given) :]
    picked = e.expand(e.f32(values), (*before, *places.shape, *inner))
    rows = _to_front(e, e.f32(x), first, len(given))
    written = _to_front(e, picked, first, places.ndim)
    width = prod(before) * prod(inner)
    table = e.concat([e.reshape(rows, (prod(sizes), width)), e.reshape(written, (places.size, width))], 0)
    source = np.arange(prod(sizes))
    source[places.reshape(-1)] = prod(sizes) + np.arange(places.size)
    result = e.reshape(take(e, table, 0, e.constant(source, "i")), (*sizes, *before, *inner))
    count, behind = len(sizes), len(sizes) + first
    order = [*range(count, behind), *range(count), *range(behind, len(x.shape))]
    return e.permute(result, order)


def _to_front(e: Emitter, x: Value, first: int, count: int) -> Value:
    """``count`` dimensions from ``first`` on come first."""
    rank = len(x.shape)
    return e.permute(x, [*range(first, first + count), *range(first), *range(first + count, rank)])


def _adjacent(e: Emitter, x: Value, indices: Sequence[Value | None]) -> tuple[Value, int, list[Value], tuple[int, ...]]:
    """``x`` with its indexed dimensions one after the other; the first of them, their indices and their sizes."""
    at = [i for i, index in enumerate(indices) if index is not None]
    given = [index for index in indices if index is not None]
    if at != list(range(at[0], at[0] + len(at))):
        x = e.permute(x, [*at, *(d for d in range(len(x.shape)) if d not in at)])
        at = list(range(len(at)))
    return x, at[0], given, x.shape[at[0] : at[0] + len(at)]


def _flat(e: Emitter, indices: Sequence[Value], sizes: Shape) -> Value:
    """Indices of several dimensions as one index into the dimensions merged."""
    if len(indices) == 1:
        return wrapped(e, indices[0], sizes[0])
    shape = tuple(np.broadcast_shapes(*(index.shape for index in indices)))
    if all(index.array is not None for index in indices):
        arrays = [np.broadcast_to(_array(wrapped(e, i, n)), shape) for i, n in zip(indices, sizes, strict=True)]
        return e.constant(np.ravel_multi_index(arrays, sizes).astype(np.int64), "i")
    if prod(sizes) > EXACT:
        raise CaptureError(f"an index of {len(sizes)} inputs into {prod(sizes):,} elements, more than {EXACT:,}")
    flat = e.f32(indices[0])
    for index, size in zip(indices[1:], sizes[1:], strict=True):
        flat = e.binary("ADD", e.scale(flat, size), e.f32(index))
    return Value(e.expand(flat, shape).tensor, shape, "i")


def _array(value: Value) -> np.ndarray:
    """A known value's integers."""
    if value.array is None:
        raise CaptureError("places that are inputs")
    return value.array.astype(np.int64)
