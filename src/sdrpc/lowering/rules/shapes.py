"""The same numbers under another name, in another shape or order, of another dtype, or several times."""

# ruff: noqa: ARG001  all rules are called alike, whether or not they need what they get

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from ..emitter import Emitter, Value
from .base import Operand, Out, filled, positive, rule
from .truth import not_zero


@rule("alias", "detach", "lift_fresh_copy")
def same(e: Emitter, out: Out, x: Value, *_: Any, **__: Any) -> Value:
    return x


@rule("clone", "_to_copy")
def converted(e: Emitter, out: Out, x: Value, *_: Any, **__: Any) -> Value:
    """All floats are F32, so that only what the numbers are can change."""
    if out.kind == x.kind or (x.kind == "b" and out.kind in "if") or (x.kind == "i" and out.kind == "f"):
        return Value(e.f32(x).tensor if out.kind == "f" else x.tensor, x.shape, out.kind, x.array)
    if out.kind == "b":
        return not_zero(e, x)
    return e.i32(x)


@rule("copy")
def copy(e: Emitter, out: Out, x: Value, source: Operand, *_: Any) -> Value:
    """What ``x.copy_(source)`` leaves in x: the source, in x's shape and dtype."""
    if not isinstance(source, Value):
        return filled(e, out, source)
    return e.expand(converted(e, Out(source.shape, out.kind), source), out.shape)


@rule("fill")
def fill(e: Emitter, out: Out, x: Value, number: Operand) -> Value:
    return copy(e, out, x, number)


@rule("zero")
def zero(e: Emitter, out: Out, x: Value) -> Value:
    return filled(e, out, 0)


@rule("view", "_unsafe_view", "unsqueeze", "squeeze")
def reshaped(e: Emitter, out: Out, x: Value, *_: Any, **__: Any) -> Value:
    return e.reshape(x, out.shape)


@rule("permute")
def permuted(e: Emitter, out: Out, x: Value, dims: Sequence[int]) -> Value:
    return e.permute(x, [positive(d, len(x.shape)) for d in dims])


@rule("transpose")
def transposed(e: Emitter, out: Out, x: Value, dim0: int, dim1: int) -> Value:
    return e.transpose(x, positive(dim0, len(x.shape)), positive(dim1, len(x.shape)))


@rule("t")
def matrix_transposed(e: Emitter, out: Out, x: Value) -> Value:
    return e.transpose(x, -1, -2) if len(x.shape) >= 2 else x


@rule("expand")
def expanded(e: Emitter, out: Out, x: Value, *_: Any, **__: Any) -> Value:
    return e.expand(x, out.shape)


@rule("repeat")
def repeated(e: Emitter, out: Out, x: Value, repeats: Sequence[int]) -> Value:
    """Each dimension n repeated r times is the dimension (r, n) of which r is expanded."""
    shape = (1,) * (len(repeats) - len(x.shape)) + x.shape
    for dim, times in enumerate(repeats):
        if times != 1:
            blocks = (prod(shape[:dim]), 1, prod(shape[dim:]))
            x = e.expand(e.reshape(x, blocks), (blocks[0], times, blocks[2]))
            shape = (*shape[:dim], shape[dim] * times, *shape[dim + 1 :])
    return e.reshape(x, shape)


@rule("flip")
def flipped(e: Emitter, out: Out, x: Value, dims: Sequence[int]) -> Value:
    for dim in (positive(d, len(x.shape)) for d in dims):
        x = e.concat([e.slice(x, dim, i, 1) for i in reversed(range(x.shape[dim]))], dim)
    return x
