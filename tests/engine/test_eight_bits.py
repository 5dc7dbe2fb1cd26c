"""Weights of 8 bits a number that are multiplied as they are. ``SDRPC_TEST_DEVICE=CUDA0``: on tensor cores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from sdrpc.checkpoints import foreign
from sdrpc.engine import LocalDevice
from sdrpc.engine.blocks.eight_bits import EIGHT_BITS
from sdrpc.engine.operations import EngineOp
from sdrpc.engine.ops.eight_bits import floats_by_rows, floats_then_scales
from sdrpc.engine.precision import MANY_ROWS, Precision, assign, choose
from sdrpc.engine.values import ordered, trace
from sdrpc.ggml import build as b
from sdrpc.ggml.params import MulMat
from sdrpc.ggml.tensor import Graph, Tensor
from sdrpc.ggml.types import TYPES
from tests.engine.compare import Leaves, at, error, place
from tests.support import reference

Array = np.ndarray

DEVICE = os.environ.get("SDRPC_TEST_DEVICE", "CPU")
HAS_ALL = Precision("fast", torch.bfloat16, floats8=True, integers8=True)
"""What a GPU from Ada on does in *fast*. A CPU can do it as well, slowly."""

NARROW = 4e-3
"""Relative error (L2): a result is rounded to bfloat16 twice."""
COARSE = {torch.float8_e4m3fn: 0.04, torch.float8_e5m2: 0.04, torch.int8: 0.012}
"""The same of numbers rounded to 3 bits behind the first one, evenly within a binade: 2⁻⁴ / √3 of the number, and of
normal numbers in 255 steps to the largest one of some hundred."""


def scales_rows(place: torch.device) -> bool:
    """Whether 8-bit floats can be multiplied with a scale for each row: torch 2.11 can't on a CPU."""
    codes = torch.zeros((32, 32), dtype=torch.float8_e4m3fn, device=place)
    scales = torch.ones((32, 1), device=place)
    try:
        floats_by_rows(codes, scales, codes, scales[:, 0], None)
    except RuntimeError:
        return False
    return True


@pytest.fixture(scope="module")
def eights() -> Iterator[LocalDevice]:
    """On a GPU what *fast* is there, and integers also where they don't pay; skipped where it has no such units."""
    if DEVICE == "CPU":
        device = LocalDevice("CPU", torch.device("cpu"), HAS_ALL, threads=2)
    else:
        place = torch.device("cuda", int(DEVICE.removeprefix("CUDA")))
        device = LocalDevice(DEVICE, place, replace(choose("fast", place), integers8=True))
    if not device.precision.floats8 or (DEVICE == "CPU" and not scales_rows(device.torch_device)):
        device.close()
        pytest.skip(f"{DEVICE} multiplies no 8-bit floats, or none with a scale for each row")
    yield device
    device.close()


