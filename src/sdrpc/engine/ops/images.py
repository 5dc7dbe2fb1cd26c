"""Images: windows, convolutions, pools, sizes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import shape_of
from ..values import Value
from .base import Raise, operand


def _im2col(v: Value, _kernel: Tensor, x: Tensor) -> Tensor:
    p: Any = v.params
    k0, k1 = operand(v, 0).ne[:2]
    if p.is_2d:
        columns = F.unfold(x.float(), (k1, k0), (p.d1, p.d0), (p.p1, p.p0), (p.s1, p.s0))
    else:
        # [1, n, channels, width]: each row of the batch is an image one pixel high
        columns = F.unfold(x[0].unsqueeze(2).float(), (1, k0), (1, p.d0), (0, p.p0), (1, p.s0))
    return columns.transpose(1, 2).reshape(shape_of(v.ne))


def _conv_2d(v: Value, kernel: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    p: Any = v.params
    # an image whose channels lie together makes torch rearrange the kernel too, which is larger, in every run
    if x.is_cpu or not kernel.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    return F.conv2d(x, kernel, None if bias is None else bias.reshape(-1), (p.s1, p.s0), (p.p1, p.p0), (p.d1, p.d0))


def _conv_2d_dw(v: Value, kernel: Tensor, x: Tensor) -> Tensor:
    p: Any = v.params
    return F.conv2d(x, kernel, None, (p.s1, p.s0), (p.p1, p.p0), (p.d1, p.d0), groups=x.shape[1])


def _conv_transpose_2d(v: Value, kernel: Tensor, x: Tensor) -> Tensor:
    p: Any = v.params
    return F.conv_transpose2d(x, kernel, stride=p.stride)


def _pool_2d(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    # padded here: torch allows no more padding than half a window
    padded = F.pad(x, (p.p0, p.p0, p.p1, p.p1), value=0.0 if p.op else -torch.finfo(x.dtype).max)
    pool = F.avg_pool2d if p.op else F.max_pool2d
    return pool(padded, (p.k1, p.k0), (p.s1, p.s0))


def _upscale(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    shape = shape_of(v.ne)
    if (
        p.mode == 0
        and x.shape[:2] == shape[:2]
        and all(w % h == 0 for w, h in zip(shape[2:], x.shape[2:], strict=True))
    ):
        return F.interpolate(x, shape[2:], mode="nearest")
    bilinear = p.mode & 0xFF == 1
    for axis in range(2):
        x = _nearest(x, axis, shape[axis])
    for axis in (2, 3):
        x = _linear(x, axis, shape[axis], bool(p.mode & 256)) if bilinear else _nearest(x, axis, shape[axis])
    return x


def _nearest(x: Tensor, axis: int, n: int) -> Tensor:
    have = x.shape[axis]
    if n == have:
        return x
    factor = torch.tensor(n, dtype=torch.float32) / have
    picked = _quotient(torch.arange(n, dtype=torch.float32, device=x.device), float(factor)).long()
    return x.index_select(axis, picked.clamp(max=have - 1))


def _quotient(x: Tensor, divisor: float) -> Tensor:
    """``x / divisor`` to the last bit: by a number that is not in its memory, a GPU multiplies with the reciprocal."""
    return x / torch.full((1,), divisor, dtype=x.dtype, device=x.device)


def _linear(x: Tensor, axis: int, n: int, align_corners: bool) -> Tensor:
    """Linear interpolation along one axis; ggml clamps coordinates to the outermost pixels' centres."""
    have = x.shape[axis]
    offset, factor = (0.0, (n - 1) / (have - 1)) if align_corners and n > 1 and have > 1 else (0.5, n / have)
    if align_corners:
        offset = 0.0
    at = _quotient(torch.arange(n, dtype=torch.float32, device=x.device) + offset, factor) - offset
    low = at.floor().long().clamp(0, have - 1)
    high = (at.floor().long() + 1).clamp(0, have - 1)
    share = (at - low).clamp(0, 1).to(x.dtype).reshape([-1 if i == axis else 1 for i in range(4)])
    return x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share


RAISE: dict[str, Raise] = {
    "IM2COL": _im2col, "CONV_2D": _conv_2d, "CONV_2D_DW": _conv_2d_dw, "CONV_TRANSPOSE_2D": _conv_transpose_2d,
    "POOL_2D": _pool_2d, "UPSCALE": _upscale,
}  # fmt: skip
