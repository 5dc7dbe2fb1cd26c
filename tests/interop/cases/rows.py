"""Rows and reductions: sums, norms, orders."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from tests.interop.cases.base import (
    ANY_VIEW,
    FLOATS,
    ODD,
    PACKED,
    ROWS_DENSE,
    Builder,
    Case,
    draws,
    shapes,
    sweep,
)

SHAPES = (ODD, (1, 4, 3, 2), (1025, 3, 2, 1), (5, 1, 1, 1))
ROUNDED = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def _rounded(**how: Any) -> str:
    return ROUNDED[how["type"]]


def _reduced(b: Builder, op: str, ne: tuple[int, ...], view: str, type: str = "F32", low: float = -1.0) -> Any:
    return getattr(b, op)(b.operand(*ne, view=view, type=type, low=low))


def _sums() -> Iterator[Case]:
    yield from sweep("SUM", _reduced, _rounded, op=("sum",), ne=SHAPES, view=ROWS_DENSE, type=FLOATS, low=(0.0,))
    for op in ("sum_rows", "mean", "cumsum"):
        yield from sweep(op.upper(), _reduced, op=(op,), ne=SHAPES, view=ROWS_DENSE)


def _norm(
    b: Builder, op: str, ne: tuple[int, ...], eps: float, view: str, high: float = 1.0, inplace: bool = False
) -> Any:
    return getattr(b, f"{op}_inplace" if inplace else op)(b.operand(*ne, view=view, low=high - 2, high=high), eps)


def _rms_norm_mul(b: Builder, ne: tuple[int, ...], by: tuple[int, ...], first: bool) -> Any:
    """ggml's CPU computes these two at once."""
    norm, weight = b.rms_norm(b.x(*ne), 1e-5), b.x(*by)
    return b.mul(norm, weight) if first else b.mul(b.x(*ne), norm)


def _group_norm(b: Builder, ne: tuple[int, ...], groups: int, view: str, inplace: bool) -> Any:
    return (b.group_norm_inplace if inplace else b.group_norm)(b.operand(*ne, view=view), groups, 1e-6)


def _norms() -> Iterator[Case]:
    for op in ("norm", "rms_norm", "l2_norm"):
        views, widths = (ROWS_DENSE if op == "rms_norm" else ANY_VIEW), ((64, 5, 4, 3), (1025, 3, 2, 1), (7, 5, 1, 3))
        eps = (0.0, 1e-6, 0.1)
        yield from sweep(op.upper(), _norm, op=(op,), ne=widths, eps=eps, view=views)
        yield from sweep(op.upper(), _norm, op=(op,), ne=widths[:1], eps=eps, view=("dense", "part"), inplace=(True,))
        # far from zero most digits go with the mean
        yield from sweep(op.upper(), _norm, "f16", op=(op,), ne=((320, 4),), eps=(1e-5,), view=("dense",), high=(32.0,))
    by = ((64, 1, 1, 1), (64, 5, 1, 1), (64, 5, 4, 3), (64, 1, 4, 1))
    yield from sweep("RMS_NORM", _rms_norm_mul, ne=((64, 5, 4, 3),), by=by, first=(True, False))
    shapes = ((8, 8, 64, 1), (9, 7, 32, 2), (4, 4, 6, 3), (5, 3, 12, 1), (3, 1, 7, 2), (1, 1, 4, 1))
    views = ("dense", "offset", "part", "strided", "0132")
    yield from sweep(
        "GROUP_NORM",
        _group_norm,
        ne=shapes,
        groups=(1, 2, 3, 4, 5, 12, 32, 40),
        view=views,
        inplace=(False, True),
        most=120,
    )


def _sorted(b: Builder, order: int, ne: tuple[int, ...], view: str) -> Any:
    return b.argsort(b.operand(*ne, view=view, make=b.distinct), order)


