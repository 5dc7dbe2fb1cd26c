"""Many numbers become one: sums, means, norms, and running sums."""

# ruff: noqa: ARG001  all rules are called alike, whether or not they need what they get

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from ...errors import CaptureError
from ...ggml.params import SoftMax
from ..emitter import Emitter, Kind, Value
from .base import RULES, Number, Out, Rule, dims, positive, rule
from .truth import LARGEST, boolean, is_positive, negated

LONGEST_RUNNING_SUM = 8192
"""Elements of a dimension that is summed up step by step: that is a product with a matrix of as many rows."""


def _last(e: Emitter, x: Value, reduced: Sequence[int]) -> Value:
    """``x`` with the dimensions ``reduced`` merged into a last one and the others into a first."""
    kept = [d for d in range(len(x.shape)) if d not in reduced]
    moved = e.permute(e.f32(x), [*kept, *reduced])
    return e.contiguous(e.reshape(moved, (prod(x.shape[d] for d in kept), prod(x.shape[d] for d in reduced))))


def _reduce(op: str) -> Rule:
    def reduced(
        e: Emitter, out: Out, x: Value, dim: Any = None, keepdim: bool = False, *, dtype: Kind | None = None
    ) -> Value:
        rows = _last(e, x, dims(dim, len(x.shape)))
        return e.reshape(Value(e.node(op, rows.tensor), (rows.shape[0], 1)), out.shape)

    return reduced


RULES.update({"mean": _reduce("MEAN"), "sum": _reduce("SUM_ROWS")})


@rule("any")
def any_of(e: Emitter, out: Out, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return is_positive(e, RULES["sum"](e, out, boolean(e, x), dim, keepdim))


@rule("all")
def all_of(e: Emitter, out: Out, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return negated(e, is_positive(e, RULES["sum"](e, out, negated(e, boolean(e, x)), dim, keepdim)))


@rule("linalg_vector_norm")
def vector_norm(
    e: Emitter, out: Out, x: Value, ord: Number = 2, dim: Any = None, keepdim: bool = False,
    *, dtype: Kind | None = None,
) -> Value:  # fmt: skip
    if ord != 2:
        raise CaptureError(f"the norm of order {ord}")
    return e.unary("SQRT", RULES["sum"](e, out, e.unary("SQR", x), dim, keepdim))


@rule("argmax")
def argmax(e: Emitter, out: Out, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    """The first of equal numbers, as torch's. ggml's CPU backend gives the last one, others any: integers and truth
    values, which are often equal, are set apart by their place (exact while number times length is below 2^24)."""
    rows = _last(e, x, dims(dim, len(x.shape)))
    if x.kind != "f":
        length = rows.shape[1]
        later = e.constant(np.arange(length, dtype=np.float32))
        rows = e.binary("SUB", e.scale(e.f32(rows), length), later)
    return e.reshape(Value(e.node("ARGMAX", rows.tensor), (rows.shape[0],), "i"), out.shape)


@rule("var")
def var(
    e: Emitter, out: Out, x: Value, dim: Any = None, unbiased: bool = True, keepdim: bool = False,
    *, correction: Number | None = None,
) -> Value:  # fmt: skip
    rows = _last(e, x, dims(dim, len(x.shape)))
    n = rows.shape[1]
    mean = Value(e.node("MEAN", rows.tensor), (rows.shape[0], 1))
    squares = e.unary("SQR", e.binary("SUB", rows, mean))
    less = (1 if unbiased else 0) if correction is None else correction
    total = Value(e.node("SUM_ROWS", squares.tensor), (rows.shape[0], 1))
    return e.reshape(e.scale(total, 1 / (n - less)), out.shape)


@rule("_softmax")
def softmax(e: Emitter, out: Out, x: Value, dim: int, *_: Any) -> Value:
    last, dim = len(x.shape) - 1, positive(dim, len(x.shape))
    rows = e.contiguous(e.f32(e.transpose(x, dim, last)))
    return e.transpose(Value(e.node("SOFT_MAX", rows.tensor, params=SoftMax(1.0)), rows.shape), dim, last)


@rule("_safe_softmax")
def safe_softmax(e: Emitter, out: Out, x: Value, dim: int, *_: Any) -> Value:
    """Zeros where all of a row is minus infinity."""
    finite = RULES["clamp"](e, Out(x.shape, "f"), x, -LARGEST, LARGEST)
    there = is_positive(e, e.scale(finite, 1, LARGEST / 2))
    seen = RULES["any"](e, Out((*x.shape[:dim], 1, *x.shape[dim:][1:]), "b"), there, dim, True)
    return e.binary("MUL", softmax(e, out, finite, dim), seen)


@rule("cumsum")
def cumsum(e: Emitter, out: Out, x: Value, dim: int, *, dtype: Kind | None = None) -> Value:
    """A product with a triangle of ones."""
    last, dim = len(x.shape) - 1, positive(dim, len(x.shape))
    n = x.shape[dim]
    if n > LONGEST_RUNNING_SUM:
        raise CaptureError(f"a running sum over {n:,} elements, more than {LONGEST_RUNNING_SUM:,}")
    rows = e.transpose(e.f32(x), dim, last)
    flat = e.reshape(rows, (prod(rows.shape[:-1]), n))
    sums = e.reshape(e.mul_mat(e.constant(np.tril(np.ones((n, n), np.float32))), flat), rows.shape)
    result = e.transpose(sums, dim, last)
    return Value(result.tensor, result.shape, out.kind)
