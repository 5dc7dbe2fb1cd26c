"""The reference interpreter against torch: two independent ways to the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sdrpc.ggml.build import cast, inplace, leaf, mul_mat, node, reshape, transpose, view
from sdrpc.ggml.ops import ALIASES, OPS
from sdrpc.ggml.params import Im2Col
from sdrpc.ggml.tensor import Graph, Tensor
from sdrpc.ggml.types import BF16, F16, F32
from tests.support import reference
from tests.support.cases import CASES
from tests.support.feed import Feed, graph

T = torch.Tensor


def test_every_operation_has_a_case() -> None:
    assert {name.split("-")[0] for name in CASES} == set(OPS) - {"NONE"}
    assert set(reference.OPS) == set(OPS) - ALIASES


def _heads(x: T, like: T) -> T:
    return x.repeat_interleave(like.shape[1] // x.shape[1], dim=1)


def _attention(node: Tensor, q: T, k: T, v: T, mask: T | None = None) -> T:
    out = F.scaled_dot_product_attention(q, _heads(k, q), _heads(v, q), mask, scale=node.params.scale)
    return out.transpose(1, 2)


def _rotate(node: Tensor, x: T, positions: T) -> T:
    p = node.params
    half = p.n_dims // 2
    turn = torch.polar(
        torch.full((positions.shape[-1], 1, half), p.attn_factor, dtype=x.dtype),
        positions[0, 0, 0, :, None, None] * p.freq_scale * p.freq_base ** (-torch.arange(half, dtype=x.dtype) / half),
    )
    rotated, rest = x[..., : p.n_dims], x[..., p.n_dims :]
    pairs = rotated.unflatten(-1, (2, half)).transpose(-1, -2) if p.mode == 2 else rotated.unflatten(-1, (half, 2))
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return torch.cat([(turned.transpose(-1, -2) if p.mode == 2 else turned).flatten(-2), rest], dim=-1)


def _conv(groups: int) -> Callable[..., T]:
    def apply(node: Tensor, kernel: T, x: T) -> T:
        s0, s1, p0, p1, d0, d1, _ = node.params
        return F.conv2d(x, kernel, stride=(s1, s0), padding=(p1, p0), dilation=(d1, d0), groups=groups)

    return apply


def _im2col(node: Tensor, kernel: T, x: T) -> T:
    s0, s1, p0, p1, d0, d1, _ = node.params
    columns = F.unfold(x, kernel.shape[2:], (d1, d0), (p1, p0), (s1, s0))
    return columns.transpose(1, 2).reshape(node.ne[::-1])


def _pool(node: Tensor, x: T) -> T:
    op, k0, k1, s0, s1, p0, p1 = node.params
    pool = F.avg_pool2d if op else F.max_pool2d
    return pool(x, (k1, k0), (s1, s0), (p1, p0))


_GLU = {
    "GLU-REGLU": F.relu, "GLU-GEGLU": lambda x: F.gelu(x, approximate="tanh"), "GLU-SWIGLU": F.silu,
    "GLU-GEGLU_ERF": F.gelu, "GLU-GEGLU_QUICK": lambda x: x * torch.sigmoid(1.702 * x),
}  # fmt: skip

_UNARY = {
    "ABS": torch.abs, "SGN": torch.sign, "NEG": torch.neg, "STEP": lambda x: (x > 0).double(), "TANH": torch.tanh,
    "ELU": F.elu, "RELU": F.relu, "SIGMOID": torch.sigmoid, "GELU": lambda x: F.gelu(x, approximate="tanh"),
    "GELU_QUICK": lambda x: x * torch.sigmoid(1.702 * x), "SILU": F.silu, "HARDSWISH": F.hardswish,
    "HARDSIGMOID": F.hardsigmoid, "EXP": torch.exp, "EXPM1": torch.expm1, "SOFTPLUS": F.softplus, "GELU_ERF": F.gelu,
    "FLOOR": torch.floor, "CEIL": torch.ceil, "ROUND": torch.round, "TRUNC": torch.trunc,
}  # fmt: skip

ORACLES: dict[str, Callable[..., T]] = {
    **{f"UNARY-{op}": lambda n, x, f=f: f(x) for op, f in _UNARY.items()},
    **{name: lambda n, x, f=f: f(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1] for name, f in _GLU.items()},
    "GLU-swapped": lambda n, x: F.gelu(x.chunk(2, -1)[1], approximate="tanh") * x.chunk(2, -1)[0],
    "GLU-split": lambda n, a, b: F.silu(a) * b,
    "ADD": lambda n, a, b: a + b, "SUB-row": lambda n, a, b: a - b, "MUL-channel": lambda n, a, b: a * b,
    "DIV": lambda n, a, b: a / b, "DIV-tiled": lambda n, a, b: a / b.repeat(1, 1, 2, 2),
    "REPEAT": lambda n, x: x.repeat(2, 1, 4, 2), "CONCAT-0": lambda n, a, b: torch.cat([a, b], 3),
    "CONCAT-2": lambda n, a, b: torch.cat([a, b], 1), "PAD": lambda n, x: F.pad(x, n.params[:8]),
    "PAD-circular": lambda n, x: F.pad(x, n.params[:4], mode="circular"),
    "NORM": lambda n, x: F.layer_norm(x, x.shape[-1:], eps=n.params.eps),
    "RMS_NORM": lambda n, x: F.rms_norm(x, x.shape[-1:], eps=n.params.eps),
    "L2_NORM": lambda n, x: F.normalize(x, dim=-1),
    "GROUP_NORM": lambda n, x: F.group_norm(x, n.params.groups, eps=n.params.eps),
    "SOFT_MAX": lambda n, x: F.softmax(x * n.params.scale, -1),
    "SOFT_MAX-mask": lambda n, x, m: F.softmax(x * n.params.scale + m, -1),
    "MUL_MAT": lambda n, a, b: b @ a.mT, "MUL_MAT-f16": lambda n, a, b: b @ a.mT,
    "MUL_MAT-bf16": lambda n, a, b: b @ a.mT, "MUL_MAT-heads": lambda n, a, b: b @ _heads(a, b).mT,
    "MUL_MAT-Q4_K": lambda n, a, b: b @ a.mT, "OUT_PROD": lambda n, a, b: b.mT @ _heads(a, b),
    "FLASH_ATTN_EXT": _attention, "FLASH_ATTN_EXT-mask": _attention,
    "IM2COL": _im2col, "CONV_2D": _conv(1), "CONV_2D_DW": _conv(4), "POOL_2D-max": _pool, "POOL_2D-mean": _pool,
    "CONV_TRANSPOSE_2D": lambda n, k, x: F.conv_transpose2d(x, k, stride=n.params.stride),
    "UPSCALE": lambda n, x: F.interpolate(x, n.ne[1::-1], mode="nearest"),
    "UPSCALE-uneven": lambda n, x: F.interpolate(x, n.ne[1::-1], mode="nearest"),
    "UPSCALE-bilinear": lambda n, x: F.interpolate(x, n.ne[1::-1], mode="bilinear"),
    "UPSCALE-corners": lambda n, x: F.interpolate(x, n.ne[1::-1], mode="bilinear", align_corners=True),
    "ROPE": _rotate, "ROPE-neox": _rotate, "CUMSUM": lambda n, x: x.cumsum(-1), "SUM": lambda n, x: x.sum(),
    "ARGSORT": lambda n, x: x.argsort(-1), "ARGSORT-descending": lambda n, x: x.argsort(-1, descending=True),
    "ARGMAX": lambda n, x: x.argmax(-1), "CLAMP": lambda n, x: x.clamp(*n.params),
    "LEAKY_RELU": lambda n, x: F.leaky_relu(x, n.params.slope),
    "DIAG_MASK_ZERO": lambda n, x: x.tril(n.params.n_past),
    "GET_ROWS": lambda n, x, rows: F.embedding(rows[0, 0, 0], x[0, 0]),
    "GET_ROWS-quantized": lambda n, x, rows: F.embedding(rows[0, 0, 0], x[0, 0]),
}  # fmt: skip

TOLERANCE = {"F32": 1e-6, "F16": 1e-3}
"""Relative error (L2) of a result that was rounded to that type once."""


@pytest.mark.parametrize("name", ORACLES)
def test_against_torch(name: str) -> None:
    feed = Feed()
    last = CASES[name](feed)
    sources = [torch.from_numpy(feed.value(source)) for source in last.src if source is not None]
    expected = ORACLES[name](last, *sources).numpy().reshape(last.ne[::-1])
    got = feed.run(last)
    if last.type.name == "I32":
        assert np.array_equal(got, expected)
    else:
        assert np.linalg.norm(got - expected) <= TOLERANCE[last.type.name] * np.linalg.norm(expected)


@pytest.mark.parametrize("name", CASES)
def test_every_case_runs(name: str) -> None:
    feed = Feed()
    steps = graph(CASES[name](feed))
    got = reference.run(steps, feed.memory)[steps.nodes[-1]]
    assert got.shape == steps.nodes[-1].ne[::-1]
    assert not np.isnan(got).any()


def test_im2col_and_product_are_a_convolution() -> None:
    feed = Feed()
    direct = CASES["CONV_2D"](feed)
    kernel, image = direct.src
    columns = node("IM2COL", kernel, image, params=Im2Col(*direct.params[:6], 1))
    product = mul_mat(reshape(columns, columns.ne[0], columns.elements // columns.ne[0]), reshape(kernel, 36, 5))
    assert np.allclose(
        feed.run(*graph(product).nodes).reshape(5, 2, *direct.ne[1::-1]).swapaxes(0, 1), feed.run(direct), atol=1e-5
    )


def test_in_place_and_aliases_follow_the_bytes() -> None:
    feed = Feed()
    x = feed.of(np.ones((2, 3)))
    seen = transpose(x)
    doubled = inplace("ADD", x, x)
    read = node("SQR", seen)
    assert (reference.run(Graph((seen, doubled, read)), feed.memory)[read] == 4).all()
    assert (feed.value(x) == 2).all()


def test_managed_aliases_share_the_bytes_of_their_root() -> None:
    feed = Feed()
    square = node("SQR", feed.of(np.arange(6.0).reshape(2, 3)))
    tail = view(square, 2, 2, offset=4)
    doubled = inplace("ADD", tail, tail)
    total = node("SUM", square)
    assert feed.run(square, tail, doubled, total).item() == 0 + 2 + 8 + 9 + 32 + 50


@pytest.mark.parametrize(("type", "values"), [(F16, np.float16), (BF16, torch.bfloat16), (F32, np.float32)])
def test_rounding_is_to_nearest_even(type: object, values: object) -> None:
    exact = np.array([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, -1e-7, 70000.0, np.inf, -np.inf])
    feed = Feed()
    got = feed.run(cast(feed.of(exact), type)).reshape(-1)  # type: ignore[arg-type]
    if isinstance(values, torch.dtype):
        expected = torch.from_numpy(exact).to(torch.float32).to(values).double().numpy()
    else:
        with np.errstate(over="ignore"):
            expected = exact.astype(np.float32).astype(values).astype(np.float64)
    assert np.array_equal(got, expected)


def test_what_lies_outside_of_its_buffer_is_refused() -> None:
    outside = leaf(F32, 4, buffer=1, offset=8)
    with pytest.raises((TypeError, ValueError), match="buffer"):
        reference.read(outside, {1: bytearray(16)})
