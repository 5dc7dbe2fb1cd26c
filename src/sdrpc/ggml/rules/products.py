"""Matrix products."""

from __future__ import annotations

from ..types import F32
from .base import FLOATS, READABLE, Call, Result, Rule, need, typed


def _mul_mat(call: Call) -> Result:
    a, b = call.src
    typed(a, READABLE)
    typed(b, FLOATS)
    x, y = a.ne, b.ne
    need(x[0] == y[0] and not y[2] % x[2] and not y[3] % x[3], "can't multiply {} and {}", x, y)
    return Result(F32, (x[1], y[1], y[2], y[3]))


def _out_prod(call: Call) -> Result:
    a, b = call.src
    typed(a, READABLE)
    typed(b, FLOATS)
    x, y = a.ne, b.ne
    need(x[1] == y[1] and not y[2] % x[2] and not y[3] % x[3], "can't multiply {} and {}", x, y)
    return Result(F32, (x[0], y[0], y[2], y[3]))


RULES: dict[str, Rule] = {
    "MUL_MAT": Rule(2, 2, _mul_mat), "OUT_PROD": Rule(2, 2, _out_prod),
}  # fmt: skip
