"""Recurrences over tokens: state space models, RWKV, gated attention; and triangular systems.

Each loops over tokens, as nothing shorter gives ggml's numbers; everything else, sequences and heads, at once. Results
are one tensor: what comes out for each token, then states.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from sdrpc.ggml.params import LinearAttention, NoParams, States

from ...deadline import checkpoint
from ...dtypes import shape_of
from ...values import Value
from ..base import Kernel, kernel, within


def _joined(v: Value, outputs: list[Tensor], states: Iterable[Tensor]) -> Tensor:
    """``outputs`` of the tokens, [sequences, …] each, and then ``states``, as one dense value. States before the first
    token, which ggml leaves undefined, are zero."""
    tokens = [torch.stack(outputs, 1)] if outputs else []
    flat = torch.cat([part.reshape(-1) for part in (*tokens, *states)])
    return F.pad(flat, (0, prod(v.ne) - len(flat))).reshape(shape_of(v.ne))


def _history(states: int) -> deque[Tensor]:
    """For the last ``states`` states (at least one), the last one first."""
    return deque(maxlen=max(states, 1))


def _ssm_conv(v: Value, x: Tensor, kernel: Tensor) -> Tensor:
    """[1, sequences, channels, taps - 1 + tokens] → [1, sequences, tokens, channels]: taps for each channel."""
    channels, taps = kernel.shape[2:]
    return F.conv1d(x[0], kernel.reshape(channels, 1, taps), groups=channels).mT.reshape(shape_of(v.ne))


def _ssm_scan(
    v: Value[States], states: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, rows: Tensor
) -> Tensor:
    """Mamba's selective scan: h ← h · exp(dt A) + dt x Bᵀ, y = h C, where dt has gone through softplus.

    ``x`` [sequences, tokens, heads, width], ``dt`` [1, sequences, tokens, heads], ``b`` and ``c`` [sequences, tokens,
    groups, size] of which each serves several heads, ``a`` [1, 1, heads, size] (Mamba-1) or [1, 1, heads, 1] (Mamba-2).
    Sequence i starts from ``states[rows[i]]`` [heads, width, size].
    """
    p = v.params
    sequences, tokens, heads, width = x.shape
    _, _, groups, size = b.shape
    grouped = (sequences, groups, heads // groups)
    state = states[within(rows.reshape(-1).long(), states.shape[0])].reshape(*grouped, width, size)
    step = F.softplus(dt[0])
    inputs, a = x * step[..., None], a[0, 0]
    outputs, history = [], _history(p.states)
    for t in range(tokens):
        checkpoint()
        decay = torch.exp(step[:, t, :, None] * a).reshape(*grouped, 1, -1)
        state = state * decay + inputs[:, t].reshape(*grouped, width, 1) * b[:, t, :, None, None]
        outputs.append((state @ c[:, t, :, None, :, None])[..., 0])
        history.appendleft(state)
    return _joined(v, outputs, history)


def _sequences(state: Tensor, *tokens: Tensor) -> tuple[Tensor, ...]:
    """The tokens of all sequences, [1, sequences · n, heads, size], as [sequences, n, heads, size]; and the states
    [sequences, heads, size, size]."""
    _, _, heads, size = tokens[0].shape
    split = [one.reshape(state.shape[2], -1, heads, size) for one in tokens]
    return (state.reshape(-1, heads, size, size), *split)


def _wkv6(
    v: Value, key: Tensor, value: Tensor, receptance: Tensor, first: Tensor, decay: Tensor, state: Tensor
) -> Tensor:
    """y = r (S + first · kᵀv), S ← decay · S + kᵀv: rows of S go with keys, columns with values."""
    h, key, value, receptance, decay = _sequences(state, key, value, receptance, decay)
    bonus = first.reshape(*key.shape[2:], 1)
    outputs = []
    for t in range(key.shape[1]):
        checkpoint()
        new = key[:, t, :, :, None] * value[:, t, :, None]
        outputs.append((receptance[:, t, :, None] @ torch.addcmul(h, bonus, new))[:, :, 0])
        h = torch.addcmul(new, decay[:, t, :, :, None], h)
    return _joined(v, outputs, [h])


def _wkv7(
    v: Value, receptance: Tensor, decay: Tensor, key: Tensor, value: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> Tensor:
    """S ← S · decay + vᵀk + (S a)ᵀb, y = S r: rows of S go with values, columns with keys."""
    h, receptance, decay, key, value, a, b = _sequences(state, receptance, decay, key, value, a, b)
    outputs = []
    for t in range(key.shape[1]):
        checkpoint()
        removed = h @ a[:, t, :, :, None]
        h = h * decay[:, t, :, None] + value[:, t, :, :, None] * key[:, t, :, None] + removed * b[:, t, :, None]
        outputs.append((h @ receptance[:, t, :, :, None])[..., 0])
    return _joined(v, outputs, [h])


def _gated_linear_attn(
    v: Value[LinearAttention], key: Tensor, value: Tensor, query: Tensor, gate: Tensor, state: Tensor
) -> Tensor:
    """S ← gate · S + kᵀv, y = scale · q S: rows of S go with keys, columns with values."""
    p = v.params
    h, key, value, query, gate = _sequences(state, key, value, query * p.scale, gate)
    outputs = []
    for t in range(key.shape[1]):
        checkpoint()
        h = torch.addcmul(key[:, t, :, :, None] * value[:, t, :, None], gate[:, t, :, :, None], h)
        outputs.append((query[:, t, :, None] @ h)[:, :, 0])
    return _joined(v, outputs, [h])


def _gated_delta_net(
    v: Value[States], query: Tensor, key: Tensor, value: Tensor, gate: Tensor, beta: Tensor, state: Tensor
) -> Tensor:
    """S ← exp(gate) · S, then S ← S + beta (v - S k)ᵀk, y = S q / √size: rows of S go with values, columns with keys.

    All but ``state`` are [sequences, tokens, heads, size]; queries and keys of fewer heads or sequences repeat (heads
    in turn, sequences several times each). The gate is one number a head, or one for each column.
    """
    p = v.params
    sequences, tokens, heads, size = value.shape
    query, key = (
        one.repeat_interleave(sequences // one.shape[0], 0).repeat(1, 1, heads // one.shape[2], 1)[..., None]
        for one in (query * size**-0.5, key)
    )
    decay = gate.exp()[:, :, :, None]
    h = state.reshape(sequences, heads, size, size)
    outputs, history = [], _history(p.states)
    for t in range(tokens):
        checkpoint()
        h = h * decay[:, t]
        error = (value[:, t, ..., None] - h @ key[:, t]) * beta[:, t, ..., None]
        h = torch.addcmul(h, error, key[:, t].mT)
        outputs.append((h @ query[:, t])[..., 0])
        history.appendleft(h)
    return _joined(v, outputs, history)


def _solve_tri(_v: Value, a: Tensor, b: Tensor) -> Tensor:
    """x with a · x = b, where ``a`` is lower triangular: what is above its diagonal is not read."""
    solution: Tensor = torch.linalg.solve_triangular(a, b, upper=False)
    return solution


KERNELS: tuple[Kernel, ...] = (
    kernel("SSM_CONV", NoParams, _ssm_conv),
    kernel("SSM_SCAN", States, _ssm_scan),
    kernel("RWKV_WKV6", NoParams, _wkv6),
    kernel("RWKV_WKV7", NoParams, _wkv7),
    kernel("GATED_LINEAR_ATTN", LinearAttention, _gated_linear_attn),
    kernel("GATED_DELTA_NET", States, _gated_delta_net),
    kernel("SOLVE_TRI", NoParams, _solve_tri),
)
