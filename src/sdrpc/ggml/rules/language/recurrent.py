"""Recurrences over tokens: state space models, RWKV, gated attention; and triangular systems.

Results hold two things in one tensor: what comes out for each token, then the states after the last ones.
"""

from __future__ import annotations

from math import prod

from ...params import LinearAttention, NoParams, States
from ...tensor import Dims, Tensor, dims
from ...types import F32
from ..base import Call, Op, Result, fits, need, op, support, typed

_F32 = frozenset({"F32"})
_I32 = frozenset({"I32"})

MOST_TOKENS = 1 << 16
"""Of one sequence in one operation, which goes through them one by one and can't be stopped in between; far more than
clients put into a graph."""


def _all_f32(call: Call[object]) -> None:
    for source in call.src:
        if source is not None:
            typed(source, _F32)


def _snapshots(call: Call[States]) -> int:
    """States that the result holds per sequence, those after the last tokens, the last one first. Protocols before 7.0
    have no such parameter, which reads as zero: they hold the last one."""
    states: int = call.params.states
    need(states >= 0, "{} states", states)
    return states or 1


def _one_by_one(tokens: int) -> None:
    support(tokens <= MOST_TOKENS, "{} tokens at once", tokens)


def _ssm_conv(call: Call[NoParams]) -> Result:
    """A kernel [taps, channels] over [taps - 1 + tokens, channels, sequences] → [channels, tokens, sequences]."""
    _all_f32(call)
    x, kernel = (source.ne for source in call.src)
    need(
        x[3] == 1 and kernel[2:] == (1, 1) and x[1] == kernel[1] and x[0] >= kernel[0],
        "kernel {} for input {}", kernel, x,
    )  # fmt: skip
    return Result(F32, (x[1], x[0] - kernel[0] + 1, x[2], 1))


def _ssm_scan(call: Call[States]) -> Result:
    state, x, dt, a, b, c, rows = call.src
    for source in call.src[:6]:
        typed(source, _F32)
    typed(rows, _I32, "numbers of states")
    size, width, heads = state.ne[:3]
    tokens, sequences = x.ne[2:]
    need(x.ne[:2] == (width, heads), "input {} for states {}", x.ne, state.ne)
    need(dt.ne == (heads, tokens, sequences, 1), "steps {} for input {}", dt.ne, x.ne)
    need(a.ne in ((1, heads, 1, 1), (size, heads, 1, 1)), "decay {} for states {}", a.ne, state.ne)
    need(
        b.ne == c.ne and b.ne[0] == size and b.ne[2:] == (tokens, sequences) and fits(b.ne[1], heads),
        "projections {} and {} for input {} and states {}", b.ne, c.ne, x.ne, state.ne,
    )  # fmt: skip
    need(rows.ne == (sequences, 1, 1, 1), "numbers of states {} for input {}", rows.ne, x.ne)
    kept = _snapshots(call)
    _one_by_one(tokens)
    support(a.ne[0] == 1 or kept == 1, "several states with a decay for each of their elements")
    return Result(F32, dims(prod(x.ne) + kept * size * width * heads * sequences))


def _like_keys(call: Call[object], state: Tensor, *others: Tensor) -> Result:
    """Keys [size, heads, tokens] of one sequence after the other, others of the same shape, and a matrix of state for
    each head of each sequence."""
    _all_f32(call)
    size, heads, tokens, _ = keys = call.src[0].ne
    need(all(other.ne == keys for other in others) and keys[3] == 1, "keys {} and {}", keys, [o.ne for o in others])
    sequences = state.ne[1]
    need(prod(state.ne) == size * size * heads * sequences, "state {} for keys {}", state.ne, keys)
    need(fits(sequences, tokens), "{} tokens in {} sequences", tokens, sequences)
    _one_by_one(tokens // max(sequences, 1))
    return Result(F32, (size * heads, tokens + size * sequences, 1, 1))


def _wkv6(call: Call[NoParams]) -> Result:
    _, value, receptance, first, decay, state = call.src
    keys: Dims = call.src[0].ne
    need(prod(first.ne) == keys[0] * keys[1], "bonus {} for keys {}", first.ne, keys)
    return _like_keys(call, state, value, receptance, decay)


def _wkv7(call: Call[NoParams]) -> Result:
    *others, state = call.src
    return _like_keys(call, state, *others[1:])


def _gated_linear_attn(call: Call[LinearAttention]) -> Result:
    *others, state = call.src
    return _like_keys(call, state, *others[1:])


def _gated_delta_net(call: Call[States]) -> Result:
    query, key, value, gate, beta, state = call.src
    _all_f32(call)
    size, heads, tokens, sequences = v = value.ne
    for what, one in (("query", query), ("key", key)):
        n = one.ne
        need(
            n[0] == size and fits(n[1], heads) and n[2] == tokens and fits(n[3], sequences),
            "{} {} for value {}", what, n, v,
        )  # fmt: skip
    need(gate.ne[0] in (1, size) and gate.ne[1:] == v[1:], "gate {} for value {}", gate.ne, v)
    need(beta.ne == (1, *v[1:]), "beta {} for value {}", beta.ne, v)
    need(prod(state.ne) == size * size * heads * sequences, "state {} for value {}", state.ne, v)
    kept = _snapshots(call)
    _one_by_one(tokens)
    return Result(F32, (size * heads, tokens * sequences + kept * size * sequences, 1, 1))


def _solve_tri(call: Call[NoParams]) -> Result:
    _all_f32(call)
    a, b = (source.ne for source in call.src)
    need(a[0] == a[1] == b[1] and a[2:] == b[2:], "matrix {} and right hand side {}", a, b)
    return Result(F32, b)


OPS: tuple[Op, ...] = (
    op("SSM_CONV", NoParams, _ssm_conv, 2),
    op("SSM_SCAN", States, _ssm_scan, 7),
    op("RWKV_WKV6", NoParams, _wkv6, 6),
    op("RWKV_WKV7", NoParams, _wkv7, 7),
    op("GATED_LINEAR_ATTN", LinearAttention, _gated_linear_attn, 5),
    op("GATED_DELTA_NET", States, _gated_delta_net, 6),
    op("SOLVE_TRI", NoParams, _solve_tri, 2),
)
