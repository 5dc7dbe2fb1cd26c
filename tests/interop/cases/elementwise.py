"""Each element by itself: unary and gated units, arithmetic, scales, masks; and numbers out of nothing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from tests.interop.cases.base import (
    ANY_VIEW,
    BROADCASTS,
    F32,
    FLOATS,
    ODD,
    PACKED,
    QUANTIZED,
    ROWS_DENSE,
    SMALL,
    WRITTEN,
    Builder,
    Case,
    draws,
    shapes,
    sweep,
    uniform,
)
from tests.support import ggml

TABLED = {"GELU", "GELU_QUICK", "GEGLU", "GEGLU_QUICK"}  # ggml's CPU looks these up by f16
ARITHMETIC = ("add", "sub", "mul", "div")
FUNCTIONS = ("sqr", "sqrt", "log", "sin", "cos")
ALIKE = (("F32", "F32"), ("F16", "F16"), ("BF16", "BF16"))
MIXED = (*ALIKE, ("F16", "F32"), ("BF16", "F32"))


def _tabled(op: str, **_: Any) -> str:
    return "f16" if op in TABLED else "f32"


def _unit(b: Builder, op: str, type: str, view: str, inplace: bool = False) -> Any:
    x = b.operand(*ODD, view=view, type=type, low=-6, high=6)
    return (b.unary_inplace if inplace else b.unary)(x, ggml.UNARY.index(op))


def _exactly(op: str, at: float) -> bool:
    """Where ggml's CPU has digits: its tables end with f16's range, and it says exp(x) - 1 for EXPM1."""
    return 1e-3 <= at < 65504 if op in TABLED else at > 1e-6 if op == "EXPM1" else True


def _extreme(b: Builder, op: str, at: float) -> Any:
    """Where functions vanish, lose digits or overflow."""
    return b.unary(b.put("F32", np.linspace(-at, at, 32)[None]), ggml.UNARY.index(op))


def _xielu(b: Builder, params: tuple[float, ...], type: str, view: str) -> Any:
    return b.xielu(b.operand(*ODD, view=view, type=type, low=-6, high=6), *params)


def _function(b: Builder, op: str, type: str, view: str, inplace: bool) -> Any:
    return getattr(b, f"{op}_inplace" if inplace else op)(b.operand(*ODD, view=view, type=type, low=0.01, high=9))


def _unary() -> Iterator[Case]:
    units = tuple(op for op in ggml.UNARY if op != "XIELU")
    yield from sweep("UNARY", _unit, _tabled, op=units, type=FLOATS, view=ROWS_DENSE)
    yield from sweep("UNARY", _unit, _tabled, op=units, type=("F32", "F16"), view=("dense", "part"), inplace=(True,))
    params = ((0.8, 0.8, 0.5, -1e-6), (-0.5, 1.5, 0.25, -0.125))
    yield from sweep(
        "UNARY", lambda b, op, **how: _xielu(b, **how), op=("XIELU",), params=params, type=FLOATS, view=PACKED
    )
    number = ggml.UNARY.index("ROUND")
    yield Case("UNARY", "ROUND-halves", lambda b: b.unary(b.put("F32", np.arange(-8, 8)[None] / 2), number), "exact")
    yield from sweep("UNARY", _extreme, _tabled, _exactly, op=units, at=(1e-6, 1e-3, 30.0, 80.0, 120.0, 1e5, 1e30))
    for op in FUNCTIONS:
        yield from sweep(op.upper(), _function, op=(op,), type=FLOATS, view=ROWS_DENSE, inplace=(False, True))


def _scaled(b: Builder, by: tuple[float, float], type: str, view: str, inplace: bool) -> Any:
    return (b.scale_bias_inplace if inplace else b.scale_bias)(b.operand(*ODD, view=view, type=type), *by)


def _clamped(b: Builder, to: tuple[float, float], type: str, view: str, inplace: bool) -> Any:
    return (b.clamp_inplace if inplace else b.clamp)(b.operand(*ODD, view=view, type=type), *to)


def _leaky(b: Builder, slope: float, type: str, view: str, inplace: bool) -> Any:
    return b.leaky_relu(b.operand(*ODD, view=view, type=type), slope, inplace)


def _filled(b: Builder, value: float, type: str, ne: tuple[int, ...], inplace: bool) -> Any:
    return (b.fill_inplace if inplace else b.fill)(b.x(*ne, type=type), value)


def _one_more(
    b: Builder, types: tuple[str, str], view: str, inplace: bool, ne: tuple[int, ...] = ODD
) -> Any:  # fmt: skip
    return (b.add1_inplace if inplace else b.add1)(b.operand(*ne, view=view, type=types[0]), b.x(1, type=types[1]))


def _scales() -> Iterator[Case]:
    both = {"inplace": (False, True)}
    by = ((2.5, 0.0), (-0.125, 0.0), (0.5, 3.0), (0.0, -1.5))
    yield from sweep("SCALE", _scaled, by=by, type=("F32", "BF16"), view=("dense", "offset"), **both)
    yield from sweep("LEAKY_RELU", _leaky, slope=(0.1, -0.3, 0.0), type=("F32", "F16"), view=PACKED, **both)
    to = ((-0.5, 0.25), (0.0, float("inf")), (float("-inf"), -0.1), (0.5, 0.5))
    yield from sweep("CLAMP", _clamped, "exact", to=to, type=("F32", "F16"), view=PACKED, **both)
    values, shapes = (-3.25, 1.5, 0.0, float("-inf")), (ODD, SMALL, (1, 1, 1, 1))
    yield from sweep("FILL", _filled, "exact", value=values, type=("F32", "F16"), ne=shapes, **both)
    yield from sweep("ADD1", _one_more, "exact", types=MIXED, view=PACKED, **both)


def _operation(b: Builder, op: str, shapes: Any, types: tuple[str, str], a: str = "dense", c: str = "dense") -> Any:
    first = b.operand(*shapes[0], view=a, type=types[0])
    return getattr(b, op)(first, b.operand(*shapes[1], view=c, type=types[1], low=0.5))


def _binary() -> Iterator[Case]:
    """Both sides compute in f32 and round once: to the bit the same."""
    for op in ARITHMETIC:
        exact = partial(sweep, op.upper(), _operation, "exact")
        yield from exact(op=(op,), shapes=BROADCASTS, types=MIXED)
        yield from exact(op=(f"{op}_inplace",), shapes=BROADCASTS[:4], types=MIXED)
        yield from exact(op=(op,), shapes=((ODD, ODD),), types=ALIKE[:2], a=ROWS_DENSE, c=ANY_VIEW, most=48)
        yield from exact(op=(op,), shapes=(((16, 6, 4, 2), (8, 3, 2, 1)),), types=MIXED, c=ANY_VIEW[1:], most=32)
        yield Case(op.upper(), "itself", lambda b, c=op: (lambda x: getattr(b, c)(x, x))(b.x(*ODD, low=0.5)))
    for kind in ("F16", "BF16", *QUANTIZED):
        yield Case("ADD", f"cast-{kind}", lambda b, t=kind: b.add_cast(b.x(256, 5, type=t), b.x(256, 5), F32))
    for kind in WRITTEN:
        yield Case("ADD", kind, lambda b, t=kind: b.add(b.x(256, 5, 3, 2, type=t), b.x(256, 5, 3, 2)), "quantized")
        yield Case("ADD1", kind, lambda b, t=kind: b.add1(b.x(256, 5, 3, type=t), b.x(1)), "quantized")


def _gated(b: Builder, op: str, type: str, view: str, swapped: bool) -> Any:
    x = b.operand(*SMALL, view=view, type=type, low=-3, high=3)
    return b.glu(x, ggml.GLU.index(op), swapped)


def _split(b: Builder, op: str, type: str, view: str, gate: str) -> Any:
    x, y = (b.operand(*ODD, view=v, type=type, low=-3, high=3) for v in (view, gate))
    return b.glu_split(x, y, ggml.GLU.index(op))


def _limited(b: Builder, op: str, type: str, view: str, split: bool, limits: tuple[float, ...]) -> Any:
    x = b.operand(*SMALL, view=view, type=type, low=-9, high=9)
    y = b.operand(*SMALL, view=view, type=type, low=-9, high=9) if split else None
    return getattr(b, op.lower())(x, y, *limits)


def _glu() -> Iterator[Case]:
    plain = tuple(op for op in ggml.GLU if op not in ("SWIGLU_OAI", "SWIGLU_CLAMP"))
    yield from sweep("GLU", _gated, _tabled, op=plain, type=FLOATS, view=PACKED, swapped=(False, True))
    yield from sweep("GLU", _split, _tabled, op=plain, type=FLOATS, view=PACKED, gate=PACKED)
    limits = ((1.702, 7.0), (1.0, 2.5))
    yield from sweep(
        "GLU", _limited, op=("SWIGLU_OAI",), type=("F32",), view=PACKED, split=(True, False), limits=limits
    )
    yield from sweep(
        "GLU",
        _limited,
        op=("SWIGLU_CLAMP",),
        type=("F32", "F16"),
        view=PACKED,
        split=(True, False),
        limits=((4.0,), (1.5,)),
    )


def _masked(b: Builder, ne: tuple[int, ...], past: int, zero: bool, inplace: bool) -> Any:
    return getattr(b, f"diag_mask_{'zero' if zero else 'inf'}{'_inplace' if inplace else ''}")(b.x(*ne), past)


def _masks() -> Iterator[Case]:
    shapes = ((9, 9, 3, 2), (12, 7, 2), (7, 12), (1, 5), (33, 1))
    for zero, op in ((False, "DIAG_MASK_INF"), (True, "DIAG_MASK_ZERO")):
        yield from sweep(op, _masked, "exact", ne=shapes, past=(0, 1, 5, 40), zero=(zero,), inplace=(False, True))


def _range(b: Builder, of: tuple[float, float, float]) -> Any:
    return b.arange(*of)


def _embedded(b: Builder, n: int, dim: int, period: int) -> Any:
    return b.timestep_embedding(b.x(n, low=0, high=999), dim, period)


def _out_of_nothing() -> Iterator[Case]:
    yield from sweep(
        "ARANGE",
        _range,
        of=((0.0, 10.0, 1.0), (-1.5, 2.0, 0.3), (0.0, 1.0, 5.0), (3.0, 1000.0, 1.0), (0.25, 0.5, 0.01)),
    )
    yield from sweep("TIMESTEP_EMBEDDING", _embedded, n=(1, 5), dim=(1, 2, 16, 33, 320), period=(100, 10000))


CASES = [*_unary(), *_scales(), *_binary(), *_glu(), *_masks(), *_out_of_nothing()]


def _steps(rng: np.random.Generator) -> tuple[float, float, float]:
    start, length, step = rng.uniform(-9, 9), rng.uniform(0.1, 50), rng.uniform(0.1, 3)
    return float(start), float(start + length), float(step)


BOTH = (False, True)
DRAWN = {
    "FILL": draws(
        _filled, "exact", value=uniform(-9, 9), type=("F32", "F16"), ne=shapes(empty=True), inplace=BOTH
    ),
    "ADD1": draws(_one_more, "exact", types=MIXED, view=PACKED, inplace=BOTH, ne=shapes()),
    "ARANGE": draws(_range, of=_steps),
    "TIMESTEP_EMBEDDING": draws(_embedded, n=range(1, 9), dim=range(1, 330), period=range(2, 20000)),
}  # fmt: skip
