"""What our server refuses, by the words that its log then has."""

from __future__ import annotations

from typing import Any

from tests.interop.cases.base import Builder, Case
from tests.support import ggml


def with_sinks(b: Builder) -> Any:
    result = b.flash_attn_ext(b.x(64, 4, 2), b.x(64, 8, 2), b.x(64, 8, 2), None, 0.1, 0.0, 0.0)
    ggml.library().ggml_flash_attn_ext_add_sinks(result, b.x(2))
    return result


REFUSED: dict[str, Case] = {
    "padding 15 of 4 elements": Case("POOL_1D", "", lambda b: b.pool_1d(b.x(4), 0, 20, 7, 15)),
    "MUL_MAT_ID": Case("MUL_MAT_ID", "", lambda b: b.mul_mat_id(b.x(8, 4, 3), b.x(8, 2, 5), b.indices(3, 2, 5))),
    "sinks": Case("FLASH_ATTN_EXT", "", with_sinks),
    "POOL_2D.*POOL_1D": Case(
        "POOL_1D", "", lambda b: b.pool_1d(b.pool_2d(b.x(4, 4), 0, 20, 3, 7, 2, 15, 0), 0, 20, 7, 15)
    ),
}
