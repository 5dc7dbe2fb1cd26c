"""Pictures of another size: upsampling, pools, and pixels exchanged for channels."""

# ruff: noqa: ARG001  all rules are called alike, whether or not they need what they get

from __future__ import annotations

from functools import reduce
from math import prod
from typing import Any

from ...errors import CaptureError
from ...ggml.params import Pool2D, Upscale
from ...ggml.rules.images import MEAN_POOL, NEAREST
from ..emitter import Emitter, Value, dims_of
from .base import Out, pair, rule
from .convolutions import shaped


@rule("upsample_nearest2d")
def upsample_nearest2d(e: Emitter, out: Out, x: Value, *_: Any) -> Value:
    """Any size: ggml picks the same pixels as torch."""
    image = e.contiguous(e.f32(x))
    return Value(e.node("UPSCALE", image.tensor, params=Upscale(NEAREST), ne=dims_of(out.shape)), out.shape)


@rule(
    "upsample_nearest1d", "upsample_nearest3d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
)  # fmt: skip
def upsample_nearest(e: Emitter, out: Out, x: Value, *_: Any) -> Value:
    """By whole factors, where nearest and nearest-exact agree: each element so many times."""
    for dim in range(2, len(x.shape)):
        factor, rest = divmod(out.shape[dim], x.shape[dim])
        if rest:
            raise CaptureError(f"nearest neighbours from {x.shape[2:]} to {out.shape[2:]}, which is no whole factor")
        blocks = (prod(x.shape[: dim + 1]), 1, prod(x.shape[dim + 1 :]))
        shape = (*x.shape[:dim], out.shape[dim], *x.shape[dim + 1 :])
        x = e.reshape(e.expand(e.reshape(x, blocks), (blocks[0], factor, blocks[2])), shape)
    return x


@rule("avg_pool2d")
def avg_pool2d(
    e: Emitter, out: Out, x: Value, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Value:  # fmt: skip
    if pair(padding) != (0, 0) or ceil_mode or divisor_override is not None:
        raise CaptureError("avg_pool2d with padding, ceil_mode or divisor_override")
    k1, k0 = pair(kernel_size)
    s1, s0 = pair(stride or kernel_size)
    if "POOL_2D" in e.target.ops:
        params = Pool2D(MEAN_POOL, k0, k1, s0, s1, 0, 0)
        return e.reshape(shaped(e.node("POOL_2D", e.contiguous(e.f32(x)).tensor, params=params), 4), out.shape)
    # the mean of the windows' pixels: shifted pictures, added
    height, width = out.shape[-2:]
    rank = len(x.shape)
    columns = [e.slice(x, rank - 1, at, width, s0) for at in range(k0)]
    parts = [e.slice(column, rank - 2, at, height, s1) for column in columns for at in range(k1)]
    return e.scale(reduce(lambda total, part: e.binary("ADD", total, part), parts), 1 / (k0 * k1))


@rule("pixel_shuffle")
def pixel_shuffle(e: Emitter, out: Out, x: Value, upscale_factor: int) -> Value:
    """[…, c·r², h, w] → […, c, h·r, w·r]."""
    *leading, channels, height, width = x.shape
    r = upscale_factor
    blocks = e.reshape(x, (prod(leading), channels // r**2, r, r, height, width))
    return e.reshape(e.permute(blocks, (0, 1, 4, 2, 5, 3)), out.shape)


@rule("pixel_unshuffle")
def pixel_unshuffle(e: Emitter, out: Out, x: Value, downscale_factor: int) -> Value:
    """[…, c, h·r, w·r] → […, c·r², h, w]."""
    *leading, channels, height, width = x.shape
    r = downscale_factor
    blocks = e.reshape(x, (prod(leading), channels, height // r, r, width // r, r))
    return e.reshape(e.permute(blocks, (0, 1, 3, 5, 2, 4)), out.shape)
