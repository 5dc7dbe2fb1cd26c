"""What each operation takes and gives: one table, ``RULES``.

A rule counts an operation's sources, checks their types and shapes and the parameters, and tells type and shape of the
result. Builders ask it for the result, the spec of foreign graphs compares the declared result with it. The facts are
those of ggml's constructors (ggml.c) and of its reference backend (ggml-cpu/ops.cpp); where ggml is lax and reads out
of bounds, a rule is strict. Strides, buffers and aliasing are :mod:`sdrpc.ggml.validate`'s
concern; only SET and ACC, whose strides are parameters, are checked here.
"""

from __future__ import annotations

import math

from ...errors import GraphError, UnsupportedOperation
from ..params import PARAMS, NoParams, Params
from ..tensor import Dims
from ..types import Type
from . import attention, copies, deepseek, elementwise, images, products, recurrent, rows, training
from .base import FLOATS, INDICES, PLAIN, READABLE, WRITABLE, Call, Result, Rule, Sources, injective
from .copies import permuted
from .elementwise import GLU_OPS, UNARY_OPS
from .images import MEAN_POOL, NEAREST

__all__ = [
    "FLOATS", "GLU_OPS", "INDICES", "MEAN_POOL", "NEAREST", "PLAIN", "READABLE", "RULES", "UNARY_OPS", "WRITABLE",
    "Call", "Result", "Rule", "infer", "injective", "permuted",
]  # fmt: skip

RULES: dict[str, Rule] = {
    name: rule
    for family in (copies, elementwise, rows, attention, products, images, recurrent, deepseek, training)
    for name, rule in family.RULES.items()
}
"""Every operation that sdrpc knows, by ggml's name. What is not here is unsupported."""


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
