"""What cases are made of: tensors through ggml's own C API, and the bounds of errors."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.support import ggml

Build = Callable[["Builder"], Any]
BOUNDS = {
    "exact": 0.0,  # copies, indices, integers
    "f32": 1e-7,  # both sides in f32: ggml's own bound between its backends
    "f16": 1e-6,  # ggml's CPU rounds an operand to f16 (2^-11), or reads a function from a table of f16
    "f16 sums": 5e-5,  # ggml's CPU accumulates attention over f16 values in f16
    "bf16": 5e-5,  # ggml's CPU rounds activations to bf16 (2^-8) for bf16 weights
    "quantized": 5e-4,  # ggml's CPU quantizes activations to 8 bits for quantized weights: its own bound
}
"""The largest normalized mean square error, ‖theirs - ours‖² / ‖theirs‖², by what limits it."""


class Case(NamedTuple):
    op: str
    build: Build  # gives the tensors (one or a tuple) whose values are compared
    bound: str  # a key of BOUNDS


class Builder:
    """Makes tensors in ggml's contexts: leaves with seeded values here, operations (``b.add(x, y)``) in ``nodes``."""

    def __init__(self, name: str) -> None:
        self.leaves, self.nodes = ggml.Context(), ggml.Context()
        self.nodes.tensor("I8", 1)  # ggml does not look at a context that holds nothing but views
        self.data: list[tuple[Any, bytes]] = []
        self.first: list[Any] = []  # nodes to compute before the results, in this order
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        return getattr(self.nodes, operation)

    def put(self, type: str, values: np.ndarray) -> Any:
        """A leaf that holds ``values`` (shape: ne reversed)."""
        tensor = self.leaves.tensor(type, *values.shape[::-1])
        self.data.append((tensor, ggml.encode(type, values)))
        return tensor

    def x(self, *ne: int, type: str = "F32", low: float = -1.0, high: float = 1.0) -> Any:
        """A leaf of random numbers."""
        return self.put(type, self.rng.uniform(low, high, ne[::-1]).astype(np.float32))

    def distinct(self, *ne: int, type: str = "F32") -> Any:
        """A leaf without equal numbers, so that orders are unique."""
        return self.put(type, self.rng.permutation(int(np.prod(ne))).reshape(ne[::-1]) - 7)

    def indices(self, below: int, *ne: int, type: str = "I32", unique: bool = False) -> Any:
        """A leaf of row numbers; ``unique``: none twice along the first dimension."""
        if not unique:
            return self.put(type, self.rng.integers(0, below, ne[::-1]))
        rows = [self.rng.permutation(below)[: ne[0]] for _ in range(int(np.prod(ne[1:])))]
        return self.put(type, np.reshape(rows, ne[::-1]))

    def mask(self, *ne: int, type: str = "F32") -> Any:
        """A leaf that is -inf in a third of its places, but nowhere in the first column."""
        values = self.rng.uniform(-1, 1, ne[::-1])
        hidden = self.rng.uniform(0, 1, ne[::-1]) < 1 / 3
        hidden[..., 0] = False
        return self.put(type, np.where(hidden, -np.inf, values))

    def part(self, *ne: int, type: str = "F32", margin: tuple[int, ...] = (4, 1, 1, 1), **range: float) -> Any:
        """A view of ``ne`` elements inside a larger leaf: rows are dense, everything else is not."""
        whole = self.x(*(n + m for n, m in zip((*ne, 1, 1, 1)[:4], margin, strict=True)), type=type, **range)
        nb = whole.contents.nb
        return self.view_4d(whole, *(*ne, 1, 1, 1)[:4], nb[1], nb[2], nb[3], nb[0] * margin[0])

    def shuffled(self, *ne: int, axes: tuple[int, int, int, int], type: str = "F32", **range: float) -> Any:
        """A leaf whose dimensions were permuted to come out as ``ne``."""
        return self.permute(self.x(*(ne[axis] for axis in axes), type=type, **range), *axes)

    def prec_f32(self, tensor: Any) -> Any:
        ggml.library().ggml_prec_set_acc(tensor, ggml.PREC_F32)
        return tensor


def shape(*ne: int) -> str:
    return "x".join(map(str, ne))


TABLE: list[tuple[str, Case]] = []


def case(op: str, label: object, build: Build, bound: str = "f32") -> None:
    TABLE.append((f"{op}-{label}", Case(op, build, bound)))


F32, F16 = ggml.TYPES["F32"], ggml.TYPES["F16"]
SMALL, ODD = (64, 5, 3, 2), (33, 7, 2, 3)
FLOATS = ("F32", "F16", "BF16")
QUANTIZED = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS",
)  # fmt: skip
