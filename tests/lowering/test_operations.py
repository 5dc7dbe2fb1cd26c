"""Every rule of lowering against torch, on both targets: values, shapes, dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdrpc.errors import CaptureError
from sdrpc.lowering.lower import lower, rule_name
from sdrpc.lowering.rules import RULES
from sdrpc.lowering.rules.complex_numbers import BY_PARTS, COMPLEX_RULES
from sdrpc.targets import PORTABLE, SDRPC
from tests.lowering.compare import captured, check

aten = torch.ops.aten


class Case(NamedTuple):
    """A function of tensors of these shapes (or of these tensors), and the functions that it is about."""

    name: str
    function: Callable[..., Any]
    shapes: tuple[Any, ...]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


def positive(*shape: int) -> Tensor:
    return numbers(*shape).abs() + 0.5


def integers(*shape: int) -> Tensor:
    return torch.randint(-5, 9, shape, generator=torch.Generator().manual_seed(1))


def written(x: Tensor, part: Any) -> Tensor:
    """Writes through views of several kinds, and reads of other views of the same tensor between them."""
    y = torch.zeros(x.shape, device=x.device)
    halves = y.view(2, -1)
    first, second = halves[:, :10].chunk(2, 1)
    y[:, 1:3] = x[:, 1:3] * 2
    y[0, 0] = part
    second.mul_(2)
    y.transpose(1, 2)[:, 0].add_(first.sum())
    y.permute(3, 0, 1, 2).unbind(0)[1].sub_(halves.mean())
    y.unsqueeze(0).squeeze(0).split([1, 2], 1)[1].add_(second.sum())
    return y


def in_turns(x: Tensor) -> Tensor:
    """Every other element first, then the rest: how rotary embeddings are written."""
    y = torch.empty_like(x)
    y[..., 0::2] = -x[..., 1::2]
    y[..., 1::2] = x[..., 0::2]
    return y


def put(x: Tensor, indices: tuple[Any, ...], values: Tensor) -> Tensor:
    y = x.clone()
    y[indices] = values
    return y


def rotations(x: Tensor, angles: Tensor) -> tuple[Tensor, ...]:
    """Rotary embeddings with tables that are known, and with tables that are computed."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    known = torch.polar(torch.ones(4, 3), torch.arange(12.0).reshape(4, 3))
    made = torch.polar(torch.ones_like(angles), angles) * torch.complex(angles, angles)
    return tuple(torch.view_as_real(pairs * factor).flatten(-2) for factor in (known, made, 2.0, angles))


