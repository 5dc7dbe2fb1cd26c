"""What only training needs: gradients of other operations, losses and steps of optimizers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sdrpc.ggml.params import Eps, Im2Col, NoParams, Pool2D, Rope, SoftMax

from ...dtypes import shape_of
from ...operations import EngineOp
from ...values import Value
from .. import attention
from ..base import Kernel, kernel, operand, within
from ..images import reaches, taps_at


def _silu_back(_v: Value, gradient: Tensor, x: Tensor) -> Tensor:
    """s (1 + x (1 - s)), where s = sigmoid(x)"""
    s: Tensor = torch.sigmoid(x)
    return gradient * s * (1 + x * (1 - s))


def _rms_norm_back(v: Value[Eps], gradient: Tensor, x: Tensor) -> Tensor:
    """(dz - x · mean(x dz) / (mean(x²) + eps)) / √(mean(x²) + eps)"""
    p = v.params
    mean: Tensor = x.square().mean(-1, keepdim=True) + p.eps
    return (gradient - x * ((x * gradient).mean(-1, keepdim=True) / mean)) * mean.rsqrt()


def _soft_max_back(v: Value[SoftMax], gradient: Tensor, y: Tensor) -> Tensor:
    """y · (dy - Σ y dy) · scale"""
    p = v.params
    return (gradient - (y * gradient).sum(-1, keepdim=True)) * y * p.scale


def _rope_back(v: Value[Rope], x: Tensor, positions: Tensor, *factors: Tensor) -> Tensor:
    """The rotation backwards."""
    return attention.rope(v, x, -positions, *factors)


def _repeat_back(v: Value, x: Tensor) -> Tensor:
    """The sum over all copies."""
    wanted = shape_of(v.ne)
    copies = [n for have, want in zip(x.shape, wanted, strict=True) for n in (have // want, want)]
    return x.reshape(copies).sum((0, 2, 4, 6))


def _get_rows_back(v: Value, rows: Tensor, numbers: Tensor) -> Tensor:
    """Rows added where they were picked."""
    _, _, n, width = shape_of(v.ne)
    into = torch.zeros(n, width, dtype=rows.dtype, device=rows.device)
    picked = within(numbers.reshape(-1).long(), n)
    return into.index_add(0, picked, rows[0, 0, : len(picked)]).reshape(shape_of(v.ne))


def _cross_entropy_loss(v: Value, logits: Tensor, wanted: Tensor) -> Tensor:
    """- mean over rows of Σ wanted · log softmax(logits)"""
    rows = logits.numel() // logits.shape[-1]
    return (torch.log_softmax(logits, -1) * wanted).sum().div(-rows).reshape(shape_of(v.ne))


def _cross_entropy_loss_back(_v: Value, gradient: Tensor, logits: Tensor, wanted: Tensor) -> Tensor:
    rows = logits.numel() // logits.shape[-1]
    return (torch.softmax(logits, -1) - wanted) * (gradient / rows)


def _sgd(_v: Value, weight: Tensor, gradient: Tensor, rates: Tensor) -> Tensor:
    """w (1 - rate · decay) - rate · g"""
    rate, decay = rates[..., :1], rates[..., 1:]
    return weight * (1 - rate * decay) - rate * gradient


# AdamW's parameters: rate, beta 1, beta 2, eps, weight decay, and what corrects the moments' bias, 1 / (1 - beta^step)


def _adamw_mean(_v: Value, mean: Tensor, gradient: Tensor, params: Tensor) -> Tensor:
    """m · beta 1 + g (1 - beta 1)"""
    beta = params[..., 1:2]
    return mean * beta + gradient * (1 - beta)


def _adamw_square(_v: Value, square: Tensor, gradient: Tensor, params: Tensor) -> Tensor:
    """s · beta 2 + g² (1 - beta 2)"""
    beta = params[..., 2:3]
    return square * beta + gradient * gradient * (1 - beta)


def _adamw(_v: Value, weight: Tensor, _gradient: Tensor, mean: Tensor, square: Tensor, params: Tensor) -> Tensor:
    """w (1 - rate · decay) - rate · m̂ / (√ŝ + eps), after both moments were updated (arXiv:1711.05101)."""
    rate, _, _, eps, decay, mean_scale, square_scale = (params[..., i : i + 1] for i in range(7))
    step: Tensor = mean * mean_scale / ((square * square_scale).sqrt() + eps)
    return weight * (1 - rate * decay) - rate * step


def _im2col_back(v: Value[Im2Col], columns: Tensor, _kernel: Tensor) -> Tensor:
    """Columns added where they were taken: [n, height, width, taps] → [n, channels, …]. Of one dimension, images are
    one pixel high."""
    p = v.params
    k0, k1 = operand(v, 1).ne[:2]
    n3, n2, n1, n0 = shape_of(v.ne)
    images, channels, size, k, s, pad, d = (
        (n3, n2, (n1, n0), (k1, k0), (p.s1, p.s0), (p.p1, p.p0), (p.d1, p.d0))
        if p.is_2d
        else (n2, n1, (1, n0), (1, k0), (1, p.s0), (0, p.p0), (1, p.d0))
    )
    if all(map(reaches, size, k, pad, d)):
        flat = columns.reshape(images, -1, columns.shape[3]).mT
        return F.fold(flat, size, k, d, pad, s).reshape(shape_of(v.ne))
    outputs = columns.shape[1:3] if p.is_2d else (1, columns.shape[2])
    down, across = (taps_at(size[i], outputs[i], k[i], (s[i], pad[i], d[i]), columns.device) for i in (0, 1))
    places = down[:, None, :, None] * (size[1] + 1) + across[None, :, None, :]
    gradients = columns.reshape(images, *outputs, channels, *k).permute(0, 3, 1, 2, 4, 5).flatten(2)
    whole = columns.new_zeros(images, channels, (size[0] + 1) * (size[1] + 1))
    whole = whole.index_add(2, places.flatten(), gradients).reshape(images, channels, size[0] + 1, size[1] + 1)
    return whole[..., :-1, :-1].reshape(shape_of(v.ne))


def _pool_2d_back(v: Value[Pool2D], gradient: Tensor, image: Tensor) -> Tensor:
    """Each window's gradient goes to its largest element, the first one, or to all its elements alike."""
    p = v.params
    # torch pads by half a window at most; the rest is written out
    out0, out1 = max(p.p0 - p.k0 // 2, 0), max(p.p1 - p.k1 // 2, 0)
    padded = F.pad(image, (out0, out0, out1, out1), value=0.0 if p.op else -torch.inf)
    window = (p.k1, p.k0), (p.s1, p.s0), (p.p1 - out1, p.p0 - out0)
    if p.op:  # only its shape counts; but CUDA's kernel takes strides with the channels together for dense ones
        dense = padded.contiguous()
        spread = torch.ops.aten.avg_pool2d_backward(gradient.contiguous(), dense, *window, False, True, None)
    else:
        at = F.max_pool2d(padded, *window, return_indices=True)[1]
        spread = torch.zeros_like(padded).flatten(2).scatter_add(2, at.flatten(2), gradient.flatten(2))
    inside: Tensor = spread.reshape(padded.shape)
    return inside[..., out1 : out1 + image.shape[2], out0 : out0 + image.shape[3]]


KERNELS: tuple[Kernel, ...] = (
    kernel("SILU_BACK", NoParams, _silu_back),
    kernel("RMS_NORM_BACK", Eps, _rms_norm_back),
    kernel("SOFT_MAX_BACK", SoftMax, _soft_max_back),
    kernel("ROPE_BACK", Rope, _rope_back),
    kernel("REPEAT_BACK", NoParams, _repeat_back),
    kernel("GET_ROWS_BACK", NoParams, _get_rows_back),
    kernel("CROSS_ENTROPY_LOSS", NoParams, _cross_entropy_loss),
    kernel("CROSS_ENTROPY_LOSS_BACK", NoParams, _cross_entropy_loss_back),
    kernel("OPT_STEP_SGD", NoParams, _sgd),
    kernel("OPT_STEP_ADAMW", NoParams, _adamw),
    kernel(EngineOp.ADAMW_MEAN, NoParams, _adamw_mean),
    kernel(EngineOp.ADAMW_SQUARE, NoParams, _adamw_square),
    kernel("IM2COL_BACK", Im2Col, _im2col_back),
    kernel("POOL_2D_BACK", Pool2D, _pool_2d_back),
)
