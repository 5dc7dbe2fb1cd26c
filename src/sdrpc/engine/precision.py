"""In which dtype each value is computed and held.

*exact*: everything that ggml calls a float is computed in float32, and rounded where a tensor is declared narrower.
*fast*: matrix products, convolutions and attention take and give a narrow dtype (they accumulate in float32), and what
lies between them stays narrow; an operation marked GGML_PREC_F32 takes and gives float32, but for attention over keys
that are narrower: native clients mark all of theirs, and mean what is added up.
*ggml*: as exact, but what is multiplied is rounded first as ggml's CPU backend does it (:mod:`sdrpc.engine.rounding`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from sdrpc.device import PRECISIONS
from sdrpc.errors import InvalidValue
from sdrpc.ggml.params import PREC_F32, Conv2D, ConvTranspose2D, FlashAttn, MulMat
from sdrpc.ggml.types import F16, F32, Type

from .blocks.eight_bits import EIGHT_BITS
from .dtypes import DTYPES
from .operations import Attention, EngineOp
from .ops import KERNELS, Autocast, moves_blocks
from .system import processor_features
from .values import Place, Value, ordered
from .weights import WeightFormat

MANY_ROWS = 16
"""With at most so many rows a product takes weights of 8 bits as other weights: reading these is most of the work, and
tensor cores want more."""
EIGHT_BITS_ALIGNMENT = 16
"""Rows and columns of a matrix of 8 bits a number come in so many for tensor cores."""

FEW = 32
"""A product with no more rows takes less time on a CPU in float16 than converting its weights each time."""

BYTES = torch.uint8
"""How blocks are held: as they are in memory."""


@dataclass(frozen=True)
class Precision:
    """A way to compute. Fields:

    ``narrow``: the dtype of matrix products, convolutions and attention, None in exact precision.
    ``follows``: that dtype is float16 for graphs whose weights are mostly that, which then need no conversion.
    ``channels_last``: kernels of convolutions are kept with their channels together, which cuDNN and oneDNN would
    otherwise arrange anew at each use (a fifth of a UNet's time).
    ``halves``: few rows are multiplied with float16 weights in float16, as ggml does it, where there is no room to keep
    those in ``narrow``, and one row always: reading weights is most of the work then.
    ``floats8``, ``integers8``: the hardware multiplies 8-bit floats, or integers, so much faster that it pays: weights
    of such numbers are taken as they are, and activations become that.
    ``rounds``: what is multiplied is rounded as ggml's CPU backend does it.
    """

    name: str
    narrow: torch.dtype | None = None
    follows: bool = False
    channels_last: bool = False
    halves: bool = False
    floats8: bool = False
    integers8: bool = False
    rounds: bool = False

    def suited(self, roots: Sequence[Value]) -> Precision:
        """This precision for the weights that the graph has."""
        if not self.follows:
            return self
        size: Counter[Type] = Counter()
        for value in ordered(roots):
            weight = value.src[0] if value.op is not EngineOp.LEAF and _autocast(value) is Autocast.NARROW else None
            if weight is not None and weight.op is EngineOp.LEAF:
                size[weight.type] += prod(weight.ne)
        half = size[F16] > sum(size.values()) / 2
        return replace(self, narrow=torch.float16 if half else self.narrow, follows=False)


INTEGERS_PAY = {(8, 6), (8, 9), (12, 0), (12, 1)}
"""Capabilities of GPUs that multiply 8-bit integers four times as fast as bfloat16 with sums in float32: GeForce 30, 40
and 50. Where it is twice as fast, on an H200, such a product took 1.4 times as long as one in bfloat16, compiled too:
its sums come as 32 bits a number."""

EXACT = Precision("exact")
GGML = Precision("ggml", rounds=True)


def choose(name: str, device: torch.device) -> Precision:
    """The precision called ``name`` (one of ``PRECISIONS``) on ``device``. Raises :class:`InvalidValue` for another."""
    if name not in PRECISIONS:
        raise InvalidValue("precision", name, f"there are {', '.join(PRECISIONS)}")
    if name == "ggml":
        return GGML
    if name == "exact" or (name == "auto" and not _is_narrow_faster(device)):
        return EXACT
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return Precision("fast", torch.float16, channels_last=True)  # before Ampere there is no bfloat16
    if device.type == "cpu":
        halves = "avx512_fp16" in processor_features()
        return Precision("fast", torch.bfloat16, channels_last=True, halves=halves)
    cuda = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if cuda and torch.version.hip is None else (0, 0)
    return Precision(
        "fast",
        torch.bfloat16,
        follows=True,
        channels_last=cuda,
        floats8=capability >= (8, 9),  # from Ada on
        integers8=capability in INTEGERS_PAY,
    )


def _is_narrow_faster(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (7, 0)
    return device.type != "cpu" or bool(processor_features() & {"amx_bf16", "avx512_bf16"})


def assign(roots: Sequence[Value], precision: Precision) -> tuple[Value, ...]:
    """``roots`` with a dtype for every value, and conversions where operands are needed in another one: CAST and
    DEQUANTIZE of computed values, WEIGHT and OPPORTUNISTIC_WEIGHT of leaves, which can be kept."""
    return _Assigner(roots, precision).run()


def _autocast(value: Value) -> Autocast:
    return KERNELS[value.op].autocast


def _in_float32(value: Value) -> bool:
    """Whether the client wants a product, a convolution or attention in float32."""
    match value.params:
        case MulMat(prec=prec) | Conv2D(prec=prec) | ConvTranspose2D(prec=prec):
            return prec == PREC_F32
        case FlashAttn(prec=prec) | Attention(prec=prec):
            return prec == PREC_F32 and all(s is None or s.type is F32 for s in value.src[:3])
    return False


def _rows_of_halves(value: Value) -> int | None:
    """How many rows, or places of images, ``value`` multiplies with a weight in F16; None if it is no such product."""
    weight = value.src[0] if value.op in ("MUL_MAT", EngineOp.LINEAR, "CONV_2D") else None
    if weight is None or weight.op is not EngineOp.LEAF or weight.type is not F16:
        return None
    return prod(value.ne) // (value.ne[2] if value.op == "CONV_2D" else value.ne[0])


class _Assigner:
    def __init__(self, roots: Sequence[Value], precision: Precision) -> None:
        self.roots, self.narrow, self.channels_last = roots, precision.narrow, precision.channels_last
        self.halves, self.precision = precision.halves, precision
        self.done: dict[Value, Value] = {}
        self.casts: dict[tuple[Value, torch.dtype], Value] = {}
        self.weights: dict[tuple[EngineOp, Place, WeightFormat], Value] = {}
        self.written = [v.store or v.place for v in roots]

    def run(self) -> tuple[Value, ...]:
        for value in ordered(self.roots):
            self.done[value] = self._assign(value)
        return tuple(self.done[value] for value in self.roots)

    def _assign(self, value: Value) -> Value:
        own = DTYPES.get(value.type)
        if value.op is EngineOp.LEAF:
            return replace(value, dtype=own or BYTES)
        src = [None if s is None else self.done[s] for s in value.src]
        if value.op is EngineOp.SNAPSHOT:
            return replace(value, src=tuple(src), dtype=src[0].dtype if src[0] is not None else own)
        raw: Sequence[int] = range(len(src)) if moves_blocks(value) else KERNELS[value.op].raw
        if (eights := self._in_eight_bits(value, src)) is not None:
            return eights
        compute = self._compute(value, [s for s in src if s is not None])
        rows = _rows_of_halves(value) if self.halves and compute is self.narrow else None
        if rows == 1:
            raw = (0,)
        opportunistic = rows is not None and rows <= FEW
        operands = tuple(
            s if s is None or i in raw else self._as(s, self._format(value, i, compute), opportunistic and i == 0)
            for i, s in enumerate(src)
        )
        return replace(value, src=operands, dtype=self._held(value, own, compute))

    def _in_eight_bits(self, value: Value, src: Sequence[Value | None]) -> Value | None:
        """``value`` as a product with its weight of 8 bits as it is, where the hardware has such."""
        if self.narrow is None or value.op not in ("MUL_MAT", EngineOp.LINEAR):
            return None
        weight, x = src[:2]
        kind = EIGHT_BITS.get(weight.type.name) if weight is not None and weight.op is EngineOp.LEAF else None
        if kind is None or weight is None or x is None or x.dtype is None or not x.dtype.is_floating_point:
            return None
        if not (self.precision.integers8 if kind.dtype is torch.int8 else self.precision.floats8):
            return None
        (k, m, *batches), place = weight.ne, weight.place
        if isinstance(value.params, MulMat) and value.params.prec == PREC_F32:
            return None
        if (k | m) % EIGHT_BITS_ALIGNMENT or batches != [1, 1] or prod(value.ne[1:]) <= MANY_ROWS:
            return None
        if place is None or any(place.overlaps(w) for w in self.written if w is not None):
            return None
        weight = self._weight(weight, EngineOp.WEIGHT, place, WeightFormat(torch.uint8, packed=True))
        rest = [None if s is None else self._as(s, WeightFormat(torch.float32)) for s in src[2:]]
        return replace(
            value,
            op=EngineOp.PRODUCT_8BIT,
            src=(weight, x, *rest),
            dtype=self._held(value, DTYPES.get(value.type), self.narrow),
        )

    def _weight(self, leaf: Value, op: EngineOp, place: Place, format: WeightFormat) -> Value:
        """``leaf``, which is at ``place``, converted to ``format``, for all who want that."""
        made = self.weights.get((op, place, format))
        if made is None:
            dtype = None if op is EngineOp.OPPORTUNISTIC_WEIGHT else format.dtype
            made = self.weights[op, place, format] = replace(leaf, op=op, src=(leaf,), params=format, dtype=dtype)
        return made

    def _compute(self, value: Value, src: Sequence[Value]) -> torch.dtype:
        """The dtype that all floating operands get."""
        autocast = _autocast(value)
        if autocast is Autocast.MOVES:
            floats = [s for s in src if s.dtype is not None and (s.dtype.is_floating_point or not s.type.plain)]
            dtypes = {s.dtype if s.type.plain and s.dtype is not None else torch.float32 for s in floats}
            if len(dtypes) == 1:
                return dtypes.pop()
            return self.narrow if self.narrow in dtypes and self.narrow is not None else torch.float32
        if self.narrow is None:
            return torch.float32
        if autocast is Autocast.NARROW:
            return torch.float32 if _in_float32(value) else self.narrow
        if autocast is Autocast.FOLLOWS and any(s.dtype is self.narrow and s.op is not EngineOp.LEAF for s in src):
            return self.narrow
        return torch.float32

    def _held(self, value: Value, own: torch.dtype | None, compute: torch.dtype) -> torch.dtype:
        if own is None:
            return BYTES
        if not own.is_floating_point or self.narrow is None or compute is not self.narrow:
            return own
        return own if _autocast(value) is Autocast.FLOAT32 else self.narrow

    def _format(self, value: Value, i: int, compute: torch.dtype) -> WeightFormat:
        """How ``value`` wants its operand ``i``, if that is a weight."""
        kernel = value.src[0] if value.op == "CONV_2D" and i == 0 else None
        several_taps = kernel is not None and kernel.op is EngineOp.LEAF and kernel.ne[:2] != (1, 1)
        return WeightFormat(compute, self.channels_last and several_taps)

    def _as(self, operand: Value, format: WeightFormat, opportunistic: bool = False) -> Value:
        """``operand`` in ``format``; integers stay as they are. ``opportunistic``: its reader takes a leaf in its own
        dtype as well."""
        own, compute = operand.dtype, format.dtype
        blocks = not operand.type.plain
        fits = own is compute and not format.channels_last
        if fits or (own is not None and not own.is_floating_point and not blocks):
            return operand
        if operand.op is EngineOp.LEAF and operand.place is not None:
            place = operand.place
            if not any(place.overlaps(w) for w in self.written if w is not None):
                op = EngineOp.OPPORTUNISTIC_WEIGHT if opportunistic else EngineOp.WEIGHT
                return self._weight(operand, op, place, format)
            if opportunistic:
                return operand
        cast = self.casts.get((operand, compute))
        if cast is None:
            cast = self.casts[operand, compute] = Value(
                EngineOp.DEQUANTIZE if blocks else EngineOp.CAST,
                F32,
                operand.ne,
                (operand,),
                at=operand.at,
                dtype=compute,
                node=operand.node,
            )
        return cast
