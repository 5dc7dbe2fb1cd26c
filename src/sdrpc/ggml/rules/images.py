"""Images: windows, convolutions, pools, sizes."""

from __future__ import annotations

from ..params import (
    Col2Im1D,
    Conv2D,
    ConvTranspose1D,
    ConvTranspose2D,
    Im2Col,
    InPlace,
    NoParams,
    Pool1D,
    Pool2D,
    Unwindow,
    Upscale,
    Window3D,
    Windows,
)
from ..tensor import Dims
from ..types import F16, F32
from .base import FLOATS, READABLE, Call, Op, Result, declared, float_like, need, one_of, op, support, typed

NEAREST, BILINEAR, BICUBIC, ALIGN_CORNERS, ANTIALIAS = 0, 1, 2, 256, 512
MAX_POOL, MEAN_POOL = 0, 1
EXACT = 1 << 24
"""Pools divide float32 numbers in ggml: beyond this the number of their outputs is rounded."""


def window(n: int, k: int, s: int, p: int, d: int) -> int:
    """Outputs of a window of ``k`` taps sliding over ``n`` elements: (n + 2p - d(k - 1) - 1) / s + 1, where the
    division is C's, which rounds towards zero: a window that is larger than its padded input, but by less than its
    stride, has one output, whose taps partly see nothing."""
    need(s > 0 and d > 0 and p >= 0, "stride {}, dilation {}, padding {}", s, d, p)
    room = n + 2 * p - d * (k - 1) - 1
    outputs = room // s + 1 if room >= 0 else 1 - -room // s
    need(outputs >= 0, "a window of {} taps is larger than its input of {}", k, n)
    return outputs


def _im2col(call: Call[Im2Col]) -> Result:
    kernel, image = call.src
    p = call.params
    typed(image, FLOATS)
    to = one_of(call, FLOATS, F32)
    k, x = kernel.ne, image.ne
    need(p.is_2d in (0, 1), "is_2d {}", p.is_2d)
    width = window(x[0], k[0], p.s0, p.p0, p.d0)
    need(width > 0, "a kernel {} is larger than its input {}", k, x)
    if not p.is_2d:
        need(x[1] == k[1] and x[3] == 1, "kernel {} for input {}", k, x)
        return Result(to, (k[0] * k[1], width, x[2], 1))
    need(x[2] == k[2], "kernel {} for input {}", k, x)
    height = window(x[1], k[1], p.s1, p.p1, p.d1)
    need(height > 0, "a kernel {} is larger than its input {}", k, x)
    return Result(to, (k[0] * k[1] * k[2], width, height, x[3]))


def _conv_2d(call: Call[Conv2D]) -> Result:
    kernel, image = call.src
    typed(kernel, READABLE, "kernel")
    typed(image, FLOATS)
    k, x, p = kernel.ne, image.ne, call.params
    need(x[2] == k[2], "kernel {} for input {}", k, x)
    return Result(image.type, (*_windows(k, x, p), k[3], x[3]))


def _conv_2d_dw(call: Call[Conv2D]) -> Result:
    kernel, image = call.src
    typed(kernel, READABLE, "kernel")
    typed(image, FLOATS)
    k, x, p = kernel.ne, image.ne, call.params
    need(k[2] == 1 and k[3] == x[2], "kernel {} for input {}", k, x)
    return Result(image.type, (*_windows(k, x, p), x[2], x[3]))


def _volume(k: Dims, x: Dims, p: Window3D) -> tuple[int, int, int]:
    return (*_windows(k, x, p), window(x[2], k[2], p.s2, p.p2, p.d2))


