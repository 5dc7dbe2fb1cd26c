"""Weights in I8 with scales, and what is multiplied with them: rounding, layout, exact sums."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdrpc.engine import LocalDevice
from sdrpc.ggml import build as b
from sdrpc.ggml.params import MulMat, Rotation, Unary
from sdrpc.ggml.tensor import Tensor
from sdrpc.ggml.types import I8
from tests.engine.compare import Leaves, check, place
from tests.support import reference, reference_integers

Array = np.ndarray


def computed(device: LocalDevice, leaves: Leaves, node: Tensor) -> Array:
    """``node`` from ``device``, in torch's order."""
    buffer = device.allocate(len(leaves.memory) + node.nbytes + 64)
    nodes = [s for s in node.src if s is not None and s.op != "NONE"]
    graph, new, end = place([*nodes, node], buffer.key, len(leaves.memory), [node])
    device.write(buffer, 0, leaves.memory)
    device.compile(graph, {buffer.key: buffer}).run()
    held = {buffer.key: np.frombuffer(device.read(buffer, 0, end), np.uint8)}
    device.free(buffer)
    return reference.read(new[node], held)


def product(leaves: Leaves, x: Tensor, weight: Array, group: int, bias: bool, packed: bool) -> list[Tensor]:
    n = len(weight)
    scales = leaves.array(leaves.rng.uniform(0.01, 0.1, n))
    rows = b.node("QUANTIZE_I8_CONVROT", x, params=Rotation(group)) if packed else x
    y = b.node(
        "MUL_MAT", leaves.array(weight, "I8"), rows, scales, leaves.normal(n) if bias else None,
        params=MulMat(group=group), ne=(n, *x.ne[1:]),
    )  # fmt: skip
    return [y] if rows is x else [rows, y]


@given(
    group=st.sampled_from((1, 4, 16, 64, 256)),
    groups=st.integers(1, 3),
    ne=st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 2)),
    outputs=st.integers(1, 9),
    bias=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape(
    exact: LocalDevice,
    group: int,
    groups: int,
    ne: tuple[int, int, int],
    outputs: int,
    bias: bool,
    packed: bool,
    seed: int,
) -> None:
    leaves = Leaves(seed)
    k = group * groups
    weight = leaves.rng.integers(-128, 128, (outputs, k))
    check(exact, leaves, product(leaves, leaves.normal(k, *ne), weight, group, bias, packed))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "in one"])
def test_the_numbers_of_stable_diffusion_cpp(device: LocalDevice, packed: bool) -> None:
    """Inputs of its ggml's own test (tests/test-int8-convrot.cpp), and what follows from that test's formulas."""
    i = np.arange(256)
    leaves = Leaves()
    x = leaves.array((i * 17 % 29 - 14) / 7)
    weight = np.stack([(i * (o + 3) + o * 11) % 31 - 15 for o in range(4)])
    scales, bias = leaves.array(np.array([0.125, 0.25, 0.5, 1.5])), leaves.array(np.array([-1, 0.5, 2, -3]))
    rows = b.node("QUANTIZE_I8_CONVROT", x, params=Rotation(256)) if packed else x
    node = b.node(
        "MUL_MAT", leaves.array(weight, "I8"), rows, scales, bias, params=MulMat(group=256), ne=(4,)
    )  # fmt: skip
    np.testing.assert_allclose(computed(device, leaves, node).reshape(-1), GOLDEN, rtol=1e-5)


GOLDEN = (12.383243084503851, 91.13533447140198, -58.35236208868309, -13.663877932252143)


def in_steps(x: Array, group: int) -> Array:
    """ggml's order of additions, number by number in float32 (ggml_regular_hadamard_group_f32, ggml-cpu.c)."""
    x = x.astype("f4") * np.float32(1 / np.sqrt(group))
    step = 1
    while step < group:
        for first in range(0, len(x), 4 * step):
            for i in range(first, first + step):
                p, q, r, s = x[i : i + 4 * step : step]
                x[i : i + 4 * step : step] = p + q + r - s, p + q - r + s, p - q + r + s, -p + q + r + s
        step *= 4
    return x


