"""Rotations, softmax and attention."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.interop.cases.base import FLOATS, Builder, Case, draws, several, sweep
from tests.interop.cases.products import WEIGHTS
from tests.support import ggml

Shape = tuple[int, ...]

# ROPE

MODES = {"normal": 0, "neox": 2, "mrope": 8, "vision": 24, "imrope": 40}
CONTEXT = 512


def _rope(
    b: Builder, *, mode: str, ne: Shape, dims: int = 0, type: str = "F32", view: str = "dense", sections: Shape = (),
    factors: bool = False, base: float = 1e4, scale: float = 1.0, ext: float = 0.0, attn: float = 1.0,
    beta: Shape = (32, 1), offset: int = 0, inplace: bool = False,
) -> Any:  # fmt: skip
    x = b.operand(*ne, view=view, type=type)
    dims = dims or (ne[0] // 2 if mode == "vision" else ne[0])
    divisors = b.x(ne[0] // 2, low=0.5, high=4) if factors else None
    floats = (CONTEXT, base, scale, ext, attn, *map(float, beta))
    suffix = "_inplace" if inplace else ""
    if sections:
        positions = b.indices(CONTEXT, 4 * ne[2])
        parts = (ctypes.c_int * 4)(*sections)
        result = getattr(b, f"rope_multi{suffix}")(x, positions, divisors, dims, parts, MODES[mode], *floats)
    else:
        result = getattr(b, f"rope_ext{suffix}")(
            x, b.indices(CONTEXT, ne[2]), divisors, dims, MODES[mode], *floats)  # fmt: skip
    return ggml.library().ggml_rope_set_offset(result, offset) if offset else result


def _rounded(*, type: str = "F32", **_: Any) -> str:
    return "f32" if type == "F32" else "f16"


def _fits(*, ne: Shape, dims: int = 0, offset: int = 0, **_: Any) -> bool:
    return offset + (dims or ne[0]) <= ne[0]


def _ropes() -> Iterator[Case]:
    rows = ((64, 4, 10, 2), (80, 3, 7, 1), (128, 1, 5, 3), (6, 2, 3, 1))
    yield from sweep(
        "ROPE", _rope, _rounded, _fits, most=160, mode=("normal", "neox"), ne=rows, dims=(0, 6, 32, 64),
        offset=(0, 2, 16), type=("F32", "F16"), view=("dense", "part", "0213", "strided"), inplace=(False, True),
    )  # fmt: skip
    yield from sweep(
        "ROPE", _rope, _rounded, _fits, most=160, mode=("normal", "neox"), ne=rows[:3], dims=(0, 32),
        type=("F32", "F16"), factors=(False, True), base=(1e4, 5e5), scale=(1.0, 0.25, 1.5), ext=(0.0, 1.0, 0.5),
        attn=(1.0, 1.3), beta=((32, 1), (8, 4)),
    )  # fmt: skip
    yield from sweep(
        "ROPE", _rope, _rounded, _fits, most=200, mode=("mrope", "imrope"), ne=((64, 4, 10, 2), (128, 2, 5, 1)),
        dims=(0, 32, 64),
        sections=((16, 24, 24, 0), (8, 8, 8, 8), (0, 12, 20, 0), (11, 11, 10, 0), (2, 3, 0, 1), (24, 20, 20, 0)),
        type=("F32", "F16"), view=("dense", "0213"), factors=(False, True), ext=(0.0, 1.0), offset=(0, 16),
    )  # fmt: skip
    yield from sweep(
        "ROPE", _rope, _rounded, most=80, mode=("vision",), ne=((64, 4, 10, 2), (80, 2, 5, 1)),
        sections=((16, 16, 16, 16), (20, 20, 0, 0), (0, 5, 0, 4), (3, 0, 7, 0), (5, 6, 7, 8)), type=("F32", "F16"),
        view=("dense", "0213", "part"), factors=(False, True), base=(1e4, 1e3), scale=(1.0, 0.5),
    )  # fmt: skip


# SOFT_MAX


def _soft_max(
    b: Builder, *, ne: Shape, mask: str | None = None, heads: Shape = (1, 1), rows: int = 0, scale: float = 1.0,
    bias: float = 0.0, sinks: bool = False, view: str = "dense", inplace: bool = False,
) -> Any:  # fmt: skip
    x = b.operand(*ne, view=view, low=-9, high=9)
    hidden = b.mask(ne[0], ne[1] + rows, *heads, type=mask) if mask else None
    result = (b.soft_max_ext_inplace if inplace else b.soft_max_ext)(x, hidden, scale, bias)
    if sinks:
        ggml.library().ggml_soft_max_add_sinks(result, b.x(ne[2], low=-3, high=9))
    return result


def _repeats(
    *, ne: Shape, mask: str | None = None, heads: Shape = (1, 1), bias: float = 0.0, rows: int = 0, **_: Any
) -> bool:
    """Whether the mask, where there is one, repeats a whole number of times; nothing of a mask where there is none."""
    if mask is None:
        return heads == (1, 1) and bias == 0 and rows == 0
    return ne[2] % heads[0] == 0 and ne[3] % heads[1] == 0


def _soft_maxes() -> Iterator[Case]:
    yield from sweep(
        "SOFT_MAX", _soft_max, ne=((16, 2, 3, 2), (77, 77, 2, 1), (1, 5, 1, 1), (1025, 3, 1, 1), (33, 7, 2, 3)),
        scale=(1.0, 0.3), sinks=(False, True), view=("dense", "offset"), inplace=(False, True),
    )  # fmt: skip
    yield from sweep(
        "SOFT_MAX", _soft_max, where=_repeats, most=240, ne=((24, 6, 12, 4), (33, 5, 4, 2), (64, 1, 6, 1)),
        mask=("F32", "F16"), heads=((1, 1), (2, 1), (4, 1), (6, 1), (1, 2), (2, 2)), rows=(0, 3), scale=(1.0, 0.125),
        bias=(0.0, 8.0), sinks=(False, True), view=("dense", "offset"), inplace=(False, True),
    )  # fmt: skip


# FLASH_ATTN_EXT


def _flash(
    b: Builder, *, sizes: Shape, heads: Shape, tokens: Shape, batch: int = 1, k: str = "F16", v: str = "",
    mask: Shape | None = None, bias: float = 0.0, cap: float = 0.0, sinks: bool = False, view: str = "dense",
    precise: bool = True,
) -> Any:  # fmt: skip
    """``sizes`` of a head of keys and values; ``heads`` of queries, keys and values; ``tokens``: queries and keys."""
    q = b.operand(sizes[0], tokens[0], heads[0], batch, view=view)
    key = b.operand(sizes[0], tokens[1], heads[1], batch, view=view, type=k)
    value = b.operand(sizes[1], tokens[1], heads[-1], batch, view=view, type=v or k)
    hidden = b.mask(tokens[1], -(-tokens[0] // 32) * 32, *mask, type="F16") if mask else None
    result = b.flash_attn_ext(q, key, value, hidden, sizes[0] ** -0.5, bias, cap)
    if sinks:
        ggml.library().ggml_flash_attn_ext_add_sinks(result, b.x(heads[0], low=-2, high=4))
    return b.prec_f32(result) if precise else result


def _attended(*, k: str = "F16", v: str = "", **_: Any) -> str:
    """ggml makes K's type of the queries, and sums in f16 what it reads as f16."""
    types = {k, v or k}
    if not types <= set(FLOATS):
        return "quantized"
    return "bf16" if "BF16" in types else "f16 sums" if "F16" in types else "f16"