def _im2col_3d(call: Call[Window3D]) -> Result:
    kernel, image = call.src
    typed(image, FLOATS)
    to = one_of(call, FLOATS, F32)
    k, x, channels = kernel.ne, image.ne, call.params.channels
    # images are counted by the input alone; what is left of its last dimension is not read, and of the kernel's nothing
    need(channels > 0, "{} channels in {}", channels, x)
    width, height, depth = _volume(k, x, call.params)
    need(min(width, height, depth) > 0, "a kernel {} is larger than its input {}", k, x)
    return Result(to, (k[0] * k[1] * k[2] * channels, width, height, depth * (x[3] // channels)))


def _conv_3d(call: Call[Window3D]) -> Result:
    kernel, image = call.src
    typed(kernel, READABLE, "kernel")
    typed(image, FLOATS)
    k, x, p = kernel.ne, image.ne, call.params
    need(min(p.channels, p.batch, p.outputs) > 0, "{} images, {} to {} channels", p.batch, p.channels, p.outputs)
    need(k[3] == p.channels * p.outputs and x[3] == p.channels * p.batch, "kernel {} for input {}", k, x)
    return Result(F32, (*_volume(k, x, p), p.outputs * p.batch))


def _windows(k: Dims, x: Dims, p: Conv2D | Window3D) -> tuple[int, int]:
    return window(x[0], k[0], p.s0, p.p0, p.d0), window(x[1], k[1], p.s1, p.p1, p.d1)


def _conv_transpose_2d(call: Call[ConvTranspose2D]) -> Result:
    kernel, image = call.src
    typed(kernel, READABLE, "kernel")
    typed(image, FLOATS)
    k, x, stride = kernel.ne, image.ne, call.params.stride
    need(stride > 0, "stride {}", stride)
    need(k[3] == x[2], "kernel {} for input {}", k, x)
    return Result(F32, ((x[0] - 1) * stride + k[0], (x[1] - 1) * stride + k[1], k[2], x[3]))


def _conv_transpose_1d(call: Call[ConvTranspose1D]) -> Result:
    kernel, rows = call.src
    typed(kernel, READABLE, "kernel")
    typed(rows, FLOATS)
    k, x, (stride, padding, dilation) = kernel.ne, rows.ne, call.params
    need(stride > 0, "stride {}", stride)
    support(padding == 0 and dilation == 1, "padding {}, dilation {}", padding, dilation)
    need(k[2:] == (x[1], 1) and x[2:] == (1, 1), "kernel {} for input {}", k, x)
    return Result(F32, ((x[0] - 1) * stride + k[0], k[1], 1, 1))


def _col2im_1d(call: Call[Col2Im1D]) -> Result:
    like, (stride, channels, padding) = float_like(call), call.params
    columns, steps, *outer = like.ne
    need(outer == [1, 1], "{} is no matrix", like.ne)
    need(stride > 0 and channels > 0 and padding >= 0, "stride, channels and padding {}", tuple(call.params))
    need(columns % channels == 0, "{} channels in columns of {}", channels, columns)
    length = (steps - 1) * stride + columns // channels - 2 * padding
    need(length > 0, "cuts {} off both ends", padding)
    return Result(like.type, (length, channels, 1, 1))


def _pool_1d(call: Call[Pool1D]) -> Result:
    source, p = call.src[0], call.params
    typed(source, FLOATS)
    return Result(F32, (pooled(source.ne[0], p.op, p.k, p.s, p.p), *source.ne[1:]))


def _pool_2d(call: Call[Pool2D]) -> Result:
    source, p = call.src[0], call.params
    typed(source, FLOATS)
    x = source.ne
    return Result(F32, (pooled(x[0], p.op, p.k0, p.s0, p.p0), pooled(x[1], p.op, p.k1, p.s1, p.p1), x[2], x[3]))


def pooled(n: int, op: int, k: int, s: int, p: int) -> int:
    need(op in (MAX_POOL, MEAN_POOL), "pooling {}", op)
    need(k > 0, "a window of {}", k)
    support(n + 2 * p <= EXACT, "padding {} of {} elements", p, n)
    # pools divide in floating point: here a window that is too large has no output
    need(s > 0 and p >= 0 and n + 2 * p - k >= -s, "a window of {} taps is larger than its input of {}", k, n)
    return window(n, k, s, p, 1) if n + 2 * p >= k else 0


def _upscale(call: Call[Upscale]) -> Result:
    mode = call.params.mode
    scale, flags = mode & 0xFF, mode & ~0xFF
    support(scale in (NEAREST, BILINEAR, BICUBIC) and not flags & ~(ALIGN_CORNERS | ANTIALIAS), "mode {}", mode)
    support(not flags & ANTIALIAS or scale == BILINEAR, "mode {}", mode)
    like, ne = float_like(call), declared(call)
    need(all(like.ne) or not all(ne), "makes {} of {}", ne, like.ne)
    return Result(like.type, ne)


def _win_part(call: Call[Windows]) -> Result:
    like, (across, down, size) = float_like(call), call.params
    channels, width, height, batch = like.ne
    need(size > 0 and batch == 1, "windows of {} in {}", size, like.ne)
    need(across == -(-width // size) and down == -(-height // size), "{} × {} windows in {}", across, down, like.ne)
    return Result(like.type, (channels, size, size, across * down))


def _win_unpart(call: Call[Unwindow]) -> Result:
    like, size, ne = float_like(call), call.params.size, declared(call)
    need(size > 0, "windows of {}", size)
    windows = -(-ne[1] // size) * -(-ne[2] // size)
    need(like.ne[1:] == (size, size, windows) and ne[3] == 1, "windows {} for {}", like.ne, ne)
    return Result(like.type, (like.ne[0], ne[1], ne[2], 1))


def _get_rel_pos(call: Call[NoParams]) -> Result:
    table = call.src[0]
    typed(table, frozenset({"F16"}))
    width, distances, *outer = table.ne
    need(distances % 2 == 1 and outer == [1, 1], "distances {}", table.ne)
    n = (distances + 1) // 2
    return Result(F16, (width, n, n, 1))


def _add_rel_pos(call: Call[InPlace]) -> Result:
    scores, across, down = call.src
    like = float_like(call)
    for positions in (across, down):
        typed(positions, FLOATS, "positions")
        k, rows, columns, batch = positions.ne
        need((k * k, rows * columns, batch, 1) == like.ne, "positions {} for {}", positions.ne, scores.ne)
    need(across.ne == down.ne, "positions {} and {}", across.ne, down.ne)
    need(call.params.inplace in (0, 1), "in place: {}", call.params.inplace)
    return like


OPS: tuple[Op, ...] = (
    op("IM2COL", Im2Col, _im2col, 2, portable=True),
    op("CONV_2D", Conv2D, _conv_2d, 2),
    op("CONV_2D_DW", Conv2D, _conv_2d_dw, 2),
    op("CONV_TRANSPOSE_2D", ConvTranspose2D, _conv_transpose_2d, 2),
    op("POOL_2D", Pool2D, _pool_2d, 1),
    op("UPSCALE", Upscale, _upscale, 1, portable=True),
    op("IM2COL_3D", Window3D, _im2col_3d, 2),
    op("CONV_3D", Window3D, _conv_3d, 2),
    op("CONV_TRANSPOSE_1D", ConvTranspose1D, _conv_transpose_1d, 2),
    op("COL2IM_1D", Col2Im1D, _col2im_1d, 1),
    op("POOL_1D", Pool1D, _pool_1d, 1),
    op("WIN_PART", Windows, _win_part, 1),
    op("WIN_UNPART", Unwindow, _win_unpart, 1),
    op("GET_REL_POS", NoParams, _get_rel_pos, 1),
    op("ADD_REL_POS", InPlace, _add_rel_pos, 3),
)
