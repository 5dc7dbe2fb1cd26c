"""What each ATen operation is in ggml: one table, ``RULES``.

A rule gets the emitter, what the result has to be, and the operation's arguments under ATen's own names; tensors arrive
as values, dtypes as their kind. It returns the result, or a tuple of results. Shapes are those that the exporter
worked out: rules don't check what torch has checked.
"""

# All rules are called alike, whether or not they need what they get.
# ruff: noqa: ARG001, ARG005

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from math import prod
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..errors import CaptureError
from ..ggml.params import (
    Clamp,
    Conv2D,
    ConvTranspose2D,
    Eps,
    FlashAttn,
    GroupNorm,
    Im2Col,
    LeakyRelu,
    Pad,
    Pool2D,
    SoftMax,
    Upscale,
)
from ..ggml.rules.images import MEAN_POOL, NEAREST
from ..ggml.types import F32
from .emitter import Emitter, Kind, Shape, Value, dims_of

Number = int | float
Operand = Value | int | float


class Out(NamedTuple):
    """What the exporter says of an operation's (first) result."""

    shape: Shape
    kind: Kind


Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)
RULES: dict[str, Rule] = {}
"""ATen operation (without overload) → its rule: ``rule(emitter, out, *args, **kwargs)``."""

FAR = 1e9
"""How much a masked attention score is lowered: far enough that its exponential is zero."""


