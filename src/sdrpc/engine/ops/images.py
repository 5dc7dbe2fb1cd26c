"""Images: windows, convolutions, pools, sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sdrpc.ggml.params import (
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
from sdrpc.ggml.rules.images import ALIGN_CORNERS, ANTIALIAS, BICUBIC, BILINEAR, MAX_POOL, MEAN_POOL, NEAREST

from ..arithmetic import quotient
from ..convolutions import conv_2d
from ..dtypes import shape_of
from ..values import Value
from .base import Autocast, Kernel, kernel, operand

PADDED = 16
"""An image that padding makes so many times larger is not padded: what its windows see is picked out of it. Nor does a
convolution of torch's get such a padding: one of 2³¹ − 1 in float16 ends the process on a CPU (torch 2.11)."""
CUBIC = -0.75
"""The parameter of bicubic interpolation."""
MUCH = 8
"""A convolution on a CPU with so many times more channels than places is a matrix product, one whose kernel has its
channels together if it has only as many: torch's own would rearrange the kernel in each call, which is most of the work
then (1280 channels of 4×4 in bfloat16: 13 ms instead of 2). One of a single tap is a product anyhow."""


def _patches(x: Tensor, k: tuple[int, int], s: tuple[int, int], p: tuple[int, int], d: tuple[int, int]) -> Tensor:
    """What a window of ``k`` taps sees of ``x`` [n, c, h, w] with zeros around it: [n, down, across, taps, c]. Height
    comes first in windows, strides, paddings and dilations."""
    if _much_padded(x.shape[2:], p):
        outputs = [(x.shape[2 + i] + 2 * p[i] - d[i] * (k[i] - 1) - 1) // s[i] + 1 for i in (0, 1)]
        return _picked(x, k, s, p, d, outputs)
    x = F.pad(x, (p[1], p[1], p[0], p[0])).permute(0, 2, 3, 1).contiguous()  # channels move together, the fastest way
    for axis in (0, 1):
        x = x.unfold(1 + axis, d[axis] * (k[axis] - 1) + 1, s[axis])[..., :: d[axis]]
    return x.permute(0, 1, 2, 4, 5, 3).flatten(3, 4)


def _much_padded(sizes: Sequence[int], paddings: Sequence[int]) -> bool:
    """Whether an image of these ``sizes`` is :data:`PADDED` times as large with so much around it."""
    return math.prod(n + 2 * p for n, p in zip(sizes, paddings, strict=True)) > PADDED * math.prod(sizes)


def _picked(
    x: Tensor, k: tuple[int, int], s: tuple[int, int], p: tuple[int, int], d: tuple[int, int], outputs: Sequence[int]
) -> Tensor:
    """As :func:`_patches`, for ``outputs`` windows, of which some may lie outside of the padded image. The image is not
    padded: of what lies around it one row and one column are made real."""
    down, across = (taps_at(x.shape[2 + i], outputs[i], k[i], (s[i], p[i], d[i]), x.device) for i in (0, 1))
    seen = F.pad(x, (0, 1, 0, 1)).permute(0, 2, 3, 1)[:, down[:, None, :, None], across[:, None, :]]
    return seen.flatten(3, 4)


def reaches(n: int, k: int, padding: int, dilation: int) -> bool:
    """Whether a window of ``k`` taps lies within its padded input of ``n``."""
    return n + 2 * padding > dilation * (k - 1)


def _within_image(
    kernel: Tensor, x: Tensor, windows: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, tuple[int, ...]] | None:
    """The same convolution for torch, which refuses a window that is larger than its padded image: the kernel, the
    image, and its paddings. ``windows`` are padding and dilation of each dimension, width first, as are the paddings.

    ggml has such windows: by C's division there is one output, at the window's first place. Along such a dimension only
    the taps that lie in the image are left of the kernel, and only what they see of the image. None where nothing is
    left in some dimension, or there was nothing: the sum is zero.
    """
    if not (kernel.numel() and x.numel()):
        return None
    paddings = []
    for axis, (padding, dilation) in zip((3, 2, 1), windows, strict=False):
        taps, n = kernel.shape[axis], x.shape[axis]
        if reaches(n, taps, padding, dilation):
            paddings.append(padding)
            continue
        first, last = -(-padding // dilation), min(taps - 1, (n - 1 + padding) // dilation)
        if last < first:
            return None
        kernel = kernel.narrow(axis, first, last - first + 1)
        x = x.narrow(axis, first * dilation - padding, (last - first) * dilation + 1)
        paddings.append(0)
    return kernel, x, tuple(paddings)


def _im2col(v: Value[Im2Col], _kernel: Tensor, x: Tensor) -> Tensor:
    """Image [n, channels, h, w] → the patches under the kernel's window, [n, down, across, channels · kh · kw]. Of one
    dimension: [1, n, channels, w] → [1, n, across, channels · kw]."""
    p = v.params
    k0, k1 = operand(v, 0).ne[:2]
    x = x.to(v.dtype)
    # of one dimension, [1, n, channels, width]: each row of the batch is an image one pixel high
    x, k, s, pad, d = (
        (x, (k1, k0), (p.s1, p.s0), (p.p1, p.p0), (p.d1, p.d0))
        if p.is_2d
        else (x[0].unsqueeze(2), (1, k0), (1, p.s0), (0, p.p0), (1, p.d0))
    )
    if all(map(reaches, x.shape[2:], k, pad, d)):
        patches = _patches(x, k, s, pad, d)
    else:
        patches = _picked(x, k, s, pad, d, (v.ne[2] if p.is_2d else 1, v.ne[1]))
    return patches.mT.reshape(shape_of(v.ne))


def _conv_2d(v: Value[Conv2D], kernel: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Kernel [outputs, channels, kh, kw], image [n, channels, h, w] and bias of ``outputs`` elements → [n, outputs,
    down, across]. Computed in the kernel's dtype, by torch's convolution or, where that is slower on a CPU
    (:data:`MUCH`), as a matrix product."""
    x, bias = x.to(kernel.dtype), None if bias is None else bias.to(kernel.dtype).reshape(-1)
    p = v.params
    found = _within_image(kernel, x, ((p.p0, p.d0), (p.p1, p.d1)))
    if found is None:
        zeros = kernel.new_zeros(shape_of(v.ne))
        return zeros if bias is None else zeros + bias[:, None, None]
    kernel, x, paddings = found
    if paddings != (p.p0, p.p1):
        p = p._replace(p0=paddings[0], p1=paddings[1])
        v = replace(v, params=p)
    together = kernel.is_contiguous(memory_format=torch.channels_last)
    few_places = v.ne[0] * v.ne[1] * v.ne[3] * (1 if together else MUCH) <= v.ne[2]
    if _much_padded(x.shape[2:], (p.p1, p.p0)) or (x.is_cpu and (few_places or _has_one_tap(v, kernel))):
        return _conv_2d_as_product(v, kernel, x, bias)
    # an image whose channels lie together makes torch rearrange the kernel too, which is larger, in every run
    if x.is_cpu or not together:
        x = x.contiguous()
    y = conv_2d(x, kernel, bias, (p.s1, p.s0), (p.p1, p.p0), (p.d1, p.d0))
    return y.contiguous() if x.is_cpu else y  # norms on a CPU want a channel's places side by side


def _has_one_tap(v: Value[Conv2D], kernel: Tensor) -> bool:
    """Whether each place becomes one place, by itself."""
    p = v.params
    return (*kernel.shape[2:], p.s0, p.s1, p.p0, p.p1) == (1, 1, 1, 1, 0, 0)


def _conv_2d_as_product(v: Value[Conv2D], kernel: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """The same as a product of the kernel as a matrix [outputs, taps], in the order in which it lies, and all patches
    of the images as columns [taps, n · down · across]."""
    p = v.params
    taps = kernel.shape[2], kernel.shape[3]
    window = taps, (p.s1, p.s0), (p.p1, p.p0), (p.d1, p.d0)
    if _has_one_tap(v, kernel):
        matrix, columns = kernel.flatten(1), x.transpose(0, 1).flatten(1)
    elif kernel.is_contiguous(memory_format=torch.channels_last) or _much_padded(x.shape[2:], window[2]):
        matrix = kernel.permute(0, 2, 3, 1).flatten(1)
        columns = _patches(x, *window).reshape(-1, matrix.shape[1]).mT
    else:
        stride, padding, dilation = window[1:]
        matrix, columns = kernel.flatten(1), F.unfold(x, taps, dilation, padding, stride).transpose(0, 1).flatten(1)
    if kernel.dtype is torch.float16:  # oneDNN reads those much faster as the second factor
        y = F.linear(columns.mT.contiguous(), matrix, bias).mT
    else:
        y = matrix @ columns if bias is None else torch.addmm(bias[:, None], matrix, columns)
    return y.reshape(len(matrix), x.shape[0], -1).transpose(0, 1).contiguous().reshape(shape_of(v.ne))


def _conv_2d_dw(v: Value[Conv2D], kernel: Tensor, x: Tensor) -> Tensor:
    p = v.params
    found = _within_image(kernel, x, ((p.p0, p.d0), (p.p1, p.d1)))
    if found is None:
        return x.new_zeros(shape_of(v.ne))
    kernel, x, (across, down) = found
    if _much_padded(x.shape[2:], (down, across)):
        seen = _patches(x, (kernel.shape[2], kernel.shape[3]), (p.s1, p.s0), (down, across), (p.d1, p.d0))
        return (seen * kernel.flatten(1).mT).sum(3).permute(0, 3, 1, 2)
    return F.conv2d(x, kernel, None, (p.s1, p.s0), (down, across), (p.d1, p.d0), groups=x.shape[1])


def _conv_transpose_2d(v: Value[ConvTranspose2D], kernel: Tensor, x: Tensor) -> Tensor:
    p = v.params
    down, across = min(p.stride, kernel.shape[2]), min(p.stride, kernel.shape[3])
    y = F.conv_transpose2d(x, kernel, stride=(down, across))
    return _apart(_apart(y, 3, across, p.stride, v.ne[0]), 2, down, p.stride, v.ne[1])


def _conv_transpose_1d(v: Value[ConvTranspose1D], kernel: Tensor, x: Tensor) -> Tensor:
    p = v.params
    stride = min(p.stride, kernel.shape[3])
    return _apart(F.conv_transpose1d(x[0], kernel[0], stride=stride)[None], 3, stride, p.stride, v.ne[0])


def _apart(x: Tensor, dim: int, step: int, stride: int, size: int) -> Tensor:
    """``x`` whose groups of ``step`` elements along ``dim`` begin every ``stride`` elements of the result, zeros in
    between: what a transposed convolution gives whose stride is larger than its kernel, so that no two taps meet. (With
    large strides torch's kernels take time with the stride, and from 16384 on crash.)"""
    if step == stride:
        return x
    shape = [*x.shape]
    shape[dim] = size
    groups = x.reshape(*x.shape[:dim], -1, step, *x.shape[dim + 1 :])
    result = x.new_zeros(shape)
    result.unfold(dim, step, stride).copy_(groups.movedim(dim + 1, -1))
    return result


def _col2im_1d(v: Value[Col2Im1D], columns: Tensor) -> Tensor:
    """Adds up what each step ([steps, channels · taps]) says of the places that it reaches."""
    p = v.params
    taps = columns.shape[3] // p.channels
    return F.fold(columns[0].mT, (1, v.ne[0]), (1, taps), 1, (0, p.padding), (1, p.stride)).reshape(shape_of(v.ne))


def taps_at(have: int, n: int, k: int, window: tuple[int, int, int], device: torch.device) -> Tensor:
    """Windows (stride, padding, dilation) over ``have`` elements: where the ``k`` taps of each of ``n`` lie, [n, k].
    Those outside are one place behind the last."""
    s, p, d = window
    at = torch.arange(n, device=device)[:, None] * s - p + torch.arange(k, device=device) * d
    return torch.where((at >= 0) & (at < have), at, have)


def _im2col_3d(v: Value[Window3D], _kernel: Tensor, x: Tensor) -> Tensor:
    """[n · channels, d, h, w] → [n · deep, down, across, channels · kd · kh · kw]."""
    batch = x.shape[0] // v.params.channels
    places = v.ne[3] // batch, v.ne[2], v.ne[1]
    return _seen_3d(x[: batch * v.params.channels], v.params, operand(v, 0).ne[2::-1], places).reshape(shape_of(v.ne))


def _seen_3d(x: Tensor, p: Window3D, k: Sequence[int], places: Sequence[int]) -> Tensor:
    """What windows of ``k`` taps at so many ``places`` see of ``x`` [n · channels, d, h, w] with zeros around it: [n,
    deep, down, across, channels · taps]. The image is not padded."""
    steps = (p.s2, p.p2, p.d2), (p.s1, p.p1, p.d1), (p.s0, p.p0, p.d0)
    d, h, w = map(taps_at, x.shape[1:], places, k, steps, (x.device,) * 3)
    # picked at once: nothing between is larger than the result
    padded = F.pad(x, (0, 1) * 3)
    picked = padded[:, d[:, None, None, :, None, None], h[:, None, None, :, None], w[:, None, None, :]]
    return picked.reshape(-1, p.channels, *picked.shape[1:]).permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4)


def _conv_3d(v: Value[Window3D], kernel: Tensor, x: Tensor) -> Tensor:
    """Kernel [outputs · channels, kd, kh, kw] and image [n · channels, d, h, w] → [n · outputs, deep, down, across]."""
    p = v.params
    if _much_padded(x.shape[1:], (p.p2, p.p1, p.p0)):
        seen = _seen_3d(x, p, kernel.shape[1:], v.ne[2::-1])
        y = F.linear(seen, kernel.reshape(p.outputs, -1)).permute(0, 4, 1, 2, 3)
        return y.reshape(shape_of(v.ne))
    found = _within_image(kernel, x, ((p.p0, p.d0), (p.p1, p.d1), (p.p2, p.d2)))
    if found is None:
        return x.new_zeros(shape_of(v.ne))
    kernel, x, paddings = found
    images = x.reshape(p.batch, p.channels, *x.shape[1:])
    kernels = kernel.reshape(p.outputs, p.channels, *kernel.shape[1:])
    y = F.conv3d(images, kernels, None, (p.s2, p.s1, p.s0), paddings[::-1], (p.d2, p.d1, p.d0))
    return y.reshape(shape_of(v.ne))


def _pool_1d(v: Value[Pool1D], x: Tensor) -> Tensor:
    """A mean over what a window has of its row, 0 over nothing (POOL_2D's mean counts the padding)."""
    p = v.params
    y = _pooled(x, p.op, (1, p.k), (1, p.s), (0, p.p))
    if p.op == MAX_POOL:
        return y
    first = torch.arange(v.ne[0], device=x.device) * p.s - p.p
    inside = (first + p.k).clamp(max=x.shape[3]) - first.clamp(min=0)
    scaled: Tensor = y * (p.k / inside.clamp(min=1)).to(y.dtype)
    return scaled


def _pool_2d(v: Value[Pool2D], x: Tensor) -> Tensor:
    p = v.params
    return _pooled(x, p.op, (p.k1, p.k0), (p.s1, p.s0), (p.p1, p.p0))


def _pooled(x: Tensor, op: int, k: tuple[int, int], s: tuple[int, int], p: tuple[int, int]) -> Tensor:
    """Pooling, height first. Torch pads by no more than half a window: what is beyond that is written out."""
    inner = min(p[0], k[0] // 2), min(p[1], k[1] // 2)
    down, across = p[0] - inner[0], p[1] - inner[1]
    if down or across:
        x = F.pad(x, (across, across, down, down), value=0.0 if op == MEAN_POOL else -torch.finfo(x.dtype).max)
    return F.avg_pool2d(x, k, s, inner) if op == MEAN_POOL else F.max_pool2d(x, k, s, inner)


def _upscale(v: Value[Upscale], x: Tensor) -> Tensor:
    """[n, c, h, w] → the value's shape, which may be larger or smaller in each dimension: height and width by the mode
    of interpolation, one after the other, batch and channels by picking the nearest."""
    p = v.params
    shape = shape_of(v.ne)
    if (
        p.mode == NEAREST
        and x.shape[:2] == shape[:2]
        and all(w % h == 0 for w, h in zip(shape[2:], x.shape[2:], strict=True))
    ):
        return _repeated(x, shape[3] // x.shape[3], shape[2] // x.shape[2])
    corners, resize = bool(p.mode & ALIGN_CORNERS), _RESIZE[p.mode & ~ALIGN_CORNERS]
    # what shrinks comes first: nothing between is larger than the larger end
    for axis in sorted(range(4), key=lambda axis: shape[axis] / x.shape[axis]):
        n, have = shape[axis], x.shape[axis]
        if axis < 2:
            x = _nearest(x, axis, n, n / have)
        else:
            factor = (n - 1) / (have - 1) if corners and n > 1 and have > 1 else n / have
            x = resize(x, axis, n, factor, 0.5 - corners / 2)
    return x


def _repeated(x: Tensor, across: int, down: int) -> Tensor:
    """Each element so often. Two copies: torch's own function takes five times as long on a CPU."""
    wide = x[..., None].expand(*x.shape, across).flatten(3)
    return wide[:, :, :, None].expand(-1, -1, -1, down, -1).flatten(2, 3)


def _nearest(x: Tensor, axis: int, n: int, factor: float, _offset: float = 0.0) -> Tensor:
    if n == x.shape[axis]:
        return x
    picked = quotient(torch.arange(n, dtype=torch.float32, device=x.device), factor).long()
    return x.index_select(axis, picked.clamp(max=x.shape[axis] - 1))


def _places(x: Tensor, n: int, factor: float, offset: float) -> Tensor:
    """Where the ``n`` new elements lie among the old ones, whose centres are ``offset`` behind the whole numbers."""
    return quotient(torch.arange(n, dtype=torch.float32, device=x.device) + offset, factor)


def _blend(x: Tensor, axis: int, taps: Tensor, weights: Tensor) -> Tensor:
    """Each new element along ``axis`` as a sum of the old ones at ``taps`` [n, k], times ``weights``. Taps outside
    stand for the outermost element."""
    picked = x.index_select(axis, taps.clamp(0, x.shape[axis] - 1).flatten())
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    beside = weights.to(x.dtype).reshape(*weights.shape, *(1 for _ in after))
    return (picked.reshape(*before, *taps.shape, *after) * beside).sum(axis + 1)


def _linear(x: Tensor, axis: int, n: int, factor: float, offset: float) -> Tensor:
    at = _places(x, n, factor, offset) - offset
    low = at.floor().long()
    share = (at - low.clamp(0, x.shape[axis] - 1)).clamp(0, 1)
    return _blend(x, axis, torch.stack((low, low + 1), 1), torch.stack((1 - share, share), 1))


def _cubic(x: Tensor, axis: int, n: int, factor: float, offset: float) -> Tensor:
    """Convolution with Keys' kernel, a = -0.75."""
    at = _places(x, n, factor, offset) - offset
    low = at.floor()
    # how far it is from the two elements in the middle; from the outer ones it is 1 more
    away = torch.stack((at - low, 1 - (at - low)))
    near = ((CUBIC + 2) * away - (CUBIC + 3)) * away * away + 1
    far = ((CUBIC * (away + 1) - 5 * CUBIC) * (away + 1) + 8 * CUBIC) * (away + 1) - 4 * CUBIC
    taps = low.long()[:, None] + torch.arange(-1, 3, device=x.device)
    return _blend(x, axis, taps, torch.stack((far[0], near[0], near[1], far[1]), 1))


def _smooth(x: Tensor, axis: int, n: int, factor: float, offset: float) -> Tensor:
    """Linear interpolation that averages over all that becomes one element: a triangle as wide as that."""
    reach = max(1.0, float(torch.tensor(1.0) / factor))  # rounded as ggml does: it decides which elements are within
    at = _places(x, n, factor, offset)
    first, last = (at - reach + offset).long().clamp(min=0), (at + reach + offset).long().clamp(max=x.shape[axis])
    taps = first[:, None] + torch.arange(math.ceil(2 * reach) + 1, device=x.device)
    weights = (1 - ((taps - at[:, None] + offset) / reach).abs()).clamp(min=0)
    weights = torch.where(taps < last[:, None], weights, 0)
    total = weights.sum(1, keepdim=True)
    return _blend(x, axis, taps, weights / torch.where(total > 0, total, 1))


_RESIZE: dict[int, Callable[[Tensor, int, int, float, float], Tensor]] = {
    NEAREST: _nearest,
    BILINEAR: _linear,
    BICUBIC: _cubic,
    BILINEAR | ANTIALIAS: _smooth,
}


def _win_part(v: Value[Windows], x: Tensor) -> Tensor:
    """[1, height, width, channels] → [windows, size, size, channels]"""
    p = v.params
    _, height, width, channels = x.shape
    padded = F.pad(x[0], (0, 0, 0, p.across * p.size - width, 0, p.down * p.size - height))
    windows = padded.reshape(p.down, p.size, p.across, p.size, channels).transpose(1, 2)
    return windows.reshape(shape_of(v.ne))


def _win_unpart(v: Value[Unwindow], x: Tensor) -> Tensor:
    p = v.params
    channels, width, height, _ = v.ne
    across = -(-width // p.size)
    rows = x.reshape(-1, across, p.size, p.size, channels).transpose(1, 2)
    return rows.reshape(1, -1, across * p.size, channels)[:, :height, :width]


def _get_rel_pos(v: Value, table: Tensor) -> Tensor:
    """Row y, column x: the table's entry for the distance y - x."""
    at = torch.arange(v.ne[1], device=table.device)
    return table[:, 0, v.ne[1] - 1 + at[:, None] - at]


def _add_rel_pos(v: Value[InPlace], scores: Tensor, across: Tensor, down: Tensor) -> Tensor:
    k = across.shape[3]
    return (scores.reshape(*across.shape, k) + down[..., None] + across[..., None, :]).reshape(shape_of(v.ne))


KERNELS: tuple[Kernel, ...] = (
    kernel("IM2COL", Im2Col, _im2col, Autocast.MOVES, raw=(0,)),
    kernel("CONV_2D", Conv2D, _conv_2d, Autocast.NARROW, rounds=(0, 1)),
    kernel("CONV_2D_DW", Conv2D, _conv_2d_dw, Autocast.NARROW),
    kernel("CONV_TRANSPOSE_2D", ConvTranspose2D, _conv_transpose_2d, Autocast.NARROW, rounds=(0, 1)),
    kernel("POOL_2D", Pool2D, _pool_2d),
    kernel("UPSCALE", Upscale, _upscale, Autocast.FOLLOWS),
    kernel("IM2COL_3D", Window3D, _im2col_3d, Autocast.MOVES, raw=(0,)),
    kernel("CONV_3D", Window3D, _conv_3d, Autocast.NARROW, rounds=(0, 1)),
    kernel("CONV_TRANSPOSE_1D", ConvTranspose1D, _conv_transpose_1d, Autocast.NARROW, rounds=(0, 1)),
    kernel("COL2IM_1D", Col2Im1D, _col2im_1d),
    kernel("POOL_1D", Pool1D, _pool_1d),
    kernel("WIN_PART", Windows, _win_part, Autocast.MOVES),
    kernel("WIN_UNPART", Unwindow, _win_unpart, Autocast.MOVES),
    kernel("GET_REL_POS", NoParams, _get_rel_pos, Autocast.MOVES),
    kernel("ADD_REL_POS", InPlace, _add_rel_pos),
)
