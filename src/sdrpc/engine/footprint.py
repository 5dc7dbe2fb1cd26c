"""What an operation takes before it runs: bytes of working memory and multiply-adds, from shapes and parameters alone.

Bytes are upper bounds of what torch's CPU kernels and :mod:`sdrpc.engine.ops` allocate besides operands and result
(``tests/engine/test_footprint.py`` compares them with what torch's allocator says). Operations are known by name; one
that is not listed is taken to make one more copy of its largest operand or result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from sdrpc.errors import UnsupportedOperation

from .operations import EngineOp, OpName
from .ops import attention, images, products
from .ops.language import deepseek
from .values import Value, ordered

FLOAT = 4
"""Bytes of a float32."""
INDEX = 8
"""Bytes of an index (int64)."""
MOST_WORK = 1 << 47
"""Multiply-adds of one operation, some 40 minutes of a processor that does 50 · 10⁹ a second. The largest product of a
model of today, FLUX.1's at 4096 × 4096, has 2 · 10¹³."""
SLOW = 16
"""How many times longer a multiply-add takes in operations for which torch has no blocked kernel."""
FEW_CHANNELS = 8
"""Convolutions with fewer channels are such operations."""
ALIASES = frozenset({EngineOp.VIEW, "CPY", "CONT", "DUP", EngineOp.CAST, "REPEAT"})
"""What may give its operand's memory instead of a copy: that memory then lives as long as the result."""


def elements(value: Value) -> int:
    return prod(value.ne)


def nbytes(value: Value) -> int:
    """Bytes of the tensor that holds ``value``."""
    if not value.type.plain and value.dtype in (None, torch.uint8):
        return value.type.row_bytes(value.ne[0]) * prod(value.ne[1:])
    return elements(value) * (value.dtype.itemsize if value.dtype is not None else value.type.size)


def _source(value: Value, i: int) -> Value:
    source = value.src[i]
    if source is None:
        raise ValueError(f"{value.node}: operand {i} is missing")  # the rules have counted them
    return source


def _largest(value: Value) -> int:
    """Elements of the largest of operands and result."""
    return max([elements(value), *(elements(s) for s in value.src if s is not None)])


def _copies(n: float) -> Callable[[Value], int]:
    """So many float32 copies of the largest of operands and result."""
    return lambda value: int(n * FLOAT * _largest(value))


def _nothing(_: Value) -> int:
    return 0


# --- bytes


def _window(value: Value) -> int:
    """A padded image, once more with its channels together, and all patches where they are made real."""
    p: Any = value.params
    kernel, x = _source(value, 0), _source(value, 1)
    padded: int = min((x.ne[0] + 2 * p.p0) * (x.ne[1] + 2 * p.p1), images.PADDED * x.ne[0] * x.ne[1]) * prod(x.ne[2:])
    places = prod(value.ne) // max(value.ne[2], 1) if value.op == "CONV_2D" else 0
    patches = places * prod(kernel.ne[:3])
    # patches are made real where there are few places; oneDNN unfolds some at a time
    unfolded = patches if places <= images.MUCH * value.ne[2] else min(patches, UNFOLDED)
    return FLOAT * (2 * padded + 2 * unfolded + 2 * elements(value) + 2 * elements(kernel))


def _im2col(value: Value) -> int:
    p: Any = value.params
    x = _source(value, 1)
    across, down = (p.p0, p.p1) if p.is_2d else (p.p0, 0)
    padded: int = min((x.ne[0] + 2 * across) * (x.ne[1] + 2 * down), images.PADDED * x.ne[0] * x.ne[1]) * prod(x.ne[2:])
    return FLOAT * (2 * padded + 2 * elements(value) + elements(x))


def _window_3d(value: Value) -> int:
    p: Any = value.params
    kernel, x = _source(value, 0), _source(value, 1)
    padded: int = (x.ne[0] + 2 * p.p0) * (x.ne[1] + 2 * p.p1) * (x.ne[2] + 2 * p.p2) * x.ne[3]
    # torch's own kernel unfolds one image after the other: all taps of all places of one
    unfolded: int = prod(value.ne[:3]) * prod(kernel.ne[:3]) * p.channels if value.op == "CONV_3D" else 0
    return FLOAT * (3 * padded + unfolded + 3 * elements(value) + 2 * elements(kernel))


def _transposed(value: Value) -> int:
    """All taps of all places of one image, before they are added up."""
    kernel, x = _source(value, 0), _source(value, 1)
    taps = prod(kernel.ne[:3]) if value.op == "CONV_TRANSPOSE_2D" else prod(kernel.ne[:2])
    places = prod(x.ne[:2]) if value.op == "CONV_TRANSPOSE_2D" else x.ne[0]
    return FLOAT * (2 * taps * places + 2 * elements(value) + 2 * elements(kernel) + elements(x))


