"""Complex numbers as pairs of real values: what rotary embeddings need of them."""

# ruff: noqa: ARG001  all rules are called alike, whether or not they need what they get

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ...errors import CaptureError
from ..emitter import Complex, Emitter, Value
from .base import RULES, Out, Rule, filled, rule, value
from .fourier import fft

BY_PARTS = frozenset({
    "alias", "detach", "lift_fresh_copy", "clone", "_to_copy", "copy", "view", "_unsafe_view", "unsqueeze", "squeeze",
    "permute", "transpose", "t", "expand", "repeat", "slice", "select", "split", "split_with_sizes", "unbind", "cat",
    "stack", "slice_scatter", "select_scatter", "index", "index_select", "neg", "roll",
})  # fmt: skip
"""Operations that treat the real and the imaginary parts alike and apart."""

_PICKS = frozenset({"index", "index_select"})
"""Those among them whose other operands are no numbers to compute with."""


def has_complex(arguments: Any) -> bool:
    found: list[bool] = []
    fx.node.map_aggregate(arguments, lambda value: found.append(isinstance(value, Complex)))
    return any(found)


def complex_rule(name: str) -> Rule:
    """The rule of an operation some of whose operands are complex. Raises :class:`CaptureError` if there is none."""
    if name in COMPLEX_RULES:
        return COMPLEX_RULES[name]
    if name not in BY_PARTS:
        raise CaptureError("complex numbers")
    return lambda e, out, *args, **kwargs: _by_parts(name, e, out, args, kwargs)


def _by_parts(name: str, e: Emitter, out: Out, args: Any, kwargs: Any) -> Any:
    def imaginary_part(v: Any) -> Any:
        if isinstance(v, Complex):
            return v.imaginary
        return filled(e, Out(v.shape, "f"), 0) if isinstance(v, Value) and name not in _PICKS else v

    def part(choose: Callable[[Any], Any]) -> Any:
        given: Any = fx.node.map_aggregate((args, kwargs), choose)
        return RULES[name](e, Out(out.shape, "f"), *given[0], **given[1])

    real, imaginary = part(lambda v: v.real if isinstance(v, Complex) else v), part(imaginary_part)
    if isinstance(real, tuple):
        return tuple(map(Complex, real, imaginary))
    return Complex(real, imaginary)


def _product(e: Emitter, out: Out, a: Any, b: Any) -> Complex:
    def times(x: Any, y: Any) -> Value:
        result: Value = RULES["mul"](e, Out(out.shape, "f"), x, y)
        return result

    if not isinstance(a, Complex):
        return Complex(times(a, b.real), times(a, b.imaginary))
    if not isinstance(b, Complex):
        return Complex(times(a.real, b), times(a.imaginary, b))
    return Complex(
        e.binary("SUB", times(a.real, b.real), times(a.imaginary, b.imaginary)),
        e.binary("ADD", times(a.real, b.imaginary), times(a.imaginary, b.real)),
    )


def _as_real(e: Emitter, out: Out, x: Complex) -> Value:
    pairs = [e.reshape(part, (*x.shape, 1)) for part in (x.real, x.imaginary)]
    return e.concat(pairs, len(x.shape))


def _sum(name: str) -> Rule:
    def parts(e: Emitter, operand: Any) -> Complex:
        return operand if isinstance(operand, Complex) else Complex(value(e, operand), filled(e, Out((), "f"), 0))

    def rule(e: Emitter, out: Out, a: Any, b: Any, **kwargs: Any) -> Complex:
        a, b, real = parts(e, a), parts(e, b), Out(out.shape, "f")
        return Complex(
            RULES[name](e, real, a.real, b.real, **kwargs), RULES[name](e, real, a.imaginary, b.imaginary, **kwargs)
        )

    return rule


COMPLEX_RULES: dict[str, Rule] = {
    "add": _sum("add"), "sub": _sum("sub"), "mul": _product, "view_as_real": _as_real,
    "_fft_c2c": fft,
}  # fmt: skip
"""Rules of operations on complex operands, beside :data:`BY_PARTS`."""


@rule("view_as_complex")
def as_complex(e: Emitter, out: Out, x: Value) -> Complex:
    """[…, 2] → […]."""
    last = len(x.shape) - 1
    real, imaginary = (e.reshape(e.slice(x, last, i, 1), x.shape[:-1]) for i in (0, 1))
    return Complex(real, imaginary)


@rule("polar")
def polar(e: Emitter, out: Out, abs: Value, angle: Value) -> Complex:
    return Complex(e.binary("MUL", abs, e.unary("COS", angle)), e.binary("MUL", abs, e.unary("SIN", angle)))


@rule("complex")
def complex_of(e: Emitter, out: Out, real: Value, imag: Value) -> Complex:
    return Complex(e.f32(real), e.f32(imag))
