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
from sdrpc.lowering.lower import rule_name
from sdrpc.lowering.rules import RULES
from sdrpc.targets import PORTABLE, SDRPC
from tests.lowering.compare import check

aten = torch.ops.aten


class Case(NamedTuple):
    """``rules``: the rules that the case has to go through; ``make`` gives the inputs."""

    rules: str
    function: Callable[..., Any]
    shapes: tuple[Any, ...]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


def positive(*shape: int) -> Tensor:
    return numbers(*shape).abs() + 0.5


def integers(*shape: int) -> Tensor:
    return torch.randint(-5, 9, shape, generator=torch.Generator().manual_seed(1))


X = (2, 3, 4, 5)
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
    Case("pow", lambda x: (x**2, x**3, x**0, x**1), (X,)),
    Case("pow", lambda x: (x**0.5, x**-2, x**-1.5, 2**x), (positive(*X),)),
    Case("maximum minimum", lambda x, y: (torch.maximum(x, y), torch.minimum(x, y)), (X, X[1:])),
    # integers and truth
    Case("add mul to", lambda i: (i + 1, (i * 3).float(), i.float() / 2, i / 2), (integers(2, 3),)),
    Case("unsqueeze expand to", lambda i: i.unsqueeze(0).expand(3, 4).float() * 2, (integers(4),)),
    Case("gt lt le ge eq ne", lambda i: (i > 1, i < 1, i <= 1, i >= 1, i == 1, i != 1), (integers(2, 3),)),
    Case("gt lt le ge", lambda x, y: ((x > y), (x < y).float(), x <= y, x >= y), (X, X[1:])),
    Case("logical_not", lambda x: torch.logical_not(x > 0), (X,)),
    Case("bitwise_not", lambda x: ~(x > 0), (X,)),
    Case("logical_and logical_or", lambda x: (torch.logical_and(x > 0, x < 1), torch.logical_or(x > 1, x < 0)), (X,)),
    Case("__and__ __or__", lambda x: ((x > 0) & (x < 1), (x > 1) | (x < 0)), (X,)),
    Case("bitwise_and bitwise_or", lambda x: aten.bitwise_or(aten.bitwise_and(x > 0, x < 1), x > 1), (X,)),
    Case("where", lambda x, y: (torch.where(x > 0, x, y), torch.where(x > 0, 1.0, y)), (X, X[1:])),
    Case("masked_fill", lambda x: (x.masked_fill(x > 0, 5.0), F.softmax(x.masked_fill(x > 1, -math.inf), -1)), (X,)),
    # reductions
    Case("mean", lambda x: (x.mean(), x.mean(-1), x.mean((1, 3), keepdim=True), x.mean(0)), (X,)),
    Case("sum", lambda x: (x.sum(), x.sum(1), x.sum((2, 3))), (X,)),
    Case("var", lambda x: (x.var(-1), x.var((1, 2), correction=0, keepdim=True)), (X,)),
    Case("argmax", lambda x: (x.argmax(), x.argmax(1), x.argmax(-1, keepdim=True)), (X,)),
    Case("argmax", lambda i: i.argmax(-1), (integers(2, 3),)),
    Case("softmax", lambda x: (x.softmax(-1), x.softmax(1)), (X,)),
    Case("_softmax", lambda x: aten._softmax(x, -1, False), (X,)),
    # norms
    Case("layer_norm", lambda x, w, b: (F.layer_norm(x, (5,), w, b), F.layer_norm(x, (4, 5))), (X, (5,), (5,))),
    Case("layer_norm", lambda x, w, b: F.layer_norm(x, (4, 5), w, b, 0.1), (X, (4, 5), (4, 5))),
    Case("rms_norm", lambda x, w: (F.rms_norm(x, (5,), w), F.rms_norm(x, (5,), w, 1e-3)), (X, (5,))),
    Case("group_norm", lambda x, w, b: (F.group_norm(x, 3, w, b), F.group_norm(x, 2)), ((2, 6, 4, 5), (6,), (6,))),
    Case("group_norm", lambda x, w, b: F.group_norm(x, 3, w, b, 0.1), ((2, 6, 5), (6,), (6,))),
    Case("batch_norm", lambda x, m, v, w: F.batch_norm(x, m, v, w, w), (X, (3,), positive(3), (3,))),
    # products
    Case("linear", lambda x, w, b: (F.linear(x, w, b), F.linear(x, w), F.linear(x[0, 0, 0], w)), (X, (7, 5), (7,))),
    Case("linear", lambda x, w: F.linear(x, w), ((2, 1, 2, 3, 5), (7, 5))),
    Case("matmul", lambda x, y: (x @ y, x[0] @ y, x @ y[0, 0], x[0, 0, 0] @ y[0, 0]), (X, (2, 3, 5, 6))),
    Case("matmul", lambda x, y: (x @ y, x[0, 0, 0] @ y[0, 0, 0]), ((2, 2, 2, 3, 4), (2, 1, 2, 4, 3))),
    Case("matmul", lambda x, y: (x @ y.mT, x @ y[:1].mT, x @ y[0, 0, 0]), (X, (2, 3, 6, 5))),
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
    Case("upsample_nearest2d", lambda x: (F.interpolate(x, scale_factor=2.0), F.interpolate(x, size=(7, 9))), (X,)),
    Case("avg_pool2d", lambda x: (F.avg_pool2d(x, 2), F.avg_pool2d(x, (2, 3), 1)), ((2, 3, 6, 7),)),
]  # fmt: skip


def inputs_of(case: Case) -> list[Tensor]:
    return [shape if isinstance(shape, Tensor) else numbers(*shape) for shape in case.shapes]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rules.split()[0])
def test_a_rule_gives_what_torch_gives(case: Case) -> None:
    exported = check(case.function, *inputs_of(case))
    used = {rule_name(node) for node in exported.nodes}
    assert set(case.rules.split()) <= used


def test_conv_transpose2d_where_devices_have_it() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return F.conv_transpose2d(x, w, b), F.conv_transpose2d(x, w, b, 2, (1, 0))

    inputs = numbers(2, 3, 4, 5), numbers(3, 4, 3, 3), numbers(4)
    check(function, *inputs, targets=[SDRPC])
    with pytest.raises(CaptureError, match="needs CONV_TRANSPOSE_2D, which portable devices don't have"):
        check(function, *inputs, targets=[PORTABLE])


def test_every_rule_has_a_case() -> None:
    assert set(RULES) - {rule for case in CASES for rule in case.rules.split()} == {"conv_transpose2d"}
