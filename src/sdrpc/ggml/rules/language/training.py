"""What only training needs: gradients of other operations, losses and steps of optimizers."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from ...params import Eps, Im2Col, NoParams, Pool2D, Rope, SoftMax
from ...tensor import dims
from ...types import F32
from .. import attention
from ..base import Call, Op, Result, declared, need, op, repeats, support, typed
from ..images import pooled, window

_F32 = frozenset({"F32"})


def _alike(call: Call[object]) -> Result:
    """A gradient and what the operation was given (or gave), of one shape."""
    a, b = call.src
    typed(a, _F32)
    typed(b, _F32)
    need(a.ne == b.ne, "shapes {} and {}", a.ne, b.ne)
    return Result(F32, a.ne)


def _rms_norm_back(call: Call[Eps]) -> Result:
    need(call.params.eps >= 0, "eps {}", call.params.eps)
    return _alike(call)


def _soft_max_back(call: Call[SoftMax]) -> Result:
    support(call.params.max_bias == 0, "max_bias {}", call.params.max_bias)
    return _alike(call)


def _repeat_back(call: Call[NoParams]) -> Result:
    source = call.src[0]
    typed(source, _F32)
    ne = declared(call)
    need(repeats(ne, source.ne), "can't have repeated {} to {}", ne, source.ne)
    return Result(F32, ne)


def _get_rows_back(call: Call[NoParams]) -> Result:
    rows, numbers = call.src
    typed(rows, frozenset({"F32", "F16"}))
    typed(numbers, frozenset({"I32"}), "indices")
    ne = declared(call)
    n = numbers.ne  # the first so many rows are used: there may be more
    need(rows.ne[2:] == (1, 1) and n[0] <= rows.ne[1] and n[1:] == (1, 1, 1), "indices {} for {}", n, rows.ne)
    need(ne[0] == rows.ne[0] and ne[2:] == (1, 1), "rows {} into {}", rows.ne, ne)
    return Result(F32, ne)


def _cross_entropy_loss(call: Call[NoParams]) -> Result:
    _alike(call)
    return Result(F32, dims(1))


def _cross_entropy_loss_back(call: Call[NoParams]) -> Result:
    gradient, *both = call.src
    typed(gradient, _F32, "gradient")
    need(gradient.ne == dims(1), "gradient {} of one number", gradient.ne)
    return _alike(replace(call, src=tuple(both)))


def _sgd(call: Call[NoParams]) -> Result:
    *both, rates = call.src
    typed(rates, _F32, "rates")
    need(rates.ne == dims(2), "{} rates: there are two", rates.ne)
    return _alike(replace(call, src=tuple(both)))


def _adamw(call: Call[NoParams]) -> Result:
    *alike, params = call.src
    for each in alike:
        typed(each, _F32)
        need(each.ne == alike[0].ne, "shapes {} and {}", alike[0].ne, each.ne)
    for moment in alike[2:]:  # ggml goes through them as through the first operand, whatever their strides are
        need(moment.contiguous, "moments with strides {} are not contiguous", moment.nb)
    typed(params, _F32, "parameters")
    need(prod(params.ne) == 7, "{} parameters: there are seven", params.ne)
    return Result(F32, alike[0].ne)


def _im2col_back(call: Call[Im2Col]) -> Result:
    gradient, kernel = call.src
    typed(gradient, _F32)
    p, ne, k = call.params, declared(call), kernel.ne
    need(p.is_2d in (0, 1), "is_2d {}", p.is_2d)
    width = window(ne[0], k[0], p.s0, p.p0, p.d0)
    if p.is_2d:
        height = window(ne[1], k[1], p.s1, p.p1, p.d1)
        columns = (k[0] * k[1] * ne[2], width, height, ne[3])
    else:
        need(ne[3] == 1, "an image {}", ne)
        columns = (k[0] * ne[1], width, ne[2], 1)
    need(gradient.ne == columns, "columns {} of an image {}: {} are needed", gradient.ne, ne, columns)
    return Result(F32, ne)


def _pool_2d_back(call: Call[Pool2D]) -> Result:
    gradient, image = call.src
    p, x = call.params, image.ne
    typed(gradient, _F32)
    typed(image, _F32)
    ne = (pooled(x[0], p.op, p.k0, p.s0, p.p0), pooled(x[1], p.op, p.k1, p.s1, p.p1), *x[2:])
    need(gradient.ne == ne, "gradient {} of {} pooled to {}", gradient.ne, x, ne)
    return Result(F32, x)


OPS: tuple[Op, ...] = (
    op("SILU_BACK", NoParams, _alike, 2),
    op("RMS_NORM_BACK", Eps, _rms_norm_back, 2),
    op("SOFT_MAX_BACK", SoftMax, _soft_max_back, 2),
    op("ROPE_BACK", Rope, attention.rope, 2, 3),
    op("REPEAT_BACK", NoParams, _repeat_back, 1),
    op("GET_ROWS_BACK", NoParams, _get_rows_back, 2),
    op("CROSS_ENTROPY_LOSS", NoParams, _cross_entropy_loss, 2),
    op("CROSS_ENTROPY_LOSS_BACK", NoParams, _cross_entropy_loss_back, 3),
    op("OPT_STEP_SGD", NoParams, _sgd, 3),
    op("OPT_STEP_ADAMW", NoParams, _adamw, 5, writes=0, updates=(2, 3)),
    op("IM2COL_BACK", Im2Col, _im2col_back, 2),
    op("POOL_2D_BACK", Pool2D, _pool_2d_back, 2),
)
