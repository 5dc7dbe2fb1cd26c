"""Rotations, softmax and attention."""

from __future__ import annotations

from ..params import FlashAttn, Rope, SoftMax
from ..tensor import Tensor
from ..types import F32
from .base import FLOATS, READABLE, Call, Op, Result, fits, need, op, support, typed

ROPE_NORMAL, ROPE_NEOX, ROPE_MROPE, ROPE_VISION, ROPE_IMROPE = 0, 2, 8, 24, 40
"""ggml.h: GGML_ROPE_TYPE_*. Bit 3 says that a token has four positions, of which each serves a section of the pairs."""

_F32 = frozenset({"F32"})
_I32 = frozenset({"I32"})


def _mask(
    call: Call[SoftMax | FlashAttn], mask: Tensor | None, keys: int, queries: int, heads: int, batch: int
) -> None:
    """A mask has a row for each query (or more, which are not read) and repeats over heads and batch."""
    max_bias: float = call.params.max_bias
    need(max_bias >= 0 and (mask is not None or max_bias == 0), "max_bias {} (needs a mask)", max_bias)
    if mask is not None:
        typed(mask, FLOATS, "mask")
        m = mask.ne
        need(
            m[0] == keys and m[1] >= queries and fits(m[2], heads) and fits(m[3], batch),
            "mask {} for {} keys, {} queries, {} heads, batch {}", m, keys, queries, heads, batch,
        )  # fmt: skip


def _sinks(sinks: Tensor | None, heads: int) -> None:
    """A number for each head."""
    if sinks is not None:
        typed(sinks, _F32, "sinks")
        need(sinks.ne == (heads, 1, 1, 1), "sinks {} for {} heads", sinks.ne, heads)


def _soft_max(call: Call[SoftMax]) -> Result:
    a, mask, sinks = call.src
    typed(a, FLOATS)
    _mask(call, mask, *a.ne)
    _sinks(sinks, a.ne[2])
    return Result(a.type, a.ne)


def _flash_attn(call: Call[FlashAttn]) -> Result:
    query, key, value, mask, sinks = call.src
    typed(query, FLOATS, "query")
    typed(key, READABLE, "key")
    typed(value, READABLE, "value")
    q, k, v = query.ne, key.ne, value.ne
    need(
        q[0] == k[0] and k[1] == v[1] and fits(k[2], q[2]) and fits(v[2], q[2]) and q[3] == k[3] == v[3],
        "query {}, key {} and value {}", q, k, v,
    )  # fmt: skip
    _mask(call, mask, k[1], *q[1:])
    _sinks(sinks, q[2])
    need(call.params.logit_softcap >= 0, "logit_softcap {}", call.params.logit_softcap)
    return Result(F32, (v[0], q[2], q[1], q[3]))


def rope(call: Call[Rope]) -> Result:
    a, positions, factors = call.src
    p = call.params
    typed(a, FLOATS)
    typed(positions, _I32, "positions")
    support(p.mode in (ROPE_NORMAL, ROPE_NEOX, ROPE_MROPE, ROPE_VISION, ROPE_IMROPE), "rotary mode {}", p.mode)
    width, several, vision = a.ne[0], bool(p.mode & ROPE_MROPE), p.mode == ROPE_VISION
    need(0 < p.n_dims <= width and p.n_dims % 2 == 0, "{} rotated dimensions of {}", p.n_dims, width)
    need(
        0 <= p.n_offset <= width - p.n_dims and p.n_offset % 2 == 0,
        "{} rotated dimensions of {} from {} on", p.n_dims, width, p.n_offset,
    )  # fmt: skip
    need(width % 2 == 0, "rows of {} elements have no pairs", width)
    need(not vision or (p.n_dims * 2 == width and p.n_offset == 0), "{} rotated pairs of {}", p.n_dims, width)
    need(positions.ne == (a.ne[2] * (4 if several else 1), 1, 1, 1), "positions {} for {}", positions.ne, a.ne)
    if several:
        _sections(p, width)
    if factors is not None:
        typed(factors, _F32, "frequency factors")
        pairs = p.n_dims if vision else p.n_dims // 2
        need(factors.ne[0] >= pairs and factors.ne[1:] == (1, 1, 1), "frequency factors {}", factors.ne)
    return Result(a.type, a.ne)


def _sections(p: Rope, width: int) -> None:
    sections = (p.section0, p.section1, p.section2, p.section3)
    need(min(sections) >= 0 and any(sections[:3]) and sum(sections) <= width, "sections {} of {}", sections, width)


OPS: tuple[Op, ...] = (
    op("ROPE", Rope, rope, 2, 3),
    op("SOFT_MAX", SoftMax, _soft_max, 1, 3, portable=True),
    op("FLASH_ATTN_EXT", FlashAttn, _flash_attn, 3, 5),
)
