"""The reference of recurrences, hyper-connections and what training needs: naive, token by token, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sdrpc.ggml.tensor import Tensor

Array = np.ndarray[Any, Any]


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _ssm_conv(node: Tensor, x: Array, kernel: Array) -> Array:
    taps = kernel.shape[3]
    tokens = x.shape[3] - taps + 1
    columns = [(x[0, :, :, t : t + taps] * kernel[0, 0]).sum(-1) for t in range(tokens)]
    return np.stack(columns, 1)[None]


def _ssm_scan(node: Tensor, states: Array, x: Array, dt: Array, a: Array, b: Array, c: Array, rows: Array) -> Array:
    sequences, tokens, heads, _ = x.shape
    outputs = np.zeros(x.shape)
    kept = np.zeros((max(node.params.states, 1), sequences, *states.shape[1:]))
    share = heads // b.shape[2]
    for n, t, h in np.ndindex(sequences, tokens, heads):
        if t == 0:
            kept[0, n, h] = states[rows[0, 0, 0, n], h]
        elif h == 0:
            kept[1:, n] = kept[:-1, n]
        step = np.log1p(np.exp(dt[0, n, t, h]))
        kept[0, n, h] *= np.exp(step * a[0, 0, h])
        kept[0, n, h] += np.outer(x[n, t, h] * step, b[n, t, h // share])
        outputs[n, t, h] = kept[0, n, h] @ c[n, t, h // share]
    return _joined(node, outputs, kept)


def _joined(node: Tensor, outputs: Array, states: Array) -> Array:
    return np.concatenate([outputs.ravel(), states.ravel()]).reshape(node.ne[::-1])


Step = Callable[..., tuple[Array, Array]]


def _attention(step: Step) -> Callable[..., Array]:
    """``step`` of one head: its state and the vectors of a token → output and new state. The last source is the state
    of all sequences."""

    def apply(node: Tensor, *sources: Array) -> Array:
        *vectors, state = sources
        _, total, heads, size = vectors[0].shape
        sequences = state.shape[2]
        states = state.reshape(sequences, heads, size, size).copy()
        outputs = np.zeros((total, heads, size))
        for t, h in np.ndindex(total, heads):
            n = t // (total // sequences)
            rows = [vector[0, t if vector.shape[1] == total else 0, h] for vector in vectors]
            outputs[t, h], states[n, h] = step(node, states[n, h], *rows)
        return _joined(node, outputs, states)

    return apply


def _wkv6(node: Tensor, s: Array, k: Array, v: Array, r: Array, first: Array, decay: Array) -> tuple[Array, Array]:
    new = np.outer(k, v)
    return r @ (s + first[:, None] * new), s * decay[:, None] + new


def _wkv7(
    node: Tensor, s: Array, r: Array, decay: Array, k: Array, v: Array, a: Array, b: Array
) -> tuple[Array, Array]:
    s = s * decay + np.outer(v, k) + np.outer(s @ a, b)
    return s @ r, s


def _gated(node: Tensor, s: Array, k: Array, v: Array, q: Array, gate: Array) -> tuple[Array, Array]:
    s = s * gate[:, None] + np.outer(k, v)
    return node.params.scale * q @ s, s


def _delta(node: Tensor, query: Array, key: Array, value: Array, gate: Array, beta: Array, state: Array) -> Array:
    sequences, tokens, heads, size = value.shape
    kept = np.zeros((max(node.params.states, 1), sequences, heads, size, size))
    kept[0] = state.reshape(kept.shape[1:])
    outputs = np.zeros(value.shape)
    for n, t, h in np.ndindex(sequences, tokens, heads):
        if t and not h:
            kept[1:, n] = kept[:-1, n]
        q, k = (x[n // (sequences // x.shape[0]), t, h % x.shape[2]] for x in (query, key))
        s = kept[0, n, h] * np.exp(gate[n, t, h])
        s = kept[0, n, h] = s + np.outer((value[n, t, h] - s @ k) * beta[n, t, h], k)
        outputs[n, t, h] = s @ q / np.sqrt(size)
    return _joined(node, outputs, kept)


def _solve_tri(node: Tensor, a: Array, b: Array) -> Array:
    return np.linalg.solve(np.tril(a), b)


def _indexer(node: Tensor, query: Array, key: Array, weights: Array, mask: Array) -> Array:
    scores = np.maximum(np.einsum("sthe,ske->sthk", query, key[:, :, 0]), 0)
    repeated = np.tile(mask, (query.shape[0] // mask.shape[0], 1, 1, 1))
    return np.einsum("sthk,sth->stk", scores, weights[:, 0])[:, None] + repeated


def _mixing(node: Tensor, mixes: Array, scale: Array, base: Array) -> Array:
    eps, rounds = node.params
    n = node.ne[0]
    logits = mixes[0, 0, :, 2 * n :] * scale[0, 0, 0, 2] + base[0, 0, 0, 2 * n :]
    matrix = _softmax(logits.reshape(-1, n, n)) + eps
    for i in range(2 * rounds - 1):
        matrix = matrix / (matrix.sum(2 if i % 2 else 1, keepdims=True) + eps)
    return matrix[None]


def _gather(node: Tensor, x: Array, weights: Array) -> Array:
    if node.params.gated:
        return node.params.scale * (x * _sigmoid(weights)).sum(2)[None]
    return np.einsum("the,th->te", x[0], weights[0, 0])[None, None]


def _spread(node: Tensor, x: Array, residual: Array, post: Array, mixing: Array | None = None) -> Array:
    mixed = residual[0] if mixing is None else np.einsum("tfe,tfi->tie", residual[0], mixing[0])
    return (np.einsum("te,ti->tie", x[0, 0], post[0, 0]) + mixed)[None]


def _silu_back(node: Tensor, gradient: Array, x: Array) -> Array:
    return gradient * (_sigmoid(x) + x * _sigmoid(x) * _sigmoid(-x))


def _rms_norm_back(node: Tensor, gradient: Array, x: Array) -> Array:
    length = np.sqrt((x**2).mean(-1, keepdims=True) + node.params.eps)
    return gradient / length - x * (x * gradient).mean(-1, keepdims=True) / length**3


def _soft_max_back(node: Tensor, gradient: Array, y: Array) -> Array:
    return node.params.scale * (y * gradient - y * (y * gradient).sum(-1, keepdims=True))


def _repeat_back(node: Tensor, x: Array) -> Array:
    result = np.zeros(node.ne[::-1])
    for place in np.ndindex(x.shape):
        result[tuple(i % n for i, n in zip(place, result.shape, strict=True))] += x[place]
    return result


def _get_rows_back(node: Tensor, rows: Array, numbers: Array) -> Array:
    result = np.zeros(node.ne[::-1])
    np.add.at(result[0, 0], numbers.ravel(), rows[0, 0, : numbers.size])
    return result


def _loss(node: Tensor, logits: Array, wanted: Array) -> Array:
    rows = logits[..., 0].size
    return np.full((1, 1, 1, 1), -(np.log(_softmax(logits)) * wanted).sum() / rows)


def _loss_back(node: Tensor, gradient: Array, logits: Array, wanted: Array) -> Array:
    return (_softmax(logits) - wanted) * gradient / logits[..., 0].size


def _sgd(node: Tensor, weight: Array, gradient: Array, rates: Array) -> Array:
    rate, decay = rates.ravel()
    return weight - rate * (gradient + decay * weight)


def adamw_moments(weight: Array, gradient: Array, mean: Array, square: Array, params: Array) -> dict[int, Array]:
    """The moments that OPT_STEP_ADAMW writes over its sources 2 and 3 before it uses them."""
    _, first, second, *_ = params.ravel()
    return {2: first * mean + (1 - first) * gradient, 3: second * square + (1 - second) * gradient**2}


def _adamw(node: Tensor, weight: Array, gradient: Array, mean: Array, square: Array, params: Array) -> Array:
    rate, _, _, eps, decay, mean_scale, square_scale = params.ravel()
    return (1 - rate * decay) * weight - rate * (mean * mean_scale) / (np.sqrt(square * square_scale) + eps)


def _im2col_back(node: Tensor, columns: Array, kernel: Array) -> Array:
    s0, s1, p0, p1, d0, d1, is_2d = node.params
    image = np.zeros(node.ne[::-1])
    if not is_2d:
        columns, kernel, image, s1, p1, d1 = columns[0][:, None], kernel[0][:, :, None], image[0][:, :, None], 1, 0, 1
    _, channels, height, width = image.shape
    k1, k0 = kernel.shape[2:]
    for n, y, x in np.ndindex(columns.shape[:3]):
        for c, i, j in np.ndindex(channels, k1, k0):
            row, column = y * s1 + i * d1 - p1, x * s0 + j * d0 - p0
            if 0 <= row < height and 0 <= column < width:
                image[n, c, row, column] += columns[n, y, x, (c * k1 + i) * k0 + j]
    return image.reshape(node.ne[::-1])


def _pool_2d_back(node: Tensor, gradient: Array, image: Array) -> Array:
    op, k0, k1, s0, s1, p0, p1 = node.params
    result = np.zeros(image.shape)
    for n, c, y, x in np.ndindex(gradient.shape):
        rows = range(max(y * s1 - p1, 0), min(y * s1 - p1 + k1, image.shape[2]))
        columns = range(max(x * s0 - p0, 0), min(x * s0 - p0 + k0, image.shape[3]))
        window = (n, c, slice(rows.start, rows.stop), slice(columns.start, columns.stop))
        if op:
            result[window] += gradient[n, c, y, x] / (k0 * k1)
        else:
            i, j = np.unravel_index(image[window].argmax(), image[window].shape)
            result[n, c, rows[i], columns[j]] += gradient[n, c, y, x]
    return result


OPS: dict[str, Callable[..., Array]] = {
    "SSM_CONV": _ssm_conv, "SSM_SCAN": _ssm_scan, "RWKV_WKV6": _attention(_wkv6), "RWKV_WKV7": _attention(_wkv7),
    "GATED_LINEAR_ATTN": _attention(_gated), "GATED_DELTA_NET": _delta, "SOLVE_TRI": _solve_tri,
    "LIGHTNING_INDEXER": _indexer, "DSV4_HC_COMB": _mixing, "DSV4_HC_PRE": _gather, "DSV4_HC_POST": _spread,
    "SILU_BACK": _silu_back, "RMS_NORM_BACK": _rms_norm_back, "SOFT_MAX_BACK": _soft_max_back,
    "REPEAT_BACK": _repeat_back, "GET_ROWS_BACK": _get_rows_back, "CROSS_ENTROPY_LOSS": _loss,
    "CROSS_ENTROPY_LOSS_BACK": _loss_back, "OPT_STEP_SGD": _sgd, "OPT_STEP_ADAMW": _adamw, "IM2COL_BACK": _im2col_back,
    "POOL_2D_BACK": _pool_2d_back,
}  # fmt: skip
