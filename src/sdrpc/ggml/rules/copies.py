"""Names for bytes, and bytes that move: views, copies, conversions, rows picked and set."""

from __future__ import annotations

import math
from collections.abc import Callable

from ...errors import GraphError
from ..params import Concat, NoParams, Pad, PadReflect, Permute, Roll, SetView, View
from ..tensor import Dims, extent
from ..types import F32, I32, Type
from .base import (
    ALL,
    FLOATS,
    INDICES,
    PLAIN,
    READABLE,
    WRITABLE,
    Call,
    Op,
    Result,
    declared,
    fits,
    float_like,
    injective,
    like,
    need,
    op,
    repeats,
    support,
    typed,
)


def _leaf(call: Call[NoParams]) -> Result:
    if call.type is None:
        raise GraphError("the type of a leaf must be given")
    return Result(call.type, declared(call))


def _repeat(call: Call[NoParams]) -> Result:
    source = call.src[0]
    typed(source, PLAIN)
    ne = declared(call)
    need(repeats(source.ne, ne), "can't repeat {} to {}", source.ne, ne)
    return Result(source.type, ne)


def _concat(call: Call[Concat]) -> Result:
    a, b = call.src
    dim = call.params.dim
    need(0 <= dim < 4, "dimension {}", dim)
    need(a.type == b.type, "types {} and {}", a.type, b.type)
    need(a.ne[:dim] == b.ne[:dim] and a.ne[dim + 1 :] == b.ne[dim + 1 :], "shapes {} and {}", a.ne, b.ne)
    return Result(a.type, _with(a.ne, dim, a.ne[dim] + b.ne[dim]))


def _with(ne: Dims, dim: int, n: int) -> Dims:
    w, x, y, z = (n if i == dim else old for i, old in enumerate(ne))
    return w, x, y, z


def _set_into(allowed: frozenset[str]) -> Callable[[Call[SetView]], Result]:
    """SET and ACC: ``b`` goes into a copy of ``a`` at strides and an offset that are parameters."""

    def rule(call: Call[SetView]) -> Result:
        a, b = call.src
        nb1, nb2, nb3, offset, inplace = call.params
        typed(a, allowed)
        need(a.type == b.type, "types {} and {}", a.type, b.type)
        need(inplace in (0, 1), "in place: {}", inplace)
        need(a.contiguous, "the destination is not contiguous")
        size = a.type.size
        for stride in (nb1, nb2, nb3, offset):
            need(stride >= 0 and stride % size == 0, "a stride or offset of {} bytes", stride)
        nb = (size, nb1, nb2, nb3)
        need(injective(a.type, b.ne, nb), "strides {} of {} overlap", nb, b.ne)
        end = offset + extent(a.type, b.ne, nb)
        need(end <= a.nbytes, "writes up to byte {} of {}", end, a.nbytes)
        return Result(a.type, a.ne)

    return rule


def _copy(call: Call[NoParams]) -> Result:
    a, b = call.src
    # without a destination it is ggml_cast: the result is a tensor of its own
    result = Result(call.type or a.type, call.ne or a.ne) if b is None else Result(b.type, b.ne)
    need(a.elements == math.prod(result.ne), "copies {} to {}", a.ne, result.ne)
    support(_convertible(a.type, result.type), "copy from {} to {}", a.type, result.type)
    return result


def _convertible(source: Type, result: Type) -> bool:
    return (
        source == result
        or (source.name in READABLE and result.name in FLOATS)
        or (source.name in FLOATS and result.name in WRITABLE | {"I32"})
        or (source == I32 and result.name in FLOATS)
    )


def _cont(call: Call[NoParams]) -> Result:
    source = call.src[0]
    ne = call.ne or source.ne
    need(source.elements == math.prod(ne), "makes {} of {}", ne, source.ne)
    return Result(source.type, ne)


def _reshape(call: Call[NoParams]) -> Result:
    source = call.src[0]
    ne = declared(call)
    need(source.elements == math.prod(ne), "makes {} of {}", ne, source.ne)
    need(source.contiguous, "the source is not contiguous")
    return Result(source.type, ne)


def _view(call: Call[View]) -> Result:
    return Result(call.src[0].type, declared(call))


