"""Matrix products."""

from __future__ import annotations

from ..types import F32
from .base import FLOATS, READABLE, Call, Result, Rule, need, support, typed

MATRICES = 1 << 12
"""Matrices of which rows pick theirs. They are used one by one: models have hundreds, and millions would take hours."""

_I32 = frozenset({"I32"})


def _mul_mat(call: Call) -> Result:
    a, b = call.src
    typed(a, READABLE)
    typed(b, READABLE)
    x, y = a.ne, b.ne
    need(x[0] == y[0] and not y[2] % x[2] and not y[3] % x[3], "can't multiply {} and {}", x, y)
    return Result(F32, (x[1], y[1], y[2], y[3]))


def _mul_mat_id(call: Call) -> Result:
    """Matrices [k, m, experts] and rows [k, 1 or used, tokens], by the numbers [used, tokens] of those to use."""
    a, b, ids = call.src
    typed(a, READABLE)
    typed(b, READABLE)
    typed(ids, _I32, "numbers of matrices")
    x, y, n = a.ne, b.ne, ids.ne
    need(
        x[0] == y[0] and x[3] == y[3] == 1 and n[1:] == (y[2], 1, 1) and not n[0] % y[1],
        "can't multiply {} and {} by {}", x, y, n,
    )  # fmt: skip
    support(x[2] <= MATRICES, "{} matrices", x[2])
    return Result(F32, (x[1], n[0], y[2], 1))


def _add_id(call: Call) -> Result:
    a, b, ids = call.src
    typed(a, FLOATS)
    typed(b, FLOATS)
    typed(ids, _I32, "numbers of rows")
    need(
        a.ne[0] == b.ne[0] and b.ne[2:] == (1, 1) and ids.ne == (a.ne[1], a.ne[2], 1, 1),
        "can't add rows {} of {} to {}", ids.ne, b.ne, a.ne,
    )  # fmt: skip
    return Result(a.type, a.ne)


def _out_prod(call: Call) -> Result:
    a, b = call.src
    typed(a, READABLE)
    typed(b, FLOATS)
    x, y = a.ne, b.ne
    need(x[1] == y[1] and not y[2] % x[2] and not y[3] % x[3], "can't multiply {} and {}", x, y)
    return Result(F32, (x[0], y[0], y[2], y[3]))


RULES: dict[str, Rule] = {
    "MUL_MAT": Rule(2, 2, _mul_mat), "MUL_MAT_ID": Rule(3, 3, _mul_mat_id), "ADD_ID": Rule(3, 3, _add_id),
    "OUT_PROD": Rule(2, 2, _out_prod),
}  # fmt: skip
