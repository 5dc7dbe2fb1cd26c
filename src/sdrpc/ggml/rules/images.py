"""Images: windows, convolutions, pools, sizes."""

from __future__ import annotations

from typing import Any

from ..tensor import Dims
from ..types import F32
from .base import FLOATS, READABLE, Call, Result, Rule, declared, float_like, need, one_of, support, typed

NEAREST, BILINEAR, ALIGN_CORNERS = 0, 1, 256
MAX_POOL, MEAN_POOL = 0, 1


def _window(n: int, k: int, s: int, p: int, d: int) -> int:
    """Outputs of a window of ``k`` taps sliding over ``n`` elements: (n + 2p - d(k - 1) - 1) / s + 1."""
    need(s > 0 and d > 0 and p >= 0, "stride {}, dilation {}, padding {}", s, d, p)
    room = n + 2 * p - d * (k - 1) - 1
    need(room >= 0, "a window of {} taps is larger than its input of {}", k, n)
    return room // s + 1


def _im2col(call: Call) -> Result:
    kernel, image = call.src
    p = call.params
    typed(image, FLOATS)
    to = one_of(call, FLOATS, F32)
    k, x = kernel.ne, image.ne
    need(p.is_2d in (0, 1), "is_2d {}", p.is_2d)
    width = _window(x[0], k[0], p.s0, p.p0, p.d0)
    if not p.is_2d:
        need(x[1] == k[1] and x[3] == 1, "kernel {} for input {}", k, x)
        return Result(to, (k[0] * k[1], width, x[2], 1))
    need(x[2] == k[2], "kernel {} for input {}", k, x)
    height = _window(x[1], k[1], p.s1, p.p1, p.d1)
    return Result(to, (k[0] * k[1] * k[2], width, height, x[3]))


def _conv_2d(call: Call) -> Result:
    kernel, image = call.src
    typed(kernel, READABLE, "kernel")
    typed(image, FLOATS)
    k, x, p = kernel.ne, image.ne, call.params
    need(x[2] == k[2], "kernel {} for input {}", k, x)
    return Result(image.type, (*_windows(k, x, p), k[3], x[3]))


def _conv_2d_dw(call: Call) -> Result:
    kernel, image = call.src
    typed(kernel, READABLE, "kernel")
    typed(image, FLOATS)
    k, x, p = kernel.ne, image.ne, call.params
    need(k[2] == 1 and k[3] == x[2], "kernel {} for input {}", k, x)
    return Result(image.type, (*_windows(k, x, p), x[2], x[3]))


def _windows(k: Dims, x: Dims, p: Any) -> tuple[int, int]:
    return _window(x[0], k[0], p.s0, p.p0, p.d0), _window(x[1], k[1], p.s1, p.p1, p.d1)


def _conv_transpose_2d(call: Call) -> Result:
    kernel, image = call.src
    typed(kernel, READABLE, "kernel")
    typed(image, FLOATS)
    k, x, stride = kernel.ne, image.ne, call.params.stride
    need(stride > 0, "stride {}", stride)
    need(k[3] == x[2], "kernel {} for input {}", k, x)
    return Result(F32, ((x[0] - 1) * stride + k[0], (x[1] - 1) * stride + k[1], k[2], x[3]))


def _pool_2d(call: Call) -> Result:
    source, p = call.src[0], call.params
    typed(source, FLOATS)
    need(p.op in (MAX_POOL, MEAN_POOL), "pooling {}", p.op)
    need(p.k0 > 0 and p.k1 > 0, "a window of {} × {}", p.k0, p.k1)
    need(p.p0 < p.k0 and p.p1 < p.k1, "padding {} × {} of a window of {} × {}", p.p0, p.p1, p.k0, p.k1)
    x = source.ne
    return Result(F32, (_window(x[0], p.k0, p.s0, p.p0, 1), _window(x[1], p.k1, p.s1, p.p1, 1), x[2], x[3]))


def _upscale(call: Call) -> Result:
    support(call.params.mode in (NEAREST, BILINEAR, BILINEAR | ALIGN_CORNERS), "mode {}", call.params.mode)
    return Result(float_like(call).type, declared(call))


RULES: dict[str, Rule] = {
    "IM2COL": Rule(2, 2, _im2col), "CONV_2D": Rule(2, 2, _conv_2d), "CONV_2D_DW": Rule(2, 2, _conv_2d_dw),
    "CONV_TRANSPOSE_2D": Rule(2, 2, _conv_transpose_2d), "POOL_2D": Rule(1, 1, _pool_2d),
    "UPSCALE": Rule(1, 1, _upscale),
}  # fmt: skip
