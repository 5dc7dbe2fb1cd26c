"""Each element by itself: unary and gated units, arithmetic, scales, masks; and numbers out of nothing."""

from __future__ import annotations

import numpy as np

from ..params import Arange, Clamp, DiagMask, Fill, Glu, LeakyRelu, NoParams, Scale, TimestepEmbedding, Unary
from ..types import F32
from .base import (
    FLOATS,
    READABLE,
    WRITABLE,
    Call,
    Op,
    Result,
    float_like,
    like,
    need,
    one_of,
    op,
    repeats,
    support,
    typed,
)

UNARY_OPS = frozenset({
    "ABS", "SGN", "NEG", "STEP", "TANH", "ELU", "RELU", "SIGMOID", "GELU", "GELU_QUICK", "SILU", "HARDSWISH",
    "HARDSIGMOID", "EXP", "EXPM1", "SOFTPLUS", "GELU_ERF", "XIELU", "FLOOR", "CEIL", "ROUND", "TRUNC",
})  # fmt: skip
GLU_OPS = frozenset({"REGLU", "GEGLU", "SWIGLU", "SWIGLU_OAI", "GEGLU_ERF", "GEGLU_QUICK", "SWIGLU_CLAMP"})


def _binary(call: Call[NoParams]) -> Result:
    a, b = call.src
    typed(a, FLOATS)
    typed(b, FLOATS)
    need(a.ne == b.ne or repeats(b.ne, a.ne), "can't broadcast {} to {}", b.ne, a.ne)
    return Result(one_of(call, FLOATS, a.type), a.ne)


def _add(call: Call[NoParams]) -> Result:
    """As :func:`_binary`, and something added to weights in blocks, which stay in blocks unless the result says not."""
    a, b = call.src
    typed(a, READABLE)
    typed(b, FLOATS)
    need(a.ne == b.ne or repeats(b.ne, a.ne), "can't broadcast {} to {}", b.ne, a.ne)
    return Result(one_of(call, FLOATS | WRITABLE & {a.type.name}, a.type), a.ne)


def _add_one(call: Call[NoParams]) -> Result:
    need(call.src[1].ne == (1, 1, 1, 1), "{} is no single number", call.src[1].ne)
    result = _add(call)
    need(result.type == call.src[0].type, "a result of type {}", result.type)
    return result


def _diag_mask(call: Call[DiagMask]) -> Result:
    need(call.params.n_past >= 0, "n_past {}", call.params.n_past)
    return float_like(call)


def _arange(call: Call[Arange]) -> Result:
    start, stop, step = (np.float32(value) for value in call.params)
    need(stop > start and step > 0, "from {} to {} by {}", start, stop, step)
    with np.errstate(over="ignore"):  # infinite is caught below
        steps = float(np.ceil((stop - start) / step))
    need(0 < steps <= 2**31, "{} steps", steps)
    return Result(F32, (int(steps), 1, 1, 1))


def _timestep_embedding(call: Call[TimestepEmbedding]) -> Result:
    steps, (dim, max_period) = call.src[0], call.params
    typed(steps, FLOATS)
    need(dim > 0 and max_period > 0, "dim {}, max_period {}", dim, max_period)
    need(steps.ne[1:] == (1, 1, 1), "timesteps {}", steps.ne)
    rounded = dim + dim % 2  # ggml before 2025 rounded an odd dim up
    return Result(F32, (rounded if call.ne is not None and call.ne[0] == rounded else dim, steps.ne[0], 1, 1))


def _unary(call: Call[Unary]) -> Result:
    support(call.params.op in UNARY_OPS, "unary operation {}", call.params.op)
    return float_like(call)


def _glu(call: Call[Glu]) -> Result:
    a, b = call.src
    support(call.params.op in GLU_OPS, "gated unit {}", call.params.op)
    typed(a, FLOATS)
    if b is not None:
        need(a.ne == b.ne and a.type == b.type, "{} and {} are unlike", a, b)
        return Result(a.type, a.ne)
    return Result(a.type, (a.ne[0] // 2, *a.ne[1:]))  # of an odd number the last element is not read


OPS: tuple[Op, ...] = (
    op("ADD", NoParams, _add, 2, portable=True),
    op("SUB", NoParams, _binary, 2, portable=True),
    op("MUL", NoParams, _binary, 2, portable=True),
    op("DIV", NoParams, _binary, 2, portable=True),
    op("ADD1", NoParams, _add_one, 2),
    op("SQR", NoParams, float_like, 1, portable=True),
    op("SQRT", NoParams, float_like, 1, portable=True),
    op("LOG", NoParams, float_like, 1, portable=True),
    op("SIN", NoParams, float_like, 1, portable=True),
    op("COS", NoParams, float_like, 1, portable=True),
    op("SCALE", Scale, float_like, 1, portable=True),
    op("CLAMP", Clamp, float_like, 1, finite=False, portable=True),
    op("LEAKY_RELU", LeakyRelu, float_like, 1, portable=True),
    op("UNARY", Unary, _unary, 1, portable=True),
    op("GLU", Glu, _glu, 1, 2, finite=False),
    op("DIAG_MASK_INF", DiagMask, _diag_mask, 1),
    op("DIAG_MASK_ZERO", DiagMask, _diag_mask, 1),
    op("TIMESTEP_EMBEDDING", TimestepEmbedding, _timestep_embedding, 1, portable=True),
    op("ARANGE", Arange, _arange, 0),
    op("FILL", Fill, like(frozenset({"F32", "F16"})), 1, finite=False),
)
