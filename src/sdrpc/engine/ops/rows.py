"""Rows and reductions: sums, norms, orders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sdrpc.ggml.params import ArgSort, Eps, GroupNorm, NoParams, Tri

from ..dtypes import shape_of
from ..operations import AffineNorm, EngineOp
from ..values import Value
from .base import Autocast, Kernel, kernel


def _sum(v: Value, x: Tensor) -> Tensor:
    """Added up in float64, as ggml does it, where the device has that."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    return x.sum(dtype=wide).to(torch.float32).reshape(shape_of(v.ne))


def _argmax(v: Value, x: Tensor) -> Tensor:
    if not x.shape[-1]:  # of nothing it is 0
        return x.new_zeros(shape_of(v.ne), dtype=torch.int32)
    return x.argmax(-1).reshape(shape_of(v.ne)).int()


def _argsort(v: Value[ArgSort], x: Tensor) -> Tensor:
    p = v.params
    return torch.argsort(x, dim=-1, descending=bool(p.order), stable=True).int()


def _top_k(v: Value, x: Tensor) -> Tensor:
    """The places of the largest, in no order that ggml promises."""
    return torch.topk(x, v.ne[0], dim=-1).indices.int()


def _count_equal(v: Value, a: Tensor, b: Tensor) -> Tensor:
    return (a == b).sum().reshape(shape_of(v.ne))


def _tri(v: Value[Tri], x: Tensor) -> Tensor:
    p = v.params
    return x.triu(p.part) if p.part < 2 else x.tril(2 - p.part)


def _norm(v: Value[Eps], x: Tensor) -> Tensor:
    p = v.params
    return F.layer_norm(x, x.shape[-1:], eps=p.eps)


def _rms_norm(v: Value[Eps], x: Tensor) -> Tensor:
    p = v.params
    return F.rms_norm(x, x.shape[-1:], eps=p.eps)


def _l2_norm(v: Value[Eps], x: Tensor) -> Tensor:
    p = v.params
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp(min=p.eps)


def _grouped(x: Tensor, groups: int, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Norms over groups of ⌈channels / groups⌉ channels, of which the last may be smaller and others be missing."""
    channels = x.shape[1]
    each = -(-channels // groups)
    alike = channels // each
    cut = alike * each
    # not torch.nn.functional's, which refuses groups of one element
    norm = torch.group_norm
    if x.is_cpu:  # where torch else adds up in another order, so that results would depend on how x lies in memory
        x = x.contiguous()
    if cut == channels:
        return norm(x, alike, weight, bias, eps)
    first, last = (slice(None, cut), alike), (slice(cut, None), 1)
    return torch.cat([
        norm(x[:, part], n, None if weight is None else weight[part], None if bias is None else bias[part], eps)
        for part, n in (first, last)
    ], 1)  # fmt: skip


def _group_norm(v: Value[GroupNorm], x: Tensor) -> Tensor:
    p = v.params
    return _grouped(x, p.groups, p.eps)


def _layer_norm_affine(v: Value[AffineNorm], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    p = v.params
    return F.layer_norm(x, x.shape[-1:], weight.reshape(-1), bias.reshape(-1), p.eps)


def _rms_norm_affine(v: Value[Eps], x: Tensor, weight: Tensor) -> Tensor:
    p = v.params
    return F.rms_norm(x, x.shape[-1:], weight.reshape(-1), p.eps)


def _group_norm_affine(v: Value[AffineNorm], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    p = v.params
    y = _grouped(x, p.groups, p.eps, weight.reshape(-1), bias.reshape(-1))
    return F.silu(y, inplace=True) if p.silu else y


def _sum_rows(_v: Value, x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


def _mean(_v: Value, x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def _cumsum(_v: Value, x: Tensor) -> Tensor:
    return x.cumsum(-1)


def _diag(_v: Value, x: Tensor) -> Tensor:
    return torch.diag_embed(x[:, :, 0])


KERNELS: tuple[Kernel, ...] = (
    kernel("SUM", NoParams, _sum),
    kernel("SUM_ROWS", NoParams, _sum_rows),
    kernel("MEAN", NoParams, _mean),
    kernel("ARGMAX", NoParams, _argmax),
    kernel("ARGSORT", ArgSort, _argsort),
    kernel("CUMSUM", NoParams, _cumsum),
    kernel("TOP_K", NoParams, _top_k),
    kernel("COUNT_EQUAL", NoParams, _count_equal),
    kernel("TRI", Tri, _tri, Autocast.MOVES),
    kernel("DIAG", NoParams, _diag, Autocast.MOVES),
    kernel("NORM", Eps, _norm, Autocast.FOLLOWS),
    kernel("RMS_NORM", Eps, _rms_norm, Autocast.FOLLOWS),
    kernel("L2_NORM", Eps, _l2_norm),
    kernel("GROUP_NORM", GroupNorm, _group_norm, Autocast.FOLLOWS),
    kernel(EngineOp.NORM_AFFINE, AffineNorm, _layer_norm_affine, Autocast.FOLLOWS),
    kernel(EngineOp.RMS_NORM_AFFINE, Eps, _rms_norm_affine, Autocast.FOLLOWS),
    kernel(EngineOp.GROUP_NORM_AFFINE, AffineNorm, _group_norm_affine, Autocast.FOLLOWS),
)
