"""The reference's products of integers (see :mod:`tests.support.reference`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sdrpc.ggml.tensor import Tensor

Array = np.ndarray[Any, Any]

H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2


def hadamard(n: int) -> Array:
    """The regular Hadamard matrix of n = 4ᵐ rows, of length 1 each."""
    return np.ones((1, 1)) if n == 1 else np.kron(hadamard(n // 4), H4)


def quantized(x: Array, group: int) -> tuple[Array, Array]:
    """Rows of ``x``, rotated, as numbers of −127 … 127, and each row's scale."""
    rotated = (x.reshape(-1, group) @ hadamard(group)).reshape(-1, x.shape[-1])
    scale = np.abs(rotated).max(1, keepdims=True) / 127
    return np.clip(np.rint(rotated / np.where(scale == 0, 1, scale)), -127, 127), scale


def pack(numbers: Array, scale: Array) -> bytes:
    filling = -len(numbers) % 4 * numbers.shape[1]
    return numbers.astype("i1").tobytes() + bytes(filling) + scale.astype("<f4").tobytes()


def unpack(packed: Array, rows: int) -> tuple[Array, Array]:
    raw, k = packed.astype("i1").tobytes(), packed.shape[-1]
    start = (rows + 3) // 4 * 4 * k
    return (
        np.frombuffer(raw, "i1", rows * k).reshape(rows, k).astype(np.int64),
        np.frombuffer(raw, "<f4", rows, start).reshape(rows, 1).astype(np.float64),
    )


def _quantize(node: Tensor, x: Array) -> Array:
    packed = pack(*quantized(x, node.params.group))
    return np.frombuffer(packed.ljust(node.nbytes, b"\0"), "i1").reshape(node.ne[::-1])


def mul_mat(node: Tensor, a: Array, b: Array, scales: Array, bias: Array | None = None) -> Array:
    rows = node.elements // node.ne[0]
    numbers, scale = unpack(b, rows) if b.dtype == np.int64 else quantized(b, node.params.group or 1)
    y = numbers @ a[0, 0].T * scale * scales.reshape(-1)
    return (y if bias is None else y + bias.reshape(-1)).reshape(node.ne[::-1])


OPS: dict[str, Callable[..., Array]] = {"QUANTIZE_I8_CONVROT": _quantize}
