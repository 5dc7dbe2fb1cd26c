"""The indexer of sparse attention, and hyper-connections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.interop.cases.base import FLOATS, Builder, Case, draws, sweep

STREAMS = 4


def _indexer(b: Builder, type: str, size: int, heads: int, tokens: int, keys: int, batch: int, masks: int) -> Any:
    query, key = b.x(size, heads, tokens, batch), b.x(size, 1, keys, batch, type=type)
    return b.lightning_indexer(
        query, key, b.x(heads, tokens, 1, batch), b.mask(keys, tokens, 1, masks, type="F16")
    )  # fmt: skip


def _mixing(b: Builder, tokens: int, rounds: int, eps: float) -> Any:
    numbers = (2 + STREAMS) * STREAMS
    return b.dsv4_hc_comb(b.x(numbers, tokens, low=-3, high=3), b.x(3), b.x(numbers), eps, rounds)


def _gather(b: Builder, width: int, streams: int, tokens: int, view: str, gated: bool) -> Any:
    x = b.operand(width, streams, tokens, view=view)
    if gated:
        return b.dsv4_hc_pre_gated(x, b.operand(width, streams, tokens, view=view), 0.7)
    return b.dsv4_hc_pre(x, b.operand(streams, tokens, view=view))


def _spread(b: Builder, width: int, streams: int, tokens: int, view: str, mixed: bool) -> Any:
    x, residual = b.operand(width, tokens, view=view), b.operand(width, streams, tokens, view=view)
    mixing = b.operand(streams, streams, tokens, view=view) if mixed else None
    return b.dsv4_hc_post(x, residual, b.operand(streams, tokens, view=view), mixing)


def _deepseek() -> Iterator[Case]:
    yield from sweep(
        "LIGHTNING_INDEXER", _indexer, type=("F32", "F16", "BF16", "Q8_0", "Q4_0"), size=(32, 128), heads=(1, 5),
        tokens=(1, 7), keys=(1, 33), batch=(1, 2), masks=(1, 2), most=96,
        where=lambda batch, masks, **_: masks <= batch,
    )  # fmt: skip
    yield from sweep("DSV4_HC_COMB", _mixing, tokens=(1, 7, 64), rounds=(1, 2, 20), eps=(0.0, 1e-6, 1e-2))
    shapes = {"width": (1, 33), "streams": (1, 4, 5), "tokens": (1, 7), "view": ("dense", "part", "1023")}
    yield from sweep("DSV4_HC_PRE", _gather, gated=(False, True), **shapes)
    yield from sweep("DSV4_HC_POST", _spread, mixed=(False, True), **shapes)


CASES = [*_deepseek()]


def _whole_blocks(*, type: str, size: int, batch: int, masks: int, **_: Any) -> bool:
    return batch % masks == 0 and (type in FLOATS or size % 32 == 0)


SHAPES = {
    "width": range(1, 40), "streams": range(1, 7), "tokens": range(1, 9), "view": ("dense", "part", "1023"),
}  # fmt: skip
DRAWN = {
    "LIGHTNING_INDEXER": draws(
        _indexer, where=_whole_blocks, type=(*FLOATS, "Q8_0", "Q4_0"), size=range(1, 97), heads=range(1, 7),
        tokens=range(1, 9), keys=range(1, 40), batch=range(1, 4), masks=range(1, 4),
    ),
    "DSV4_HC_COMB": draws(_mixing, tokens=range(1, 70), rounds=range(1, 21), eps=(0.0, 1e-6, 1e-2)),
    "DSV4_HC_PRE": draws(_gather, gated=(False, True), **SHAPES),
    "DSV4_HC_POST": draws(_spread, mixed=(False, True), **SHAPES),
}  # fmt: skip
