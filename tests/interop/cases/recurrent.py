"""Recurrences over tokens, and triangular systems."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.interop.cases.base import Builder, Case, draws, sweep

Dims = tuple[int, ...]


def _ssm_conv(b: Builder, channels: int, taps: int, tokens: int, sequences: int, view: str) -> Any:
    x = b.operand(taps - 1 + tokens, channels, sequences, view=view)
    return b.ssm_conv(x, b.x(taps, channels))


def _ssm_scan(
    b: Builder, mamba: int, heads: Dims, width: int, size: int, tokens: int, sequences: int, states: int, view: str
) -> Any:
    n, groups = heads
    state = b.x(size, width, n, sequences + 2)
    x = b.operand(width, n, tokens, sequences, view=view)
    dt = b.x(n, tokens, sequences, low=-4.0, high=2.0)
    a = b.x(size if mamba == 1 else 1, n, low=-1.5, high=-0.1)
    projections = [b.operand(size, groups, tokens, sequences, view=view) for _ in range(2)]
    rows = b.indices(sequences + 2, sequences, unique=True)
    return b.ssm_scan(state, x, dt, a, *projections, rows, states)


def _tokens(b: Builder, size: int, heads: int, tokens: int, sequences: int, **range: float) -> Any:
    return b.x(size, heads, tokens * sequences, **range)


def _wkv6(b: Builder, size: int, heads: int, tokens: int, sequences: int) -> Any:
    key, value, receptance = (_tokens(b, size, heads, tokens, sequences) for _ in range(3))
    decay = _tokens(b, size, heads, tokens, sequences, low=0.2, high=0.99)
    return b.rwkv_wkv6(key, value, receptance, b.x(size, heads), decay, b.x(size * size * heads, sequences))


def _wkv7(b: Builder, size: int, heads: int, tokens: int, sequences: int) -> Any:
    receptance, key, value = (_tokens(b, size, heads, tokens, sequences) for _ in range(3))
    decay = _tokens(b, size, heads, tokens, sequences, low=0.2, high=0.99)
    # a and b take something away from the state: -k̂ and k̂ · rate
    away = b.rng.standard_normal((1, tokens * sequences, heads, size))
    away /= np.linalg.norm(away, axis=-1, keepdims=True)
    taken, given = b.put("F32", -away), b.put("F32", away * b.rng.uniform(0, 1, away.shape))
    return b.rwkv_wkv7(receptance, decay, key, value, taken, given, b.x(size * size * heads, sequences))


def _gated_linear_attn(b: Builder, size: int, heads: int, tokens: int, sequences: int, scale: float) -> Any:
    key, value, query = (_tokens(b, size, heads, tokens, sequences) for _ in range(3))
    gate = _tokens(b, size, heads, tokens, sequences, low=0.2, high=0.99)
    return b.gated_linear_attn(key, value, query, gate, b.x(size * size * heads, sequences), scale)


def _gated_delta_net(
    b: Builder, gates: str, heads: Dims, size: int, tokens: int, sequences: int, states: int, view: str
) -> Any:
    n, of_keys = heads
    query, key = (_unit(b, size, of_keys, tokens, sequences, view) for _ in range(2))
    value = b.operand(size, n, tokens, sequences, view=view)
    gate = b.x(size if gates == "many" else 1, n, tokens, sequences, low=-1.0, high=-0.01)
    beta = b.x(1, n, tokens, sequences, low=0.0)
    return b.gated_delta_net(query, key, value, gate, beta, b.x(size, size, n, sequences), states)


def _unit(b: Builder, size: int, heads: int, tokens: int, sequences: int, view: str) -> Any:
    """Vectors about as long as models have them: longer ones make the states grow without end."""
    return b.operand(size, heads, tokens, sequences, view=view, low=-(size**-0.5), high=size**-0.5)


def _solve_tri(b: Builder, n: int, columns: int, batch: Dims) -> Any:
    """Above the diagonal stands what must not be read."""
    shape = (*reversed(batch), n, n)
    matrix = b.rng.uniform(-1, 1, shape) / n + np.triu(np.full(shape, 7.0), 1)
    matrix += np.eye(n) * b.rng.choice((-1, 1), (*reversed(batch), 1, n)) * 1.5
    return b.solve_tri(b.put("F32", matrix), b.x(columns, n, *batch), True, True, False)


def _recurrences() -> Iterator[Case]:
    yield from sweep(
        "SSM_CONV", _ssm_conv, channels=(1, 6, 33), taps=(1, 2, 4, 9), tokens=(1, 2, 17), sequences=(1, 3),
        view=("dense", "offset"), most=96,
    )  # fmt: skip
    yield from sweep(
        "SSM_SCAN", _ssm_scan, mamba=(1, 2), heads=((1, 1), (4, 1), (4, 2), (3, 3)), width=(1, 5, 8),
        size=(4, 16, 37), tokens=(1, 2, 9), sequences=(1, 3), states=(1, 2, 4), view=("dense", "offset"), most=240,
        where=lambda mamba, tokens, states, **_: states <= tokens and (mamba == 2 or states == 1),
    )  # fmt: skip
    rwkv = {"size": (4, 16, 20, 64), "heads": (1, 3), "tokens": (1, 2, 7), "sequences": (1, 3)}
    yield from sweep("RWKV_WKV6", _wkv6, **rwkv)
    # ggml's vector code is wrong about heads that are no multiple of its step, 64 elements at most
    yield from sweep("RWKV_WKV7", _wkv7, **rwkv | {"size": (64, 128)})
    yield from sweep("GATED_LINEAR_ATTN", _gated_linear_attn, scale=(1.0, 0.125), **rwkv)
    yield from sweep(
        "GATED_DELTA_NET", _gated_delta_net, gates=("one", "many"), heads=((1, 1), (4, 1), (4, 2), (3, 3)),
        size=(4, 16, 20, 64), tokens=(1, 2, 9), sequences=(1, 3), states=(1, 2, 4), view=("dense", "offset", "part"),
        most=240, where=lambda tokens, states, **_: states <= tokens,
    )  # fmt: skip
    yield from sweep(
        "SOLVE_TRI", _solve_tri, n=(1, 2, 11, 64), columns=(1, 5, 32), batch=((1, 1), (3, 1), (2, 3)),
    )  # fmt: skip


CASES = [*_recurrences()]


def _heads(rng: np.random.Generator) -> Dims:
    """Heads, and groups that share keys."""
    groups = int(rng.integers(1, 4))
    return (groups * int(rng.integers(1, 4)), groups)


RWKV = {"size": range(1, 70), "heads": range(1, 5), "tokens": range(1, 9), "sequences": range(1, 4)}
DRAWN = {
    "SSM_CONV": draws(
        _ssm_conv, channels=range(1, 40), taps=range(1, 10), tokens=range(1, 20), sequences=range(1, 4),
        view=("dense", "offset"),
    ),
    "SSM_SCAN": draws(
        _ssm_scan, where=lambda mamba, tokens, states, **_: states <= tokens and (mamba == 2 or states == 1),
        mamba=(1, 2), heads=_heads, width=range(1, 12), size=range(1, 40), tokens=range(1, 10), sequences=range(1, 4),
        states=range(1, 5), view=("dense", "offset"),
    ),
    "RWKV_WKV6": draws(_wkv6, **RWKV),
    "RWKV_WKV7": draws(_wkv7, **RWKV | {"size": (64, 128)}),  # what ggml's vector code is right about
    "GATED_LINEAR_ATTN": draws(_gated_linear_attn, scale=(1.0, 0.125, 0.3), **RWKV),
    "GATED_DELTA_NET": draws(
        _gated_delta_net, where=lambda tokens, states, **_: states <= tokens, gates=("one", "many"), heads=_heads,
        size=range(1, 70), tokens=range(1, 10), sequences=range(1, 4), states=range(1, 5),
        view=("dense", "offset", "part"),
    ),
    "SOLVE_TRI": draws(
        _solve_tri, n=range(1, 40), columns=range(1, 40), batch=((1, 1), (3, 1), (2, 3), (1, 4))
    ),
}  # fmt: skip
