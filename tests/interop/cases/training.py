"""Gradients, losses and steps of optimizers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.interop.cases.base import ODD, SMALL, Builder, Case, draws, several, shapes, sweep, uniform
from tests.support import ggml

Dims = tuple[int, ...]


def _silu_back(b: Builder, ne: Dims) -> Any:
    return b.silu_back(b.x(*ne), b.x(*ne, low=-6, high=6))


def _rms_norm_back(b: Builder, ne: Dims, eps: float) -> Any:
    return b.rms_norm_back(b.x(*ne), b.x(*ne), eps)


def _soft_max_back(b: Builder, ne: Dims, scale: float) -> Any:
    return b.soft_max_ext_back(b.x(*ne), b.soft_max(b.x(*ne)), scale, 0.0)


def _rope_back(b: Builder, ne: Dims, mode: int, part: int, base: float, factors: bool) -> Any:
    rotated = ne[0] - part
    divisors = b.x(rotated // 2, low=0.5, high=2.0) if factors else None
    return b.rope_ext_back(
        b.x(*ne), b.indices(99, ne[2]), divisors, rotated, mode, 0, base, 1.0, 0.0, 1.0, 32.0, 1.0
    )  # fmt: skip


def _repeat_back(b: Builder, ne: Dims, times: Dims) -> Any:
    whole = tuple(n * k for n, k in zip(ne, times, strict=True))
    return b.repeat_back(b.x(*whole), b.x(*ne))


def _get_rows_back(b: Builder, width: int, rows: int, picked: int, type: str) -> Any:
    return b.get_rows_back(b.x(width, picked, type=type), b.indices(rows, picked), b.x(width, rows))


def _loss(b: Builder, ne: Dims) -> Any:
    return b.cross_entropy_loss(b.x(*ne, low=-4, high=4), b.soft_max(b.x(*ne)))


def _loss_back(b: Builder, ne: Dims) -> Any:
    return b.cross_entropy_loss_back(b.x(1), b.x(*ne, low=-4, high=4), b.soft_max(b.x(*ne)))


def _sgd(b: Builder, ne: Dims) -> Any:
    weight = b.x(*ne)
    ggml.library().ggml_set_param(weight)
    return b.opt_step_sgd(weight, b.x(*ne), b.x(2, low=0.0))


def _adamw(b: Builder, ne: Dims) -> Any:
    """The new weights and both moments, which are written over the old ones."""
    weight, mean, square = b.x(*ne), b.x(*ne), b.x(*ne, low=0.0)
    ggml.library().ggml_set_param(weight)
    rates = b.put("F32", np.array([0.01, 0.9, 0.999, 1e-8, 0.1, 1.7, 3.1]))
    return b.opt_step_adamw(weight, b.x(*ne), mean, square, rates), mean, square


def _im2col_back(b: Builder, image: Dims, kernel: Dims, stride: int, pad: int, dilation: int, flat: bool) -> Any:
    kernel_ = b.x(*kernel, image[1 if flat else 2], 5) if not flat else b.x(kernel[0], image[1], 5)
    sizes = [(n + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(image, kernel, strict=False)]
    if flat:
        columns, ne = b.x(kernel[0] * image[1], sizes[0], image[2]), (*image[:3], 1)
    else:
        columns, ne = b.x(kernel[0] * kernel[1] * image[2], *sizes, image[3]), image
    pointer = ctypes.cast((ctypes.c_int64 * 4)(*ne), ctypes.c_void_p)
    places = (stride, 0, pad, 0, dilation, 0) if flat else (stride, stride, pad, pad, dilation, dilation)
    return b.im2col_back(columns, kernel_, pointer, *places, not flat)


def _pool_2d_back(b: Builder, mean: bool, image: Dims, size: Dims, stride: Dims, pad: Dims) -> Any:
    pooled = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(image, size, stride, pad, strict=False)]
    gradient, forward = b.x(*pooled, *image[2:]), b.distinct(*image)
    return b.pool_2d_back(gradient, forward, int(mean), *size, *stride, *pad)


def _training() -> Iterator[Case]:
    whole = (ODD, SMALL, (1, 1, 1, 1), (257, 3, 1, 1))
    yield from sweep("SILU_BACK", _silu_back, ne=whole)
    yield from sweep("RMS_NORM_BACK", _rms_norm_back, ne=whole, eps=(1e-6, 1e-2))
    yield from sweep("SOFT_MAX_BACK", _soft_max_back, ne=whole, scale=(1.0, 0.3))
    yield from sweep(
        "ROPE_BACK", _rope_back, ne=((64, 3, 5, 2), (128, 1, 7, 1)), mode=(0, 2), part=(0, 16), base=(1e4, 1e6),
        factors=(False, True),
    )  # fmt: skip
    yield from sweep(
        "REPEAT_BACK", _repeat_back, ne=((5, 3, 2, 1), (1, 1, 1, 1), ODD),
        times=((1, 1, 1, 1), (3, 1, 1, 1), (1, 2, 1, 3), (2, 2, 2, 2)),
    )  # fmt: skip
    yield from sweep(
        "GET_ROWS_BACK", _get_rows_back, width=(1, 33), rows=(1, 9), picked=(1, 20), type=("F32", "F16")
    )  # fmt: skip
    yield from sweep("CROSS_ENTROPY_LOSS", _loss, ne=((33, 7, 2, 1), (5, 1, 1, 1), (1000, 3, 1, 1)))
    yield from sweep("CROSS_ENTROPY_LOSS_BACK", _loss_back, ne=((33, 7, 2, 1), (5, 1, 1, 1), (1000, 3, 1, 1)))
    yield from sweep("OPT_STEP_SGD", _sgd, ne=whole)
    yield from sweep("OPT_STEP_ADAMW", _adamw, ne=((33, 7, 2, 3), (257, 3, 1, 1), (1, 1, 1, 1)))
    yield from sweep(
        "IM2COL_BACK", _im2col_back, image=((9, 8, 3, 2), (12, 5, 1, 1)), kernel=((3, 3), (1, 1), (4, 2)),
        stride=(1, 2), pad=(0, 1), dilation=(1, 2), flat=(False, True),
    )  # fmt: skip
    yield from sweep(
        "POOL_2D_BACK", _pool_2d_back, mean=(False, True), image=((9, 8, 3, 2), (12, 5, 1, 1)),
        size=((2, 2), (3, 2), (4, 4)), stride=((1, 1), (2, 3)), pad=((0, 0), (1, 1)),
    )  # fmt: skip


CASES = [*_training()]


def _slides(*, image: Dims, kernel: Dims, stride: int, pad: int, dilation: int, flat: bool) -> bool:
    """Whether the kernel fits in at least once."""
    sides = zip(image[: 1 if flat else 2], kernel, strict=False)
    return all(n + 2 * pad >= dilation * (k - 1) + 1 for n, k in sides)


def _pools(*, image: Dims, size: Dims, pad: Dims, **_: Any) -> bool:
    return all(p < k <= n + 2 * p for n, k, p in zip(image, size, pad, strict=False))


def _even(rng: np.random.Generator) -> Dims:
    """A shape of rows that can be rotated, at least 16 of each left when a part of it is not."""
    return (32 + 2 * int(rng.integers(1, 40)), *shapes(3)(rng))


ANY = {"ne": shapes()}
DRAWN = {
    "SILU_BACK": draws(_silu_back, **ANY),
    "RMS_NORM_BACK": draws(_rms_norm_back, eps=uniform(1e-6, 1e-2), **ANY),
    "SOFT_MAX_BACK": draws(_soft_max_back, scale=uniform(0.1, 2), **ANY),
    "ROPE_BACK": draws(
        _rope_back, ne=_even, mode=(0, 2), part=range(0, 17, 2), base=uniform(10, 1e6), factors=(False, True)
    ),
    "REPEAT_BACK": draws(_repeat_back, ne=shapes(), times=several(4, 1, 3)),
    "GET_ROWS_BACK": draws(
        _get_rows_back, width=range(1, 40), rows=range(1, 20), picked=range(1, 20), type=("F32", "F16")
    ),
    "CROSS_ENTROPY_LOSS": draws(_loss, **ANY),
    "CROSS_ENTROPY_LOSS_BACK": draws(_loss_back, **ANY),
    "OPT_STEP_SGD": draws(_sgd, **ANY),
    "OPT_STEP_ADAMW": draws(_adamw, **ANY),
    "IM2COL_BACK": draws(
        _im2col_back, where=_slides, image=several(4, 1, 9), kernel=several(2, 1, 4), stride=range(1, 5), pad=range(4),
        dilation=range(1, 4), flat=(False, True),
    ),
    "POOL_2D_BACK": draws(
        _pool_2d_back, where=_pools, mean=(False, True), image=several(4, 1, 9), size=several(2, 1, 5),
        stride=several(2, 1, 4), pad=several(2, 0, 3),
    ),
}  # fmt: skip
