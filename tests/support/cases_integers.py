"""Small graphs of weights in I8 that have scales (see :mod:`tests.support.cases`)."""

from __future__ import annotations

from collections.abc import Callable

from sdrpc.ggml import params as p
from sdrpc.ggml.build import node
from sdrpc.ggml.tensor import Tensor
from sdrpc.ggml.types import TYPES
from tests.support.feed import Feed

Case = Callable[[Feed], Tensor]


def product(f: Feed, x: Tensor, outputs: int, group: int, bias: bool = True, packed: bool = True) -> Tensor:
    """``x`` times a random matrix: quantized before, as stable-diffusion.cpp does it with rotated weights, or by the
    product itself."""
    weight = f.of(f.random.integers(-128, 128, (outputs, x.ne[0])), TYPES["I8"])
    scales = f.of(f.random.uniform(0.01, 0.1, outputs))
    rows = node("QUANTIZE_I8_CONVROT", x, params=p.Rotation(group)) if packed else x
    return node(
        "MUL_MAT", weight, rows, scales, f(outputs) if bias else None,
        params=p.MulMat(group=group), ne=(outputs, *x.ne[1:]),
    )  # fmt: skip


CASES: dict[str, Case] = {
    "QUANTIZE_I8_CONVROT": lambda f: product(f, f(256, 5), 7, 256),
    "QUANTIZE_I8_CONVROT-batches": lambda f: product(f, f(32, 3, 2, 2), 9, 16, bias=False),
    "QUANTIZE_I8_CONVROT-one": lambda f: product(f, f(3, 4), 5, 1),
    "MUL_MAT-i8": lambda f: product(f, f(36, 5, 2), 7, 0, packed=False),
    "MUL_MAT-i8-rotated": lambda f: product(f, f(64, 6), 3, 64, bias=False, packed=False),
}
