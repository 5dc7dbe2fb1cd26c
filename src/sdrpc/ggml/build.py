"""Making tensors: leaves, nodes whose result the shape rules infer, and the operations that only rename bytes.

ggml's conventions: ``ne`` counts from the fastest dimension; ``mul_mat(a, b)`` of a [K, M] and b [K, N] is [M, N].
Nodes get no memory here: :mod:`sdrpc.ggml.memory_planner` does that for devices that want it. Everything raises
:class:`sdrpc.errors.GraphError` for what the rules forbid.
"""

from __future__ import annotations

from .ops import infer
from .params import NO_PARAMS, MulMat, Params, Permute, View
from .rules.copies import permuted
from .tensor import Dims, Tensor, contiguous_strides, dims
from .types import Type


def leaf(type: Type, *ne: int, name: str = "", buffer: int = 0, offset: int = 0) -> Tensor:
    """A tensor that is there before the graph runs: a weight or an input, dense."""
    shape = dims(*ne)
    return Tensor(type, shape, contiguous_strides(type, shape), buffer=buffer, offset=offset, name=name)


def node(
    op: str,
    *src: Tensor | None,
    params: Params = NO_PARAMS,
    ne: tuple[int, ...] | None = None,
    type: Type | None = None,
    flags: int = 0,
    name: str = "",
) -> Tensor:
    """The result of ``op``: dense, in no buffer. ``ne`` and ``type`` are needed where ``op`` leaves them free."""
    result = infer(op, params, src, type, None if ne is None else dims(*ne))
    strides = contiguous_strides(result.type, result.ne)
    return Tensor(result.type, result.ne, strides, op, params, src, flags=flags, name=name)


def mul_mat(a: Tensor, b: Tensor, *, prec: int = 0, name: str = "") -> Tensor:
    """a [K, M, …] and b [K, N, …] → F32 [M, N, …]; ``a`` is repeated over b's higher dimensions."""
    return node("MUL_MAT", a, b, params=MulMat(prec), name=name)


def cont(a: Tensor, *ne: int, name: str = "") -> Tensor:
    """A dense copy, with another shape if one is given."""
    return node("CONT", a, ne=ne or None, name=name)


def cast(a: Tensor, type: Type, name: str = "") -> Tensor:
    """A dense copy as ``type`` (ggml_cast: a CPY without a destination)."""
    return node("CPY", a, type=type, name=name)


def cpy(a: Tensor, into: Tensor, name: str = "") -> Tensor:
    """``a`` written over the memory of ``into``; the result is another name for that memory."""
    result = infer("CPY", NO_PARAMS, (a, into))
    return _alias("CPY", (a, into), into, result.ne, into.nb, 0, name=name)


def inplace(op: str, *src: Tensor | None, into: int = 0, params: Params = NO_PARAMS, name: str = "") -> Tensor:
    """``op`` writing its result over the memory of its source number ``into`` (SET_ROWS writes over number 2)."""
    target = src[into]
    if target is None:
        raise ValueError(f"{op} has no source {into} to write to")
    result = infer(op, params, src, target.type, target.ne)
    return _alias(op, src, target, result.ne, target.nb, 0, params=params, name=name)


def reshape(a: Tensor, *ne: int, name: str = "") -> Tensor:
    """The same elements of a dense tensor in another shape."""
    result = infer("RESHAPE", NO_PARAMS, (a,), ne=dims(*ne))
    return _alias("RESHAPE", (a,), a, result.ne, contiguous_strides(a.type, result.ne), 0, name=name)


def view(a: Tensor, *ne: int, nb: tuple[int, ...] = (), offset: int = 0, name: str = "") -> Tensor:
    """A part of ``a``: ``nb`` are the byte strides of dimensions 1, 2 …, by default ``a``'s own; ``offset`` is in
    bytes. Beyond the strides given, dimensions are packed as in ggml_view_2d and its like."""
    result = infer("VIEW", _split(offset), (a,), ne=dims(*ne))
    given = nb or a.nb[1 : len(ne)]
    strides = [a.nb[0], *given]
    while len(strides) < 4:
        packed = strides[-1] * result.ne[len(strides) - 1] if len(strides) > 1 else a.type.row_bytes(result.ne[0])
        strides.append(packed)
    return _alias("VIEW", (a,), a, result.ne, dims(*strides), offset, params=_split(offset), name=name)


def permute(a: Tensor, axis0: int, axis1: int, axis2: int, axis3: int, name: str = "") -> Tensor:
    """Dimension i of ``a`` becomes dimension ``axis_i``; no byte moves."""
    params = Permute(axis0, axis1, axis2, axis3)
    result = infer("PERMUTE", params, (a,))
    return _alias("PERMUTE", (a,), a, result.ne, permuted(a.nb, params), 0, params=params, name=name)


def transpose(a: Tensor, name: str = "") -> Tensor:
    """Dimensions 0 and 1 exchanged; no byte moves."""
    result = infer("TRANSPOSE", NO_PARAMS, (a,))
    nb = (a.nb[1], a.nb[0], a.nb[2], a.nb[3])
    return _alias("TRANSPOSE", (a,), a, result.ne, nb, 0, name=name)


def _alias(
    op: str,
    src: tuple[Tensor | None, ...],
    of: Tensor,
    ne: Dims,
    nb: Dims,
    offset: int,
    *,
    params: Params = NO_PARAMS,
    name: str = "",
) -> Tensor:
    """Another name for bytes of ``of``. As in ggml, ``view_src`` is always the tensor that owns the bytes."""
    root, shift = (of, 0) if of.view_src is None else (of.view_src, of.view_offset)
    return Tensor(
        of.type, ne, nb, op, params, src,
        view_src=root, view_offset=shift + offset,
        buffer=of.buffer, offset=of.offset + offset if of.buffer else 0, name=name,
    )  # fmt: skip


def _split(offset: int) -> View:
    """``offset`` as the two signed words that ggml stores."""
    low, high = offset & 0xFFFFFFFF, offset >> 32
    return View(low - (1 << 32) if low >= 1 << 31 else low, high)
