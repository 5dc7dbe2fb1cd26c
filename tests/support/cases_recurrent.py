"""Small graphs of recurrences, hyper-connections and what training needs (see :mod:`tests.support.cases`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sdrpc.ggml import params as p
from sdrpc.ggml.build import inplace, node, permute
from sdrpc.ggml.tensor import Tensor
from sdrpc.ggml.types import F16, I32, TYPES
from tests.support.feed import Feed

Case = Callable[[Feed], Tensor]


def _between(f: Feed, low: float, high: float, *ne: int) -> Tensor:
    return f.of(f.random.uniform(low, high, ne[::-1]))


def _softmax(f: Feed, *ne: int) -> Tensor:
    powers = np.exp(f.random.standard_normal(ne[::-1]))
    return f.of(powers / powers.sum(-1, keepdims=True))


def _scan(size_of_a: int, states: int) -> Case:
    """4 heads in 2 groups, 3 tokens of 2 sequences, states of 5 × 3."""

    def case(f: Feed) -> Tensor:
        a, dt = _between(f, -1.5, -0.1, size_of_a, 4), _between(f, -3, 2, 4, 3, 2)
        return node(
            "SSM_SCAN", f(5, 3, 4, 4), f(3, 4, 3, 2), dt, a, f(5, 2, 3, 2), f(5, 2, 3, 2), f.of([3, 1], I32),
            params=p.States(states),
        )  # fmt: skip

    return case


KEYS = (6, 3, 4)
"""Size, heads and tokens; two sequences."""
STATE = (6 * 6 * 3, 2)


def _decay(f: Feed) -> Tensor:
    return _between(f, 0.2, 0.99, *KEYS)


def _delta(gates: int, of_keys: int, states: int) -> Case:
    def case(f: Feed) -> Tensor:
        query, key = (_between(f, -0.4, 0.4, 6, of_keys, 3, 2) for _ in range(2))
        gate, beta = _between(f, -1, 0, gates, 4, 3, 2), _between(f, 0, 1, 1, 4, 3, 2)
        return node(
            "GATED_DELTA_NET", query, key, f(6, 4, 3, 2), gate, beta, f(6, 6, 4, 2), params=p.States(states)
        )  # fmt: skip

    return case


def _solve(f: Feed) -> Tensor:
    matrix = f.random.uniform(-0.3, 0.3, (2, 3, 5, 5)) + 1.5 * np.eye(5)
    return node("SOLVE_TRI", f.of(matrix), f(4, 5, 3, 2))


CASES: dict[str, Case] = {
    "SSM_CONV": lambda f: node("SSM_CONV", f(7, 5, 2), f(4, 5)),
    "SSM_SCAN": _scan(1, 1),
    "SSM_SCAN-mamba-1": _scan(5, 0),
    "SSM_SCAN-states": _scan(1, 3),
    "SSM_SCAN-before-the-first-token": _scan(1, 5),
    "RWKV_WKV6": lambda f: node("RWKV_WKV6", f(*KEYS), f(*KEYS), f(*KEYS), f(6, 3), _decay(f), f(*STATE)),
    "RWKV_WKV7": lambda f: node(
        "RWKV_WKV7", f(*KEYS), _decay(f), f(*KEYS), f(*KEYS), _between(f, -0.3, 0.3, *KEYS),
        _between(f, -0.3, 0.3, *KEYS), f(*STATE),
    ),
    "GATED_LINEAR_ATTN": lambda f: node(
        "GATED_LINEAR_ATTN", f(*KEYS), f(*KEYS), f(*KEYS), _decay(f), f(*STATE), params=p.LinearAttention(0.4)
    ),
    "GATED_DELTA_NET": _delta(1, 4, 1),
    "GATED_DELTA_NET-gates": _delta(6, 2, 0),
    "GATED_DELTA_NET-states": _delta(1, 2, 2),
    "GATED_DELTA_NET-before-the-first-token": _delta(1, 2, 4),
    "SOLVE_TRI": _solve,
    "LIGHTNING_INDEXER": lambda f: node(
        "LIGHTNING_INDEXER", f(8, 3, 4, 2), f(8, 1, 5, 2, type=F16), f(3, 4, 1, 2), f(5, 4, type=F16)
    ),
    "LIGHTNING_INDEXER-quantized": lambda f: node(
        "LIGHTNING_INDEXER", f(32, 3, 4), f(32, 1, 5, type=TYPES["Q8_0"]), f(3, 4), f(5, 4, type=F16)
    ),
    "DSV4_HC_COMB": lambda f: node("DSV4_HC_COMB", f(24, 5), f(3), f(24), params=p.Mixing(1e-6, 4)),
    "DSV4_HC_PRE": lambda f: node("DSV4_HC_PRE", f(7, 3, 5), f(3, 5), params=p.Gather(0.0, 0)),
    "DSV4_HC_PRE-gates": lambda f: node("DSV4_HC_PRE", f(7, 3, 5), f(7, 3, 5), params=p.Gather(0.7, 1)),
    "DSV4_HC_POST": lambda f: node("DSV4_HC_POST", f(7, 5), f(7, 3, 5), f(3, 5), f(3, 3, 5)),
    "DSV4_HC_POST-unmixed": lambda f: node("DSV4_HC_POST", f(7, 5), permute(f(3, 7, 5), 1, 0, 2, 3), f(3, 5)),
    # training
    "SILU_BACK": lambda f: node("SILU_BACK", f(5, 4, 3), f(5, 4, 3)),
    "RMS_NORM_BACK": lambda f: node("RMS_NORM_BACK", f(9, 4, 3), f(9, 4, 3), params=p.Eps(1e-3)),
    "SOFT_MAX_BACK": lambda f: node("SOFT_MAX_BACK", f(9, 4), _softmax(f, 9, 4), params=p.SoftMax(0.5)),
    "ROPE_BACK": lambda f: node(
        "ROPE_BACK", f(8, 3, 5, 2), f.of(np.arange(5) * 3 % 7, I32),
        params=p.Rope(0, 6, 2, 0, 0, 10000.0, 0.5, 0.0, 1.5, 32.0, 1.0),
    ),
    "REPEAT_BACK": lambda f: node("REPEAT_BACK", f(6, 4, 2, 2), ne=(3, 1, 2)),
    "GET_ROWS_BACK": lambda f: node("GET_ROWS_BACK", f(6, 4, type=F16), f.of([3, 0, 0, 2], I32), ne=(6, 5)),
    "CROSS_ENTROPY_LOSS": lambda f: node("CROSS_ENTROPY_LOSS", f(9, 4, 2), _softmax(f, 9, 4, 2)),
    "CROSS_ENTROPY_LOSS_BACK": lambda f: node(
        "CROSS_ENTROPY_LOSS_BACK", f(1), f(9, 4, 2), _softmax(f, 9, 4, 2)
    ),
    "GET_ROWS_BACK-more-rows-than-indices": lambda f: node(
        "GET_ROWS_BACK", f(6, 4), f.of([3, 3], I32), ne=(6, 5)
    ),
    "IM2COL_BACK-larger-than-its-image": lambda f: node(
        "IM2COL_BACK", f(24, 1, 4, 2), f(3, 2, 4, 5), params=p.Im2Col(3, 1, 0, 0, 1, 1, 1), ne=(1, 5, 4, 2)
    ),
    "OPT_STEP_ADAMW": lambda f: inplace(
        "OPT_STEP_ADAMW", f(5, 4, 3), f(5, 4, 3), f(5, 4, 3), node("SQR", f(5, 4, 3)),
        f.of([0.1, 0.9, 0.99, 1e-6, 0.01, 1.5, 2.5]),
    ),
    "OPT_STEP_SGD": lambda f: inplace("OPT_STEP_SGD", f(5, 4, 3), f(5, 4, 3), f.of([0.1, 0.01])),
    "IM2COL_BACK": lambda f: node(
        "IM2COL_BACK", f(3 * 2 * 4, 5, 6, 2), f(3, 2, 4, 5), ne=(9, 7, 4, 2), params=p.Im2Col(2, 1, 1, 1, 1, 3, 1)
    ),
    "IM2COL_BACK-1d": lambda f: node(
        "IM2COL_BACK", f(3 * 4, 4, 2), f(3, 4, 5), ne=(9, 4, 2), params=p.Im2Col(2, 0, 1, 0, 2, 0, 0)
    ),
    "POOL_2D_BACK": lambda f: node(
        "POOL_2D_BACK", f(5, 3, 3, 2), f(9, 7, 3, 2), params=p.Pool2D(0, 3, 2, 2, 3, 1, 1)
    ),
    "POOL_2D_BACK-mean": lambda f: node(
        "POOL_2D_BACK", f(5, 3, 3, 2), f(9, 7, 3, 2), params=p.Pool2D(1, 3, 2, 2, 3, 1, 1)
    ),
}  # fmt: skip
