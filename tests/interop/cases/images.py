"""Images: windows, convolutions, pools, sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.interop.cases.base import ANY_VIEW, FLOATS, PACKED, ROWS_DENSE, Builder, Case, draws, several, shapes, sweep
from tests.support import ggml

WINDOWS = (
    (1, 1, 0, 0, 1, 1), (1, 1, 1, 1, 1, 1), (2, 2, 1, 1, 1, 1), (2, 1, 0, 2, 1, 1), (1, 3, 2, 1, 2, 1),
    (3, 3, 3, 3, 3, 3), (5, 1, 0, 3, 1, 2),
)  # fmt: skip
"""Strides, paddings and dilations of two dimensions, width first."""
VOLUMES = (
    (1, 1, 1, 0, 0, 0, 1, 1, 1), (1, 1, 1, 1, 1, 1, 1, 1, 1), (2, 2, 2, 1, 1, 1, 1, 1, 1), (1, 2, 3, 0, 1, 2, 1, 1, 1),
    (1, 1, 1, 2, 2, 1, 2, 2, 1), (3, 1, 2, 3, 0, 0, 1, 2, 2),
)  # fmt: skip
KERNELS = ("F32", "F16")
BOUND = {"F32": "f32", "F16": "f16"}
"""By type of the kernel: ggml's CPU rounds the image to it."""


def by_kernel(kernel: str, **_: Any) -> str:
    return BOUND[kernel]


# Windows


def _im2col(
    b: Builder, k: tuple[int, int], window: tuple[int, ...], kernel: str, to: str, image: str, view: str
) -> Any:
    x = b.operand(13, 11, 4, 2, view=view, type=image)
    return b.im2col(b.x(*k, 4, 5, type=kernel), x, *window, True, ggml.TYPES[to])


def _im2col_1d(b: Builder, k: int, s: int, p: int, d: int, kernel: str, to: str, view: str) -> Any:
    x = b.operand(20, 6, 2, view=view)
    return b.im2col(b.x(k, 6, 5, type=kernel), x, s, 0, p, 0, d, 0, False, ggml.TYPES[to])


def _im2col_3d(b: Builder, k: tuple[int, ...], channels: int, window: tuple[int, ...], to: str, view: str) -> Any:
    return b.im2col_3d(b.x(*k, 12), b.operand(7, 6, 7, 12, view=view), channels, *window, ggml.TYPES[to])


def _summed(**how: Any) -> str:
    return "f32" if how["type"] == "F32" else "f16"


def _folded(b: Builder, taps: int, channels: int, steps: int, s: int, p: int, type: str) -> Any:
    return b.col2im_1d(b.x(taps * channels, steps, type=type), s, channels, p)


def _windows() -> Iterator[Case]:
    planes = ("dense", "offset", "0132")  # ggml takes planes to be dense
    kernels = ((3, 3), (3, 2), (1, 1))
    yield from sweep(
        "IM2COL", _im2col, "exact", k=kernels, window=WINDOWS, kernel=KERNELS, to=KERNELS, image=KERNELS, view=planes,
        where=lambda to, image, **_: image == "F32" or to == "F16", most=200,
    )  # fmt: skip
    yield from sweep(
        "IM2COL",
        _im2col_1d,
        "exact",
        k=(1, 3, 4),
        s=(1, 3),
        p=(0, 2),
        d=(1, 2),
        kernel=KERNELS,
        to=KERNELS,
        view=("dense", "offset", "strided"),
        most=96,
    )
    yield from sweep(
        "IM2COL_3D",
        _im2col_3d,
        "exact",
        k=((3, 3, 3), (3, 2, 1), (1, 1, 1)),
        channels=(1, 4, 12),
        window=VOLUMES,
        to=KERNELS,
        view=ROWS_DENSE,
        most=160,
    )
    yield from sweep(
        "COL2IM_1D",
        _folded,
        _summed,
        taps=(1, 4, 5),
        channels=(1, 3),
        steps=(1, 9),
        s=(1, 2, 5),
        p=(0, 1),
        type=FLOATS,
        where=lambda taps, steps, s, p, **_: (steps - 1) * s + taps > 2 * p,
        most=96,
    )


# Convolutions


def _conv_2d(b: Builder, k: tuple[int, int], window: tuple[int, ...], kernel: str, view: str) -> Any:
    return b.conv_2d_direct(b.x(*k, 4, 6, type=kernel), b.operand(13, 11, 4, 2, view=view), *window)