def _top_k(b: Builder, k: int, ne: tuple[int, ...], view: str) -> Any:
    """Which places are picked, as rows of ones among zeros: in what order is not said."""
    count = int(np.prod(ne[1:]))
    picked = b.reshape_4d(b.top_k(b.operand(*ne, view=view, make=b.distinct), k), k, count, 1, 1)
    return b.set_rows(b.put("F32", np.zeros((count, ne[0], 1))), b.put("F32", np.ones((count, k, 1))), picked)


def _largest(b: Builder, ne: tuple[int, ...], view: str) -> Any:
    return b.argmax(b.operand(*ne, view=view, make=b.distinct))


def _orders() -> Iterator[Case]:
    yield from sweep(
        "ARGMAX",
        _largest,
        "exact",
        ne=((100, 12), (1, 9), (17, 1), (1025, 3)),
        view=("dense", "offset", "strided", "part"),
    )
    shapes = ((60, 7, 3, 2), (17, 3, 1, 1), (1, 4, 2, 1), (1025, 2, 1, 1))
    yield from sweep("ARGSORT", _sorted, "exact", order=(0, 1), ne=shapes, view=PACKED)
    yield from sweep(
        "TOP_K", _top_k, "exact", lambda k, ne, **_: k <= ne[0], k=(1, 2, 5, 17, 60), ne=shapes[:3], view=PACKED
    )


def _equal(b: Builder, ne: tuple[int, ...], view: str, other: str) -> Any:
    """Matrices: of more dimensions ggml's CPU counts other rows."""
    x, y = (b.operand(*ne, view=v, make=partial(b.indices, 3)) for v in (view, other))
    return b.count_equal(x, y)


def _triangle(b: Builder, part: int, ne: tuple[int, ...], view: str) -> Any:
    return b.tri(b.operand(*ne, view=view), part)


def _diagonal(b: Builder, ne: tuple[int, ...], view: str) -> Any:
    return b.diag(b.operand(*ne, view=view))


def _squares() -> Iterator[Case]:
    views = ("dense", "offset", "strided", "part", "1023")
    yield from sweep("COUNT_EQUAL", _equal, "exact", ne=((100, 12), (1, 9), (17, 1)), view=views, other=views)
    yield from sweep(
        "TRI",
        _triangle,
        "exact",
        part=range(4),
        ne=((8, 8, 3, 2), (33, 33), (1, 1, 5)),
        view=("dense", "offset"),
    )
    yield from sweep(
        "DIAG",
        _diagonal,
        "exact",
        ne=((5, 1, 3, 2), (64, 1), (1, 1, 1, 4)),
        view=ROWS_DENSE,
    )


CASES = [*_sums(), *_norms(), *_orders(), *_squares()]


def _square(rng: np.random.Generator) -> tuple[int, ...]:
    n = int(rng.integers(1, 20))
    return (n, n, *shapes(2)(rng))


def _line(rng: np.random.Generator) -> tuple[int, ...]:
    n, *outer = shapes(3)(rng)
    return (n, 1, *outer)


DRAWN = {
    "MEAN": draws(_reduced, op=("mean",), ne=shapes(), view=ROWS_DENSE),
    "ARGMAX": draws(_largest, "exact", ne=shapes(2), view=("dense", "offset", "strided", "part")),
    "ARGSORT": draws(_sorted, "exact", order=(0, 1), ne=shapes(), view=PACKED),
    "TOP_K": draws(_top_k, "exact", lambda k, ne, **_: k <= ne[0], k=range(1, 34), ne=shapes(), view=PACKED),
    "COUNT_EQUAL": draws(
        _equal, "exact", ne=shapes(2), view=("dense", "offset", "strided", "part", "1023"),
        other=("dense", "offset", "strided", "part", "1023"),
    ),
    "TRI": draws(_triangle, "exact", part=range(4), ne=_square, view=("dense", "offset")),
    "DIAG": draws(_diagonal, "exact", ne=_line, view=ROWS_DENSE),
}  # fmt: skip
