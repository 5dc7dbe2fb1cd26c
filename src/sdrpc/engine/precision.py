"""In which dtype each value is computed and held.

*exact*: everything that ggml calls a float is computed in float32, and rounded where a tensor is declared narrower.
*fast*: matrix products, convolutions and attention take and give a narrow dtype (they accumulate in float32), and what
lies between them stays narrow; an operation marked GGML_PREC_F32 takes and gives float32.
*ggml*: as exact, but what is multiplied is rounded first as ggml's CPU backend does it (:mod:`sdrpc.engine.rounding`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from sdrpc.errors import UsageError
from sdrpc.ggml.params import MulMat
from sdrpc.ggml.types import F16, F32, Type

from .dtypes import DTYPES
from .system import processor_features
from .values import Place, Value, moves_blocks, ordered
from .weights import Form

PREC_F32 = 10
"""ggml_prec: GGML_PREC_F32."""

FEW = 32
"""A product with no more rows takes less time on a CPU in float16 than converting its weights each time."""

BYTES = torch.uint8
"""How blocks are held: as they are in memory."""

HEAVY = frozenset({
    "MUL_MAT", "MUL_MAT_ID", "OUT_PROD", "CONV_2D", "CONV_2D_DW", "CONV_3D", "CONV_TRANSPOSE_1D", "CONV_TRANSPOSE_2D",
    "FLASH_ATTN_EXT", "LINEAR", "ATTENTION",
})  # fmt: skip
"""What is worth a narrow dtype."""

MOVES = frozenset({
    "VIEW", "SNAPSHOT", "CPY", "CONT", "DUP", "CONCAT", "REPEAT", "SET", "PAD", "PAD_REFLECT_1D", "ROLL", "TRI", "DIAG",
    "WIN_PART", "WIN_UNPART", "GET_REL_POS", "IM2COL", "IM2COL_3D",
})  # fmt: skip
"""What moves numbers without computing: in any dtype."""

FOLLOWS = frozenset({
    "ADD", "ADD_ID", "SUB", "MUL", "DIV", "SCALE", "CLAMP", "LEAKY_RELU", "UNARY", "GLU", "NORM", "RMS_NORM",
    "GROUP_NORM", "SOFT_MAX", "UPSCALE", "DIAG_MASK_INF", "DIAG_MASK_ZERO",
    "NORM_AFFINE", "GROUP_NORM_AFFINE", "RMS_NORM_AFFINE",
})  # fmt: skip
"""What stays narrow when it is fed narrow values (torch computes these in float32 inside)."""

RAW: dict[str, tuple[int, ...]] = {
    "GET_ROWS": (0,), "MUL_MAT_ID": (0,), "SET_ROWS": (0, 1, 2), "IM2COL": (0,), "IM2COL_3D": (0,),
}  # fmt: skip
"""Operands that are taken as they are: rows and matrices are converted when they are picked, the destination of
SET_ROWS is memory, and of its kernel IM2COL wants the shape only."""


@dataclass(frozen=True)
class Precision:
    """``narrow`` is the dtype of heavy operations, None in exact precision. ``follows``: it is float16 for graphs whose
    weights are mostly that, which then need no conversion. ``channels_last``: kernels of convolutions are kept with
    their channels together, which cuDNN and oneDNN would otherwise arrange anew at each use (a fifth of a UNet's time).
    ``halves``: few rows are multiplied with float16 weights in float16, as ggml does it, where there is no room to keep
    those in ``narrow``, and one row always: reading weights is most of the work then. ``rounds``: what is multiplied is
    rounded as ggml's CPU backend does it."""

    name: str
    narrow: torch.dtype | None = None
    follows: bool = False
    channels_last: bool = False
    halves: bool = False
    rounds: bool = False

    def suited(self, effects: Sequence[Value]) -> Precision:
        """This precision for the weights that the graph has."""
        if not self.follows:
            return self
        size: Counter[Type] = Counter()
        for value in ordered(effects):
            if value.op in HEAVY and value.src[0] is not None and value.src[0].op == "LEAF":
                size[value.src[0].type] += prod(value.src[0].ne)
        half = size[F16] > sum(size.values()) / 2
        return replace(self, narrow=torch.float16 if half else self.narrow, follows=False)


EXACT = Precision("exact")
GGML = Precision("ggml", rounds=True)


def choose(name: str, device: torch.device) -> Precision:
    """The precision called ``name`` (exact, fast, ggml, auto) on ``device``. Raises :class:`UsageError` for another."""
    if name not in ("exact", "fast", "ggml", "auto"):
        raise UsageError(f"precision {name!r}: exact, fast, ggml or auto")
    if name == "ggml":
        return GGML
    if name == "exact" or (name == "auto" and not _is_narrow_faster(device)):
        return EXACT
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return Precision("fast", torch.float16, channels_last=True)  # before Ampere there is no bfloat16
    if device.type == "cpu":
        halves = "avx512_fp16" in processor_features()
        return Precision("fast", torch.bfloat16, channels_last=True, halves=halves)
    return Precision("fast", torch.bfloat16, follows=True, channels_last=device.type == "cuda")


def _is_narrow_faster(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (7, 0)
    return device.type != "cpu" or bool(processor_features() & {"amx_bf16", "avx512_bf16"})


def assign(effects: Sequence[Value], precision: Precision) -> tuple[Value, ...]:
    """``effects`` with a dtype for every value, and CAST and WEIGHT values where operands need another one; SPARED ones
    are weights that come in that dtype only if they are kept in it, else as they are."""
    return _Assigner(effects, precision).run()


def _rows_of_halves(value: Value) -> int | None:
    """How many rows, or places of images, ``value`` multiplies with a weight in F16; None if it is no such product."""
    weight = value.src[0] if value.op in ("MUL_MAT", "LINEAR", "CONV_2D") else None
    if weight is None or weight.op != "LEAF" or weight.type is not F16:
        return None
    return prod(value.ne) // (value.ne[2] if value.op == "CONV_2D" else value.ne[0])


class _Assigner:
    def __init__(self, effects: Sequence[Value], precision: Precision) -> None:
        self.effects, self.narrow, self.channels_last = effects, precision.narrow, precision.channels_last
        self.halves = precision.halves
        self.done: dict[Value, Value] = {}
        self.casts: dict[tuple[Value, torch.dtype], Value] = {}
        self.weights: dict[tuple[str, Place, Form], Value] = {}
        self.written = [v.store or v.place for v in effects]

    def run(self) -> tuple[Value, ...]:
        for value in ordered(self.effects):
            self.done[value] = self._assign(value)
        return tuple(self.done[value] for value in self.effects)

    def _assign(self, value: Value) -> Value:
        own = DTYPES.get(value.type)
        if value.op == "LEAF":
            return replace(value, dtype=own or BYTES)
        src = [None if s is None else self.done[s] for s in value.src]
        if value.op == "SNAPSHOT":
            return replace(value, src=tuple(src), dtype=src[0].dtype if src[0] is not None else own)
        raw: Sequence[int] = range(len(src)) if moves_blocks(value) else RAW.get(value.op, ())
        compute = self._compute(value, [s for s in src if s is not None])
        rows = _rows_of_halves(value) if self.halves and compute is self.narrow else None
        if rows == 1:
            raw = (0,)
        spared = rows is not None and rows <= FEW
        operands = tuple(
            s if s is None or i in raw else self._as(s, self._form(value, i, compute), spared and i == 0)
            for i, s in enumerate(src)
        )
        return replace(value, src=operands, dtype=self._held(value, own, compute))

    def _compute(self, value: Value, src: Sequence[Value]) -> torch.dtype:
        """The dtype that all floating operands get."""
        if value.op in MOVES:
            floats = [s for s in src if s.dtype is not None and (s.dtype.is_floating_point or not s.type.plain)]
            dtypes = {s.dtype if s.type.plain and s.dtype is not None else torch.float32 for s in floats}
            if len(dtypes) == 1:
                return dtypes.pop()
            return self.narrow if self.narrow in dtypes and self.narrow is not None else torch.float32
        if self.narrow is None:
            return torch.float32
        if value.op in HEAVY:
            if isinstance(value.params, MulMat) and value.params.prec == PREC_F32:
                return torch.float32
            return self.narrow
        if value.op in FOLLOWS and any(s.dtype is self.narrow and s.op != "LEAF" for s in src):
            return self.narrow
        return torch.float32

    def _held(self, value: Value, own: torch.dtype | None, compute: torch.dtype) -> torch.dtype:
        if own is None:
            return BYTES
        if not own.is_floating_point or self.narrow is None or compute is not self.narrow:
            return own
        return self.narrow if value.op in HEAVY or value.op in FOLLOWS or value.op in MOVES else own

    def _form(self, value: Value, i: int, compute: torch.dtype) -> Form:
        """How ``value`` wants its operand ``i``."""
        kernel = value.src[0] if value.op == "CONV_2D" and i == 0 else None
        several_taps = kernel is not None and kernel.op == "LEAF" and kernel.ne[:2] != (1, 1)
        return Form(compute, self.channels_last and several_taps)

    def _as(self, operand: Value, form: Form, spared: bool = False) -> Value:
        """``operand`` in ``form``; integers stay as they are. ``spared``: a leaf that does as it is, too."""
        own, compute = operand.dtype, form.dtype
        blocks = not operand.type.plain
        fits = own is compute and not form.channels_last
        if fits or (own is not None and not own.is_floating_point and not blocks):
            return operand
        if operand.op == "LEAF" and operand.place is not None:
            place = operand.place
            if not any(place.overlaps(w) for w in self.written if w is not None):
                op = "SPARED" if spared else "WEIGHT"
                made = self.weights.get((op, place, form))
                if made is None:
                    made = self.weights[op, place, form] = replace(
                        operand, op=op, src=(operand,), params=form, place=place, dtype=None if spared else compute
                    )
                return made
            if spared:
                return operand
        cast = self.casts.get((operand, compute))
        if cast is None:
            cast = self.casts[operand, compute] = Value(
                "DEQUANTIZE" if blocks else "CAST",
                F32,
                operand.ne,
                (operand,),
                at=operand.at,
                dtype=compute,
                node=operand.node,
            )
        return cast
