"""Rotations, softmax and attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdrpc.ggml.params import FlashAttn, Rope, SoftMax
from sdrpc.ggml.rules.attention import ROPE_IMROPE, ROPE_MROPE, ROPE_NORMAL, ROPE_VISION

from ..deadline import checkpoint
from ..operations import Attention, EngineOp
from ..values import Value
from .base import Autocast, Kernel, kernel, repeat_to

SCORES = 1 << 24
"""Scores of queries and keys that are held at once, where it takes any: a long context has billions."""
SPREAD = 1 << 24
"""Elements of keys and values that are held at once for each head of the queries, where several share them."""
READ_AT_ONCE = 16
"""Bytes: torch's attention kernels of GPUs read rows in such pieces, and have no kernel for those that begin between
("cutlassF: no kernel found to launch!")."""
Mix = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""Scores [n, heads, queries, keys], values [n, heads, keys, head], sinks of the heads → [n, heads, queries, head]."""
RAMP = 0.001
"""The narrowest band, in pairs, over which YaRN blends (rope_yarn_ramp)."""


def rope(v: Value[Rope], x: Tensor, positions: Tensor, factors: Tensor | None = None) -> Tensor:
    """Pairs of each row turned by angles that are their token's position times falling frequencies."""
    p = v.params
    pairs = p.n_dims if p.mode == ROPE_VISION else p.n_dims // 2
    cos, sin = _turns(p, pairs, positions.reshape(-1), factors)
    end = p.n_offset + 2 * pairs
    turned = x[..., p.n_offset : end].float()
    neighbours = p.mode == ROPE_NORMAL
    a, b = (turned[..., 0::2], turned[..., 1::2]) if neighbours else turned.chunk(2, -1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    rotated = torch.stack(pair, -1).flatten(-2) if neighbours else torch.cat(pair, -1)
    rotated = rotated.to(x.dtype)
    return rotated if rotated.shape == x.shape else torch.cat((x[..., : p.n_offset], rotated, x[..., end:]), -1)


def _turns(p: Rope, pairs: int, positions: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles of all pairs, times their magnitude: [tokens, 1, pairs]."""
    numbers = torch.arange(pairs, device=positions.device)
    powers, at = numbers, positions[:, None]
    if p.mode & ROPE_MROPE:
        powers, which = _sections(p, numbers)
        at = positions.reshape(4, -1)[which].T
    # the step between frequencies is rounded as ggml rounds it: what that makes of high powers is seen in the result
    with np.errstate(all="ignore"):
        step = float(np.float32(np.float64(p.freq_base) ** (-2 / p.n_dims)))
    angles = at.float() * torch.pow(step, powers.float())
    if factors is not None:
        angles = angles / factors.reshape(-1)[:pairs].float()
    magnitude = p.attn_factor
    if p.ext_factor:
        share = _extrapolated(p, numbers)
        angles = angles * (p.freq_scale * (1 - share) + share)
        with np.errstate(all="ignore"):
            magnitude *= float(1 + 0.1 * np.log(1 / np.float64(p.freq_scale)))
    elif p.freq_scale != 1:
        angles = angles * p.freq_scale
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return (cos, sin) if magnitude == 1 else (cos * magnitude, sin * magnitude)


def _sections(p: Rope, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The power of the frequency of each pair, and which of its token's four positions it takes."""
    first, second, third = p.section0, p.section1, p.section2
    sector = numbers % (first + second + third + p.section3)
    if p.mode == ROPE_IMROPE:
        turn = sector % 3
        size = torch.where(turn == 0, first, torch.where(turn == 1, second, third))
        return numbers, torch.where(sector < 3 * size, turn, 3)
    starts = (0, first, first + second, first + second + third)
    which = (sector >= starts[1]).long() + (sector >= starts[2]) + (sector >= starts[3])
    if p.mode != ROPE_VISION:
        return numbers, which
    # each section's frequencies begin anew, but for those that begin where another one did: ggml finds that one first
    powers = numbers
    for i, start in enumerate(starts):
        if start not in starts[:i]:
            powers = torch.where(which == i, sector - start, powers)
    return powers, which


def _extrapolated(p: Rope, numbers: Tensor) -> Tensor:
    """How much of each pair's angle YaRN takes unscaled: all of the fast ones, nothing of the slow ones.

    Computed in ggml's precision and with C's comparisons, so that parameters that make no sense (a context of no
    tokens, whose logarithm is -inf) give what they give in ggml (ggml_rope_yarn_corr_dims, rope_yarn_ramp).
    """

    def pair(turns: float) -> float:
        """The pair that turns so often within the context that the model was trained with."""
        context = np.float32(p.n_ctx_orig) / (np.float32(turns) * 2 * np.float32(np.pi))
        return float(np.float32(p.n_dims) * np.log(context) / (2 * np.log(np.float32(p.freq_base))))

    with np.errstate(all="ignore"):
        start, end = float(np.floor(pair(p.beta_fast))), float(np.ceil(pair(p.beta_slow)))
    low, high = _larger(0, start), _smaller(p.n_dims - 1, end)
    slow = ((numbers - low) / _larger(RAMP, high - low)).clamp(0, 1)
    share: Tensor = (1 - slow) * p.ext_factor
    return share


def _larger(a: float, b: float) -> float:
    """C's MAX: ``b`` where one of them is no number."""
    return a if a > b else b


def _smaller(a: float, b: float) -> float:
    """C's MIN: ``b`` where one of them is no number."""
    return a if a < b else b


def alibi(heads: int, max_bias: float, device: torch.device) -> Tensor:
    """The slope of each head's linear bias: [heads, 1, 1]."""
    log2 = 1 << (heads.bit_length() - 1)
    m0, m1 = 2.0 ** (-max_bias / log2), 2.0 ** (-max_bias / 2 / log2)
    head = torch.arange(heads, device=device, dtype=torch.float32)
    slopes = torch.where(head < log2, torch.pow(m0, head + 1), torch.pow(m1, 2 * (head - log2) + 1))
    return slopes.reshape(-1, 1, 1)


def _bias(scores: torch.Size, mask: Tensor, max_bias: float) -> Tensor:
    """``mask`` for ``scores`` [n, heads, queries, keys]: it repeats over batch and heads, times the heads' slopes."""
    batch, heads, queries, keys = scores
    mask = repeat_to(mask[:, :, :queries], (keys, queries, heads, batch))
    return mask * alibi(heads, max_bias, mask.device).to(mask.dtype) if max_bias > 0 else mask


def _weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of ``scores``; a head's sink takes its share and gives nothing."""
    if sinks is None:
        return torch.softmax(scores, -1)
    column = sinks.to(scores.dtype).reshape(-1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]


def _soft_max(v: Value[SoftMax], x: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
    p = v.params
    scores = x * p.scale if p.scale != 1 else x
    return _weights(scores if mask is None else scores + _bias(x.shape, mask, p.max_bias), sinks)


def _spread(x: Tensor, heads: int) -> Tensor:
    """Heads of keys or values, each for several consecutive ones of the queries."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _heads_at_once(heads: int, k: Tensor, value: Tensor) -> int:
    """For how many heads of the queries keys and values may be spread: all, or so many that they share a head of the
    keys or have whole ones."""
    groups = k.shape[1]
    each = heads // groups
    size = k.shape[0] * k.shape[2] * (k.shape[3] + value.shape[3])
    if groups == heads or heads * size <= SPREAD:
        return heads
    room = max(1, SPREAD // size)
    if room >= each:
        return room // each * each
    return max(n for n in range(1, min(room, each) + 1) if each % n == 0)


def _attend(
    p: Attention | FlashAttn,
    q: Tensor,
    k: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    mix: Mix | None = None,
) -> Tensor:
    """[n, heads, queries, head] and [n, groups, keys, head] → [n, heads, queries, head]; ``mix``: if not as usual."""
    batch, heads, queries = q.shape[:3]
    if sinks is None and not p.max_bias and (mask is None or mask.shape[1] in (1, heads)):
        some = _heads_at_once(heads, k, value)
        if some < heads:
            result = q.new_empty(batch, heads, queries, value.shape[3])
            for start in range(0, heads, some):
                checkpoint()
                mine = slice(start * k.shape[1] // heads, -(-(start + some) * k.shape[1] // heads))
                its = slice(start, start + some)
                bias = mask if mask is None or mask.shape[1] == 1 else mask[:, its]
                result[:, its] = _attend(p, q[:, its], k[:, mine], value[:, mine], bias, None, softcap, mix)
            return result
    k, value = _spread(k, heads), _spread(value, heads)
    if mask is not None:
        mask = mask[:, :, :queries]
    repeats = mask is not None and any(n not in (1, want) for n, want in zip(mask.shape, (batch, heads), strict=False))
    explicit = bool(softcap) or sinks is not None or mix is not None
    if not (explicit or repeats or p.max_bias > 0):
        return _softmaxed(p.scale, q, k, value, mask)
    some = max(1, SCORES // (batch * heads * k.shape[2]))
    parts = []
    for start in range(0, queries, some):
        checkpoint()
        part = q[:, :, start : start + some]
        bias = None
        if mask is not None:
            bias = _bias(part.shape[:3] + k.shape[2:3], mask[:, :, start : start + some], p.max_bias)
        if explicit:
            parts.append((mix or _mixed)(_scores(p.scale, part, k, bias, softcap), value, sinks))
        else:
            parts.append(_softmaxed(p.scale, part, k, value, bias))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _softmaxed(scale: float, q: Tensor, k: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """torch's own attention, of rows that lie where its kernels can read them."""
    q, k, value = map(_readable, (q, k, value))
    return F.scaled_dot_product_attention(q, k, value, attn_mask=mask, scale=scale)


def _readable(x: Tensor) -> Tensor:
    """``x``, copied where a GPU's attention kernels can't read it as it lies. (Of heads that are no multiple of what is
    read at once, torch knows that, and computes otherwise.)"""
    step = READ_AT_ONCE // x.element_size()
    if x.device.type == "cpu" or x.shape[-1] % step:
        return x
    fits = x.stride(-1) == 1 and not any(place % step for place in (x.storage_offset(), *x.stride()[:-1]))
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _scores(scale: float, q: Tensor, k: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    """Of all queries and keys: [n, heads, queries, keys]."""
    scores = q @ k.mT * (scale / (softcap or 1.0))
    if softcap:
        scores = torch.tanh(scores) * softcap
    return scores if bias is None else scores + bias


def _mixed(scores: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
    """The values of all keys, each query's by its scores: for what torch has no kernel."""
    weights = _weights(scores, sinks)
    if sinks is None:  # a query that sees nothing gets nothing
        weights = weights.masked_fill(scores.amax(-1, keepdim=True) == -math.inf, 0)
    return weights @ value


def _mixed_in_halves(scores: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
    """As :func:`_mixed`, added up as ggml's CPU backend does it where values are F16: key after key, in F16, each by
    how far it is from the largest score so far; what there is already is made smaller when a larger one comes. (Where a
    processor has AVX512-FP16, ggml rounds these factors as well for heads of 128 and more: not here.)"""
    largest = scores.cummax(-1).values
    before = F.pad(largest[..., :-1], (1, 0), value=-math.inf)
    hidden = largest == -math.inf
    smaller = torch.exp(before - largest).masked_fill(hidden, 1)
    shares = torch.exp(scores - largest).masked_fill(hidden, 0)
    total = torch.zeros(1, device=value.device)
    for x, factor, share in zip(value.unbind(2), smaller.unbind(-1), shares.unbind(-1), strict=True):
        checkpoint()
        total = (total * factor[..., None]).half().float()
        total = torch.addcmul(total, share[..., None], x[:, :, None]).half().float()
    size = torch.exp(scores - largest[..., -1:]).sum(-1, keepdim=True)
    if sinks is not None:
        size = size + torch.exp(sinks.reshape(-1, 1, 1) - largest[..., -1:])
    return torch.where(hidden[..., -1:], 0, total / size)


def _attention(v: Value[Attention], q: Tensor, k: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    return _attend(v.params, q, k, value, mask)


def _flash_attn(
    v: Value[FlashAttn],
    q: Tensor,
    k: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    mix: Mix | None = None,
) -> Tensor:
    """As :func:`_attend`, with the heads of a query together: [n, queries, heads, head]."""
    p = v.params
    return _attend(p, q, k, value, mask, sinks, p.logit_softcap, mix).transpose(1, 2)


def _flash_attn_f16_sums(
    v: Value[FlashAttn],
    q: Tensor,
    k: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    return _flash_attn(v, q, k, value, mask, sinks, _mixed_in_halves)


KERNELS: tuple[Kernel, ...] = (
    kernel("ROPE", Rope, rope),
    kernel("SOFT_MAX", SoftMax, _soft_max, Autocast.FOLLOWS),
    kernel(EngineOp.ATTENTION, Attention, _attention, Autocast.NARROW),
    kernel("FLASH_ATTN_EXT", FlashAttn, _flash_attn, Autocast.NARROW, rounds=(1, 0)),
    kernel(EngineOp.FLASH_ATTN_F16_SUMS, FlashAttn, _flash_attn_f16_sums),
)
