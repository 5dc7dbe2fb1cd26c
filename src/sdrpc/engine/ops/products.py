"""Matrix products."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..values import Value
from .base import Raise


def _mul_mat(_v: Value, a: Tensor, b: Tensor) -> Tensor:
    """b · aᵀ; a's batches repeat, each for several consecutive ones of b."""
    if a.shape[0] == a.shape[1] == 1:
        return F.linear(b, a[0, 0])
    if a.shape[:2] == b.shape[:2]:
        return b @ a.mT
    if a.shape[0] != b.shape[0]:
        a = a.repeat_interleave(b.shape[0] // a.shape[0], 0)
    n3, n2, n, k = b.shape
    grouped = b.reshape(n3, a.shape[1], n2 // a.shape[1] * n, k)
    return (grouped @ a.mT).reshape(n3, n2, n, a.shape[2])


def _linear_bias(_v: Value, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    return F.linear(b, a[0, 0], bias.reshape(-1))


def _out_prod(_v: Value, a: Tensor, b: Tensor) -> Tensor:
    """bᵀ · a: sums over the second dimension."""
    a = a.repeat_interleave(b.shape[0] // a.shape[0], 0).repeat_interleave(b.shape[1] // a.shape[1], 1)
    return b.mT @ a


RAISE: dict[str, Raise] = {
    "MUL_MAT": _mul_mat, "LINEAR": _linear_bias, "OUT_PROD": _out_prod,
}  # fmt: skip