def _masks(*, heads: Shape, mask: Shape | None = None, bias: float = 0.0, batch: int = 1, **_: Any) -> bool:
    return bias == 0 if mask is None else heads[0] % mask[0] == 0 and batch % mask[1] == 0


def _flashes() -> Iterator[Case]:
    yield from sweep(
        "FLASH_ATTN_EXT", _flash, _attended, _masks, most=300,
        sizes=((64, 64), (40, 40), (64, 128), (192, 128), (32, 16), (80, 80)),
        heads=((4, 4), (8, 2), (6, 1), (4, 2, 1), (3, 3), (12, 4)), tokens=((5, 77), (1, 64), (33, 40)),
        batch=(1, 2), k=FLOATS, v=("", "F32", "F16"), mask=(None, (1, 1), (2, 1), (1, 2), (4, 2)), bias=(0.0, 8.0),
        cap=(0.0, 10.0), sinks=(False, True), view=("dense", "0213", "part"), precise=(True, False),
    )  # fmt: skip
    yield from sweep(
        "FLASH_ATTN_EXT", _flash, _attended, most=250, sizes=((256, 256),), heads=((4, 2),), tokens=((3, 33), (1, 40)),
        k=WEIGHTS, v=("", "F16"), mask=(None, (1, 1)), sinks=(False, True), cap=(0.0, 5.0), view=("dense", "0213"),
    )  # fmt: skip
    yield from sweep(
        "FLASH_ATTN_EXT", _flash, _attended, sizes=((256, 128),), heads=((2, 1),), tokens=((2, 32),),
        k=("F16", "Q8_0"), v=("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "BF16", "F32"), mask=(None, (1, 1)),
    )  # fmt: skip


CASES = [*_ropes(), *_soft_maxes(), *_flashes()]


def _grouped(rng: np.random.Generator) -> Shape:
    """Heads of queries and of keys."""
    of_keys = int(rng.integers(1, 4))
    return (of_keys * int(rng.integers(1, 4)), of_keys)


DRAWN = {
    "FLASH_ATTN_EXT": draws(
        _flash, _attended, _masks, sizes=several(2, 1, 80), heads=_grouped, tokens=several(2, 1, 40), batch=(1, 2),
        k=FLOATS, v=("", "F32", "F16"), mask=(None, (1, 1), (2, 1), (1, 2), (3, 2)), bias=(0.0, 8.0), cap=(0.0, 10.0),
        sinks=(False, True), view=("dense", "0213", "part"), precise=(True, False),
    ),
}  # fmt: skip
