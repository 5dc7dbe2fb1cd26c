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


def _group_norm(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    return F.group_norm(x, p.groups, eps=p.eps)


def _layer_norm_affine(v: Value, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    p: Any = v.params
    return F.layer_norm(x, x.shape[-1:], weight.reshape(-1), bias.reshape(-1), p.eps)


def _rms_norm_affine(v: Value, x: Tensor, weight: Tensor) -> Tensor:
    p: Any = v.params
    return F.rms_norm(x, x.shape[-1:], weight.reshape(-1), p.eps)


def _group_norm_affine(v: Value, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    p: Any = v.params
    y = F.group_norm(x, p.groups, weight.reshape(-1), bias.reshape(-1), p.eps)
    return F.silu(y, inplace=True) if p.silu else y


RAISE: dict[str, Raise] = {
    "SUM": _sum, "SUM_ROWS": lambda _v, x: x.sum(-1, keepdim=True), "MEAN": lambda _v, x: x.mean(-1, keepdim=True),
    "ARGMAX": _argmax, "ARGSORT": _argsort, "CUMSUM": lambda _v, x: x.cumsum(-1),
    "NORM": _norm, "RMS_NORM": _rms_norm, "L2_NORM": _l2_norm, "GROUP_NORM": _group_norm,
    "NORM_AFFINE": _layer_norm_affine, "RMS_NORM_AFFINE": _rms_norm_affine, "GROUP_NORM_AFFINE": _group_norm_affine,
}  # fmt: skip
