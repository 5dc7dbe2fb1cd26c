"""Every operation against the reference: odd sizes, views, permuted operands, types."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from sdrpc.engine import LocalDevice
from sdrpc.ggml import build as b
from sdrpc.ggml.params import (
    NO_PARAMS,
    Arange,
    ArgSort,
    Clamp,
    Concat,
    Conv2D,
    ConvTranspose2D,
    DiagMask,
    Eps,
    Fill,
    FlashAttn,
    Glu,
    GroupNorm,
    Im2Col,
    LeakyRelu,
    MulMat,
    Pad,
    Pool2D,
    Rope,
    Scale,
    SetView,
    SoftMax,
    TimestepEmbedding,
    Unary,
    Upscale,
)  # fmt: skip
from sdrpc.ggml.rules.elementwise import GLU_OPS, UNARY_OPS
from sdrpc.ggml.tensor import Tensor
from sdrpc.ggml.types import F16, F32, TYPES
from tests.engine.compare import Leaves, check

Case = Callable[[Leaves], Sequence[Tensor]]

QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def one(
    op: str, *ne: int, params: tuple = NO_PARAMS, type: str = "F32", scale: float = 1.0, shift: float = 0.0
) -> Case:
    """An operation of one operand."""

    def case(leaves: Leaves) -> list[Tensor]:
        values = leaves.rng.standard_normal(ne[::-1]) * scale
        return [b.node(op, leaves.array(abs(values) + shift if shift else values, type), params=params)]

    return case


def two(
    op: str, first: Sequence[int], second: Sequence[int], params: tuple = NO_PARAMS, types: str = "F32 F32"
) -> Case:
    def case(leaves: Leaves) -> list[Tensor]:
        a, c = types.split()
        shift = leaves.normal(*second, type=c) if op != "DIV" else leaves.array(
            abs(leaves.rng.standard_normal(tuple(second)[::-1])) + 0.5, c)  # fmt: skip
        return [b.node(op, leaves.normal(*first, type=a), shift, params=params)]

    return case


def permuted(leaves: Leaves) -> list[Tensor]:
    x = leaves.normal(7, 5, 3, 2)
    turned = b.permute(x, 2, 0, 3, 1)
    return [turned, b.cont(turned)]


def part(leaves: Leaves) -> list[Tensor]:
    x = leaves.normal(12, 6, 4)
    inner = b.view(x, 5, 3, 2, nb=x.nb[1:3], offset=4 * (2 + 12 * 2 + 72))
    return [inner, b.node("UNARY", inner, params=Unary("SILU"))]


def part_of_value(leaves: Leaves) -> list[Tensor]:
    x = b.node("SQR", leaves.normal(12, 6, 4))
    inner = b.view(x, 5, 3, 2, nb=x.nb[1:3], offset=4 * (2 + 12 * 2 + 72))
    turned = b.permute(inner, 1, 0, 2, 3)
    return [x, inner, turned, b.node("ADD", turned, leaves.normal(3))]


def reshaped_rows(leaves: Leaves) -> list[Tensor]:
    """A view whose rows are no rows of its source: 35 elements seen as 7 rows that overlap."""
    x = b.node("SQR", leaves.normal(5, 7))
    overlapping = b.view(x, 6, 5, nb=(x.nb[0] * 5,), offset=4)
    return [x, overlapping, b.cont(overlapping)]


def transposed_product(leaves: Leaves) -> list[Tensor]:
    a, c = b.transpose(leaves.normal(6, 9)), leaves.normal(9, 4)
    return [a, b.mul_mat(a, c)]


def mask_and_bias(leaves: Leaves, type: str = "F16") -> list[Tensor]:
    x, mask = leaves.normal(9, 7, 6, 2), leaves.normal(9, 8, 3, 1, type=type)
    return [b.node("SOFT_MAX", x, mask, params=SoftMax(0.3, 8.0))]


def attention(
    heads: int, groups: int, *, mask: bool = False, bias: float = 0.0, cap: float = 0.0, type: str = "F16"
) -> Case:
    def case(leaves: Leaves) -> list[Tensor]:
        q = leaves.normal(40, 11, heads, 2)
        k, v = leaves.normal(40, 13, groups, 2, type=type), leaves.normal(24, 13, groups, 2, type=type)
        m = [leaves.normal(13, 12, 1, 1, type="F16")] if mask else []
        return [b.node("FLASH_ATTN_EXT", q, k, v, *m, params=FlashAttn(0.15, bias, cap))]

    return case


def rope(mode: int, factors: bool = False) -> Case:
    def case(leaves: Leaves) -> list[Tensor]:
        x, at = leaves.normal(10, 3, 5, 2), leaves.integers(0, 40, 5)
        extra = [leaves.array(leaves.rng.uniform(0.5, 2, 4))] if factors else []
        return [b.node("ROPE", x, at, *extra, params=Rope(0, 8, mode, 0, 0, 1e4, 0.5, 0.0, 0.9, 32.0, 1.0))]

    return case


def rows(type: str, indices: str = "I32") -> Case:
    def case(leaves: Leaves) -> list[Tensor]:
        at = leaves.integers(0, 9, 4, 3, 2, type=indices)
        return [b.node("GET_ROWS", leaves.normal(64, 9, 3, 2, type=type), at)]

    return case


def set_rows(type: str) -> Case:
    def case(leaves: Leaves) -> list[Tensor]:
        into = leaves.normal(6, 9, 4, type=type)
        at = leaves.array(leaves.rng.permutation(9)[:5].reshape(1, 5), "I64")
        return [b.inplace("SET_ROWS", leaves.normal(6, 5, 4), at, into, into=2)]

    return case


def set_part(op: str) -> Case:
    def case(leaves: Leaves) -> list[Tensor]:
        a, c = leaves.normal(8, 6, 3), leaves.normal(3, 4, 2)
        return [b.node(op, a, c, params=SetView(a.nb[1], a.nb[2], a.nb[3], a.nb[1] + 8, 0))]

    return case


def im2col(type: str, is_2d: int = 1, *, batch: int = 2) -> Case:
    def case(leaves: Leaves) -> list[Tensor]:
        if is_2d:
            kernel, x = leaves.normal(3, 2, 4, 5, type="F16"), leaves.normal(9, 8, 4, batch)
            params = Im2Col(2, 1, 1, 2, 1, 2, 1)
        else:
            kernel, x = leaves.normal(3, 4, 5, type="F16"), leaves.normal(9, 4, batch)
            params = Im2Col(2, 0, 1, 0, 2, 0, 0)
        return [b.node("IM2COL", kernel, x, params=params, type={"F16": F16, "F32": F32}[type])]

    return case


def timesteps(dim: int) -> Case:
    def case(leaves: Leaves) -> list[Tensor]:
        at = leaves.array(leaves.rng.uniform(0, 999, 3))
        return [b.node("TIMESTEP_EMBEDDING", at, params=TimestepEmbedding(dim, 10000))]

    return case


def copy(source: str, type: str, ne: tuple[int, ...] = (32, 5, 3)) -> Case:
    def case(leaves: Leaves) -> list[Tensor]:
        return [b.cast(leaves.normal(*ne, type=source, scale=3), TYPES[type])]

    return case


def fill(leaves: Leaves) -> list[Tensor]:
    return [b.node("FILL", leaves.normal(5, 3), params=Fill(-2.5))]


def concat(dim: int) -> Case:
    def case(leaves: Leaves) -> list[Tensor]:
        longer = (5 if i == dim else n for i, n in enumerate((3, 4, 2, 2)))
        return [b.node("CONCAT", leaves.normal(3, 4, 2, 2), leaves.normal(*longer), params=Concat(dim))]

    return case


def upscale(mode: int) -> Case:
    return lambda leaves: [b.node("UPSCALE", leaves.normal(5, 4, 3, 2), params=Upscale(mode), ne=(11, 7, 3, 2))]


def clamped_far(leaves: Leaves) -> list[Tensor]:
    """Between limits that a narrow dtype does not hold."""
    product = b.mul_mat(leaves.normal(33, 9), leaves.normal(33, 5))
    return [product, b.node("CLAMP", product, params=Clamp(-3.4e38, 3.4028234e38))]


CASES: dict[str, Case] = {
    **{f"{op} alike": two(op, (7, 5, 3, 2), (7, 5, 3, 2)) for op in ("ADD", "SUB", "MUL", "DIV")},
    **{f"{op} row": two(op, (7, 5, 3, 2), (7,)) for op in ("ADD", "MUL", "DIV")},
    "ADD repeats": two("ADD", (8, 6, 4, 2), (4, 3, 1, 2)),
    "ADD narrow": two("ADD", (8, 6), (8, 1), types="F16 F32"),
    "MUL bf16": two("MUL", (8, 6), (8, 6), types="BF16 BF16"),
    **{op: one(op, 7, 5, 3, shift=0.1) for op in ("SQR", "SQRT", "LOG")},
    **{op: one(op, 7, 5, 3) for op in ("SIN", "COS", "DUP", "CONT", "SUM", "SUM_ROWS", "MEAN", "CUMSUM")},
    "SCALE": one("SCALE", 7, 5, params=Scale(0.3, 0.0)),
    "SCALE bias": one("SCALE", 7, 5, params=Scale(-0.3, 0.7)),
    "CLAMP": one("CLAMP", 7, 5, params=Clamp(-0.5, 0.25)),
    "CLAMP far": clamped_far,
    "LEAKY_RELU": one("LEAKY_RELU", 7, 5, params=LeakyRelu(0.1)),
    "ARGMAX": one("ARGMAX", 13, 5),
    "ARGSORT up": one("ARGSORT", 13, 5, params=ArgSort(0)),
    "ARGSORT down": one("ARGSORT", 13, 5, 2, params=ArgSort(1)),
    "FILL": fill,
    "ARANGE": lambda leaves: [b.node("ARANGE", params=Arange(1.5, 9.0, 0.7))],
    **{f"UNARY {op}": one("UNARY", 9, 7, params=Unary(op), scale=2) for op in sorted(UNARY_OPS)},
    **{f"GLU {op}": one("GLU", 10, 7, params=Glu(op, 0, 1.7, 1.2), scale=2) for op in sorted(GLU_OPS)},
    "GLU swapped": one("GLU", 10, 7, params=Glu("SWIGLU", 1)),
    "GLU split": two("GLU", (5, 7), (5, 7), Glu("GEGLU")),
    "DIAG_MASK_INF": one("DIAG_MASK_INF", 7, 5, 2, params=DiagMask(1)),
    "DIAG_MASK_ZERO": one("DIAG_MASK_ZERO", 7, 5, 2, params=DiagMask(0)),
    "REPEAT": lambda leaves: [b.node("REPEAT", leaves.normal(3, 1, 2), ne=(6, 5, 2, 3))],
    **{f"CONCAT {dim}": concat(dim) for dim in range(4)},
    "PAD": one("PAD", 5, 4, 3, params=Pad(1, 2, 0, 3, 1, 0, 0, 1)),
    "PAD circular": one("PAD", 5, 4, 3, params=Pad(1, 2, 2, 3, 0, 0, 0, 0, 1)),
    "SET": set_part("SET"), "ACC": set_part("ACC"),
    **{f"GET_ROWS {t}": rows(t) for t in ("F32", "F16", "BF16", *QUANTIZED)},
    "GET_ROWS long": rows("F32", "I64"),
    **{f"SET_ROWS {t}": set_rows(t) for t in ("F32", "F16")},
    **{f"CPY {pair}": copy(*pair.split()) for pair in (
        "F32 F16", "F16 F32", "F32 BF16", "BF16 F32", "F32 I32", "Q8_0 F32", "Q4_0 F16")},
    "TIMESTEP_EMBEDDING": timesteps(32), "TIMESTEP_EMBEDDING odd": timesteps(7),
    "ROPE": rope(0), "ROPE neox": rope(2), "ROPE factors": rope(2, True),
    "NORM": one("NORM", 33, 5, 2, params=Eps(1e-5)), "RMS_NORM": one("RMS_NORM", 33, 5, 2, params=Eps(1e-5)),
    "L2_NORM": one("L2_NORM", 33, 5, 2, params=Eps(1e-5)),
    "GROUP_NORM": one("GROUP_NORM", 5, 7, 12, 2, params=GroupNorm(4, 1e-6)),
    "SOFT_MAX": one("SOFT_MAX", 9, 7, 3, params=SoftMax(0.5)),
    "SOFT_MAX mask": lambda leaves: [
        b.node("SOFT_MAX", leaves.normal(9, 7, 4), leaves.normal(9, 7, 2), params=SoftMax(0.5))],
    "SOFT_MAX bias": mask_and_bias,
    "MUL_MAT": two("MUL_MAT", (33, 9), (33, 5), MulMat()),
    "MUL_MAT f32": two("MUL_MAT", (33, 9), (33, 5), MulMat(10)),
    "MUL_MAT batch": two("MUL_MAT", (33, 9, 3, 2), (33, 5, 3, 2), MulMat()),
    "MUL_MAT groups": two("MUL_MAT", (33, 9, 2, 1), (33, 5, 6, 2), MulMat()),
    "MUL_MAT half": two("MUL_MAT", (33, 9), (33, 5), MulMat(), "F16 F32"),
    "MUL_MAT halves": two("MUL_MAT", (33, 9), (33, 5), MulMat(), "F16 F16"),
    "MUL_MAT bf16": two("MUL_MAT", (33, 9), (33, 5), MulMat(), "BF16 F32"),
    **{f"MUL_MAT {t}": two("MUL_MAT", (64, 9), (64, 5), MulMat(), f"{t} F32") for t in QUANTIZED},
    "MUL_MAT transposed": transposed_product,
    "OUT_PROD": two("OUT_PROD", (7, 9, 2), (5, 9, 4)),
    "FLASH_ATTN_EXT": attention(3, 3), "FLASH_ATTN_EXT groups": attention(6, 2, type="F32"),
    "FLASH_ATTN_EXT mask": attention(4, 4, mask=True), "FLASH_ATTN_EXT bias": attention(6, 6, mask=True, bias=8.0),
    "FLASH_ATTN_EXT cap": attention(4, 2, mask=True, cap=5.0),
    "IM2COL": im2col("F32"), "IM2COL half": im2col("F16"), "IM2COL 1d": im2col("F32", 0),
    "CONV_2D": two("CONV_2D", (3, 2, 4, 5), (9, 8, 4, 2), Conv2D(2, 1, 1, 2, 1, 2), "F16 F32"),
    "CONV_2D channels": two("CONV_2D", (3, 2, 4, 130), (3, 2, 4, 2), Conv2D(2, 1, 1, 2, 1, 2), "F16 F32"),
    "CONV_2D a tap": two("CONV_2D", (1, 1, 8, 70), (5, 3, 8, 2), Conv2D(1, 1, 0, 0, 1, 1), "F16 F32"),
    "CONV_2D a tap, padded": two("CONV_2D", (1, 1, 8, 70), (3, 3, 8, 1), Conv2D(2, 1, 1, 2, 1, 1), "F16 F32"),
    "CONV_2D_DW": two("CONV_2D_DW", (3, 3, 1, 4), (9, 8, 4, 2), Conv2D(1, 2, 1, 0, 1, 1)),
    "CONV_TRANSPOSE_2D": two("CONV_TRANSPOSE_2D", (3, 2, 5, 4), (6, 5, 4, 2), ConvTranspose2D(2)),
    "POOL_2D max": one("POOL_2D", 9, 7, 3, params=Pool2D(0, 3, 2, 2, 2, 1, 1)),
    "POOL_2D mean": one("POOL_2D", 9, 7, 3, params=Pool2D(1, 3, 2, 2, 1, 2, 0)),
    **{f"UPSCALE {mode}": upscale(mode) for mode in (0, 1, 257)},
    "UPSCALE twice": lambda leaves: [b.node("UPSCALE", leaves.normal(5, 4, 3), params=Upscale(0), ne=(10, 8, 3))],
    "permuted": permuted, "part": part, "part of a value": part_of_value, "overlapping rows": reshaped_rows,
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operation(device: LocalDevice, name: str) -> None:
    leaves = Leaves(len(name))
    check(device, leaves, CASES[name](leaves))
