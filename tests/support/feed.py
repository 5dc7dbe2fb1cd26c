"""Leaves with values: small graphs for tests, and memory for recorded ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gguf
import numpy as np

from sdrpc.ggml.build import leaf
from sdrpc.ggml.tensor import Graph, Tensor, extent
from sdrpc.ggml.types import F32, NUMPY_DTYPES, TYPES, Type
from tests.support import reference

Array = np.ndarray[Any, Any]


class Feed:
    """Makes leaves, each in a buffer of its own, and remembers their bytes in ``memory``.

    ``feed(4, 3)`` is a random F32 leaf with ne [4, 3]; ``feed.of(array)`` one with these values, in torch's order.
    """

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.memory: dict[int, Array] = {}

    def __call__(self, *ne: int, type: Type = F32, name: str = "") -> Tensor:
        return self.of(self.random.standard_normal(ne[::-1]), type, name)

    def of(self, values: Any, type: Type = F32, name: str = "") -> Tensor:
        values = np.asarray(values)
        tensor = leaf(type, *values.shape[::-1], name=name, buffer=len(self.memory) + 1)
        self.memory[tensor.buffer] = np.zeros(tensor.nbytes, np.uint8)
        store(tensor, values, self.memory)
        return tensor

    def value(self, tensor: Tensor) -> Array:
        """What a leaf holds, as float64 or int64 in torch's order, four dimensions."""
        return reference.read(tensor, self.memory)

    def run(self, *nodes: Tensor) -> Array:
        """The last of ``nodes``, after all were executed by the reference."""
        return reference.run(Graph(nodes), self.memory)[nodes[-1]]


def graph(*outputs: Tensor) -> Graph:
    """The graph of everything that ``outputs`` need."""
    order: dict[Tensor, None] = {}

    def visit(tensor: Tensor) -> None:
        if tensor in order or (tensor.op == "NONE" and tensor.view_src is None):
            return
        for source in tensor.src:
            if source is not None:
                visit(source)
        order[tensor] = None

    for output in outputs:
        visit(output)
    return Graph(tuple(order))


def store(tensor: Tensor, values: Array, memory: dict[int, Array]) -> None:
    """``values`` in torch's order into a leaf; quantized with gguf where the type asks for it."""
    values = values.reshape(tensor.ne[::-1])
    if tensor.type.plain:
        reference.write(tensor, values, memory)
    else:
        blocks = _quantize(values.astype(np.float32), tensor.type)
        memory[tensor.buffer][tensor.offset : tensor.offset + blocks.nbytes] = blocks.reshape(-1).view(np.uint8)


def _quantize(values: Array, type: Type) -> Array:
    """As gguf does; for types that it only reads, random blocks with small scales."""
    try:
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[type.name])
    except NotImplementedError:
        return _random_blocks(values, type)


_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where a super-block keeps its F16 scales (ggml-common.h)."""


def _random_blocks(values: Array, type: Type) -> Array:
    random = np.random.default_rng(values.size)
    blocks = random.integers(0, 256, (values.size // type.block, type.size), dtype=np.uint8)
    for offset in _SCALES[type.name]:
        scale = np.full(len(blocks), 0.01, np.float16)
        blocks[:, offset : offset + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks


def fill(recorded: Graph, seed: int = 0, indices: int = 8) -> dict[int, Array]:
    """Memory for a graph that came with shapes only: every buffer that it names, leaves random.

    Matrices and kernels are scaled so that activations keep their size, integers are below ``indices``. Elements keep
    their leaf's type; quantized leaves are not filled.
    """
    random = np.random.default_rng(seed)
    sizes: dict[int, int] = {}
    for tensor in recorded.tensors:
        if tensor.buffer:
            end = tensor.offset + extent(tensor.type, tensor.ne, tensor.nb)
            sizes[tensor.buffer] = max(sizes.get(tensor.buffer, 0), end)
    memory = {key: np.zeros(size, np.uint8) for key, size in sizes.items()}
    pool = random.standard_normal(1_000_003, np.float32)  # a prime: rows of matrices are shifted copies at most
    for tensor in recorded.leaves:
        if tensor.type.name in ("I32", "I64"):
            values = random.integers(0, indices, tensor.elements)
        else:
            scaled = np.roll(pool, random.integers(pool.size)) / np.float32(math.sqrt(_fan_in(tensor.ne)))
            values = np.resize(scaled.astype(NUMPY_DTYPES.get(tensor.type.name, np.float32)), tensor.elements)
        reference.write(tensor, values.reshape(tensor.ne[::-1]), memory)
    return memory


def _fan_in(ne: Sequence[int]) -> int:
    return math.prod(ne[:3]) if ne[3] > 1 else ne[0] if ne[1] > 1 else 1


QUANTIZED = tuple(TYPES[name] for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K"))
"""The quantized types that files use most."""
