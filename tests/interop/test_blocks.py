"""Blocks are read and written to the bit as ggml's CPU backend does it."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from sdrpc.engine.blocks import READ, WRITE, dequantize, quantize
from sdrpc.ggml.types import OF_GGML, TYPES
from tests.support import ggml

pytestmark = pytest.mark.interop

NO_READER = frozenset({"Q8_1", "Q8_K"})
"""What ggml makes of activations and never reads back."""

Random = np.random.Generator

NUMBERS: dict[str, Callable[[Random, tuple[int, int]], np.ndarray]] = {
    "normal": lambda random, shape: random.standard_normal(shape),
    "uniform": lambda random, shape: random.uniform(-1, 1, shape),
    "positive": lambda random, shape: random.uniform(0.5, 1, shape),
    "negative": lambda random, shape: random.uniform(-2, -0.5, shape),
    "few values": lambda random, shape: random.integers(-3, 4, shape),
    "sparse": lambda random, shape: random.standard_normal(shape) * (random.uniform(size=shape) < 0.05),
    "outliers": lambda random, shape: random.standard_t(1, shape),
    "of all sizes": lambda random, shape: random.standard_normal(shape) * np.exp(4 * random.standard_normal(shape)),
    "large": lambda random, shape: random.standard_normal(shape) * 1e4,
    "tiny": lambda random, shape: random.standard_normal(shape) * 1e-20,
    "equal": lambda random, shape: np.full(shape, 0.7),
    "zero": lambda random, shape: np.zeros(shape),
}
"""What is quantized: where searches end differently, ties, signs of zero, scales that float16 can't hold."""


@pytest.fixture(scope="module", autouse=True)
def backend() -> Iterator[None]:
    """A CPU backend has set up the tables of its library."""
    backend = ggml.cpu()
    yield
    ggml.library().ggml_backend_free(backend)


@pytest.mark.parametrize("name", [name for name in TYPES if name in OF_GGML])
def test_sizes(name: str) -> None:
    traits = ggml.library().ggml_get_type_traits(ggml.TYPES[name]).contents
    assert (traits.block, traits.size) == (TYPES[name].block, TYPES[name].size)


@pytest.mark.parametrize("name", sorted((set(READ) & OF_GGML) - NO_READER))
def test_reading(name: str) -> None:
    held = TYPES[name]
    raw = np.random.default_rng(1).integers(0, 256, (300, held.size), dtype=np.uint8)
    wanted = np.empty((300, held.block), np.float32)
    ggml.library().ggml_get_type_traits(ggml.TYPES[name]).contents.to_float(
        raw.ctypes.data, wanted.ctypes.data, wanted.size
    )
    got = dequantize(torch.from_numpy(raw)[None, None], held, (held.block, 300, 1, 1))[0, 0].numpy()
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(np.signbit(got[~np.isnan(got)]), np.signbit(wanted[~np.isnan(wanted)]))


@pytest.mark.parametrize("name", WRITE)
def test_writing(name: str) -> None:
    held, random = TYPES[name], np.random.default_rng(2)
    values = np.concatenate([make(random, (64, held.block)) for make in NUMBERS.values()]).astype(np.float32)
    wanted = np.zeros((len(values), held.size), np.uint8)
    write = ggml.library().ggml_get_type_traits_cpu(ggml.TYPES[name]).contents.from_float
    write(values.ctypes.data, wanted.ctypes.data, values.size)
    got = quantize(torch.from_numpy(values)[None, None], held)[0, 0].numpy()
    if name == "IQ4_NL":  # where the scale is zero ggml leaves what was on its stack
        got, wanted = (np.where(raw[:, :2].any(1, keepdims=True), raw, 0) for raw in (got, wanted))
    wrong = (got != wanted).any(1).reshape(len(NUMBERS), -1).sum(1)
    assert not wrong.any(), dict(zip(NUMBERS, wrong.tolist(), strict=True))


def test_no_others_are_written_by_ggml() -> None:
    lib = ggml.library()
    written = {
        name
        for name in set(READ) & OF_GGML
        if c.cast(lib.ggml_get_type_traits_cpu(ggml.TYPES[name]).contents.from_float, c.c_void_p).value
    }
    assert written == set(WRITE)
