"""Each element by itself: unary and gated units, arithmetic, scales, masks; and numbers out of nothing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.interop.cases.base import BROADCASTS, F32, ODD, SMALL, Case, shape
from tests.support import ggml

TABLED = {"GELU", "GELU_QUICK"}  # ggml's CPU looks these up by f16


def _unary() -> Iterator[Case]:
    for number, op in enumerate(ggml.UNARY):
        if op == "XIELU":
            continue
        bound = "f16" if op in TABLED else "f32"
        for kind in ("F32", "F16"):
            yield Case(
                "UNARY",
                f"{op}-{kind}",
                lambda b, n=number, t=kind: b.unary(b.x(*ODD, type=t, low=-6, high=6), n),
                bound,
            )
        yield Case("UNARY", f"{op}-view", lambda b, n=number: b.unary(b.part(*SMALL, low=-3, high=3), n), bound)
        yield Case("UNARY", f"{op}-inplace", lambda b, n=number: b.unary_inplace(b.x(*SMALL, low=-3, high=3), n), bound)
    number = ggml.UNARY.index("ROUND")
    yield Case("UNARY", "ROUND-halves", lambda b: b.unary(b.put("F32", np.arange(-8, 8)[None] / 2), number), "exact")
    for op in ("sqr", "sqrt", "log", "sin", "cos"):
        for suffix in ("", "_inplace"):
            call = op + suffix
            yield Case(op.upper(), f"F32{suffix}", lambda b, c=call: getattr(b, c)(b.x(*ODD, low=0.01, high=9)))
        yield Case(op.upper(), "F16", lambda b, c=op: getattr(b, c)(b.x(*ODD, type="F16", low=0.01, high=9)))
        yield Case(op.upper(), "view", lambda b, c=op: getattr(b, c)(b.part(*ODD, low=0.01, high=9)))
    yield Case("LEAKY_RELU", "F32", lambda b: b.leaky_relu(b.x(*ODD), 0.1, False))
    yield Case("LEAKY_RELU", "inplace", lambda b: b.leaky_relu(b.x(*ODD), -0.3, True))
    yield Case("SCALE", "F32", lambda b: b.scale(b.x(*ODD), 2.5))
    yield Case("SCALE", "inplace", lambda b: b.scale_inplace(b.x(*ODD), -0.125))
    yield Case("SCALE", "bias", lambda b: b.scale_bias(b.x(*ODD), 0.5, 3.0))
    yield Case("SCALE", "bias-inplace", lambda b: b.scale_bias_inplace(b.x(*ODD), 0.0, -1.5))
    yield Case("CLAMP", "F32", lambda b: b.clamp(b.x(*ODD), -0.5, 0.25))
    yield Case("CLAMP", "F16", lambda b: b.clamp(b.x(*ODD, type="F16"), -0.5, 0.25))
    yield Case("CLAMP", "inplace", lambda b: b.clamp_inplace(b.x(*ODD), 0.0, float("inf")))
    yield Case("FILL", "F32", lambda b: b.fill(b.x(*ODD), -3.25))
    yield Case("FILL", "F16", lambda b: b.fill(b.x(*ODD, type="F16"), 1.5))
    yield Case("FILL", "inf", lambda b: b.fill_inplace(b.x(*ODD), float("-inf")))


def _binary() -> Iterator[Case]:
    for op in ("add", "sub", "mul", "div"):
        low = 0.5 if op == "div" else -1.0
        for large, small in BROADCASTS:
            label = f"{shape(*large)}-{shape(*small)}"
            yield Case(
                op.upper(), label, lambda b, c=op, m=large, n=small, v=low: getattr(b, c)(b.x(*m), b.x(*n, low=v))
            )
        for types in (("F16", "F16"), ("F16", "F32"), ("BF16", "BF16"), ("BF16", "F32")):
            label = "-".join(types)
            yield Case(op.upper(), label, lambda b, c=op, t=types, v=low: getattr(b, c)(
                b.x(*ODD, type=t[0]), b.x(33, 7, type=t[1], low=v)), "bf16" if "BF16" in types else "f16")  # fmt: skip
        yield Case(op.upper(), "inplace", lambda b, c=op, v=low: getattr(b, f"{c}_inplace")(b.x(*ODD), b.x(33, low=v)))
        yield Case(op.upper(), "views", lambda b, c=op, v=low: getattr(b, c)(b.part(*ODD), b.part(*ODD, low=v)))
        yield Case(op.upper(), "permuted", lambda b, c=op, v=low: getattr(b, c)(
            b.shuffled(*ODD, axes=(0, 2, 1, 3)), b.shuffled(*ODD, axes=(0, 3, 1, 2), low=v)))  # fmt: skip
        yield Case(op.upper(), "transposed", lambda b, c=op, v=low: getattr(b, c)(
            b.x(*ODD), b.shuffled(*ODD, axes=(1, 0, 2, 3), low=v)))  # fmt: skip
        yield Case(op.upper(), "itself", lambda b, c=op: (lambda x: getattr(b, c)(x, x))(b.x(*ODD, low=0.5)))
    yield Case("ADD", "cast", lambda b: b.add_cast(b.x(64, 5, type="F16"), b.x(64, 5), F32))


def _glu() -> Iterator[Case]:
    for number, op in enumerate(ggml.GLU):
        bound = "f16" if op in ("GEGLU", "GEGLU_QUICK") else "f32"
        if op == "SWIGLU_OAI":
            yield Case(
                "GLU", op, lambda b: b.swiglu_oai(b.x(*ODD, low=-9, high=9), b.x(*ODD, low=-9, high=9), 1.702, 7.0)
            )
            continue
        if op == "SWIGLU_CLAMP":
            yield Case("GLU", op, lambda b: b.swiglu_clamp(b.x(*ODD, low=-9, high=9), b.x(*ODD, low=-9, high=9), 4.0))
            continue
        for swapped, kind in ((False, "F32"), (True, "F32"), (False, "F16")):
            label = f"{op}-{kind}{'-swapped' if swapped else ''}"
            yield Case(
                "GLU",
                label,
                lambda b, n=number, s=swapped, t=kind: b.glu(b.x(*SMALL, type=t, low=-3, high=3), n, s),
                bound,
            )
        yield Case("GLU", f"{op}-split", lambda b, n=number: b.glu_split(b.x(*ODD), b.x(*ODD), n), bound)
        yield Case("GLU", f"{op}-view", lambda b, n=number: b.glu(b.part(*SMALL, margin=(4, 0, 0, 0)), n, False), bound)


CASES = [*_unary(), *_binary(), *_glu()]
