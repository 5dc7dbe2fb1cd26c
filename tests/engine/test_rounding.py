"""What the precision ggml rounds. That its results are ggml's own is shown in tests/interop/test_rounding.py."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from sdrpc.engine import LocalDevice
from sdrpc.engine.blocks import READ, WRITE, dequantize, quantize
from sdrpc.engine.dtypes import DTYPES
from sdrpc.engine.operations import EngineOp, OpName
from sdrpc.engine.precision import EXACT, GGML, Precision
from sdrpc.engine.program import compile_graph
from sdrpc.engine.rounding import MADE, PARTS, TILE
from sdrpc.engine.values import ordered
from sdrpc.ggml import build as b
from sdrpc.ggml.params import Conv2D, FlashAttn, Im2Col, MulMat, Unary
from sdrpc.ggml.tensor import Graph, Tensor
from sdrpc.ggml.types import BF16, F16, F32, OF_GGML, TYPES, Type
from tests.engine.compare import ALIGNMENT, Leaves, at, error, place
from tests.engine.conftest import open_device

OTHERWISE = 1e-4
"""The relative error of sums in F16 whose exponentials differ in the last bit: a few of them become the next F16."""
SCALE = 0.3


@pytest.fixture(scope="module")
def rounding() -> Iterator[LocalDevice]:
    device = open_device("ggml")
    yield device
    device.close()


def computed(device: LocalDevice, leaves: Leaves, node: Tensor) -> np.ndarray:
    """The floats of ``node``, in torch's order of dimensions."""
    buffer = device.allocate(len(leaves.memory) + node.nbytes + ALIGNMENT)
    try:
        graph, new, _ = place([node], buffer.key, len(leaves.memory), [node])
        device.write(buffer, 0, leaves.memory)
        device.compile(graph, {buffer.key: buffer}).run()
        data = bytes(device.read(buffer, new[node].offset, node.nbytes))
        return np.frombuffer(data, np.float32).reshape(node.ne[::-1])
    finally:
        device.free(buffer)


def through(x: np.ndarray, type: Type) -> np.ndarray:
    """``x`` [rows, n] as ``type``, and back."""
    values = torch.from_numpy(x)[None, None]
    if type.plain:
        return values.to(DTYPES[type]).float()[0, 0].numpy()
    return dequantize(quantize(values, type), type, (x.shape[1], x.shape[0], 1, 1))[0, 0].numpy()


def weight(leaves: Leaves, type: Type, *ne: int) -> Tensor:
    """Any bytes that mean numbers of a decent size."""
    size = type.row_bytes(ne[0]) * math.prod(ne[1:])
    return leaves.raw(type, ne, leaves.rng.integers(0, 64, size, np.uint8).tobytes())


def ops(precision: Precision, *nodes: Tensor) -> Counter[OpName]:
    """The steps of ``nodes``, whose leaves are in buffer 1."""
    compiled = compile_graph(Graph((*nodes[:-1], at(nodes[-1], 1, 1 << 24))), precision, {1: 0})
    return Counter(value.op for value in ordered(compiled.roots))


def test_every_type_that_is_multiplied_is_there() -> None:
    assert {held.name for held in MADE} == {"F16", "BF16", *(set(READ) & OF_GGML)} - {"Q8_1", "Q8_K"}
    assert {made.name for made in MADE.values()} <= {"F16", "BF16", *WRITE}
    assert all(held.block % made.block == 0 for held, made in MADE.items())  # so that every row can be made


@pytest.mark.parametrize("op", ["MUL_MAT", "MUL_MAT_ID", "FLASH_ATTN_EXT"])
@pytest.mark.parametrize("held", MADE, ids=str)
def test_the_operand_is_what_the_codec_makes_of_it(
    op: str, held: Type, rounding: LocalDevice, exact: LocalDevice
) -> None:
    """To the bit what exact precision makes of operands that were rounded before."""
    leaves = Leaves()
    x = leaves.rng.standard_normal((4, 256)).astype(np.float32)
    given, before = leaves.array(x), leaves.array(through(x, MADE[held]))
    w, values = weight(leaves, held, 256, 6), leaves.normal(8, 6)
    matrices, ids = weight(leaves, held, 256, 6, 3), leaves.integers(0, 3, 1, 4)
    scale = 1 / np.abs(computed(exact, leaves, b.mul_mat(w, given))).max()

    def node(x: Tensor) -> Tensor:
        if op == "FLASH_ATTN_EXT":
            return b.node(op, x, w, values, params=FlashAttn(float(scale)))
        if op == "MUL_MAT_ID":
            return b.node(op, matrices, replace(x, ne=(256, 1, 4, 1), nb=(4, 1024, 1024, 4096)), ids, params=MulMat())
        return b.mul_mat(w, x)

    result = computed(rounding, leaves, node(given))
    np.testing.assert_array_equal(result, computed(exact, leaves, node(before)))
    assert not np.array_equal(result, computed(exact, leaves, node(given)))


@pytest.mark.parametrize(("held", "other"), [(F32, F32), (F16, F16), (TYPES["Q4_0"], TYPES["Q8_0"]), (F32, F16)])
def test_what_suits_already_is_not_rounded(held: Type, other: Type) -> None:
    product = b.mul_mat(b.leaf(held, 256, 4, buffer=1), b.leaf(other, 256, 3, buffer=1, offset=1 << 16))
    assert ops(GGML, product) == ops(EXACT, product)


