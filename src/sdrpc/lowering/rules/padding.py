"""Tensors made larger at their edges."""

# ruff: noqa: ARG001  all rules are called alike, whether or not they need what they get

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...ggml.params import Pad
from ..emitter import Emitter, Value
from .base import Number, Out, rule

Edge = Callable[[Value, int, int, bool], Value]
"""What is joined to a value: along a dimension, so many elements, behind it (or before)."""


@rule("constant_pad_nd")
def padded(e: Emitter, out: Out, x: Value, pad: Sequence[int], value: Number = 0) -> Value:
    """PAD where zeros go behind: older servers pad at the end only. Else what is missing is joined."""
    behind_only = not any(pad[::2]) and min(pad) >= 0
    if behind_only and not value and len(x.shape) <= 4:
        widths = [0] * 8
        widths[: len(pad)] = pad
        return Value(e.node("PAD", e.contiguous(e.f32(x)).tensor, params=Pad(*widths)), out.shape, x.kind)

    def constant(x: Value, dim: int, n: int, behind: bool) -> Value:
        shape = (*x.shape[:dim], n, *x.shape[dim + 1 :])
        return e.constant(np.broadcast_to(np.float32(value), shape), x.kind, x.tensor.type)

    return _grown(e, x, pad, constant)


@rule("replication_pad1d", "replication_pad2d", "replication_pad3d")
def replicated(e: Emitter, out: Out, x: Value, padding: Sequence[int]) -> Value:
    def edge(x: Value, dim: int, n: int, behind: bool) -> Value:
        last = e.slice(x, dim, x.shape[dim] - 1 if behind else 0, 1)
        return e.expand(last, (*x.shape[:dim], n, *x.shape[dim + 1 :]))

    return _grown(e, x, padding, edge)


@rule("reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
def reflected(e: Emitter, out: Out, x: Value, padding: Sequence[int]) -> Value:
    def mirrored(x: Value, dim: int, n: int, behind: bool) -> Value:
        last = x.shape[dim] - 1
        places = range(last - 1, last - 1 - n, -1) if behind else range(n, 0, -1)
        return e.concat([e.slice(x, dim, i, 1) for i in places], dim)

    return _grown(e, x, padding, mirrored)


def _grown(e: Emitter, x: Value, padding: Sequence[int], edge: Edge) -> Value:
    """``padding``: (before, behind) of the last dimension, then of the one before it …; negative numbers cut off."""
    for i, (before, behind) in enumerate(zip(padding[::2], padding[1::2], strict=True)):
        dim = len(x.shape) - 1 - i
        x = e.slice(x, dim, max(-before, 0), x.shape[dim] - max(-before, 0) - max(-behind, 0))
        parts = [edge(x, dim, n, after) for n, after in ((before, False), (behind, True)) if n > 0]
        parts.insert(1 if before > 0 else 0, x)
        x = e.concat(parts, dim) if len(parts) > 1 else x
    return x
