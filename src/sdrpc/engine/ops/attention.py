"""Rotations, softmax and attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..values import Value
from .base import Raise, repeat_to


def _rope(v: Value, x: Tensor, positions: Tensor, factors: Tensor | None = None) -> Tensor:
    p: Any = v.params
    n = p.n_dims
    powers = torch.arange(0, n, 2, device=x.device, dtype=torch.float32)
    frequencies = torch.pow(p.freq_base, -powers / n)
    if factors is not None:
        frequencies = frequencies / factors.reshape(-1)[: n // 2].float()
    angles = positions.reshape(-1, 1).float() * frequencies * p.freq_scale  # [n2, n / 2]
    cos = (angles.cos() * p.attn_factor)[None, :, None]
    sin = (angles.sin() * p.attn_factor)[None, :, None]
    turned, rest = x[..., :n].float(), x[..., n:]
    neox = p.mode == 2
    a, b = turned.chunk(2, dim=-1) if neox else (turned[..., 0::2], turned[..., 1::2])
    pair = (a * cos - b * sin, a * sin + b * cos)
    rotated = torch.cat(pair, -1) if neox else torch.stack(pair, -1).flatten(-2)
    return torch.cat((rotated.to(x.dtype), rest), -1)


def alibi(heads: int, max_bias: float, device: torch.device) -> Tensor:
    """The slope of each head's linear bias: [heads, 1, 1]."""
    log2 = 1 << (heads.bit_length() - 1)
    m0, m1 = 2.0 ** (-max_bias / log2), 2.0 ** (-max_bias / 2 / log2)
    slopes = [m0 ** (h + 1) if h < log2 else m1 ** (2 * (h - log2) + 1) for h in range(heads)]
    return torch.tensor(slopes, device=device).reshape(-1, 1, 1)


def _masked(scores: Tensor, mask: Tensor | None, max_bias: float) -> Tensor:
    """``scores`` [n, heads, queries, keys] plus the mask, whose heads and batches repeat, times the heads' slopes."""
    if mask is None:
        return scores
    queries, heads = scores.shape[2], scores.shape[1]
    mask = mask[:, :, :queries]
    mask = repeat_to(mask, (mask.shape[3], queries, heads, scores.shape[0]))
    return scores + (mask * alibi(heads, max_bias, mask.device).to(mask.dtype) if max_bias > 0 else mask)


def _soft_max(v: Value, x: Tensor, mask: Tensor | None = None) -> Tensor:
    p: Any = v.params
    return torch.softmax(_masked(x * p.scale if p.scale != 1 else x, mask, p.max_bias), -1)


def _attention(v: Value, q: Tensor, k: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """[n, heads, queries, head] and [n, groups, keys, head] → [n, heads, queries, head]."""
    p: Any = v.params
    heads, groups = q.shape[1], k.shape[1]
    if heads != groups:
        k, value = (t.repeat_interleave(heads // groups, 1) for t in (k, value))
    if mask is not None and (
        p.max_bias > 0 or mask.shape[2] != q.shape[2] or heads % mask.shape[1] or mask.shape[1] > 1
    ):
        mask = _masked(
            torch.zeros((), dtype=q.dtype, device=q.device).expand(*q.shape[:3], k.shape[2]), mask, p.max_bias
        )
    return F.scaled_dot_product_attention(q, k, value, attn_mask=mask, scale=p.scale)


def _flash_attn(v: Value, q: Tensor, k: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """[n, heads, queries, head] and [n, groups, keys, head] → [n, queries, heads, head]."""
    p: Any = v.params
    heads, groups = q.shape[1], k.shape[1]
    if not p.logit_softcap:
        return _attention(v, q, k, value, mask).transpose(1, 2)
    if heads != groups:
        k, value = (t.repeat_interleave(heads // groups, 1) for t in (k, value))
    scores = q @ k.mT * (p.scale / p.logit_softcap)
    weights = torch.softmax(_masked(p.logit_softcap * torch.tanh(scores), mask, p.max_bias), -1)
    return (weights @ value).transpose(1, 2)


RAISE: dict[str, Raise] = {
    "ROPE": _rope, "SOFT_MAX": _soft_max, "ATTENTION": _attention, "FLASH_ATTN_EXT": _flash_attn,
}  # fmt: skip