@pytest.mark.parametrize(("kernel", "copies"), [(F32, 0), (F16, 1), (TYPES["Q8_0"], 0)], ids=str)
def test_an_image_is_rounded_for_f16_alone(kernel: Type, copies: int) -> None:
    """ggml has no other convolutions. Rows of an image are of any length: there are no blocks of them."""
    image = b.leaf(F32, 33, 5, 4, buffer=1, offset=1 << 16)
    node = b.node("CONV_2D", b.leaf(kernel, 32, 1, 4, 8, buffer=1), image, params=Conv2D(1, 1, 0, 0, 1, 1))
    assert ops(GGML, node)["CPY"] == copies


def test_an_operand_of_several_products_is_rounded_once() -> None:
    x = b.node("UNARY", b.leaf(F32, 256, 3, buffer=1), params=Unary("SILU"))
    products = [b.mul_mat(b.leaf(TYPES["Q4_K"], 256, 4, buffer=1, offset=i << 16), x) for i in (1, 2)]
    nodes = x, *products, b.node("ADD", *products)
    assert ops(GGML, *nodes) - ops(EXACT, *nodes) == {"CPY": 1, EngineOp.DEQUANTIZE: 1}


def test_exact_precision_rounds_nothing() -> None:
    product = b.mul_mat(b.leaf(TYPES["Q4_0"], 32, 4, buffer=1), b.leaf(F32, 32, 3, buffer=1, offset=1 << 16))
    assert ops(EXACT, product) == {EngineOp.LEAF: 2, EngineOp.WEIGHT: 1, "MUL_MAT": 1}
    assert ops(GGML, product) == {EngineOp.LEAF: 2, EngineOp.WEIGHT: 1, "CPY": 1, EngineOp.DEQUANTIZE: 1, "MUL_MAT": 1}


def test_a_convolution_is_still_one() -> None:
    """Its patches were rounded when they were unrolled."""
    kernel, image = b.leaf(F16, 3, 3, 4, 8, buffer=1), b.leaf(F32, 6, 5, 4, buffer=1, offset=1 << 16)
    columns = b.node("IM2COL", kernel, image, params=Im2Col(1, 1, 1, 1, 1, 1, 1), type=F16)
    patches, rows = b.reshape(columns, 36, 30), b.reshape(kernel, 36, 8)
    product = b.mul_mat(patches, rows)
    nodes = columns, patches, rows, product, b.node("UNARY", product, params=Unary("SILU"))
    assert ops(GGML, *nodes) == ops(EXACT, *nodes)
    assert ops(GGML, *nodes)["CONV_2D"] == 1


@pytest.mark.parametrize(
    ("queries", "keys", "k", "v", "op"),
    [
        (3, 40, F16, F16, EngineOp.FLASH_ATTN_F16_SUMS), (TILE, 40, F16, F16, "FLASH_ATTN_EXT"),
        (TILE, 40, BF16, F16, EngineOp.FLASH_ATTN_F16_SUMS), (3, 40, F16, F32, "FLASH_ATTN_EXT"),
        (1, PARTS, F16, F16, "FLASH_ATTN_EXT"),
    ],
)  # fmt: skip
def test_what_adds_up_in_f16(queries: int, keys: int, k: Type, v: Type, op: str) -> None:
    q = b.leaf(F32, 32, queries, buffer=1)
    held = [b.leaf(kind, 32, keys, buffer=1, offset=i << 16) for i, kind in ((1, k), (2, v))]
    assert ops(GGML, b.node("FLASH_ATTN_EXT", q, *held, params=FlashAttn(SCALE)))[op] == 1


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("cap", [0.0, 2.0], ids=["", "cap"])
def test_attention_adds_up_in_f16(cap: float, sinks: bool, rounding: LocalDevice, exact: LocalDevice) -> None:
    """Key after key, as in ggml; a query that sees nothing gets nothing."""
    queries, keys, heads, size = 5, 200, 2, 24
    leaves = Leaves()
    q, k, v = (leaves.rng.standard_normal((heads, n, size)).astype(np.float16) for n in (queries, keys, keys))
    mask = np.where(leaves.rng.uniform(size=(queries, keys)) < 1 / 3, -np.inf, 0)
    mask[2] = -np.inf
    mask[1, :7] = -np.inf
    share = leaves.rng.standard_normal(heads).astype(np.float32)
    operands = leaves.array(q), leaves.array(k, "F16"), leaves.array(v, "F16"), leaves.array(mask, "F16")
    node = b.node("FLASH_ATTN_EXT", *operands, *([leaves.array(share)] if sinks else []),
                  params=FlashAttn(SCALE, 0.0, cap))  # fmt: skip

    scores = SCALE * (q.astype(np.float32) @ k.astype(np.float32).swapaxes(1, 2))
    scores = (cap * np.tanh(scores / cap) if cap else scores) + mask
    wanted = np.zeros((1, queries, heads, size), np.float32)
    for head, query in np.ndindex(heads, queries):
        largest, total, divisor = -np.inf, np.zeros(size, np.float16), 0.0
        for score, value in zip(scores[head, query], v[head].astype(np.float32), strict=True):
            if score == -np.inf:
                continue
            if score > largest:
                smaller, largest = np.float32(np.exp(largest - score)), score
                total, divisor = (total.astype(np.float32) * smaller).astype(np.float16), divisor * smaller
            weight = np.float32(np.exp(score - largest))
            total, divisor = (total.astype(np.float32) + weight * value).astype(np.float16), divisor + weight
        if divisor:
            wanted[0, query, head] = total / (divisor + (np.exp(share[head] - largest) if sinks else 0))
    assert error(computed(rounding, leaves, node), wanted) <= OTHERWISE
    assert error(computed(exact, leaves, node), wanted) > OTHERWISE