@pytest.mark.parametrize(("group", "k"), [(256, 512), (16, 48), (4, 20), (1, 5)])
def test_numbers_and_scales_are_ggmls_to_the_bit(exact: LocalDevice, group: int, k: int) -> None:
    """Six rows: two fill up to eight, and their scales follow. What lies behind the scales is zero."""
    leaves = Leaves(3)
    values = leaves.rng.standard_normal((6, k)).astype("f4") * np.float32(3)
    values[2] = 0
    node = b.node("QUANTIZE_I8_CONVROT", leaves.array(values), params=Rotation(group))
    rotated = np.stack([in_steps(row, group) for row in values])
    scale = np.abs(rotated).max(1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    numbers = np.clip(np.rint(rotated * inverse), -127, 127)
    wanted = reference_integers.pack(numbers, scale)
    assert len(wanted) == 8 * k + 24
    got = computed(exact, leaves, node).astype("i1").tobytes()
    assert got == wanted.ljust(node.nbytes, b"\0")


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "in one"])
def test_sums_beyond_what_float32_holds(device: LocalDevice, packed: bool) -> None:
    """All numbers as large as they can be, but for one: a sum near 2²⁷ that ends in an odd number."""
    k = 8196
    leaves = Leaves()
    weight = np.full((2, k), -128)
    weight[1, 5:] = 127
    weight[:, 0] = 1
    numbers = np.full((1, k), 127)
    numbers[0, 7::2] = -1
    packed_rows = leaves.raw(I8, (k, 5), reference_integers.pack(numbers, np.array([[1.0]])).ljust(5 * k, b"\0"))
    rows = packed_rows if packed else leaves.array(numbers.astype("f4"))
    node = b.node("MUL_MAT", leaves.array(weight, "I8"), rows, leaves.array(np.ones(2)), params=MulMat(), ne=(2, 1))
    got = computed(device, leaves, node).reshape(-1)
    assert got.tolist() == (weight @ numbers[0]).astype("f4").tolist()


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize(("n", "k", "outputs"), [(3, 24, 4), (17, 24, 8), (40, 2056, 16), (40, 24, 12), (40, 20, 16)])
def test_packed_rows_anywhere(device: LocalDevice, n: int, k: int, outputs: int, shift: int) -> None:
    """What a client copied there: scales in float32 need no alignment, and no shape changes a sum."""
    leaves = Leaves(5)
    numbers, scale = leaves.rng.integers(-127, 128, (n, k)), leaves.rng.uniform(0.1, 1, (n, 1)).astype("f4")
    packed = reference_integers.pack(numbers, scale)
    height = -(-len(packed) // k)
    memory = leaves.raw(I8, (height * k + shift,), b"\0" * shift + packed.ljust(height * k, b"\0"))
    rows = b.leaf(I8, k, height, buffer=1, offset=memory.offset + shift)
    weight = leaves.rng.integers(-128, 128, (outputs, k))
    ones = leaves.array(np.ones(outputs))
    node = b.node("MUL_MAT", leaves.array(weight, "I8"), rows, ones, params=MulMat(group=4), ne=(outputs, n))
    wanted = (numbers @ weight.T).astype("f4") * scale
    np.testing.assert_array_equal(computed(device, leaves, node)[0, 0], wanted)


def test_several_products_of_the_same_rows(device: LocalDevice) -> None:
    """As stable-diffusion.cpp has queries, keys and values; what follows is fused as ever, and not into the product."""
    leaves = Leaves(7)
    x = b.node("UNARY", leaves.normal(64, 6), params=Unary("SILU"))
    rows, first = product(leaves, x, leaves.rng.integers(-128, 128, (8, 64)), 64, False, True)
    scales = leaves.array(leaves.rng.uniform(0.01, 0.1, 8))
    weight = leaves.array(leaves.rng.integers(-128, 128, (8, 64)), "I8")
    second = b.node("MUL_MAT", weight, rows, scales, params=MulMat(group=64), ne=(8, 6))
    shifted = b.node("ADD", second, leaves.normal(8))
    fusions = check(device, leaves, [x, rows, first, second, shifted, b.node("MUL", shifted, first)])
    assert "linear" not in fusions
