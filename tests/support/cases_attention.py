"""Small graphs of rotations, softmax, attention and products by number (see :mod:`tests.support.cases`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sdrpc.ggml import params as p
from sdrpc.ggml.build import mul_mat, node, permute
from sdrpc.ggml.tensor import Tensor
from sdrpc.ggml.types import F16, I32, TYPES
from tests.support.feed import Feed

Case = Callable[[Feed], Tensor]


def _positions(f: Feed, n: int) -> Tensor:
    return f.of(np.arange(n) * 5 % 11, I32)


def _rope(width: int = 12, n_dims: int = 12, mode: int = 0, factors: bool = False, **how: Any) -> Case:
    """5 tokens of 3 heads."""
    params = p.Rope(0, n_dims, mode, 0, 64, **{
        "freq_base": 1e3, "freq_scale": 1.0, "ext_factor": 0.0, "attn_factor": 1.0, "beta_fast": 8.0, "beta_slow": 1.0,
        **how,
    })  # fmt: skip

    def case(f: Feed) -> Tensor:
        extra = [f.of(f.random.uniform(0.5, 3, width // 2))] if factors else []
        return node("ROPE", f(width, 3, 5, 2), _positions(f, 20 if mode & 8 else 5), *extra, params=params)

    return case


def _sections(*sizes: int) -> dict[str, int]:
    return {f"section{i}": size for i, size in enumerate(sizes)}


def _hidden(f: Feed, *ne: int) -> Tensor:
    """A mask that hides a third, and the second row whole."""
    values = np.where(f.random.uniform(size=ne[::-1]) < 1 / 3, -np.inf, f.random.standard_normal(ne[::-1]))
    values[..., 0] = 0.0
    values[..., 1, :] = -np.inf
    return f.of(values, F16)


def _attention(heads: tuple[int, int, int], mask: tuple[int, ...] = (), cap: float = 0.0, sinks: bool = False) -> Case:
    """5 queries of 8, 7 keys of 8 and values of 6, twice."""

    def case(f: Feed) -> Tensor:
        q, k, v = f(8, 5, heads[0], 2), f(8, 7, heads[1], 2, type=F16), f(6, 7, heads[2], 2, type=F16)
        extra = [_hidden(f, 7, 5, *mask) if mask else None, f(heads[0]) if sinks else None]
        return node("FLASH_ATTN_EXT", q, k, v, *extra, params=p.FlashAttn(0.35, 0.0, cap))

    return case


def _picked(
    experts: int, used: int, tokens: int, rows: int, k: int = 16, type: str = "F32", turned: bool = False
) -> Case:
    def case(f: Feed) -> Tensor:
        numbers = f.of(f.random.integers(0, experts, (tokens, used)), I32)
        b = permute(f(k, tokens, rows), 0, 2, 1, 3) if turned else f(k, rows, tokens)
        return node("MUL_MAT_ID", f(k, 5, experts, type=TYPES[type]), b, numbers, params=p.MulMat())

    return case


CASES: dict[str, Case] = {
    "ROPE-offset": _rope(16, 8, n_offset=6), "ROPE-neox-offset": _rope(16, 8, 2, n_offset=8),
    "ROPE-part": _rope(16, 6), "ROPE-yarn": _rope(mode=2, ext_factor=1.0, freq_scale=0.25, attn_factor=1.5),
    "ROPE-half-yarn": _rope(ext_factor=0.5, freq_scale=0.5, factors=True),
    "ROPE-mrope": _rope(mode=8, **_sections(2, 2, 1, 1)), "ROPE-mrope-again": _rope(24, 24, 8, **_sections(2, 0, 1, 2)),
    "ROPE-imrope": _rope(24, 24, 40, True, **_sections(5, 4, 3, 0)),
    "ROPE-vision": _rope(24, 12, 24, True, **_sections(3, 4, 2, 1)),
    "ROPE-vision-empty": _rope(24, 12, 24, ext_factor=1.0, freq_scale=0.5, **_sections(0, 3, 0, 2)),
    "SOFT_MAX-sinks": lambda f: node("SOFT_MAX", f(7, 5, 3, 2), None, f(3), params=p.SoftMax(0.5)),
    "SOFT_MAX-mask-sinks": lambda f: node(
        "SOFT_MAX", f(7, 5, 4, 2), _hidden(f, 7, 6, 2), f(4), params=p.SoftMax(0.5, 8.0)
    ),
    "FLASH_ATTN_EXT-sinks": _attention((4, 2, 2), sinks=True),
    "FLASH_ATTN_EXT-mask-sinks": _attention((4, 2, 4), (2, 1), sinks=True),
    "FLASH_ATTN_EXT-cap-sinks": _attention((6, 3, 1), (1, 2), cap=3.0, sinks=True),
    "FLASH_ATTN_EXT-hidden": _attention((4, 4, 4), (1, 1)),
    "FLASH_ATTN_EXT-cap-hidden": _attention((4, 2, 2), (1,), 2.0),
    "MUL_MAT-blocks": lambda f: mul_mat(f(32, 5, type=TYPES["Q4_0"]), f(32, 3, type=TYPES["Q8_0"])),
    "MUL_MAT_ID": _picked(4, 2, 3, 2), "MUL_MAT_ID-shared": _picked(4, 2, 3, 1),
    "MUL_MAT_ID-repeated": _picked(4, 4, 3, 2), "MUL_MAT_ID-many": _picked(3, 2, 40, 2, turned=True),
    "MUL_MAT_ID-one": _picked(9, 1, 1, 1), "MUL_MAT_ID-f16": _picked(4, 3, 5, 3, type="F16"),
    "MUL_MAT_ID-blocks": _picked(4, 2, 9, 1, 32, "Q4_0"),
    "ADD_ID": lambda f: node("ADD_ID", f(7, 3, 5), f(7, 4), f.of(f.random.integers(0, 4, (5, 3)), I32)),
    "ADD_ID-batch": lambda f: node("ADD_ID", f(7, 3, 5, 2), f(7, 4), f.of(f.random.integers(0, 4, (5, 3)), I32)),
}  # fmt: skip
