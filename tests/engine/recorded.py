"""The graphs that a real sd-cli sent, and random weights for them."""

from __future__ import annotations

import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdrpc.ggml.dialect import dialects
from sdrpc.ggml.tensor import Graph, Tensor
from sdrpc.wire import graphs

DATA = Path(__file__).parent.parent / "data"
PARTS = ("clip", "unet", "vae-decoder")
PAGE = 4096
PERIOD = 100_003
"""Large weights repeat their random numbers: drawing 860 million takes longer than computing with them. A prime, so
that no two rows are alike."""

Array = np.ndarray


class Recorded(NamedTuple):
    """``graph`` on buffers that are counted from 1, and the sizes of these."""

    graph: Graph
    sizes: Mapping[int, int]


def load(part: str, keys: Mapping[int, int] | None = None) -> Recorded:
    """The recording of ``part``; its buffers have the numbers 1, 2 …, or the ``keys`` that these stand for."""
    payload = lzma.decompress((DATA / f"sd15-128px-{part}.graph.xz").read_bytes())
    numbers: dict[int, int] = {}
    lowest: dict[int, int] = {}

    def absolute(handle: int, address: int) -> tuple[int, int]:
        number = numbers.setdefault(handle, 1 + len(numbers))
        lowest[number] = min(lowest.get(number, address), address)
        return number, address

    def relative(handle: int, address: int) -> tuple[int, int]:
        number = numbers[handle]
        return (keys or {}).get(number, number), address - lowest[number] // PAGE * PAGE

    dialect = dialects()["5.0.1"]
    graphs.decode_graph(payload, dialect, absolute)
    graph = graphs.decode_graph(payload, dialect, relative).graph
    sizes: dict[int, int] = {}
    for tensor in graph.tensors:
        if tensor.buffer:
            sizes[tensor.buffer] = max(sizes.get(tensor.buffer, 0), tensor.offset + tensor.nbytes)
    return Recorded(graph, sizes)


def contents(leaf: Tensor, rng: np.random.Generator) -> Array:
    """Random numbers for a leaf such that activations stay of the order of one: weights by their fan-in, norms'
    weights about one, tokens and a timestep that exist."""
    shape = leaf.ne[::-1]
    if leaf.type.name == "I32":
        return rng.integers(0, 49408, shape).astype(np.int32)
    if leaf.elements == 1:
        return np.full(shape, 500, np.float32)
    drawn = rng.standard_normal(min(leaf.elements, PERIOD), np.float32)
    if leaf.type.name == "F16":
        fan_in = leaf.elements // (leaf.ne[3] if leaf.ne[3] > 1 else leaf.ne[1])
        scale = 0.02 if "embedding" in leaf.name else fan_in**-0.5
        return np.resize((drawn * np.float32(scale)).astype(np.float16), shape)
    drawn = np.resize(drawn, shape)
    if leaf.name.endswith("weight") and leaf.ne[1] == 1:
        return 1 + np.float32(0.1) * drawn
    if leaf.name.endswith("bias"):
        return np.float32(0.1) * drawn
    if leaf.ne[:2] == (77, 77):  # CLIP's causal mask
        return np.triu(np.full((77, 77), -np.inf, np.float32), 1).reshape(shape)
    return drawn
