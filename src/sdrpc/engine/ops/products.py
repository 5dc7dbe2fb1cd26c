"""Matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sdrpc.ggml.params import MulMat, NoParams

from ..blocks import dequantize
from ..deadline import checkpoint
from ..operations import EngineOp
from ..values import Value
from .base import Autocast, Kernel, kernel, operand, within

TILE = 1 << 24
"""Numbers of the rows that MUL_MAT_ID gathers at a time: a few megabytes of rows may be named a thousand times."""


def _mul_mat(_v: Value[MulMat], a: Tensor, b: Tensor) -> Tensor:
    """b · aᵀ; a's batches repeat, each for several consecutive ones of b."""
    b = b.to(a.dtype)
    if a.shape[0] == a.shape[1] == 1:
        return F.linear(b, a[0, 0])
    if a.shape[:2] == b.shape[:2]:
        return b @ a.mT
    # all rows of b that one matrix of a multiplies come together: a is never repeated in memory
    (a3, a2, m, k), (b3, b2, n, _) = a.shape, b.shape
    r3, r2 = b3 // a3, b2 // a2
    rows = b.reshape(a3, r3, a2, r2 * n, k).transpose(1, 2).reshape(a3, a2, r3 * r2 * n, k)
    product = (rows @ a.mT).reshape(a3, a2, r3, r2 * n, m)
    return product.transpose(1, 2).reshape(b3, b2, n, m)


def _linear_bias(_v: Value[MulMat], a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    return F.linear(b.to(a.dtype), a[0, 0], bias.reshape(-1).to(a.dtype))


def _mul_mat_id(v: Value[MulMat], a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    """Each row of b times the matrix that its number picks of a: [1, tokens, 1 or used, k] → [1, tokens, used, m].

    Rows are put in the order of their matrices and padded to whole tiles of one matrix each. How many tiles there can
    be does not depend on the numbers, so that an accelerator need not be asked for them; and matrices are read out of
    their blocks one by one, when they are used.
    """
    tokens, used = ids.shape[2:]
    matrices, m, n = a.shape[1], a.shape[2], tokens * used
    k = b.shape[3]
    rows = b[0].reshape(-1, k)
    places = torch.arange(n, device=b.device)
    source = places // used * b.shape[2] + places % used % b.shape[2]  # the row of b that each product reads
    picked = within(ids.reshape(-1).long(), matrices)
    tile = 1 << max(0, min(n // matrices, TILE // max(k, 1)).bit_length() - 1)
    tiles = n if tile == 1 else n // tile + matrices

    order = torch.argsort(picked, stable=True)
    count = torch.zeros(matrices, dtype=torch.long, device=picked.device).index_add(0, picked, torch.ones_like(picked))
    whole = (count + tile - 1).div(tile, rounding_mode="floor")
    ends = whole.cumsum(0)
    shift = (ends - whole) * tile - (count.cumsum(0) - count)  # of each matrix's rows, from their order to their tiles
    slots = places + shift[picked[order]]
    # rows are gathered tile by tile; what fills a tile up is any row, whose product nobody reads
    gathered = order.new_zeros(tiles * tile).index_copy(0, slots, source[order]).reshape(tiles, tile)
    owners = torch.searchsorted(ends, torch.arange(tiles, device=picked.device), right=True).clamp(max=matrices - 1)

    held = operand(v, 0).type

    def matrix(number: Tensor | int) -> Tensor:
        checkpoint()
        one = a.narrow(1, number, 1) if isinstance(number, int) else a.index_select(1, number)
        return (one if held.plain else dequantize(one, held, (k, m, 1, 1), b.dtype)).to(b.dtype)[0, 0]

    # into one tensor: single results in between would keep the heap from using the same memory for the next tile
    products, some = b.new_empty(tiles * tile, m), b.new_empty(tile, k)
    for i, number in enumerate(owners.tolist() if a.is_cpu else torch.split(owners, 1)):
        torch.index_select(rows, 0, gathered[i], out=some)
        products[i * tile : (i + 1) * tile] = F.linear(some, matrix(number))
    return torch.empty_like(products[:n]).index_copy(0, order, products[slots]).reshape(1, tokens, used, m)


def _add_id(_v: Value, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    return a + b[0, 0, within(ids[0, 0].long(), b.shape[2])]


def _out_prod(_v: Value, a: Tensor, b: Tensor) -> Tensor:
    """bᵀ · a: sums over the second dimension."""
    a = a.repeat_interleave(b.shape[0] // a.shape[0], 0).repeat_interleave(b.shape[1] // a.shape[1], 1)
    return b.mT @ a


KERNELS: tuple[Kernel, ...] = (
    kernel("MUL_MAT", MulMat, _mul_mat, Autocast.NARROW, rounds=(0, 1)),
    kernel(EngineOp.LINEAR, MulMat, _linear_bias, Autocast.NARROW),
    kernel("MUL_MAT_ID", MulMat, _mul_mat_id, Autocast.NARROW, raw=(0,), rounds=(0, 1)),
    kernel("ADD_ID", NoParams, _add_id, Autocast.FOLLOWS),
    kernel("OUT_PROD", NoParams, _out_prod, Autocast.NARROW),
)
