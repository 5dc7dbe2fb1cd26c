"""Single operations drawn at random from what ggml's constructors allow: their asserts (ggml.c) are written down here,
not sdrpc's shape rules, so that a refusal of a valid operation fails a test."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.interop.cases import (
    attention,
    copies,
    deepseek,
    elementwise,
    images,
    products,
    recurrent,
    rows,
    training,
)
from tests.interop.cases.base import Builder, Case, Drawn, draws, shapes
from tests.support import ggml

UNARY = tuple(op for op in ggml.UNARY if op != "XIELU")  # it has parameters, and a constructor of its own
Shape = tuple[int, ...]


def _shape(b: Builder, dims: int = 4, empty: bool = True) -> list[int]:
    """Any shape; one in ten has no elements."""
    return [*shapes(dims, empty)(b.rng), *[1] * (4 - dims)]


def _of(b: Builder, *values: Any) -> Any:
    return values[int(b.rng.integers(len(values)))]


def _between(b: Builder, low: int, high: int) -> int:
    return int(b.rng.integers(low, high + 1))


def _divisors(b: Builder, ne: list[int]) -> list[int]:
    """A shape that repeats to ``ne`` (ggml_can_repeat)."""
    return [int(b.rng.choice([d for d in range(1, n + 1) if n % d == 0])) if n else 0 for n in ne]


def _binary(b: Builder, op: str) -> Any:
    ne = _shape(b)
    return getattr(b, op)(b.x(*ne), b.x(*_divisors(b, ne), low=0.5))


def _unary(b: Builder) -> Any:
    return b.unary(b.x(*_shape(b), low=0.1), _between(b, 0, len(UNARY) - 1))


def _glu(b: Builder) -> Any:
    ne = _shape(b)
    ne[0] = _between(b, 2, 17)
    return b.glu(b.x(*ne), _between(b, 0, 2), bool(_between(b, 0, 1)))


def _rows(b: Builder, op: str, *arguments: Any) -> Any:
    return getattr(b, op)(b.x(*_shape(b), low=0.1), *arguments)


def _clamp(b: Builder) -> Any:
    low, high = b.rng.uniform(-1, 1, 2)
    return b.clamp(b.x(*_shape(b)), low, high)


def _concat(b: Builder) -> Any:
    ne, dim = _shape(b), _between(b, 0, 3)
    other = list(ne)
    other[dim] = _of(b, 1, 2, 5)
    return b.concat(b.x(*ne), b.x(*other), dim)


def _repeat(b: Builder) -> Any:
    ne = _shape(b)
    return b.repeat_4d(b.x(*ne), *(n * _between(b, 1, 3) for n in ne))


def _pad(b: Builder) -> Any:
    return b.pad_ext(b.x(*_shape(b, empty=False)), *(_between(b, 0, 3) for _ in range(8)))


def _roll(b: Builder) -> Any:
    ne = _shape(b, empty=False)
    return b.roll(b.x(*ne), *(_between(b, 1 - n, n - 1) for n in ne))


def _get_rows(b: Builder) -> Any:
    ne, picked = _shape(b, empty=False), _of(b, 0, 1, 3, 7)
    return b.get_rows(b.x(*ne), b.indices(ne[1], picked, *ne[2:]))


def _set_rows(b: Builder) -> Any:
    width, rows, n2, n3 = _shape(b, empty=False)
    picked = _between(b, 0, rows)
    spread = [_of(b, *(d for d in range(1, n + 1) if n % d == 0)) for n in (n2, n3)]
    numbers = b.indices(rows, picked, *spread, type=_of(b, "I32", "I64"), unique=True)
    return b.set_rows(b.x(width, rows, n2, n3), b.x(width, picked, n2, n3), numbers)


def _mul_mat(b: Builder, op: str) -> Any:
    k, m, n, _ = _shape(b, empty=False)
    outer = _shape(b, 2, empty=False)[:2]
    inner = [int(b.rng.choice([d for d in range(1, size + 1) if size % d == 0])) for size in outer]
    shapes = ((k, m, *inner), (k, n, *outer)) if op == "mul_mat" else ((m, k, *inner), (n, k, *outer))
    return getattr(b, op)(*(b.x(*ne) for ne in shapes))


def _soft_max(b: Builder) -> Any:
    ne = _shape(b, empty=False)
    mask = (ne[0], ne[1] + _between(b, 0, 2), *_divisors(b, ne)[2:])
    biased = _of(b, 0.0, 8.0)
    given = biased > 0 or b.rng.random() < 0.7
    return b.soft_max_ext(b.x(*ne), b.mask(*mask, type=_of(b, "F32", "F16")) if given else None, 0.7, biased)


def _rope(b: Builder) -> Any:
    dims, tokens = 2 * _between(b, 1, 16), _between(b, 1, 6)
    width = dims + 2 * _between(b, 0, 4)
    floats = (_of(b, 1e4, 10.0), _of(b, 1.0, 0.5), _of(b, 0.0, 0.75), _of(b, 1.0, 1.3), 32.0, 1.0)
    factors = b.x(width // 2, low=0.5, high=2.0) if _between(b, 0, 1) else None
    x = b.x(width, _between(b, 1, 3), tokens, _between(b, 1, 2))
    return b.rope_ext(x, b.indices(99, tokens), factors, dims, _of(b, 0, 2), _of(b, 0, 7, 512), *floats)


def _window(b: Builder, sizes: list[int], taps: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Strides, paddings and dilations with at least one output each, by C's division."""
    while True:
        n = len(sizes)
        s, p, d = ([_between(b, *bounds) for _ in range(n)] for bounds in ((1, 7), (0, 4), (1, 4)))
        if all(sizes[i] + 2 * p[i] - d[i] * (taps[i] - 1) - 1 > -s[i] for i in range(n)):
            return s, p, d


