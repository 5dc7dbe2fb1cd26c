"""What every ggml operation computes, as torch.

One function an operation, :data:`RAISE`. It gets the value to be computed (parameters, shape) and its operands: torch
tensors of four dimensions in torch's order, all floating operands of one dtype, weights already converted. It returns a
tensor of the value's shape in any dtype; the program casts where the value is held in another one. Formulas are those
of ggml's reference backend (ggml-cpu/ops.cpp).
"""

from __future__ import annotations

from . import attention, copies, deepseek, elementwise, images, integers, products, recurrent, rows, training
from .base import Raise

__all__ = ["RAISE", "Raise"]

RAISE: dict[str, Raise] = {
    name: function
    for family in (copies, elementwise, rows, attention, products, integers, images, recurrent, deepseek, training)
    for name, function in family.RAISE.items()
}
"""ggml's operations, and the few that values have of their own, by name."""
