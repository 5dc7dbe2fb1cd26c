"""Each element by itself: unary and gated units, arithmetic, scales, masks; and numbers out of nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import shape_of
from ..values import Value
from .base import Raise, repeat_to

GELU_QUICK = 1.702


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Raise:
    def apply(v: Value, a: Tensor, b: Tensor) -> Tensor:
        return function(a, b if b.shape == a.shape else repeat_to(b, v.ne))

    return apply


def _each(function: Callable[[Tensor], Tensor]) -> Raise:
    return lambda _v, x: function(x)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_quick(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x)"""
    return x * torch.sigmoid(GELU_QUICK * x)


def _round(x: Tensor) -> Tensor:
    """C's roundf: halves away from zero."""
    return torch.trunc(x + torch.copysign(torch.full_like(x, 0.5), x))


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "ABS": torch.abs, "SGN": torch.sign, "NEG": torch.neg, "STEP": lambda x: (x > 0).to(x.dtype), "TANH": torch.tanh,
    "ELU": F.elu, "RELU": F.relu, "SIGMOID": torch.sigmoid, "GELU": gelu, "GELU_QUICK": gelu_quick, "SILU": F.silu,
    "HARDSWISH": F.hardswish, "HARDSIGMOID": F.hardsigmoid, "EXP": torch.exp, "EXPM1": torch.expm1,
    "SOFTPLUS": F.softplus, "GELU_ERF": F.gelu, "FLOOR": torch.floor, "CEIL": torch.ceil, "ROUND": _round,
    "TRUNC": torch.trunc,
}  # fmt: skip


def _xielu(v: Value, x: Tensor) -> Tensor:
    """https://arxiv.org/abs/2411.13010; the alphas are those of its two halves, softplus and beta already in them."""
    p: Any = v.params
    falling = (torch.expm1(x.clamp(max=p.eps)) - x) * p.alpha_n
    return torch.where(x > 0, x * x * p.alpha_p, falling) + x * float(p.beta)


def _unary(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    return _xielu(v, x) if p.op == "XIELU" else UNARY[p.op](x)


def _swiglu_oai(p: Any, x: Tensor, gate: Tensor) -> Tensor:
    x = x.clamp(max=p.limit)
    return x * torch.sigmoid(p.alpha * x) * (gate.clamp(-p.limit, p.limit) + 1)


GLU: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "REGLU": lambda _p, x, gate: F.relu(x) * gate,
    "GEGLU": lambda _p, x, gate: gelu(x) * gate,
    "SWIGLU": lambda _p, x, gate: F.silu(x) * gate,
    "SWIGLU_OAI": _swiglu_oai,
    "GEGLU_ERF": lambda _p, x, gate: F.gelu(x) * gate,
    "GEGLU_QUICK": lambda _p, x, gate: gelu_quick(x) * gate,
    "SWIGLU_CLAMP": lambda p, x, gate: F.silu(x.clamp(max=p.limit)) * gate.clamp(-p.limit, p.limit),
}


def _glu(v: Value, a: Tensor, b: Tensor | None = None) -> Tensor:
    p: Any = v.params
    if b is None:
        a, b = a.chunk(2, dim=-1)
        if p.swapped:
            a, b = b, a
    return GLU[p.op](p, a, b)


def _scale(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    scaled: Tensor = x * float(p.scale)
    return scaled.add_(float(p.bias)) if p.bias else scaled


def _clamp(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    return x.clamp(p.min, p.max)


def _leaky_relu(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    return F.leaky_relu(x, p.slope)


def _fill(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    return torch.full_like(x, p.value)


def _arange(v: Value, device: torch.device) -> Tensor:
    p: Any = v.params
    numbers = torch.arange(v.ne[0], device=device, dtype=torch.float32)
    return (numbers * float(p.step) + float(p.start)).reshape(shape_of(v.ne))


def _diag_mask(fill: float) -> Raise:
    def apply(v: Value, x: Tensor) -> Tensor:
        p: Any = v.params
        above = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(p.n_past + 1)
        return x.masked_fill(above, fill)

    return apply


def _timestep_embedding(v: Value, steps_: Tensor) -> Tensor:
    """cos and sin of t · max_period^(-j / half)."""
    p: Any = v.params
    half = p.dim // 2
    powers = torch.arange(half, device=steps_.device, dtype=torch.float32)
    frequencies = torch.exp(powers * (-math.log(p.max_period) / max(half, 1)))
    angles = steps_.reshape(-1, 1).float() * frequencies
    both = torch.cat((angles.cos(), angles.sin()), 1)
    return F.pad(both, (0, v.ne[0] - 2 * half)).reshape(shape_of(v.ne))


RAISE: dict[str, Raise] = {
    "ADD": _binary(torch.add), "SUB": _binary(torch.sub), "MUL": _binary(torch.mul), "DIV": _binary(torch.div),
    "ADD1": lambda _v, a, b: a + b,
    "SQR": _each(torch.square), "SQRT": _each(torch.sqrt), "LOG": _each(torch.log), "SIN": _each(torch.sin),
    "COS": _each(torch.cos), "SCALE": _scale, "CLAMP": _clamp, "LEAKY_RELU": _leaky_relu,
    "UNARY": _unary, "GLU": _glu,
    "DIAG_MASK_INF": _diag_mask(-math.inf), "DIAG_MASK_ZERO": _diag_mask(0.0),
    "TIMESTEP_EMBEDDING": _timestep_embedding, "FILL": _fill, "ARANGE": _arange,
}  # fmt: skip
