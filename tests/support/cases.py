"""Small graphs, at least one per operation: what each test of an interpreter or compiler of graphs runs over.

A case gets a :class:`Feed` and gives the graph's last node. Names begin with the operation's name.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sdrpc.ggml import params as p
from sdrpc.ggml.build import cast, cont, cpy, inplace, mul_mat, node, permute, reshape, transpose, view
from sdrpc.ggml.rules.elementwise import GLU_OPS, UNARY_OPS
from sdrpc.ggml.tensor import Tensor
from sdrpc.ggml.types import BF16, F16, I32, TYPES
from tests.support import cases_attention, cases_integers, cases_recurrent
from tests.support.feed import QUANTIZED, Feed

Case = Callable[[Feed], Tensor]


def _binary(op: str) -> dict[str, Case]:
    return {
        op: lambda f: node(op, f(5, 4, 3, 2), f(5, 4, 3, 2)),
        f"{op}-row": lambda f: node(op, f(5, 4, 3, 2), f(5)),
        f"{op}-channel": lambda f: node(op, f(5, 4, 6, 2), f(1, 1, 6)),
        f"{op}-tiled": lambda f: node(op, f(6, 4), f(3, 2)),
        f"{op}-strided": lambda f: node(op, permute(f(5, 4, 3), 1, 0, 2, 3), transpose(f(5, 4))),
        f"{op}-f16": lambda f: node(op, f(5, 4, type=F16), f(5, 4)),
    }


def _pad(*amounts: int, circular: int = 0) -> p.Pad:
    return p.Pad(*amounts, circular=circular)


def _rope(n_dims: int, mode: int, freq_scale: float = 1.0, attn: float = 1.0) -> p.Rope:
    return p.Rope(0, n_dims, mode, 0, 0, 10000.0, freq_scale, 0.0, attn, 32.0, 1.0)


def _yarn(mode: int, context: int) -> p.Rope:
    sections = (1, 1, 1, 1) if mode & 8 else (0, 0, 0, 0)
    return p.Rope(0, 4 if mode == 24 else 8, mode, 0, context, 10000.0, 0.9, 0.7465, 1.1, 32.0, 1.0, *sections)


def _causal(rows: int, columns: int) -> np.ndarray:
    return np.where(np.arange(columns) > np.arange(rows)[:, None], -np.inf, 0.0)


def _positions(n: int) -> np.ndarray:
    return np.arange(n) * 3 % 7


CASES: dict[str, Case] = {
    # copies
    "DUP": lambda f: node("DUP", permute(f(5, 4, 3), 2, 0, 1, 3)),
    "DUP-blocks": lambda f: cast(node("DUP", permute(f(32, 4, 3, type=TYPES["Q4_0"]), 0, 2, 1, 3)), TYPES["F32"]),
    "CONT": lambda f: cont(permute(f(5, 4, 3, 2), 1, 2, 0, 3)),
    "CONT-reshape": lambda f: cont(transpose(f(6, 4)), 3, 8),
    "CPY-cast-f16": lambda f: cast(f(5, 4), F16),
    "CPY-cast-bf16": lambda f: cast(f(5, 4), BF16),
    "CPY-cast-i32": lambda f: cast(f.of([[1.0, -2.75, 3.5]]), I32),
    "CPY-from-i32": lambda f: cast(f.of([[7, -3]], I32), TYPES["F32"]),
    "CPY-dequantize": lambda f: cast(f(64, 3, type=TYPES["Q8_0"]), TYPES["F32"]),
    "CPY-quantize": lambda f: cast(cast(f(64, 3), TYPES["Q4_0"]), TYPES["F32"]),
    "CPY-blocks": lambda f: cast(cpy(f(64, 3, type=TYPES["Q4_0"]), f(32, 6, type=TYPES["Q4_0"])), TYPES["F32"]),
    "CPY-into": lambda f: cpy(transpose(f(4, 5)), f(5, 4, type=F16)),
    "CPY-into-part": lambda f: cpy(f(3, 2), view(f(6, 5), 3, 2, offset=4 * 8)),
    "CPY-other-shape": lambda f: cpy(f(6, 4), f(3, 8)),
    "REPEAT": lambda f: node("REPEAT", f(3, 1, 2), ne=(6, 4, 2, 2)),
    "CONCAT-0": lambda f: node("CONCAT", f(3, 4), f(5, 4), params=p.Concat(0)),
    "CONCAT-2": lambda f: node("CONCAT", f(3, 4, 2), f(3, 4, 5), params=p.Concat(2)),
    "CONCAT-blocks": lambda f: cast(
        node("CONCAT", f(64, 3, type=TYPES["Q4_0"]), f(32, 3, type=TYPES["Q4_0"]), params=p.Concat(0)), TYPES["F32"]
    ),
    "PAD": lambda f: node("PAD", f(4, 3, 2), params=_pad(1, 2, 0, 1, 3, 0, 1, 1)),
    "PAD-circular": lambda f: node("PAD", f(4, 3, 2), params=_pad(1, 2, 2, 1, 0, 0, 0, 0, circular=1)),
    "PAD_REFLECT_1D": lambda f: node("PAD_REFLECT_1D", f(5, 3, 2), params=p.PadReflect(4, 2)),
    "ROLL": lambda f: node("ROLL", f(5, 4, 3, 2), params=p.Roll(2, -3, 0, 1)),
    "SET": lambda f: node("SET", f(6, 5), f(3, 2), params=p.SetView(24, 120, 120, 28, 0)),
    "ACC": lambda f: node("ACC", f(6, 5), f(3, 2), params=p.SetView(24, 120, 120, 28, 0)),
    "SET-inplace": lambda f: inplace("SET", f(6, 5), f(3, 2), params=p.SetView(48, 120, 120, 8, 1)),
    "GET_ROWS": lambda f: node("GET_ROWS", f(6, 5), f.of([4, 0, 0, 2], I32)),
    "GET_ROWS-f16": lambda f: node("GET_ROWS", f(6, 5, type=F16), f.of([4, 0, 0, 2], I32)),
    "GET_ROWS-quantized": lambda f: node("GET_ROWS", f(64, 5, type=TYPES["Q8_0"]), f.of([4, 0, 2], I32)),
    "GET_ROWS-batch": lambda f: node("GET_ROWS", f(6, 5, 2), f.of([[4, 0, 1], [1, 2, 3]], I32)),
    "SET_ROWS": lambda f: inplace(
        "SET_ROWS", f(6, 2), f.of([3, 0], TYPES["I64"]), f(6, 5, type=F16), into=2
    ),
    "SET_ROWS-quantized": lambda f: cast(
        inplace("SET_ROWS", f(64, 2), f.of([3, 0], I32), f(64, 5, type=TYPES["Q4_0"]), into=2), TYPES["F32"]
    ),
    "SET_ROWS-none": lambda f: inplace("SET_ROWS", f(6, 0), f.of(np.zeros(0), I32), f(6, 5), into=2),
    "ARANGE": lambda f: node("ARANGE", params=p.Arange(1.0, 5.5, 0.5)),
    "FILL": lambda f: node("FILL", f(4, 3), params=p.Fill(2.5)),
    # element by element
    **_binary("ADD"), **_binary("SUB"), **_binary("MUL"), **_binary("DIV"),
    "ADD-blocks": lambda f: node("ADD", f(64, 3, type=TYPES["Q8_0"]), f(64, 3), type=TYPES["F32"]),
    "ADD1": lambda f: node("ADD1", f(5, 4), f(1)),
    "ADD-inplace": lambda f: inplace("ADD", f(5, 4), f(5)),
    "ADD-into-second": lambda f: inplace("ADD", f(5, 4), f(5, 4), into=1),
    "SQR": lambda f: node("SQR", f(5, 4)),
    "SQRT": lambda f: node("SQRT", node("SQR", f(5, 4))),
    "LOG": lambda f: node("LOG", node("SQR", f(5, 4))),
    "SIN": lambda f: node("SIN", f(5, 4)),
    "COS": lambda f: node("COS", f(5, 4)),
    "SCALE": lambda f: node("SCALE", f(5, 4), params=p.Scale(0.5, 2.0)),
    "CLAMP": lambda f: node("CLAMP", f(5, 4), params=p.Clamp(-0.5, float("inf"))),
    "CLAMP-crossed": lambda f: node("CLAMP", f(5, 4), params=p.Clamp(0.5, -0.5)),
    "LEAKY_RELU": lambda f: node("LEAKY_RELU", f(5, 4), params=p.LeakyRelu(0.1)),
    **{
        f"UNARY-{op}": lambda f, op=op: node("UNARY", f(7, 4), params=p.Unary(op, 1.5, 0.75, 0.5, -0.125))
        for op in sorted(UNARY_OPS)
    },
    "UNARY-strided": lambda f: node("UNARY", transpose(f(7, 4)), params=p.Unary("SILU")),
    **{
        f"GLU-{op}": lambda f, op=op: node("GLU", f(8, 3), params=p.Glu(op, alpha=1.7, limit=0.7))
        for op in sorted(GLU_OPS)
    },
    "GLU-odd": lambda f: node("GLU", f(7, 3), params=p.Glu("SWIGLU")),
    "GLU-odd-swapped": lambda f: node("GLU", f(7, 3), params=p.Glu("REGLU", swapped=1)),
    "GLU-swapped": lambda f: node("GLU", f(8, 3), params=p.Glu("GEGLU", swapped=1)),
    "GLU-split": lambda f: node("GLU", f(8, 3), f(8, 3), params=p.Glu("SWIGLU")),
    "DIAG_MASK_INF": lambda f: node("DIAG_MASK_INF", f(5, 4, 2), params=p.DiagMask(1)),
    "DIAG_MASK_ZERO": lambda f: node("DIAG_MASK_ZERO", f(5, 4, 2), params=p.DiagMask(0)),
    "TIMESTEP_EMBEDDING": lambda f: node(
        "TIMESTEP_EMBEDDING", f.of([1.0, 500.0, 999.0]), params=p.TimestepEmbedding(8, 10000)
    ),
    "TIMESTEP_EMBEDDING-odd": lambda f: node(
        "TIMESTEP_EMBEDDING", f.of([1.0, 500.0]), params=p.TimestepEmbedding(7, 10000), ne=(8, 2)
    ),
    "ROPE": lambda f: node("ROPE", f(8, 3, 5, 2), f.of(_positions(5), I32), params=_rope(8, 0, 0.5)),
    "ROPE-neox": lambda f: node("ROPE", f(8, 3, 5, 2), f.of(_positions(5), I32), params=_rope(6, 2, 1.0, 1.5)),
    **{
        f"ROPE-yarn-{mode}-of-{context}": lambda f, mode=mode, context=context: node(
            "ROPE", f(8, 3, 5, 2), f.of(np.resize(_positions(5), 20 if mode & 8 else 5), I32),
            params=_yarn(mode, context),
        )
        for context in (0, 512)
        for mode in (0, 2, 8, 24, 40)
    },
    "ROPE-factors": lambda f: node(
        "ROPE", f(8, 3, 5), f.of(_positions(5), I32), f.of([1.0, 2.0, 4.0, 8.0]), params=_rope(8, 0)
    ),
    # rows and reductions
    "SUM": lambda f: node("SUM", f(5, 4, 3)),
    "SUM-permuted": lambda f: node("SUM", permute(f(33, 256), 1, 0, 2, 3)),
    "SUM-none": lambda f: node("SUM", f(5, 0, 3)),
    "SUM_ROWS-none": lambda f: node("SUM_ROWS", f(0, 3)),
    "MUL_MAT-of-none": lambda f: mul_mat(f(0, 5), f(0, 3)),
    "PAD-none": lambda f: node("PAD", f(4, 0), params=_pad(1, 0, 1, 1, 0, 0, 0, 0)),
    "ACC-none": lambda f: node("ACC", f(6, 5), f(3, 0), params=p.SetView(24, 120, 120, 28, 0)),
    "SUM_ROWS": lambda f: node("SUM_ROWS", f(5, 4, 3)),
    "MEAN": lambda f: node("MEAN", permute(f(5, 4, 3), 1, 0, 2, 3)),
    "ARGMAX": lambda f: node("ARGMAX", f(5, 4)),
    "ARGSORT": lambda f: node("ARGSORT", f(9, 4), params=p.ArgSort(0)),
    "ARGSORT-descending": lambda f: node("ARGSORT", f(9, 4), params=p.ArgSort(1)),
    "TOP_K": lambda f: node("TOP_K", f(9, 4), ne=(1, 4)),
    "COUNT_EQUAL": lambda f: node("COUNT_EQUAL", f.of([[1, 2, 3]], I32), f.of([[1, 5, 3]], I32)),
    "CUMSUM": lambda f: node("CUMSUM", f(5, 4)),
    **{f"TRI-{part}": lambda f, part=part: node("TRI", f(5, 5, 2), params=p.Tri(part)) for part in range(4)},
    "DIAG": lambda f: node("DIAG", f(5, 1, 3, 2)),
    "NORM": lambda f: node("NORM", f(16, 4, 2), params=p.Eps(1e-5)),
    "RMS_NORM": lambda f: node("RMS_NORM", f(16, 4, 2), params=p.Eps(1e-6)),
    "L2_NORM": lambda f: node("L2_NORM", f(16, 4, 2), params=p.Eps(1e-6)),
    "GROUP_NORM": lambda f: node("GROUP_NORM", f(4, 3, 8, 2), params=p.GroupNorm(4, 1e-6)),
    "GROUP_NORM-unlike": lambda f: node("GROUP_NORM", f(4, 3, 8, 2), params=p.GroupNorm(3, 1e-6)),
    "GROUP_NORM-unlike-affine": lambda f: node(
        "ADD", node("MUL", node("GROUP_NORM", f(4, 3, 8), params=p.GroupNorm(3, 1e-6)), f(1, 1, 8)), f(1, 1, 8)
    ),
    "SOFT_MAX": lambda f: node("SOFT_MAX", f(7, 5, 3, 2), params=p.SoftMax(0.5)),
    "SOFT_MAX-mask": lambda f: node("SOFT_MAX", f(7, 5, 4), f.of(_causal(5, 7), F16), params=p.SoftMax(0.5)),
    "SOFT_MAX-slopes": lambda f: node("SOFT_MAX", f(7, 5, 6, 2), f(7, 8, 3, 1), params=p.SoftMax(0.5, 8.0)),
    # products
    "MUL_MAT": lambda f: mul_mat(f(16, 5), f(16, 3, 2)),
    "MUL_MAT-f16": lambda f: mul_mat(f(16, 5, type=F16), f(16, 3)),
    "MUL_MAT-bf16": lambda f: mul_mat(f(16, 5, type=BF16), f(16, 3)),
    "MUL_MAT-both-f16": lambda f: mul_mat(f(16, 5, type=F16), f(16, 3, type=F16)),
    "MUL_MAT-prec": lambda f: mul_mat(f(16, 5), f(16, 3), prec=10),
    "MUL_MAT-heads": lambda f: mul_mat(f(8, 5, 2, 1), f(8, 3, 4, 2)),
    "MUL_MAT-strided": lambda f: mul_mat(permute(f(8, 4, 5), 0, 2, 1, 3), permute(f(8, 4, 3), 0, 2, 1, 3)),
    **{f"MUL_MAT-{t.name}": lambda f, t=t: mul_mat(f(256, 4, type=t), f(256, 3)) for t in QUANTIZED},
    "OUT_PROD": lambda f: node("OUT_PROD", f(5, 7, 2), f(3, 7, 4)),
    "FLASH_ATTN_EXT": lambda f: node(
        "FLASH_ATTN_EXT", f(8, 5, 2, 2), f(8, 7, 2, 2, type=F16), f(6, 7, 2, 2, type=F16), params=p.FlashAttn(0.35)
    ),
    "FLASH_ATTN_EXT-mask": lambda f: node(
        "FLASH_ATTN_EXT", f(8, 5, 2), f(8, 7, 2), f(8, 7, 2), f.of(_causal(5, 7), F16), params=p.FlashAttn(0.35)
    ),
    "FLASH_ATTN_EXT-groups": lambda f: node(
        "FLASH_ATTN_EXT", f(8, 5, 4), f(8, 7, 2), f(8, 7, 2), params=p.FlashAttn(0.35, 0.0, 2.0)
    ),
    "FLASH_ATTN_EXT-slopes": lambda f: node(
        "FLASH_ATTN_EXT", f(8, 5, 6), f(8, 7, 6), f(8, 7, 6), f(7, 5, type=F16), params=p.FlashAttn(0.35, 8.0)
    ),
    # rows of 8 numbers, 9 apart: a GPU's attention kernels read 16 bytes at once
    "FLASH_ATTN_EXT-rows-apart": lambda f: node(
        "FLASH_ATTN_EXT",
        view(f(9, 5, 2), 8, 5, 2, offset=4), view(f(9, 7, 2), 8, 7, 2), view(f(9, 7, 2, type=F16), 8, 7, 2, offset=2),
        params=p.FlashAttn(0.35),
    ),
    # images
    "IM2COL": lambda f: node("IM2COL", f(3, 2, 4, 5), f(9, 7, 4, 2), params=p.Im2Col(2, 1, 1, 2, 1, 2, 1), type=F16),
    "IM2COL-1d": lambda f: node("IM2COL", f(3, 4, 5), f(9, 4, 2), params=p.Im2Col(2, 0, 1, 0, 2, 0, 0)),
    "CONV_2D": lambda f: node("CONV_2D", f(3, 3, 4, 5, type=F16), f(9, 7, 4, 2), params=p.Conv2D(2, 1, 1, 2, 1, 2)),
    # windows that are larger than their input: one output, by C's division
    "CONV_2D-larger-than-its-image": lambda f: node(
        "CONV_2D", f(3, 3, 4, 5), f(1, 7, 4, 2), params=p.Conv2D(3, 1, 0, 1, 1, 1)
    ),
    "CONV_2D-dilated-past-its-image": lambda f: node(
        "CONV_2D", f(3, 2, 4, 5), f(6, 2, 4, 2), params=p.Conv2D(7, 9, 1, 2, 6, 7)
    ),
    "CONV_2D-beside-its-image": lambda f: node(
        "CONV_2D", f(2, 1, 4, 5), f(2, 3, 4), params=p.Conv2D(9, 1, 1, 0, 7, 1)
    ),
    "CONV_2D_DW-larger-than-its-image": lambda f: node(
        "CONV_2D_DW", f(3, 3, 1, 4), f(2, 1, 4, 2), params=p.Conv2D(2, 3, 0, 0, 1, 1)
    ),
    "CONV_3D-larger-than-its-image": lambda f: node(
        "CONV_3D", f(3, 2, 3, 6), f(7, 1, 2, 4), params=p.Window3D(2, 2, 4, 1, 0, 0, 2, 1, 2, 2, 2, 3)
    ),
    "IM2COL-larger-than-its-image": lambda f: node(
        "IM2COL", f(3, 4, 4, 5), f(1, 7, 4, 2), params=p.Im2Col(3, 1, 0, 1, 1, 1, 1)
    ),
    "IM2COL-1d-larger-than-its-image": lambda f: node(
        "IM2COL", f(4, 3, 5), f(2, 3, 2), params=p.Im2Col(5, 0, 0, 0, 1, 0, 0)
    ),
    "IM2COL_3D-more-than-the-kernel-says": lambda f: node(
        "IM2COL_3D", f(3, 3, 3, 1), f(5, 4, 6, 10), params=p.Window3D(1, 1, 1, 0, 0, 0, 1, 1, 1, 3)
    ),
    "IM2COL_3D-larger-than-its-image": lambda f: node(
        "IM2COL_3D", f(3, 3, 3, 4), f(1, 4, 2, 4), params=p.Window3D(3, 1, 2, 0, 0, 0, 1, 1, 1, 2)
    ),
    "CONV_2D_DW": lambda f: node("CONV_2D_DW", f(3, 3, 1, 4), f(9, 7, 4, 2), params=p.Conv2D(2, 1, 1, 2, 1, 2)),
    "CONV_2D_DW-channels-first": lambda f: node(
        "CONV_2D_DW", permute(f(4, 1, 3, 3), 3, 2, 0, 1), permute(f(4, 9, 7, 2), 2, 0, 1, 3),
        params=p.Conv2D(1, 2, 1, 1, 1, 1),
    ),
    "IM2COL_3D": lambda f: node(
        "IM2COL_3D", f(3, 2, 2, 6), f(7, 6, 5, 4), params=p.Window3D(2, 1, 1, 1, 2, 3, 2, 1, 2, 2), type=F16
    ),
    "CONV_3D": lambda f: node(
        "CONV_3D", f(3, 2, 2, 6, type=F16), f(7, 6, 5, 4), params=p.Window3D(2, 1, 1, 1, 2, 3, 2, 1, 2, 2, 2, 3)
    ),
    "CONV_TRANSPOSE_1D": lambda f: node("CONV_TRANSPOSE_1D", f(3, 2, 4), f(5, 4), params=p.ConvTranspose1D(2)),
    "COL2IM_1D": lambda f: node("COL2IM_1D", f(6, 5), params=p.Col2Im1D(2, 2, 1)),
    "POOL_1D-max": lambda f: node("POOL_1D", f(9, 4, 2), params=p.Pool1D(0, 3, 2, 1)),
    "POOL_1D-mean": lambda f: node("POOL_1D", f(9, 4, 2), params=p.Pool1D(1, 4, 1, 3)),
    "WIN_PART": lambda f: node("WIN_PART", f(3, 7, 5), params=p.Windows(2, 2, 4)),
    "WIN_UNPART": lambda f: node("WIN_UNPART", f(3, 4, 4, 4), params=p.Unwindow(4), ne=(3, 7, 5)),
    "GET_REL_POS": lambda f: node("GET_REL_POS", f(3, 7, type=F16)),
    "ADD_REL_POS": lambda f: node("ADD_REL_POS", f(9, 20, 2), f(3, 5, 4, 2), f(3, 5, 4, 2), params=p.InPlace()),
    "CONV_TRANSPOSE_2D": lambda f: node(
        "CONV_TRANSPOSE_2D", f(3, 2, 5, 4, type=F16), f(4, 3, 4, 2), params=p.ConvTranspose2D(2)
    ),
    "POOL_2D-max": lambda f: node("POOL_2D", f(9, 8, 3, 2), params=p.Pool2D(0, 3, 2, 2, 2, 1, 1)),
    "POOL_2D-mean": lambda f: node("POOL_2D", f(9, 8, 3, 2), params=p.Pool2D(1, 3, 2, 2, 2, 1, 1)),
    "UPSCALE": lambda f: node("UPSCALE", f(4, 3, 2, 2), params=p.Upscale(0), ne=(8, 6, 2, 2)),
    "UPSCALE-uneven": lambda f: node("UPSCALE", f(4, 3, 2), params=p.Upscale(0), ne=(7, 2, 2, 1)),
    "UPSCALE-bilinear": lambda f: node("UPSCALE", f(4, 3, 2), params=p.Upscale(1), ne=(8, 7, 2, 1)),
    "UPSCALE-corners": lambda f: node("UPSCALE", f(4, 3, 2), params=p.Upscale(257), ne=(8, 7, 2, 1)),
    **{
        f"UPSCALE-{mode}-{n}": lambda f, mode=mode, n=n: node("UPSCALE", f(6, 5), params=p.Upscale(mode), ne=(n, 4))
        for mode in (256, 2, 258, 513, 769)
        for n in (13, 3, 1)
    },
    # names for bytes, read through a copy
    "RESHAPE": lambda f: node("SQR", reshape(f(6, 4), 3, 2, 4)),
    "VIEW": lambda f: node("SQR", view(f(6, 4, 3), 3, 2, 2, offset=4 * 8)),
    "PERMUTE": lambda f: node("SQR", permute(f(5, 4, 3, 2), 3, 1, 0, 2)),
    "TRANSPOSE": lambda f: node("SQR", transpose(f(5, 4))),
    **cases_attention.CASES,
    **cases_integers.CASES,
    **cases_recurrent.CASES,
}  # fmt: skip