def _conv_2d_dw(b: Builder, k: tuple[int, int], window: tuple[int, ...], kernel: str, channels_first: bool) -> Any:
    """ggml knows two layouts, and the result has that of the image."""
    if channels_first:
        weight = b.shuffled(*k, 1, 6, axes=(3, 2, 0, 1), type=kernel)
        return b.conv_2d_dw_direct(weight, b.shuffled(13, 11, 6, 2, axes=(2, 0, 1, 3)), *window)
    return b.conv_2d_dw_direct(b.x(*k, 1, 6, type=kernel), b.x(13, 11, 6, 2), *window)


def _conv_3d(
    b: Builder, k: tuple[int, ...], sizes: tuple[int, int, int], window: tuple[int, ...], kernel: str, view: str
) -> Any:
    channels, batch, outputs = sizes
    x = b.operand(7, 6, 7, channels * batch, view=view)
    return b.conv_3d_direct(b.x(*k, channels * outputs, type=kernel), x, *window, *sizes)


def _transposed_1d(b: Builder, k: int, s: int, kernel: str, view: str, sizes: tuple[int, int, int] = (9, 6, 5)) -> Any:
    """``sizes``: the line's length, its channels, and the result's."""
    length, channels, outputs = sizes
    return b.conv_transpose_1d(
        b.x(k, outputs, channels, type=kernel), b.operand(length, channels, view=view), s, 0, 1
    )  # fmt: skip


def _transposed_2d(b: Builder, k: tuple[int, int], s: int, kernel: str, view: str) -> Any:
    return b.conv_transpose_2d_p0(b.x(*k, 4, 5, type=kernel), b.operand(7, 6, 5, 2, view=view), s)


def _convolutions() -> Iterator[Case]:
    sizes = ((3, 3), (3, 2), (1, 1))
    yield from sweep("CONV_2D", _conv_2d, by_kernel, k=sizes, window=WINDOWS, kernel=KERNELS, view=ANY_VIEW, most=160)
    yield from sweep("CONV_2D_DW", _conv_2d_dw, k=sizes, window=WINDOWS, kernel=KERNELS, channels_first=(False, True))
    yield from sweep(
        "CONV_3D",
        _conv_3d,
        by_kernel,
        k=((3, 3, 3), (3, 2, 1), (1, 1, 1)),
        window=VOLUMES,
        kernel=KERNELS,
        sizes=((4, 2, 3), (1, 1, 5), (2, 3, 1)),
        view=ANY_VIEW,
        most=160,
    )
    yield from sweep(
        "CONV_TRANSPOSE_1D",
        _transposed_1d,
        by_kernel,
        k=(1, 3, 4),
        s=(1, 2, 5),
        kernel=KERNELS,
        view=("dense", "offset", "part", "strided"),
    )
    yield from sweep(
        "CONV_TRANSPOSE_2D", _transposed_2d, by_kernel, k=sizes, s=(1, 2, 3), kernel=KERNELS, view=ROWS_DENSE, most=96
    )
    # what ggml says as windows and a product
    yield from sweep(
        "MUL_MAT",
        lambda b, op, s, kernel: b.conv_1d(b.x(3, 6, 5, type=kernel), b.x(20, 6, 2), s, 1, 1),
        "f16",
        op=("conv_1d",),
        s=(1, 2),
        kernel=KERNELS,
    )
    yield from sweep(
        "MUL_MAT",
        lambda b, op, window: b.conv_2d_dw(b.x(3, 3, 1, 6, type="F16"), b.x(13, 11, 6, 2), *window),
        "f16",
        op=("conv_2d_dw",),
        window=WINDOWS,
    )
    yield from sweep(
        "MUL_MAT",
        lambda b, op, window: b.conv_3d(b.x(3, 3, 3, 12), b.x(7, 6, 7, 8), 4, *window),
        "f16",
        op=("conv_3d",),
        window=VOLUMES,
    )


# Pools and sizes


def _pool_1d(b: Builder, op: int, k: int, s: int, p: int, ne: tuple[int, ...], type: str, view: str) -> Any:
    return b.pool_1d(b.operand(*ne, view=view, type=type), op, k, s, p)


def _pool_2d(
    b: Builder, op: int, k: tuple[int, int], s: tuple[int, int], p: tuple[int, int], type: str, view: str
) -> Any:
    return b.pool_2d(b.operand(10, 9, 3, 2, view=view, type=type), op, *k, *s, *p)


def _resized(b: Builder, mode: int, source: tuple[int, ...], to: tuple[int, ...], view: str) -> Any:
    return b.interpolate(b.operand(*source, view=view), *to, mode)


