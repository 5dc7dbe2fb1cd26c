"""Rows and reductions: sums, norms, orders."""

from __future__ import annotations

from ..types import F32, I32, I64
from .base import Call, Result, Rule, declared, float_like, need, typed


def _eps(call: Call) -> Result:
    need(call.params.eps >= 0, "eps {}", call.params.eps)
    return float_like(call)


def _group_norm(call: Call) -> Result:
    need(call.params.groups > 0, "{} groups", call.params.groups)
    return _eps(call)


def _sum(call: Call) -> Result:
    return Result(float_like(call).type, (1, 1, 1, 1))


def _sum_rows(call: Call) -> Result:
    like = float_like(call)
    return Result(like.type, (1, *like.ne[1:]))


def _mean(call: Call) -> Result:
    return Result(F32, (1, *float_like(call).ne[1:]))


def _argmax(call: Call) -> Result:
    ne = float_like(call).ne
    need(ne[2] == ne[3] == 1, "{} is no matrix", ne)
    return Result(I32, (ne[1], 1, 1, 1))


def _argsort(call: Call) -> Result:
    need(call.params.order in (0, 1), "order {}", call.params.order)
    return Result(I32, float_like(call).ne)


def _top_k(call: Call) -> Result:
    ne, k = float_like(call).ne, declared(call)[0]
    need(k <= ne[0], "the {} largest of {}", k, ne[0])
    return Result(I32, (k, *ne[1:]))


def _count_equal(call: Call) -> Result:
    a, b = call.src
    typed(a, frozenset({"I32"}))
    typed(b, frozenset({"I32"}))
    need(a.ne == b.ne, "shapes {} and {}", a.ne, b.ne)
    return Result(I64, (1, 1, 1, 1))


def _tri(call: Call) -> Result:
    like = float_like(call)
    need(0 <= call.params.part < 4, "part {}", call.params.part)
    need(like.ne[0] == like.ne[1], "{} is not square", like.ne)
    return like


def _diag(call: Call) -> Result:
    like = float_like(call)
    n, rows, *outer = like.ne
    need(rows == 1, "{} rows for a diagonal", rows)
    return Result(like.type, (n, n, outer[0], outer[1]))


RULES: dict[str, Rule] = {
    "SUM": Rule(1, 1, _sum), "SUM_ROWS": Rule(1, 1, _sum_rows), "MEAN": Rule(1, 1, _mean),
    "ARGMAX": Rule(1, 1, _argmax), "ARGSORT": Rule(1, 1, _argsort), "CUMSUM": Rule(1, 1, float_like),
    "NORM": Rule(1, 1, _eps), "RMS_NORM": Rule(1, 1, _eps), "L2_NORM": Rule(1, 1, _eps),
    "GROUP_NORM": Rule(1, 1, _group_norm), "TOP_K": Rule(1, 1, _top_k), "COUNT_EQUAL": Rule(2, 2, _count_equal),
    "TRI": Rule(1, 1, _tri), "DIAG": Rule(1, 1, _diag),
}  # fmt: skip