def _pool(value: Value) -> int:
    p: Any = value.params
    x = value.src[1] if value.op == "POOL_2D_BACK" else value.src[0]
    assert x is not None  # noqa: S101
    across, down = (p.p, 0) if hasattr(p, "p") else (p.p0, p.p1)
    padded: int = (x.ne[0] + 2 * across) * (x.ne[1] + 2 * down) * x.ne[2] * x.ne[3]
    # max_pool2d gives the places of the largest along with them
    return FLOAT * 3 * padded + (INDEX + 2 * FLOAT) * max(elements(value), elements(_source(value, 0)))


def _mul_mat(value: Value) -> int:
    """A second operand in another order, a result in another order, and blocks for the product."""
    return FLOAT * (elements(_source(value, 1)) + 2 * elements(value)) + _batches(value)


def _product_8bit(value: Value) -> int:
    """Rows as floats, and as 8 bits a number; the product, times a scale, times another, plus a bias."""
    return FLOAT * (4 * elements(_source(value, 1)) + 3 * elements(value))


def _batches(value: Value) -> int:
    """A first operand whose matrices are multiplied in one call is copied where it is not dense."""
    a = _source(value, 0)
    return FLOAT * elements(a) if prod(a.ne[2:]) > 1 else 0


def _out_prod(value: Value) -> int:
    """The first operand repeated over the batches of the second."""
    a, b = _source(value, 0), _source(value, 1)
    return FLOAT * (2 * a.ne[0] * a.ne[1] * b.ne[2] * b.ne[3] + elements(b) + elements(value))


