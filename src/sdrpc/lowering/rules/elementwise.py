"""Functions of each element by itself, and arithmetic with broadcasting."""

# ruff: noqa: ARG001, ARG005  all rules are called alike, whether or not they need what they get

from __future__ import annotations

import math

import numpy as np

from ...errors import CaptureError
from ...ggml.params import Clamp, LeakyRelu
from ..emitter import Emitter, Value
from .base import RULES, Number, Operand, Out, Rule, number, rule, value

_UNARY = {
    "silu": "SILU", "relu": "RELU", "sigmoid": "SIGMOID", "tanh": "TANH", "exp": "EXP", "abs": "ABS", "neg": "NEG",
    "sign": "SGN", "sin": "SIN", "cos": "COS", "sqrt": "SQRT", "log": "LOG", "hardswish": "HARDSWISH",
    "hardsigmoid": "HARDSIGMOID",
}  # fmt: skip
"""ATen's functions of one tensor that ggml has under another name."""


def _unary(op: str) -> Rule:
    return lambda e, out, x: e.unary(op, x)


RULES.update({name: _unary(op) for name, op in _UNARY.items()})


@rule("gelu")
def gelu(e: Emitter, out: Out, x: Value, *, approximate: str = "none") -> Value:
    return e.unary("GELU" if approximate == "tanh" else "GELU_ERF", x)


@rule("leaky_relu")
def leaky_relu(e: Emitter, out: Out, x: Value, negative_slope: float = 0.01) -> Value:
    return Value(e.node("LEAKY_RELU", e.contiguous(e.f32(x)).tensor, params=LeakyRelu(negative_slope)), x.shape)


@rule("_prelu_kernel")
def prelu(e: Emitter, out: Out, x: Value, slopes: Value) -> Value:
    """max(x, 0) + slope · min(x, 0)."""
    above = e.unary("RELU", x)
    return e.binary("ADD", above, e.binary("MUL", e.binary("SUB", x, above), slopes))


@rule("softplus")
def softplus(e: Emitter, out: Out, x: Value, beta: Number = 1, threshold: Number = 20) -> Value:
    """log(1 + exp(βx)) / β, and x itself beyond the threshold, as torch has it."""
    scaled = e.scale(e.f32(x), beta)
    below = e.unary("LOG", e.scale(e.unary("EXP", clamp(e, out, scaled, None, threshold)), 1, 1))
    above = clamp(e, out, e.scale(scaled, 1, -threshold), 0, None)
    return e.scale(e.binary("ADD", below, above), 1 / beta)


@rule("mish")
def mish(e: Emitter, out: Out, x: Value) -> Value:
    return e.binary("MUL", x, e.unary("TANH", softplus(e, out, x)))


@rule("clamp", "clamp_min", "hardtanh")
def clamp(e: Emitter, out: Out, x: Value, min: Number | None = None, max: Number | None = None) -> Value:
    if isinstance(min, Value) or isinstance(max, Value):
        raise CaptureError("bounds that are tensors")
    bounds = Clamp(-math.inf if min is None else float(min), math.inf if max is None else float(max))
    return Value(e.node("CLAMP", e.contiguous(e.f32(x)).tensor, params=bounds), x.shape, x.kind)


@rule("clamp_max")
def clamp_max(e: Emitter, out: Out, x: Value, max: Number) -> Value:
    return clamp(e, out, x, None, max)


@rule("add")
def add(e: Emitter, out: Out, a: Operand, b: Operand, *, alpha: Number = 1) -> Value:
    for x, other in ((a, b), (b, a)):
        known = number(other)
        if known is not None and isinstance(x, Value) and x.shape == out.shape:
            return e.scale(x, 1 if other is b else alpha, known * (alpha if other is b else 1))
    return e.binary("ADD", value(e, a), e.scale(value(e, b), alpha))


@rule("sub")
def sub(e: Emitter, out: Out, a: Operand, b: Operand, *, alpha: Number = 1) -> Value:
    if alpha != 1 or number(a) is not None or number(b) is not None:
        return add(e, out, a, b, alpha=-alpha)
    return e.binary("SUB", value(e, a), value(e, b))


@rule("rsub")
def rsub(e: Emitter, out: Out, a: Operand, b: Operand, alpha: Number = 1) -> Value:
    return sub(e, out, b, a, alpha=alpha)


@rule("mul")
def mul(e: Emitter, out: Out, a: Operand, b: Operand) -> Value:
    for x, other in ((a, b), (b, a)):
        known = number(other)
        if known is not None and isinstance(x, Value) and x.shape == out.shape:
            return e.scale(x, known)
    return e.binary("MUL", value(e, a), value(e, b))


@rule("div")
def div(e: Emitter, out: Out, a: Operand, b: Operand, *, rounding_mode: str | None = None) -> Value:
    if rounding_mode is not None:
        raise CaptureError(f"division rounded to {rounding_mode}")
    known = number(b)
    if known and isinstance(a, Value) and a.shape == out.shape:
        return e.scale(e.f32(a), 1 / known)
    return e.binary("DIV", value(e, a), value(e, b))


@rule("addcmul")
def addcmul(e: Emitter, out: Out, x: Value, a: Value, b: Value, *, value: Number = 1) -> Value:
    return e.binary("ADD", x, e.scale(e.binary("MUL", a, b), value))


@rule("addcdiv")
def addcdiv(e: Emitter, out: Out, x: Value, a: Value, b: Value, *, value: Number = 1) -> Value:
    return e.binary("ADD", x, e.scale(e.binary("DIV", a, b), value))


@rule("reciprocal")
def reciprocal(e: Emitter, out: Out, x: Value) -> Value:
    return e.binary("DIV", e.constant(np.ones(1, np.float32)), x)


@rule("rsqrt")
def rsqrt(e: Emitter, out: Out, x: Value) -> Value:
    return reciprocal(e, out, e.unary("SQRT", x))


@rule("pow")
def power(e: Emitter, out: Out, x: Operand, exponent: Operand) -> Value:
    """Whole and half exponents by products and roots, a constant base by the exponential."""
    known, base = number(exponent), number(x)
    if known is None and base is not None and base > 0 and isinstance(exponent, Value):
        return e.unary("EXP", e.scale(e.f32(exponent), math.log(base)))
    if known is None or not isinstance(x, Value) or abs(known) > 16 or known * 2 != int(known * 2):
        raise CaptureError(f"power {known}")
    if known < 0:
        return reciprocal(e, out, power(e, out, x, -known))
    result = e.unary("SQRT", x) if known % 1 else None
    for _ in range(int(known)):
        result = x if result is None else e.unary("SQR", x) if result is x else e.binary("MUL", result, x)
    return e.f32(result) if result is not None else e.scale(x, 0, 1)
