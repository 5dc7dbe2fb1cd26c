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
    "ROLL": Case("ROLL", "", lambda b: b.roll(b.x(8, 4), 1, 0, 0, 0)),
    "TRI": Case("TRI", "", lambda b: b.tri(b.x(8, 8), 2)),
    "MUL_MAT_ID": Case("MUL_MAT_ID", "", lambda b: b.mul_mat_id(b.x(8, 4, 3), b.x(8, 2, 5), b.indices(3, 2, 5))),
    "XIELU": Case("UNARY", "", lambda b: b.xielu(b.x(8, 4), 0.8, 0.8, 0.5, -1e-6)),
    "sinks": Case("FLASH_ATTN_EXT", "", with_sinks),
    "mode 2": Case("UPSCALE", "", lambda b: b.interpolate(b.x(8, 8, 2), 16, 16, 2, 1, 2)),
    "ROLL.*ADD_ID": Case(
        "ROLL", "", lambda b: b.add_id(b.roll(b.x(8, 4, 2), 1, 0, 0, 0), b.x(8, 6), b.indices(6, 4, 2))
    ),
}
