"""Names for bytes, and bytes that move: views, copies, conversions, rows picked and set."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import dequantize, quantize
from ..dtypes import shape_of
from ..layout import steps, take
from ..values import Value, moves_blocks
from .base import Raise, operand, repeat_to, within


def _view(v: Value, x: Tensor) -> Tensor:
    strided: Any = v.params
    return take(x, steps(x.numel(), strided), strided)


def _copy(v: Value, x: Tensor) -> Tensor:
    if moves_blocks(v):
        return x.reshape(*shape_of(v.ne)[:3], v.type.row_bytes(v.ne[0]))
    return x.reshape(shape_of(v.ne))


def _dense(v: Value, x: Tensor) -> Tensor:
    return _copy(v, x).contiguous()


def _concat(v: Value, a: Tensor, b: Tensor) -> Tensor:
    p: Any = v.params
    return torch.cat((a, b), 3 - p.dim)


def _dequantize(v: Value, x: Tensor) -> Tensor:
    return dequantize(x, operand(v, 0).type, v.ne, v.dtype or torch.float32)


def _pad(v: Value, x: Tensor) -> Tensor:
    *amounts, circular = v.params
    if not circular:
        return F.pad(x, amounts)
    for axis in range(4):
        left, right = amounts[2 * axis : 2 * axis + 2]
        if left or right:
            n = x.shape[3 - axis]
            x = x.index_select(3 - axis, torch.arange(-left, n + right, device=x.device) % n)
    return x


def _pad_reflect(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    last = x.shape[3] - 1
    at = torch.arange(-p.left, last + 1 + p.right, device=x.device).abs()
    return x.index_select(3, last - (last - at).abs())


def _roll(v: Value, x: Tensor) -> Tensor:
    return torch.roll(x, tuple(v.params), (3, 2, 1, 0))


def _window(v: Value, a: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of ``a`` and, in its memory, the part that SET or ACC change."""
    p: Any = v.params
    size = v.type.size
    result = a.clone(memory_format=torch.contiguous_format)
    strides = (p.nb3 // size, p.nb2 // size, p.nb1 // size, 1)
    return result, result.as_strided(shape_of(operand(v, 1).ne), strides, p.offset // size)


def _set(v: Value, a: Tensor, b: Tensor) -> Tensor:
    result, part = _window(v, a)
    part.copy_(b)
    return result


def _acc(v: Value, a: Tensor, b: Tensor) -> Tensor:
    result, part = _window(v, a)
    part.add_(b)
    return result


def rows_at(rows: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """Indices of whole rows of a [n3, n2, n1, n0] tensor: ``rows`` is [1, n3, n2, n] of numbers along n1."""
    numbers = within(rows[0].long(), shape[2])
    i3 = torch.arange(shape[0], device=rows.device)[:, None, None]
    i2 = torch.arange(shape[1], device=rows.device)[None, :, None]
    return i3, i2, numbers


def _get_rows(v: Value, a: Tensor, rows: Tensor) -> Tensor:
    picked: Tensor = a[rows_at(rows, a.shape)]
    held = operand(v, 0).type
    return picked if held.plain else dequantize(picked, held, v.ne)


def _set_rows(v: Value, into: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """Changes ``into``, a view of memory."""
    if not v.type.plain:
        values = quantize(values, v.type)
    spread = repeat_to(rows, (rows.shape[3], into.shape[1], into.shape[0], 1))
    into[rows_at(spread, into.shape)] = values.to(into.dtype)
    return into


RAISE: dict[str, Raise] = {
    "VIEW": _view, "SNAPSHOT": lambda _v, x: x.clone(), "CAST": lambda _v, x: x,
    "DEQUANTIZE": _dequantize,
    "DUP": _dense, "CPY": _copy, "CONT": _dense, "CONCAT": _concat, "PAD": _pad,
    "PAD_REFLECT_1D": _pad_reflect, "ROLL": _roll,
    "REPEAT": lambda v, x: repeat_to(x, v.ne), "SET": _set, "ACC": _acc, "GET_ROWS": _get_rows, "SET_ROWS": _set_rows,
}  # fmt: skip
