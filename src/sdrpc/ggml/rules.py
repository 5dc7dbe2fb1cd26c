"""What each operation takes and gives: one table, ``RULES``.

A rule counts an operation's sources, checks their types and shapes and the parameters, and tells type and shape of the
result. Builders ask it for the result, the spec of foreign graphs compares the declared result with it. The facts are
those of ggml's constructors (ggml.c) and of its reference backend (ggml-cpu/ops.cpp); where ggml is lax and reads out
of bounds, a rule is strict. Strides, buffers and aliasing are :mod:`sdrpc.ggml.spec`'s concern; only SET and ACC, whose
strides are parameters, are checked here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..errors import GraphError, UnsupportedOperation
from .params import PARAMS, NoParams, Params
from .tensor import Dims, Tensor, extent
from .types import F32, I32, TYPES, Type

FLOATS = frozenset({"F32", "F16", "BF16"})
"""Types that values are computed in."""
READABLE = FLOATS | {
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS",
    "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_XS", "TQ1_0", "TQ2_0",
}  # fmt: skip
"""Types that weights may have: what gguf can turn into floats."""
PLAIN = frozenset(t.name for t in TYPES.values() if t.plain)
INDICES = frozenset({"I32", "I64"})

UNARY_OPS = frozenset({
    "ABS", "SGN", "NEG", "STEP", "TANH", "ELU", "RELU", "SIGMOID", "GELU", "GELU_QUICK", "SILU", "HARDSWISH",
    "HARDSIGMOID", "EXP", "EXPM1", "SOFTPLUS", "GELU_ERF", "FLOOR", "CEIL", "ROUND", "TRUNC",
})  # fmt: skip
GLU_OPS = frozenset({"REGLU", "GEGLU", "SWIGLU", "SWIGLU_OAI", "GEGLU_ERF", "GEGLU_QUICK", "SWIGLU_CLAMP"})

NEAREST, BILINEAR, ALIGN_CORNERS = 0, 1, 256
ROPE_NORMAL, ROPE_NEOX = 0, 2
MAX_POOL, MEAN_POOL = 0, 1

Sources = tuple[Tensor | None, ...]


class Result(NamedTuple):
    """Type and shape that an operation gives."""

    type: Type
    ne: Dims


class Call(NamedTuple):
    """An operation as written down. ``type`` and ``ne`` are what the node declares, None where they are asked for."""

    op: str
    params: Any  # the op's class of PARAMS: checked before a rule sees it
    src: tuple[Any, ...]  # tensors; None only where the rule allows it
    type: Type | None
    ne: Dims | None


class Rule(NamedTuple):
    """``infer`` gets a call whose number of sources and class of parameters are right. The first ``least`` sources are
    needed, those up to ``most`` may be missing."""

    least: int
    most: int
    infer: Callable[[Call], Result]
    finite: bool = True  # whether parameters must be finite; NaN is never allowed


def infer(op: str, params: Params, src: Sources, type: Type | None = None, ne: Dims | None = None) -> Result:
    """Type and shape of ``op``'s result.

    ``type`` and ``ne`` are the declared ones: needed where an operation leaves them free (VIEW, RESHAPE, …), else
    compared with the result. Raises :class:`GraphError` for a call that means nothing and
    :class:`UnsupportedOperation` for one that means something that nobody here computes.
    """
    rule = RULES.get(op)
    if rule is None:
        raise UnsupportedOperation("operation not supported")
    kind: object = params.__class__
    if kind is not PARAMS.get(op, NoParams):
        raise GraphError(f"parameters of another operation: {params}")
    for value in params:
        if value.__class__ is float and not math.isfinite(value) and (rule.finite or math.isnan(value)):
            raise GraphError(f"a parameter is {value}: {params}")
    while src and src[-1] is None:
        src = src[:-1]
    if not rule.least <= len(src) <= rule.most or None in src[: rule.least]:
        raise GraphError(f"wrong number of sources: {sum(s is not None for s in src)}")
    result = rule.infer(Call(op, params, src + (None,) * (rule.most - len(src)), type, ne))
    if type is not None and type is not result.type and type != result.type:
        raise GraphError(f"declared as {type}, but the result is {result.type}")
    if ne is not None and ne != result.ne:
        raise GraphError(f"declared shape {list(ne)}, but the result is {list(result.ne)}")
    return result


def injective(type: Type, ne: Dims, nb: Dims) -> bool:
    """Whether these strides give no byte to two elements (sufficient: sorted by stride, each dimension steps over all
    that lies below it)."""
    reach = type.row_bytes(ne[0]) if not type.plain else type.size
    first = 0 if type.plain else 1
    for stride, n in sorted((nb[i], ne[i]) for i in range(first, 4) if ne[i] > 1):
        if stride < reach:
            return False
        reach += (n - 1) * stride
    return True


# What rules are made of


def need(truth: bool, message: str, *values: object) -> None:
    """Raise :class:`GraphError` unless ``truth``; the message is formatted only then."""
    if not truth:
        raise GraphError(message.format(*(list(v) if isinstance(v, tuple) else v for v in values)))


def support(truth: bool, message: str, *values: object) -> None:
    """Raise :class:`UnsupportedOperation` unless ``truth``."""
    if not truth:
        raise UnsupportedOperation(message.format(*values))


def typed(tensor: Tensor, allowed: frozenset[str], what: str = "source") -> None:
    if tensor.type.name not in allowed:
        raise UnsupportedOperation(f"{what} of type {tensor.type}")


def repeats(small: Dims, large: Dims) -> bool:
    """Whether ``small`` fits a whole number of times into ``large``, in every dimension (ggml_can_repeat)."""
    return not (large[0] % small[0] or large[1] % small[1] or large[2] % small[2] or large[3] % small[3])


def _declared(call: Call) -> Dims:
    if call.ne is None:
        raise GraphError("the shape of the result must be given")
    return call.ne


def _one_of(call: Call, allowed: frozenset[str], default: Type) -> Type:
    """The declared result type, which the operation leaves free within ``allowed``."""
    result = call.type or default
    support(result.name in allowed, "result of type {}", result)
    return result


def _window(n: int, k: int, s: int, p: int, d: int) -> int:
    """Outputs of a window of ``k`` taps sliding over ``n`` elements: (n + 2p - d(k - 1) - 1) / s + 1."""
    need(s > 0 and d > 0 and p >= 0, "stride {}, dilation {}, padding {}", s, d, p)
    room = n + 2 * p - d * (k - 1) - 1
    need(room >= 0, "a window of {} taps is larger than its input of {}", k, n)
    return room // s + 1


# The rules


def _leaf(call: Call) -> Result:
    if call.type is None:
        raise GraphError("the type of a leaf must be given")
    return Result(call.type, _declared(call))


def _like(allowed: frozenset[str]) -> Callable[[Call], Result]:
    """Element by element, or row by row: the result is as the first source."""

    def rule(call: Call) -> Result:
        source = call.src[0]
        typed(source, allowed)
        return Result(source.type, source.ne)

    return rule


_float_like = _like(FLOATS)


def _binary(call: Call) -> Result:
    a, b = call.src
    typed(a, FLOATS)
    typed(b, FLOATS)
    need(a.ne == b.ne or repeats(b.ne, a.ne), "can't broadcast {} to {}", b.ne, a.ne)
    return Result(_one_of(call, FLOATS, a.type), a.ne)


def _eps(call: Call) -> Result:
    need(call.params.eps >= 0, "eps {}", call.params.eps)
    return _float_like(call)


def _group_norm(call: Call) -> Result:
    groups, channels = call.params.groups, call.src[0].ne[2]
    need(0 < groups <= channels, "{} groups of {} channels", groups, channels)
    support(channels % groups == 0, "{} channels in {} unlike groups", channels, groups)
    return _eps(call)


def _sum(call: Call) -> Result:
    return Result(_float_like(call).type, (1, 1, 1, 1))


def _sum_rows(call: Call) -> Result:
    like = _float_like(call)
    return Result(like.type, (1, *like.ne[1:]))


def _mean(call: Call) -> Result:
    return Result(F32, (1, *_float_like(call).ne[1:]))


def _argmax(call: Call) -> Result:
    ne = _float_like(call).ne
    need(ne[2] == ne[3] == 1, "{} is no matrix", ne)
    return Result(I32, (ne[1], 1, 1, 1))


def _repeat(call: Call) -> Result:
    source = call.src[0]
    typed(source, PLAIN)
    ne = _declared(call)
    need(repeats(source.ne, ne), "can't repeat {} to {}", source.ne, ne)
    return Result(source.type, ne)


def _concat(call: Call) -> Result:
    a, b = call.src
    dim = call.params.dim
    typed(a, PLAIN)
    need(0 <= dim < 4, "dimension {}", dim)
    need(a.type == b.type, "types {} and {}", a.type, b.type)
    need(a.ne[:dim] == b.ne[:dim] and a.ne[dim + 1 :] == b.ne[dim + 1 :], "shapes {} and {}", a.ne, b.ne)
    return Result(a.type, _with(a.ne, dim, a.ne[dim] + b.ne[dim]))


def _with(ne: Dims, dim: int, n: int) -> Dims:
    w, x, y, z = (n if i == dim else old for i, old in enumerate(ne))
    return w, x, y, z


def _mul_mat(call: Call) -> Result:
    a, b = call.src
    typed(a, READABLE)
    typed(b, FLOATS)
    x, y = a.ne, b.ne
    need(x[0] == y[0] and not y[2] % x[2] and not y[3] % x[3], "can't multiply {} and {}", x, y)
    return Result(F32, (x[1], y[1], y[2], y[3]))


def _out_prod(call: Call) -> Result:
    a, b = call.src
    typed(a, READABLE)
    typed(b, FLOATS)
    x, y = a.ne, b.ne
    need(x[1] == y[1] and not y[2] % x[2] and not y[3] % x[3], "can't multiply {} and {}", x, y)
    return Result(F32, (x[0], y[0], y[2], y[3]))


def _set_into(allowed: frozenset[str]) -> Callable[[Call], Result]:
    """SET and ACC: ``b`` goes into a copy of ``a`` at strides and an offset that are parameters."""

    def rule(call: Call) -> Result:
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


def _copy(call: Call) -> Result:
    a, b = call.src
    typed(a, READABLE | PLAIN)
    # without a destination it is ggml_cast: the result is a tensor of its own
    result = Result(call.type or a.type, call.ne or a.ne) if b is None else Result(b.type, b.ne)
    need(a.elements == math.prod(result.ne), "copies {} to {}", a.ne, result.ne)
    support(_convertible(a.type, result.type), "copy from {} to {}", a.type, result.type)
    return result


def _convertible(source: Type, result: Type) -> bool:
    return (source == result and source.plain) or (
        (source.name in READABLE and result.name in FLOATS)
        or {source.name, result.name} in ({"F32", "I32"}, {"F16", "I32"}, {"BF16", "I32"})
    )


def _cont(call: Call) -> Result:
    source = call.src[0]
    typed(source, PLAIN)
    ne = call.ne or source.ne
    need(source.elements == math.prod(ne), "makes {} of {}", ne, source.ne)
    return Result(source.type, ne)


def _reshape(call: Call) -> Result:
    source = call.src[0]
    ne = _declared(call)
    need(source.elements == math.prod(ne), "makes {} of {}", ne, source.ne)
    need(source.contiguous, "the source is not contiguous")
    return Result(source.type, ne)


def _view(call: Call) -> Result:
    return Result(call.src[0].type, _declared(call))


def _permute(call: Call) -> Result:
    axes = tuple(call.params)
    need(sorted(axes) == [0, 1, 2, 3], "axes {}", axes)
    return Result(call.src[0].type, permuted(call.src[0].ne, axes))


def permuted(dims: Dims, axes: tuple[int, ...]) -> Dims:
    """Dimension ``i`` of ``dims`` put at ``axes[i]``."""
    result = [0, 0, 0, 0]
    for n, axis in zip(dims, axes, strict=True):
        result[axis] = n
    return result[0], result[1], result[2], result[3]


def _transpose(call: Call) -> Result:
    ne = call.src[0].ne
    return Result(call.src[0].type, (ne[1], ne[0], ne[2], ne[3]))


def _get_rows(call: Call) -> Result:
    a, rows = call.src
    typed(a, READABLE | {"I32"})
    typed(rows, INDICES, "indices")
    need(
        a.ne[2] == rows.ne[1] and a.ne[3] == rows.ne[2] and rows.ne[3] == 1,
        "indices {} don't fit rows of {}", rows.ne, a.ne,
    )  # fmt: skip
    return Result(I32 if a.type == I32 else F32, (a.ne[0], rows.ne[0], rows.ne[1], rows.ne[2]))


def _set_rows(call: Call) -> Result:
    values, rows, into = call.src
    typed(values, frozenset({"F32", "F16"}))
    typed(rows, INDICES, "indices")
    typed(into, FLOATS, "destination")
    v, r, d = values.ne, rows.ne, into.ne
    need(
        v[0] == d[0] and v[2:] == d[2:] and v[1] == r[0] and not v[2] % r[1] and not v[3] % r[2] and r[3] == 1,
        "rows {} at {} don't fit {}", v, r, d,
    )  # fmt: skip
    return Result(into.type, d)


def _diag_mask(call: Call) -> Result:
    need(call.params.n_past >= 0, "n_past {}", call.params.n_past)
    return _float_like(call)


def _soft_max(call: Call) -> Result:
    a, mask, sinks = call.src
    scale_and_bias = call.params
    typed(a, FLOATS)
    support(sinks is None, "attention sinks")
    if mask is not None:
        typed(mask, FLOATS, "mask")
        m, n = mask.ne, a.ne
        need(m[0] == n[0] and m[1] >= n[1] and not n[2] % m[2] and not n[3] % m[3], "mask {} for {}", m, n)
    need(scale_and_bias.max_bias >= 0, "max_bias {}", scale_and_bias.max_bias)
    need(mask is not None or scale_and_bias.max_bias == 0, "max_bias without a mask")
    return Result(a.type, a.ne)


def _rope(call: Call) -> Result:
    a, positions, factors = call.src
    p = call.params
    typed(a, FLOATS)
    typed(positions, frozenset({"I32"}), "positions")
    support(p.mode in (ROPE_NORMAL, ROPE_NEOX), "rotary mode {}", p.mode)
    support(p.ext_factor == 0 and p.n_offset == 0, "YaRN or an offset of rotated dimensions")
    need(0 < p.n_dims <= a.ne[0] and p.n_dims % 2 == 0, "{} rotated dimensions of {}", p.n_dims, a.ne[0])
    need(p.freq_base > 0, "freq_base {}", p.freq_base)
    need(positions.ne == (a.ne[2], 1, 1, 1), "positions {} for {}", positions.ne, a.ne)
    if factors is not None:
        typed(factors, frozenset({"F32"}), "frequency factors")
        need(factors.ne[0] >= p.n_dims // 2, "{} frequency factors", factors.ne[0])
    return Result(a.type, a.ne)


def _clamp(call: Call) -> Result:
    need(call.params.min <= call.params.max, "clamps to {}", tuple(call.params))
    return _float_like(call)


def _im2col(call: Call) -> Result:
    kernel, image = call.src
    p = call.params
    typed(image, FLOATS)
    to = _one_of(call, FLOATS, F32)
    k, x = kernel.ne, image.ne
    need(p.is_2d in (0, 1), "is_2d {}", p.is_2d)
    width = _window(x[0], k[0], p.s0, p.p0, p.d0)
    if not p.is_2d:
        need(x[1] == k[1] and x[3] == 1, "kernel {} for input {}", k, x)
        return Result(to, (k[0] * k[1], width, x[2], 1))
    need(x[2] == k[2], "kernel {} for input {}", k, x)
    height = _window(x[1], k[1], p.s1, p.p1, p.d1)
    return Result(to, (k[0] * k[1] * k[2], width, height, x[3]))


def _conv_2d(call: Call) -> Result:
    kernel, image = call.src
    typed(kernel, READABLE, "kernel")
    typed(image, FLOATS)
    k, x, p = kernel.ne, image.ne, call.params
    need(x[2] == k[2], "kernel {} for input {}", k, x)
    return Result(image.type, (*_windows(k, x, p), k[3], x[3]))


def _conv_2d_dw(call: Call) -> Result:
    kernel, image = call.src
    typed(kernel, READABLE, "kernel")
    typed(image, FLOATS)
    k, x, p = kernel.ne, image.ne, call.params
    need(k[2] == 1 and k[3] == x[2], "kernel {} for input {}", k, x)
    return Result(image.type, (*_windows(k, x, p), x[2], x[3]))


def _windows(k: Dims, x: Dims, p: Any) -> tuple[int, int]:
    return _window(x[0], k[0], p.s0, p.p0, p.d0), _window(x[1], k[1], p.s1, p.p1, p.d1)


def _conv_transpose_2d(call: Call) -> Result:
    kernel, image = call.src
    typed(kernel, READABLE, "kernel")
    typed(image, FLOATS)
    k, x, stride = kernel.ne, image.ne, call.params.stride
    need(stride > 0, "stride {}", stride)
    need(k[3] == x[2], "kernel {} for input {}", k, x)
    return Result(F32, ((x[0] - 1) * stride + k[0], (x[1] - 1) * stride + k[1], k[2], x[3]))


def _pool_2d(call: Call) -> Result:
    source, p = call.src[0], call.params
    typed(source, FLOATS)
    need(p.op in (MAX_POOL, MEAN_POOL), "pooling {}", p.op)
    need(p.k0 > 0 and p.k1 > 0, "a window of {} × {}", p.k0, p.k1)
    need(p.p0 < p.k0 and p.p1 < p.k1, "padding {} × {} of a window of {} × {}", p.p0, p.p1, p.k0, p.k1)
    x = source.ne
    return Result(F32, (_window(x[0], p.k0, p.s0, p.p0, 1), _window(x[1], p.k1, p.s1, p.p1, 1), x[2], x[3]))


def _upscale(call: Call) -> Result:
    support(call.params.mode in (NEAREST, BILINEAR, BILINEAR | ALIGN_CORNERS), "mode {}", call.params.mode)
    return Result(_float_like(call).type, _declared(call))


def _pad(call: Call) -> Result:
    *amounts, circular = call.params
    typed(call.src[0], FLOATS)
    need(min(amounts) >= 0 and circular in (0, 1), "pads by {}", tuple(call.params))
    w, x, y, z = (n + amounts[2 * i] + amounts[2 * i + 1] for i, n in enumerate(call.src[0].ne))
    return Result(call.src[0].type, (w, x, y, z))


def _arange(call: Call) -> Result:
    start, stop, step = (np.float32(value) for value in call.params)
    need(stop > start and step > 0, "from {} to {} by {}", start, stop, step)
    with np.errstate(over="ignore"):  # infinite is caught below
        steps = float(np.ceil((stop - start) / step))
    need(0 < steps <= 2**31, "{} steps", steps)
    return Result(F32, (int(steps), 1, 1, 1))


def _timestep_embedding(call: Call) -> Result:
    steps, (dim, max_period) = call.src[0], call.params
    typed(steps, FLOATS)
    need(dim > 0 and max_period > 0, "dim {}, max_period {}", dim, max_period)
    need(steps.ne[1:] == (1, 1, 1), "timesteps {}", steps.ne)
    rounded = dim + dim % 2  # ggml before 2025 rounded an odd dim up
    return Result(F32, (rounded if call.ne is not None and call.ne[0] == rounded else dim, steps.ne[0], 1, 1))


def _argsort(call: Call) -> Result:
    need(call.params.order in (0, 1), "order {}", call.params.order)
    return Result(I32, _float_like(call).ne)


def _flash_attn(call: Call) -> Result:
    query, key, value, mask, sinks = call.src
    p = call.params
    typed(query, FLOATS, "query")
    typed(key, READABLE, "key")
    typed(value, READABLE, "value")
    support(sinks is None, "attention sinks")
    q, k, v = query.ne, key.ne, value.ne
    need(
        q[0] == k[0] and k[1] == v[1] and k[2] == v[2] and not q[2] % k[2] and q[3] == k[3] == v[3],
        "query {}, key {} and value {}", q, k, v,
    )  # fmt: skip
    if mask is not None:
        typed(mask, FLOATS, "mask")
        m = mask.ne
        need(m[0] == k[1] and m[1] >= q[1] and not q[2] % m[2] and not q[3] % m[3], "mask {} for {} and {}", m, q, k)
    need(p.max_bias >= 0 and (mask is not None or p.max_bias == 0), "max_bias {} (needs a mask)", p.max_bias)
    need(p.logit_softcap >= 0, "logit_softcap {}", p.logit_softcap)
    return Result(F32, (v[0], q[2], q[1], q[3]))


def _unary(call: Call) -> Result:
    support(call.params.op in UNARY_OPS, "unary operation {}", call.params.op)
    return _float_like(call)


def _glu(call: Call) -> Result:
    a, b = call.src
    support(call.params.op in GLU_OPS, "gated unit {}", call.params.op)
    typed(a, FLOATS)
    if b is not None:
        need(a.ne == b.ne and a.type == b.type, "{} and {} are unlike", a, b)
        return Result(a.type, a.ne)
    need(a.ne[0] % 2 == 0, "rows of {} elements have no halves", a.ne[0])
    return Result(a.type, (a.ne[0] // 2, *a.ne[1:]))


RULES: dict[str, Rule] = {
    # names for bytes
    "NONE": Rule(0, 0, _leaf), "VIEW": Rule(1, 1, _view), "RESHAPE": Rule(1, 1, _reshape),
    "PERMUTE": Rule(1, 1, _permute), "TRANSPOSE": Rule(1, 1, _transpose),
    # copies
    "DUP": Rule(1, 1, _like(PLAIN)), "CPY": Rule(1, 2, _copy), "CONT": Rule(1, 1, _cont),
    "REPEAT": Rule(1, 1, _repeat), "CONCAT": Rule(2, 2, _concat), "PAD": Rule(1, 1, _pad),
    "SET": Rule(2, 2, _set_into(frozenset({"F32", "I32"}))), "ACC": Rule(2, 2, _set_into(frozenset({"F32"}))),
    "GET_ROWS": Rule(2, 2, _get_rows), "SET_ROWS": Rule(3, 3, _set_rows),
    "ARANGE": Rule(0, 0, _arange), "FILL": Rule(1, 1, _like(frozenset({"F32", "F16"})), finite=False),
    # element by element
    "ADD": Rule(2, 2, _binary), "SUB": Rule(2, 2, _binary), "MUL": Rule(2, 2, _binary), "DIV": Rule(2, 2, _binary),
    "SQR": Rule(1, 1, _float_like), "SQRT": Rule(1, 1, _float_like), "LOG": Rule(1, 1, _float_like),
    "SIN": Rule(1, 1, _float_like), "COS": Rule(1, 1, _float_like), "SCALE": Rule(1, 1, _float_like),
    "CLAMP": Rule(1, 1, _clamp, finite=False), "LEAKY_RELU": Rule(1, 1, _float_like), "UNARY": Rule(1, 1, _unary),
    "GLU": Rule(1, 2, _glu, finite=False), "DIAG_MASK_INF": Rule(1, 1, _diag_mask),
    "DIAG_MASK_ZERO": Rule(1, 1, _diag_mask), "TIMESTEP_EMBEDDING": Rule(1, 1, _timestep_embedding),
    "ROPE": Rule(2, 3, _rope),
    # rows and reductions
    "SUM": Rule(1, 1, _sum), "SUM_ROWS": Rule(1, 1, _sum_rows), "MEAN": Rule(1, 1, _mean),
    "ARGMAX": Rule(1, 1, _argmax), "ARGSORT": Rule(1, 1, _argsort), "CUMSUM": Rule(1, 1, _float_like),
    "NORM": Rule(1, 1, _eps), "RMS_NORM": Rule(1, 1, _eps), "L2_NORM": Rule(1, 1, _eps),
    "GROUP_NORM": Rule(1, 1, _group_norm), "SOFT_MAX": Rule(1, 3, _soft_max),
    # products
    "MUL_MAT": Rule(2, 2, _mul_mat), "OUT_PROD": Rule(2, 2, _out_prod), "FLASH_ATTN_EXT": Rule(3, 5, _flash_attn),
    # images
    "IM2COL": Rule(2, 2, _im2col), "CONV_2D": Rule(2, 2, _conv_2d), "CONV_2D_DW": Rule(2, 2, _conv_2d_dw),
    "CONV_TRANSPOSE_2D": Rule(2, 2, _conv_transpose_2d), "POOL_2D": Rule(1, 1, _pool_2d),
    "UPSCALE": Rule(1, 1, _upscale),
}  # fmt: skip
"""Every operation that sdrpc knows, by ggml's name. What is not here is unsupported."""