def _permute(call: Call[Permute]) -> Result:
    axes = tuple(call.params)
    need(sorted(axes) == [0, 1, 2, 3], "axes {}", axes)
    return Result(call.src[0].type, permuted(call.src[0].ne, axes))


def permuted(dims: Dims, axes: tuple[int, ...]) -> Dims:
    """Dimension ``i`` of ``dims`` put at ``axes[i]``."""
    result = [0, 0, 0, 0]
    for n, axis in zip(dims, axes, strict=True):
        result[axis] = n
    return result[0], result[1], result[2], result[3]


def _transpose(call: Call[NoParams]) -> Result:
    ne = call.src[0].ne
    return Result(call.src[0].type, (ne[1], ne[0], ne[2], ne[3]))


def _get_rows(call: Call[NoParams]) -> Result:
    a, rows = call.src
    typed(a, READABLE | {"I32"})
    typed(rows, INDICES, "indices")
    need(
        a.ne[2] == rows.ne[1] and a.ne[3] == rows.ne[2] and rows.ne[3] == 1,
        "indices {} don't fit rows of {}", rows.ne, a.ne,
    )  # fmt: skip
    return Result(I32 if a.type == I32 else F32, (a.ne[0], rows.ne[0], rows.ne[1], rows.ne[2]))


def _set_rows(call: Call[NoParams]) -> Result:
    values, rows, into = call.src
    typed(values, frozenset({"F32", "F16"}))
    typed(rows, INDICES, "indices")
    typed(into, WRITABLE | {"I32"}, "destination")
    v, r, d = values.ne, rows.ne, into.ne
    need(
        v[0] == d[0] and v[2:] == d[2:] and v[1] == r[0] and fits(r[1], v[2]) and fits(r[2], v[3]) and r[3] == 1,
        "rows {} at {} don't fit {}", v, r, d,
    )  # fmt: skip
    return Result(into.type, d)


def _pad(call: Call[Pad]) -> Result:
    *amounts, circular = call.params
    typed(call.src[0], FLOATS)
    need(min(amounts) >= 0 and circular in (0, 1), "pads by {}", tuple(call.params))
    w, x, y, z = (n + amounts[2 * i] + amounts[2 * i + 1] for i, n in enumerate(call.src[0].ne))
    return Result(call.src[0].type, (w, x, y, z))


def _pad_reflect(call: Call[PadReflect]) -> Result:
    like, (left, right) = float_like(call), call.params
    n = like.ne[0]
    need(0 <= left < n and 0 <= right < n, "mirrors {} and {} of {} elements", left, right, n)
    return Result(like.type, (left + n + right, *like.ne[1:]))


def _roll(call: Call[Roll]) -> Result:
    like = float_like(call)
    for shift, n in zip(call.params, like.ne, strict=True):
        need(-n < shift < n, "moves {} by {}", like.ne, tuple(call.params))
    return like


OPS: tuple[Op, ...] = (
    op("NONE", NoParams, _leaf, 0, alias=True, portable=True),
    op("VIEW", View, _view, 1, alias=True, moves=True, portable=True),
    op("RESHAPE", NoParams, _reshape, 1, alias=True, moves=True, portable=True),
    op("PERMUTE", Permute, _permute, 1, alias=True, moves=True, portable=True),
    op("TRANSPOSE", NoParams, _transpose, 1, alias=True, moves=True, portable=True),
    op("DUP", NoParams, like(ALL), 1),
    op("CPY", NoParams, _copy, 1, 2, writes=1, portable=True),
    op("CONT", NoParams, _cont, 1, moves=True, portable=True),
    op("REPEAT", NoParams, _repeat, 1, moves=True, portable=True),
    op("CONCAT", Concat, _concat, 2, portable=True),
    op("PAD", Pad, _pad, 1, portable=True),
    op("PAD_REFLECT_1D", PadReflect, _pad_reflect, 1),
    op("ROLL", Roll, _roll, 1),
    op("SET", SetView, _set_into(frozenset({"F32", "I32"})), 2, writes=0),
    op("ACC", SetView, _set_into(frozenset({"F32"})), 2, writes=0),
    op("GET_ROWS", NoParams, _get_rows, 2, portable=True),
    op("SET_ROWS", NoParams, _set_rows, 3, writes=2, partial=True),
)
