"""Names for bytes, and bytes that move: views, copies, conversions, rows picked and set."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sdrpc.ggml.params import Concat, NoParams, Pad, PadReflect, Roll, SetView

from ..blocks import dequantize, quantize
from ..dtypes import shape_of
from ..layout import Strided, steps, take
from ..operations import EngineOp
from ..values import Value, same_blocks
from .base import Autocast, Kernel, kernel, operand, repeat_to, within


def _view(v: Value[Strided], x: Tensor) -> Tensor:
    strided = v.params
    return take(x, steps(x.numel(), strided), strided)


def _copy(v: Value, x: Tensor) -> Tensor:
    if same_blocks(v):
        return x.reshape(*shape_of(v.ne)[:3], v.type.row_bytes(v.ne[0]))
    return x.reshape(shape_of(v.ne))


def _dense(v: Value, x: Tensor) -> Tensor:
    return _copy(v, x).contiguous()


def _concat(v: Value[Concat], a: Tensor, b: Tensor) -> Tensor:
    p = v.params
    return torch.cat((a, b), 3 - p.dim)


def _dequantize(v: Value, x: Tensor) -> Tensor:
    return dequantize(x, operand(v, 0).type, v.ne, v.dtype or torch.float32)


def _pad(v: Value[Pad], x: Tensor) -> Tensor:
    *amounts, circular = v.params
    if not circular:
        return F.pad(x, amounts)
    for axis in range(4):
        left, right = amounts[2 * axis : 2 * axis + 2]
        if left or right:
            n = x.shape[3 - axis]
            x = x.index_select(3 - axis, torch.arange(-left, n + right, device=x.device) % n)
    return x


def _pad_reflect(v: Value[PadReflect], x: Tensor) -> Tensor:
    p = v.params
    last = x.shape[3] - 1
    at = torch.arange(-p.left, last + 1 + p.right, device=x.device).abs()
    return x.index_select(3, last - (last - at).abs())


def _roll(v: Value[Roll], x: Tensor) -> Tensor:
    return torch.roll(x, tuple(v.params), (3, 2, 1, 0))


def _window(v: Value[SetView], a: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of ``a`` and, in its memory, the part that SET or ACC change."""
    p = v.params
    size = v.type.size
    result = a.clone(memory_format=torch.contiguous_format)
    strides = (p.nb3 // size, p.nb2 // size, p.nb1 // size, 1)
    return result, result.as_strided(shape_of(operand(v, 1).ne), strides, p.offset // size)


def _set(v: Value[SetView], a: Tensor, b: Tensor) -> Tensor:
    result, part = _window(v, a)
    part.copy_(b)
    return result


def _acc(v: Value[SetView], a: Tensor, b: Tensor) -> Tensor:
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


def _snapshot(_v: Value, x: Tensor) -> Tensor:
    return x.clone()


def _cast(_v: Value, x: Tensor) -> Tensor:
    """The program casts what it gets to the dtype that the value is held in."""
    return x


def _repeat(v: Value, x: Tensor) -> Tensor:
    return repeat_to(x, v.ne)


KERNELS: tuple[Kernel, ...] = (
    kernel(EngineOp.VIEW, Strided, _view, Autocast.MOVES),
    kernel(EngineOp.SNAPSHOT, NoParams, _snapshot, Autocast.MOVES, moves_blocks=True),
    kernel(EngineOp.CAST, NoParams, _cast),
    kernel(EngineOp.DEQUANTIZE, NoParams, _dequantize),
    kernel("DUP", NoParams, _dense, Autocast.MOVES, moves_blocks=True),
    kernel("CPY", NoParams, _copy, Autocast.MOVES, moves_blocks=True),
    kernel("CONT", NoParams, _dense, Autocast.MOVES, moves_blocks=True),
    kernel("CONCAT", Concat, _concat, Autocast.MOVES, moves_blocks=True),
    kernel("PAD", Pad, _pad, Autocast.MOVES),
    kernel("PAD_REFLECT_1D", PadReflect, _pad_reflect, Autocast.MOVES),
    kernel("ROLL", Roll, _roll, Autocast.MOVES),
    kernel("REPEAT", NoParams, _repeat, Autocast.MOVES),
    kernel("SET", SetView, _set, Autocast.MOVES),
    kernel("ACC", SetView, _acc),
    kernel("GET_ROWS", NoParams, _get_rows, raw=(0,)),
    kernel("SET_ROWS", NoParams, _set_rows, raw=(0, 1, 2), in_place=True),
)
