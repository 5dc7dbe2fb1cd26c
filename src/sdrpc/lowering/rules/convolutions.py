"""Convolutions of one, two and three dimensions. Images are [batch, channels, …], kernels [out, in / groups, …]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import CaptureError
from ...ggml.params import Conv2D, ConvTranspose1D, ConvTranspose2D, Im2Col
from ...ggml.types import F32
from ..emitter import Emitter, Shape, Value, dims_of
from .base import Out, rule
from .joins import split_at
from .padding import padded

Sizes = Sequence[int]


@rule("convolution")
def convolution(
    e: Emitter, out: Out, x: Value, weight: Value, bias: Value | None, stride: Sizes, padding: Sizes, dilation: Sizes,
    transposed: bool, output_padding: Sizes, groups: int,
) -> Value:  # fmt: skip
    """Sizes are given for each dimension, or once for all."""
    rank = len(weight.shape) - 2
    stride, padding, dilation, output_padding = (_each(s, rank) for s in (stride, padding, dilation, output_padding))
    if transposed and rank == 1 and set(dilation) == {1} and not any(output_padding):
        result = _transposed_lines(e, out.shape, x, weight, stride[0], padding[0], groups)
    elif transposed:
        result = _transposed(e, out.shape, x, weight, stride, padding, dilation, output_padding, groups)
    elif rank == 3:
        result = _conv_3d(e, out.shape, x, weight, stride, padding, dilation, groups)
    elif rank == 2:
        result = _conv_2d(e, x, weight, stride, padding, dilation, groups)
    else:
        flat = _conv_2d(e, _flat(e, x), _flat(e, weight), (1, *stride), (0, *padding), (1, *dilation), groups)
        result = e.reshape(flat, out.shape)
    return result if bias is None else e.binary("ADD", result, e.reshape(bias, (bias.shape[0], *(1,) * rank)))


def _each(sizes: Sizes, rank: int) -> tuple[int, ...]:
    return tuple(sizes) if len(sizes) == rank else (sizes[0],) * rank


def _flat(e: Emitter, x: Value) -> Value:
    """A line as a picture of one row."""
    return e.reshape(x, (*x.shape[:2], 1, x.shape[2]))


def shaped(tensor: Any, rank: int) -> Value:
    """A ggml tensor as a value of so many dimensions."""
    return Value(tensor, tuple(reversed(tensor.ne))[4 - rank :])


def _conv_2d(e: Emitter, x: Value, weight: Value, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int) -> Value:
    (s1, s0), (p1, p0), (d1, d0) = stride, padding, dilation
    channels, each = x.shape[1], x.shape[1] // groups
    params = Conv2D(s0, s1, p0, p1, d0, d1, e.prec)
    image = e.contiguous(e.f32(x))
    if groups == 1:
        return _convolved(e, image, weight, params)
    if each == 1 and weight.shape[0] == channels and "CONV_2D_DW" in e.target.ops:
        return shaped(e.node("CONV_2D_DW", e.contiguous(weight).tensor, image.tensor, params=params), 4)
    if (
        each == 1
        and weight.shape[0] == channels
        and image.shape[2] == weight.shape[2] == 1
        and weight.shape[3] < groups
    ):
        return _tap_by_tap(e, image, weight, s0, p0, d0)
    parts = split_at(e, image, 1, [each] * groups)
    kernels = split_at(e, weight, 0, [weight.shape[0] // groups] * groups)
    pairs = zip(parts, kernels, strict=True)
    return e.concat([_convolved(e, e.contiguous(part), kernel, params) for part, kernel in pairs], 1)


def _tap_by_tap(e: Emitter, lines: Value, weight: Value, stride: int, padding: int, dilation: int) -> Value:
    """Lines [batch, channels, 1, length], each channel with taps of its own: what each tap gives, added up."""
    batch, channels, _, length = lines.shape
    longer = padded(e, Out((batch, channels, 1, length + 2 * padding), "f"), lines, [padding, padding])
    count = (longer.shape[3] - dilation * (weight.shape[3] - 1) - 1) // stride + 1
    total: Value | None = None
    for tap in range(weight.shape[3]):
        seen = e.slice(longer, 3, tap * dilation, count, stride)
        part = e.binary("MUL", seen, e.reshape(e.f32(e.slice(weight, 3, tap, 1)), (1, channels, 1, 1)))
        total = part if total is None else e.binary("ADD", total, part)
    if total is None:
        raise CaptureError("a kernel without taps")
    return total


def _convolved(e: Emitter, image: Value, kernel: Value, params: Conv2D) -> Value:
    """CONV_2D, or for devices that lack it the product of the kernel and the image's windows (F32: exact)."""
    if kernel.tensor.ne != dims_of(kernel.shape):  # one tap, stored as a matrix
        if params[:6] != (1, 1, 0, 0, 1, 1):
            raise CaptureError(f"a kernel of one tap stored as {kernel.tensor.type}, with {params}")
        matrix = Value(kernel.tensor, kernel.shape[:2])
        return e.contiguous(e.permute(e.mul_mat(matrix, e.permute(image, (0, 2, 3, 1))), (0, 3, 1, 2)))
    kernel = e.contiguous(kernel)
    if "CONV_2D" in e.target.ops:
        return shaped(e.node("CONV_2D", kernel.tensor, image.tensor, params=params), 4)
    windows = e.node("IM2COL", kernel.tensor, image.tensor, params=Im2Col(*params[:6], 1), type=F32)
    taps, width, height, batch = windows.ne
    columns = e.reshape(shaped(windows, 4), (batch * height * width, taps))
    product = e.mul_mat(e.reshape(kernel, (kernel.shape[0], taps)), columns)
    pixels = e.reshape(product, (batch, height, width, kernel.shape[0]))
    return e.contiguous(e.permute(pixels, (0, 3, 1, 2)))


