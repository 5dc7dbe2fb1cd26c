"""Blocks as floats and floats as blocks. That the bytes are ggml's own is shown in tests/interop/test_blocks.py."""

from __future__ import annotations

import os
from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch

from sdrpc.checkpoints import foreign
from sdrpc.engine import LocalDevice, blocks
from sdrpc.engine.blocks import READ, WRITE, dequantize, quantize
from sdrpc.engine.precision import EXACT
from sdrpc.ggml import build as b
from sdrpc.ggml.params import Im2Col
from sdrpc.ggml.rules.base import FLOATS, READABLE, WRITABLE
from sdrpc.ggml.types import F16, TYPES
from tests.engine.compare import Leaves, at, check, place, same
from tests.support import reference

DEVICE = torch.device(os.environ.get("SDRPC_TEST_DEVICE", "CPU").rstrip("0123456789").lower())

LOSS = {
    "Q8_0": 1e-4, "Q8_1": 1e-4, "Q8_K": 1e-4, "Q6_K": 1e-3, "Q5_0": 3e-3, "Q5_1": 2e-3, "Q5_K": 2e-3, "Q4_0": 1e-2,
    "Q4_1": 7e-3, "Q4_K": 7e-3, "IQ4_NL": 8e-3, "IQ4_XS": 6e-3, "MXFP4": 2e-2, "NVFP4": 1e-2, "Q3_K": 3e-2,
    "Q2_K": 0.1, "Q2_0": 0.6, "TQ1_0": 0.7, "TQ2_0": 0.7, "Q1_0": 0.5,
}  # fmt: skip
"""The normalized mean square error of normally distributed numbers that are quantized: what so many bits can hold."""


def halves(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


UNKNOWN_TO_GGUF: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q1_0": lambda b: halves(b[:, :2]) * np.where(np.unpackbits(b[:, 2:], axis=1, bitorder="little"), 1, -1),
    "Q2_0": lambda b: halves(b[:, :2]) * ((b[:, 2:, None] >> np.arange(0, 8, 2) & 3).reshape(len(b), -1) - 1.0),
    "Q8_1": lambda b: halves(b[:, :2]) * b[:, 4:].view(np.int8),
    "Q8_K": lambda b: np.ascontiguousarray(b[:, :4]).view(np.float32) * b[:, 4:260].view(np.int8),
    **foreign.READ,
}
"""What the gguf library does not read: from ggml-common.h; of types that ggml does not have, numpy's way, which is held
to double precision in tests/checkpoints/test_quantized.py."""


