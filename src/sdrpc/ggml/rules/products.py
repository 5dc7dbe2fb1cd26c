"""Matrix products."""

from __future__ import annotations

from math import prod

from ..params import MulMat, NoParams, Rotation
from ..tensor import Dims
from ..types import F32, I8
from .base import FLOATS, READABLE, Call, Op, Result, declared, fits, need, op, support, typed

MATRICES = 1 << 12
"""Matrices of which rows pick theirs. They are used one by one: models have hundreds, and millions would take hours."""

ROTATIONS = (1, 4, 16, 64, 256)
"""How many numbers of a row can be rotated together (ggml's CPU backend has no larger ones)."""

_I32, _F32 = frozenset({"I32"}), frozenset({"F32"})


def bytes_of_rows(k: int, rows: int) -> int:
    """How many bytes QUANTIZE_I8_CONVROT makes of ``rows`` of ``k`` numbers, filled up to whole fours of rows. Behind
    them lie the scales of the rows, in float32."""
    return -(-rows // 4) * 4 * k


def _quantized(k: int, rows: int) -> Dims:
    return k, -(-(bytes_of_rows(k, rows) + 4 * rows) // k), 1, 1


def _quantize_i8_convrot(call: Call[Rotation]) -> Result:
    (x,), group = call.src, call.params.group
    typed(x, _F32)
    _rotates(x.ne[0], group)
    return Result(I8, _quantized(x.ne[0], prod(x.ne[1:])))


def _rotates(k: int, group: int) -> None:
    support(group in ROTATIONS, "rotation of {} numbers", group)
    need(k > 0 and k % group == 0, "can't rotate rows of {} by {}", k, group)


def _mul_mat(call: Call[MulMat]) -> Result:
    a, b, scales, bias = call.src
    if a.type == I8 and scales is not None:
        return _mul_mat_i8(call)
    typed(a, READABLE)
    typed(b, READABLE)
    need(scales is None and bias is None, "scales or a bias for a matrix of type {}", a.type)
    x, y = a.ne, b.ne
    need(x[0] == y[0] and fits(x[2], y[2]) and fits(x[3], y[3]), "can't multiply {} and {}", x, y)
    return Result(F32, (x[1], y[1], y[2], y[3]))


def _mul_mat_i8(call: Call[MulMat]) -> Result:
    """A matrix [k, n], a scale and perhaps a bias for each of its rows, and rows of k numbers: in F32, or those that
    QUANTIZE_I8_CONVROT made of them. How many it made is known from the result alone."""
    a, b, scales, bias = call.src
    (k, n), group = a.ne[:2], call.params.group
    support(not call.params.kind, "weights packed as kind {}", call.params.kind)
    if group:
        _rotates(k, group)
    for each in (scales, bias):
        if each is not None:
            typed(each, _F32, "scales or bias")
            need(prod(each.ne) == n, "{} scales or biases for {} rows", prod(each.ne), n)
    need(a.ne[2:] == (1, 1) and b.ne[0] == k > 0, "can't multiply {} and {}", a.ne, b.ne)
    if b.type != I8:
        typed(b, _F32)
        return Result(F32, (n, *b.ne[1:]))
    ne = declared(call)
    need(b.ne == _quantized(k, prod(ne[1:])), "{} bytes are not those of {} rows", b.ne, prod(ne[1:]))
    return Result(F32, (n, *ne[1:]))


def _mul_mat_id(call: Call[MulMat]) -> Result:
    """Matrices [k, m, experts] and rows [k, 1 or used, tokens], by the numbers [used, tokens] of those to use."""
    a, b, ids = call.src
    typed(a, READABLE)
    typed(b, READABLE)
    typed(ids, _I32, "numbers of matrices")
    x, y, n = a.ne, b.ne, ids.ne
    need(
        x[0] == y[0] and x[3] == y[3] == 1 and n[1:] == (y[2], 1, 1) and fits(y[1], n[0]),
        "can't multiply {} and {} by {}", x, y, n,
    )  # fmt: skip
    support(x[2] <= MATRICES, "{} matrices", x[2])
    return Result(F32, (x[1], n[0], y[2], 1))


def _add_id(call: Call[NoParams]) -> Result:
    a, b, ids = call.src
    typed(a, FLOATS)
    typed(b, FLOATS)
    typed(ids, _I32, "numbers of rows")
    need(
        a.ne[0] == b.ne[0] and b.ne[2:] == (1, 1) and ids.ne == (a.ne[1], a.ne[2], 1, 1),
        "can't add rows {} of {} to {}", ids.ne, b.ne, a.ne,
    )  # fmt: skip
    return Result(a.type, a.ne)


def _out_prod(call: Call[NoParams]) -> Result:
    a, b = call.src
    typed(a, READABLE)
    typed(b, FLOATS)
    x, y = a.ne, b.ne
    need(x[1] == y[1] and fits(x[2], y[2]) and fits(x[3], y[3]), "can't multiply {} and {}", x, y)
    return Result(F32, (x[0], y[0], y[2], y[3]))


OPS: tuple[Op, ...] = (
    op("MUL_MAT", MulMat, _mul_mat, 2, 4, portable=True),
    op("MUL_MAT_ID", MulMat, _mul_mat_id, 3),
    op("ADD_ID", NoParams, _add_id, 3),
    op("OUT_PROD", NoParams, _out_prod, 2),
    op("QUANTIZE_I8_CONVROT", Rotation, _quantize_i8_convrot, 1),
)