def _conv_3d(
    e: Emitter, shape: Shape, x: Value, weight: Value, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Value:
    """Frames are images of a batch; the taps in time are as many convolutions of images, added up."""
    x = e.f32(x)
    if padding[0]:
        longer = (*x.shape[:2], x.shape[2] + 2 * padding[0], *x.shape[3:])
        x = padded(e, Out(longer, "f"), x, [0, 0, 0, 0, padding[0], padding[0]])
    batch, channels, _, height, width = x.shape
    frames, taps = shape[2], weight.shape[2]
    total: Value | None = None
    for tap in range(taps):
        part = e.slice(x, 2, tap * dilation[0], frames, stride[0])
        images = e.reshape(e.permute(part, (0, 2, 1, 3, 4)), (batch * frames, channels, height, width))
        kernel = e.reshape(e.slice(weight, 2, tap, 1), (*weight.shape[:2], *weight.shape[3:]))
        result = _conv_2d(e, images, kernel, stride[1:], padding[1:], dilation[1:], groups)
        total = result if total is None else e.binary("ADD", total, result)
    if total is None:
        raise CaptureError("a kernel without taps")
    pictures = e.reshape(total, (batch, frames, *total.shape[1:]))
    return e.permute(pictures, (0, 2, 1, 3, 4))


def _transposed(
    e: Emitter, shape: Shape, x: Value, weight: Value, stride: Sizes, padding: Sizes, dilation: Sizes,
    output_padding: Sizes, groups: int,
) -> Value:  # fmt: skip
    """CONV_TRANSPOSE_2D has no padding: its edges are cut off."""
    plain = len(stride) == 2 and len(set(stride)) == 1 and groups == 1
    if not plain or set(dilation) != {1} or set(output_padding) != {0}:
        raise CaptureError(
            "a transposed convolution of volumes, or of images with groups or unlike strides, or with dilation or "
            "output padding"
        )
    image = e.contiguous(e.f32(x))
    kernel = e.contiguous(weight)
    result = shaped(
        e.node("CONV_TRANSPOSE_2D", kernel.tensor, image.tensor, params=ConvTranspose2D(stride[0], e.prec)), 4
    )
    return e.slice(e.slice(result, 2, padding[0], shape[2]), 3, padding[1], shape[3])


def _transposed_lines(
    e: Emitter, shape: Shape, x: Value, weight: Value, stride: int, padding: int, groups: int
) -> Value:
    """CONV_TRANSPOSE_1D has no padding (its edges are cut off), no batch and no groups. Where it will not do, zeros go
    between the numbers, and a convolution with the kernel the other way round over them."""
    x, weight = e.f32(x), e.f32(weight)
    batch, channels, length = x.shape
    if groups == 1 and "CONV_TRANSPOSE_1D" in e.target.ops:
        kernel = e.contiguous(weight).tensor
        lines = []
        for i in range(batch):
            line = e.contiguous(e.reshape(e.slice(x, 0, i, 1), (channels, length)))
            made = e.node("CONV_TRANSPOSE_1D", kernel, line.tensor, params=ConvTranspose1D(stride))
            lines.append(e.reshape(shaped(made, 2), (1, weight.shape[1], made.ne[0])))
        return e.slice(e.concat(lines, 0), 2, padding, shape[2])
    if groups != 1 and (groups != channels or weight.shape[1] != 1):
        raise CaptureError("a transposed convolution of lines in groups of several channels")
    apart = e.reshape(x, (batch, channels, length, 1))
    if stride > 1:
        apart = padded(e, Out((batch, channels, length, stride), "f"), apart, [0, stride - 1])
    taps = weight.shape[2]
    spread = e.reshape(e.contiguous(apart), (batch, channels, 1, length * stride))
    backwards = e.concat([e.slice(weight, 2, tap, 1) for tap in reversed(range(taps))], 2)
    kernel_of_each = e.contiguous(backwards if groups > 1 else e.transpose(backwards, 0, 1))
    whole = _conv_2d(e, spread, _flat(e, kernel_of_each), (1, 1), (0, taps - 1), (1, 1), groups)
    return e.slice(e.reshape(whole, (batch, *whole.shape[1::2])), 2, padding, shape[2])