def rule(*names: str) -> Callable[[R], R]:
    """Enter a function in the table under ``names``."""

    def register(function: R) -> R:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _dim(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _dims(dim: int | Sequence[int] | None, rank: int) -> list[int]:
    if dim is None or dim == []:
        return list(range(rank))
    return sorted(_dim(d, rank) for d in ([dim] if isinstance(dim, int) else dim))


def _pair(value: Any) -> tuple[int, int]:
    """A size in y and x, given as both or as one for both."""
    numbers = [value] if isinstance(value, int) else list(value)
    return (numbers[0], numbers[-1])


def _number(value: Operand) -> float | None:
    return value.scalar if isinstance(value, Value) else value


def _value(e: Emitter, operand: Operand) -> Value:
    if isinstance(operand, Value):
        return operand
    return e.constant(np.asarray(operand, np.float32 if isinstance(operand, float) else np.int64))


# Other names for the same numbers


@rule("alias", "detach", "lift_fresh_copy")
def _same(e: Emitter, out: Out, x: Value, *_: Any, **__: Any) -> Value:
    return x


@rule("dropout", "feature_dropout")
def _dropout(e: Emitter, out: Out, x: Value, p: float, train: bool) -> Value:
    if train and p:
        raise CaptureError("dropout in training: call eval() on the module")
    return x


@rule("clone", "contiguous", "to", "_to_copy", "type_as")
def _converted(e: Emitter, out: Out, x: Value, *_: Any, **__: Any) -> Value:
    """All floats are F32, so that only what the numbers are can change."""
    if out.kind == x.kind or (x.kind == "b" and out.kind in "if") or (x.kind == "i" and out.kind == "f"):
        return Value(e.f32(x).tensor if out.kind == "f" else x.tensor, x.shape, out.kind, x.array)
    if out.kind == "b":
        return _not_zero(e, x)
    return e.i32(x)


@rule("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten", "view_as", "reshape_as")
def _reshaped(e: Emitter, out: Out, x: Value, *_: Any, **__: Any) -> Value:
    return e.reshape(x, out.shape)


@rule("permute")
def _permute(e: Emitter, out: Out, x: Value, dims: Sequence[int]) -> Value:
    return e.permute(x, [_dim(d, len(x.shape)) for d in dims])


@rule("transpose")
def _transpose(e: Emitter, out: Out, x: Value, dim0: int, dim1: int) -> Value:
    return e.transpose(x, _dim(dim0, len(x.shape)), _dim(dim1, len(x.shape)))


@rule("t", "numpy_T", "mT")
def _t(e: Emitter, out: Out, x: Value) -> Value:
    return e.transpose(x, -1, -2) if len(x.shape) >= 2 else x


@rule("movedim")
def _movedim(e: Emitter, out: Out, x: Value, source: Any, destination: Any) -> Value:
    rank = len(x.shape)
    sources = [_dim(d, rank) for d in ([source] if isinstance(source, int) else source)]
    targets = [_dim(d, rank) for d in ([destination] if isinstance(destination, int) else destination)]
    order = [d for d in range(rank) if d not in sources]
    for target, origin in sorted(zip(targets, sources, strict=True)):
        order.insert(target, origin)
    return e.permute(x, order)


@rule("expand", "expand_as", "broadcast_to")
def _expand(e: Emitter, out: Out, x: Value, *_: Any, **__: Any) -> Value:
    return e.expand(x, out.shape)


@rule("repeat")
def _repeat(e: Emitter, out: Out, x: Value, repeats: Sequence[int]) -> Value:
    """Each dimension n repeated r times is the dimension (r, n) of which r is expanded."""
    shape = (1,) * (len(repeats) - len(x.shape)) + x.shape
    for dim, times in enumerate(repeats):
        if times != 1:
            blocks = (prod(shape[:dim]), 1, prod(shape[dim:]))
            x = e.expand(e.reshape(x, blocks), (blocks[0], times, blocks[2]))
            shape = (*shape[:dim], shape[dim] * times, *shape[dim + 1 :])
    return e.reshape(x, shape)


@rule("repeat_interleave")
def _repeat_interleave(e: Emitter, out: Out, x: Value, repeats: Any, dim: int | None = None, **_: Any) -> Value:
    if not isinstance(repeats, int):
        raise CaptureError("repeat_interleave by a tensor")
    shape = x.shape if dim is not None else (prod(x.shape),)
    at = _dim(dim, len(shape)) if dim is not None else 0
    blocks = (prod(shape[: at + 1]), 1, prod(shape[at + 1 :]))
    return e.reshape(e.expand(e.reshape(x, blocks), (blocks[0], repeats, blocks[2])), out.shape)


@rule("zeros_like", "new_zeros")
def _zeros(e: Emitter, out: Out, *_: Any, **__: Any) -> Value:
    return _full(e, out, None, (), 0)


@rule("ones_like", "new_ones")
def _ones(e: Emitter, out: Out, *_: Any, **__: Any) -> Value:
    return _full(e, out, None, (), 1)


@rule("new_full")
def _full(e: Emitter, out: Out, _: Any, size: Any, fill_value: Number, **__: Any) -> Value:
    return e.constant(np.full(out.shape, fill_value, {"f": np.float32, "i": np.int64, "b": bool}[out.kind]), out.kind)


@rule("full_like")
def _full_like(e: Emitter, out: Out, x: Value, fill_value: Number, **__: Any) -> Value:
    return _full(e, out, x, (), fill_value)


# Parts and wholes


@rule("slice")
def _slice(
    e: Emitter, out: Out, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    dim = _dim(dim, len(x.shape))
    first, _, _ = slice(start, end, step).indices(x.shape[dim])
    return e.slice(x, dim, first, out.shape[dim], step)


@rule("narrow")
def _narrow(e: Emitter, out: Out, x: Value, dim: int, start: int, length: int) -> Value:
    dim = _dim(dim, len(x.shape))
    return e.slice(x, dim, _dim(start, x.shape[dim]), length)


@rule("select")
def _select(e: Emitter, out: Out, x: Value, dim: int, index: int) -> Value:
    dim = _dim(dim, len(x.shape))
    return e.reshape(e.slice(x, dim, _dim(index, x.shape[dim]), 1), out.shape)


def _split_at(e: Emitter, x: Value, dim: int, sizes: Sequence[int]) -> tuple[Value, ...]:
    starts = np.cumsum([0, *sizes]).tolist()
    return tuple(e.slice(x, dim, start, size) for start, size in zip(starts, sizes, strict=False))


@rule("chunk")
def _chunk(e: Emitter, out: Out, x: Value, chunks: int, dim: int = 0) -> tuple[Value, ...]:
    dim = _dim(dim, len(x.shape))
    return _split(e, out, x, -(-x.shape[dim] // chunks), dim)


@rule("split", "split_with_sizes")
def _split(e: Emitter, out: Out, x: Value, sizes: Any, dim: int = 0) -> tuple[Value, ...]:
    dim = _dim(dim, len(x.shape))
    n = x.shape[dim]
    parts = [min(sizes, n - i) for i in range(0, n, sizes)] if isinstance(sizes, int) else list(sizes)
    return _split_at(e, x, dim, parts)


@rule("unbind")
def _unbind(e: Emitter, out: Out, x: Value, dim: int = 0) -> tuple[Value, ...]:
    dim = _dim(dim, len(x.shape))
    shape = x.shape[:dim] + x.shape[dim + 1 :]
    return tuple(e.reshape(e.slice(x, dim, i, 1), shape) for i in range(x.shape[dim]))


@rule("cat")
def _cat(e: Emitter, out: Out, tensors: Sequence[Value], dim: int = 0) -> Value:
    tensors = [x for x in tensors if x.shape != (0,)]
    return e.concat(tensors, _dim(dim, len(out.shape)))


@rule("stack")
def _stack(e: Emitter, out: Out, tensors: Sequence[Value], dim: int = 0) -> Value:
    dim = _dim(dim, len(out.shape))
    shape = (*out.shape[:dim], 1, *out.shape[dim + 1 :])
    return e.concat([e.reshape(x, shape) for x in tensors], dim)


@rule("pad", "constant_pad_nd")
def _pad(
    e: Emitter, out: Out, x: Value, pad: Sequence[int], mode: str | float = "constant", value: float | None = None
) -> Value:
    fill = value if isinstance(mode, str) else mode
    if mode not in ("constant", fill):
        raise CaptureError(f"pad in mode {mode!r}")
    if min(pad) < 0 or fill or len(pad) > 8:
        raise CaptureError(f"pad by {list(pad)} with {fill}")
    if len(out.shape) > 4:
        raise CaptureError(f"pad of {len(out.shape)} dimensions")
    l0, r0, l1, r1, l2, r2, l3, r3 = (*pad, *([0] * (8 - len(pad))))
    if l0 or l1 or l2 or l3:  # older servers pad at the end only: turn a leading pad into zeros that are joined
        return _pad_by_joining(e, x, pad)
    source = e.contiguous(e.f32(x)).tensor
    return Value(e.node("PAD", source, params=Pad(l0, r0, l1, r1, l2, r2, l3, r3)), out.shape)


def _pad_by_joining(e: Emitter, x: Value, pad: Sequence[int]) -> Value:
    for i, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        dim = len(x.shape) - 1 - i
        zeros = [(*x.shape[:dim], n, *x.shape[dim + 1 :]) for n in (before, after)]
        left, right = (e.constant(np.zeros(shape, np.float32)) for shape in zeros)
        x = e.concat([left, e.f32(x), right], dim)
    return x


@rule("embedding")
def _embedding(e: Emitter, out: Out, weight: Value, indices: Value, *_: Any, **__: Any) -> Value:
    rows = e.reshape(e.i32(indices), (prod(indices.shape),))
    picked = Value(e.node("GET_ROWS", weight.tensor, rows.tensor), (*rows.shape, out.shape[-1]))
    return e.reshape(picked, out.shape)


@rule("index_select")
def _index_select(e: Emitter, out: Out, x: Value, dim: int, index: Value) -> Value:
    return _take(e, out, x, _dim(dim, len(x.shape)), index)


def _take(e: Emitter, out: Out, x: Value, dim: int, index: Value) -> Value:
    """The elements ``index`` of dimension ``dim``, as rows of a matrix."""
    rank = len(x.shape)
    order = [dim, *(d for d in range(rank) if d != dim)]
    moved = e.permute(e.f32(x), order)
    table = e.contiguous(e.reshape(moved, (x.shape[dim], prod(moved.shape[1:]))))
    rows = _embedding(e, Out((*index.shape, table.shape[1]), "f"), table, index)
    n = len(index.shape)
    result = e.reshape(rows, (*index.shape, *moved.shape[1:]))
    back = [*range(n, n + dim), *range(n), *range(n + dim, n + rank - 1)]
    return e.permute(result, back)


@rule("index")
def _index(e: Emitter, out: Out, x: Value, indices: Sequence[Value | None]) -> Value:
    """One index, or the pairs (0, 1 … n-1; i0, i1 …) that pick an element of dimension 1 for each of dimension 0."""
    given = [i for i, index in enumerate(indices) if index is not None]
    index = indices[given[0]] if given else None
    if len(given) == 1 and index is not None and index.kind != "b":
        return _take(e, out, x, given[0], index)
    rows, columns = indices[0], indices[1] if len(indices) == 2 else None
    counted = rows is not None and rows.array is not None and rows.array.tolist() == list(range(x.shape[0]))
    if given != [0, 1] or not counted or columns is None or columns.shape != (x.shape[0],):
        raise CaptureError("an index of several tensors that is no choice of one element per row")
    n, size, width = x.shape[0], x.shape[1], prod(x.shape[2:])
    table = e.contiguous(e.reshape(e.f32(x), (n, size, width)))
    picks = e.reshape(e.i32(columns), (1, n, 1))
    return e.reshape(Value(e.node("GET_ROWS", table.tensor, e.reshape(picks, (n, 1)).tensor), (n, 1, width)), out.shape)


# Element by element

_UNARY = {
    "silu": "SILU", "relu": "RELU", "sigmoid": "SIGMOID", "tanh": "TANH", "exp": "EXP", "abs": "ABS", "neg": "NEG",
    "sign": "SGN", "sin": "SIN", "cos": "COS", "sqrt": "SQRT", "log": "LOG", "square": "SQR", "hardswish": "HARDSWISH",
    "hardsigmoid": "HARDSIGMOID",
}  # fmt: skip
"""ATen's functions of one tensor that ggml has under another name."""


def _unary(op: str) -> Rule:
    return lambda e, out, x: e.unary(op, x)


RULES.update({name: _unary(op) for name, op in _UNARY.items()})


@rule("gelu")
def _gelu(e: Emitter, out: Out, x: Value, *, approximate: str = "none") -> Value:
    return e.unary("GELU" if approximate == "tanh" else "GELU_ERF", x)


@rule("leaky_relu")
def _leaky_relu(e: Emitter, out: Out, x: Value, negative_slope: float = 0.01) -> Value:
    return Value(e.node("LEAKY_RELU", e.contiguous(e.f32(x)).tensor, params=LeakyRelu(negative_slope)), x.shape)


@rule("softplus")
def _softplus(e: Emitter, out: Out, x: Value, beta: Number = 1, threshold: Number = 20) -> Value:
    return e.scale(
        e.unary("LOG", e.scale(e.unary("EXP", e.scale(_clamp(e, out, x, None, threshold), beta)), 1, 1)), 1 / beta
    )


@rule("clamp", "clip", "clamp_min", "hardtanh")
def _clamp(e: Emitter, out: Out, x: Value, min: Number | None = None, max: Number | None = None) -> Value:
    bounds = Clamp(-math.inf if min is None else float(min), math.inf if max is None else float(max))
    return Value(e.node("CLAMP", e.contiguous(e.f32(x)).tensor, params=bounds), x.shape, x.kind)


@rule("clamp_max")
def _clamp_max(e: Emitter, out: Out, x: Value, max: Number) -> Value:
    return _clamp(e, out, x, None, max)


@rule("add")
def _add(e: Emitter, out: Out, a: Operand, b: Operand, *, alpha: Number = 1) -> Value:
    for x, other in ((a, b), (b, a)):
        number = _number(other)
        if number is not None and isinstance(x, Value) and x.shape == out.shape:
            return e.scale(x, 1 if other is b else alpha, number * (alpha if other is b else 1))
    return e.binary("ADD", _value(e, a), e.scale(_value(e, b), alpha))


@rule("sub")
def _sub(e: Emitter, out: Out, a: Operand, b: Operand, *, alpha: Number = 1) -> Value:
    if alpha != 1 or _number(a) is not None or _number(b) is not None:
        return _add(e, out, a, b, alpha=-alpha)
    return e.binary("SUB", _value(e, a), _value(e, b))


@rule("rsub")
def _rsub(e: Emitter, out: Out, a: Operand, b: Operand, *, alpha: Number = 1) -> Value:
    return _sub(e, out, b, a, alpha=alpha)


@rule("mul")
def _mul(e: Emitter, out: Out, a: Operand, b: Operand) -> Value:
    for x, other in ((a, b), (b, a)):
        number = _number(other)
        if number is not None and isinstance(x, Value) and x.shape == out.shape:
            return e.scale(x, number)
    return e.binary("MUL", _value(e, a), _value(e, b))


@rule("div")
def _div(e: Emitter, out: Out, a: Operand, b: Operand, *, rounding_mode: str | None = None) -> Value:
    if rounding_mode is not None:
        raise CaptureError(f"division rounded to {rounding_mode}")
    number = _number(b)
    if number and isinstance(a, Value) and a.shape == out.shape:
        return e.scale(e.f32(a), 1 / number)
    return e.binary("DIV", _value(e, a), _value(e, b))


@rule("reciprocal")
def _reciprocal(e: Emitter, out: Out, x: Value) -> Value:
    return e.binary("DIV", e.constant(np.ones(1, np.float32)), x)


@rule("rsqrt")
def _rsqrt(e: Emitter, out: Out, x: Value) -> Value:
    return _reciprocal(e, out, e.unary("SQRT", x))


@rule("pow")
def _pow(e: Emitter, out: Out, x: Operand, exponent: Operand) -> Value:
    """Whole and half exponents by products and roots, a constant base by the exponential."""
    power, base = _number(exponent), _number(x)
    if power is None and base is not None and base > 0 and isinstance(exponent, Value):
        return e.unary("EXP", e.scale(e.f32(exponent), math.log(base)))
    if power is None or not isinstance(x, Value) or abs(power) > 16 or power * 2 != int(power * 2):
        raise CaptureError(f"power {power}")
    if power < 0:
        return _reciprocal(e, out, _pow(e, out, x, -power))
    result = e.unary("SQRT", x) if power % 1 else None
    for _ in range(int(power)):
        result = x if result is None else e.unary("SQR", x) if result is x else e.binary("MUL", result, x)
    return e.f32(result) if result is not None else e.scale(x, 0, 1)


@rule("maximum")
def _maximum(e: Emitter, out: Out, a: Value, b: Value) -> Value:
    """b + max(a - b, 0)."""
    return e.binary("ADD", b, e.unary("RELU", e.binary("SUB", a, b)))


@rule("minimum")
def _minimum(e: Emitter, out: Out, a: Value, b: Value) -> Value:
    return e.binary("SUB", b, e.unary("RELU", e.binary("SUB", b, a)))


# Truth: zeros and ones


def _truth(value: Value) -> Value:
    return Value(value.tensor, value.shape, "b")


def _positive(e: Emitter, x: Value) -> Value:
    return _truth(e.unary("STEP", x))


def _not(e: Emitter, x: Value) -> Value:
    return _truth(e.scale(x, -1, 1))


def _not_zero(e: Emitter, x: Value) -> Value:
    return _positive(e, e.unary("ABS", x))


def _minus(e: Emitter, out: Out, a: Operand, b: Operand) -> Value:
    return _sub(e, Out(out.shape, "f"), a, b)


_COMPARE: dict[str, Callable[[Emitter, Out, Operand, Operand], Value]] = {
    "gt": lambda e, out, a, b: _positive(e, _minus(e, out, a, b)),
    "lt": lambda e, out, a, b: _positive(e, _minus(e, out, b, a)),
    "le": lambda e, out, a, b: _not(e, _positive(e, _minus(e, out, a, b))),
    "ge": lambda e, out, a, b: _not(e, _positive(e, _minus(e, out, b, a))),
    "ne": lambda e, out, a, b: _not_zero(e, _minus(e, out, a, b)),
    "eq": lambda e, out, a, b: _not(e, _not_zero(e, _minus(e, out, a, b))),
}
RULES.update(_COMPARE)


@rule("logical_not", "bitwise_not")
def _logical_not(e: Emitter, out: Out, x: Value) -> Value:
    return _not(e, _boolean(e, x))


@rule("logical_and", "bitwise_and", "__and__")
def _logical_and(e: Emitter, out: Out, a: Value, b: Value) -> Value:
    return _truth(e.binary("MUL", _boolean(e, a), _boolean(e, b)))


@rule("logical_or", "bitwise_or", "__or__")
def _logical_or(e: Emitter, out: Out, a: Value, b: Value) -> Value:
    return _positive(e, e.binary("ADD", _boolean(e, a), _boolean(e, b)))


def _boolean(e: Emitter, x: Value) -> Value:
    return x if x.kind == "b" else _not_zero(e, x)


@rule("where")
def _where(e: Emitter, out: Out, condition: Value, a: Operand, b: Operand) -> Value:
    """c·a + (1 - c)·b, with infinities as large numbers."""
    chosen = e.binary("MUL", _finite(e, a), condition)
    other = e.binary("MUL", _finite(e, b), _not(e, condition))
    return e.expand(e.binary("ADD", chosen, other), out.shape)


@rule("masked_fill")
def _masked_fill(e: Emitter, out: Out, x: Value, mask: Value, value: Operand) -> Value:
    return _where(e, out, mask, value, x)


def _finite(e: Emitter, operand: Operand) -> Value:
    value = _value(e, operand)
    if value.array is None or np.isfinite(value.array).all():
        return value
    return e.constant(np.nan_to_num(value.array.astype(np.float32)), "f")


# Reductions


def _last(e: Emitter, x: Value, dims: Sequence[int]) -> Value:
    """``x`` with ``dims`` merged into a last dimension."""
    kept = [d for d in range(len(x.shape)) if d not in dims]
    moved = e.permute(e.f32(x), [*kept, *dims])
    return e.contiguous(e.reshape(moved, (prod(x.shape[d] for d in kept), prod(x.shape[d] for d in dims))))


def _reduce(op: str) -> Rule:
    def reduced(
        e: Emitter, out: Out, x: Value, dim: Any = None, keepdim: bool = False, *, dtype: Kind | None = None
    ) -> Value:
        rows = _last(e, x, _dims(dim, len(x.shape)))
        return e.reshape(Value(e.node(op, rows.tensor), (rows.shape[0], 1)), out.shape)

    return reduced


RULES.update({"mean": _reduce("MEAN"), "sum": _reduce("SUM_ROWS")})


@rule("argmax")
def _argmax(e: Emitter, out: Out, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    rows = _last(e, x, _dims(dim, len(x.shape)))
    return e.reshape(Value(e.node("ARGMAX", rows.tensor), (rows.shape[0],), "i"), out.shape)


@rule("var")
def _var(
    e: Emitter, out: Out, x: Value, dim: Any = None, unbiased: bool = True, keepdim: bool = False,
    *, correction: Number | None = None,
) -> Value:  # fmt: skip
    rows = _last(e, x, _dims(dim, len(x.shape)))
    n = rows.shape[1]
    mean = Value(e.node("MEAN", rows.tensor), (rows.shape[0], 1))
    squares = e.unary("SQR", e.binary("SUB", rows, mean))
    less = (1 if unbiased else 0) if correction is None else correction
    total = Value(e.node("SUM_ROWS", squares.tensor), (rows.shape[0], 1))
    return e.reshape(e.scale(total, 1 / (n - less)), out.shape)


@rule("softmax", "_softmax")
def _softmax(e: Emitter, out: Out, x: Value, dim: int, *_: Any) -> Value:
    last, dim = len(x.shape) - 1, _dim(dim, len(x.shape))
    rows = e.contiguous(e.f32(e.transpose(x, dim, last)))
    return e.transpose(Value(e.node("SOFT_MAX", rows.tensor, params=SoftMax(1.0)), rows.shape), dim, last)


# Norms


def _scaled(e: Emitter, x: Value, weight: Value | None, bias: Value | None) -> Value:
    x = e.binary("MUL", x, weight) if weight is not None else x
    return e.binary("ADD", x, bias) if bias is not None else x


@rule("layer_norm")
def _layer_norm(
    e: Emitter, out: Out, x: Value, normalized_shape: Sequence[int], weight: Value | None = None,
    bias: Value | None = None, eps: float = 1e-5, *_: Any,
) -> Value:  # fmt: skip
    return _norm_rows(e, "NORM", x, normalized_shape, weight, bias, eps)


@rule("rms_norm")
def _rms_norm(
    e: Emitter, out: Out, x: Value, normalized_shape: Sequence[int], weight: Value | None = None,
    eps: float | None = None,
) -> Value:  # fmt: skip
    return _norm_rows(e, "RMS_NORM", x, normalized_shape, weight, None, eps if eps is not None else 2.0**-23)


def _norm_rows(
    e: Emitter, op: str, x: Value, shape: Sequence[int], weight: Value | None, bias: Value | None, eps: float
) -> Value:
    rank = len(x.shape) - len(shape)
    flat = x if len(shape) == 1 else e.reshape(x, (*x.shape[:rank], prod(shape)))
    rows = e.contiguous(e.f32(flat))
    normal = Value(e.node(op, rows.tensor, params=Eps(eps)), rows.shape)
    return _scaled(e, e.reshape(normal, x.shape), weight, bias)


@rule("group_norm")
def _group_norm(
    e: Emitter, out: Out, x: Value, num_groups: int, weight: Value | None = None, bias: Value | None = None,
    eps: float = 1e-5, *_: Any,
) -> Value:  # fmt: skip
    batch, channels, *space = x.shape
    image = e.reshape(x, x.shape if len(space) == 2 else (batch, channels, 1, prod(space)))
    image = e.contiguous(e.f32(image))
    normal = Value(e.node("GROUP_NORM", image.tensor, params=GroupNorm(num_groups, eps)), image.shape)
    weight, bias = (None if v is None else e.reshape(v, (channels, 1, 1)) for v in (weight, bias))
    return e.reshape(_scaled(e, normal, weight, bias), x.shape)


@rule("batch_norm")
def _batch_norm(
    e: Emitter, out: Out, x: Value, weight: Value | None, bias: Value | None, mean: Value | None, var: Value | None,
    training: bool, momentum: float, eps: float, *_: Any,
) -> Value:  # fmt: skip
    """In evaluation: the running statistics."""
    if training or mean is None or var is None:
        raise CaptureError("batch_norm in training: call eval() on the module")
    shape = (x.shape[1], *([1] * (len(x.shape) - 2)))
    weight, bias, mean, var = (None if v is None else e.reshape(v, shape) for v in (weight, bias, mean, var))
    normal = e.binary("DIV", e.binary("SUB", x, mean), e.unary("SQRT", e.scale(var, 1, eps)))  # type: ignore[arg-type]
    return _scaled(e, normal, weight, bias)


# Products


@rule("linear")
def _linear(e: Emitter, out: Out, x: Value, weight: Value, bias: Value | None = None) -> Value:
    rows = x if len(x.shape) <= 4 else e.reshape(x, (prod(x.shape[:-1]), x.shape[-1]))
    product = e.mul_mat(weight, rows)
    return e.reshape(_scaled(e, product, None, bias), out.shape)


@rule("matmul", "bmm", "mm")
def _matmul(e: Emitter, out: Out, a: Value, b: Value) -> Value:
    left = e.reshape(a, (1, *a.shape)) if len(a.shape) == 1 else a
    right = e.reshape(b, (*b.shape, 1)) if len(b.shape) == 1 else b
    batch = tuple(np.broadcast_shapes(left.shape[:-2], right.shape[:-2]))
    if len(batch) > 2:  # all batches in one
        left, right = (e.expand(v, (*batch, *v.shape[-2:])) for v in (left, right))
        left, right = (e.reshape(v, (prod(batch), *v.shape[-2:])) for v in (left, right))
        return e.reshape(_matmul(e, out, left, right), out.shape)
    left = e.expand(left, (*batch, *left.shape[-2:]))
    return e.reshape(e.mul_mat(e.transpose(e.f32(right), -1, -2), left), out.shape)


@rule("addmm", "baddbmm")
def _addmm(e: Emitter, out: Out, bias: Value, a: Value, b: Value, *, beta: Number = 1, alpha: Number = 1) -> Value:
    product = e.scale(_matmul(e, out, a, b), alpha)
    return product if beta == 0 else e.binary("ADD", product, e.scale(bias, beta))


@rule("scaled_dot_product_attention")
def _attention(
    e: Emitter, out: Out, query: Value, key: Value, value: Value, attn_mask: Value | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Value:  # fmt: skip
    """[…, T, D] by heads; leading dimensions are merged into one of batches when there are more than two."""
    if dropout_p:
        raise CaptureError("dropout in training: call eval() on the module")
    batch, (steps, width), seen = query.shape[:-2], query.shape[-2:], key.shape[-2]
    scale = 1 / math.sqrt(width) if scale is None else scale
    if is_causal:
        attn_mask = e.constant(np.tril(np.ones((steps, seen), bool)))
    rank4 = (*(1,) * (2 - len(batch)), *batch) if len(batch) <= 2 else (prod(batch[:-1]), batch[-1])

    def four(x: Value) -> Value:
        leading = rank4 if x.shape[:-2] == batch else (rank4[0], x.shape[-3])
        return e.reshape(x, (*leading, *x.shape[-2:]))

    mask = None if attn_mask is None else _mask_of_rank_4(e, attn_mask, batch, rank4, (steps, seen))
    attend = _flash if "FLASH_ATTN_EXT" in e.target.ops else _soft_max_attention
    return e.reshape(attend(e, four(query), four(key), four(value), mask, scale), out.shape)


def _mask_of_rank_4(e: Emitter, mask: Value, batch: Shape, merged: Shape, size: tuple[int, int]) -> Value:
    known = mask.array
    mask = e.expand(mask, (*mask.shape[:-2], *size)) if known is None else _constant_mask(e, known, size)
    if len(mask.shape) > 4 or (len(batch) == 1 and len(mask.shape) == 3):
        return e.reshape(e.expand(mask, (*batch, *size)), (*merged, *size))
    return e.reshape(mask, (*(1,) * (4 - len(mask.shape)), *mask.shape))


def _constant_mask(e: Emitter, mask: np.ndarray, size: tuple[int, int]) -> Value:
    """A known mask as numbers to add, no larger than it has to be: equal batches and heads become one."""
    numbers = np.where(mask, np.float32(0), np.float32(-np.inf)) if mask.dtype == bool else mask
    numbers = np.broadcast_to(numbers, (*numbers.shape[:-2], *size) if numbers.ndim >= 2 else size)
    for axis in range(numbers.ndim - 2):
        first = np.take(numbers, [0], axis)
        if numbers.shape[axis] > 1 and (numbers == first).all():
            numbers = first
    return e.constant(np.ascontiguousarray(numbers), "f")


def _added_mask(e: Emitter, mask: Value) -> Value:
    return e.scale(mask, FAR, -FAR) if mask.kind == "b" else e.f32(mask)


def _flash(e: Emitter, q: Value, k: Value, v: Value, mask: Value | None, scale: float) -> Value:
    """With the mask as F32: only our own devices get this operation from us, and they take it exactly."""
    rows = [x if x.tensor.nb[0] == x.tensor.type.size else e.contiguous(x) for x in map(e.f32, (q, k, v))]
    operands = [x.tensor for x in rows] + ([] if mask is None else [e.contiguous(_added_mask(e, mask)).tensor])
    heads = e.node("FLASH_ATTN_EXT", *operands, params=FlashAttn(scale))
    batch, n, steps, _ = q.shape
    return e.transpose(Value(heads, (batch, steps, n, v.shape[-1])), 1, 2)


def _soft_max_attention(e: Emitter, q: Value, k: Value, v: Value, mask: Value | None, scale: float) -> Value:
    scores = e.mul_mat(e.f32(k), q)
    operands = [scores.tensor]
    if mask is not None:
        operands.append(e.contiguous(_added_mask(e, mask)).tensor)
    weights = Value(e.node("SOFT_MAX", *operands, params=SoftMax(scale)), scores.shape)
    return e.mul_mat(e.transpose(e.f32(v), -1, -2), weights)


# Images


@rule("conv2d")
def _conv2d(
    e: Emitter, out: Out, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Value:  # fmt: skip
    (s1, s0), (d1, d0) = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        padding = _same_padding(padding, weight.shape[-2:], (d1, d0))
    p1, p0 = _pair(padding)
    channels, each = x.shape[1], x.shape[1] // groups
    params = Conv2D(s0, s1, p0, p1, d0, d1)
    image = e.contiguous(e.f32(x))
    if groups == 1:
        result = _convolve(e, image, weight, params)
    elif each == 1 and weight.shape[0] == channels and "CONV_2D_DW" in e.target.ops:
        result = _shaped(e.node("CONV_2D_DW", weight.tensor, image.tensor, params=params), 4)
    else:
        parts = _split_at(e, image, 1, [each] * groups)
        kernels = _split_at(e, weight, 0, [weight.shape[0] // groups] * groups)
        pairs = zip(parts, kernels, strict=True)
        result = e.concat([_convolve(e, e.contiguous(part), kernel, params) for part, kernel in pairs], 1)
    return _with_bias(e, result, bias)


def _same_padding(padding: str, kernel: Shape, dilation: tuple[int, int]) -> tuple[int, int]:
    if padding == "valid":
        return 0, 0
    both = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(n % 2 for n in both):
        raise CaptureError("conv2d with 'same' padding of unlike sides")
    return both[0] // 2, both[1] // 2


def _with_bias(e: Emitter, image: Value, bias: Value | None) -> Value:
    return image if bias is None else e.binary("ADD", image, e.reshape(bias, (bias.shape[0], 1, 1)))


def _shaped(tensor: Any, rank: int) -> Value:
    return Value(tensor, tuple(reversed(tensor.ne))[4 - rank :])


def _convolve(e: Emitter, image: Value, kernel: Value, params: Conv2D) -> Value:
    """CONV_2D, or for devices that lack it the product of the kernel and the image's windows (F32: exact)."""
    if kernel.tensor.ne != dims_of(kernel.shape):  # one tap, stored as a matrix
        if params != Conv2D(1, 1, 0, 0, 1, 1):
            raise CaptureError(f"a kernel of one tap stored as {kernel.tensor.type}, with {params}")
        matrix = Value(kernel.tensor, kernel.shape[:2])
        return e.contiguous(e.permute(e.mul_mat(matrix, e.permute(image, (0, 2, 3, 1))), (0, 3, 1, 2)))
    if "CONV_2D" in e.target.ops:
        return _shaped(e.node("CONV_2D", kernel.tensor, image.tensor, params=params), 4)
    windows = e.node("IM2COL", kernel.tensor, image.tensor, params=Im2Col(*params, 1), type=F32)
    taps, width, height, batch = windows.ne
    columns = e.reshape(_shaped(windows, 4), (batch * height * width, taps))
    product = e.mul_mat(e.reshape(kernel, (kernel.shape[0], taps)), columns)
    pixels = e.reshape(product, (batch, height, width, kernel.shape[0]))
    return e.contiguous(e.permute(pixels, (0, 3, 1, 2)))


@rule("conv1d")
def _conv1d(
    e: Emitter, out: Out, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Value:  # fmt: skip
    def flat(value: Value) -> Value:
        return e.reshape(value, (*value.shape[:2], 1, value.shape[2]))

    (_, s), (_, d) = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        padding = _same_padding(padding, (1, weight.shape[-1]), (1, d))
    wide = Out((*out.shape[:2], 1, out.shape[2]), out.kind)
    result = _conv2d(e, wide, flat(x), flat(weight), bias, (1, s), (0, _pair(padding)[1]), (1, d), groups)
    return e.reshape(result, out.shape)


@rule("conv_transpose2d")
def _conv_transpose2d(
    e: Emitter, out: Out, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Value:  # fmt: skip
    (s1, s0), (p1, p0) = _pair(stride), _pair(padding)
    if s1 != s0 or groups != 1 or _pair(dilation) != (1, 1) or _pair(output_padding) != (0, 0):
        raise CaptureError("conv_transpose2d with groups, dilation, output padding or unlike strides")
    image = e.contiguous(e.f32(x))
    result = _shaped(e.node("CONV_TRANSPOSE_2D", weight.tensor, image.tensor, params=ConvTranspose2D(s0)), 4)
    result = e.slice(e.slice(result, 2, p1, out.shape[2]), 3, p0, out.shape[3])
    return _with_bias(e, result, bias)


@rule("upsample_nearest2d")
def _upsample_nearest(e: Emitter, out: Out, x: Value, *_: Any) -> Value:
    image = e.contiguous(e.f32(x))
    return Value(e.node("UPSCALE", image.tensor, params=Upscale(NEAREST), ne=dims_of(out.shape)), out.shape)


@rule("avg_pool2d")
def _avg_pool2d(
    e: Emitter, out: Out, x: Value, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Value:  # fmt: skip
    if _pair(padding) != (0, 0) or ceil_mode or divisor_override is not None:
        raise CaptureError("avg_pool2d with padding, ceil_mode or divisor_override")
    k1, k0 = _pair(kernel_size)
    s1, s0 = _pair(stride or kernel_size)
    if "POOL_2D" in e.target.ops:
        params = Pool2D(MEAN_POOL, k0, k1, s0, s1, 0, 0)
        return e.reshape(_shaped(e.node("POOL_2D", e.contiguous(e.f32(x)).tensor, params=params), 4), out.shape)
    # the mean of the windows' pixels: shifted pictures, added
    height, width = out.shape[-2:]
    rank = len(x.shape)
    columns = [e.slice(x, rank - 1, at, width, s0) for at in range(k0)]
    parts = [e.slice(column, rank - 2, at, height, s1) for column in columns for at in range(k1)]
    return e.scale(reduce(lambda total, part: e.binary("ADD", total, part), parts), 1 / (k0 * k1))
