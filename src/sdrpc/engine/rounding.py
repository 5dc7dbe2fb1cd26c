"""What ggml's CPU backend rounds before it multiplies, said as copies in the graph.

Its products take two operands that suit each other: of the second one, which is F32, it makes what the first one's type
asks for (``vec_dot_type`` in ``type_traits_cpu``, ggml-cpu.c), which is the same type for plain weights, and 8 bits a
number for weights in blocks. The rest is float32 arithmetic: products of such small integers have sums without rounding
errors. A graph with these copies in it, computed in float32, gives what ggml's CPU backend gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sdrpc.ggml.types import F16, F32, TYPES, Type

from .operations import EngineOp
from .ops import KERNELS
from .values import Value, ordered

_MADE_FOR = {
    "F16": ("F16",),
    "BF16": ("BF16",),
    "Q8_0": ("Q1_0", "Q2_0", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4"),
    "Q8_1": ("Q4_1", "Q5_1"),
    "Q8_K": (
        "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
        "IQ4_XS", "TQ1_0", "TQ2_0",
    ),
}  # fmt: skip
MADE: dict[Type, Type] = {TYPES[name]: TYPES[made] for made, names in _MADE_FOR.items() for name in names}
"""What is made of an operand in F32, by the type of the one that it is multiplied with; of all others nothing is."""

CONVOLUTIONS = ("CONV_2D", "CONV_3D", "CONV_TRANSPOSE_1D", "CONV_TRANSPOSE_2D")
"""Those that are one operation in ggml: it has them with kernels in F32 and F16 alone."""
PRODUCTS = {op: kernel.rounds for op, kernel in KERNELS.items() if kernel.rounds is not None}
"""Which operand's type decides, and which operand is rounded: of attention the keys and the queries."""

TILE = 64
"""So many queries attend in tiles where keys and values are F16 (GGML_FA_TILE_Q): in float32, and as they are."""
PARTS = 512
"""From so many keys on ggml adds up for a single query in as many parts as it has threads, which only it knows."""


def rounded(roots: Sequence[Value]) -> tuple[Value, ...]:
    """``roots``, not yet fused, with a CPY of each operand that ggml's CPU backend rounds; one for several products.

    Attention over values in F16 adds up in F16 there, which costs it some 1e-8 of normalized mean square error a key.
    Blocks of the next weights make 1e-4 of that: what they round to 8 bits goes another way wherever it lies between
    two numbers. So few keys are added up in F16 here as well (see :data:`PARTS`).
    """
    new: dict[Value, Value] = {}
    copies: dict[tuple[Value, Type], Value] = {}
    for value in ordered(roots):
        src = [None if s is None else new[s] for s in value.src]
        if found := _operand_to_round(value):
            i, made = found
            operand = src[i]
            assert operand is not None  # noqa: S101
            if (operand, made) not in copies:
                copies[operand, made] = Value("CPY", made, operand.ne, (operand,), at=operand.at, node=operand.node)
            src[i] = copies[operand, made]
        op = EngineOp.FLASH_ATTN_F16_SUMS if _adds_up_in_f16(value) else value.op
        new[value] = replace(value, op=op, src=tuple(src))
    return tuple(new[value] for value in roots)


def _operand_to_round(value: Value) -> tuple[int, Type] | None:
    """Which one it is, and to what."""
    if value.op not in PRODUCTS or _in_tiles(value):
        return None
    decides, i = PRODUCTS[value.op]
    weight, operand = value.src[decides], value.src[i]
    if weight is None or operand is None or operand.type is not F32 or weight.type not in MADE:
        return None
    if value.op in CONVOLUTIONS and weight.type is not F16:
        return None
    return i, MADE[weight.type]


def _adds_up_in_f16(value: Value) -> bool:
    """Whether ``value`` is attention that adds up in F16, in an order that is known."""
    values = value.src[2] if value.op == "FLASH_ATTN_EXT" else None
    return values is not None and values.type is F16 and values.ne[1] < PARTS and not _in_tiles(value)


def _in_tiles(value: Value) -> bool:
    """Whether ``value`` is attention that rounds nothing."""
    if value.op != "FLASH_ATTN_EXT":
        return False
    queries, *held = value.src[:3]
    return queries is not None and queries.ne[1] >= TILE and all(s is not None and s.type is F16 for s in held)
