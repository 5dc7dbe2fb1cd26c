"""Long operations of a CPU in pieces, so that a run can be stopped in the middle of one.

No kernel of torch can be interrupted. An operation with much work is computed as several of the same kind that give
parts of the result: rows of a product, rows and columns of a convolution's places, some queries of an attention. Which
part of the operands each one reads is all that differs between operations (:data:`SPLITTERS`). What can't be split is
refused where it would take longer than some seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sdrpc.errors import UnsupportedOperation
from sdrpc.ggml.rules.images import MEAN_POOL

from .deadline import checkpoint
from .footprint import work
from .operations import EngineOp, OpName
from .values import Value

PIECE = 1 << 35
"""Multiply-adds between two looks at the clock: about a second of two cores."""
LONGEST = 1 << 39
"""Multiply-adds of an operation that can't be split."""

Raise = Callable[..., Tensor]


def stoppable(function: Raise, value: Value, device: torch.device) -> Callable[..., Tensor]:
    """``function`` of ``value`` (that of its row in :data:`sdrpc.engine.ops.KERNELS`) as a function of its operands.

    Raises :class:`UnsupportedOperation` for work that can neither be split nor waited for.
    """
    amount = work(value)
    if device.type != "cpu" or amount <= PIECE or value.op in LOOPS:
        return lambda *operands: function(value, *operands)
    if value.op not in SPLITTERS:
        if amount > LONGEST:
            raise UnsupportedOperation(
                f"takes {amount:.1e} multiply-adds; {LONGEST:.1e} are allowed where it can't be interrupted",
                value.node,
            )
        return lambda *operands: function(value, *operands)
    split = SPLITTERS[value.op]
    return lambda *operands: split(function, value, -(-amount // PIECE), operands)


LOOPS: frozenset[OpName] = frozenset({
    EngineOp.MUL_MAT_I8, "MUL_MAT_ID", "LIGHTNING_INDEXER", "DSV4_HC_COMB", "SSM_SCAN", "RWKV_WKV6", "RWKV_WKV7",
    "GATED_LINEAR_ATTN", "GATED_DELTA_NET",
})  # fmt: skip
"""Operations that are loops of ours, which look at the clock themselves."""


def _ranges(n: int, pieces: int) -> Iterator[tuple[int, int]]:
    """``n`` in at most ``pieces`` ranges (start, end)."""
    step = -(-n // min(n, pieces))
    for start in range(0, n, step):
        checkpoint()
        yield start, min(start + step, n)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class Cut(NamedTuple):
    """Operand ``operand`` cut along ``dim`` gives the result cut along ``result``."""

    operand: int
    dim: int
    result: int


def _along(*cuts: Cut) -> Callable[..., Tensor]:
    """Cut operands of which each row gives a row of the result; along the next cut what the first one leaves long."""

    def split(function: Raise, value: Value, pieces: int, operands: tuple[Any, ...], at: int = 0) -> Tensor:
        if pieces <= 1 or at == len(cuts):
            return function(value, *operands)
        cut = cuts[at]
        whole = operands[cut.operand]
        parts = []
        for start, end in _ranges(whole.shape[cut.dim], pieces):
            some = list(operands)
            some[cut.operand] = whole.narrow(cut.dim, start, end - start)
            left = -(-pieces * (end - start) // whole.shape[cut.dim])
            parts.append(split(function, value, left, tuple(some), at + 1))
        return _joined(parts, cut.result)

    return split


def _queries(result: int) -> Callable[..., Tensor]:
    """Some queries of an attention at a time, with their rows of the mask."""

    def split(function: Raise, value: Value, pieces: int, operands: tuple[Any, ...]) -> Tensor:
        q, k, v, *rest = operands
        parts = []
        for start, end in _ranges(q.shape[2], pieces):
            some = [*rest]
            if some and some[0] is not None:
                some[0] = some[0][:, :, start:end]
            parts.append(function(value, q[:, :, start:end], k, v, *some))
        return _joined(parts, result)

    return split


class Axis(NamedTuple):
    """A direction in which a window moves: dimension ``dim`` of image and result, ``ne`` in ggml's order. Stride,
    padding and dilation are parameters called s, p, d with this ``suffix``."""

    dim: int
    ne: int
    suffix: str


def _windows(*axes: Axis, image: int = 1) -> Callable[..., Tensor]:
    """Some rows of places at a time, from the part of the image that they see, its padding written out."""

    def split(function: Raise, value: Value, pieces: int, operands: tuple[Any, ...], at: int = 0) -> Tensor:
        if pieces <= 1 or at == len(axes):
            return function(value, *operands)
        if value.ne[axes[at].ne] == 1:  # its only window may reach further than the padded image (images.reaches)
            return split(function, value, pieces, operands, at + 1)
        axis = axes[at]
        p: Any = value.params
        s, pad, d = (getattr(p, name + axis.suffix, 1) for name in "spd")
        taps = getattr(p, "k" + axis.suffix, None) or operands[0].shape[axis.dim]
        x = operands[image]
        fill = -torch.finfo(x.dtype).max if value.op == "POOL_2D" and p.op != MEAN_POOL else 0.0
        parts = []
        for start, end in _ranges(value.ne[axis.ne], pieces):
            low, high = start * s - pad, (end - 1) * s - pad + d * (taps - 1) + 1
            seen = x.narrow(axis.dim, min(max(low, 0), x.shape[axis.dim]), 0)
            if (first := max(low, 0)) < (last := min(high, x.shape[axis.dim])):
                seen = x.narrow(axis.dim, first, last - first)
            short = high - low - seen.shape[axis.dim]
            before = min(max(-low, 0), short)
            amounts = [0, 0] * (x.dim() - 1 - axis.dim) + [before, short - before]
            some = list(operands)
            some[image] = F.pad(seen, amounts, value=fill)
            ne = list(value.ne)
            ne[axis.ne] = end - start
            part = replace(value, ne=(ne[0], ne[1], ne[2], ne[3]), params=p._replace(**{"p" + axis.suffix: 0}))
            left = -(-pieces * (end - start) // value.ne[axis.ne])
            parts.append(split(function, part, left, tuple(some), at + 1))
        return _joined(parts, axis.dim)

    return split


def _transposed(function: Raise, value: Value, pieces: int, operands: tuple[Any, ...]) -> Tensor:
    """Some rows of the image at a time, each added where its taps lie in the result."""
    kernel, x = operands
    p: Any = value.params
    stride, taps = p.stride, kernel.shape[2]
    result = None
    for start, end in _ranges(x.shape[2], pieces):
        rows = (end - start - 1) * stride + taps
        part = function(replace(value, ne=(value.ne[0], rows, *value.ne[2:])), kernel, x[:, :, start:end])
        if result is None:
            result = part.new_zeros(value.ne[3], value.ne[2], value.ne[1], value.ne[0])
        result[:, :, start * stride : start * stride + rows] += part
    assert result is not None  # noqa: S101
    return result


_PRODUCT = _along(Cut(1, 2, 2), Cut(0, 2, 3))
_PLANE = _windows(Axis(2, 1, "1"), Axis(3, 0, "0"))

SPLITTERS: dict[OpName, Callable[..., Tensor]] = {
    "MUL_MAT": _PRODUCT, EngineOp.LINEAR: _along(Cut(1, 2, 2)),
    "OUT_PROD": _along(Cut(1, 3, 2), Cut(0, 3, 3)), "SOLVE_TRI": _along(Cut(1, 3, 3)),
    EngineOp.ATTENTION: _queries(2), "FLASH_ATTN_EXT": _queries(1), EngineOp.FLASH_ATTN_F16_SUMS: _queries(1),
    "CONV_2D": _PLANE, "CONV_2D_DW": _PLANE, "POOL_2D": _windows(Axis(2, 1, "1"), Axis(3, 0, "0"), image=0),
    "CONV_3D": _windows(Axis(1, 2, "2"), Axis(2, 1, "1"), Axis(3, 0, "0")), "CONV_TRANSPOSE_2D": _transposed,
}  # fmt: skip
