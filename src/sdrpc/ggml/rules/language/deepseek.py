"""What DeepSeek's models brought: the indexer of sparse attention, and hyper-connections between streams of layers."""

from __future__ import annotations

from ...params import Gather, Mixing, NoParams
from ...types import F32
from ..base import READABLE, Call, Op, Result, fits, need, op, support, typed

_F32 = frozenset({"F32"})

STREAMS = 4
"""The number of streams that ggml's backends mix."""
MOST_ROUNDS = 1024
"""Of normalizing rows and columns in turn; models take twenty."""


def _lightning_indexer(call: Call[NoParams]) -> Result:
    """Query [size, heads, tokens, batch], key [size, 1, keys, batch], weights [heads, tokens, 1, batch] and a mask
    [keys, tokens, 1, some of the batch] → [keys, tokens, 1, batch]."""
    query, key, weights, mask = call.src
    typed(query, _F32, "query")
    typed(key, READABLE, "key")
    typed(weights, _F32, "weights")
    typed(mask, frozenset({"F16"}), "mask")
    size, heads, tokens, batch = query.ne
    keys = key.ne[2]
    need(key.ne == (size, 1, keys, batch), "key {} for query {}", key.ne, query.ne)
    need(weights.ne == (heads, tokens, 1, batch), "weights {} for query {}", weights.ne, query.ne)
    need(mask.ne[:3] == (keys, tokens, 1) and fits(mask.ne[3], batch), "mask {} for key {}", mask.ne, key.ne)
    return Result(F32, (keys, tokens, 1, batch))


def _mixing(call: Call[Mixing]) -> Result:
    mixes, scale, base = call.src
    p = call.params
    for source in call.src:
        typed(source, _F32)
    numbers = (2 + STREAMS) * STREAMS
    support(mixes.ne[0] == numbers, "mixes {} (those of {} streams are {})", mixes.ne, STREAMS, numbers)
    need(mixes.ne[2:] == (1, 1), "mixes {}", mixes.ne)
    need(scale.ne[0] >= 3 and scale.ne[1:] == (1, 1, 1), "scale {}", scale.ne)
    need(base.ne == (numbers, 1, 1, 1), "base {} for mixes {}", base.ne, mixes.ne)
    need(p.rounds > 0 and p.eps >= 0, "{} rounds, eps {}", p.rounds, p.eps)
    support(p.rounds <= MOST_ROUNDS, "{} rounds", p.rounds)
    return Result(F32, (STREAMS, STREAMS, mixes.ne[1], 1))


def _gather(call: Call[Gather]) -> Result:
    """Streams [width, streams, tokens] → [width, tokens]."""
    x, weights = call.src
    typed(x, _F32)
    typed(weights, _F32, "weights")
    width, streams, tokens, _ = x.ne
    need(call.params.gated in (0, 1), "gated: {}", call.params.gated)
    wanted = (width, streams, tokens, 1) if call.params.gated else (streams, tokens, 1, 1)
    need(x.ne[3] == 1 and weights.ne == wanted, "weights {} for {}", weights.ne, x.ne)
    return Result(F32, (width, tokens, 1, 1))


def _spread(call: Call[NoParams]) -> Result:
    """A layer's result [width, tokens] into streams [width, streams, tokens]."""
    x, residual, post, mixing = call.src
    for source in call.src:
        if source is not None:
            typed(source, _F32)
    width, streams, tokens, _ = residual.ne
    need(residual.ne[3] == 1 and x.ne == (width, tokens, 1, 1), "result {} for streams {}", x.ne, residual.ne)
    need(post.ne == (streams, tokens, 1, 1), "weights {} for streams {}", post.ne, residual.ne)
    if mixing is not None:
        need(mixing.ne == (streams, streams, tokens, 1), "mixing {} for streams {}", mixing.ne, residual.ne)
    return Result(F32, residual.ne)


OPS: tuple[Op, ...] = (
    op("LIGHTNING_INDEXER", NoParams, _lightning_indexer, 4),
    op("DSV4_HC_COMB", Mixing, _mixing, 3),
    op("DSV4_HC_PRE", Gather, _gather, 2),
    op("DSV4_HC_POST", NoParams, _spread, 3, 4),
)