def _pools() -> Iterator[Case]:
    yield from sweep(
        "POOL_1D",
        _pool_1d,
        op=(0, 1),
        k=(1, 2, 3, 5),
        s=(1, 2, 4),
        p=(0, 1, 2),
        ne=((10, 4, 3, 2), (33, 2)),
        type=KERNELS,
        view=PACKED,
        where=lambda k, p, **_: p < k,
        most=140,
    )
    yield from sweep(
        "POOL_2D",
        _pool_2d,
        op=(0, 1),
        k=((1, 1), (2, 2), (3, 2), (3, 3), (5, 4)),
        s=((1, 1), (2, 1), (2, 3)),
        p=((0, 0), (1, 0), (1, 1), (2, 3)),
        type=KERNELS,
        view=PACKED,
        where=lambda k, p, **_: p[0] < k[0] and p[1] < k[1],
        most=140,
    )
    corners, smooth = 256, 512
    modes = (0, corners, 1, 1 | corners, 1 | smooth, 1 | smooth | corners, 2, 2 | corners)
    sizes = ((16, 10, 3, 2), (24, 15, 6, 2), (11, 7, 3, 4), (4, 3, 3, 2), (3, 17, 3, 2), (1, 1, 3, 2), (8, 5, 3, 2))
    yield from sweep("UPSCALE", _resized, mode=modes, source=((8, 5, 3, 2),), to=sizes, view=ANY_VIEW, most=300)
    yield from sweep(
        "UPSCALE", _resized, mode=modes, source=((1, 4, 2, 1),), to=((3, 9, 2, 1), (1, 1, 4, 1)), view=("dense",)
    )


# Windows of pictures and where they are


def _parted(b: Builder, ne: tuple[int, ...], w: int) -> Any:
    return b.win_part(b.x(*ne), w)


def _unparted(b: Builder, ne: tuple[int, ...], w: int) -> Any:
    return b.win_unpart(b.x(ne[0], w, w, -(-ne[1] // w) * -(-ne[2] // w)), ne[1], ne[2], w)


def _relative(b: Builder, width: int, n: int) -> Any:
    return b.get_rel_pos(b.x(width, 2 * n - 1, type="F16"), n, n)


def _relative_added(b: Builder, k: int, rows: tuple[int, int, int], inplace: bool) -> Any:
    add = b.add_rel_pos_inplace if inplace else b.add_rel_pos
    return add(b.x(k * k, rows[0] * rows[1], rows[2]), b.x(k, *rows), b.x(k, *rows))


def _partitions() -> Iterator[Case]:
    pictures, sizes = ((3, 7, 5), (8, 14, 14), (1, 1, 9)), (1, 2, 4, 7, 14)
    yield from sweep("WIN_PART", _parted, "exact", ne=pictures, w=sizes)
    yield from sweep("WIN_UNPART", _unparted, "exact", ne=pictures, w=sizes)
    yield from sweep("GET_REL_POS", _relative, "exact", width=(1, 8, 33), n=(1, 4, 14))
    yield from sweep(
        "ADD_REL_POS", _relative_added, k=(1, 3, 7), rows=((4, 4, 2), (5, 4, 1), (1, 1, 3)), inplace=(False, True)
    )


CASES = [*_windows(), *_convolutions(), *_pools(), *_partitions()]
DRAWN = {
    "COL2IM_1D": draws(
        _folded, _summed, lambda taps, steps, s, p, **_: (steps - 1) * s + taps > 2 * p, taps=range(1, 9),
        channels=range(1, 7), steps=range(1, 20), s=range(1, 6), p=range(6), type=FLOATS,
    ),
    "CONV_TRANSPOSE_1D": draws(
        _transposed_1d, by_kernel, k=range(1, 9), s=range(1, 9), kernel=KERNELS, sizes=several(3, 1, 20),
        view=("dense", "offset", "part", "strided"),
    ),
    "POOL_1D": draws(
        _pool_1d, where=lambda k, p, ne, **_: k <= ne[0] + 2 * p, op=(0, 1), k=range(1, 9), s=range(1, 9),
        p=range(8), ne=shapes(), type=KERNELS, view=PACKED,
    ),
    "WIN_PART": draws(_parted, "exact", ne=several(3, 1, 20), w=range(1, 24)),
    "WIN_UNPART": draws(_unparted, "exact", ne=several(3, 1, 20), w=range(1, 24)),
    "GET_REL_POS": draws(_relative, "exact", width=range(1, 40), n=range(1, 20)),
    "ADD_REL_POS": draws(_relative_added, k=range(1, 9), rows=several(3, 1, 9), inplace=(False, True)),
}  # fmt: skip
