"""Truth values: F32 zeros and ones."""

# ruff: noqa: ARG001  all rules are called alike, whether or not they need what they get

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..emitter import Emitter, Value
from .base import RULES, Operand, Out, number, rule, value


def truth(x: Value) -> Value:
    return Value(x.tensor, x.shape, "b")


def is_positive(e: Emitter, x: Value) -> Value:
    return truth(e.unary("STEP", x))


def negated(e: Emitter, x: Value) -> Value:
    return truth(e.scale(x, -1, 1))


def not_zero(e: Emitter, x: Value) -> Value:
    return is_positive(e, e.unary("ABS", x))


def boolean(e: Emitter, x: Operand) -> Value:
    operand = value(e, x)
    return operand if operand.kind == "b" else not_zero(e, operand)


def _minus(e: Emitter, out: Out, a: Operand, b: Operand) -> Value:
    difference: Value = RULES["sub"](e, Out(out.shape, "f"), a, b)
    return difference


_COMPARE: dict[str, Callable[[Emitter, Out, Operand, Operand], Value]] = {
    "gt": lambda e, out, a, b: is_positive(e, _minus(e, out, a, b)),
    "lt": lambda e, out, a, b: is_positive(e, _minus(e, out, b, a)),
    "le": lambda e, out, a, b: negated(e, is_positive(e, _minus(e, out, a, b))),
    "ge": lambda e, out, a, b: negated(e, is_positive(e, _minus(e, out, b, a))),
    "ne": lambda e, out, a, b: not_zero(e, _minus(e, out, a, b)),
    "eq": lambda e, out, a, b: negated(e, not_zero(e, _minus(e, out, a, b))),
}
RULES.update(_COMPARE)


@rule("logical_not", "bitwise_not")
def logical_not(e: Emitter, out: Out, x: Value) -> Value:
    return negated(e, boolean(e, x))


@rule("logical_and", "bitwise_and")
def logical_and(e: Emitter, out: Out, a: Value, b: Operand) -> Value:
    return truth(e.binary("MUL", boolean(e, a), boolean(e, b)))


@rule("logical_or", "bitwise_or")
def logical_or(e: Emitter, out: Out, a: Value, b: Operand) -> Value:
    return is_positive(e, e.binary("ADD", boolean(e, a), boolean(e, b)))


@rule("logical_xor", "bitwise_xor")
def logical_xor(e: Emitter, out: Out, a: Value, b: Operand) -> Value:
    return not_zero(e, e.binary("SUB", boolean(e, a), boolean(e, b)))


@rule("where")
def where(e: Emitter, out: Out, condition: Value, a: Operand, b: Operand) -> Value:
    """c·a + (1 - c)·b, with infinities as large numbers."""
    condition = boolean(e, condition)
    chosen = e.binary("MUL", _finite(e, a), condition)
    other = e.binary("MUL", _finite(e, b), negated(e, condition))
    return e.expand(e.binary("ADD", chosen, other), out.shape)


@rule("maximum")
def maximum(e: Emitter, out: Out, a: Value, b: Value) -> Value:
    """One of the two, to the last digit: of a bound that is known what lies below it is cut off."""
    for x, other in ((a, b), (b, a)):
        known = number(other)
        if known is not None and x.shape == out.shape:
            return RULES["clamp"](e, out, x, known, None)  # type: ignore[no-any-return]
    return where(e, out, RULES["gt"](e, out, a, b), a, b)


@rule("minimum")
def minimum(e: Emitter, out: Out, a: Value, b: Value) -> Value:
    for x, other in ((a, b), (b, a)):
        known = number(other)
        if known is not None and x.shape == out.shape:
            return RULES["clamp"](e, out, x, None, known)  # type: ignore[no-any-return]
    return where(e, out, RULES["lt"](e, out, a, b), a, b)


@rule("masked_fill")
def masked_fill(e: Emitter, out: Out, x: Value, mask: Value, number: Operand) -> Value:
    return where(e, out, mask, number, x)


LARGEST = float(np.finfo(np.float32).max)


def _finite(e: Emitter, operand: Operand) -> Value:
    """An operand without infinities, of which nothing times zero is zero."""
    given = value(e, operand)
    if given.kind != "f" or (given.array is not None and np.isfinite(given.array).all()):
        return given
    if given.array is not None:
        return e.constant(np.nan_to_num(given.array.astype(np.float32)), "f")
    bounded: Value = RULES["clamp"](e, Out(given.shape, "f"), given, -LARGEST, LARGEST)
    return bounded
