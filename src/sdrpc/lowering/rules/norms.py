"""Normalization by mean and variance, over rows, groups of channels, or with statistics from training."""

# ruff: noqa: ARG001  all rules are called alike, whether or not they need what they get

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from ...errors import CaptureError
from ...ggml.params import Eps, GroupNorm
from ..emitter import Emitter, Value
from .base import RULES, Out, rule

EPSILON = 2.0**-23
"""What torch's rms_norm adds where nothing is given: float32's epsilon."""


def scaled(e: Emitter, x: Value, weight: Value | None, bias: Value | None) -> Value:
    """``x * weight + bias``, each where it is given."""
    x = e.binary("MUL", x, weight) if weight is not None else x
    return e.binary("ADD", x, bias) if bias is not None else x


@rule("layer_norm")
def layer_norm(
    e: Emitter, out: Out, x: Value, normalized_shape: Sequence[int], weight: Value | None = None,
    bias: Value | None = None, eps: float = 1e-5, *_: Any,
) -> Value:  # fmt: skip
    return _norm_rows(e, "NORM", x, normalized_shape, weight, bias, eps)


@rule("rms_norm")
def rms_norm(
    e: Emitter, out: Out, x: Value, normalized_shape: Sequence[int], weight: Value | None = None,
    eps: float | None = None,
) -> Value:  # fmt: skip
    return _norm_rows(e, "RMS_NORM", x, normalized_shape, weight, None, EPSILON if eps is None else eps)


def _norm_rows(
    e: Emitter, op: str, x: Value, shape: Sequence[int], weight: Value | None, bias: Value | None, eps: float
) -> Value:
    rank = len(x.shape) - len(shape)
    flat = x if len(shape) == 1 else e.reshape(x, (*x.shape[:rank], prod(shape)))
    rows = e.contiguous(e.f32(flat))
    normal = Value(e.node(op, rows.tensor, params=Eps(eps)), rows.shape)
    return scaled(e, e.reshape(normal, x.shape), weight, bias)


@rule("group_norm")
def group_norm(
    e: Emitter, out: Out, x: Value, num_groups: int, weight: Value | None = None, bias: Value | None = None,
    eps: float = 1e-5, *_: Any,
) -> Value:  # fmt: skip
    """x [batch, channels, …]."""
    batch, channels, *space = x.shape
    image = e.reshape(x, x.shape if len(space) == 2 else (batch, channels, 1, prod(space)))
    image = e.contiguous(e.f32(image))
    normal = Value(e.node("GROUP_NORM", image.tensor, params=GroupNorm(num_groups, eps)), image.shape)
    weight, bias = (None if v is None else e.reshape(v, (channels, 1, 1)) for v in (weight, bias))
    return e.reshape(scaled(e, normal, weight, bias), x.shape)


@rule("batch_norm")
def batch_norm(
    e: Emitter, out: Out, x: Value, weight: Value | None, bias: Value | None, mean: Value | None, var: Value | None,
    training: bool, momentum: float, eps: float, *_: Any,
) -> Value:  # fmt: skip
    """In evaluation: the running statistics."""
    if training or mean is None or var is None:
        raise CaptureError("batch_norm in training: call eval() on the module")
    shape = (x.shape[1], *([1] * (len(x.shape) - 2)))
    weight, bias = (None if v is None else e.reshape(v, shape) for v in (weight, bias))
    deviation = e.unary("SQRT", e.scale(e.reshape(var, shape), 1, eps))
    normal = e.binary("DIV", e.binary("SUB", x, e.reshape(mean, shape)), deviation)
    return scaled(e, normal, weight, bias)


@rule("_weight_norm_interface")
def weight_norm(e: Emitter, out: Out, v: Value, g: Value, dim: int = 0) -> tuple[Value, Value]:
    """g · v / |v|, and |v|: a norm for each index of ``dim``."""
    v = e.f32(v)
    others = [d for d in range(len(v.shape)) if d != dim]
    norms = e.unary("SQRT", RULES["sum"](e, Out(g.shape, "f"), e.unary("SQR", v), others, True))
    return e.binary("MUL", v, e.binary("DIV", g, norms)), norms
