"""Rows and reductions: sums, norms, orders."""

from __future__ import annotations

from ..types import F32, I32
from .base import Call, Result, Rule, float_like, need, support


def _eps(call: Call) -> Result:
    need(call.params.eps >= 0, "eps {}", call.params.eps)
    return float_like(call)


def _group_norm(call: Call) -> Result:
    groups, channels = call.params.groups, call.src[0].ne[2]
    need(0 < groups <= channels, "{} groups of {} channels", groups, channels)
    support(channels % groups == 0, "{} channels in {} unlike groups", channels, groups)
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


RULES: dict[str, Rule] = {
    "SUM": Rule(1, 1, _sum), "SUM_ROWS": Rule(1, 1, _sum_rows), "MEAN": Rule(1, 1, _mean),
    "ARGMAX": Rule(1, 1, _argmax), "ARGSORT": Rule(1, 1, _argsort), "CUMSUM": Rule(1, 1, float_like),
    "NORM": Rule(1, 1, _eps), "RMS_NORM": Rule(1, 1, _eps), "L2_NORM": Rule(1, 1, _eps),
    "GROUP_NORM": Rule(1, 1, _group_norm),
}  # fmt: skip
