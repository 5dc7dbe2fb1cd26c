"""Attention: softmax(q kᵀ · scale + mask) v."""

# ruff: noqa: ARG001  all rules are called alike, whether or not they need what they get

from __future__ import annotations

import math
from math import prod

import numpy as np

from ...errors import CaptureError
from ...ggml.params import FlashAttn, SoftMax
from ..emitter import Emitter, Shape, Value
from .base import RULES, Out, rule

FAR = 1e9
"""How much a masked attention score is lowered: far enough that its exponential is zero."""

MAX_SCORES = 1 << 30
"""Bytes of scores (F32) that exist at once where there is no FLASH_ATTN_EXT: more are computed for one part of the
queries after the other. Scores and their softmax lie side by side in the graph's scratch memory, and Vulkan's drivers
give no buffer beyond 4 GiB (some none beyond 2)."""


@rule("scaled_dot_product_attention")
def attention(
    e: Emitter, out: Out, query: Value, key: Value, value: Value, attn_mask: Value | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Value:  # fmt: skip
    """[…, T, D] by heads; leading dimensions are merged into one of batches when there are more than two."""
    if dropout_p:
        raise CaptureError("dropout in training: call eval() on the module")
    batch, (steps, width), seen = query.shape[:-2], query.shape[-2:], key.shape[-2]
    scale = 1 / math.sqrt(width) if scale is None else scale
    if is_causal:
        attn_mask = e.constant(np.tril(np.ones((steps, seen), bool)))
    rank4 = (*(1,) * (2 - len(batch)), *batch) if len(batch) <= 2 else (prod(batch[:-1]), batch[-1])

    def four(x: Value) -> Value:
        leading = rank4 if x.shape[:-2] == batch else (rank4[0], x.shape[-3])
        return e.reshape(x, (*leading, *x.shape[-2:]))

    mask = None if attn_mask is None else _mask_of_rank_4(e, attn_mask, batch, rank4, (steps, seen))
    attend = _flash if "FLASH_ATTN_EXT" in e.target.ops else _in_chunks
    result = attend(e, four(query), four(key), four(value), mask, scale)
    if attn_mask is not None and attn_mask.kind == "b" and attn_mask.array is None:
        result = e.binary("MUL", result, _seeing(e, attn_mask, batch, rank4))
    return e.reshape(result, out.shape)


def _seeing(e: Emitter, mask: Value, batch: Shape, merged: Shape) -> Value:
    """1 for each query that sees a key, and 0 for those of padding, whose attention is 0 in torch."""
    shape = (*mask.shape[:-1], 1)
    return _mask_of_rank_4(e, RULES["any"](e, Out(shape, "b"), mask, -1, True), batch, merged, shape[-2:])


def _mask_of_rank_4(e: Emitter, mask: Value, batch: Shape, merged: Shape, size: Shape) -> Value:
    known = mask.array
    mask = e.expand(mask, (*mask.shape[:-2], *size)) if known is None else _constant_mask(e, known, size)
    if len(mask.shape) > 4 or (len(batch) == 1 and len(mask.shape) == 3):
        return e.reshape(e.expand(mask, (*batch, *size)), (*merged, *size))
    return e.reshape(mask, (*(1,) * (4 - len(mask.shape)), *mask.shape))


def _constant_mask(e: Emitter, mask: np.ndarray, size: Shape) -> Value:
    """A known mask as numbers to add, no larger than it has to be: equal batches and heads become one."""
    numbers = np.where(mask, np.float32(0), np.float32(-np.inf)) if mask.dtype == bool else mask
    numbers = np.broadcast_to(numbers, (*numbers.shape[:-2], *size) if numbers.ndim >= 2 else size)
    for axis in range(numbers.ndim - 2):
        first = np.take(numbers, [0], axis)
        if numbers.shape[axis] > 1 and (numbers == first).all():
            numbers = first
    return e.constant(np.ascontiguousarray(numbers), "f")


def _added_mask(e: Emitter, mask: Value) -> Value:
    return e.scale(mask, FAR, -FAR) if mask.kind == "b" else e.f32(mask)


def _flash(e: Emitter, q: Value, k: Value, v: Value, mask: Value | None, scale: float) -> Value:
    """With the mask as F32: only our own devices get this operation from us, and they take it exactly."""
    rows = [x if x.tensor.nb[0] == x.tensor.type.size else e.contiguous(x) for x in map(e.f32, (q, k, v))]
    operands = [x.tensor for x in rows] + ([] if mask is None else [e.contiguous(_added_mask(e, mask)).tensor])
    heads = e.node("FLASH_ATTN_EXT", *operands, params=FlashAttn(scale, prec=e.prec))
    batch, n, steps, _ = q.shape
    return e.transpose(Value(heads, (batch, steps, n, v.shape[-1])), 1, 2)


def _in_chunks(e: Emitter, q: Value, k: Value, v: Value, mask: Value | None, scale: float) -> Value:
    """Scores of as many queries at a time as :data:`MAX_SCORES` allows, in chunks of nearly one size."""
    batch, heads, steps, _ = q.shape
    row = 4 * batch * heads * k.shape[-2]
    chunks = -(-steps * row // MAX_SCORES)
    length = -(-steps // min(chunks, steps))
    mask, seeing = _without_blind_rows(e, mask)
    parts = []
    for start in range(0, steps, length):
        n = min(length, steps - start)
        rows = None if mask is None else e.slice(mask, 2, start, n)
        parts.append(_soft_max_attention(e, e.slice(q, 2, start, n), k, v, rows, scale))
    result = e.concat(parts, 2)
    return result if seeing is None else e.binary("MUL", result, seeing)


def _without_blind_rows(e: Emitter, mask: Value | None) -> tuple[Value | None, Value | None]:
    """The mask with its blind rows opened, and 1 or 0 for each row to multiply the result with, if there are such.

    A query that sees no key gives zeros in torch, where SOFT_MAX gives NaN. Only a known mask is looked at.
    """
    if mask is None or mask.array is None:
        return mask, None
    blind = np.isneginf(mask.array).min(-1, keepdims=True)
    if not blind.any():
        return mask, None
    opened = np.where(blind, np.float32(0), mask.array)
    return e.constant(np.asarray(opened), "f"), e.constant((~blind).astype(np.float32), "f")


def _soft_max_attention(e: Emitter, q: Value, k: Value, v: Value, mask: Value | None, scale: float) -> Value:
    scores = e.mul_mat(e.f32(k), q)
    operands = [scores.tensor]
    if mask is not None:
        operands.append(e.contiguous(_added_mask(e, mask)).tensor)
    weights = Value(e.node("SOFT_MAX", *operands, params=SoftMax(scale)), scores.shape)
    return e.mul_mat(e.transpose(e.f32(v), -1, -2), weights)
