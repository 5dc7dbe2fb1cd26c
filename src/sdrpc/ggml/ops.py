"""ggml's operations: one table, :data:`OPS`, with a row for each that sdrpc knows.

A row (:class:`sdrpc.ggml.rules.base.Op`) says what an operation's parameters are, how many sources it takes, what type
and shape it gives, whose memory it writes, and who has it. Everything that handles graphs asks the table: the
decoder of the wire, the builders, :mod:`sdrpc.ggml.validate`, the engine's compiler and the lowering. What the engine
computes for each row stands in :data:`sdrpc.engine.ops.KERNELS`.

The rows stand by topic in :mod:`sdrpc.ggml.rules`; those in ``rules/language`` serve clients with language models only.
"""

from __future__ import annotations

import math

from ..errors import GraphError, UnsupportedOperation
from .params import NoParams, Params
from .rules import attention, copies, elementwise, images, products, rows
from .rules.base import Call, Op, Result, Sources
from .rules.language import deepseek, recurrent, training
from .tensor import Dims, Tensor
from .types import Type

TOPICS = (copies, elementwise, rows, attention, products, images, recurrent, deepseek, training)

OPS: dict[str, Op] = {op.name: op for topic in TOPICS for op in topic.OPS}
"""Every operation that sdrpc knows, by ggml's name. What is not here is unsupported."""

ALIASES = frozenset(op.name for op in OPS.values() if op.alias)
"""Operations that compute nothing: their tensor is another name for bytes that exist."""


def params_of(name: str) -> type[Params]:
    """The parameter class of the operation ``name``; :class:`NoParams` of one that is not known."""
    return OPS[name].params if name in OPS else NoParams


def destination(node: Tensor) -> Tensor | None:
    """The source over whose memory ``node``, of a known operation, writes its result by definition, if there is one."""
    writes = OPS[node.op].writes
    if writes is None or writes >= len(node.src) or not getattr(node.params, "inplace", True):
        return None
    return node.src[writes]


def infer(op: str, params: Params, src: Sources, type: Type | None = None, ne: Dims | None = None) -> Result:
    """Type and shape of ``op``'s result.

    ``type`` and ``ne`` are the declared ones: needed where an operation leaves them free (VIEW, RESHAPE, …), else
    compared with the result. Raises :class:`GraphError` for an invalid call and :class:`UnsupportedOperation` for a
    valid one that sdrpc does not compute.
    """
    row = OPS.get(op)
    if row is None:
        raise UnsupportedOperation("operation not supported")
    if params.__class__ is not row.params:
        raise GraphError(f"parameters of another operation: {params}")
    for value in params:
        if value.__class__ is float and not math.isfinite(value) and (row.finite or math.isnan(value)):
            raise GraphError(f"a parameter is {value}: {params}")
    while src and src[-1] is None:
        src = src[:-1]
    if not row.least <= len(src) <= row.most or None in src[: row.least]:
        raise GraphError(f"wrong number of sources: {sum(s is not None for s in src)}")
    result = row.infer(Call(params, src + (None,) * (row.most - len(src)), type, ne))
    if type is not None and type is not result.type and type != result.type:
        raise GraphError(f"declared as {type}, but the result is {result.type}")
    if ne is not None and ne != result.ne:
        raise GraphError(f"declared shape {list(ne)}, but the result is {list(result.ne)}")
    return result
