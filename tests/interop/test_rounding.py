"""In the precision that rounds as ggml's CPU backend does, our server computes what that computes."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain

import pytest

from sdrpc.engine.rounding import MADE, PRODUCTS
from sdrpc.server import Server
from tests.interop.cases import OPERATIONS
from tests.interop.conftest import NativeClient
from tests.interop.worker import Signature
from tests.support import ggml

pytestmark = pytest.mark.interop

SUMS = 1e-11
"""The largest NMSE where nothing but the order of sums in float32 lies between us (measured: 3e-13)."""
OF_EIGHT_BITS = 1e-5
"""Where Q8_1 is made of an operand: ggml keeps a sum of 32 numbers in F16, by which it multiplies what the other type
adds to all of them (measured: 3e-6, of products that nearly cancel)."""
IN_F16 = 2e-6
"""Attention over values in F16: an exponential's last bit tells which F16 a sum becomes, and where ggml was built for a
processor with AVX512-FP16 it rounds the exponentials too, for heads of 128 and more (measured: 1e-8, 8e-7)."""
AFTER = 1e-7
"""Of whole graphs: sums that differ in the last bit are rounded to F16, and ggml reads GELU from a table of F16
(measured: 7e-9)."""
EACH = 4
"""Cases of each pair of types."""
TYPES = {"F32", *(held.name for held in MADE), *(made.name for made in MADE.values())}
WHOLE = {
    "conv-block": AFTER, "resnet-block": AFTER, "attention-flash": AFTER, "attention-flash-in-tiles": SUMS,
    "attention-quantized": AFTER, "transformer-block": AFTER, "causal-text-encoder": AFTER, "down-up-skip": AFTER,
    "kv-cache-f16": AFTER, "kv-cache-Q8_0": AFTER, "kv-cache-Q4_0": AFTER,
}  # fmt: skip
"""Graphs that round something, and one that only looks like it."""


def bound(signature: Signature) -> float:
    if signature.op == "FLASH_ATTN_EXT" and signature.sources[2] == "F16":
        return IN_F16
    return OF_EIGHT_BITS if {"Q4_1", "Q5_1"} & set(signature.sources) else SUMS


def some(op: str) -> list[str]:
    """Names of cases of ``op``: each type of weights, and of keys and values."""
    kinds = defaultdict(list)
    for name in OPERATIONS[op]:
        kinds[tuple(word for word in name.split("-") if word in TYPES)].append(name)
    return list(chain.from_iterable(names[:: -(-len(names) // EACH)] for names in kinds.values()))


def test_it_is_made_what_ggml_makes() -> None:
    kinds = {name: ggml.library().ggml_get_type_traits_cpu(number).contents for name, number in ggml.TYPES.items()}
    theirs = {name: ggml.NAMES[kind.vec_dot_type] for name, kind in kinds.items() if kind.vec_dot}
    assert theirs == {"F32": "F32"} | {held.name: made.name for held, made in MADE.items()}


@pytest.mark.parametrize("op", PRODUCTS)
def test_products(op: str, native_client: NativeClient, rounding_server: Server) -> None:
    names = some(op)
    outcomes = native_client.run_all(names, rounding_server.endpoint)
    wrong = [
        f"{name}: error {outcome.error:.3g} in\n{outcome.graph}"
        for name, outcome in zip(names, outcomes, strict=True)
        if outcome.signature is None or not outcome.error <= bound(outcome.signature)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_type_is_multiplied() -> None:
    for op in ("MUL_MAT", "MUL_MAT_ID", "FLASH_ATTN_EXT"):
        words = {word for name in some(op) for word in name.split("-")}
        assert {held.name for held in MADE} <= words


@pytest.mark.parametrize("name", WHOLE)
def test_graph(name: str, native_client: NativeClient, rounding_server: Server) -> None:
    """Fused, over memory that is used several times."""
    assert native_client.run(f"graph-{name}", rounding_server.endpoint, True).error <= WHOLE[name]
