"""Each element by itself: unary and gated units, arithmetic, scales, masks; and numbers out of nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sdrpc.ggml.params import Arange, Clamp, DiagMask, Fill, Glu, LeakyRelu, NoParams, Scale, TimestepEmbedding, Unary

from ..dtypes import shape_of
from ..values import Value
from .base import Autocast, Kernel, kernel, repeat_to

GELU_QUICK = 1.702


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Value, Tensor, Tensor], Tensor]:
    def apply(v: Value, a: Tensor, b: Tensor) -> Tensor:
        return function(a, b if b.shape == a.shape else repeat_to(b, v.ne))

    return apply


def _each(function: Callable[[Tensor], Tensor]) -> Callable[[Value, Tensor], Tensor]:
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


def _xielu(p: Unary, x: Tensor) -> Tensor:
    """https://arxiv.org/abs/2411.13010; the alphas are those of its two halves, softplus and beta already in them."""
    falling = (torch.expm1(x.clamp(max=p.eps)) - x) * p.alpha_n
    return torch.where(x > 0, x * x * p.alpha_p, falling) + x * p.beta


def _unary(v: Value[Unary], x: Tensor) -> Tensor:
    p = v.params
    return _xielu(p, x) if p.op == "XIELU" else UNARY[p.op](x)


def _swiglu_oai(p: Glu, x: Tensor, gate: Tensor) -> Tensor:
    x = x.clamp(max=p.limit)
    return x * torch.sigmoid(p.alpha * x) * (gate.clamp(-p.limit, p.limit) + 1)


GLU: dict[str, Callable[[Glu, Tensor, Tensor], Tensor]] = {
    "REGLU": lambda _p, x, gate: F.relu(x) * gate,
    "GEGLU": lambda _p, x, gate: gelu(x) * gate,
    "SWIGLU": lambda _p, x, gate: F.silu(x) * gate,
    "SWIGLU_OAI": _swiglu_oai,
    "GEGLU_ERF": lambda _p, x, gate: F.gelu(x) * gate,
    "GEGLU_QUICK": lambda _p, x, gate: gelu_quick(x) * gate,
    "SWIGLU_CLAMP": lambda p, x, gate: F.silu(x.clamp(max=p.limit)) * gate.clamp(-p.limit, p.limit),
}


def _glu(v: Value[Glu], a: Tensor, b: Tensor | None = None) -> Tensor:
    p = v.params
    if b is None:
        n = v.ne[0]
        a, b = a[..., :n], a[..., n : 2 * n]
        if p.swapped:
            a, b = b, a
    return GLU[p.op](p, a, b)


def _scale(v: Value[Scale], x: Tensor) -> Tensor:
    p = v.params
    scaled: Tensor = x * p.scale
    return scaled.add_(p.bias) if p.bias else scaled


def _clamp(v: Value[Clamp], x: Tensor) -> Tensor:
    low, high = (_held(limit, x.dtype) for limit in v.params)
    if v.params.min > v.params.max:  # everything becomes the lower bound, as in ggml
        return torch.full_like(x, low)
    return x.clamp(low, high)


def _held(limit: float, dtype: torch.dtype) -> float:
    """A limit as a dtype has it: the last number before infinity for those that lie farther."""
    if not dtype.is_floating_point or math.isinf(limit):
        return limit
    last = torch.finfo(dtype).max
    return min(max(limit, -last), last)


def _leaky_relu(v: Value[LeakyRelu], x: Tensor) -> Tensor:
    p = v.params
    return F.leaky_relu(x, p.slope)


def _fill(v: Value[Fill], x: Tensor) -> Tensor:
    p = v.params
    return torch.full_like(x, p.value)


def _arange(v: Value[Arange], device: torch.device) -> Tensor:
    p = v.params
    numbers = torch.arange(v.ne[0], device=device, dtype=torch.float32)
    return (numbers * p.step + p.start).reshape(shape_of(v.ne))


def _diag_mask(fill: float) -> Callable[[Value[DiagMask], Tensor], Tensor]:
    def apply(v: Value[DiagMask], x: Tensor) -> Tensor:
        p = v.params
        above = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(p.n_past + 1)
        return x.masked_fill(above, fill)

    return apply


def _timestep_embedding(v: Value[TimestepEmbedding], steps_: Tensor) -> Tensor:
    """cos and sin of t · max_period^(-j / half)."""
    p = v.params
    half = p.dim // 2
    powers = torch.arange(half, device=steps_.device, dtype=torch.float32)
    frequencies = torch.exp(powers * (-math.log(p.max_period) / max(half, 1)))
    angles = steps_.reshape(-1, 1).float() * frequencies
    both = torch.cat((angles.cos(), angles.sin()), 1)
    return F.pad(both, (0, v.ne[0] - 2 * half)).reshape(shape_of(v.ne))


def _add1(_v: Value, a: Tensor, b: Tensor) -> Tensor:
    return a + b


KERNELS: tuple[Kernel, ...] = (
    kernel("ADD", NoParams, _binary(torch.add), Autocast.FOLLOWS),
    kernel("SUB", NoParams, _binary(torch.sub), Autocast.FOLLOWS),
    kernel("MUL", NoParams, _binary(torch.mul), Autocast.FOLLOWS),
    kernel("DIV", NoParams, _binary(torch.div), Autocast.FOLLOWS),
    kernel("ADD1", NoParams, _add1),
    kernel("SQR", NoParams, _each(torch.square)),
    kernel("SQRT", NoParams, _each(torch.sqrt)),
    kernel("LOG", NoParams, _each(torch.log)),
    kernel("SIN", NoParams, _each(torch.sin)),
    kernel("COS", NoParams, _each(torch.cos)),
    kernel("SCALE", Scale, _scale, Autocast.FOLLOWS),
    kernel("CLAMP", Clamp, _clamp, Autocast.FOLLOWS),
    kernel("LEAKY_RELU", LeakyRelu, _leaky_relu, Autocast.FOLLOWS),
    kernel("UNARY", Unary, _unary, Autocast.FOLLOWS),
    kernel("GLU", Glu, _glu, Autocast.FOLLOWS),
    kernel("DIAG_MASK_INF", DiagMask, _diag_mask(-math.inf), Autocast.FOLLOWS),
    kernel("DIAG_MASK_ZERO", DiagMask, _diag_mask(0.0), Autocast.FOLLOWS),
    kernel("TIMESTEP_EMBEDDING", TimestepEmbedding, _timestep_embedding),
    kernel("FILL", Fill, _fill),
    kernel("ARANGE", Arange, _arange, takes_device=True),
)
