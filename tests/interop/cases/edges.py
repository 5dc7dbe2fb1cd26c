"""What ggml computes at the edges of what it accepts: odd halves, tensors without elements, windows that are larger
than their image, rows that are not used, blocks that begin at any byte."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

from tests.interop.cases.base import QUANTIZED, Builder, Case, sweep
from tests.interop.cases.images import by_kernel
from tests.support import ggml

MODES = {"normal": 0, "neox": 2, "mrope": 8, "vision": 24, "imrope": 40}
YARN = (10000.0, 0.9, 0.7465, 1.1, 32.0, 1.0)
"""Base, scale, ext_factor, attn_factor, and both betas."""


def _glu(b: Builder, op: str, ne: tuple[int, ...], type: str, swapped: bool) -> Any:
    return b.glu(b.x(*ne, type=type), ggml.GLU.index(op), swapped)


def _gated(*, op: str, type: str, **_: Any) -> str:
    return "f32" if type == "F32" and op in ("REGLU", "SWIGLU") else "f16"  # the others it reads from a table


def _set_no_rows(b: Builder, to: str, of: str, number: str) -> Any:
    into = b.x(256, 7, 1, 3, type=to)
    b.first.append(b.set_rows(into, b.x(256, 0, 1, 3, type=of), b.indices(7, 0, type=number)))
    return into


def _add_no_rows(b: Builder, op: str) -> Any:
    a = b.x(6, 5)
    return getattr(b, op)(a, b.x(3, 0), *a.contents.nb[1:], 8)


def _rope(b: Builder, mode: str, context: int, back: bool) -> Any:
    dims, tokens = (32 if mode == "vision" else 64), 5
    x, suffix = b.x(64, 3, tokens, 2), "_back" if back else ""
    if MODES[mode] & 8:
        parts = (ctypes.c_int * 4)(8, 8, 8, 8)
        positions = b.indices(99, 4 * tokens)
        return getattr(b, f"rope_multi{suffix}")(x, positions, None, dims, parts, MODES[mode], context, *YARN)
    return getattr(b, f"rope_ext{suffix}")(x, b.indices(99, tokens), None, dims, MODES[mode], context, *YARN)


def _few_rows_back(b: Builder, picked: int, type: str) -> Any:
    """Fewer numbers than rows: the others are not used."""
    return b.get_rows_back(b.x(256, 4, type=type), b.indices(5, picked), b.x(256, 5))


def _conv_2d(b: Builder, image: tuple[int, ...], window: tuple[int, ...], kernel: str) -> Any:
    return b.conv_2d_direct(b.x(3, 3, 4, 6, type=kernel), b.x(*image), *window)


def _depthwise(b: Builder, image: tuple[int, ...], stride: int) -> Any:
    return b.conv_2d_dw_direct(b.x(3, 3, 1, 4), b.x(*image), stride, stride, 0, 0, 1, 1)


def _at_any_byte(b: Builder, op: str, type: str, row: int) -> Any:
    """One row out of several: blocks of an odd number of bytes begin at any of them."""
    whole = b.x(256, 9, type=type)
    nb = whole.contents.nb
    one = b.view_4d(whole, 256, 1, 1, 1, nb[1], nb[1], nb[1], row * nb[1])
    if op == "MUL_MAT":
        return b.mul_mat(one, b.x(256, 3))
    return b.get_rows(one, b.indices(1, 2)) if op == "GET_ROWS" else b.cast(one, ggml.TYPES["F32"])


def _edges() -> Iterator[Case]:
    kinds = ("REGLU", "GEGLU", "SWIGLU", "GEGLU_ERF", "GEGLU_QUICK")
    yield from sweep(
        "GLU", _glu, _gated, op=kinds, ne=((5, 7), (33, 2, 3)),
        type=("F32", "F16"), swapped=(False, True),
    )  # fmt: skip
    yield from sweep(
        "SET_ROWS", _set_no_rows, "exact", to=("F32", "F16", "Q8_0"), of=("F32", "F16"), number=("I64", "I32")
    )
    yield from sweep("SUM", lambda b, ne: b.sum(b.x(*ne)), ne=((5, 0, 3), (0,)))
    yield from sweep("ACC", _add_no_rows, "exact", op=("acc",))
    yield from sweep("SET", _add_no_rows, "exact", op=("set",))
    yield from sweep(
        "CONV_2D", _conv_2d, by_kernel, image=((1, 133, 4, 2), (2, 5, 4, 1), (1, 1, 4, 3)),
        window=((3, 1, 0, 1, 1, 1), (3, 3, 0, 1, 1, 1), (7, 5, 1, 0, 3, 2), (9, 9, 1, 1, 4, 4)), kernel=("F32", "F16"),
        where=lambda image, window, **_: all(
            image[i] + 2 * window[2 + i] - 2 * window[4 + i] - 1 > -window[i] for i in (0, 1)
        ),
    )  # fmt: skip
    yield from sweep("CONV_2D_DW", _depthwise, image=((1, 133, 4, 2), (2, 1, 4, 1)), stride=(3, 5))
    yield from sweep(
        "IM2COL",
        lambda b, image, stride, to: b.im2col(
            b.x(3, 3, 4, 5, type=to), b.x(*image), stride, stride, 0, 1, 1, 2, True, ggml.TYPES[to]
        ),
        "exact", image=((1, 133, 4, 2), (2, 2, 4, 1)), stride=(3, 5), to=("F32", "F16"),
    )  # fmt: skip
    yield from sweep(
        "IM2COL_3D",
        lambda b, kernel, images, channels: b.im2col_3d(
            b.x(3, 3, 3, kernel), b.x(10, 10, 10, images), channels, 1, 1, 1, 1, 1, 1, 1, 1, 1, ggml.TYPES["F32"]
        ),
        "exact", kernel=(1, 2), images=(9, 10), channels=(3, 4),
    )  # fmt: skip
    yield from sweep(
        "GET_ROWS_BACK",
        _few_rows_back, picked=(1, 2, 3), type=("F32", "F16"),
    )  # fmt: skip
    yield from sweep("ROPE", _rope, mode=tuple(MODES), context=(0, 128), back=(False,))
    yield from sweep("ROPE_BACK", _rope, mode=("normal", "neox"), context=(0, 128), back=(True,))
    for op in ("MUL_MAT", "GET_ROWS", "CPY"):
        bound = "quantized" if op == "MUL_MAT" else "exact"
        yield from sweep(op, _at_any_byte, bound, op=(op,), type=QUANTIZED, row=(1, 6))


CASES = [*_edges()]