def blocks(rng: np.random.Generator, name: str, rows: int, k: int, per_row: bool) -> Array:
    """Rows of random codes in a type's blocks, with one scale for each row or one for each block."""
    held, kind = TYPES[name], EIGHT_BITS[name]
    raw = np.empty((rows, k // held.block, held.size), np.uint8)
    count = (rows, 1 if per_row else raw.shape[1])
    if kind.head == 4:
        raw[..., :4] = rng.uniform(0.01, 0.1, count).astype("f4")[..., None].view(np.uint8)
    else:
        raw[..., :1] = rng.integers(120, 124, count)[..., None]
    numbers = torch.from_numpy(rng.standard_normal((*raw.shape[:2], held.block)))
    scaled = (numbers * 30).round() if kind.dtype is torch.int8 else numbers
    raw[..., kind.head :] = scaled.to(kind.dtype).view(torch.uint8).numpy()
    return raw.reshape(rows, -1)


def floats(raw: Array, name: str) -> Array:
    """What the blocks mean, as a checkpoint's reader says it."""
    held = TYPES[name]
    return foreign.READ[name](raw.reshape(-1, held.size)).reshape(len(raw), -1).astype("f8")


E4M3 = np.sort(foreign.READ["F8_E4M3"](np.delete(np.arange(256, dtype=np.uint8), (127, 255))[None]).reshape(-1))


def as_e4m3(x: Array) -> Array:
    """Each row in 8-bit floats of which the largest is 448, times its scale: the nearest number of all there are."""
    scale = np.abs(x).max(1, keepdims=True) / 448
    middle = (E4M3[1:] + E4M3[:-1]) / 2
    nearest: Array = E4M3[np.searchsorted(middle, x / scale)] * scale
    return nearest


def as_integers(x: Array) -> Array:
    """Each row in integers up to 127, rotated in groups of 256 and, as weights are read so, back."""
    hadamard = foreign.hadamard(256).astype("f8")
    turned = (x.reshape(-1, 256) @ hadamard).reshape(x.shape)
    scale = np.abs(turned).max(1, keepdims=True) / 127
    rounded: Array = (np.round(turned / scale) * scale).reshape(-1, 256) @ hadamard
    return rounded.reshape(x.shape)


def run(device: LocalDevice, leaves: Leaves, nodes: list[Tensor]) -> tuple[Array, set[object]]:
    """The last of ``nodes``, and the operations of the program."""
    last = nodes[-1]
    buffer = device.allocate(len(leaves.memory) + last.nbytes + 64)
    graph, new, end = place(nodes, buffer.key, len(leaves.memory), [last])
    device.write(buffer, 0, leaves.memory)
    program = device.compile(graph, {buffer.key: buffer})
    for _ in range(2):  # the second time with what was kept
        program.run()
    held = {buffer.key: np.frombuffer(device.read(buffer, 0, end), np.uint8)}
    operations: set[object] = {value.op for value in ordered(program.bound.compiled.roots)}
    device.free(buffer)
    return reference.read(new[last], held).reshape(-1, last.ne[0]), operations


@pytest.mark.parametrize("name", EIGHT_BITS)
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_rounded_activations(eights: LocalDevice, name: str, bias: bool) -> None:
    k, m, n = 512, 48, MANY_ROWS + 24
    leaves = Leaves(5)
    raw = blocks(leaves.rng, name, m, k, per_row=True)
    values = leaves.rng.standard_normal((n, k)).astype("f4") * np.float32(3)
    values[7] = 0
    values[8, ::2] *= np.float32(1e-41)  # of which the reciprocal is no number
    values[8, 1::2] = 0
    weight, x = leaves.raw(TYPES[name], (k, m), raw.tobytes()), leaves.array(values)
    nodes = [b.mul_mat(weight, x)]
    added = leaves.normal(m)
    if bias:
        nodes.append(b.node("ADD", nodes[0], added))
    got, operations = run(eights, leaves, nodes)
    assert EngineOp.PRODUCT_8BIT in operations
    integers = EIGHT_BITS[name].dtype is torch.int8
    with np.errstate(invalid="ignore"):  # the row of zeros
        rounded = np.nan_to_num((as_integers if integers else as_e4m3)(values.astype("f8")))
    row = np.frombuffer(leaves.memory, "<f4", m, added.offset).astype("f8") if bias else 0
    assert error(got, rounded @ floats(raw, name).T + row) <= NARROW
    assert error(got, values.astype("f8") @ floats(raw, name).T + row) <= COARSE[EIGHT_BITS[name].dtype]


@pytest.mark.parametrize("bias", [False, True])
def test_scales_in_a_product_or_after_it(eights: LocalDevice, bias: bool) -> None:
    rng = torch.Generator().manual_seed(3)
    x, w = (torch.randn(n, 64, generator=rng).to(torch.float8_e4m3fn) for n in (24, 32))
    scale, scales, added = (
        torch.rand(24, 1, generator=rng),
        torch.rand(32, generator=rng),
        torch.randn(32, generator=rng),
    )
    wanted = (x.double() @ w.double().T) * scale * scales + (added if bias else 0)
    on = [each.to(eights.torch_device) for each in (x, scale, w, scales, added)]
    ways = [floats_then_scales]
    if DEVICE == "CPU" or torch.cuda.get_device_capability(eights.torch_device) >= (9, 0):
        ways.append(floats_by_rows)
    for way in ways:
        got = way(*on[:4], on[4] if bias else None)
        assert error(got.double().cpu().numpy(), wanted.numpy()) <= NARROW


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_blocks_of_other_scales_in_a_row_are_rounded_again(eights: LocalDevice, name: str) -> None:
    leaves = Leaves(6)
    raw = blocks(leaves.rng, name, 32, 1024, per_row=False)
    values = leaves.rng.standard_normal((64, 1024)).astype("f4")
    got, _ = run(eights, leaves, [b.mul_mat(leaves.raw(TYPES[name], (1024, 32), raw.tobytes()), leaves.array(values))])
    once = COARSE[EIGHT_BITS[name].dtype]
    assert error(got, values.astype("f8") @ floats(raw, name).T) <= 2 * once


@pytest.mark.parametrize(
    ("precision", "type", "ne", "prec", "wanted"),
    [
        (HAS_ALL, "F8_E4M3_SCALED", (64, 32, 17), 0, True),
        (HAS_ALL, "F8_E4M3_SCALED", (64, 32, 16), 0, False),  # few rows
        (HAS_ALL, "F8_E4M3_SCALED", (64, 24, 17), 0, False),  # not in whole sixteens
        (HAS_ALL, "F8_E4M3_SCALED", (64, 32, 17), 10, False),  # in float32, the client says
        (HAS_ALL, "F8_E4M3", (64, 32, 17), 0, False),  # nobody meant that
        (replace(HAS_ALL, floats8=False), "F8_E4M3_SCALED", (64, 32, 17), 0, False),
        (replace(HAS_ALL, floats8=False), "I8_CONVROT", (256, 32, 17), 0, True),
        (Precision("exact"), "F8_E4M3_SCALED", (64, 32, 17), 0, False),
    ],
)
def test_where_they_are_taken_as_they_are(
    precision: Precision, type: str, ne: tuple[int, int, int], prec: int, wanted: bool
) -> None:
    k, m, n = ne
    x = b.leaf(TYPES["F32"], k, n, buffer=1, offset=1 << 16)
    product = b.node("MUL_MAT", b.leaf(TYPES[type], k, m, buffer=1), x, params=MulMat(prec))
    (value,) = assign(trace(Graph((at(product, 1, 1 << 20),))).roots, precision)
    assert (value.op is EngineOp.PRODUCT_8BIT) is wanted