def complex_parts(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = torch.view_as_complex(x)
    filled = z.clone()
    filled[:, 1] = z[:, 0] * 2
    filled[0] = z[1]
    stacked = torch.stack((z.repeat(1, 2, 1), torch.cat((z, -z), 1)))
    parts = (*z.split([1, 2], 1), *z.split(2, 2), *z.unbind(0), z[0].t().unsqueeze(0).squeeze(0), z.permute(2, 0, 1))
    picked = (z[torch.tensor([1, 0])], z.index_select(1, torch.tensor([2])), z.expand(4, 2, 3, 4), z.transpose(0, 1))
    sums = (z + y, z - z.detach().view(2, 3, 4), aten.alias(z), aten.lift_fresh_copy(z), torch.zeros_like(z).copy_(z))
    more = (aten._unsafe_view(z, (6, 4)), z.to(torch.complex128))
    return tuple(torch.view_as_real(part) for part in (filled, stacked, *parts, *picked, *sums, *more))


X = (2, 3, 4, 5)
BLIND = torch.tensor([[1.0, -2.0, 0.5], [-math.inf] * 3, [-math.inf, 3.0, -math.inf]])
MASK = numbers(1, 1, 6, 7) > 0

CASES = [
    # other names
    Case("alias", lambda x: aten.alias(x) + 1, (X,)),
    Case("detach", lambda x: x.detach() + 1, (X,)),
    Case("lift_fresh_copy", lambda x: aten.lift_fresh_copy(x) + 1, (X,)),
    Case("dropout", lambda x: F.dropout(x, 0.5, False) + 1, (X,)),
    Case("feature_dropout", lambda x: F.dropout2d(x, 0.5, False) + 1, (X,)),
    Case("clone", lambda x: x.clone(), (X,)),
    Case("contiguous", lambda x: x.transpose(1, 2).contiguous(), (X,)),
    Case("to", lambda x: x.to(torch.float64), (X,)),
    Case("to", lambda x: (x.long(), x.bool(), x.bool().float(), x.bool().long() + 1), (X,)),
    Case("_to_copy", lambda x: aten._to_copy(x, dtype=torch.float64), (X,)),
    Case("type_as", lambda x, y: x.type_as(y), (X, integers(2))),
    # shapes
    Case("view", lambda x: x.view(6, 20), (X,)),
    Case("reshape", lambda x: x.permute(3, 1, 0, 2).reshape(15, 2, 4), (X,)),
    Case("_unsafe_view", lambda x: aten._unsafe_view(x, (6, 20)), (X,)),
    Case("unsqueeze squeeze", lambda x: x.unsqueeze(1).squeeze(1) + 1, (X,)),
    Case("flatten unflatten", lambda x: x.flatten(1, 2).unflatten(0, (2, 1)), (X,)),
    Case("view_as reshape_as", lambda x, y: x.view_as(y).reshape_as(x), (X, (6, 20))),
    Case("permute", lambda x: x.permute(3, 1, 0, 2), (X,)),
    Case("permute", lambda x: x.permute(3, 1, 0, 2).permute(1, 3, 0, 2).permute(0, 2, 1, 3) * 2, (X,)),
    Case("transpose", lambda x: x.transpose(0, -1), (X,)),
    Case("t", lambda x: (x.t(), x[0].t()), ((3, 4),)),
    Case("numpy_T", lambda x: x.T, ((3, 4),)),
    Case("mT", lambda x: x.mT, (X,)),
    Case("movedim", lambda x: (x.movedim(0, 2), x.movedim((0, 1), (3, 0))), (X,)),
    Case("expand", lambda x: x.expand(3, -1, 4, 5), ((2, 1, 5),)),
    Case("expand", lambda x: x.expand(2, 1, 3, 2, 3, 2), ((1, 3, 1, 3, 1),)),
    Case("expand_as", lambda x, y: x.expand_as(y), ((3, 1), (2, 3, 4))),
    Case("broadcast_to", lambda x: torch.broadcast_to(x, (4, 3)), ((3,),)),
    Case("repeat", lambda x: (x.repeat(2, 1, 3), x.repeat(2, 1, 1, 2)), ((2, 3, 4),)),
    Case("repeat_interleave", lambda x: (x.repeat_interleave(2), x.repeat_interleave(3, dim=1)), ((2, 3, 4),)),
    # made of nothing
    Case("zeros_like", lambda x: torch.zeros_like(x) + x, (X,)),
    Case("new_zeros", lambda x: (x.new_zeros(2, 3), x[:1] * x.new_zeros(5)), (X,)),
    Case("ones_like", lambda x: torch.ones_like(x, dtype=torch.long) + 1, (X,)),
    Case("new_ones", lambda x: x.new_ones(2) * x, ((3, 2),)),
    Case("new_full", lambda x: x.new_full((2,), 3.5) * x, ((3, 2),)),
    Case("full_like", lambda x: torch.full_like(x, 2.5) * x, (X,)),
    # parts and wholes
    Case("slice", lambda x: (x[:, 1:], x[..., 1:4], x[:, :, ::2], x[..., 1::2], x[-1:]), (X,)),
    Case("slice", lambda x: x[:, 1:, :, :, 1:2, ::2], ((2, 3, 1, 2, 3, 4),)),
    Case("narrow", lambda x: x.narrow(2, -3, 2), (X,)),
    Case("select", lambda x: (x[1], x[:, -1], x[..., 2]), (X,)),
    Case("chunk", lambda x: x.chunk(2, -1), (X,)),
    Case("split", lambda x: x.split(2, 2), (X,)),
    Case("split_with_sizes", lambda x: x.split_with_sizes((1, 3, 1), -1), (X,)),
    Case("unbind", lambda x: x.unbind(1), (X,)),
    Case("cat", lambda x, y: (torch.cat((x, y, x), 1), torch.cat((x.transpose(1, 2), y.transpose(1, 2)), -2)), (X, X)),
    Case("cat", lambda x: torch.cat((x, x[..., :1]), -1), ((1, 2, 1, 2, 3),)),
    Case("stack", lambda x, y: (torch.stack((x, y)), torch.stack((x, y), -1)), ((2, 3), (2, 3))),
    Case("pad", lambda x: (F.pad(x, (0, 1, 0, 1)), F.pad(x, (1, 2, 0, 1))), (X,)),
    Case("constant_pad_nd", lambda x: aten.constant_pad_nd(x, (0, 2), 0.0), (X,)),
    Case("embedding", lambda x, i: (F.embedding(i, x), F.embedding(i[0], x)), ((9, 4), integers(2, 3).abs())),
    Case("index_select", lambda x, i: (x.index_select(0, i), x.index_select(2, i)), (X, torch.tensor([1, 0, 1]))),
    Case("index", lambda x, i: (x[i], x[:, i], x[torch.arange(2), i[:2]]), ((2, 3, 4), torch.tensor([1, 0, 1]))),
    # element by element
    *(
        Case(name, function, (X,))
        for name, function in {
            "silu": F.silu, "relu": F.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "exp": torch.exp,
            "abs": torch.abs, "neg": torch.neg, "sign": torch.sign, "sin": torch.sin, "cos": torch.cos,
            "square": torch.square, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "leaky_relu": F.leaky_relu,
            "softplus": F.softplus,
        }.items()
    ),
    Case("sqrt log rsqrt reciprocal", lambda x: (x.sqrt(), x.log(), x.rsqrt(), x.reciprocal()), (positive(*X),)),
    Case("gelu", lambda x: (F.gelu(x), F.gelu(x, approximate="tanh")), (X,)),
    Case("silu relu add mul", lambda x: F.relu(F.silu(x * 2, inplace=True).add_(1), inplace=True).mul_(3), (X,)),
    Case("clamp", lambda x: (x.clamp(-1, 0.5), x.clamp(min=0), x.clamp(max=0)), (X,)),
    Case("clip clamp_min clamp_max", lambda x: x.clip(-1, 1).clamp_min(-0.5).clamp_max(0.5), (X,)),
    Case("hardtanh", lambda x: F.hardtanh(x, -0.5, 0.5), (X,)),
    Case("add", lambda x, y: (x + y, y + x, x + 2, 2 + x, torch.add(x, y, alpha=3), torch.add(x, 2, alpha=3)),
         (X, (5,))),
    Case("add", lambda x, y: x + y, ((3, 1), (1, 4))),
    Case("add", lambda x, y: x + y, ((2, 1, 3, 1, 2), (1, 2, 1, 2, 1))),
    Case("sub", lambda x, y: (x - y, y - x, x - 2, 2 - x, torch.sub(x, y, alpha=3)), (X, (4, 1))),
    Case("rsub", lambda x: torch.rsub(x, 3), (X,)),
    Case("mul", lambda x, y: (x * y, x * 2.5, y * x, x * torch.tensor(3.0)), (X, (3, 1, 1))),
    Case("div", lambda x, y: (x / y, x / 3, 3 / y), (X, positive(4, 1))),
    Case("index", lambda x: (x[[1, 0]], x[[1, 0], [2, 1]], x[..., [4, 0]], x[:, [True, False, True]]), (X,)),
    Case("addcmul addcdiv", lambda x, y: (torch.addcmul(x, y, x), torch.addcdiv(x, x, y, value=0.5)),
         (X, positive(4, 1))),
    Case("pow", lambda x: (x**2, x**3, x**0, x**1), (X,)),
    Case("pow", lambda x: (x**0.5, x**-2, x**-1.5, 2**x), (positive(*X),)),
    Case("maximum minimum", lambda x, y: (torch.maximum(x, y), torch.minimum(x, y)), (X, X[1:])),
    # integers and truth
    Case("integers", lambda i: (i + 1, (i * 3).float(), i.float() / 2, i / 2), (integers(2, 3),)),
    Case("unsqueeze expand to", lambda i: i.unsqueeze(0).expand(3, 4).float() * 2, (integers(4),)),
    Case("gt lt le ge eq ne", lambda i: (i > 1, i < 1, i <= 1, i >= 1, i == 1, i != 1), (integers(2, 3),)),
    Case("gt lt le ge", lambda x, y: ((x > y), (x < y).float(), x <= y, x >= y), (X, X[1:])),
    Case("logical_not", lambda x: torch.logical_not(x > 0), (X,)),
    Case("bitwise_not", lambda x: ~(x > 0), (X,)),
    Case("logical_and logical_or", lambda x: (torch.logical_and(x > 0, x < 1), torch.logical_or(x > 1, x < 0)), (X,)),
    Case("__and__ __or__", lambda x: ((x > 0) & (x < 1), (x > 1) | (x < 0)), (X,)),
    Case("bitwise_and bitwise_or", lambda x: aten.bitwise_or(aten.bitwise_and(x > 0, x < 1), x > 1), (X,)),
    Case("maximum minimum, far apart", lambda x: (torch.maximum(x, x * 1e9), torch.minimum(x, x - 1e9)), (X,)),
    Case("maximum of a bound", lambda x: torch.maximum(x, torch.tensor(-3.4e38)), (X,)),
    Case("where beside infinity", lambda x: torch.where(x > 0, x.log(), x), (torch.tensor([0.0, 1.0, 2.0]),)),
    Case("where", lambda x, y: (torch.where(x > 0, x, y), torch.where(x > 0, 1.0, y)), (X, X[1:])),
    Case("masked_fill", lambda x: (x.masked_fill(x > 0, 5.0), F.softmax(x.masked_fill(x > 1, -math.inf), -1)), (X,)),
    # reductions
    Case("mean", lambda x: (x.mean(), x.mean(-1), x.mean((1, 3), keepdim=True), x.mean(0)), (X,)),
    Case("sum", lambda x: (x.sum(), x.sum(1), x.sum((2, 3))), (X,)),
    Case("var", lambda x: (x.var(-1), x.var((1, 2), correction=0, keepdim=True)), (X,)),
    Case("argmax", lambda x: (x.argmax(), x.argmax(1), x.argmax(-1, keepdim=True)), (X,)),
    Case("argmax", lambda i: i.argmax(-1), (integers(2, 3),)),
    Case("argmax", lambda i: ((i == 1).int().argmax(-1), (i < 9).int().argmax(0)), (integers(4, 7),)),
    Case("softmax", lambda x: (x.softmax(-1), x.softmax(1)), (X,)),
    Case("_softmax", lambda x: aten._softmax(x, -1, False), (X,)),
    Case("_safe_softmax", lambda x: (aten._safe_softmax(x, -1), aten._safe_softmax(x, -2)), (BLIND,)),
    Case("_prelu_kernel", F.prelu, (X, X[1:2])),
    # norms
    Case("layer_norm", lambda x, w, b: (F.layer_norm(x, (5,), w, b), F.layer_norm(x, (4, 5))), (X, (5,), (5,))),
    Case("layer_norm", lambda x, w, b: F.layer_norm(x, (4, 5), w, b, 0.1), (X, (4, 5), (4, 5))),
    Case("rms_norm", lambda x, w: (F.rms_norm(x, (5,), w), F.rms_norm(x, (5,), w, 1e-3)), (X, (5,))),
    Case("group_norm", lambda x, w, b: (F.group_norm(x, 3, w, b), F.group_norm(x, 2)), ((2, 6, 4, 5), (6,), (6,))),
    Case("group_norm", lambda x, w, b: F.group_norm(x, 3, w, b, 0.1), ((2, 6, 5), (6,), (6,))),
    Case(
        "_weight_norm_interface",
        lambda v, g, h: (*aten._weight_norm_interface(v, g), *aten._weight_norm_interface(v, h, 2)),
        ((5, 4, 3), (5, 1, 1), (1, 1, 3)),
    ),
    Case("batch_norm", lambda x, m, v, w: F.batch_norm(x, m, v, w, w), (X, (3,), positive(3), (3,))),
    # products
    Case("linear", lambda x, w, b: (F.linear(x, w, b), F.linear(x, w), F.linear(x[0, 0, 0], w)), (X, (7, 5), (7,))),
    Case("linear", lambda x, w: F.linear(x, w), ((2, 1, 2, 3, 5), (7, 5))),
    Case("matmul", lambda x, y: (x @ y, x[0] @ y, x @ y[0, 0], x[0, 0, 0] @ y[0, 0]), (X, (2, 3, 5, 6))),
    Case("matmul", lambda x, y: (x @ y, x[0, 0, 0] @ y[0, 0, 0]), ((2, 2, 2, 3, 4), (2, 1, 2, 4, 3))),
    Case("matmul", lambda x, y: (x @ y.mT, x @ y[:1].mT, x @ y[0, 0, 0]), (X, (2, 3, 6, 5))),
    Case("mv dot vdot", lambda x, y: (x @ y, x.mv(y), x[0].dot(y), torch.vdot(y, x[1])), ((3, 4), (4,))),
    Case("bmm mm", lambda x, y: (torch.bmm(x, y), torch.mm(x[0], y[0])), ((2, 3, 4), (2, 4, 5))),
    Case("addmm baddbmm", lambda b, x, y: (torch.baddbmm(b, x, y, alpha=0.5), torch.addmm(b, x[0], y[0], beta=2)),
         ((5,), (2, 3, 4), (2, 4, 5))),
    Case("scaled_dot_product_attention", F.scaled_dot_product_attention, ((2, 3, 6, 4), (2, 3, 7, 4), (2, 3, 7, 5))),
    Case("scaled_dot_product_attention", lambda q, k, v: (
        F.scaled_dot_product_attention(q, k, v, scale=0.3, is_causal=True),
        F.scaled_dot_product_attention(q, k, v, MASK),
        F.scaled_dot_product_attention(q, k, v, MASK[0, 0].float()),
        F.scaled_dot_product_attention(q, k, v, (q @ k.mT) > -1),
        F.scaled_dot_product_attention(q, k, v, (q @ k.mT)[:, :1] - 1),
        F.scaled_dot_product_attention(q[0], k[0], v[0], MASK[0]),
        F.scaled_dot_product_attention(q[0], k[0], v[0], (q @ k.mT)[0] > -1),
        F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], MASK),
        F.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0]),
    ), ((2, 3, 6, 4), (2, 3, 7, 4), (2, 3, 7, 4))),
    Case("scaled_dot_product_attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
         ((2, 4, 6, 4), (2, 2, 7, 4), (2, 2, 7, 4))),
    # images
    Case("conv2d", lambda x, w, b: (F.conv2d(x, w, b), F.conv2d(x, w, b, (2, 1), (1, 2), (1, 2))),
         ((2, 3, 7, 8), (4, 3, 3, 3), (4,))),
    Case("conv2d", lambda x, w: (F.conv2d(x, w, padding="same"), F.conv2d(x, w, padding="valid")),
         ((2, 3, 7, 8), (4, 3, 3, 5))),
    Case("conv2d", lambda x, w: (F.conv2d(x, w, groups=2), F.conv2d(x, w[:, :1], groups=4, padding=1)),
         ((2, 4, 7, 8), (4, 2, 3, 3))),
    Case("conv1d",
         lambda x, w, b: (F.conv1d(x, w, b, 2, 1), F.conv1d(x, w, padding="same")),
         ((2, 3, 9), (4, 3, 3), (4,))),
    Case("conv_transpose1d",
         lambda x, w, b: (F.conv_transpose1d(x, w, b), F.conv_transpose1d(x, w, stride=3, padding=2)),
         ((2, 3, 5), (3, 4, 6), (4,))),
    Case("conv_transpose1d of channels",
         lambda x, w: (F.conv_transpose1d(x, w, groups=3), F.conv_transpose1d(x, w, None, 2, 1, groups=3)),
         ((2, 3, 5), (3, 1, 6))),
    Case("upsample_nearest2d", lambda x: (F.interpolate(x, scale_factor=2.0), F.interpolate(x, size=(7, 9))), (X,)),
    Case("avg_pool2d", lambda x: (F.avg_pool2d(x, 2), F.avg_pool2d(x, (2, 3), 1)), ((2, 3, 6, 7),)),
]  # fmt: skip