def read(raw: np.ndarray, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of blocks as floats."""
    held, (rows, size) = TYPES[name], raw.shape
    ne = (size // held.size * held.block, rows, 1, 1)
    return dequantize(torch.from_numpy(raw).to(DEVICE)[None, None], held, ne, dtype)[0, 0].cpu()


def written(values: np.ndarray, name: str) -> np.ndarray:
    """Rows of floats as blocks."""
    return quantize(torch.from_numpy(values).to(DEVICE)[None, None], TYPES[name])[0, 0].cpu().numpy()


def test_every_type_is_there() -> None:
    kinds = {held.name for held in TYPES.values() if not held.plain}
    assert set(READ) == kinds == READABLE - FLOATS
    assert set(WRITE) == WRITABLE - FLOATS == set(LOSS)
    assert kinds >= {kind.name for kind in gguf.GGMLQuantizationType} - {t.name for t in TYPES.values() if t.plain}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("rows", [1, 3])
def test_blocks_may_begin_at_any_byte(name: str, rows: int) -> None:
    held = TYPES[name]
    ne = (held.block, rows, 1, 1)
    raw = np.random.default_rng(rows).integers(0, 128, (1, 1, rows, held.size), dtype=np.uint8)
    expected = dequantize(torch.from_numpy(raw).to(DEVICE), held, ne)
    for offset in range(1, 9):
        memory = torch.zeros(raw.size + 8, dtype=torch.uint8, device=DEVICE)
        shifted = memory[offset : offset + raw.size].view(raw.shape).copy_(torch.from_numpy(raw))
        assert torch.equal(dequantize(shifted, held, ne).nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("rows", [1, 7])
def test_reading_is_as_in_gguf(name: str, rows: int) -> None:
    """Any bytes, also those that no writer makes."""
    held = TYPES[name]
    raw = np.random.default_rng(rows).integers(0, 256, (rows, 3 * held.size), dtype=np.uint8)
    if name == "I8_CONVROT":  # sums of any floats depend on their order, those of such ones are exact
        raw.reshape(-1, held.size)[:, :4] = np.float32([0.5]).view(np.uint8)
    with np.errstate(all="ignore"):
        if name in UNKNOWN_TO_GGUF:
            wanted = UNKNOWN_TO_GGUF[name](raw.reshape(-1, held.size)).reshape(rows, -1).astype(np.float32)
        else:
            wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(read(raw, name).numpy(), wanted)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4"])
def test_writing_is_as_in_gguf(name: str) -> None:
    values = np.random.default_rng(3).standard_normal((5, 512)).astype(np.float32)
    wanted = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(written(values, name), wanted)


@pytest.mark.parametrize("name", WRITE)
def test_what_is_written_can_be_read(name: str) -> None:
    values = np.random.default_rng(4).standard_normal((9, 512)).astype(np.float32)
    error = read(written(values, name), name).numpy() - values
    assert (error**2).sum() <= LOSS[name] * (values**2).sum()


@pytest.mark.parametrize("name", WRITE)
def test_zeros_stay_zeros(name: str) -> None:
    values = np.zeros((2, 256), np.float32)
    assert not read(written(values, name), name).any()


@pytest.mark.parametrize("name", WRITE)
def test_any_numbers_can_be_written(name: str) -> None:
    """Nothing that a client may compute raises, or reaches into its neighbours' blocks."""
    values = np.random.default_rng(5).standard_normal((8, 256)).astype(np.float32)
    strange = values.copy()
    for row, number in enumerate((np.nan, np.inf, -np.inf, 3e38, 1e-45)):
        strange[row, row::7] = number
    np.testing.assert_array_equal(written(strange, name)[5:], written(values, name)[5:])


@pytest.mark.parametrize("name", READ)
def test_large_tensors_are_converted_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = TYPES[name]
    raw = np.random.default_rng(6).integers(0, 64, (9, 3 * held.size), dtype=np.uint8)
    values = np.random.default_rng(7).standard_normal((9, 768)).astype(np.float32)
    whole = read(raw, name, torch.bfloat16)
    whole_written = written(values, name) if name in WRITE else None
    monkeypatch.setattr(blocks, "CHUNK", 4 * blocks.TRIALS * 256)
    monkeypatch.setattr(blocks, "LARGE_CHUNK", 4 * blocks.TRIALS * 256)
    np.testing.assert_array_equal(read(raw, name, torch.bfloat16).float(), whole.float())
    np.testing.assert_array_equal(whole.float(), read(raw, name).bfloat16().float())
    if whole_written is not None:
        np.testing.assert_array_equal(written(values, name), whole_written)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats_can_be_written(dtype: torch.dtype) -> None:
    values = torch.randn(1, 1, 3, 64, generator=torch.Generator().manual_seed(1), device="cpu").to(dtype)
    assert torch.equal(quantize(values, TYPES["Q8_0"]), quantize(values.float(), TYPES["Q8_0"]))


@pytest.mark.parametrize("overwritten", [False, True])
def test_a_convolution_with_a_kernel_in_blocks(exact: LocalDevice, overwritten: bool) -> None:
    """Also where the graph writes over the kernel afterwards: then it is what it was before."""
    leaves = Leaves()
    shape, kernel, other = leaves.normal(3, 3, 32, 4, type="F16"), *(leaves.normal(288, 4, type="Q8_0") for _ in "ab")
    columns = b.node("IM2COL", shape, leaves.normal(6, 5, 32), params=Im2Col(1, 1, 1, 1, 1, 1, 1), type=F16)
    rows = b.reshape(columns, 288, 30)
    product = b.mul_mat(kernel, rows)
    image = b.permute(b.reshape(product, 4, 6, 5, 1), 2, 0, 1, 3)
    nodes = [columns, rows, product, image.src[0], image]
    check(exact, leaves, [*nodes, *([b.cpy(other, kernel)] if overwritten else []), b.cont(image)], runs=1)


@pytest.mark.parametrize(("budget", "used"), [(0, 0), (5000, 4096), (1 << 20, 4096 + 65536)])
def test_weights_stay_in_blocks_and_become_floats_within_a_budget(budget: int, used: int) -> None:
    device = LocalDevice("CPU", torch.device("cpu"), EXACT, threads=1, dequant_cache=budget)
    try:
        leaves = Leaves()
        weights, x = [leaves.normal(256, n, type="Q4_0") for n in (4, 64)], leaves.normal(256)
        buffer = device.allocate(1 << 16)
        device.write(buffer, 0, leaves.memory)
        outputs = [at(b.mul_mat(w, x), buffer.key, 49152 + 1024 * i) for i, w in enumerate(weights)]
        graph, _, _ = place(outputs, buffer.key, 0, [])
        program = device.compile(graph, {buffer.key: buffer})
        wanted = reference.run(graph, {buffer.key: leaves.memory + bytes(1 << 16)}, keep=graph.nodes)
        for _ in range(2):
            program.run()
            assert device._weights.used == used
            memory = {buffer.key: np.frombuffer(device.read(buffer, 0, buffer.size), np.uint8)}
            for node in graph.nodes:
                same(device, node, reference.read(node, memory), wanted[node])
        assert bytes(device.read(buffer, 0, len(leaves.memory))) == bytes(leaves.memory)
    finally:
        device.close()


@pytest.mark.parametrize("name", READ)
def test_no_number_is_looked_at_on_the_way(name: str) -> None:
    """On tensors that have no numbers a look at one raises (on a device it would wait), and so does a CPU's tensor."""
    held = TYPES[name]
    raw = torch.empty(1, 2, 3, 2 * held.size, dtype=torch.uint8, device="meta")
    floats = dequantize(raw, held, (2 * held.block, 3, 2, 1), torch.float16)
    assert (floats.shape, floats.dtype) == ((1, 2, 3, 2 * held.block), torch.float16)
    if name in WRITE:
        assert quantize(floats, held).shape == raw.shape
