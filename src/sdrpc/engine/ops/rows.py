"""Rows and reductions: sums, norms, orders."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import shape_of
from ..values import Value
from .base import Raise


def _sum(v: Value, x: Tensor) -> Tensor:
    return x.sum().reshape(shape_of(v.ne))


def _argmax(v: Value, x: Tensor) -> Tensor:
    return x.argmax(-1).reshape(shape_of(v.ne)).int()


def _argsort(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    return torch.argsort(x, dim=-1, descending=bool(p.order), stable=True).int()


def _top_k(v: Value, x: Tensor) -> Tensor:
    """The places of the largest, in no order that ggml promises."""
    return torch.topk(x, v.ne[0], dim=-1).indices.int()


def _count_equal(v: Value, a: Tensor, b: Tensor) -> Tensor:
    return (a == b).sum().reshape(shape_of(v.ne))


def _tri(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    return x.triu(p.part) if p.part < 2 else x.tril(2 - p.part)


def _norm(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    return F.layer_norm(x, x.shape[-1:], eps=p.eps)


def _rms_norm(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    return F.rms_norm(x, x.shape[-1:], eps=p.eps)


def _l2_norm(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
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
    if cut == channels:
        return norm(x, alike, weight, bias, eps)
    first, last = (slice(None, cut), alike), (slice(cut, None), 1)
    return torch.cat([
        norm(x[:, part], n, None if weight is None else weight[part], None if bias is None else bias[part], eps)
        for part, n in (first, last)
    ], 1)  # fmt: skip


def _group_norm(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    return _grouped(x, p.groups, p.eps)


def _layer_norm_affine(v: Value, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    p: Any = v.params
    return F.layer_norm(x, x.shape[-1:], weight.reshape(-1), bias.reshape(-1), p.eps)


def _rms_norm_affine(v: Value, x: Tensor, weight: Tensor) -> Tensor:
    p: Any = v.params
    return F.rms_norm(x, x.shape[-1:], weight.reshape(-1), p.eps)


def _group_norm_affine(v: Value, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    p: Any = v.params
    y = _grouped(x, p.groups, p.eps, weight.reshape(-1), bias.reshape(-1))
    return F.silu(y, inplace=True) if p.silu else y


RAISE: dict[str, Raise] = {
    "SUM": _sum, "SUM_ROWS": lambda _v, x: x.sum(-1, keepdim=True), "MEAN": lambda _v, x: x.mean(-1, keepdim=True),
    "ARGMAX": _argmax, "ARGSORT": _argsort, "CUMSUM": lambda _v, x: x.cumsum(-1),
    "TOP_K": _top_k, "COUNT_EQUAL": _count_equal, "TRI": _tri, "DIAG": lambda _v, x: torch.diag_embed(x[:, :, 0]),
    "NORM": _norm, "RMS_NORM": _rms_norm, "L2_NORM": _l2_norm, "GROUP_NORM": _group_norm,
    "NORM_AFFINE": _layer_norm_affine, "RMS_NORM_AFFINE": _rms_norm_affine, "GROUP_NORM_AFFINE": _group_norm_affine,
}  # fmt: skip
