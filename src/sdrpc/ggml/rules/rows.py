"""Rows and reductions: sums, norms, orders."""

from __future__ import annotations

from ..params import ArgSort, Eps, GroupNorm, NoParams, Tri
from ..types import F32, I32, I64
from .base import Call, Op, Result, declared, float_like, need, op, typed


def _eps(call: Call[Eps | GroupNorm]) -> Result:
    need(call.params.eps >= 0, "eps {}", call.params.eps)
    return float_like(call)


def _group_norm(call: Call[GroupNorm]) -> Result:
    need(call.params.groups > 0, "{} groups", call.params.groups)
    return _eps(call)


def _sum(call: Call[NoParams]) -> Result:
    return Result(float_like(call).type, (1, 1, 1, 1))


def _sum_rows(call: Call[NoParams]) -> Result:
    like = float_like(call)
    return Result(like.type, (1, *like.ne[1:]))


def _mean(call: Call[NoParams]) -> Result:
    return Result(F32, (1, *float_like(call).ne[1:]))


def _argmax(call: Call[NoParams]) -> Result:
    ne = float_like(call).ne
    need(ne[2] == ne[3] == 1, "{} is no matrix", ne)
    return Result(I32, (ne[1], 1, 1, 1))


def _argsort(call: Call[ArgSort]) -> Result:
    need(call.params.order in (0, 1), "order {}", call.params.order)
    return Result(I32, float_like(call).ne)


def _top_k(call: Call[NoParams]) -> Result:
    ne, k = float_like(call).ne, declared(call)[0]
    need(k <= ne[0], "the {} largest of {}", k, ne[0])
    return Result(I32, (k, *ne[1:]))


def _count_equal(call: Call[NoParams]) -> Result:
    a, b = call.src
    typed(a, frozenset({"I32"}))
    typed(b, frozenset({"I32"}))
    need(a.ne == b.ne, "shapes {} and {}", a.ne, b.ne)
    return Result(I64, (1, 1, 1, 1))


def _tri(call: Call[Tri]) -> Result:
    like = float_like(call)
    need(0 <= call.params.part < 4, "part {}", call.params.part)
    need(like.ne[0] == like.ne[1], "{} is not square", like.ne)
    return like


def _diag(call: Call[NoParams]) -> Result:
    like = float_like(call)
    n, rows, *outer = like.ne
    need(rows == 1, "{} rows for a diagonal", rows)
    return Result(like.type, (n, n, outer[0], outer[1]))


OPS: tuple[Op, ...] = (
    op("SUM", NoParams, _sum, 1),
    op("SUM_ROWS", NoParams, _sum_rows, 1, portable=True),
    op("MEAN", NoParams, _mean, 1, portable=True),
    op("ARGMAX", NoParams, _argmax, 1, portable=True),
    op("ARGSORT", ArgSort, _argsort, 1),
    op("CUMSUM", NoParams, float_like, 1),
    op("NORM", Eps, _eps, 1, portable=True),
    op("RMS_NORM", Eps, _eps, 1, portable=True),
    op("L2_NORM", Eps, _eps, 1),
    op("GROUP_NORM", GroupNorm, _group_norm, 1, portable=True),
    op("TOP_K", NoParams, _top_k, 1),
    op("COUNT_EQUAL", NoParams, _count_equal, 2),
    op("TRI", Tri, _tri, 1),
    op("DIAG", NoParams, _diag, 1),
)