MORE = [
    # other ways to the same rules
    Case("concat", lambda x, y: torch.concat((x, y), -1), (X, X)),
    Case(
        "roll and Fourier transforms",
        lambda x: (
            x.roll((1, -2), (0, 3)),
            x.roll(7),
            torch.fft.ifftn(
                torch.fft.ifftshift(torch.fft.fftshift(torch.fft.fftn(x, dim=(-2, -1))), (0,)), dim=(1,)
            ).real,
            torch.view_as_real(torch.fft.fft(torch.complex(x, x), dim=2, norm="ortho")),
        ),
        (X,),
    ),
    Case("flip", lambda x: x.flip(0, -1), (X,)),
    Case(
        "outer einsum", lambda x, y: (torch.outer(x[0, 0, 0], y[0]), torch.einsum("abcd,ed->abce", x, y)), (X, (6, 5))
    ),
    Case(
        "einsum",
        lambda x, y: (torch.einsum("nhwc,nhwd->ncd", x, y), torch.einsum("abij,abkl->ab", x, y)),
        (X, (2, 3, 4, 2)),
    ),
    # writes
    Case(
        "copy fill zero",
        lambda x: (
            torch.zeros_like(x).copy_(x[:1]),
            x.clone().fill_(2),
            x.clone().zero_(),
            written(x, 3.0),
            written(x, x[0, 0]),
        ),
        (X,),
    ),
    Case(
        "slice_scatter select_scatter",
        lambda x, y: (
            torch.slice_scatter(x, y, 1, 1, 2),
            torch.select_scatter(x, y[:, 0], 1, 2),
            x.slice_scatter(x[:, :, ::2], 2, 1, 4, 2),
        ),
        (X, (2, 1, 4, 5)),
    ),
    Case(
        "parts of what was joined",
        lambda x, y: (
            torch.cat((x, y, x), 1)[:, 3:4] * 2,
            torch.cat((x, y, x), 1)[:, 4:7:2],
            torch.cat((x, y), 1)[:, 2:4],
            torch.cat((x, y), 1)[:, ::2],
            in_turns(x[..., :4]),
        ),
        (X, (2, 1, 4, 5)),
    ),
    Case(
        "index_put",
        lambda x, y: (
            put(x, (torch.tensor([1, 0, 1]),), torch.stack((y[0], y[0], y[0]))),
            put(x[0], (torch.tensor([2, 0]), torch.tensor([-1, 3])), y[0, 0, :2]),
            put(x, (slice(None), torch.tensor([True, False, True])), y[:, :2]),
            put(x, (torch.tensor([1]),), torch.tensor(2.0)),
        ),
        (X, X),
    ),
    # edges
    Case(
        "pad with values",
        lambda x: (F.pad(x, (1, 2), value=3.0), F.pad(x, (-1, 1, 0, -2)), F.pad(x[None], (1, 0, 2, 1, 1, 1))),
        (X,),
    ),
    Case(
        "replication_pad",
        lambda x: (
            F.pad(x[0], (1, 2), mode="replicate"),
            F.pad(x, (1, 0, 2, 1), mode="replicate"),
            F.pad(x[None], (1, 2, 0, 1, 3, 1), mode="replicate"),
        ),
        (X,),
    ),
    Case(
        "reflection_pad",
        lambda x: (
            F.pad(x[0], (1, 2), mode="reflect"),
            F.pad(x, (1, 0, 2, 1), mode="reflect"),
            F.pad(x[None], (1, 2, 0, 1, 1, 0), mode="reflect"),
        ),
        (X,),
    ),
    Case("circular padding", lambda x: F.pad(x, (1, 2, 0, 1), mode="circular"), (X,)),
    Case("pad_sequence", lambda x, y: torch.nn.utils.rnn.pad_sequence([x, y], True, 0.5), ((3, 4), (5, 4))),
    # several indices
    Case(
        "several indices",
        lambda x, i: (x[:, i, i], x[i, :, i], x[i[:, None], i[None]], x[torch.tensor([-1, 0]), torch.tensor([2, 1])]),
        ((2, 3, 4), torch.tensor([1, 0, 1])),
    ),
    Case("an index of truth values", lambda x: x[:, torch.tensor([True, False, True])], (X,)),
    # more of each element
    Case("mish", F.mish, (X,)),
    Case(
        "attention of queries that see nothing", F.scaled_dot_product_attention, (*[(1, 2, 3, 8)] * 3, ~BLIND.isinf())
    ),
    Case("softplus beyond its threshold", lambda x: F.softplus(x * 30, 2), (X,)),
    Case("logical_xor bitwise_xor", lambda x: (torch.logical_xor(x > 0, x < 1), (x > 0) ^ (x > 1)), (X,)),
    Case("any all", lambda x: ((x > 1).any(), (x > 1).any(-1), (x < 1).all(1, keepdim=True), (x < 9).all()), (X,)),
    Case("cumsum", lambda x, i: (x.cumsum(0), x.cumsum(-1), x.cumsum(2), i.cumsum(1)), (X, integers(2, 3))),
    Case(
        "linalg_vector_norm", lambda x: (F.normalize(x, dim=1), torch.linalg.vector_norm(x, dim=(1, 2)), x.norm()), (X,)
    ),
    # complex numbers
    Case("complex numbers", lambda x, y: rotations(x, y), ((2, 3, 4, 6), (4, 3))),
    Case("complex by parts", lambda x, y: complex_parts(x, y), ((2, 3, 4, 2), (2, 3, 4))),
    # pictures
    Case(
        "pixel_shuffle pixel_unshuffle",
        lambda x: (F.pixel_shuffle(x, 2), F.pixel_unshuffle(x, 2), F.pixel_unshuffle(x[0], 2)),
        ((2, 8, 4, 6),),
    ),
    Case(
        "upsample_nearest",
        lambda x: (
            F.interpolate(x[0], scale_factor=2.0),
            F.interpolate(x[None], scale_factor=(1.0, 2.0, 3.0)),
            F.interpolate(x, scale_factor=2.0, mode="nearest-exact"),
            F.interpolate(x[0], scale_factor=3.0, mode="nearest-exact"),
            F.interpolate(x[None], scale_factor=2.0, mode="nearest-exact"),
        ),
        (X,),
    ),
    Case(
        "conv3d",
        lambda x, w, b: (
            F.conv3d(x, w, b),
            F.conv3d(x, w, None, (2, 1, 2), (1, 2, 0), (2, 1, 1)),
            F.conv3d(x, w[:, :1], groups=3),
        ),
        ((2, 3, 5, 6, 7), (6, 3, 3, 2, 3), (6,)),
    ),
]
CASES += MORE


