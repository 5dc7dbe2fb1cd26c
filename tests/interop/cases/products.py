"""Matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.interop.cases.base import FLOATS, ROWS_DENSE, Builder, Case, draws, several, sweep
from tests.support import ggml

Shape = tuple[int, ...]

WEIGHTS = (
    *FLOATS, "Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4", "Q2_K", "Q3_K",
    "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "TQ1_0",
    "TQ2_0",
)  # fmt: skip
"""Types that ggml's CPU backend has a product for."""
PAIRS = (
    ("F16", "F16"), ("BF16", "BF16"), ("F32", "BF16"), ("Q4_0", "Q8_0"), ("Q8_0", "Q8_0"), ("IQ4_NL", "Q8_0"),
    ("Q4_1", "Q8_1"), ("Q5_1", "Q8_1"), ("Q5_K", "Q8_K"), ("IQ4_XS", "Q8_K"),
)  # fmt: skip
"""Types of both operands, where the second one is what ggml would make of it."""
DESCENDING = 1  # ggml_sort_order
BOUNDS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def _bound(*, type: str = "F32", other: str = "F32", **_: Any) -> str:
    """By what ggml makes of the second operand: the first one's type, or 8 bits."""
    return BOUNDS.get(type, "quantized")


# MUL_MAT


def _mul_mat(
    b: Builder, *, kmn: Shape, batch: Shape = (1, 1), repeat: Shape = (1, 1), type: str = "F32", other: str = "F32",
    view: str = "dense", second: str = "dense", prec: bool = False,
) -> Any:  # fmt: skip
    """[k, m, *batch] by [k, n, *batch · repeat]."""
    k, m, n = kmn
    x = b.operand(k, m, *batch, view=view, type=type)
    within = other in ("Q8_1", "Q8_K")  # types that ggml makes while it computes only
    y = b.operand(k, n, batch[0] * repeat[0], batch[1] * repeat[1], view=second, type="F32" if within else other)
    if within:
        y = b.cast(y, ggml.TYPES[other])
    product = b.mul_mat(x, y)
    return b.prec_f32(product) if prec else product


def _mul_mats() -> Iterator[Case]:
    sizes = ((256, 16, 1), (512, 33, 9), (256, 7, 5), (768, 4, 33))
    yield from sweep(
        "MUL_MAT", _mul_mat, _bound, most=420, type=WEIGHTS, kmn=sizes, batch=((1, 1), (3, 2), (2, 1)),
        repeat=((1, 1), (2, 3), (1, 2)), view=("dense", "part", "strided", "offset"), second=("dense", "0213", "part"),
    )  # fmt: skip
    yield from sweep(
        "MUL_MAT", _mul_mat, _bound, most=240, type=FLOATS,
        kmn=((32, 6, 5), (33, 5, 3), (77, 1, 2), (1, 4, 3), (130, 9, 1)), batch=((1, 1), (4, 2), (1, 3)),
        repeat=((1, 1), (3, 1), (2, 2)), view=ROWS_DENSE, second=ROWS_DENSE,
        prec=(False, True),
    )  # fmt: skip
    for pair in PAIRS:
        yield from sweep(
            "MUL_MAT", _mul_mat, _bound, type=pair[:1], other=pair[1:], kmn=((256, 7, 5), (512, 3, 1)),
            batch=((1, 1), (2, 3)), repeat=((1, 1), (2, 1)), second=("dense", "0213"),
        )  # fmt: skip


# MUL_MAT_ID, ADD_ID


def _mul_mat_id(
    b: Builder, *, kmn: Shape, used: int, type: str = "F32", experts: int = 4, shared: bool = False,
    view: str = "dense", second: str = "dense", routed: bool = False,
) -> Any:  # fmt: skip
    """``shared``: all matrices of a token get the same row; ``routed``: those are used that score best."""
    k, m, n = kmn
    x = b.operand(k, m, experts, view=view, type=type)
    y = b.operand(k, 1 if shared else used, n, view=second)
    if not routed:
        return b.mul_mat_id(x, y, b.indices(experts, used, n, unique=True))
    best = b.argsort(b.distinct(experts, n), DESCENDING)
    nb = best.contents.nb
    return b.mul_mat_id(x, y, b.view_4d(best, used, n, 1, 1, nb[1], nb[2], nb[3], 0))


def _mul_mat_ids() -> Iterator[Case]:
    yield from sweep(
        "MUL_MAT_ID", _mul_mat_id, _bound, most=320, type=WEIGHTS, kmn=((256, 16, 1), (256, 5, 33), (512, 7, 9)),
        used=(1, 2, 4), experts=(4, 8), shared=(False, True), view=("dense", "offset", "part"),
        second=("dense", "part", "0213"), routed=(False, True),
    )  # fmt: skip
    yield from sweep(
        "MUL_MAT_ID", _mul_mat_id, _bound, most=60, type=FLOATS, kmn=((33, 5, 7), (1, 3, 2), (64, 1, 70)), used=(1, 3),
        experts=(3, 16), shared=(False, True), view=("dense", "strided"),
    )  # fmt: skip


def _add_id(b: Builder, *, ne: Shape, rows: int, view: str, second: str) -> Any:
    x = b.operand(*ne, view=view)
    return b.add_id(x, b.operand(ne[0], rows, view=second), b.indices(rows, ne[1], ne[2]))


def _add_ids() -> Iterator[Case]:
    yield from sweep(
        "ADD_ID", _add_id, ne=((32, 4, 7), (33, 1, 5), (5, 3, 1)), rows=(6, 33), view=("dense", "part", "0213"),
        second=("dense", "part"),
    )  # fmt: skip


# OUT_PROD


def _out_prod(
    b: Builder, *, mnk: Shape, batch: Shape, repeat: Shape = (1, 1), type: str = "F32", view: str = "dense",
    second: str = "dense",
) -> Any:  # fmt: skip
    m, n, k = mnk
    x = b.operand(m, k, *batch, view=view, type=type)
    return b.out_prod(x, b.operand(n, k, batch[0] * repeat[0], batch[1] * repeat[1], view=second))


def _out_prods() -> Iterator[Case]:
    yield from sweep(
        "OUT_PROD", _out_prod, most=120, mnk=((16, 8, 6), (33, 1, 5), (7, 9, 1), (64, 3, 40)), batch=((1, 1), (2, 3)),
        repeat=((1, 1), (3, 1), (2, 2)), view=ROWS_DENSE, second=("dense", "part", "0213", "1023"),
    )  # fmt: skip
    yield from sweep(
        "OUT_PROD", _out_prod, mnk=((256, 5, 6),), batch=((1, 1), (2, 2)), view=("dense", "part"),
        type=[t for t in WEIGHTS if t not in ("F32", "BF16")],
    )  # fmt: skip


CASES = [*_mul_mats(), *_mul_mat_ids(), *_add_ids(), *_out_prods()]


DRAWN = {
    "MUL_MAT_ID": draws(
        _mul_mat_id, _bound, lambda used, experts, **_: used <= experts, type=FLOATS, kmn=several(3, 1, 40),
        used=range(1, 6), experts=range(1, 9), shared=(False, True), view=("dense", "strided"),
        second=("dense", "part", "0213"), routed=(False, True),
    ),
    "ADD_ID": draws(
        _add_id, ne=several(3, 1, 40), rows=range(1, 34), view=("dense", "part", "0213"), second=("dense", "part")
    ),
}  # fmt: skip
