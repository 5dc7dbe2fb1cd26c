"""What the engine computes for each operation, in torch: one table, :data:`KERNELS`.

A kernel's function gets the value to be computed (parameters, shape) and its operands: torch tensors of four dimensions
in torch's order, all floating operands of one dtype, weights already converted; but its row may name operands that come
as they are held. It returns a tensor of the value's shape in any dtype; the program casts where the value is held in
another one. Formulas are those of ggml's reference backend (ggml-cpu/ops.cpp).

What is true of an operation wherever it is computed (parameters, shapes, what it writes) stands in
:data:`sdrpc.ggml.ops.OPS`. Kernels in ``ops/language`` serve clients with language models only.
"""

from __future__ import annotations

from ..operations import OpName
from ..values import Value, same_blocks
from . import attention, convrot, copies, eight_bits, elementwise, images, products, rows
from .base import Autocast, Kernel
from .language import deepseek, recurrent, training

__all__ = ["KERNELS", "Autocast", "Kernel", "moves_blocks"]

TOPICS = (copies, elementwise, rows, attention, products, convrot, eight_bits, images, recurrent, deepseek, training)

KERNELS: dict[OpName, Kernel] = {kernel.op: kernel for topic in TOPICS for kernel in topic.KERNELS}
"""All operations that are computed: ggml's by name, and the engine's own. Leaves are not, and converted weights are
:mod:`sdrpc.engine.weights`' business."""


def moves_blocks(value: Value) -> bool:
    """Whether ``value`` is blocks of its operands as they are, so that nothing is read out of them or made anew."""
    return KERNELS[value.op].moves_blocks and same_blocks(value)