def inputs_of(case: Case) -> list[Tensor]:
    return [shape if isinstance(shape, Tensor) else numbers(*shape) for shape in case.shapes]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.split()[0])
def test_a_rule_gives_what_torch_gives(case: Case) -> None:
    check(case.function, *inputs_of(case))


def test_conv_transpose2d_where_devices_have_it() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return F.conv_transpose2d(x, w, b), F.conv_transpose2d(x, w, b, 2, (1, 0))

    inputs = numbers(2, 3, 4, 5), numbers(3, 4, 3, 3), numbers(4)
    check(function, *inputs, targets=[SDRPC])
    with pytest.raises(CaptureError, match="needs CONV_TRANSPOSE_2D, which portable devices don't have"):
        check(function, *inputs, targets=[PORTABLE])


def test_what_is_written_in_turns_is_joined_once() -> None:
    graph, _, _ = captured(in_turns, numbers(2, 3, 4, 6))
    nodes = lower(graph, SDRPC, {}).graph.nodes
    assert [node.op for node in nodes].count("CONCAT") == 1


def test_every_rule_has_a_case() -> None:
    used = {rule_name(node) for case in CASES for node in captured(case.function, *inputs_of(case))[0].nodes}
    assert (RULES.keys() | COMPLEX_RULES.keys() | BY_PARTS) - used == set()
