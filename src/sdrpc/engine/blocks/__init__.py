"""Blocks of quantized numbers as floats, and floats as blocks: on the device, without a loop over blocks.

Layouts are those of ggml-common.h (``block_q4_0`` and so on), the arithmetic that of ggml-quants.c: what is read and
what is written is the same as ggml's, bit for bit. (Types that ggml does not have: :mod:`.foreign`.)
A reader gets [n, bytes of a block] of uint8 and gives [n, elements of a block] of float32, a writer the reverse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdrpc.ggml.tensor import Dims
from sdrpc.ggml.types import Type

from ..deadline import checkpoint
from ..dtypes import shape_of
from . import foreign, i_quants, k_quants, legacy_quants

__all__ = ["READ", "WRITE", "dequantize", "quantize"]

READ: dict[str, Callable[[Tensor], Tensor]] = {
    **legacy_quants.READ, **k_quants.READ, **i_quants.READ, **foreign.READ,
}  # fmt: skip
"""The quantized types that can be read, by name: all."""

WRITE: dict[str, Callable[[Tensor], Tensor]] = {**legacy_quants.WRITE, **k_quants.WRITE, **i_quants.WRITE}
"""Those that can be written: ggml's CPU backend can write no other (it has no ``from_float`` for them)."""

CHUNK = 1 << 17
"""Elements that a CPU converts at once: the intermediates stay in its caches."""
LARGE_CHUNK = 1 << 22
"""Elements that an accelerator converts at once: enough to keep it busy."""
SEARCHED = frozenset({"Q6_K", "IQ4_XS"})
"""Types whose writers hold some twenty trials of every element, so that they get as many times fewer at once."""
TRIALS = 16


def dequantize(raw: Tensor, type: Type, ne: Dims, dtype: torch.dtype = torch.float32) -> Tensor:
    """``raw`` [n3, n2, n1, bytes of a row] of uint8 → ``dtype`` of shape ``ne``."""
    if not raw.numel():
        return raw.new_empty(shape_of(ne), dtype=dtype)
    blocks = raw.reshape(-1, type.size)
    return _in_chunks(READ[type.name], blocks, type.block, dtype, _chunk(raw) // type.block).reshape(shape_of(ne))


def quantize(x: Tensor, type: Type) -> Tensor:
    """Floats [n3, n2, n1, n0] → [n3, n2, n1, bytes of a row] of uint8, for the types of :data:`WRITE`."""
    if not x.numel():
        return x.new_empty((*x.shape[:-1], type.row_bytes(x.shape[-1])), dtype=torch.uint8)
    chunk = _chunk(x) // type.block // (TRIALS if type.name in SEARCHED else 1)
    blocks = x.reshape(-1, type.block)
    return _in_chunks(_of_floats(WRITE[type.name]), blocks, type.size, torch.uint8, chunk).reshape(*x.shape[:-1], -1)


def _of_floats(write: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: write(x.float())


def _chunk(x: Tensor) -> int:
    return CHUNK if x.device.type == "cpu" else LARGE_CHUNK


def _in_chunks(
    convert: Callable[[Tensor], Tensor], blocks: Tensor, width: int, dtype: torch.dtype, chunk: int
) -> Tensor:
    """``convert`` of [n, …] blocks, some at a time: [n, ``width``] of ``dtype``."""
    if len(blocks) <= chunk:
        return convert(blocks).to(dtype)
    result = torch.empty(len(blocks), width, dtype=dtype, device=blocks.device)
    for start in range(0, len(blocks), chunk):
        checkpoint()
        result[start : start + chunk] = convert(blocks[start : start + chunk])
    return result
