"""What every ggml operation computes, as torch.

One function an operation, :data:`RAISE`. It gets the value to be computed (parameters, shape) and its operands: torch
tensors of four dimensions in torch's order, all floating operands of one dtype, weights already converted. It returns a
tensor of the value's shape in any dtype; the program casts where the value is held in another one. Formulas are those
of ggml's reference backend (ggml-cpu/ops.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdrpc.ggml.tensor import Dims

from .dequant import dequantize
from .dtypes import shape_of
from .layout import steps, take
from .values import Value

Raise = Callable[..., Tensor]

GELU_QUICK = 1.702


def _operand(v: Value, i: int) -> Value:
    source = v.src[i]
    if source is None:
        raise ValueError(f"{v.node}: operand {i} is missing")  # the rules have counted them
    return source


def repeat_to(x: Tensor, ne: Dims) -> Tensor:
    """``x`` repeated until it has the shape ``ne``; no copy where a dimension has one element or all of them."""
    shape = shape_of(ne)
    if all(have in (1, want) for have, want in zip(x.shape, shape, strict=True)):
        return x.expand(shape)
    return x.repeat([want // have for have, want in zip(x.shape, shape, strict=True)])


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Raise:
    def apply(v: Value, a: Tensor, b: Tensor) -> Tensor:
        return function(a, b if b.shape == a.shape else repeat_to(b, v.ne))

    return apply


def _unary(function: Callable[[Tensor], Tensor]) -> Raise:
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


# names for bytes, copies


def _view(v: Value, x: Tensor) -> Tensor:
    strided: Any = v.params
    return take(x, steps(x.numel(), strided), strided)


def _copy(v: Value, x: Tensor) -> Tensor:
    return x.reshape(shape_of(v.ne))


def _dense(v: Value, x: Tensor) -> Tensor:
    return x.reshape(shape_of(v.ne)).contiguous()


def _concat(v: Value, a: Tensor, b: Tensor) -> Tensor:
    p: Any = v.params
    return torch.cat((a, b), 3 - p.dim)


def _pad(v: Value, x: Tensor) -> Tensor:
    *amounts, circular = v.params
    if not circular:
        return F.pad(x, amounts)
    for axis in range(4):
        left, right = amounts[2 * axis : 2 * axis + 2]
        if left or right:
            n = x.shape[3 - axis]
            x = x.index_select(3 - axis, torch.arange(-left, n + right, device=x.device) % n)
    return x


def _window(v: Value, a: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of ``a`` and, in its memory, the part that SET or ACC change."""
    p: Any = v.params
    size = v.type.size
    result = a.clone(memory_format=torch.contiguous_format)
    strides = (p.nb3 // size, p.nb2 // size, p.nb1 // size, 1)
    return result, result.as_strided(shape_of(_operand(v, 1).ne), strides, p.offset // size)


def _set(v: Value, a: Tensor, b: Tensor) -> Tensor:
    result, part = _window(v, a)
    part.copy_(b)
    return result


def _acc(v: Value, a: Tensor, b: Tensor) -> Tensor:
    result, part = _window(v, a)
    part.add_(b)
    return result


def _within(numbers: Tensor, n: int) -> Tensor:
    """``numbers``, which must be below ``n``. A CPU says so; an accelerator would fail for good, and asking it costs a
    wait for all that is queued, so there the nearest row is taken."""
    if numbers.device.type != "cpu":
        return numbers.clamp(0, n - 1)
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < n:
        raise IndexError(f"rows {int(numbers.min())} … {int(numbers.max())} of {n}")
    return numbers


def rows_at(rows: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """Indices of whole rows of a [n3, n2, n1, n0] tensor: ``rows`` is [1, n3, n2, n] of numbers along n1."""
    numbers = _within(rows[0].long(), shape[2])
    i3 = torch.arange(shape[0], device=rows.device)[:, None, None]
    i2 = torch.arange(shape[1], device=rows.device)[None, :, None]
    return i3, i2, numbers


def _get_rows(v: Value, a: Tensor, rows: Tensor) -> Tensor:
    picked: Tensor = a[rows_at(rows, a.shape)]
    held = _operand(v, 0).type
    return picked if held.plain else dequantize(picked, held, v.ne)


def _set_rows(_v: Value, into: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """Changes ``into``, a view of memory."""
    spread = repeat_to(rows, (rows.shape[3], into.shape[1], into.shape[0], 1))
    into[rows_at(spread, into.shape)] = values.to(into.dtype)
    return into


# element by element, with parameters


def _scale(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    scaled = x * float(p.scale)
    return scaled + float(p.bias) if p.bias else scaled


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


def _rope(v: Value, x: Tensor, positions: Tensor, factors: Tensor | None = None) -> Tensor:
    p: Any = v.params
    n = p.n_dims
    powers = torch.arange(0, n, 2, device=x.device, dtype=torch.float32)
    frequencies = torch.pow(p.freq_base, -powers / n)
    if factors is not None:
        frequencies = frequencies / factors.reshape(-1)[: n // 2].float()
    angles = positions.reshape(-1, 1).float() * frequencies * p.freq_scale  # [n2, n / 2]
    cos = (angles.cos() * p.attn_factor)[None, :, None]
    sin = (angles.sin() * p.attn_factor)[None, :, None]
    turned, rest = x[..., :n].float(), x[..., n:]
    neox = p.mode == 2
    a, b = turned.chunk(2, dim=-1) if neox else (turned[..., 0::2], turned[..., 1::2])
    pair = (a * cos - b * sin, a * sin + b * cos)
    rotated = torch.cat(pair, -1) if neox else torch.stack(pair, -1).flatten(-2)
    return torch.cat((rotated.to(x.dtype), rest), -1)


# rows and reductions


def _sum(v: Value, x: Tensor) -> Tensor:
    return x.sum().reshape(shape_of(v.ne))


def _argmax(v: Value, x: Tensor) -> Tensor:
    return x.argmax(-1).reshape(shape_of(v.ne)).int()


def _argsort(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    return torch.argsort(x, dim=-1, descending=bool(p.order), stable=True).int()


def _norm(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    return F.layer_norm(x, x.shape[-1:], eps=p.eps)


def _rms_norm(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    return F.rms_norm(x, x.shape[-1:], eps=p.eps)


def _l2_norm(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp(min=p.eps)


def _group_norm(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    return F.group_norm(x, p.groups, eps=p.eps)


def _layer_norm_affine(v: Value, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    p: Any = v.params
    return F.layer_norm(x, x.shape[-1:], weight.reshape(-1), bias.reshape(-1), p.eps)


def _rms_norm_affine(v: Value, x: Tensor, weight: Tensor) -> Tensor:
    p: Any = v.params
    return F.rms_norm(x, x.shape[-1:], weight.reshape(-1), p.eps)


def _group_norm_affine(v: Value, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    p: Any = v.params
    y = F.group_norm(x, p.groups, weight.reshape(-1), bias.reshape(-1), p.eps)
    return F.silu(y, inplace=True) if p.silu else y


def alibi(heads: int, max_bias: float, device: torch.device) -> Tensor:
    """The slope of each head's linear bias: [heads, 1, 1]."""
    log2 = 1 << (heads.bit_length() - 1)
    m0, m1 = 2.0 ** (-max_bias / log2), 2.0 ** (-max_bias / 2 / log2)
    slopes = [m0 ** (h + 1) if h < log2 else m1 ** (2 * (h - log2) + 1) for h in range(heads)]
    return torch.tensor(slopes, device=device).reshape(-1, 1, 1)


def _masked(scores: Tensor, mask: Tensor | None, max_bias: float) -> Tensor:
    """``scores`` [n, heads, queries, keys] plus the mask, whose heads and batches repeat, times the heads' slopes."""
    if mask is None:
        return scores
    queries, heads = scores.shape[2], scores.shape[1]
    mask = mask[:, :, :queries]
    mask = repeat_to(mask, (mask.shape[3], queries, heads, scores.shape[0]))
    return scores + (mask * alibi(heads, max_bias, mask.device).to(mask.dtype) if max_bias > 0 else mask)


def _soft_max(v: Value, x: Tensor, mask: Tensor | None = None) -> Tensor:
    p: Any = v.params
    return torch.softmax(_masked(x * p.scale if p.scale != 1 else x, mask, p.max_bias), -1)


def _attention(v: Value, q: Tensor, k: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """[n, heads, queries, head] and [n, groups, keys, head] → [n, heads, queries, head]."""
    p: Any = v.params
    heads, groups = q.shape[1], k.shape[1]
    if heads != groups:
        k, value = (t.repeat_interleave(heads // groups, 1) for t in (k, value))
    if mask is not None and (
        p.max_bias > 0 or mask.shape[2] != q.shape[2] or heads % mask.shape[1] or mask.shape[1] > 1
    ):
        mask = _masked(
            torch.zeros((), dtype=q.dtype, device=q.device).expand(*q.shape[:3], k.shape[2]), mask, p.max_bias
        )
    return F.scaled_dot_product_attention(q, k, value, attn_mask=mask, scale=p.scale)


def _flash_attn(v: Value, q: Tensor, k: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """[n, heads, queries, head] and [n, groups, keys, head] → [n, queries, heads, head]."""
    p: Any = v.params
    heads, groups = q.shape[1], k.shape[1]
    if not p.logit_softcap:
        return _attention(v, q, k, value, mask).transpose(1, 2)
    if heads != groups:
        k, value = (t.repeat_interleave(heads // groups, 1) for t in (k, value))
    scores = q @ k.mT * (p.scale / p.logit_softcap)
    weights = torch.softmax(_masked(p.logit_softcap * torch.tanh(scores), mask, p.max_bias), -1)
    return (weights @ value).transpose(1, 2)


# products


def _mul_mat(_v: Value, a: Tensor, b: Tensor) -> Tensor:
    """b · aᵀ; a's batches repeat, each for several consecutive ones of b."""
    if a.shape[0] == a.shape[1] == 1:
        return F.linear(b, a[0, 0])
    if a.shape[:2] == b.shape[:2]:
        return b @ a.mT
    if a.shape[0] != b.shape[0]:
        a = a.repeat_interleave(b.shape[0] // a.shape[0], 0)
    n3, n2, n, k = b.shape
    grouped = b.reshape(n3, a.shape[1], n2 // a.shape[1] * n, k)
    return (grouped @ a.mT).reshape(n3, n2, n, a.shape[2])


def _linear_bias(_v: Value, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    return F.linear(b, a[0, 0], bias.reshape(-1))


def _out_prod(_v: Value, a: Tensor, b: Tensor) -> Tensor:
    """bᵀ · a: sums over the second dimension."""
    a = a.repeat_interleave(b.shape[0] // a.shape[0], 0).repeat_interleave(b.shape[1] // a.shape[1], 1)
    return b.mT @ a


# images


def _im2col(v: Value, _kernel: Tensor, x: Tensor) -> Tensor:
    p: Any = v.params
    k0, k1 = _operand(v, 0).ne[:2]
    if p.is_2d:
        columns = F.unfold(x.float(), (k1, k0), (p.d1, p.d0), (p.p1, p.p0), (p.s1, p.s0))
    else:
        # [1, n, channels, width]: each row of the batch is an image one pixel high
        columns = F.unfold(x[0].unsqueeze(2).float(), (1, k0), (1, p.d0), (0, p.p0), (1, p.s0))
    return columns.transpose(1, 2).reshape(shape_of(v.ne))


def _conv_2d(v: Value, kernel: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    p: Any = v.params
    # an image whose channels lie together makes torch rearrange the kernel too, which is larger, in every run
    if x.is_cpu or not kernel.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    return F.conv2d(x, kernel, None if bias is None else bias.reshape(-1), (p.s1, p.s0), (p.p1, p.p0), (p.d1, p.d0))


def _conv_2d_dw(v: Value, kernel: Tensor, x: Tensor) -> Tensor:
    p: Any = v.params
    return F.conv2d(x, kernel, None, (p.s1, p.s0), (p.p1, p.p0), (p.d1, p.d0), groups=x.shape[1])


def _conv_transpose_2d(v: Value, kernel: Tensor, x: Tensor) -> Tensor:
    p: Any = v.params
    return F.conv_transpose2d(x, kernel, stride=p.stride)


def _pool_2d(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    # padded here: torch allows no more padding than half a window
    padded = F.pad(x, (p.p0, p.p0, p.p1, p.p1), value=0.0 if p.op else -torch.finfo(x.dtype).max)
    pool = F.avg_pool2d if p.op else F.max_pool2d
    return pool(padded, (p.k1, p.k0), (p.s1, p.s0))


def _upscale(v: Value, x: Tensor) -> Tensor:
    p: Any = v.params
    shape = shape_of(v.ne)
    if (
        p.mode == 0
        and x.shape[:2] == shape[:2]
        and all(w % h == 0 for w, h in zip(shape[2:], x.shape[2:], strict=True))
    ):
        return F.interpolate(x, shape[2:], mode="nearest")
    bilinear = p.mode & 0xFF == 1
    for axis in range(2):
        x = _nearest(x, axis, shape[axis])
    for axis in (2, 3):
        x = _linear(x, axis, shape[axis], bool(p.mode & 256)) if bilinear else _nearest(x, axis, shape[axis])
    return x


def _nearest(x: Tensor, axis: int, n: int) -> Tensor:
    have = x.shape[axis]
    if n == have:
        return x
    factor = torch.tensor(n, dtype=torch.float32) / have
    picked = _quotient(torch.arange(n, dtype=torch.float32, device=x.device), float(factor)).long()
    return x.index_select(axis, picked.clamp(max=have - 1))


def _quotient(x: Tensor, divisor: float) -> Tensor:
    """``x / divisor`` to the last bit: by a number that is not in its memory, a GPU multiplies with the reciprocal."""
    return x / torch.full((1,), divisor, dtype=x.dtype, device=x.device)


def _linear(x: Tensor, axis: int, n: int, align_corners: bool) -> Tensor:
    """Linear interpolation along one axis; ggml clamps coordinates to the outermost pixels' centres."""
    have = x.shape[axis]
    offset, factor = (0.0, (n - 1) / (have - 1)) if align_corners and n > 1 and have > 1 else (0.5, n / have)
    if align_corners:
        offset = 0.0
    at = _quotient(torch.arange(n, dtype=torch.float32, device=x.device) + offset, factor) - offset
    low = at.floor().long().clamp(0, have - 1)
    high = (at.floor().long() + 1).clamp(0, have - 1)
    share = (at - low).clamp(0, 1).to(x.dtype).reshape([-1 if i == axis else 1 for i in range(4)])
    return x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share


RAISE: dict[str, Raise] = {
    "VIEW": _view, "SNAPSHOT": lambda _v, x: x.clone(), "CAST": lambda _v, x: x,
    "DUP": _dense, "CPY": _copy, "CONT": _dense, "CONCAT": _concat, "PAD": _pad,
    "REPEAT": lambda v, x: repeat_to(x, v.ne), "SET": _set, "ACC": _acc, "GET_ROWS": _get_rows, "SET_ROWS": _set_rows,
    "FILL": _fill, "ARANGE": _arange,
    "ADD": _binary(torch.add), "SUB": _binary(torch.sub), "MUL": _binary(torch.mul), "DIV": _binary(torch.div),
    "SQR": _unary(torch.square), "SQRT": _unary(torch.sqrt), "LOG": _unary(torch.log), "SIN": _unary(torch.sin),
    "COS": _unary(torch.cos), "SCALE": _scale, "CLAMP": _clamp, "LEAKY_RELU": _leaky_relu,
    "UNARY": lambda v, x: UNARY[v.params.op](x), "GLU": _glu,
    "DIAG_MASK_INF": _diag_mask(-math.inf), "DIAG_MASK_ZERO": _diag_mask(0.0),
    "TIMESTEP_EMBEDDING": _timestep_embedding, "ROPE": _rope,
    "SUM": _sum, "SUM_ROWS": lambda _v, x: x.sum(-1, keepdim=True), "MEAN": lambda _v, x: x.mean(-1, keepdim=True),
    "ARGMAX": _argmax, "ARGSORT": _argsort, "CUMSUM": lambda _v, x: x.cumsum(-1),
    "NORM": _norm, "RMS_NORM": _rms_norm, "L2_NORM": _l2_norm, "GROUP_NORM": _group_norm, "SOFT_MAX": _soft_max,
    "NORM_AFFINE": _layer_norm_affine, "RMS_NORM_AFFINE": _rms_norm_affine, "GROUP_NORM_AFFINE": _group_norm_affine,
    "LINEAR": _linear_bias, "ATTENTION": _attention,
    "MUL_MAT": _mul_mat, "OUT_PROD": _out_prod, "FLASH_ATTN_EXT": _flash_attn,
    "IM2COL": _im2col, "CONV_2D": _conv_2d, "CONV_2D_DW": _conv_2d_dw, "CONV_TRANSPOSE_2D": _conv_transpose_2d,
    "POOL_2D": _pool_2d, "UPSCALE": _upscale,
}  # fmt: skip
"""ggml's operations, and the few that values have of their own, by name."""
