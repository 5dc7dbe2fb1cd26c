"""What DeepSeek's models brought: the indexer of sparse attention, and hyper-connections between streams of layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sdrpc.ggml.params import Gather, Mixing, NoParams

from ...deadline import checkpoint
from ...dtypes import shape_of
from ...values import Value
from ..base import Kernel, kernel, repeat_to

SCORES = 1 << 22
"""Scores of heads that are held at one time."""


def _lightning_indexer(v: Value, query: Tensor, key: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """How much each key matters for a token: the sum over heads of weight · relu(q k), plus the mask."""
    keys = key[:, :, 0].mT
    batch, tokens, _, size = query.shape
    at_once = max(SCORES // (batch * tokens * keys.shape[2]), 1)
    total = repeat_to(mask, v.ne)[:, 0]
    for some, weight in zip(torch.split(query, at_once, 2), torch.split(weights, at_once, 3), strict=True):
        checkpoint()
        scores = F.relu(some.reshape(batch, -1, size) @ keys).reshape(batch, tokens, some.shape[2], -1)
        total = total + (weight[:, 0, :, None] @ scores)[:, :, 0]
    return total.reshape(shape_of(v.ne))


def _mixing(v: Value[Mixing], mixes: Tensor, scale: Tensor, base: Tensor) -> Tensor:
    """A matrix [from, to] for each token whose rows and columns sum to one: a softmax, then Sinkhorn's iteration."""
    p = v.params
    streams = v.ne[0]
    logits = mixes[0, 0, :, 2 * streams :] * scale[0, 0, 0, 2] + base[0, 0, 0, 2 * streams :]
    matrix: Tensor = torch.softmax(logits.reshape(-1, streams, streams), -1) + p.eps
    matrix = matrix / (matrix.sum(1, keepdim=True) + p.eps)
    for _ in range(p.rounds - 1):
        checkpoint()
        matrix = matrix / (matrix.sum(2, keepdim=True) + p.eps)
        matrix = matrix / (matrix.sum(1, keepdim=True) + p.eps)
    return matrix.reshape(shape_of(v.ne))


def _gather(v: Value[Gather], x: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of a token's streams. Weights are one number a stream, or gates of all its elements, which go
    through a sigmoid and are scaled. (Without gates the scale is always one; protocols before 7.0 don't send it.)"""
    p = v.params
    if not p.gated:
        return (weights[0, 0, :, None] @ x[0]).reshape(shape_of(v.ne))
    return ((x * torch.sigmoid(weights)).sum(2) * p.scale).reshape(shape_of(v.ne))


def _spread(v: Value, x: Tensor, residual: Tensor, post: Tensor, mixing: Tensor | None = None) -> Tensor:
    """Each stream gets its share of the layer's result, and the other streams as the mixing says (itself without)."""
    shared = post[0, 0, :, :, None] * x[0, 0, :, None]
    mixed = residual[0] if mixing is None else mixing[0].mT @ residual[0]
    return (shared + mixed).reshape(shape_of(v.ne))


KERNELS: tuple[Kernel, ...] = (
    kernel("LIGHTNING_INDEXER", NoParams, _lightning_indexer),
    kernel("DSV4_HC_COMB", Mixing, _mixing),
    kernel("DSV4_HC_PRE", Gather, _gather),
    kernel("DSV4_HC_POST", NoParams, _spread),
)
