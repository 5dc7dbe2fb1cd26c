"""Rotations, softmax and attention."""

from __future__ import annotations

from ..types import F32
from .base import FLOATS, READABLE, Call, Result, Rule, need, support, typed

ROPE_NORMAL, ROPE_NEOX = 0, 2


def _soft_max(call: Call) -> Result:
    a, mask, sinks = call.src
    scale_and_bias = call.params
    typed(a, FLOATS)
    support(sinks is None, "attention sinks")
    if mask is not None:
        typed(mask, FLOATS, "mask")
        m, n = mask.ne, a.ne
        need(m[0] == n[0] and m[1] >= n[1] and not n[2] % m[2] and not n[3] % m[3], "mask {} for {}", m, n)
    need(scale_and_bias.max_bias >= 0, "max_bias {}", scale_and_bias.max_bias)
    need(mask is not None or scale_and_bias.max_bias == 0, "max_bias without a mask")
    return Result(a.type, a.ne)


def _rope(call: Call) -> Result:
    a, positions, factors = call.src
    p = call.params
    typed(a, FLOATS)
    typed(positions, frozenset({"I32"}), "positions")
    support(p.mode in (ROPE_NORMAL, ROPE_NEOX), "rotary mode {}", p.mode)
    support(p.ext_factor == 0 and p.n_offset == 0, "YaRN or an offset of rotated dimensions")
    need(0 < p.n_dims <= a.ne[0] and p.n_dims % 2 == 0, "{} rotated dimensions of {}", p.n_dims, a.ne[0])
    need(p.freq_base > 0, "freq_base {}", p.freq_base)
    need(positions.ne == (a.ne[2], 1, 1, 1), "positions {} for {}", positions.ne, a.ne)
    if factors is not None:
        typed(factors, frozenset({"F32"}), "frequency factors")
        need(factors.ne[0] >= p.n_dims // 2, "{} frequency factors", factors.ne[0])
    return Result(a.type, a.ne)


def _flash_attn(call: Call) -> Result:
    query, key, value, mask, sinks = call.src
    p = call.params
    typed(query, FLOATS, "query")
    typed(key, READABLE, "key")
    typed(value, READABLE, "value")
    support(sinks is None, "attention sinks")
    q, k, v = query.ne, key.ne, value.ne
    need(
        q[0] == k[0] and k[1] == v[1] and k[2] == v[2] and not q[2] % k[2] and q[3] == k[3] == v[3],
        "query {}, key {} and value {}", q, k, v,
    )  # fmt: skip
    if mask is not None:
        typed(mask, FLOATS, "mask")
        m = mask.ne
        need(m[0] == k[1] and m[1] >= q[1] and not q[2] % m[2] and not q[3] % m[3], "mask {} for {} and {}", m, q, k)
    need(p.max_bias >= 0 and (mask is not None or p.max_bias == 0), "max_bias {} (needs a mask)", p.max_bias)
    need(p.logit_softcap >= 0, "logit_softcap {}", p.logit_softcap)
    return Result(F32, (v[0], q[2], q[1], q[3]))


RULES: dict[str, Rule] = {
    "ROPE": Rule(2, 3, _rope), "SOFT_MAX": Rule(1, 3, _soft_max), "FLASH_ATTN_EXT": Rule(3, 5, _flash_attn),
}  # fmt: skip
