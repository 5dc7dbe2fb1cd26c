"""The two kinds of device that graphs are lowered for."""

from __future__ import annotations

from .device import Target
from .ggml.ops import OPS
from .ggml.types import OF_GGML, TYPES

SDRPC = Target(name="sdrpc", ops=frozenset(OPS), managed=True, types=frozenset(TYPES))
"""Our own devices, here or behind one of our own servers."""

PORTABLE = Target(
    name="portable",
    ops=frozenset(op.name for op in OPS.values() if op.portable),
    managed=False,
    types=OF_GGML,
)  # fmt: skip
"""A native server, which aborts on what its backend lacks: only what the CPU, CUDA, Metal, Vulkan and SYCL backends
all have, and no FLASH_ATTN_EXT, whose head sizes differ between them."""