def _windowed(b: Builder, op: str) -> Any:
    count = 3 if "3d" in op else 2
    sizes, taps = ([_between(b, 1, high) for _ in range(count)] for high in (9, 4))
    s, p, d = _window(b, sizes, taps)
    channels, batch, outputs = (_between(b, 1, 4) for _ in range(3))
    places = (*s, *p, *d)
    if op == "im2col":
        return b.im2col(b.x(*taps, channels, outputs), b.x(*sizes, channels, batch), *places, True, ggml.TYPES["F32"])
    if op == "conv_2d_direct":
        return b.conv_2d_direct(b.x(*taps, channels, outputs), b.x(*sizes, channels, batch), *places)
    if op == "conv_2d_dw_direct":
        return b.conv_2d_dw_direct(b.x(*taps, 1, channels), b.x(*sizes, channels, batch), *places)
    image = b.x(*sizes, channels * batch)
    if op == "im2col_3d":
        return b.im2col_3d(b.x(*taps, outputs), image, channels, *places, ggml.TYPES["F32"])
    return b.conv_3d_direct(b.x(*taps, channels * outputs), image, *places, channels, batch, outputs)


def _transposed(b: Builder) -> Any:
    channels = _between(b, 1, 4)
    kernel = b.x(_between(b, 1, 4), _between(b, 1, 4), _between(b, 1, 4), channels, type="F16")
    return b.conv_transpose_2d_p0(kernel, b.x(_between(b, 1, 6), _between(b, 1, 6), channels, 1), _between(b, 1, 5))


def _pool(b: Builder) -> Any:
    k, s = ([_between(b, 1, high) for _ in range(2)] for high in (4, 5))
    p = [_between(b, 0, size - 1) for size in k]
    ne = [_between(b, max(size - 2 * pad, 1), 9) for size, pad in zip(k, p, strict=True)]
    return b.pool_2d(b.x(*ne, 3, 2), _between(b, 0, 1), *k, *s, *map(float, p))


def _interpolate(b: Builder) -> Any:
    ne = _shape(b, empty=False)
    return b.interpolate(b.x(*ne), _between(b, 1, 12), _between(b, 1, 12), *ne[2:], _of(b, 0, 1, 2, 256, 257, 258))


def _set_part(b: Builder, op: str) -> Any:
    ne = _shape(b, empty=False)
    part = [_between(b, 0 if i == 1 else 1, n) for i, n in enumerate(ne)]
    a = b.x(*ne)
    nb = a.contents.nb
    offset = sum(nb[i] * _between(b, 0, ne[i] - part[i]) for i in range(4)) if all(part) else 0
    return getattr(b, op)(a, b.x(*part), *nb[1:], offset)


MAKERS: dict[str, tuple[Callable[..., Any], str]] = {
    **{op.upper(): (partial(_binary, op=op), "f32") for op in ("add", "sub", "mul", "div")},
    "UNARY": (_unary, "f16"), "GLU": (_glu, "f16"), "CLAMP": (_clamp, "exact"),
    **{
        op.upper(): (lambda b, op=op, args=args: _rows(b, op, *args), "f32")
        for op, args in (
            ("sqr", ()), ("sqrt", ()), ("log", ()), ("sin", ()), ("cos", ()), ("scale", (0.3,)), ("sum", ()),
            ("sum_rows", ()), ("cumsum", ()), ("norm", (1e-5,)), ("rms_norm", (1e-5,)), ("l2_norm", (1e-5,)),
            ("group_norm", (2, 1e-5)), ("diag_mask_inf", (1,)), ("diag_mask_zero", (0,)),
            ("leaky_relu", (0.1, False)),
        )
    },
    "CONCAT": (_concat, "exact"), "REPEAT": (_repeat, "exact"), "PAD": (_pad, "exact"), "ROLL": (_roll, "exact"),
    "GET_ROWS": (_get_rows, "exact"), "SET_ROWS": (_set_rows, "exact"),
    "MUL_MAT": (partial(_mul_mat, op="mul_mat"), "f32"), "OUT_PROD": (partial(_mul_mat, op="out_prod"), "f32"),
    "SOFT_MAX": (_soft_max, "f32"), "ROPE": (_rope, "f32"), "IM2COL": (partial(_windowed, op="im2col"), "exact"),
    "IM2COL_3D": (partial(_windowed, op="im2col_3d"), "exact"),
    "CONV_2D": (partial(_windowed, op="conv_2d_direct"), "f32"),
    "CONV_2D_DW": (partial(_windowed, op="conv_2d_dw_direct"), "f32"),
    "CONV_3D": (partial(_windowed, op="conv_3d_direct"), "f32"), "CONV_TRANSPOSE_2D": (_transposed, "f16"),
    "POOL_2D": (_pool, "f32"), "UPSCALE": (_interpolate, "f32"),
    "SET": (partial(_set_part, op="set"), "exact"), "ACC": (partial(_set_part, op="acc"), "f32"),
}  # fmt: skip
DRAWN: dict[str, Drawn] = {op: draws(make, bound) for op, (make, bound) in MAKERS.items()}
"""By operation: those above, and those that are drawn beside their written cases."""
for module in (elementwise, rows, attention, copies, products, images, recurrent, deepseek, training):
    if twice := DRAWN.keys() & module.DRAWN:
        raise ValueError(f"drawn twice: {twice}")
    DRAWN |= module.DRAWN


def case(name: str) -> Case:
    """The case that is called ``OPERATION-drawn-NUMBER``: the same each time, since its name is the builder's seed."""
    op, number = name.split("-", 1)
    return DRAWN[op].case(op, number)