def _mul_mat_id(value: Value) -> int:
    """The rows of one tile, a matrix, and the products of all tiles."""
    a, ids = _source(value, 0), _source(value, 2)
    k, m, n = a.ne[0], a.ne[1], elements(ids)
    tiled = 2 * n + a.ne[2]  # rows in whole tiles: at most twice as many, and one tile of each matrix
    tile = max(1, min(n // max(a.ne[2], 1), products.TILE // max(k, 1)))
    rows = elements(_source(value, 1)) + tile * (k + m)
    return FLOAT * (rows + 2 * tiled * m + n * m + 2 * k * m) + 8 * INDEX * (n + tiled + a.ne[2])


def _attention(value: Value) -> int:
    """Keys and values for each head of the queries, and as many scores as are held at once."""
    q, k, v = (_source(value, i) for i in range(3))
    heads, batch = q.ne[2], q.ne[3]
    spread = (k.ne[0] + v.ne[0]) * k.ne[1] * heads * batch if heads != k.ne[2] else elements(k) + elements(v)
    p: Any = value.params
    if p.max_bias == 0 and all(s is None for s in value.src[4:]):
        spread = min(spread, max(attention.SPREAD, (k.ne[0] + v.ne[0]) * k.ne[1] * batch))
    every = heads * batch * q.ne[1] * k.ne[1]
    held = min(every, max(attention.SCORES, heads * batch * k.ne[1]))
    masks = 0 if len(value.src) < 4 or value.src[3] is None else every
    return FLOAT * (2 * spread + 6 * held + min(masks, 2 * held) + 3 * elements(q) + 3 * elements(value))


def _indexer(value: Value) -> int:
    query, key = _source(value, 0), _source(value, 1)
    size, heads, tokens, batch = query.ne
    keys = elements(key) // max(size * key.ne[3], 1)
    held = min(heads * tokens * batch * keys, max(deepseek.SCORES, tokens * batch * keys))
    return FLOAT * (3 * held + 3 * elements(value) + elements(query) + elements(key))


def _sorted(value: Value) -> int:
    """Values and int64 places of a sort, and the scratch of one."""
    return (2 * FLOAT + 3 * INDEX) * elements(_source(value, 0))


def _rows(value: Value) -> int:
    """Rows as they are picked or written, and their numbers."""
    rows = _largest(value) // max(value.ne[0], 1)
    return FLOAT * 2 * (elements(value) + elements(_source(value, 1))) + 4 * INDEX * rows


def _set_rows(value: Value) -> int:
    """Rows in the destination's type, and the numbers of all of them."""
    values, numbers = _source(value, 1), _source(value, 2)
    rows = elements(values) // max(values.ne[0], 1)
    return FLOAT * 3 * elements(values) + 4 * INDEX * (rows + elements(numbers)) + QUANTIZING


def _recurrent(value: Value) -> int:
    """A few states, and the outputs of all tokens, twice; decays and inputs of all tokens."""
    states = max(elements(s) for s in value.src if s is not None)
    return FLOAT * (6 * states + 4 * elements(value)) + FLOAT * 2 * sum(elements(s) for s in value.src if s is not None)


UNFOLDED = 1 << 25
"""Elements of patches that oneDNN's kernels hold at one time."""
QUANTIZING = 1 << 26
"""Bytes that one chunk of blocks takes while it is read or written (blocks.CHUNK and its trials)."""

WORKING: dict[OpName, Callable[[Value], int]] = {
    EngineOp.LEAF: _nothing, EngineOp.VIEW: _nothing, "ARANGE": _copies(2), EngineOp.SNAPSHOT: _nothing,
    EngineOp.CAST: _nothing, EngineOp.OPPORTUNISTIC_WEIGHT: lambda v: FLOAT * elements(v),
    **dict.fromkeys((EngineOp.WEIGHT, EngineOp.DEQUANTIZE), lambda v: FLOAT * elements(v) + QUANTIZING),
    "UNARY": _copies(5), "GLU": _copies(4), "SCALE": _nothing, "TIMESTEP_EMBEDDING": _copies(4),
    "DIAG_MASK_INF": _copies(1), "DIAG_MASK_ZERO": _copies(1),
    "CONV_2D": _window, "CONV_2D_DW": _window, "IM2COL": _im2col, "IM2COL_3D": _window_3d, "CONV_3D": _window_3d,
    "CONV_TRANSPOSE_1D": _transposed, "CONV_TRANSPOSE_2D": _transposed, "COL2IM_1D": _copies(2),
    "IM2COL_BACK": _copies(2), "POOL_1D": _pool, "POOL_2D": _pool, "POOL_2D_BACK": _pool, "UPSCALE": _copies(10),
    "MUL_MAT": _mul_mat, EngineOp.LINEAR: _mul_mat, EngineOp.MUL_MAT_I8: _copies(4), "MUL_MAT_ID": _mul_mat_id,
    EngineOp.PRODUCT_8BIT: _product_8bit, "OUT_PROD": _out_prod, "QUANTIZE_I8_CONVROT": _copies(6),
    "FLASH_ATTN_EXT": _attention, EngineOp.FLASH_ATTN_F16_SUMS: _attention, EngineOp.ATTENTION: _attention,
    "SOFT_MAX": _copies(4),
    "ROPE": _copies(4), "ROPE_BACK": _copies(5),
    "LIGHTNING_INDEXER": _indexer, "DSV4_HC_COMB": _copies(5), "DSV4_HC_PRE": _copies(3), "DSV4_HC_POST": _copies(3),
    "ARGSORT": _sorted, "TOP_K": _sorted, "ARGMAX": _copies(2), "COUNT_EQUAL": _copies(1), "GET_ROWS": _rows,
    "SET_ROWS": _set_rows, "GET_ROWS_BACK": _copies(2), "SSM_CONV": _copies(3), "SSM_SCAN": _recurrent,
    "RWKV_WKV6": _recurrent, "RWKV_WKV7": _recurrent, "GATED_LINEAR_ATTN": _recurrent, "GATED_DELTA_NET": _recurrent,
    "SOLVE_TRI": _copies(3), "CROSS_ENTROPY_LOSS": _copies(3), "CROSS_ENTROPY_LOSS_BACK": _copies(3),
    "GROUP_NORM": _copies(2), EngineOp.GROUP_NORM_AFFINE: _copies(3), "RMS_NORM": _copies(3),
    EngineOp.RMS_NORM_AFFINE: _copies(3), "RMS_NORM_BACK": _copies(5), "SILU_BACK": _copies(5),
    "SOFT_MAX_BACK": _copies(4), "OPT_STEP_SGD": _copies(4), "OPT_STEP_ADAMW": _copies(4),
    EngineOp.ADAMW_MEAN: _copies(3), EngineOp.ADAMW_SQUARE: _copies(3),
    "L2_NORM": _copies(2), "PAD_REFLECT_1D": _copies(4), "ROLL": _copies(2), "ADD_REL_POS": _copies(3),
    "ADD_ID": _copies(2), "GET_REL_POS": _copies(4), "PAD": _copies(2), "CUMSUM": _copies(1), "TRI": _copies(1),
}  # fmt: skip


def working_bytes(value: Value) -> int:
    """Bytes that computing ``value`` takes besides its operands and the value itself, at most."""
    scratch = WORKING.get(value.op, _copies(1))(value)
    if value.op not in (EngineOp.LEAF, "SET_ROWS") and not value.type.plain:  # computed as floats, then made blocks
        scratch += FLOAT * elements(value) + QUANTIZING
    if value.op in (EngineOp.LEAF, EngineOp.VIEW) or value.dtype is torch.float32:
        return scratch
    return scratch + FLOAT * elements(value)  # what is not held in float32 may be made in it first


def peak_bytes(roots: Sequence[Value]) -> int:
    """The most that running ``roots``, which have dtypes, takes at one time besides buffers, each value going after
    its last reader."""
    values = ordered(roots)
    last: dict[Value, int] = {}
    for i, value in enumerate(values):
        for source in value.src:
            if source is not None:
                last[source] = i
    for value in reversed(values):
        if value.op in ALIASES:
            for source in value.src:
                if source is not None:
                    last[source] = max(last[source], last.get(value, last[source]))
    dying: dict[int, list[Value]] = {}
    for value, i in last.items():
        dying.setdefault(i, []).append(value)
    live = peak = 0
    for i, value in enumerate(values):
        if value.op is EngineOp.LEAF:
            continue
        live += _held(value)
        peak = max(peak, live + working_bytes(value))
        live -= sum(_held(each) for each in dying.get(i, ()) if each.op is not EngineOp.LEAF)
        if value not in last:
            live -= _held(value)
    return peak


def _held(value: Value) -> int:
    return 0 if value.op is EngineOp.OPPORTUNISTIC_WEIGHT else nbytes(value)


# --- multiply-adds


def _weighted(value: Value, each: int, channels: int) -> int:
    return elements(value) * each * (SLOW if channels < FEW_CHANNELS else 1)


def _conv_work(value: Value) -> int:
    k = _source(value, 0).ne
    return _weighted(value, prod(k[:3]), min(k[2], k[3]))


def _conv_3d_work(value: Value) -> int:
    p: Any = value.params
    return _weighted(value, prod(_source(value, 0).ne[:3]) * p.channels, p.channels)


def _transposed_work(value: Value) -> int:
    k, x = _source(value, 0).ne, _source(value, 1)
    each = prod(k[:3]) if value.op == "CONV_TRANSPOSE_2D" else prod(k[:2])
    return elements(x) * each * SLOW


def _pool_work(value: Value) -> int:
    p: Any = value.params
    n = elements(_source(value, 0)) if value.op == "POOL_2D_BACK" else elements(value)
    taps: int = p.k if hasattr(p, "k") else p.k0 * p.k1
    return n * taps * SLOW


def _attention_work(value: Value) -> int:
    q, k, v = (_source(value, i) for i in range(3))
    return q.ne[1] * q.ne[2] * q.ne[3] * k.ne[1] * (k.ne[0] + v.ne[0])


def _mixing_work(value: Value) -> int:
    p: Any = value.params
    rounds: int = max(p.rounds, 1)
    return elements(value) * rounds * SLOW


WORK: dict[OpName, Callable[[Value], int]] = {
    **dict.fromkeys(
        ("MUL_MAT", EngineOp.LINEAR, "MUL_MAT_ID", EngineOp.MUL_MAT_I8, EngineOp.PRODUCT_8BIT),
        lambda v: elements(v) * _source(v, 0).ne[0],
    ),
    "OUT_PROD": lambda v: elements(v) * _source(v, 0).ne[1],
    "CONV_2D": _conv_work, "CONV_2D_DW": lambda v: _weighted(v, prod(_source(v, 0).ne[:2]), 1),
    "CONV_3D": _conv_3d_work,
    "CONV_TRANSPOSE_1D": _transposed_work, "CONV_TRANSPOSE_2D": _transposed_work,
    "POOL_1D": _pool_work, "POOL_2D": _pool_work, "POOL_2D_BACK": _pool_work,
    **dict.fromkeys(("FLASH_ATTN_EXT", EngineOp.FLASH_ATTN_F16_SUMS, EngineOp.ATTENTION), _attention_work),
    "SOLVE_TRI": lambda v: elements(v) * _source(v, 0).ne[0] * SLOW,
    "SSM_CONV": lambda v: elements(v) * _source(v, 1).ne[0] * SLOW,
    "DSV4_HC_COMB": _mixing_work,
}  # fmt: skip


def work(value: Value) -> int:
    """Multiply-adds of ``value``, those of slow kernels counted as :data:`SLOW` each."""
    return WORK.get(value.op, _largest)(value)


def check_work(roots: Sequence[Value]) -> None:
    """Raise :class:`UnsupportedOperation` for an operation that would hold the device for hours."""
    for value in ordered(roots):
        if (needed := work(value)) > MOST_WORK:
            raise UnsupportedOperation(
                f"takes {needed:.1e} multiply-adds; {MOST_WORK:.1e} are allowed in one operation", value.node
            )
