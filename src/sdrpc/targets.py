"""The two kinds of device that graphs are lowered for."""

from __future__ import annotations

from .device import Target
from .ggml.rules import RULES

SDRPC = Target(name="sdrpc", ops=frozenset(RULES), managed=True)
"""Our own devices, here or behind one of our own servers."""

PORTABLE = Target(
    name="portable",
    ops=frozenset({
        "NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE", "CPY", "CONT", "REPEAT", "CONCAT", "GET_ROWS", "PAD",
        "ADD", "SUB", "MUL", "DIV", "SQR", "SQRT", "LOG", "SIN", "COS", "SCALE", "CLAMP", "LEAKY_RELU", "UNARY",
        "TIMESTEP_EMBEDDING", "SUM_ROWS", "MEAN", "ARGMAX", "NORM", "RMS_NORM", "GROUP_NORM", "SOFT_MAX", "MUL_MAT",
        "IM2COL", "UPSCALE",
    }),
    managed=False,
)  # fmt: skip
"""A native server, which aborts on what its backend lacks: only what the CPU, CUDA, Metal, Vulkan and SYCL backends
all have, and no FLASH_ATTN_EXT, whose head sizes differ between them."""
