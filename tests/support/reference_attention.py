"""The reference of rotations, softmax, attention and products by number: naive, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from sdrpc.ggml.tensor import Tensor

Array = np.ndarray[Any, Any]

NORMAL, MROPE, VISION, IMROPE = 0, 8, 24, 40


def _softmax(x: Array, sinks: Array | None = None) -> Array:
    """Over rows of [n, heads, queries, keys], which share with their head's sink."""
    with np.errstate(invalid="ignore"):  # a row of nothing but -inf is NaN, as in ggml
        most = x.max(axis=3, keepdims=True)
        if sinks is None:
            powers = np.exp(x - most)
            return powers / powers.sum(axis=3, keepdims=True)
        column = sinks.reshape(1, -1, 1, 1)
        most = np.maximum(most, column)
        powers = np.exp(x - most)
        return powers / (powers.sum(axis=3, keepdims=True) + np.exp(column - most))


def _slopes(heads: int, max_bias: float) -> Array:
    """ALiBi: one slope a head, shaped to multiply (batch, head, row, column)."""
    if max_bias == 0:
        return np.ones((1, heads, 1, 1))
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-max_bias / power * (h + 1)) for h in range(power)]
    slopes += [2 ** (-max_bias / 2 / power * (2 * h + 1)) for h in range(heads - power)]
    return np.array(slopes)[None, :, None, None]


def _mask(mask: Array | None, shape: tuple[int, ...], max_bias: float) -> Array | float:
    if mask is None:
        return 0.0
    tiled = np.tile(mask[:, :, : shape[2]], (shape[0] // mask.shape[0], shape[1] // mask.shape[1], 1, 1))
    return _slopes(shape[1], max_bias) * tiled


def _soft_max(node: Tensor, x: Array, mask: Array | None = None, sinks: Array | None = None) -> Array:
    return _softmax(x * node.params.scale + _mask(mask, x.shape, node.params.max_bias), sinks)


def _flash_attn(
    node: Tensor, q: Array, k: Array, v: Array, mask: Array | None = None, sinks: Array | None = None
) -> Array:
    scale, max_bias, softcap, _ = node.params
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = scale * (q @ k.swapaxes(2, 3))
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    scores = scores + _mask(mask, scores.shape, max_bias)
    weights = np.where(scores.max(axis=3, keepdims=True) == -np.inf, 0.0, _softmax(scores, sinks))
    return (weights @ v).swapaxes(1, 2)


def _rope(node: Tensor, x: Array, positions: Array, factors: Array | None = None, sign: float = 1.0) -> Array:
    """Pair by pair, each angle out of the one before, as ggml does it."""
    p = node.params
    pairs = p.n_dims if p.mode == VISION else p.n_dims // 2
    tokens = x.shape[1]
    result = x.copy()
    for t in range(tokens):
        at = [float(positions[0, 0, 0, t + i * tokens]) for i in range(4 if p.mode & MROPE else 1)]
        for j, angle in enumerate(_angles(p, pairs, at)):
            angle = angle / (1.0 if factors is None else factors[0, 0, 0, j])
            angle, magnitude = _stretched(p, j, angle)
            cos, sin = math.cos(angle) * magnitude, math.sin(angle) * magnitude * sign
            first = p.n_offset + (2 * j if p.mode == NORMAL else j)
            second = first + (1 if p.mode == NORMAL else pairs)
            a, b = x[:, t, :, first], x[:, t, :, second]
            result[:, t, :, first], result[:, t, :, second] = a * cos - b * sin, a * sin + b * cos
    return result


def _angles(p: Any, pairs: int, at: list[float]) -> list[float]:
    step = p.freq_base ** (-2 / p.n_dims)
    angles, current = [], list(at)
    sections = (p.section0, p.section1, p.section2, p.section3)
    starts = [sum(sections[:i]) for i in range(4)]
    for j in range(pairs):
        kind = 0
        if p.mode & MROPE:
            sector = j % sum(sections)
            if p.mode == VISION and sector in starts:
                begun = starts.index(sector)
                current[begun] = at[begun]
            if p.mode == IMROPE:
                kind = sector % 3 if sector < 3 * sections[sector % 3] else 3
            else:
                kind = sum(sector >= start for start in starts[1:])
        angles.append(current[kind])
        current = [angle * step for angle in current]
    return angles


def _stretched(p: Any, j: int, angle: float) -> tuple[float, float]:
    """The angle and the magnitude that YaRN makes of it."""
    if p.ext_factor == 0:
        return angle * p.freq_scale, p.attn_factor

    def turning(turns: float) -> float:
        with np.errstate(all="ignore"):  # a context of no tokens is -inf
            return float(p.n_dims * np.log(p.n_ctx_orig / np.float64(turns * 2 * math.pi)) / (2 * np.log(p.freq_base)))

    low, high = max(0, np.floor(turning(p.beta_fast))), min(p.n_dims - 1, np.ceil(turning(p.beta_slow)))
    mix = (1 - min(1, max(0, (j - low) / max(0.001, high - low)))) * p.ext_factor
    stretched = angle * p.freq_scale * (1 - mix) + angle * mix
    return stretched, p.attn_factor * (1 + 0.1 * math.log(1 / p.freq_scale))


def _mul_mat_id(node: Tensor, a: Array, b: Array, ids: Array) -> Array:
    _, tokens, rows, _ = b.shape
    used = ids.shape[3]
    return np.array([[
        [a[0, ids[0, 0, t, i]] @ b[0, t, i % rows] for i in range(used)] for t in range(tokens)
    ]])  # fmt: skip


def _add_id(node: Tensor, a: Array, b: Array, ids: Array) -> Array:
    return a + b[0, 0, ids[0, 0]]


OPS: dict[str, Callable[..., Array]] = {
    "ROPE": _rope, "ROPE_BACK": lambda *arguments: _rope(*arguments, sign=-1.0), "SOFT_MAX": _soft_max,
    "FLASH_ATTN_EXT": _flash_attn, "MUL_MAT_ID": _mul_mat_id, "ADD_ID": _add_id,
}  # fmt: skip
