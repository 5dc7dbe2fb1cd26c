"""Rows and reductions: sums, norms, orders."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from tests.interop.cases.base import ODD, SMALL, Case, shape


def _rows() -> Iterator[Case]:
    for op in ("norm", "rms_norm", "l2_norm"):
        for width, eps in itertools.product((64, 1025), (0.0, 1e-6, 0.1)):
            yield Case(
                op.upper(), f"{width}-eps{eps}", lambda b, c=op, w=width, e=eps: getattr(b, c)(b.x(w, 5, 4, 3), e)
            )
        yield Case(op.upper(), "view", lambda b, c=op: getattr(b, c)(b.part(64, 5, 4, 3), 1e-5))
        yield Case(
            op.upper(), "permuted", lambda b, c=op: getattr(b, c)(b.shuffled(64, 5, 4, 3, axes=(0, 2, 1, 3)), 1e-5)
        )
        yield Case(op.upper(), "offset", lambda b, c=op: getattr(b, c)(b.x(320, 4, low=30, high=31), 1e-5), "f16")
        yield Case(op.upper(), "inplace", lambda b, c=op: getattr(b, f"{c}_inplace")(b.x(*ODD), 1e-5))
    for ne, groups in (((8, 8, 64, 1), 32), ((9, 7, 32, 2), 4), ((4, 4, 6, 3), 1), ((5, 3, 12, 1), 12)):
        yield Case("GROUP_NORM", f"{shape(*ne)}-{groups}", lambda b, n=ne, g=groups: b.group_norm(b.x(*n), g, 1e-6))
    yield Case("GROUP_NORM", "inplace", lambda b: b.group_norm_inplace(b.x(8, 8, 64, 2), 32, 1e-5))
    yield Case("SUM", "F32", lambda b: b.sum(b.x(*ODD)))
    yield Case("SUM", "F16", lambda b: b.sum(b.x(*SMALL, type="F16", low=0)), "f16")
    for op in ("sum_rows", "mean", "cumsum"):
        yield Case(op.upper(), "F32", lambda b, c=op: getattr(b, c)(b.x(*ODD)))
        yield Case(op.upper(), "one", lambda b, c=op: getattr(b, c)(b.x(1, 4, 3, 2)))
        yield Case(op.upper(), "view", lambda b, c=op: getattr(b, c)(b.part(*ODD)))
    yield Case("SUM_ROWS", "permuted", lambda b: b.sum_rows(b.shuffled(*ODD, axes=(0, 3, 2, 1))))
    yield Case("ARGMAX", "F32", lambda b: b.argmax(b.distinct(100, 12)), "exact")
    yield Case("ARGMAX", "one", lambda b: b.argmax(b.distinct(1, 9)), "exact")
    for order in (0, 1):
        yield Case("ARGSORT", f"order{order}", lambda b, o=order: b.argsort(b.distinct(60, 7, 3, 2), o), "exact")
        yield Case("ARGSORT", f"odd-order{order}", lambda b, o=order: b.argsort(b.distinct(17, 3), o), "exact")
    yield Case("DIAG_MASK_INF", "past0", lambda b: b.diag_mask_inf(b.x(9, 9, 3, 2), 0))
    yield Case("DIAG_MASK_INF", "past5", lambda b: b.diag_mask_inf(b.x(12, 7, 2), 5))
    yield Case("DIAG_MASK_INF", "inplace", lambda b: b.diag_mask_inf_inplace(b.x(12, 12), 0))
    yield Case("DIAG_MASK_ZERO", "past2", lambda b: b.diag_mask_zero(b.x(12, 7, 2), 2))
    yield Case("DIAG_MASK_ZERO", "inplace", lambda b: b.diag_mask_zero_inplace(b.x(9, 9), 0))


CASES = [*_rows()]
