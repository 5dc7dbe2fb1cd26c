"""Products of matrices."""

from __future__ import annotations

from math import prod

import numpy as np

from ..emitter import Emitter, Value
from .base import Number, Out, rule


@rule("linear")
def linear(e: Emitter, out: Out, x: Value, weight: Value, bias: Value | None = None) -> Value:
    rows = x if len(x.shape) <= 4 else e.reshape(x, (prod(x.shape[:-1]), x.shape[-1]))
    product = e.mul_mat(weight, rows)
    return e.reshape(product if bias is None else e.binary("ADD", product, bias), out.shape)


@rule("matmul", "bmm", "mm", "mv", "dot", "vdot")
def matmul(e: Emitter, out: Out, a: Value, b: Value) -> Value:
    left = e.reshape(a, (1, *a.shape)) if len(a.shape) == 1 else a
    right = e.reshape(b, (*b.shape, 1)) if len(b.shape) == 1 else b
    batch = tuple(np.broadcast_shapes(left.shape[:-2], right.shape[:-2]))
    if len(batch) > 2:  # all batches in one
        left, right = (e.expand(v, (*batch, *v.shape[-2:])) for v in (left, right))
        left, right = (e.reshape(v, (prod(batch), *v.shape[-2:])) for v in (left, right))
        return e.reshape(matmul(e, out, left, right), out.shape)
    left = e.expand(left, (*batch, *left.shape[-2:]))
    return e.reshape(e.mul_mat(e.transpose(e.f32(right), -1, -2), left), out.shape)


@rule("addmm", "baddbmm")
def addmm(e: Emitter, out: Out, bias: Value, a: Value, b: Value, *, beta: Number = 1, alpha: Number = 1) -> Value:
    product = e.scale(matmul(e, out, a, b), alpha)
    return product if beta == 0 else e.binary("ADD", product, e.scale(bias, beta))
